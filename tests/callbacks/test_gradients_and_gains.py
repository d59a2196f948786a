"""GradientStatistics, LeadingGain and Perturbation against sums over batches, long runs and the theorem."""

import itertools

import numpy as np
import pytest
import torch

from dlnlab import Ensemble, theory
from dlnlab.callbacks import GradientStatistics, LeadingGain, Perturbation, Recorder
from dlnlab.data import SparseRegression
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim import GradientFlow


def run(fit, measurement, axes, steps, data=None, **arguments):
    model = DiagonalLinearNetwork(ensemble=Ensemble(**axes), **arguments)
    recorder = Recorder(at=[0], variables=["beta", "gain", "teacher", "train_loss"])
    fit(model, data or SparseRegression(5, 4, 2, num_test_samples=0), steps, [recorder, measurement])
    return model, recorder.dataset()


@pytest.mark.parametrize("sampling", ["replacement", "subset", "epochs"])
def test_squared_gradients_are_means_over_all_batches(fit, sampling):
    axes = {"lr": [0.05], "batch_size": [1, 2, "full"], "seed": 2}
    model, results = run(fit, GradientStatistics(at=[0]), axes, 3, sampling=sampling)
    for seed, batch, step in itertools.product(range(2), range(3), (0, 3)):
        x, y = model.problems.x[seed].numpy(), model.problems.y[seed].numpy()
        beta = results.beta.sel(seed=seed, step=step).isel(lr=0, batch_size=batch).values
        g = x * (x @ beta - y)[:, None]
        pairs = [
            rows for rows in itertools.product(range(5), repeat=2) if sampling == "replacement" or rows[0] != rows[1]
        ]
        batches = [[(row,) for row in range(5)], pairs, [range(5)]][batch]
        expected = np.mean([g[list(rows)].mean(0) ** 2 for rows in batches], axis=0)
        found = results.gradient_square.sel(seed=seed, step=step).isel(lr=0, batch_size=batch)
        np.testing.assert_allclose(found, expected)


def test_their_law_is_their_mean_over_data(fit):
    axes = {"lr": [0.01], "batch_size": [1, 2, "full"], "sampling": ["replacement", "subset"], "seed": 100}
    data = SparseRegression(3, 4, 2, num_test_samples=0)
    _, results = run(fit, GradientStatistics(at=[0]), axes, 1, data)
    first = results.isel(step=0, lr=0)
    on = first.teacher != 0
    for part in (on, ~on):
        found, law = (first[name].where(part).mean("coordinate") for name in ("gradient_square", "gradient_square_law"))
        error = (found - law).mean("seed") / (found.std("seed") / 100**0.5)
        assert float(abs(error).max()) < 4.5  # standard errors: a false alarm in 1e4 for the 12 of them
        assert float(law.std("seed").max()) < 1e-12  # rounding: the law knows nothing of the draw


def test_the_leading_gain_is_the_gain_of_small_steps(fit):
    axes = {"lr": [0.002], "batch_size": [1, 3, "full"], "sampling": ["replacement", "epochs"], "seed": 2}
    data = SparseRegression(5, 8, 2, num_test_samples=0)
    _, results = run(fit, LeadingGain(), axes, 200_000, data, init_scale=0.5)
    assert float(results.train_loss.isel(step=-1).max()) < 1e-12
    last, law = results.isel(step=-1, lr=0), results.isel(step=0, lr=0)
    np.testing.assert_allclose(law.gain_l1_law, law.gain_law.sum("coordinate"))
    full = dict(batch_size="full")
    np.testing.assert_allclose(last.gain.sel(full), law.gain_law.sel(full), rtol=0.03)  # of the order of lr/edge
    # A path of random batches has a gain of its own: its sum over coordinates varies by some per cent.
    np.testing.assert_allclose(last.gain.sum("coordinate"), law.gain_l1_law, rtol=0.15)


def test_the_law_is_stated_at_the_beginning_and_the_end_and_does_not_change(fit):
    _, results = run(fit, LeadingGain(), {"lr": [0.01, 0.02], "seed": 2}, 7)
    first, last = results.gain_l1_law.isel(step=0), results.gain_l1_law.isel(step=-1)
    np.testing.assert_array_equal(first, last)
    np.testing.assert_allclose(first.isel(lr=1), 2 * first.isel(lr=0))


def test_gradient_descent_ends_nearest_to_the_perturbation(fit):
    data = SparseRegression(5, 8, 2, num_test_samples=0)
    model, results = run(fit, Perturbation(), {"lr": [0.15], "seed": 2}, 20_000, data, init_scale=0.5)
    assert float(results.train_loss.isel(step=-1).max()) < 1e-20
    alpha = theory.effective_init(0.5, torch.as_tensor(results.gain.isel(step=-1, lr=0).values))
    start = torch.as_tensor(results.perturbation.isel(step=-1, lr=0).values)
    assert float(start.abs().max()) > 1e-4
    found, _ = theory.min_bregman(model.problems.x, model.problems.y, alpha, start)
    np.testing.assert_allclose(results.beta.isel(step=-1, lr=0), found, atol=1e-8)  # some sqrt(loss)


def test_what_cannot_be_measured_is_said(fit):
    data = SparseRegression(5, 8, 2, num_test_samples=0)
    flow = DiagonalLinearNetwork(optimizer=lambda parameters: GradientFlow(parameters, times=[1.0]))
    with pytest.raises(
        ValueError, match="Perturbation: needs a network whose parameters are one pair of factors, and GainSGD"
    ):
        fit(flow, data, 1, [Recorder(at=[0]), Perturbation()])
    with pytest.raises(ValueError, match="GradientStatistics: Linear is no LinearNetwork"):
        GradientStatistics(at=[0]).check(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="LeadingGain: Linear is no DiagonalLinearNetwork"):
        LeadingGain().check(torch.nn.Linear(1, 1))
