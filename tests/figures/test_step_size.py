import csv

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from dlnlab.figures import StepSizeFigure
from dlnlab.figures.base import GREY

LR = [0.01, 0.1, 0.2, 0.4, 1.0]


def results(distance, status="converged", loss=1e-21, **axes):
    """Results of members (axes ...) that start at distance 3 and loss 2 and end as given, at steps 0, 10 and 100."""
    shape = tuple(len(values) for values in axes.values())
    distance, loss, status = (np.broadcast_to(np.asarray(values), shape) for values in (distance, loss, status))
    unrecorded = np.full(shape, np.nan)
    dims = (*axes, "step")
    return xr.Dataset(
        {
            "distance": (dims, np.stack([np.full(shape, 3.0), unrecorded, distance], -1)),
            "train_loss": (dims, np.stack([np.full(shape, 2.0), np.full(shape, 1.0), loss], -1)),
            "status": (dims, np.stack([np.full(shape, "running"), np.full(shape, ""), status], -1)),
        },
        {**axes, "step": [0, 10, 100]},
    )


def medians(figure, panel=0):
    """The lines with markers of a panel, in order, as arrays (x, y)."""
    return [line.get_data() for line in figure.axes[panel].lines if line.get_marker() == "o"]


def vertical(figure, style):
    """Positions of a panel's vertical lines by colour."""
    found = [line for line in figure.axes[0].lines if line.get_linestyle() == style]
    return {to_hex(line.get_color()): line.get_xdata()[0] for line in found}


def horizontal(figure, panel=0):
    return sorted(line.get_ydata()[0] for line in figure.axes[panel].lines if to_hex(line.get_color()) == GREY)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def band(figure, colour):
    """The lowest and highest point of a line's band at each of its positions."""
    (found,) = [c for c in figure.axes[0].collections if to_hex(c.get_facecolor()[0]) == colour]
    points = found.get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


@pytest.fixture
def ends():
    return 10 ** np.random.default_rng(0).normal(size=(5, 2, 7))  # lr, batch_size, seed


@pytest.fixture
def grid(ends):
    return results(ends, lr=LR, batch_size=["1", "full"], seed=range(7))


def test_each_line_is_the_median_over_seeds_of_what_was_recorded_last(grid, ends):
    lines = medians(StepSizeFigure().draw(grid))
    assert len(lines) == 2
    for batch, (x, y) in enumerate(lines):
        np.testing.assert_array_equal(x, LR)
        np.testing.assert_array_equal(y, np.median(ends[:, batch], axis=1))


def test_steps_at_which_only_other_variables_were_recorded_do_not_count(grid, ends):
    later = grid.reindex(step=[0, 10, 100, 200], fill_value={"status": ""})
    assert later.distance.isel(step=-1).isnull().all()
    np.testing.assert_array_equal(medians(StepSizeFigure().draw(later))[0][1], np.median(ends[:, 0], axis=1))


def test_the_band_goes_from_ten_to_ninety_percent(grid, ends):
    edges = band(StepSizeFigure().draw(grid), "#d55e00")
    low, high = np.quantile(ends[:, 0], [0.1, 0.9], axis=1)
    for i, lr in enumerate(LR):
        np.testing.assert_allclose(edges[lr], (low[i], high[i]))


def test_the_csv_holds_the_numbers_of_the_lines(grid, tmp_path):
    figure, path = StepSizeFigure(), StepSizeFigure().save(grid, tmp_path)[2]
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert path.name == "step_size_figure.csv" and len(rows) == 10
    for name, (x, y) in zip(("SGD, batch 1", "GD (full batch)"), medians(figure.draw(grid)), strict=True):
        own = [row for row in rows if row["line"] == name]
        assert [float(row["lr"]) for row in own] == x.tolist()
        assert [float(row["distance"]) for row in own] == y.tolist()


def test_lines_are_named_after_their_batch_size_and_further_axes():
    ends = np.arange(1.0, 9).reshape(2, 2, 2)
    data = results(ends, lr=[0.1, 0.2], batch_size=["4", "full"], init_scale=[0.01, 1.0])
    figure = StepSizeFigure().draw(data)
    names = [f"{kind}, init scale {scale}" for kind in ("SGD, batch 4", "GD (full batch)") for scale in ("0.01", "1")]
    assert legend(figure) == names
    np.testing.assert_array_equal([y for _, y in medians(figure)], ends.reshape(2, 4).T)


