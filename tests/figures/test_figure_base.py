import csv
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import run

import matplotlib
import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import Figure
from dlnlab.figures.base import COLUMN_WIDTH, colours, draw_levels, legend, log_axis, panels, quantiles, remark
from dlnlab.figures.words import WORDS, words, wrapped
from dlnlab.recorder import TAGS
from dlnlab.results import UNITS, UNOBSERVED


class CubesByRank(Figure):
    def draw(self, dataset, **variants):
        figure, (panel,) = panels(1)
        panel.plot(*self.table(dataset).values())
        return figure

    def table(self, dataset, **variants):
        return {"rank": np.arange(3), "cube": dataset.side.values**3}


@pytest.fixture
def dataset():
    return xr.Dataset({"side": ("member", [0.1, 1 / 3, np.inf])})


def test_save_writes_a_png_a_pdf_and_the_numbers_and_says_where(dataset, tmp_path):
    paths = CubesByRank().save(dataset, tmp_path / "made" / "figures")
    assert [path.name for path in paths] == ["cubes_by_rank.png", "cubes_by_rank.pdf", "cubes_by_rank.csv"]
    assert sorted(paths) == sorted((tmp_path / "made" / "figures").iterdir())
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[1].read_bytes().startswith(b"%PDF")


def test_the_csv_holds_every_digit(dataset, tmp_path):
    path = CubesByRank(name="cubes").save(dataset, tmp_path)[2]
    header, *rows = csv.reader(path.read_text().splitlines())
    assert path.name == "cubes.csv" and header == ["rank", "cube"]
    assert [int(row[0]) for row in rows] == [0, 1, 2]
    assert [float(row[1]) for row in rows] == [0.1**3, (1 / 3) ** 3, np.inf]


def test_columns_of_unequal_length_are_not_written(dataset, tmp_path):
    class Uneven(CubesByRank):
        def table(self, dataset, **variants):
            return {"rank": np.arange(2), "cube": np.arange(3)}

        def draw(self, dataset, **variants):
            return panels(1)[0]

    with pytest.raises(ValueError, match="zip"):
        Uneven().save(dataset, tmp_path)
    assert not list(tmp_path.iterdir())


def test_figures_drawn_at_the_same_time_are_the_same_bytes_as_one_drawn_alone(dataset, tmp_path):
    alone = [path.read_bytes() for path in CubesByRank().save(dataset, tmp_path / "alone")]
    with ThreadPoolExecutor(4) as threads:
        saved = list(threads.map(lambda i: CubesByRank().save(dataset, tmp_path / str(i)), range(4)))
    for paths in saved:
        assert [path.read_bytes() for path in paths] == alone


def test_drawing_leaves_matplotlib_as_it_was(dataset, tmp_path):
    before = dict(matplotlib.rcParams)
    CubesByRank().save(dataset, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_figures_do_without_pyplot():
    code = "import sys, dlnlab.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_figure_is_as_wide_as_a_column_and_fine_enough_to_print():
    figure, axes = panels(2)
    assert figure.get_size_inches()[0] == COLUMN_WIDTH and figure.dpi >= 150 and len(axes) == 2


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a:b"])
def test_a_name_must_be_a_plain_file_name(name):
    with pytest.raises(ValueError, match="must be a file name"):
        CubesByRank(name=name)


@pytest.mark.parametrize("values", [[1, 2, 4, 8], [1, 2, 4, 8, 16], [3]])
def test_quantiles_of_finite_values_are_numpys(values):
    values = np.array(values, dtype=float)
    np.testing.assert_array_equal(quantiles(values, (0.1, 0.5, 0.9)), np.quantile(values, (0.1, 0.5, 0.9)))


@pytest.mark.parametrize("count", [4, 5])
def test_a_median_is_finite_where_fewer_than_half_are_infinite(count):
    for lost in range(count + 1):
        values = np.arange(1.0, count + 1)
        values[count - lost :] = np.nan if lost % 2 else np.inf
        assert np.isfinite(quantiles(values, (0.5,))[0]) == (lost < count / 2)


_ENDS = [(0.3, 0.3), (0.021, 0.049), (0.6, 2.0), (1e-2, 2.0), (1e-20, 1e3), (3e-9, 4e-9), (1.2, 1.9), (2.1, 4.9),
         (0.55, 9.5), (0.11, 9.9), (20, 999), (1.0001e-7, 9.9e-6), (0.99, 1.01)]  # fmt: skip


def labelled(axis):
    """Texts of an axis's major ticks that are seen."""
    first, last = sorted(axis.get_view_interval())
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if first <= tick.get_loc() <= last]


@pytest.mark.parametrize("low, high", _ENDS)
def test_a_logarithmic_axis_shows_its_range_and_labels_at_least_two_ticks(low, high):
    figure, (panel,) = panels(1)
    log_axis(panel.yaxis, low, high)
    figure.draw_without_rendering()
    first, last = panel.get_ylim()
    assert first < low <= high < last
    texts = labelled(panel.yaxis)
    assert 2 <= len(texts) <= 8 and all(texts) and len(set(texts)) == len(texts)


def test_the_ticks_of_a_logarithmic_axis_are_those_of_its_limits_now():
    figure, (panel,) = panels(1)
    log_axis(panel.xaxis, 1e-3, 1e3)
    panel.set_xlim(2.1, 4.9)
    figure.draw_without_rendering()
    assert len(labelled(panel.xaxis)) > 1


def test_every_name_in_the_records_has_words_without_underscores_and_an_unknown_one_is_shown_with_spaces():
    for name in [*TAGS, *UNITS, *WORDS]:
        assert "_" not in re.sub(r"\$.*?\$", "", words(name)), name
    assert words("gamma_max_over_flow_edge") == r"$\gamma_{\max}$ over 2/sharpness at the flow's end"
    assert words("my_own_variable") == "my own variable"


def test_a_label_is_divided_between_words_and_not_within_tex():
    text = r"in units of $\max_i |x_i|^2 / \gamma_{\max}$ and\nof all that is longer than a line"
    lines = wrapped(text, 20).split("\n")
    assert " ".join(lines) == text.replace("\n", " ") and len(lines) == 4
    assert all(line.count("$") % 2 == 0 for line in lines)
    assert wrapped("one dollar $ in a label that is long") == "one dollar $ in a label that is long"


def test_the_distance_is_called_what_it_measures():
    for units, label in (
        (UNITS["distance"], "squared distance to the teacher"),
        (UNOBSERVED, "error, unobserved entries"),
    ):
        data = xr.Dataset({"distance": ((), 1.0, {"units": units})})
        assert words("distance", data) == label
    assert words("distance", xr.Dataset({"distance": ((), 1.0)})) == "distance"


def test_names_of_levels_stand_beside_the_panel_where_they_hide_nothing():
    figure, (panel,) = panels(1)
    panel.plot([0, 1], [0, 1])
    draw_levels(panel, {"low": 0.2, "high": 0.8, "lost": np.inf})
    figure.draw_without_rendering()
    assert [text.get_text() for text in panel.texts] == ["high", "low"]
    for text in panel.texts:
        assert text.get_window_extent().x0 >= panel.get_window_extent().x1


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_no_two_lines_have_the_same_colour(count):
    assert len({str(colour) for colour in colours(count)}) == count


@pytest.mark.parametrize("length", [3, 25, 45])
def test_a_legend_has_no_more_columns_than_the_figure_has_room_for(length):
    figure, _ = panels(1, header=0.5)
    legend(figure, [remark("x" * length)] * 4, 3)
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    box = drawn.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width
