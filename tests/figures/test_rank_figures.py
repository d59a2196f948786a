"""Figures of ranks and of ends: their numbers are those of the results."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import poisson

from dlnlab.figures import EndsFigure, GridMapFigure, RankFigure, WaitingFigure
from dlnlab.figures.waiting import rate_interval


def results(lrs=(0.1, 0.2), seeds=3, steps=(0, 10, 20), distance=0.5):
    """Ranks that fall by one a step from 2 + lr's place, members that diverge at the last step where both are last."""
    shape = (len(lrs), seeds, len(steps))
    dims = ("lr", "seed", "step")
    rank = np.arange(2, 2 + len(lrs))[:, None, None] + np.zeros(shape) - np.minimum(np.arange(len(steps)), 1)
    status = np.full(shape, "running", dtype=object)
    status[-1, -1, -1] = "diverged"
    values = np.stack([np.full(shape, 4.0), 4 * 10.0 ** -np.arange(len(steps)) * np.ones(shape)], axis=-1)
    found = {
        "rank": (dims, rank),
        "time": (dims, np.array(lrs)[:, None, None] * np.array(steps) * np.ones(shape)),
        "status": (dims, status),
        "singular_values": ((*dims, "index"), values),
        "distance": (dims, distance * (1 + np.arange(seeds))[:, None] * np.ones(shape)),
        "distance_baseline": (dims, np.where(np.arange(len(steps)) == len(steps) - 1, 0.25, np.nan) * np.ones(shape)),
    }
    return xr.Dataset(found, coords={"lr": list(lrs), "seed": range(seeds), "step": list(steps)})


def test_the_rank_figures_table_has_every_member_and_nothing_after_a_divergence():
    table = RankFigure().table(results())
    assert set(table["line"]) == {"lr 0.1", "lr 0.2"}
    assert len(table["rank"]) == 2 * 3 * 3
    first = (table["line"] == "lr 0.1") & (table["member"] == 0)
    assert table["step"][first].tolist() == [0, 10, 20]
    assert table["rank"][first].tolist() == [2, 1, 1]
    np.testing.assert_allclose(table["singular_value"][first], [1, 0.1, 0.01])
    lost = (table["line"] == "lr 0.2") & (table["member"] == 2)
    assert np.isnan(table["rank"][lost]).tolist() == [False, False, True]


def test_variants_are_lines_and_what_is_left_out_is_not():
    table = RankFigure(leave_out=["main"]).table(results(), sgd=results((0.3,)), gd=results((0.1,)))
    assert set(table["line"]) == {"sgd", "gd"}


def test_ranks_are_drawn_with_errors_below():
    figure = RankFigure(errors=["distance", "test_loss"], log_time=True).draw(results(), sgd=results((0.3,)))
    assert [panel.get_ylabel() for panel in figure.axes] == ["$s_2/s_1$ of each member", "mean rank", "distance"]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [2, 1, 1]


def test_ends_are_the_last_values_with_the_baselines_and_without_the_diverged():
    table = EndsFigure(leave_out=["warm_up"]).table(results(), warm_up=results(), sgd=results(distance=0.1))
    assert list(dict.fromkeys(table["line"])) == ["main", "sgd", "baseline"]
    main = table["distance"][table["line"] == "main"]
    np.testing.assert_allclose(main[:5], [0.5, 1.0, 1.5, 0.5, 1.0])
    assert np.isnan(main[5])
    assert (table["distance"][table["line"] == "baseline"] == 0.25).all()
    labels = [label.get_text() for label in EndsFigure().draw(results()).axes[0].get_yticklabels()]
    assert labels == ["main (1 diverged)", "baseline"]


def test_ends_have_a_row_for_each_value_of_an_axis():
    figure = EndsFigure(axis="lr")
    table = figure.table(results(), sgd=results(lrs=(0.3,)))
    assert list(dict.fromkeys(table["line"])) == ["0.1", "0.2", "sgd, 0.3", "baseline"]
    np.testing.assert_allclose(table["distance"][table["line"] == "0.1"], [0.5, 1.0, 1.5])
    assert len(table["distance"][table["line"] == "baseline"]) == 3
    with pytest.raises(ValueError, match=r"EndsFigure.axis = 'lr': the axes are seed"):
        figure.check({"distance"}, {"seed": [0]})


