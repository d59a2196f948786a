import csv

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from dlnlab.figures import CurveFigure
from dlnlab.figures.base import GREY

STEPS = [0, 10, 20, 40]


def results(distance, status="running", **axes):
    """Results over (axes ..., step) with time = step/10 and another variable at two of the steps only."""
    distance = np.asarray(distance, dtype=float)
    dims = (*axes, "step")
    steps = np.broadcast_to(np.array(STEPS) / 10, distance.shape)
    return xr.Dataset(
        {
            "distance": (dims, distance),
            "rare": (dims, np.where(np.isin(STEPS, [10, 40]), 2 * distance, np.nan)),
            "time": (dims, np.where(np.isin(STEPS, [0, 40]), steps, np.nan)),
            "status": (dims, np.broadcast_to(np.asarray(status, dtype=object), distance.shape)),
        },
        {**axes, "step": STEPS},
    )


@pytest.fixture
def grid():
    values = 10 ** np.random.default_rng(0).normal(size=(2, 5, 4))
    return values, results(values, lr=[0.1, 0.2], seed=range(5))


def lines(figure, panel=0, colour=None):
    """(x, y) of a panel's lines, or of those of one colour."""
    return [line.get_data() for line in figure.axes[panel].lines
            if to_hex(line.get_color()) != GREY and colour in (None, to_hex(line.get_color()))]  # fmt: skip


def grey(figure, panel=0):
    return [line for line in figure.axes[panel].lines if to_hex(line.get_color()) == GREY]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_along_the_steps_each_cell_is_a_line_of_medians_over_seeds(grid):
    values, data = grid
    figure = CurveFigure().draw(data)
    for found, own in zip(lines(figure), values, strict=True):
        np.testing.assert_array_equal(found, (STEPS[1:], np.median(own, axis=0)[1:]))  # 0 has no logarithm
    assert legend(figure) == [r"$\gamma$ = 0.1", r"$\gamma$ = 0.2", "median, 10–90 % of 5 seeds"]


def test_the_table_has_the_band_and_leaves_out_steps_at_which_nothing_was_recorded(grid):
    values, data = grid
    table = CurveFigure(["rare"]).table(data)
    assert table["step"].tolist() == [10, 40, 10, 40]
    np.testing.assert_allclose(table["rare_p90"], 2 * np.quantile(values[:, :, [1, 3]], 0.9, axis=1).ravel())
    both = CurveFigure([["distance", "rare"]]).table(data)
    assert np.isnan(both["rare"]).tolist() == 2 * [True, False, True, False]


def test_means_are_drawn_without_a_band_where_asked(grid):
    values, data = grid
    figure = CurveFigure(["distance"], means=["distance"], linear=["distance", "step"]).draw(data)
    for found, own in zip(lines(figure), values, strict=True):
        np.testing.assert_allclose(found, (STEPS, own.mean(0)))
    assert legend(figure) == [r"$\gamma$ = 0.1", r"$\gamma$ = 0.2", "means of 5 seeds"]


def test_a_variable_as_x_is_interpolated_between_its_records(grid):
    _, data = grid
    table = CurveFigure(x="time").table(data)
    np.testing.assert_allclose(table["time"], 2 * [0, 1, 2, 4])
    assert table["step"].tolist() == 2 * STEPS


def test_an_axis_as_x_takes_the_last_records_in_ascending_order_and_further_axes_make_lines():
    values = np.arange(1.0, 49).reshape(2, 3, 2, 4)
    data = results(values, init_scale=[1.0, 0.1], seed=range(3), batch_size=["1", "full"])
    table = CurveFigure(["rare"], x="init_scale").table(data)
    assert table["line"].tolist() == 2 * ["SGD, batch 1"] + 2 * ["GD (full batch)"]
    assert table["init_scale"].tolist() == [0.1, 1.0, 0.1, 1.0]
    np.testing.assert_array_equal(table["rare"], 2 * np.median(values[::-1, :, :, 3], axis=1).T.ravel())


def test_diverged_members_count_as_infinitely_bad_from_where_it_was_seen():
    status = np.full((3, 4), "running", dtype=object)
    status[0, 2:], status[1, 3] = "diverged", "diverged"
    data = results(np.ones((3, 4)), status, seed=range(3))
    table = CurveFigure(["distance", "diverged"]).table(data)
    assert table["distance"].tolist() == [1, 1, 1, np.inf]
    np.testing.assert_allclose(table["diverged"], [0, 0, 1 / 3, 2 / 3])
    figure = CurveFigure(["distance", "diverged"]).draw(data)
    np.testing.assert_array_equal(lines(figure)[0][1], [1, 1, np.nan])
    assert figure.axes[1].get_yscale() == "linear" and figure.axes[1].get_ylim()[1] < 1.1


