"""Figures over two axes, and of members in the plane of two quantities."""

import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import MapFigure, PlaneFigure


@pytest.fixture
def grid():
    """Three step sizes by two scales by three seeds; the loss is lr times scale, and seed 2 is the odd one out."""
    lr, scale = np.array([0.1, 1.0, 10.0]), np.array([1.0, 2.0])
    status = np.full((3, 2, 3, 2), "running", dtype=object)
    status[:2, ..., 1], status[2, ..., 1] = "converged", "diverged"
    status[0, 0, 2, 1] = "diverged"
    status[1, 1, :2, 1] = "running"
    loss = np.broadcast_to((lr[:, None] * scale)[:, :, None, None] * np.array([1, 2, 3])[:, None], (3, 2, 3, 2))
    axes = ("lr", "init_scale", "seed", "step")
    return xr.Dataset(
        {"train_loss": (axes, loss.copy()), "edge": (axes, loss / 2), "status": (axes, status.astype(str))},
        {"lr": lr, "init_scale": scale, "seed": range(3), "step": [0, 10]},
    )


def test_a_map_shows_the_status_of_most_seeds_and_the_median_of_those_that_converge(grid):
    table = MapFigure(lines={"edge": 1}).table(grid)
    assert list(table) == ["lr", "init_scale", "status", "train_loss", "edge"]
    cells = {(lr, scale): i for i, (lr, scale) in enumerate(zip(table["lr"], table["init_scale"], strict=True))}
    assert len(cells) == 6
    assert table["status"][cells[0.1, 1.0]] == "converged"
    assert table["train_loss"][cells[0.1, 1.0]] == pytest.approx(0.15)  # of 0.1 and 0.2, the third has diverged
    assert table["status"][cells[1.0, 2.0]] == "running"
    assert table["train_loss"][cells[1.0, 2.0]] == pytest.approx(6)  # the one that has converged
    assert table["status"][cells[10.0, 1.0]] == "diverged"
    assert np.isnan(table["train_loss"][cells[10.0, 1.0]])
    assert table["edge"][cells[10.0, 1.0]] == pytest.approx(10)  # of all seeds


def test_a_map_is_the_same_whatever_order_its_axes_stand_in(grid):
    one, other = (MapFigure().table(data) for data in (grid, grid.transpose("init_scale", "seed", "lr", "step")))
    assert all(np.array_equal(one[key], other[key], equal_nan=key == "train_loss") for key in one)


def test_a_map_has_a_colour_for_every_cell_a_key_for_every_line_and_what_has_not_converged(grid):
    figure = MapFigure(lines={"edge": [1, 2]}, labels={"edge": "theory"}).draw(grid)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["theory = 1", "theory = 2", "running", "diverged", "medians of 3 seeds"]
    panel = figure.axes[0]
    assert panel.get_xscale() == panel.get_yscale() == "log"
    drawn = panel.collections[2].get_array()  # behind running and diverged
    assert drawn.shape == (2, 3)
    assert np.ma.count(drawn) == 3 + 1


def test_the_colours_of_a_map_have_at_least_two_labelled_ticks(grid):
    grid["train_loss"] = grid.train_loss * 0 + np.linspace(20, 300, grid.train_loss.size).reshape(grid.train_loss.shape)
    figure = MapFigure().draw(grid)
    figure.draw_without_rendering()
    bar = figure.axes[1].yaxis
    first, last = bar.get_view_interval()
    texts = [tick.label2.get_text() for tick in bar.get_major_ticks() if first <= tick.get_loc() <= last]
    assert len(texts) > 1 and all(texts)


def test_a_map_without_anything_converged_is_drawn(grid, tmp_path):
    grid["status"][...] = "diverged"
    assert len(MapFigure(quantities=["train_loss", "edge"], linear=["edge"]).save(grid, tmp_path)) == 3


def test_a_map_says_what_is_missing():
    figure = MapFigure(lines={"edge": 1})
    with pytest.raises(ValueError, match=r"MapFigure\.y: no axis 'init_scale'"):
        figure.check({"train_loss", "edge"}, {"lr": [1, 2]})
    with pytest.raises(ValueError, match="'edge' is not recorded"):
        figure.check({"train_loss"}, {"lr": [1, 2], "init_scale": [1, 2]})
    with pytest.raises(ValueError, match="two axes and seeds, there is also batch_size"):
        figure.check({"train_loss", "edge"}, {"lr": [1], "init_scale": [1], "batch_size": [1, 2], "seed": [0, 1]})
    with pytest.raises(ValueError, match="quantities"):
        MapFigure(quantities=[])


@pytest.fixture
def paths():
    """Two members on circles; the second is seen to have diverged at the last step."""
    angle = np.linspace(0, 1, 5) + np.array([[0.0], [1.0]])
    status = np.full((2, 5), "running", dtype=object)
    status[1, 4] = "diverged"
    axes = ("lr", "step")
    return xr.Dataset(
        {
            "a": ((*axes, "coordinate"), np.cos(angle)[..., None]),
            "b": ((*axes, "coordinate"), np.sin(angle)[..., None]),
            "beta": ((*axes, "feature"), np.zeros((2, 5, 2))),
            "end": (axes, np.where(np.arange(5) == 4, angle, np.nan)),
            "status": (axes, status.astype(str)),
        },
        {"lr": [0.1, 0.2], "step": range(5)},
    )


def test_every_moment_of_a_member_is_a_point_until_it_has_diverged(paths):
    table = PlaneFigure(x="a", y=["b"]).table(paths)
    assert table["member"].tolist() == [0] * 5 + [1] * 4
    assert table["step"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    np.testing.assert_allclose(table["a"] ** 2 + table["b"] ** 2, 1)
    assert (table["lr"] == [0.1] * 5 + [0.2] * 4).all()


def test_an_axis_can_be_x_and_the_beginning_be_left_out(paths):
    table = PlaneFigure(x="lr", y=["b", "end"], since=3).table(paths)
    assert table["lr"].tolist() == [0.1, 0.1, 0.2]
    assert table["end"][1] == 1
    assert np.isnan(table["end"][[0, 2]]).all()


def test_paths_are_joined_and_variants_have_their_own_colour(paths):
    figure = PlaneFigure(x="a", y=["b"], join=True, colour="lr", product=0.5, labels={"flow": "the flow"})
    drawn = figure.draw(paths, flow=paths.isel(lr=[0]))
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts[2:] == ["the flow", "product 0.5"]
    joined = [line for line in drawn.axes[0].lines if len(line.get_xdata()) in (4, 5)]
    assert len(joined) == 3
    assert len({line.get_color() for line in joined}) == 3


def test_a_plane_with_nothing_in_it_is_drawn(paths, tmp_path):
    assert len(PlaneFigure(x="a", y=["b"], since=99).save(paths, tmp_path)) == 3


def test_a_plane_says_what_is_missing(paths):
    with pytest.raises(ValueError, match="'loss' is not recorded"):
        PlaneFigure(x="a", y=["loss"]).check({"a"}, {})
    with pytest.raises(ValueError, match="'time' is neither recorded nor an axis"):
        PlaneFigure(x="time", y=["a"]).check({"a"}, {"lr": [1]})
    with pytest.raises(ValueError, match="no axis 'seed'"):
        PlaneFigure(x="lr", y=["a"], colour="seed").check({"a"}, {"lr": [1]})
    with pytest.raises(ValueError, match="not one per feature"):
        PlaneFigure(x="a", y=["beta"]).table(paths)
    with pytest.raises(ValueError, match="two ascending numbers"):
        PlaneFigure(limits={"a": [1.0, 0.0]})