def test_step_sizes_are_drawn_in_ascending_order_however_written():
    ((x, y),) = medians(StepSizeFigure().draw(results([4.0, 1.0, 2.0], lr=[0.4, 0.1, 0.2])))
    assert x.tolist() == [0.1, 0.2, 0.4] and y.tolist() == [1, 2, 4]


def test_diverged_members_count_as_infinitely_bad_whatever_was_kept_of_them():
    ends = np.tile([1.0, 2.0, 3.0, 4.0, 5.0], (5, 1))
    status = np.full((5, 5), "converged", dtype="<U9")
    for i, lost in enumerate(([], [0], [0, 1], [0, 1, 2], range(5))):
        status[i, lost] = "diverged"
    data = results(ends, status, lr=LR, seed=range(5))
    ((_, y),) = medians(StepSizeFigure().draw(data))
    np.testing.assert_array_equal(y, [3, 4, 5, np.nan, np.nan])
    table = StepSizeFigure().table(data)
    assert table["distance"].tolist() == [3, 4, 5, np.inf, np.inf]
    assert table["diverged"].tolist() == [0, 1, 2, 3, 5] and table["members"].tolist() == [5] * 5


def test_numbers_that_are_nan_count_as_infinitely_bad():
    data = results([[1.0, 2.0, np.nan], [1.0, np.nan, np.nan]], "running", lr=[0.1, 0.2], seed=range(3))
    assert StepSizeFigure().table(data)["distance"].tolist() == [2, np.inf]


def test_a_band_that_reaches_infinity_goes_to_the_top_of_the_panel():
    status = np.full((3, 5), "converged", dtype="<U9")
    status[1:, 0] = "diverged"
    figure = StepSizeFigure().draw(results(np.tile([1.0, 2, 3, 4, 5], (3, 1)), status, lr=LR[:3], seed=range(5)))
    edges, top = band(figure, "#d55e00"), figure.axes[0].get_ylim()[1]
    assert edges[0.01][1] == pytest.approx(4.6) and edges[0.1][1] == edges[0.2][1] == top
    assert edges[0.1][0] == pytest.approx(np.quantile([2, 3, 4, 5, 6], 0.1))


def test_a_few_members_far_off_do_not_flatten_the_figure():
    ends = np.ones((3, 5))
    ends[1, 0] = 1e9
    assert StepSizeFigure().draw(results(ends, "running", lr=LR[:3], seed=range(5))).axes[0].get_ylim()[1] < 20


def statuses(*counts):
    """Rows of three members: so many converged, running, diverged."""
    return np.array([["converged"] * c + ["running"] * r + ["diverged"] * d for c, r, d in counts])


def test_vertical_lines_mark_where_half_of_the_members_converge_and_diverge():
    counts = (3, 0, 0), (2, 1, 0), (1, 2, 0), (0, 2, 1), (0, 1, 2)
    data = results(1.0, statuses(*counts), loss=1.0, lr=LR, seed=range(3))
    figure = StepSizeFigure().draw(data)
    assert vertical(figure, "--") == {"#d55e00": 0.1}
    assert vertical(figure, ":") == {"#d55e00": 1.0}
    keys = [r"largest $\gamma$ at which ≥ half converge", r"smallest $\gamma$ at which ≥ half diverge"]
    assert legend(figure)[:2] == keys
    table = StepSizeFigure().table(data)
    assert table["converging"].tolist() == [3, 2, 1, 0, 0]
    assert set(table["largest_converging_lr"]) == {0.1} and set(table["smallest_diverging_lr"]) == {1.0}


def test_each_line_has_marks_of_its_own():
    status = np.stack([statuses((3, 0, 0), (0, 0, 3), (0, 0, 3)), statuses((3, 0, 0), (3, 0, 0), (0, 3, 0))], 1)
    figure = StepSizeFigure().draw(results(1.0, status, 1.0, lr=LR[:3], batch_size=["1", "full"], seed=range(3)))
    assert vertical(figure, "--") == {"#d55e00": 0.01, "#0072b2": 0.1} and vertical(figure, ":") == {"#d55e00": 0.1}


