"""Gradient flow and stochastic gradient flow, against solvers that know nothing of them."""

import copy
import math
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from scipy.integrate import solve_ivp

import dlnlab
from dlnlab import Ensemble
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork
from dlnlab.optim import GradientFlow, StochasticGradientFlow


class Generic(DiagonalLinearNetwork):
    """The same network without its closed form."""

    def losses(self, batch):
        return super().losses(batch)


def problem(seed=0, n=4, d=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    teacher = np.zeros(d)
    teacher[:2] = 1.0, -0.5
    return x, x @ teacher, teacher


def flow(x, y, times, model=DiagonalLinearNetwork, record=("train_loss", "beta", "loss_integral", "imbalance"), **more):
    """The results of a flow; `more` are the flow's arguments in `optimizer`, and hyperparameters."""
    options = more.pop("optimizer", {})
    make = partial(model, optimizer=partial(GradientFlow, times=times, **options), **more.pop("model_options", {}))
    return dlnlab.simulate(x, y, model=make, record=list(record), guard={"tol": 0}, **more)


def truth(x, y, alpha, times, kappa=0.0):
    """The flow of (u, v) by SciPy: beta at the times, and the integral of the loss."""
    n, d = x.shape

    def velocity(_, state):
        u, v = state[:d], state[d : 2 * d]
        residual = x @ (u * v) - y
        g = x.T @ residual / n
        return np.concatenate([-g * v - 2 * kappa * u, -g * u - 2 * kappa * v, [residual @ residual / (2 * n)]])

    start = np.concatenate([np.full(d, math.sqrt(2) * alpha), np.zeros(d + 1)])
    found = solve_ivp(velocity, (0, times[-1]), start, "DOP853", t_eval=times, rtol=1e-12, atol=1e-14).y
    return (found[:d] * found[d : 2 * d]).T, found[-1]


@pytest.mark.parametrize("model", [DiagonalLinearNetwork, Generic])
@pytest.mark.parametrize("kappa", [0.0, 0.03])
def test_the_flow_agrees_with_scipys_in_u_and_v(model, kappa):
    x, y, _ = problem()
    times = [0.3, 1.0, 4.0, 9.0]
    found = flow(x, y, times, model, init_scale=[0.1, 0.7], optimizer={"weight_decay": kappa})
    assert found.time[0].values.tolist() == [0.0, *times]
    assert ("closed form" == found.attrs["path"]) == (model is DiagonalLinearNetwork and kappa == 0)
    for alpha in (0.1, 0.7):
        beta, integral = truth(x, y, alpha, times, kappa)
        one = found.sel(init_scale=alpha)
        # Both solvers are asked for local errors of 1e-12, over some hundred steps.
        np.testing.assert_allclose(one.beta.values[1:], beta, rtol=0, atol=1e-9)
        np.testing.assert_allclose(one.loss_integral.values[1:], integral, rtol=1e-9)


@pytest.mark.parametrize("alpha", [1e-20, 1e-6, 0.1, 30.0])
def test_the_flow_reaches_a_loss_of_1e_20_from_any_scale_and_keeps_what_is_conserved(alpha):
    x, y, _ = problem(n=5, d=8)
    end = 1e3 / min(alpha, 1.0) ** 2  # the slowest rate is that of a feature still at its initial scale
    found = flow(x, y, {"log10": [-2, math.log10(end), 40]}, init_scale=alpha)
    assert found.train_loss[-1] < 1e-20
    imbalance = found.imbalance.values
    np.testing.assert_allclose(imbalance, 2 * alpha**2, rtol=1e-10)
    # The flow's exact identity, at all times and with any interpolator b: int L = (psi(b) - D_psi(b, beta_t))/2.
    scale = alpha**2
    beta, last = found.beta.values, found.beta.values[-1]
    gradient = 0.5 * np.arcsinh(beta / scale)
    exact = ((gradient * (last - beta)).sum(-1) + psi(beta, scale) - psi(beta[0], scale)) / 2
    np.testing.assert_allclose(found.loss_integral.values[1:], exact[1:], rtol=1e-7 if alpha < 1 else 1e-5)


def psi(beta, scale):
    root = np.hypot(beta, scale)
    # scale - root without cancellation
    return 0.5 * (beta * np.arcsinh(beta / scale) - beta**2 / (root + scale)).sum(-1)


def test_a_flow_does_not_depend_on_chunks_company_or_the_path_before(fit):
    x, y, teacher = problem()
    data = oracles.GivenData(x[None], y[None], teacher[None])
    make = partial(GradientFlow, times={"log10": [-1, 0.5, 15]})
    for kind in (DiagonalLinearNetwork, Generic):
        runs = []
        for chunk in (1, 7, None):
            model = kind(ensemble=Ensemble(init_scale=[0.01, 0.3]), optimizer=make, max_chunk=chunk)
            recorder = Recorder(variables=["beta", "loss_integral"])
            fit(model, data, -1, [MemberGuard(), recorder])
            runs.append(recorder.dataset())
        assert runs[0].step.values.tolist() == list(range(16))
        for other in runs[1:]:
            assert runs[0].beta.equals(other.beta) and runs[0].loss_integral.equals(other.loss_integral)
        alone = kind(ensemble=Ensemble(init_scale=[0.3]), optimizer=make)
        fit(alone, oracles.GivenData(x[None], y[None], teacher[None]), 11)
        if kind is DiagonalLinearNetwork:
            assert torch.equal(alone.predictor()[0], torch.tensor(runs[0].beta.values[1, 11]))


def test_a_flow_resumes_bitwise(fit, tmp_path):
    x, y, teacher = problem()
    data = oracles.GivenData(x[None], y[None], teacher[None])
    for kind in (DiagonalLinearNetwork, Generic):
        models = [
            kind(ensemble=Ensemble(init_scale=[0.01, 0.3]), optimizer=partial(GradientFlow, times=[1.0, 2.0, 4.0]))
            for _ in range(3)
        ]
        fit(models[0], data, -1)
        trainer = fit(models[1], data, 2)
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        fit(models[2], data, -1, ckpt_path=tmp_path / "two.ckpt")
        assert torch.equal(models[0].predictor(), models[2].predictor())
        assert torch.equal(models[0]._optimizer.loss_integral, models[2]._optimizer.loss_integral)


def test_a_flow_goes_on_from_the_factors_of_any_signs():
    x, y, _ = problem()
    model = DiagonalLinearNetwork(dim=6, optimizer=partial(GradientFlow, times=[0.5, 2.0]))
    with torch.no_grad():
        model.w_plus.copy_(torch.tensor([[0.5, -0.4, 0.3, -0.2, 0.0, 0.6]]))
        model.w_minus.copy_(torch.tensor([[0.2, 0.3, -0.4, -0.5, 0.3, 0.1]]))
    before = [w.detach().clone().numpy()[0] for w in (model.w_plus, model.w_minus)]
    found = dlnlab.simulate(x, y, model=lambda ensemble: model, record=["beta"])
    n, d = x.shape

    def velocity(_, state):
        plus, minus = state[:d], state[d:]
        g = x.T @ (x @ (plus**2 - minus**2) / 2 - y) / n
        return np.concatenate([-g * plus, g * minus])

    right = solve_ivp(velocity, (0, 2), np.concatenate(before), "DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    # 1e-9: as above; the zero factor stays exactly where it was
    np.testing.assert_allclose(model.w_plus[0].detach(), right[:d], rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.w_minus[0].detach(), right[d:], rtol=0, atol=1e-9)
    assert model.w_plus[0, 4] == 0 and len(found.step) == 3


def test_float32_parameters_follow_the_same_flow():
    x, y, _ = problem()
    runs = [
        flow(x, y, [1.0, 5.0], kind, model_options={"dtype": dtype}, init_scale=0.3)
        for kind in (DiagonalLinearNetwork, Generic)
        for dtype in ("float64", "float32")
    ]
    for exact, single in (runs[:2], runs[2:]):
        # The closed form is rounded once, at the end; the generic path at every stage.
        np.testing.assert_allclose(single.beta.values, exact.beta.values, rtol=0, atol=1e-5)


def test_the_generic_flow_serves_other_networks():
    class Cubic(LinearNetwork):
        def build(self, num_features, num_outputs):
            self.u = torch.nn.Parameter(torch.full((self.num_members, num_features), 0.5))
            self.v = torch.nn.Parameter(torch.full((self.num_members, num_features), 0.5))

        def predictor(self):
            return self.u**3 - self.v**3

    x, y, _ = problem()
    found = flow(x, y, [1.0, 3.0], Cubic, record=("beta",))
    n, d = x.shape

    def velocity(_, state):
        u, v = state[:d], state[d:]
        g = x.T @ (x @ (u**3 - v**3) - y) / n
        return np.concatenate([-3 * g * u**2, 3 * g * v**2])

    right = solve_ivp(velocity, (0, 3), np.full(2 * d, 0.5), "DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    # 1e-9: as above
    np.testing.assert_allclose(found.beta.values[-1], right[:d] ** 3 - right[d:] ** 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        (partial(GradientFlow, times=[1.0]), {"batch_size": 2}, "batch_size = 2: GradientFlow follows the full loss"),
        (partial(GradientFlow, times=[1.0]), {"label_noise": 0.1}, "label_noise: GradientFlow follows"),
        (partial(GradientFlow, times=[1.0, 0.5]), {}, "times[1] = 0.5: must be later than the one before, 1"),
        (partial(GradientFlow, times=[-1.0]), {}, "times[0]"),
        (partial(GradientFlow, times=[0]), {}, "must name a time after 0"),
        (partial(GradientFlow, weight_decay=-1), {}, "weight_decay = -1"),
        (StochasticGradientFlow, {"batch_size": 2}, "batch_size = 2: StochasticGradientFlow follows"),
        (StochasticGradientFlow, {"weight_decay": [0.1, 0.2]}, "ensemble.weight_decay: this optimizer takes no"),
        (partial(StochasticGradientFlow, dt=0), {}, "dt"),
        (partial(StochasticGradientFlow, lr=-1), {}, "lr"),
        (partial(StochasticGradientFlow, noise="white"), {}, "noise"),
    ],
)
def test_what_a_flow_cannot_follow_is_refused_before_it_starts(optimizer, options, words):
    x, y, _ = problem()
    with pytest.raises(ValueError, match=r"must|takes no") as error:
        dlnlab.simulate(x, y, model=partial(DiagonalLinearNetwork, optimizer=optimizer), steps=3, **options)
    assert words in str(error.value)


def test_stochastic_gradient_flow_needs_the_closed_form():
    x, y, _ = problem()
    with pytest.raises(
        ValueError, match="needs the closed form of the diagonal linear network, but Generic has its own"
    ):
        dlnlab.simulate(x, y, model=partial(Generic, optimizer=StochasticGradientFlow), steps=3)


# Stochastic gradient flow ---------------------------------------------------------------------------------------------


def diffuse(x, y, steps, record=("beta", "gain", "loss_integral", "imbalance"), optimizer=None, **more):
    make = partial(DiagonalLinearNetwork, optimizer=partial(StochasticGradientFlow, **(optimizer or {})))
    return dlnlab.simulate(x, y, model=make, steps=steps, record=list(record), guard={"tol": 0}, **more)


@pytest.mark.parametrize("dt", [0.1, 1.0])
def test_the_gain_is_its_formula_and_the_path_stays_in_the_span_at_every_time_step(dt):
    x, y, _ = problem()
    lr, alpha = 0.05, 0.2
    found = diffuse(x, y, 300, lr=lr, init_scale=alpha, seed=3, optimizer={"dt": dt}).isel(step=-1)
    h = (x**2).mean(0)
    np.testing.assert_allclose(found.gain, 2 * lr * h * found.loss_integral.values[:, None], rtol=1e-12)
    # Neither is computed from the other: the imbalance comes from the factors.
    np.testing.assert_allclose(found.imbalance, 2 * alpha**2 * np.exp(-found.gain), rtol=1e-12)
    effective = alpha**2 * np.exp(-found.gain.values)
    dual = np.arcsinh(found.beta.values / effective)
    off = dual - dual @ np.linalg.pinv(x) @ x
    assert np.abs(off).max() < 1e-12 * np.abs(dual).max()
    assert np.isclose(found.time[0], 300 * dt * lr, rtol=1e-14)


@pytest.mark.parametrize("noise", ["mean_loss", "per_sample"])
@pytest.mark.parametrize("scheme", ["exponential", "euler"])
def test_its_law_is_that_of_the_stochastic_differential_equation(noise, scheme):
    """Means over seeds against a fine Euler-Maruyama simulation of (u, v) written out here."""
    x, y, _ = problem(n=3, d=2)
    lr, alpha, time, members = 0.4, 0.5, 2.0, 1000
    options = {"dt": 0.1, "noise": noise, "scheme": scheme}
    found = diffuse(x, y, round(time / (0.1 * lr)), lr=lr, init_scale=alpha, seed=members, optimizer=options)
    beta = found.beta.isel(step=-1).values
    rng = np.random.default_rng(1)
    n, d = x.shape
    u, v = np.full((members, d), math.sqrt(2) * alpha), np.zeros((members, d))
    steps = 1000
    for _ in range(steps):
        residual = (u * v) @ x.T - y
        std = np.abs(residual) if noise == "per_sample" else np.sqrt((residual**2).mean(-1, keepdims=True))
        shift = (
            residual / n * (time / steps) + std * math.sqrt(lr / n * time / steps) * rng.normal(size=residual.shape)
        ) @ x
        u, v = u - shift * v, v - shift * u
    for power in (1, 2):
        mine, theirs = beta**power, (u * v) ** power
        error = np.sqrt((mine.var(0) + theirs.var(0)) / members)
        # 4.5 standard errors, and 2 % for the time step of 0.1 lr (its first-order bias)
        assert (np.abs(mine.mean(0) - theirs.mean(0)) < 4.5 * error + 0.02 * np.abs(theirs.mean(0))).all()


def test_both_schemes_become_one_as_the_time_step_shrinks():
    x, y, _ = problem()
    gaps = []
    for dt in (0.04, 0.01, 0.0025):
        ends = [
            diffuse(x, y, 1, lr=0.2, init_scale=0.3, seed=20, optimizer={"dt": dt, "scheme": scheme}).beta.values[:, -1]
            for scheme in ("exponential", "euler")
        ]
        gaps.append(np.abs(ends[0] - ends[1]).mean())
    # One step from the same numbers: in beta, which is odd in them, the schemes differ by terms of order dt^1.5.
    assert 6.5 < gaps[0] / gaps[1] < 9.5 and 7 < gaps[1] / gaps[2] < 9


def test_stochastic_gradient_flow_does_not_depend_on_chunks_and_resumes_bitwise(fit, tmp_path):
    x, y, teacher = problem()
    data = oracles.GivenData(x[None], y[None], teacher[None])
    data.depends_on_seed = False

    def model(chunk=None):
        return DiagonalLinearNetwork(
            ensemble=Ensemble(lr=[0.01, 0.1], seed=3), optimizer=StochasticGradientFlow, max_chunk=chunk
        )

    models = [model(), model(7), model(1)]
    for each in models:
        fit(each, data, 150)
    part, rest = model(), model()
    fit(part, data, 70).save_checkpoint(tmp_path / "part.ckpt")
    fit(rest, data, 150, ckpt_path=tmp_path / "part.ckpt")
    for other in (*models[1:], rest):
        assert torch.equal(models[0].predictor(), other.predictor())
        assert torch.equal(models[0]._optimizer.gain, other._optimizer.gain)


@pytest.mark.parametrize("optimizer", [GradientFlow, StochasticGradientFlow])
def test_a_copied_flow_goes_on_as_the_original(optimizer):
    x = torch.tensor([[1.0, 0.2], [0.0, 1.0]], dtype=torch.float64)

    def start():
        return [torch.full((3, 2), value, dtype=torch.float64, requires_grad=True) for value in (0.5, 0.4)]

    def step(opt):
        def residual():
            return (w[0] * w[1]) @ x.T - 1

        w = opt.param_groups[0]["params"]

        def closure():
            opt.zero_grad()
            losses = residual().square().sum(-1)
            losses.sum().backward()
            return losses

        opt.step(closure if optimizer is GradientFlow else lambda: (x, residual().detach()))

    opt = optimizer([start()])
    for _ in range(4):
        step(opt)
    twin = copy.deepcopy(opt)
    for each in (opt, twin):
        step(each)
    for one, other in zip(opt.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert one is not other and torch.equal(one, other)
    assert opt.time == twin.time and torch.equal(opt.loss_integral, twin.loss_integral)
