import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from oracles import member_batches

import dlnlab
from dlnlab.callbacks import Recorder, Thresholds
from dlnlab.callbacks.thresholds import thresholds
from dlnlab.data import SparseRegression
from dlnlab.data.arrays import ArrayRegression
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim import GradientFlow

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def measured(data, measurement, steps=3, **options):
    recorder = Recorder(at=[0], variables=["train_loss"])
    Trainer(max_steps=steps, callbacks=[recorder, measurement], **QUIET).fit(DiagonalLinearNetwork(**options), data)
    return recorder.dataset()


@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_thresholds_of_diagonal_inputs_are_those_of_the_scalar_problem_in_closed_form(scale):
    x, y = np.array([1.0, 2.0, 0.5]), np.array([1.0, -0.8, 3.0])
    found = measured(ArrayRegression(np.diag(x), y), Thresholds(20_000, settled=1e-6, tol=1e-3), init_scale=scale).isel(
        step=-1
    )
    # Each coordinate is u v -> y/x with the step gamma x^2/n. It converges up to 1/|Phi|, where the period doubles; it is
    # bounded while v = eta lambda - eta^2 Phi eps starts below 4.
    phi, unit = y / x, len(x) / x**2
    converges = (unit / np.abs(phi)).min()
    bounded = (unit * (np.sqrt(scale**4 + 4 * phi**2) - scale**2) / phi**2).min()
    assert (
        converges / 1.002 < float(found.gamma_max) < converges * 1.0001
    )  # tol, and the slowness next to the threshold
    assert bounded / 1.001 < float(found.gamma_tilde_max) < bounded  # tol
    assert float(found.flattest_edge) == pytest.approx(converges, rel=1e-6)  # the barrier method's last weight
    edge = (unit / np.sqrt(phi**2 + scale**4)).min()
    assert float(found.flow_edge) == pytest.approx(edge, rel=1e-9)
    assert float(found.mean_square_edge) == pytest.approx(edge, rel=1e-9)
    assert float(found.gamma_max_over_flow_edge) == float(found.gamma_max / found.flow_edge)


def test_the_iterates_converge_at_the_threshold_and_at_the_scans_below_it_but_not_just_above():
    ensemble = dlnlab.Ensemble(lr=[0.01, 0.02], batch_size=[2, "full"], seed=2)
    data = SparseRegression(4, 6, 2, num_test_samples=0)
    found = measured(data, Thresholds(num_steps=3000, tol=0.02), ensemble=ensemble).isel(step=-1)
    assert found.gamma_max.dims == ("lr", "batch_size", "seed")
    assert bool((found.gamma_max.isel(lr=0) == found.gamma_max.isel(lr=1)).all())  # a member's own step plays no part
    assert bool((found.gamma_max <= found.gamma_tilde_max).all())
    for name in ("gamma_max", "gamma_tilde_max"):
        ratio = found[f"{name}_first_failure"] / found[name]
        assert bool(((ratio > 1) & (ratio <= 1.02)).all())  # tol

    def converges(lr, size, seed):
        x, y = data.problems.x[seed].numpy(), data.problems.y[seed].numpy()
        u, v = np.full(6, 0.1 * 2**0.5), np.zeros(6)
        losses = []
        with np.errstate(all="ignore"):
            for rows, targets in member_batches(x, y, 3000, batch_size=size, seed=seed):
                losses.append(((x @ (u * v) - y) ** 2).sum())
                g = rows.T @ (rows @ (u * v) - targets) / len(rows)
                u, v = u - lr * g * v, v - lr * g * u
        return bool((np.array(losses[-3:]) <= 1e-4 * losses[0]).all())

    for size in ("full", 2):
        for seed in (0, 1):
            member = found.sel(batch_size=str(size), seed=seed).isel(lr=0)
            scan = float(member.mean_square_edge) * np.geomspace(0.5, 8, 16)
            edge = float(member.gamma_max)
            assert all(converges(lr, size, seed) for lr in [*scan[scan < edge], edge])
            assert not converges(1.02 * edge, size, seed)  # tol