def test_running_members_converge_if_their_loss_has_settled():
    loss = np.array([0.019, 0.019, 0.3, 0.021, 1.9])[:, None]  # of 2 at step 0
    data = results(1.0, "running", loss, lr=LR, seed=range(3))
    assert vertical(StepSizeFigure().draw(data), "--") == {"#d55e00": 0.1}
    assert vertical(StepSizeFigure(settled=0.1).draw(data), "--") == {"#d55e00": 0.4}


def test_diverged_members_do_not_converge_however_small_the_loss_kept_of_them():
    assert StepSizeFigure().table(results(1.0, "diverged", loss=1e-30, lr=LR))["converging"].tolist() == [0] * 5


def test_without_train_loss_only_the_status_says_who_converges():
    status = statuses((0, 3, 0), (3, 0, 0), (0, 3, 0))
    data = results(1.0, status, lr=LR[:3], seed=range(3)).drop_vars("train_loss")
    assert StepSizeFigure().table(data)["converging"].tolist() == [0, 3, 0]
    assert vertical(StepSizeFigure().draw(data), "--") == {"#d55e00": 0.1}


def test_nothing_is_marked_where_every_step_size_converges(grid):
    figure = StepSizeFigure().draw(grid)
    assert vertical(figure, "--") == vertical(figure, ":") == {}
    assert np.isnan(StepSizeFigure().table(grid)["largest_converging_lr"]).all()


def test_vertical_lines_at_one_place_are_drawn_beside_each_other():
    status = np.full((5, 2, 4), "converged", dtype="<U9")
    status[3:] = "diverged"
    figure = StepSizeFigure().draw(results(1.0, status, lr=LR, batch_size=["1", "full"], seed=range(4)))
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() in ("--", ":")]
    at = [
        (line.get_xdata()[0], round(line.get_transform().transform((line.get_xdata()[0], 0))[0], 3)) for line in drawn
    ]
    assert [place for place, _ in at] == [0.2, 0.2, 0.4, 0.4]
    assert len(set(at)) == 4


def test_without_seeds_a_line_is_the_values_themselves_and_has_no_band():
    figure = StepSizeFigure().draw(results([3.0, 1.0, 2.0], ["converged", "converged", "running"], 1.0, lr=LR[:3]))
    ((_, y),) = medians(figure)
    assert y.tolist() == [3, 1, 2]
    assert legend(figure) == [r"largest $\gamma$ at which it converges"]


def test_a_single_step_size_is_a_point_with_a_bar(tmp_path):
    data = results([[1.0, 2.0, 4.0]], lr=[0.3], seed=range(3))
    figure = StepSizeFigure().draw(data)
    ((x, y),) = medians(figure)
    (bar,) = figure.axes[0].collections[0].get_segments()
    np.testing.assert_allclose(bar, [[0.3, 1.2], [0.3, 3.6]])
    assert (x.item(), y.item()) == (0.3, 2)
    StepSizeFigure().save(data, tmp_path)


def test_zeros_are_drawn_below_everything_else_and_the_axis_says_so():
    data = results([1.0, 0.0, 0.02], lr=LR[:3])
    panel = StepSizeFigure().draw(data).axes[0]
    ((_, y),) = medians(panel.figure)
    assert y.tolist() == [1, pytest.approx(1e-3), 0.02]
    assert panel.get_ylim()[0] < 1e-3 and panel.get_ylabel() == "distance\n(≤ 0 drawn at $10^{-3}$)"
    assert StepSizeFigure().table(data)["distance"].tolist() == [1, 0, 0.02]


def test_an_axis_without_zeros_does_not_speak_of_them(grid):
    assert StepSizeFigure().draw(grid).axes[0].get_ylabel() == "distance"


def test_a_line_whose_members_all_diverged_says_so(tmp_path):
    status = np.array([["diverged", "converged"]] * 3)
    figure = StepSizeFigure().draw(results(1.0, status, lr=LR[:3], batch_size=["1", "full"]))
    assert legend(figure)[:2] == ["SGD, batch 1 (diverged)", "GD (full batch)"]
    lost = results(1.0, "diverged", lr=LR[:3], seed=range(3))
    assert legend(StepSizeFigure().draw(lost))[0] == "(diverged)"
    assert len(StepSizeFigure().save(lost, tmp_path)) == 3


