import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from dlnlab.figures import CoordinatesFigure
from dlnlab.figures.base import GREY

TEACHER = np.array([[0.0, -2.0, 0.0, 1.0], [3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 2.0]])  # seed, coordinate
ORDER = [[1, 3, 0, 2], [0, 2, 1, 3], [3, 2, 0, 1]]


def results(lr=(0.1, 0.2), status="running", **variables):
    """Results of (lr, seed) members at steps 0 and 9; variables are given (lr, seed, coordinate) at the last."""
    shape = len(lr), 3
    both = {name: np.stack([np.zeros_like(values), values], 2) for name, values in variables.items()}
    teacher = np.broadcast_to(TEACHER[None, :, None], (*shape, 2, 4))
    found = {name: (("lr", "seed", "step", "coordinate"), values) for name, values in both.items()}
    ends = np.stack([np.full(shape, "running"), np.broadcast_to(status, shape)], -1).astype("<U9")
    return xr.Dataset(
        {
            **found,
            "teacher": (("lr", "seed", "step", "coordinate"), teacher),
            "status": (("lr", "seed", "step"), ends),
        },
        {"lr": list(lr), "seed": range(3), "step": [0, 9]},
    )


@pytest.fixture
def gains():
    return 10 ** np.random.default_rng(0).normal(size=(2, 3, 4))


def lines(figure, panel=0):
    return [line.get_ydata() for line in figure.axes[panel].lines if line.get_marker() == "o"]


def in_order(values):
    return np.take_along_axis(values, np.array(ORDER), 1)


def test_each_line_is_the_mean_over_seeds_of_the_coordinates_sorted_by_their_own_teacher(gains):
    drawn = lines(CoordinatesFigure().draw(results(gain=gains)))
    for i in range(2):
        np.testing.assert_allclose(drawn[i], in_order(gains[i]).mean(0))


def test_or_the_median(gains):
    drawn = lines(CoordinatesFigure(average="median").draw(results(gain=gains)))
    np.testing.assert_allclose(drawn[1], np.median(in_order(gains[1]), axis=0))


def test_the_table_holds_mean_band_and_teacher(gains):
    table = CoordinatesFigure().table(results(gain=gains))
    assert table["place"].tolist() == [1, 2, 3, 4] * 2 and table["lr"].tolist() == [0.1] * 4 + [0.2] * 4
    assert table["on_support"].tolist() == [1, 1, 0, 0] * 2
    np.testing.assert_allclose(table["teacher"][:4], [(-2 + 3 + 2) / 3, 1, 0, 0])
    low, high = np.quantile(in_order(gains[0]), [0.1, 0.9], axis=0)
    np.testing.assert_allclose(table["gain_p10"][:4], low)
    np.testing.assert_allclose(table["gain_p90"][:4], high)


def test_diverged_members_are_left_out_and_counted(gains):
    data = results(gain=gains, status=[["running", "diverged", "converged"], ["running"] * 3])
    table, figure = CoordinatesFigure().table(data), CoordinatesFigure().draw(data)
    np.testing.assert_allclose(table["gain"][:4], in_order(gains[0])[[0, 2]].mean(0))
    assert table["diverged"].tolist() == [1] * 4 + [0] * 4
    assert r"$\gamma$ = 0.1 (1 of 3 diverged)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_cell_whose_members_have_all_diverged_is_nan_in_the_table(gains):
    data = results(gain=gains, status=[["diverged"] * 3, ["running"] * 3])
    CoordinatesFigure().draw(data)
    assert np.isnan(CoordinatesFigure().table(data)["gain"][:4]).all()


def test_an_axis_becomes_panels_with_its_values_as_titles(gains):
    figure = CoordinatesFigure(panels="lr").draw(results(gain=gains))
    assert [panel.get_title() for panel in figure.axes] == [r"$\gamma$ = 0.1", r"$\gamma$ = 0.2"]
    for i in range(2):
        (line,) = lines(figure, i)
        np.testing.assert_allclose(line, in_order(gains[i]).mean(0))


def test_step_sizes_in_units_of_an_edge_say_so(gains):
    data = results(gain=gains).assign_attrs(lr_unit="flow_edge")
    assert CoordinatesFigure(panels="lr").draw(data).axes[0].get_title() == r"$\gamma$ = 0.1 edge"


def test_a_law_is_dashed_and_the_teacher_black(gains):
    figure = CoordinatesFigure(with_teacher=True, panels="lr").draw(results(gain=gains, gain_law=2 * gains))
    (law,) = [line for line in figure.axes[1].lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(law.get_ydata(), 2 * in_order(gains[1]).mean(0))
    (teacher,) = [line for line in figure.axes[0].lines if line.get_marker() == "_"]
    np.testing.assert_allclose(teacher.get_ydata(), [1, 1, 0, 0])


def test_another_step_can_be_looked_at(gains):
    table = CoordinatesFigure(at=0).table(results(gain=gains))
    assert table["gain"].tolist() == [0] * 8


def test_variants_are_further_lines_or_panels(gains):
    main, other = results(gain=gains), results(lr=[0.5], gain=gains[:1] * 3)
    table = CoordinatesFigure().table(main, flow=other)
    names = list(dict.fromkeys(table["line"].tolist()))
    assert names == [r"$\gamma$ = 0.1", r"$\gamma$ = 0.2", "flow"]
    figure = CoordinatesFigure(panels="variant").draw(main, flow=other)
    assert [panel.get_title() for panel in figure.axes] == ["main", "flow"]


def test_the_support_is_shaded(gains):
    (patch,) = [p for p in CoordinatesFigure(panels="lr").draw(results(gain=gains)).axes[0].patches]
    assert to_hex(patch.get_facecolor()) == GREY
    np.testing.assert_allclose([patch.get_x(), patch.get_x() + patch.get_width()], [0.5, 2.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantities": []}, r"quantities = \[\]: must name"),
        ({"log": ["beta"]}, r"log: 'beta' is none of quantities = \['gain'\]"),
        ({"average": "mode"}, r"average = 'mode': must be one of mean, median"),
        ({"at": -1}, r"at = -1"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoordinatesFigure(**arguments)


def test_what_cannot_be_drawn_is_said_before_a_fit():
    figure, axes = CoordinatesFigure(panels="lr"), {"lr": [0.1], "seed": [0]}
    figure.check({"gain", "teacher"}, axes)
    with pytest.raises(ValueError, match=r"needs 'teacher' in record\.variables; recorded: gain$"):
        figure.check({"gain"}, axes)
    with pytest.raises(ValueError, match=r"panels: no axis 'lr'; the axes are variant, seed$"):
        figure.check({"gain", "teacher"}, {"seed": [0]})
    with pytest.raises(ValueError, match=r"7 values of lr; at most 6 panels"):
        figure.check({"gain", "teacher"}, {"lr": list(range(7))})


def test_a_variable_without_coordinates_is_refused(gains):
    data = results(gain=gains)
    with pytest.raises(ValueError, match="'gain' must have one number per coordinate"):
        CoordinatesFigure().draw(data.assign(gain=data.gain.sum("coordinate")))
