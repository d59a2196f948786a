import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from dlnlab.figures import CoordinatePathsFigure
from dlnlab.figures.base import GREY

STEPS = [0, 1, 5, 9]
TEACHER = [0.0, 2.0, 0.0]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    dims = ("lr", "seed", "step")
    beta = rng.normal(size=(2, 2, 4, 3))
    beta[:, :, 2] = np.nan  # a step at which only others were recorded
    return xr.Dataset(
        {
            "beta": ((*dims, "coordinate"), beta),
            "train_loss": (dims, rng.uniform(1, 2, size=(2, 2, 4))),
            "teacher": ((*dims, "coordinate"), np.broadcast_to(TEACHER, (2, 2, 4, 3))),
            "status": (dims, np.full((2, 2, 4), "running")),
        },
        {"lr": [0.1, 0.2], "seed": [4, 6], "step": STEPS},
    )


def test_every_coordinate_of_one_seeds_member_is_a_line_grey_off_the_support(data):
    figure = CoordinatePathsFigure(["beta", "train_loss"], log=["train_loss"], seed=6).draw(data)
    assert len(figure.axes) == 4
    for column in range(2):
        beta = data.beta.values[column, 1]
        found = {to_hex(line.get_color()): line for line in figure.axes[column].lines}
        support = next(line for colour, line in found.items() if colour != GREY)
        assert support.get_xdata().tolist() == [1, 9]
        np.testing.assert_array_equal(support.get_ydata(), beta[[1, 3], 1])
        grey = [line.get_ydata() for line in figure.axes[column].lines if to_hex(line.get_color()) == GREY]
        np.testing.assert_array_equal(np.transpose(grey), beta[[1, 3]][:, [0, 2]])
        (loss,) = figure.axes[2 + column].lines
        np.testing.assert_array_equal(loss.get_ydata(), data.train_loss.values[column, 1, 1:])


def test_the_table_has_a_row_for_each_cell_step_and_coordinate(data):
    table = CoordinatePathsFigure(["beta", "train_loss"]).table(data)
    assert len(table["step"]) == 2 * 4 * 3 and set(table["seed"]) == {4}
    assert table["coordinate"].tolist() == [0, 1, 2] * 8 and table["teacher"].tolist() == TEACHER * 8
    np.testing.assert_array_equal(table["beta"], data.beta.isel(seed=0).values.ravel())
    np.testing.assert_array_equal(table["train_loss"][::3], data.train_loss.isel(seed=0).values.ravel())


def test_the_columns_are_titled_with_their_cells_and_ends(data):
    figure = CoordinatePathsFigure().draw(data.assign_attrs(lr_unit="flow_edge"))
    assert figure.axes[1].get_title() == "$\\gamma$ = 0.2 edge\nrunning"


def test_numbers_that_are_not_positive_are_left_out_on_a_logarithmic_scale(data):
    figure = CoordinatePathsFigure(log=["beta"]).draw(data)
    drawn = np.concatenate([line.get_ydata() for panel in figure.axes for line in panel.lines])
    assert (drawn[np.isfinite(drawn)] > 0).all() and np.isnan(drawn).any()


def test_what_cannot_be_drawn_is_said_before_a_fit():
    figure, axes = CoordinatePathsFigure(seed=3), {"lr": [0.1, 0.2], "seed": [0, 3]}
    figure.check({"beta", "teacher"}, axes)
    with pytest.raises(ValueError, match=r"needs 'teacher' in record\.variables; recorded: beta$"):
        figure.check({"beta"}, axes)
    with pytest.raises(ValueError, match=r"seed = 3: must be one of the ensemble's seeds"):
        figure.check({"beta", "teacher"}, {"seed": [0, 1]})
    with pytest.raises(ValueError, match=r"8 cells beside each other; at most 6"):
        figure.check({"beta", "teacher"}, {"lr": [1, 2, 3, 4], "batch_size": [1, 2], "seed": [3]})
    with pytest.raises(ValueError, match=r"log: 'gain' is none of quantities"):
        CoordinatePathsFigure(log=["gain"])
    with pytest.raises(ValueError, match=r"quantities = \[\]"):
        CoordinatePathsFigure([])
