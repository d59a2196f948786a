import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import run

import matplotlib
import numpy as np
import pytest
import xarray as xr

from dlnlab.figures import Figure
from dlnlab.figures.base import COLUMN_WIDTH, colours, log_axis, panels, quantiles


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


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "two words"])
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


@pytest.mark.parametrize("low, high", [(0.3, 0.3), (0.021, 0.049), (0.6, 2.0), (1e-2, 2.0), (1e-20, 1e3), (3e-9, 4e-9)])
def test_a_logarithmic_axis_shows_its_range_and_labels_it(low, high):
    figure, (panel,) = panels(1)
    log_axis(panel.yaxis, low, high)
    figure.draw_without_rendering()
    first, last = panel.get_ylim()
    labelled = [tick for tick in panel.yaxis.get_major_ticks() if first <= tick.get_loc() <= last]
    assert first < low <= high < last
    assert labelled and all(tick.label1.get_text() for tick in labelled)


@pytest.mark.parametrize("count", [1, 7, 8, 20])
def test_no_two_lines_have_the_same_colour(count):
    assert len({str(colour) for colour in colours(count)}) == count
