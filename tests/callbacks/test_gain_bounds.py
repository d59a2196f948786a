import numpy as np
import pytest
from lightning.pytorch import Trainer
from oracles import member_batches
from scipy.integrate import solve_ivp

import dlnlab
from dlnlab import theory
from dlnlab.callbacks import GainBounds, GainTracker, LeadingGain, MemberGuard, Recorder
from dlnlab.data import SparseRegression
from dlnlab.models import DiagonalLinearNetwork

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def measured(data, steps, *extra, **options):
    recorder = Recorder(at=[0], variables=["train_loss", "gain"])
    callbacks = [recorder, GainBounds(), LeadingGain(), GainTracker(at=[0]), *extra]
    Trainer(max_steps=steps, callbacks=callbacks, **QUIET).fit(DiagonalLinearNetwork(**options), data)
    return recorder.dataset().isel(step=-1)


def test_the_bounds_are_those_of_the_losses_of_every_step_and_gamma_LB_of_the_largest_entry():
    data = SparseRegression(4, 6, 2, num_test_samples=0)
    ensemble = dlnlab.Ensemble(lr=[0.02, 0.05], batch_size=[2, "full"], seed=2)
    found = measured(data, 250, ensemble=ensemble)
    for member, label in enumerate(ensemble.labels):
        x, y = (part[ensemble.seed[member]].numpy() for part in (data.problems.x, data.problems.y))
        lr, size = label["lr"], label["batch_size"]
        u, v, losses, largest = np.full(6, 0.1 * 2**0.5), np.zeros(6), [], 0.0
        for rows, targets in member_batches(x, y, 250, batch_size=size, seed=label["seed"]):
            losses.append(((x @ (u * v) - y) ** 2).sum() / 8)
            g = rows.T @ (rows @ (u * v) - targets) / len(rows)
            u, v = u - lr * g * v, v - lr * g * u
            largest = max(largest, np.abs(u * v).max())
        b = 4 if size == "full" else size
        way = "subset" if size == "full" else "replacement"
        low, high = theory.gain_bounds(x, b, way)
        one = found.sel(lr=lr, batch_size=str(size), seed=label["seed"])
        assert float(one.gain_lower_bound) == pytest.approx(2 * float(low) * lr**2 * sum(losses), rel=1e-9)
        assert float(one.gain_upper_bound) == pytest.approx(4 * float(high) * lr**2 * sum(losses), rel=1e-9)
        curvature = np.linalg.eigvalsh(x.T @ x / 4)[-1] if size == "full" else (x**2).sum(1).max()
        assert float(one.gamma_LB) == pytest.approx(lr * curvature * largest, rel=1e-9)
        if size == "full":
            assert float(one.gain_lower_bound) <= float(one.gain_l1) <= float(one.gain_upper_bound)


def test_the_leading_law_is_the_integral_along_gradient_flow_and_the_gain_tends_to_it():
    data = SparseRegression(4, 6, 2, num_test_samples=0)
    ensemble = dlnlab.Ensemble(lr=[0.001], batch_size=["full"], init_scale=[0.2, 0.4], seed=[1])
    found = measured(data, 60_000, MemberGuard(), ensemble=ensemble).isel(lr=0, batch_size=0, seed=0)
    x, y = data.problems.x[0].numpy(), data.problems.y[0].numpy()

    def velocity(_, state):
        u, v, _ = np.split(state, 3)
        g = x.T @ (x @ (u * v) - y) / 4
        return np.concatenate((-g * v, -g * u, g * g))

    for alpha in (0.2, 0.4):
        start = np.concatenate((np.full(6, alpha * 2**0.5), np.zeros(12)))
        end = solve_ivp(velocity, (0, 2000), start, "LSODA", rtol=1e-10, atol=1e-12).y[12:, -1]
        one = found.sel(init_scale=alpha)
        np.testing.assert_allclose(one.gain_law, 0.001 * end, rtol=1e-5)  # the reference's error, and what is left
        assert float(one.gain_l1 / one.gain_l1_law) == pytest.approx(1, abs=0.02)  # the law's next order in lr


def test_in_the_mean_over_seeds_sgd_lies_between_the_bounds():
    ensemble = dlnlab.Ensemble(lr=[0.02], batch_size=[1, 5], sampling=["replacement", "subset"], seed=8)
    found = measured(SparseRegression(20, 30, 3, num_test_samples=0), 2000, ensemble=ensemble).mean(
        "seed", skipna=False
    )
    assert bool((found.gain_lower_bound < found.gain_l1).all())
    assert bool((found.gain_l1 < found.gain_upper_bound).all())


def test_nothing_is_said_of_members_that_have_diverged():
    found = measured(SparseRegression(4, 6, 2), 200, MemberGuard(), ensemble=dlnlab.Ensemble(lr=[0.02, 50.0]))
    for name in ("gain_lower_bound", "gain_upper_bound", "gamma_LB"):
        assert np.isnan(found[name].values).tolist() == [False, True]