def test_results_that_are_all_zero_can_be_drawn(tmp_path):
    assert len(StepSizeFigure().save(results(0.0, lr=LR, seed=range(3)), tmp_path)) == 3


def test_levels_are_drawn_at_the_median_of_what_the_results_hold(grid, tmp_path):
    per_seed = np.array([1.0, 5, 2, 7, 3, 9, 8])
    data = grid.assign(
        distance_gradient_flow=("seed", per_seed),
        distance_min_l2=(("lr", "batch_size", "seed"), np.broadcast_to(10 * per_seed, (5, 2, 7))),
        distance_min_l1=("seed", per_seed),
    )
    figure = StepSizeFigure().draw(data)
    assert horizontal(figure) == [5, 50]
    assert [text.get_text() for text in figure.axes[0].texts] == [r"minimum $\ell_2$", "gradient flow"]
    table = StepSizeFigure().table(data)
    assert set(table["distance_gradient_flow"]) == {5} and set(table["distance_min_l2"]) == {50}
    assert horizontal(StepSizeFigure().draw(grid)) == []


def test_a_level_that_is_nowhere_finite_is_not_drawn(grid):
    assert horizontal(StepSizeFigure().draw(grid.assign(distance_min_l2=("seed", np.full(7, np.nan))))) == []


def test_a_variant_without_step_sizes_is_a_level_and_one_with_them_further_lines(grid):
    flow = results([0.1, 0.2, 0.4], seed=range(3))
    other = results([1.0, 2.0], lr=[0.1, 0.2])
    figure = StepSizeFigure().draw(grid, flow=flow, polished=other)
    assert horizontal(figure) == [0.2]
    assert legend(figure)[:3] == ["SGD, batch 1", "GD (full batch)", "polished"]
    assert medians(figure)[2][1].tolist() == [1, 2]


def test_each_quantity_has_a_panel_of_its_own(grid, ends):
    data = grid.assign(test_loss=2 * grid.distance, sharpness=3 * grid.distance)
    figure = StepSizeFigure().draw(data)
    assert [panel.get_ylabel() for panel in figure.axes] == ["distance", "test loss"]
    chosen = StepSizeFigure(["sharpness"]).draw(data)
    assert [panel.get_ylabel() for panel in chosen.axes] == ["sharpness"]
    np.testing.assert_array_equal(medians(figure, 1)[1][1], 2 * np.median(ends[:, 1], axis=1))
    np.testing.assert_array_equal(medians(chosen)[1][1], 3 * np.median(ends[:, 1], axis=1))


def test_the_axis_says_when_step_sizes_are_in_a_unit_of_the_problem(grid):
    assert StepSizeFigure().draw(grid.assign_attrs(lr_unit="one")).axes[-1].get_xlabel() == r"step size $\gamma$"
    assert "max_i |x_i|^2" in StepSizeFigure().draw(grid.assign_attrs(lr_unit="max_row")).axes[-1].get_xlabel()


def test_results_are_not_changed_by_drawing_them(grid):
    before = grid.copy(deep=True)
    StepSizeFigure().draw(grid)
    xr.testing.assert_identical(grid, before)


@pytest.mark.parametrize(
    "quantities, variables, axes, message",
    [
        (None, {"distance"}, {"seed": [0, 1]}, "needs an ensemble.lr axis; the axes are seed"),
        (None, {"distance"}, {}, "the axes are none"),
        (None, {"train_loss", "gain"}, {"lr": [0.1]}, "needs distance or test_loss .* recorded: gain, train_loss"),
        (["distance", "sharpness"], {"distance"}, {"lr": [0.1]}, "'sharpness' is not recorded; recorded: distance"),
    ],
)
def test_what_is_missing_is_named_before_a_fit(quantities, variables, axes, message):
    with pytest.raises(ValueError, match=message):
        StepSizeFigure(quantities).check(variables, axes)


