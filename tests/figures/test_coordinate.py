import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from dlnlab.figures import CoordinateFigure
from dlnlab.figures.base import GREY

STEPS = [0, 5, 10]


@pytest.fixture
def data():
    """beta of two initialisations, two seeds and four coordinates; seed 1 is minus seed 0."""
    one = np.arange(24.0).reshape(2, 3, 4)[:, ::-1]
    dims = ("init_scale", "seed", "step", "coordinate")
    time = np.broadcast_to(np.array(STEPS) * 2.0, (2, 2, 3))
    return xr.Dataset(
        {"beta": (dims, np.stack([one, -one], 1)), "time": (dims[:3], time)},
        {"init_scale": [0.1, 1e-20], "seed": [0, 1], "step": STEPS},
    )


def lines(figure, panel):
    return {tuple(line.get_ydata()): to_hex(line.get_color()) for line in figure.axes[panel].lines}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_cell_is_a_panel_and_every_coordinate_of_the_seed_a_line(data, seed):
    figure = CoordinateFigure(seed=seed).draw(data)
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["init scale 0.1", "init scale 1e-20"]
    for i, panel in enumerate(figure.axes):
        assert {tuple(row) for row in data.beta.values[i, seed].T} == set(lines(figure, i))
        assert panel.lines[0].get_xdata().tolist() == STEPS


def test_the_largest_coordinates_have_the_same_colours_in_every_panel(data):
    figure = CoordinateFigure(highlight=2).draw(data)
    for panel in (0, 1):
        colours = list(lines(figure, panel).values())  # coordinates 0, 1, 2, 3; the last are the largest
        assert colours[:2] == [GREY, GREY]
        assert colours[2:] == ["#0072b2", "#d55e00"]


def test_x_is_the_step_the_time_or_the_time_in_units_of_the_initialisation(data):
    assert CoordinateFigure(x="time").table(data)["time"].max() == 20
    table = CoordinateFigure(x="time_over_log_init").table(data)
    for scale in (0.1, 1e-20):
        own = table["panel"] == f"init scale {scale:g}"
        assert table["time_over_log_init"][own].max() == pytest.approx(20 / np.log(1 / scale))


def test_variants_are_panels(data):
    figure = CoordinateFigure(labels={"main": "SGD"}, x_range=[1, 7]).draw(
        data.isel(init_scale=0, drop=True), flow=data
    )
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles == ["SGD", "flow, init scale 0.1", "flow, init scale 1e-20"]
    assert figure.axes[-1].get_xlim() == (1, 7)


def test_what_cannot_be_drawn_is_refused_before_a_fit(data):
    with pytest.raises(ValueError, match="'beta' is not recorded; recorded: gain"):
        CoordinateFigure().check({"gain"}, {})
    with pytest.raises(ValueError, match="'time' is not recorded"):
        CoordinateFigure(x="time").check({"beta"}, {})
    with pytest.raises(ValueError, match="init_scale axis"):
        CoordinateFigure(x="time_over_log_init").check({"beta", "time"}, {"seed": [0]})
    with pytest.raises(ValueError, match="x_range"):
        CoordinateFigure(x_range=[2, 1])
    with pytest.raises(ValueError, match="'time' has no coordinates"):
        CoordinateFigure("time").draw(data)
