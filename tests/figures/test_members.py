"""Figures of members: AxisFigure, ScatterFigure, VariantDistanceFigure."""

import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import AxisFigure, ScatterFigure, VariantDistanceFigure

SEEDS = np.arange(5)


def series(values, dims, first):
    """Variables over steps 0 and 9 that end as given."""
    values = np.asarray(values)
    return (*dims, "step"), np.stack([np.broadcast_to(np.asarray(first), values.shape), values], -1)


@pytest.fixture
def thresholds():
    dims, sizes = ("batch_size", "sampling", "seed"), [1, 5, "full"]
    edge = np.broadcast_to(1.0 + SEEDS, (3, 2, 5))
    ratio = np.arange(1, 7).reshape(3, 2, 1) * np.array([0.9, 1.0, 1.0, 1.0, np.nan])
    shape = np.full((3, 2, 5), "running")
    return xr.Dataset(
        {
            "gamma_max": series(edge * ratio, dims, np.nan),
            "flow_edge": series(edge, dims, np.nan),
            "status": series(shape, dims, "running"),
        },
        {
            "batch_size": [str(size) for size in sizes],
            "sampling": ["replacement", "subset"],
            "seed": SEEDS,
            "step": [0, 9],
        },
    )


def test_an_axis_figure_shows_medians_over_seeds_in_units_of_the_members_own(thresholds):
    figure = AxisFigure("batch_size", ["gamma_max"], unit="flow_edge")
    table = figure.table(thresholds)
    assert table["panel"].tolist() == ["replacement"] * 3 + ["subset"] * 3
    np.testing.assert_allclose(table["median"], [1, 3, 5, 2, 4, 6])
    assert np.isinf(table["p90"]).all()
    assert table["members"].tolist() == [4] * 6
    drawn = figure.draw(thresholds)
    assert [label.get_text() for label in drawn.axes[1].get_xticklabels()] == ["1", "5", "full"]
    np.testing.assert_allclose(drawn.axes[1].lines[0].get_ydata(), [2, 4, 6])


def test_a_scatter_leaves_out_what_has_diverged_or_not_settled_and_states_the_correlation_within_seeds():
    dims, lr = ("lr", "seed"), np.geomspace(0.1, 1, 7)
    x = np.linspace(1, 2, 7)[:, None] * 10.0**SEEDS
    y = 3 / np.linspace(1, 2, 7)[:, None] ** 2 * 10.0**SEEDS
    loss, status = np.full(x.shape, 1e-9), np.full(x.shape, "running", dtype="<U9")
    loss[0, 0], status[1, 1], y[2, 2] = 0.5, "diverged", np.nan
    data = xr.Dataset(
        {
            "x": series(x, dims, 1.0),
            "y": series(y, dims, 1.0),
            "train_loss": series(loss, dims, 1.0),
            "status": series(status, dims, "running"),
        },
        {"lr": lr, "seed": SEEDS, "step": [0, 9]},
    )
    figure = ScatterFigure("x", ["y"], diagonal=True)
    table = figure.table(data)
    assert np.isnan(table["y"]).sum() == 1
    shown = {(float(a), float(b)) for a, b in zip(table["lr"], table["seed"], strict=True)}
    assert (lr[0], 0.0) not in shown
    assert (lr[1], 1.0) not in shown
    drawn = figure.draw(data)
    # Over all members x and y rise together, within a seed they do not.
    assert drawn.axes[0].get_title() == "rank correlation within a seed, median of 5 seeds\n-1.00"


def test_the_distance_to_a_variant_is_relative_and_its_power_is_a_median_over_seeds():
    lr, there = np.geomspace(0.01, 1, 9), np.random.default_rng(0).normal(size=(5, 3))
    direction = np.array([0.6, 0.0, 0.8]) * np.linalg.norm(there, axis=1)[:, None]
    power = np.array([1.0, 1.0, 1.0, 2.0, 0.5])
    beta = there + (lr[:, None] ** power)[..., None] * direction
    loss = np.full((9, 5), 1e-20)
    loss[0] = 1e-3  # the smallest step has not settled
    dims = ("lr", "seed")
    main = xr.Dataset(
        {
            "beta": ((*dims, "step", "coordinate"), np.stack([0 * beta, beta], 2)),
            "train_loss": series(loss, dims, 1.0),
            "status": series(np.full((9, 5), "running"), dims, "running"),
        },
        {"lr": lr, "seed": SEEDS, "step": [0, 9]},
    )
    flow = xr.Dataset({"beta": (("seed", "step", "coordinate"), there[:, None])}, {"seed": SEEDS, "step": [70]})
    figure = VariantDistanceFigure()
    table = figure.table(main, flow=flow)
    np.testing.assert_allclose(table["median"][1:], lr[1:])
    assert np.isinf(table["median"][0])
    np.testing.assert_allclose(table["slope"], 1.0)
    figure.draw(main, flow=flow)
    with pytest.raises(ValueError, match="no variant 'flow'; there are polished"):
        figure.table(main, polished=flow)


@pytest.mark.parametrize(
    ("figure", "variables", "axes", "word"),
    [
        (AxisFigure("alpha"), {"gamma_max"}, {"lr": [1]}, "no axis 'alpha'"),
        (AxisFigure("lr", ["a"], unit="b"), {"a"}, {"lr": [1]}, "'b' is not recorded"),
        (ScatterFigure("a", ["b"]), {"a"}, {}, "'b' is not recorded"),
        (ScatterFigure("a", ["b"], colour="seed"), {"a", "b"}, {"lr": [1]}, "no axis 'seed'"),
        (VariantDistanceFigure(), {"beta"}, {"lr": [1]}, "needs train_loss"),
        (VariantDistanceFigure(), {"beta", "train_loss"}, {}, "ensemble.lr"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_fit(figure, variables, axes, word):
    with pytest.raises(ValueError, match=word):
        figure.check(variables, axes)