@pytest.mark.parametrize(
    ("below", "islands", "above", "last"),
    [(0.5, [], 0.5, 0.5), (0.5, [(0.9, 1.4)], 0.5, 10**0.125), (0.5, [(0.7, 0.9), (1.2, 3.3), (9, 99)], 0.5, np.inf),
     (1e-9, [], 0.1, np.nan), (1e-9, [(0.9, 1.4)], 0.1, 10**0.125), (99, [], np.inf, np.inf)],
)  # fmt: skip
def test_a_threshold_is_the_first_failure_from_below_and_says_what_succeeds_above(below, islands, above, last):
    def good(members, lr):
        inside = [(lr * (1 + members) > low) & (lr * (1 + members) < high) for low, high in islands]
        return torch.stack([lr * (1 + members) <= below, *inside]).any(0)

    scale = torch.tensor([1.0, 0.5], dtype=torch.float64)
    truths = (np.nan if below < 0.1 else np.inf if below > 10 else below, above, last, len(islands))
    # The holes may be of either kind: those of the step sizes that converge, or of those that do not diverge.
    for kind, trial in enumerate((lambda m, lr: (good(m, lr), lr * (1 + m) > 3), lambda m, lr: (m < 0, ~good(m, lr)))):
        found = thresholds(trial, 0.1 * scale, 10 * scale, 17, 1e-4)  # the scan has eight step sizes a decade
        assert [len(values) for values in found] == [2] * 4
        for values, truth in zip(found[:3], truths, strict=False):
            # 10^(1/8) is the scan's last step size on the island; brackets end at tol.
            torch.testing.assert_close(values[kind], truth * scale, rtol=1e-4, atol=0, equal_nan=True)
        assert found.islands[kind].tolist() == [len(islands)] * 2
        if kind == 0:
            torch.testing.assert_close(found.below[1], 3.0 * scale, rtol=1e-4, atol=0)  # tol
            assert bool((found.islands[1] == 0).all()) and bool((found.above[1] <= 3.0 * scale * (1 + 1e-4)).all())


def test_thresholds_are_of_the_last_step_unless_scheduled():
    data = SparseRegression(4, 6, 2, num_test_samples=0)
    for at, steps in ((None, [3]), ([1], [0, 1, 3])):
        recorder = Recorder(every_n_steps=1, variables=["train_loss"])
        network = DiagonalLinearNetwork()
        Trainer(max_steps=3, callbacks=[recorder, Thresholds(num_steps=10, at=at)], **QUIET).fit(network, data)
        assert recorder.dataset().flow_edge.dropna("step").step.values.tolist() == steps


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"label_noise": 0.1}, "label_noise"),
        ({"optimizer": lambda pairs: GradientFlow(pairs, times=[1.0])}, "GradientFlow"),
    ],
)
def test_thresholds_refuse_what_has_none(options, word):
    with pytest.raises(ValueError, match=f"Thresholds.*{word}"):
        measured(SparseRegression(4, 6, 2), Thresholds(), **options)


def test_with_one_sample_every_edge_of_sgd_is_that_of_gd():
    ensemble = dlnlab.Ensemble(batch_size=[1, "full"], sampling=["replacement", "subset"])
    measurement = Thresholds(num_steps=5000, almost_sure=True)
    found = measured(ArrayRegression([[2.0]], [1.0]), measurement, ensemble=ensemble).isel(step=-1)
    for name in ("gamma_max", "gamma_tilde_max"):
        assert np.unique(found[name]).size == 1
    for name in ("flow_edge", "mean_square_edge", "almost_sure_edge"):
        # 2/(x^2 u^2 + x^2 v^2) at u v = 1/2 and u^2 - v^2 = 2 alpha^2
        np.testing.assert_allclose(found[name], 1 / (4 * np.sqrt(0.25 + 0.1**4)), rtol=1e-7)  # the search's


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 0}, {"settled": 0.0}, {"tol": float("nan")}, {"lowest": 2.0, "highest": 1.0}, {"num_rates": 1}],
)
def test_thresholds_name_an_argument_that_is_out_of_range(options):
    with pytest.raises(ValueError, match=f"Thresholds.{'highest' if 'highest' in options else next(iter(options))}"):
        Thresholds(**options)