def test_variants_are_lines_and_those_without_the_axis_of_x_or_asked_for_are_levels(grid):
    values, data = grid
    other = results(values[0], seed=range(5))
    table = CurveFigure(x="lr").table(data, flow=other, more=data)
    assert table["line"].tolist() == ["", "", "more", "more"]
    assert set(table["distance_flow"]) == {np.median(values[0, :, 3])}
    figure = CurveFigure(levels=["flow"]).draw(data, flow=other)
    assert [line.get_ydata()[0] for line in grey(figure)] == [np.median(values[0, :, 3])]
    assert len(lines(figure)) == 2 and len(lines(CurveFigure().draw(data, flow=other))) == 3


def test_only_the_runs_that_are_asked_for_are_drawn(grid):
    _, data = grid
    other = data.isel(lr=0, drop=True)
    assert set(CurveFigure(runs=["more"]).table(data, flow=other, more=data)["line"]) == {
        r"more, $\gamma$ = 0.1",
        r"more, $\gamma$ = 0.2",
    }
    assert "distance_flow" not in CurveFigure(x="lr", runs=["main"]).table(data, flow=other)


def test_an_axis_of_one_value_is_not_named(grid):
    _, data = grid
    assert set(CurveFigure().table(data.isel(lr=[0]), flow=data)["line"]) == {
        "",
        r"flow, $\gamma$ = 0.1",
        r"flow, $\gamma$ = 0.2",
    }


def test_a_quantity_that_a_variant_lacks_is_left_out_of_its_line(grid):
    _, data = grid
    figure = CurveFigure(["distance", "rare"]).draw(data, flow=data.isel(lr=0, drop=True).drop_vars("rare"))
    assert [len(lines(figure, panel)) for panel in (0, 1)] == [3, 2]


def test_compared_quantities_share_a_panel_and_a_colour(grid):
    _, data = grid
    figure = CurveFigure([["distance", "rare"]]).draw(data)
    assert len(figure.axes) == 1
    assert len(lines(figure, colour="#d55e00")) == 2
    assert legend(figure)[2:4] == ["distance", "rare"]


def test_a_law_is_a_line_of_its_power_through_the_first_line():
    x = np.array([0.1, 1.0, 10.0])
    data = results(np.repeat((5 * x**-2)[:, None], 4, 1)[:, None], init_scale=x, seed=[0])
    (law,) = grey(CurveFigure(x="init_scale", laws={"distance": [-4, 1.0]}).draw(data))
    a, b = law.get_xydata()
    assert np.log(b[1] / a[1]) / np.log(b[0] / a[0]) == pytest.approx(-4)
    np.testing.assert_allclose(a[1], 5 * a[0] ** -4)


def test_a_panel_of_several_quantities_is_called_by_a_text_of_its_own_or_by_all_of_them(grid):
    data = grid[1].assign(test_loss=2 * grid[1].distance)
    both = [["distance", "test_loss"]]
    assert CurveFigure(both).draw(data).axes[0].get_ylabel() == "distance\ntest loss"
    named = CurveFigure(both, labels={"distance, test_loss": "error", "distance": "of beta"}).draw(data)
    assert named.axes[0].get_ylabel() == "error"
    assert {"of beta", "test loss"} <= set(legend(named))


def test_labels_and_linear_axes_are_those_given(grid):
    _, data = grid
    labels = {"main": "SGD", "lr": "gamma =", "distance": "error", "step": "k"}
    figure = CurveFigure(labels=labels, linear=["step", "distance"]).draw(data)
    panel = figure.axes[0]
    assert legend(figure)[0] == "SGD, gamma = 0.1"
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("k", "error")
    assert (panel.get_xscale(), panel.get_yscale()) == ("linear", "linear")


def test_the_csv_holds_the_table(grid, tmp_path):
    _, data = grid
    paths = CurveFigure(name="mine").save(data, tmp_path)
    rows = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert [path.name for path in paths] == ["mine.png", "mine.pdf", "mine.csv"]
    assert [float(row["distance"]) for row in rows] == CurveFigure().table(data)["distance"].tolist()


def test_what_cannot_be_drawn_is_refused_before_a_fit():
    with pytest.raises(ValueError, match="'gain' is not recorded; recorded: distance"):
        CurveFigure(["gain"]).check({"distance"}, {"seed": [0]})
    with pytest.raises(ValueError, match="must be step, an axis"):
        CurveFigure(x="time").check({"distance"}, {"seed": [0]})
    with pytest.raises(ValueError, match="at least one variable"):
        CurveFigure([])
    with pytest.raises(ValueError, match=r"laws\.distance"):
        CurveFigure(laws={"distance": [1.0, 0.0]})
    CurveFigure(["distance", "converged"], x="seed").check({"distance"}, {"seed": [0]})


def test_a_quantity_with_one_number_per_coordinate_is_refused(grid):
    _, data = grid
    wide = data.assign(beta=data.distance.expand_dims(coordinate=3, axis=-1))
    for x in ("step", "lr"):
        with pytest.raises(ValueError, match="'beta' must be one number per member"):
            CurveFigure(["beta"], x=x).table(wide)