@pytest.mark.parametrize("variables", [{"test_loss"}, {"distance"}, {"distance", "test_loss", "gain"}])
def test_one_of_the_default_quantities_is_enough(variables):
    StepSizeFigure().check(variables, {"lr": [0.1], "seed": [0]})


def test_results_without_what_is_drawn_are_refused_as_before_a_fit(grid):
    with pytest.raises(ValueError, match="'sharpness' is not recorded"):
        StepSizeFigure(["sharpness"]).draw(grid)
    with pytest.raises(ValueError, match=r"needs an ensemble\.lr axis"):
        StepSizeFigure().draw(grid.isel(lr=0))


def test_a_quantity_with_many_numbers_per_member_is_refused(grid):
    gain = grid.distance.expand_dims(coordinate=4, axis=-1)
    with pytest.raises(ValueError, match="'gain' must be one number per member"):
        StepSizeFigure(["gain"]).draw(grid.assign(gain=gain))


@pytest.mark.parametrize("arguments", [{"quantities": []}, {"settled": 0.0}, {"settled": float("nan")}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=rf"StepSizeFigure\.{next(iter(arguments))}"):
        StepSizeFigure(**arguments)


# Over an edge ---------------------------------------------------------------------------------------------------------


def over_an_edge(ends, edges, status="converged"):
    """Results whose seeds have edges of their own, recorded at the last step alone."""
    data = results(ends, status, lr=LR, seed=range(len(edges)))
    step_size = np.broadcast_to(np.array(LR)[:, None], data.distance.shape[:2])
    edge = np.full(data.distance.shape, np.nan)
    edge[:, :, -1] = edges
    return data.assign(step_size=(("lr", "seed"), step_size), flow_edge=(("lr", "seed", "step"), edge))


def test_over_an_edge_members_are_gathered_by_their_own_ratio():
    lr, edges = np.array(LR)[:, None], np.array([0.1, 0.2, 0.3])
    width = np.median(np.diff(np.log(LR)))
    table = StepSizeFigure(over="flow_edge").table(over_an_edge(lr / edges, edges))
    assert (np.diff(table["lr_over_flow_edge"]) > 0).all() and 10 <= table["members"].sum() <= 15
    half = np.exp(width / 2)
    assert (
        table["distance"] <= table["lr_over_flow_edge"] * half * (1 + 1e-9)
    ).all()  # 1e-9: rounding of the bins' ends
    assert (table["distance"] >= table["lr_over_flow_edge"] / half * (1 - 1e-9)).all()


def test_over_an_edge_positions_that_few_seeds_reach_are_left_out():
    edges = np.array([0.1] * 9 + [100.0])  # the last seed's ratios are a thousandth of the others'
    table = StepSizeFigure(over="flow_edge").table(over_an_edge(np.ones((5, 10)), edges))
    assert table["lr_over_flow_edge"].min() > 0.01 * min(LR) / 0.1 and (table["members"] == 9).all()


def test_no_bin_holds_members_on_both_sides_of_the_edge():
    edges = np.array([0.05, 0.11, 0.19, 0.2, 0.35, 0.41, 0.7])
    beyond = np.where(np.array(LR)[:, None] > edges, 100.0, 1.0)
    table = StepSizeFigure(over="flow_edge").table(over_an_edge(beyond, edges))
    np.testing.assert_array_equal(table["distance"], np.where(table["lr_over_flow_edge"] > 1, 100, 1))
    np.testing.assert_array_equal(table["distance_p10"], table["distance_p90"])


def test_over_an_edge_a_line_stands_at_one_and_the_axis_says_what_it_is():
    figure = StepSizeFigure(over="flow_edge").draw(over_an_edge(np.ones((5, 2)), np.array([0.1, 0.2])))
    assert 1 in [line.get_xdata()[0] for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert figure.axes[-1].get_xlabel() == r"step size $\gamma$ / (2/sharpness at the flow's end)"


def test_an_edge_that_is_not_recorded_is_named_before_a_fit():
    with pytest.raises(ValueError, match=r"StepSizeFigure\.over: 'flow_edge' is not recorded; recorded: distance$"):
        StepSizeFigure(over="flow_edge").check({"distance"}, {"lr": [0.1]})
