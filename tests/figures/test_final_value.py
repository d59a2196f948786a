import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import FinalValueFigure

AXES = {"lr": [0.1, 0.4, 0.2], "batch_size": ["2", "full"], "seed": range(5)}


def results(values, status="running", law=None, axes=AXES):
    shape = tuple(len(found) for found in axes.values())
    start, dims = np.full(shape, 3.0), (*axes, "step")
    status = np.broadcast_to(status, shape)
    found = {
        "gain_l1": (dims, np.stack([start, np.broadcast_to(values, shape)], -1)),
        "status": (dims, np.stack([np.full(shape, "running"), status], -1).astype("<U9")),
    }
    if law is not None:
        found["gain_l1_law"] = (dims, np.stack([np.broadcast_to(law, shape), np.full(shape, np.nan)], -1))
    data = xr.Dataset(found, {**axes, "step": [0, 7]})
    return data.assign_coords(batch_size_number=("batch_size", [2, 20])) if "batch_size" in axes else data


@pytest.fixture
def ends():
    return 10 ** np.random.default_rng(1).normal(size=(3, 2, 5))


def lines(figure, panel=0, style="-"):
    kept = [line for line in figure.axes[panel].lines if line.get_linestyle() == style]
    return [line.get_data() for line in kept if style != "-" or line.get_marker() == "o"]


def test_each_line_is_the_median_of_what_was_recorded_last_in_ascending_order(ends):
    found = lines(FinalValueFigure(quantities=["gain_l1"]).draw(results(ends)))
    for batch, (x, y) in enumerate(found):
        assert x.tolist() == [0.1, 0.2, 0.4]
        np.testing.assert_allclose(y, np.median(ends[[0, 2, 1], batch], axis=1))


def test_per_an_axis_x_is_the_quotient_and_over_x_what_is_proportional_becomes_level(ends):
    batch = np.array([2, 20])[:, None]
    data = results(7 * np.array(AXES["lr"])[:, None, None] / batch * np.ones((3, 2, 5)))
    figure = FinalValueFigure(quantities=["gain_l1"], per="batch_size", over_x=True)
    first, second = lines(figure.draw(data))
    np.testing.assert_allclose(first, [[0.05, 0.1, 0.2], [7, 7, 7]])
    np.testing.assert_allclose(second, [[0.005, 0.01, 0.02], [7, 7, 7]])
    label = r"$\ell_1$ norm of the gain /" "\n" r"(step size $\gamma$ / batch size)"
    assert figure.draw(data).axes[0].get_ylabel() == label


def test_diverged_members_count_as_infinitely_large(ends):
    status = np.full((3, 2, 5), "running", dtype="<U9")
    status[1, 0, :3] = "diverged"
    figure = FinalValueFigure(quantities=["gain_l1"])
    assert np.isnan(lines(figure.draw(results(ends, status)))[0][1][2])
    table = figure.table(results(ends, status))
    assert table["gain_l1"][2] == np.inf and table["diverged"].tolist() == [0, 0, 3, 0, 0, 0]


def test_a_law_is_dashed_and_may_be_recorded_at_another_step(ends):
    figure = FinalValueFigure(quantities=["gain_l1"], panels="batch_size").draw(results(ends, law=2 * ends))
    for panel in range(2):
        ((_, y),) = lines(figure, panel, "--")
        np.testing.assert_allclose(y, np.median(2 * ends[[0, 2, 1], panel], axis=1))


def test_the_batch_size_can_be_the_axis(ends):
    figure = FinalValueFigure(x="batch_size", quantities=["gain_l1"]).draw(results(ends))
    assert [x.tolist() for x, _ in lines(figure)] == [[2, 20]] * 3


def test_variants_without_the_axis_are_levels(ends):
    flow = results([4.0, 5.0, 9.0], axes={"seed": range(3)})
    figure = FinalValueFigure(quantities=["gain_l1"]).draw(results(ends), flow_alone=flow)
    (level,) = [line for line in figure.axes[0].lines if len(set(line.get_ydata())) == 1]
    assert level.get_ydata()[0] == 5
    assert "flow alone" in [text.get_text() for text in figure.axes[0].texts]


def test_what_cannot_be_drawn_is_said_before_a_fit():
    axes = {"lr": [0.1], "seed": [0]}
    FinalValueFigure().check({"distance"}, axes)
    with pytest.raises(ValueError, match=r"quantities: 'distance' is not recorded; recorded: beta$"):
        FinalValueFigure().check({"beta"}, axes)
    for key, arguments in {"x": {"x": "alpha"}, "per": {"per": "alpha"}, "panels": {"panels": "alpha"}}.items():
        with pytest.raises(ValueError, match=rf"FinalValueFigure\.{key}: no axis 'alpha'; the axes are lr, seed$"):
            FinalValueFigure(**arguments).check({"distance"}, axes)
    with pytest.raises(ValueError, match=r"quantities = \[\]"):
        FinalValueFigure(quantities=[])


def test_a_variable_of_coordinates_is_refused(ends):
    data = results(ends)
    with pytest.raises(ValueError, match="'gain_l1' must be one number per member"):
        FinalValueFigure(quantities=["gain_l1"]).draw(
            data.assign(gain_l1=data.gain_l1.expand_dims(coordinate=2, axis=-1))
        )