def test_a_grid_map_holds_means_over_seeds_and_shares_of_the_diverged():
    data = xr.concat([results().assign_coords(weight_decay=k) for k in (0.01, 0.02)], "weight_decay")
    figure = GridMapFigure(quantity="rank")
    table = figure.table(data)
    place = (table["lr"] == 0.2) & (table["weight_decay"] == 0.02)
    assert table["rank"][place].tolist() == [2.0]
    np.testing.assert_allclose(table["diverged"][place], [1 / 3])
    image = figure.draw(data).axes[0].images[0].get_array()
    assert image.tolist() == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("figure", "variables", "axes", "message"),
    [
        (RankFigure(), {"distance"}, {}, "needs rank and singular_values; add RankTracker"),
        (EndsFigure(), {"rank"}, {}, "EndsFigure.quantity: 'distance' is not recorded"),
        (GridMapFigure(), {"jumps_down"}, {"lr": []}, "needs an ensemble.weight_decay axis; the axes are lr"),
        (GridMapFigure(), {"rank"}, {"lr": [], "weight_decay": []}, "'jumps_down' is not recorded"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused_before_the_fit(figure, variables, axes, message):
    with pytest.raises(ValueError, match=message):
        figure.check(variables, axes)


def test_the_first_singular_value_is_not_drawn_over_itself():
    with pytest.raises(ValueError, match="index = 1: must be at least 2"):
        RankFigure(index=1)


def test_ranks_are_drawn_over_time_where_asked():
    figure = RankFigure(x="time").draw(results(lrs=(0.1,)))
    assert figure.axes[1].lines[0].get_xdata().tolist() == [0, 1, 2]
    assert figure.axes[-1].get_xlabel() == "time"


def jumps(began, when, ends, lost=()):
    """Results of members that begin at given ranks and are first seen below rank 1, 2, 3 at given steps."""
    last = max(ends)
    dims, steps = ("seed", "step"), [0, last]
    found = {
        "rank": (dims, np.array([began, [1.0] * len(began)]).T),
        "jump_steps": ((*dims, "index"), np.array([np.full_like(when, np.nan), when]).transpose(1, 0, 2)),
        "status": (dims, np.array([["running", "diverged" if m in lost else "running"] for m in range(len(began))])),
        "stopped_at": (("seed",), np.array([end if m in lost else -1 for m, end in enumerate(ends)])),
    }
    return xr.Dataset(found, coords={"seed": range(len(began)), "step": steps})


NEVER = np.nan


def test_waits_that_the_end_cuts_off_are_waits_and_no_jumps():
    # From rank 2: after 10 and 30 steps, cut off at 20 (diverged) and after 100 - 40 = 60 steps (it came at step 40).
    data = jumps(
        began=[2, 2, 2, 3],
        when=[[NEVER, 10, NEVER], [NEVER, 30, NEVER], [NEVER, NEVER, NEVER], [NEVER, NEVER, 40]],
        ends=[100, 100, 20, 100],
        lost=[2],
    )
    table = WaitingFigure().table(data)
    two = table["rank"] == 2
    # Kaplan and Meier by hand: 4 at risk at 10, 2 (not the lost one) at 30.
    found = dict(zip(table["steps"][two].tolist(), table["waiting"][two].tolist(), strict=True))
    assert {step: found[step] for step in (0, 10, 30)} == {0: 1.0, 10: 0.75, 30: 0.375}
    assert set(table["jumps"][two]) == {2}
    assert set(table["members"][two]) == {4}
    np.testing.assert_allclose(table["jumps_per_step"][two], 2 / (10 + 30 + 20 + 60))
    three = table["rank"] == 3
    assert table["waiting"][three].tolist() == [1.0, 0.0]


def test_waits_are_drawn_with_a_line_for_each_rank():
    data = jumps(began=[3, 2], when=[[NEVER, 50, 20], [NEVER, NEVER, NEVER]], ends=[100, 100])
    figure = WaitingFigure().draw(data)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rank 3 to 2", "rank 2 to 1"]
    with pytest.raises(ValueError, match="needs rank and jump_steps; add RankTracker and RankJumps"):
        WaitingFigure().check({"rank"}, {})


@pytest.mark.parametrize("events", [0, 1, 7, 300])
def test_the_interval_of_a_rate_covers_what_poisson_counts_say(events):
    low, high = rate_interval(events, 1e5)
    assert poisson.cdf(events, high * 1e5) == pytest.approx(0.025)
    assert low == 0 if events == 0 else poisson.sf(events - 1, low * 1e5) == pytest.approx(0.025)
    assert rate_interval(0, 0.0) == (0.0, np.inf)
