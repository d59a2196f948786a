"""SGD's noise, its gain and its stationary mean, against enumeration and the definitions."""

from functools import partial

import numpy as np
import pytest
import torch

import dlnlab
from dlnlab.callbacks import GainForecast, GainFormula, LassoDistance, SgdNoise
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim import StochasticGradientFlow
from dlnlab.theory import lasso, loss_integral, min_hypentropy

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 9))
TEACHER = np.array([1.0, -0.5, 0, 0, 0, 0, 0, 0, 0])
Y = X @ TEACHER
H = (X**2).mean(0)


def simulate(callback, optimizer=None, **options):
    model = DiagonalLinearNetwork if optimizer is None else partial(DiagonalLinearNetwork, optimizer=optimizer)
    given = {"lr": [0.02, 0.05], "init_scale": 0.3, "steps": 300, "seed": 2, "guard": {"tol": 0}, "batch_size": 1}
    given["record"] = {"at": {"range": 301}, "variables": ["train_loss", "beta", "gain", "effective_init"]}
    return dlnlab.simulate(X, Y, teacher=TEACHER, model=model, callbacks=[callback], **(given | options))


def test_the_covariance_of_the_noise_is_that_of_the_rows_gradients():
    found = simulate(SgdNoise(at=[0, 40])).sel(step=40)
    for beta, error, trace, own, model in zip(
        found.beta.values.reshape(-1, 9), found.noise_error.values.ravel(), found.noise_trace_ratio.values.ravel(),
        found.noise_directions.values.ravel(), found.model_directions.values.ravel(), strict=True,
    ):  # fmt: skip
        gradients = X * (X @ beta - Y)[:, None]
        covariance = np.cov(gradients.T, bias=True)
        assumed = np.mean((X @ beta - Y) ** 2) * X.T @ X / 6
        assert error == pytest.approx(np.linalg.norm(covariance - assumed) / np.linalg.norm(assumed))
        assert trace == pytest.approx(np.trace(covariance) / np.trace(assumed))
        for matrix, directions in ((covariance, own), (assumed, model)):
            values = np.linalg.eigvalsh(matrix)
            assert directions == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_the_integral_of_the_loss_is_the_trapezoidal_sum_over_the_looks():
    found = simulate(GainFormula(every_n_steps=5))
    looks = found.train_loss.sel(step=slice(0, 300, 5)).values
    integral = np.trapezoid(looks, dx=1.0, axis=-1)[..., None] * 5 * np.array([0.02, 0.05]).reshape(2, 1, 1)
    last = found.isel(step=-1)
    np.testing.assert_allclose(last.integrated_loss, integral[..., 0])
    formula = 2 * found.lr.values.reshape(2, 1, 1) * integral * H
    np.testing.assert_allclose(last.gain_over_formula, last.gain.values.sum(-1) / formula.sum(-1))
    np.testing.assert_allclose(last.mean_effective_init, np.exp(np.log(last.effective_init).mean("coordinate")))
    np.testing.assert_allclose(last.predicted_effective_init, 0.3 * np.exp(-formula.mean(-1) / 2))


def test_looks_at_every_step_make_it_exact_and_the_flow_fulfils_its_formula_at_any_schedule():
    close, wide = (simulate(GainFormula(every_n_steps=n)).isel(step=-1) for n in (1, 3))
    np.testing.assert_allclose(close.integrated_loss, wide.integrated_loss, rtol=0.05)  # noisy losses, every third
    flow = simulate(GainFormula(at=[0]), StochasticGradientFlow, batch_size="full").isel(step=-1)
    np.testing.assert_allclose(flow.gain_over_formula, 1)
    np.testing.assert_allclose(flow.predicted_effective_init, flow.mean_effective_init)


def test_the_integral_goes_on_after_a_checkpoint():
    whole, half, rest = GainFormula(), GainFormula(), GainFormula()
    model = Stub()
    for step in range(4):
        integral = whole._integral(*model.at(step))
    for step in (0, 1):
        half._integral(*model.at(step))
    rest.load_state_dict(half.state_dict())
    for step in (2, 3):
        resumed = rest._integral(*model.at(step))
    assert integral.tolist() == resumed.tolist() == [pytest.approx(0.5 + 2.5 + 6.5)]


class Stub:
    """A model whose loss at time t is t^2."""

    _optimizer = None

    def at(self, step):
        self.losses = lambda batch: torch.tensor([float(step) ** 2])
        return self, None, {"time": lambda: torch.tensor([float(step)], dtype=torch.float64)}


def test_the_forecast_is_gradient_flows_own_integral_and_right_at_small_steps():
    found = simulate(GainForecast(), lr=[0.0005, 0.001], init_scale=[0.01, 0.3], steps=60_000, record=["train_loss"])
    last = found.isel(step=-1)
    for scale in (0.01, 0.3):
        own = last.sel(init_scale=scale)
        integral = float(loss_integral(min_hypentropy(X, Y, scale)[0], scale))
        for lr in (0.0005, 0.001):
            forecast = np.exp(-lr * H.mean() * integral)
            np.testing.assert_allclose(own.sel(lr=lr).forecast_effective_init_ratio, forecast)
            # The law is of first order in lr, and one path's gain scatters by a few per cent about it.
            np.testing.assert_allclose(np.log(own.sel(lr=lr).effective_init_ratio), np.log(forecast), rtol=0.2)


def test_the_mean_iterate_under_label_noise_is_the_lassos():
    callback = LassoDistance(average_from=20_000, every_n_steps=250)
    options = {"lr": 0.02, "label_noise": [2.0, 4.0], "steps": 100_000, "init_scale": 0.5}
    found = simulate(callback, record={"at": [0], "variables": ["beta"]}, **options).isel(step=-1)
    for noise in (2.0, 4.0):
        beta, residual = lasso(X, Y, 0.02 * noise**2 / 2, H)
        assert residual < 1e-12
        own = found.sel(label_noise=noise)
        np.testing.assert_allclose(own.distance_lasso, ((beta.numpy() - TEACHER) ** 2).sum())
        # First order in lr; a single iterate is off by sqrt(lambda) = 0.2 and 0.4.
        assert (own.lasso_error < 0.1).all()
        single = np.linalg.norm(own.beta - beta.numpy(), axis=-1) / np.linalg.norm(beta.numpy())
        assert (single > own.lasso_error).all()


def test_before_the_average_begins_it_is_the_predictor():
    found = simulate(LassoDistance(average_from=200, at=[0, 100, 200, 300]), label_noise=1.0)
    lassos = np.stack([lasso(X, Y, lr / 2, H)[0].numpy() for lr in (0.02, 0.05)])[:, None]
    for step, mean in (
        (100, found.beta.sel(step=100)),
        (300, (found.beta.sel(step=200) + found.beta.sel(step=300)) / 2),
    ):
        expected = np.linalg.norm(mean - lassos, axis=-1) / np.linalg.norm(lassos, axis=-1)
        np.testing.assert_allclose(found.lasso_error.sel(step=step), expected)
