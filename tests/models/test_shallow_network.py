"""The shallow linear network: its starts, its paths on every way of taking steps, and the guard."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import dlnlab
from dlnlab.callbacks import LyapunovExponent, MemberGuard, Recorder, ShallowTheory
from dlnlab.data import ScalarTarget, SparseRegression
from dlnlab.kernels import shallow as kernel
from dlnlab.models import ShallowLinearNetwork
from dlnlab.optim import GradientFlow
from dlnlab.theory import shallow

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
INITS = ["gaussian", "orthogonal", "equal", "region_A", "region_B", "region_C"]


class Generic(ShallowLinearNetwork):
    """The same by autograd: a network with its own loss has no closed form."""

    def losses(self, batch):
        return super().losses(batch)


def fit(
    steps=300, network=ShallowLinearNetwork, data=None, callbacks=(), guard=None, variables=None, axes=None, **kwargs
):
    model = network(ensemble=dlnlab.Ensemble(**(axes or {})), **kwargs)
    recorder = Recorder(variables=variables)
    trainer = Trainer(max_steps=steps, callbacks=[MemberGuard(**(guard or {})), *callbacks, recorder], **QUIET)
    trainer.fit(model, data or ScalarTarget())
    return model, recorder.dataset()


def start(**kwargs):
    """The network before its first step."""
    model, _ = fit(steps=1, axes=kwargs.pop("axes", None), **kwargs)
    initial = model._optimizer.state[model.p]
    return initial["initial_plus"], initial["initial_minus"], model


# Starts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 4])
def test_starts_have_the_size_and_lie_in_the_region_they_are_named_for(width):
    axes = {"init": INITS[1:], "init_scale": [1.2, 3.0], "seed": 20}
    p, m, _ = start(axes=axes, width=width)
    alpha = dlnlab.Ensemble(**axes).init_scale
    torch.testing.assert_close(p.square().sum(-1) + m.square().sum(-1), 2 * alpha**2)
    product = ((p.square() - m.square()).sum(-1) / 2).reshape(5, 2, 20)
    torch.testing.assert_close(product[0], torch.zeros(2, 20, dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(product[1], alpha.reshape(5, 2, 20)[1] ** 2)
    assert (product[2] > 1).all()
    assert ((product[3] > 0) & (product[3] < 1)).all()
    assert (product[4] < 0).all()
    if width > 1:  # equal norms
        torch.testing.assert_close((p * m).sum(-1), torch.zeros(200, dtype=torch.float64), atol=1e-14, rtol=0)
    assert len({float(value) for value in product[2, 0]}) == 20  # seeds differ


def test_gaussian_starts_have_the_variance_they_say():
    p, m, model = start(axes={"seed": 4000}, init_scale=0.5, width=5)
    a, b = (p + m) / math.sqrt(2), (p - m) / math.sqrt(2)
    for factor in (a, b):
        # 20,000 numbers: the variance's own deviation is 1 %.
        torch.testing.assert_close(factor.var(), torch.tensor(0.05, dtype=torch.float64), rtol=0.04, atol=0)
    assert model.width == 5


def test_a_and_b_are_the_rotated_parameters():
    model, _ = fit(steps=3, axes={"seed": 2})
    torch.testing.assert_close((model.a * model.b).sum(-1), model.predictor()[:, 0])
    torch.testing.assert_close((model.a**2 + model.b**2).sum(-1), model.norm_squared)
    torch.testing.assert_close(model.eps, model.predictor()[:, 0] - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "small"}, "init"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"width": 0}, "width"),
        ({"init": "region_A", "init_scale": 0.5}, "needs init_scale above 1"),
        ({"init": "region_B", "data": ScalarTarget(-1.0)}, "positive target"),
        ({"data": SparseRegression(5, 3, 2)}, "use ScalarTarget"),
        ({"lr_unit": "mean_square_edge"}, "lr_unit"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(steps=1, **arguments)


def test_on_several_rows_of_one_feature_it_is_a_network_without_a_target():
    x, y = torch.tensor([[1.0], [0.5]]), torch.tensor([2.0, 1.0])

    def train(**options):
        return dlnlab.simulate(x, y, model=ShallowLinearNetwork, lr=0.05, steps=2000, batch_size=1, **options)

    dataset = train()
    assert "not one row" in dataset.path
    np.testing.assert_allclose(dataset.train_loss[-1], 0, atol=1e-12)
    for options in ({"init": "region_B"}, {"record": ["eps"]}, {"callbacks": [ShallowTheory()]}):
        with pytest.raises(ValueError, match="not one row x = 1"):
            train(**options)


def test_a_target_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="target"):
        ScalarTarget(math.nan)


# Paths ----------------------------------------------------------------------------------------------------------------

EVERYTHING = ["train_loss", "distance", "beta", "gain", "effective_init", "imbalance", "norm_squared", "eps", "a", "b"]
STABLE = {"lr": [0.05, 0.1, 0.3], "init": INITS, "target": [1.0, 0.3], "seed": 2}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_closed_form_and_autograd_take_the_same_path(dtype):
    fast, generic = (
        fit(network=cls, axes=STABLE, init_scale=1.5, width=4, dtype=dtype, variables=EVERYTHING)
        for cls in (ShallowLinearNetwork, Generic)
    )
    assert fast[0].path == "closed form"
    assert "autograd" in generic[0].path
    near = {"rtol": 1e-10, "atol": 1e-13} if dtype == "float64" else {"rtol": 1e-3, "atol": 2e-5}  # 300 stable steps
    for name, values in fast[1].items():
        if name in ("status", "diverged_by"):
            assert (values == generic[1][name]).all()
        else:
            np.testing.assert_allclose(values, generic[1][name], err_msg=name, **near)


def test_the_compiled_kernel_and_the_reference_in_torch_agree(monkeypatch):
    guard = {"tol": 1e-16, "bound": 1e6, "every_n_steps": 7}
    axes = {**STABLE, "lr": [0.05, 0.3, 3.0]}
    compiled = fit(axes=axes, init_scale=1.5, width=4, variables=EVERYTHING, guard=guard)
    monkeypatch.setattr(
        dlnlab.kernels, "shallow_kernel", lambda device: (kernel.advance_torch, "it is what the kernel is held to")
    )
    reference = fit(axes=axes, init_scale=1.5, width=4, variables=EVERYTHING, guard=guard)
    assert reference[0].path == "closed form, in torch: it is what the kernel is held to"
    assert set(np.unique(compiled[1].status)) == {"running", "converged", "diverged"}
    for name, values in compiled[1].items():
        if name in ("status", "diverged_by"):
            assert (values == reference[1][name]).all()
        else:  # a diverging member multiplies rounding by its own growth, here up to 1e3
            np.testing.assert_allclose(values, reference[1][name], err_msg=name, rtol=1e-9, atol=1e-11)


def test_plain_gradient_descent_in_a_and_b_goes_the_same_way():
    model, _ = fit(steps=500, axes={"lr": [0.1, 0.4], "seed": 3}, width=3, guard={"tol": 0})
    initial = model._optimizer.state[model.p]
    p, m = initial["initial_plus"].numpy(), initial["initial_minus"].numpy()
    a, b, lr = (p + m) / math.sqrt(2), (p - m) / math.sqrt(2), np.repeat([0.1, 0.4], 3)[:, None]
    for _ in range(500):
        eps = (a * b).sum(1, keepdims=True) - 1
        a, b = a - lr * eps * b, b - lr * eps * a
    # The rounding of 500 stable steps.
    np.testing.assert_allclose(model.a.detach(), a, rtol=0, atol=1e-13)
    np.testing.assert_allclose(model.b.detach(), b, rtol=0, atol=1e-13)
    np.testing.assert_allclose(model._optimizer.imbalance, a**2 - b**2, rtol=0, atol=1e-13)


CHAOTIC = {"lr": [0.3, 1.2, 1.9], "init": ["equal", "orthogonal"], "init_scale": [0.3, 0.9], "seed": 3}


@pytest.mark.parametrize("max_chunk", [1, 13, 100])
def test_no_result_depends_on_where_chunks_end(max_chunk):
    whole = fit(steps=400, axes=CHAOTIC, variables=EVERYTHING, width=3)
    parts = fit(steps=400, axes=CHAOTIC, variables=EVERYTHING, width=3, max_chunk=max_chunk)
    assert whole[1].equals(parts[1])


def test_a_member_has_the_same_bits_alone_in_company_and_on_any_number_of_threads(monkeypatch):
    together = fit(steps=500, axes=CHAOTIC, width=3)[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads = fit(steps=500, axes=CHAOTIC, width=3)[0]
    assert torch.equal(together.p, threads.p)
    assert torch.equal(together._optimizer.gain, threads._optimizer.gain)
    for member in (0, 7, 20, 35):
        label = {name: [value] for name, value in together.ensemble.labels[member].items()}
        alone = fit(steps=500, axes=label, width=3)[0]
        assert torch.equal(alone.m[0], together.m[member])
        assert torch.equal(alone.predictor()[0], together.predictor()[member])


def test_imbalance_goes_on_shrinking_below_the_range_of_numbers():
    # Chaos for 50,000 steps: the gain passes thousands, and m has left floating point.
    model, dataset = fit(steps=50_000, axes={"lr": [1.25]}, init="orthogonal", init_scale=0.7, width=1)
    gain = float(model._optimizer.gain[0, 0])
    assert gain > 2000
    assert 0 < abs(model.m[0, 0].item()) < 1e-130
    assert (dataset.imbalance_error < 1e-9).all()  # 50,000 roundings of a logarithm of thousands
    assert model.status[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 0.1}, "label_noise"),
        ({"axes": {"weight_decay": [0.01]}}, "weight_decay"),
        ({"optimizer": torch.optim.SGD, "axes": {"lr": [0.1]}}, "SGD"),
    ],
)
def test_what_the_closed_form_does_not_cover_goes_by_autograd_and_says_why(arguments, message):
    model, _ = fit(steps=50, guard={"tol": 0}, **arguments)
    assert "autograd" in model.path
    assert message in model.path
    assert (model.eps.abs() < 1).all()


# The guard ------------------------------------------------------------------------------------------------------------


def test_members_stop_where_the_guards_grid_says():
    _, dataset = fit(
        steps=1000, axes={"lr": [0.2, 3.0, 1.2]}, init="orthogonal", guard={"every_n_steps": 10, "tol": 1e-12}
    )
    status, stopped = dataset.status.isel(step=-1).values.tolist(), dataset.stopped_at.values
    assert status == ["converged", "diverged", "running"]
    assert stopped[0] % 10 == 0
    last = dataset.train_loss.isel(step=-1)
    assert last[0] < 1e-12
    assert last[1] <= 1e10  # back at its last check
    assert stopped[1] % 10 == 0
    assert stopped[2] == -1


def test_every_members_status_agrees_with_the_divergence_line():
    axes = {"lr": {"log10": [-2, 0.6, 60]}, "init_scale": {"log10": [-1.15, 0.85, 60]}}
    _, dataset = fit(
        steps=20_000,
        axes=axes,
        init="orthogonal",
        width=1,
        callbacks=[ShallowTheory(at=[20_000])],
        guard={"tol": 5e-17},
    )
    error = dataset.divergence_error.isel(step=-1)
    assert (error.fillna(0) == 0).all()
    assert error.isnull().sum() <= 2  # next to the line a member takes longer to leave
    assert set(np.unique(dataset.status.isel(step=-1))) == {"running", "converged", "diverged"}


def test_the_laws_hold_in_the_run_whatever_the_step_size():
    axes = {"lr": [0.05, 0.5, 1.1, 1.9], "init": INITS[:3], "seed": 5}
    _, dataset = fit(steps=2000, axes=axes, width=3, callbacks=[ShallowTheory()], guard={"tol": 0})
    for law in ("eps_law_error", "norm_squared_law_error", "imbalance_law_error", "escape_law_error"):
        assert float(dataset[law].max()) < 1e-14
    assert float(dataset.norm_squared_error.max()) < 1e-9  # 2000 roundings, some of them of steps that nearly vanish
    assert (dataset.imbalance_ratio.isel(lr=0) <= 1).all()


def test_members_end_flatter_than_the_flow_and_as_far_as_the_gain_says():
    axes = {"lr": [0.1, 0.2, 0.4], "seed": 10}
    model, dataset = fit(steps=20_000, axes=axes, width=5, lr_unit="flow_edge", callbacks=[ShallowTheory()])
    last = dataset.isel(step=-1)
    assert (last.status == "converged").all()
    assert (last.sharpness_over_flow < 1).all()
    assert (np.diff(last.sharpness_over_flow.values, axis=0) < 0).all()  # the flatter, the larger the step
    np.testing.assert_allclose(last.lr_over_flow_edge, np.broadcast_to([[0.1], [0.2], [0.4]], (3, 10)))
    exact = shallow.norm_squared_at(
        model.target, shallow.spread(*_start(model)), torch.exp(-model._optimizer.gain[:, 0])
    )
    torch.testing.assert_close(model.norm_squared, exact, rtol=1e-8, atol=0)  # a loss of 1e-20 is an eps of 1e-10


def _start(model):
    initial = model._optimizer.state[model.p]
    return initial["initial_plus"], initial["initial_minus"]


def test_gradient_flow_ends_where_theory_says():
    model, _ = fit(
        steps=40, axes={"seed": 4}, width=3, guard={"tol": 0},
        optimizer=lambda groups: GradientFlow(groups, times={"log10": [-1, 2, 30]}),
    )  # fmt: skip
    p, m = shallow.flow_limit(*_start(model), model.target)
    torch.testing.assert_close(model.p.detach(), p, rtol=1e-9, atol=1e-9)  # the flow's steps have a tolerance of 1e-12
    torch.testing.assert_close(model.m.detach(), m, rtol=1e-9, atol=1e-9)


def test_the_lyapunov_exponent_is_measured_at_the_end():
    axes = {"lr": [0.6, 2.0], "seed": 4}
    _, dataset = fit(
        steps=1000, axes=axes, init="equal", init_scale=0.6, callbacks=[LyapunovExponent(2000)], guard={"tol": 0}
    )
    found = dataset.lyapunov.isel(step=-1).values
    np.testing.assert_allclose(found[0], math.log(0.2), atol=0.01)  # |1 - 0.6 * 2 Phi|; ...
    np.testing.assert_allclose(found[1], math.log(3), atol=0.06)  # ... at eta Phi = 2 chaos, the mean of 2000 steps


@pytest.mark.parametrize("measurement", [ShallowTheory, LyapunovExponent])
def test_measurements_of_the_shallow_network_refuse_others(measurement):
    model = dlnlab.models.DiagonalLinearNetwork()
    trainer = Trainer(max_steps=1, callbacks=[measurement(at=[1])], **QUIET)
    with pytest.raises(ValueError, match="ShallowLinearNetwork"):
        trainer.fit(model, SparseRegression(5, 3, 2))
