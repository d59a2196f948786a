"""ObservedEntries: a person's ratings get in, and what is wrong with them is named by its line."""

import numpy as np
import pytest
import torch

from dlnlab.data import ObservedEntries
from dlnlab.ensemble import Ensemble

ROWS = [("ann", "book", 4.0), ("ann", "film", 2.0), ("bob", "film", 5.0), ("eve", "game", 1.0), ("bob", "book", 3.0)]


def csv(tmp_path, rows=ROWS, header="who,what,stars"):
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def prepared(path, **kwargs):
    data = ObservedEntries(path, **{"standardize": False, "test_fraction": 0.0, **kwargs})
    data.setup()
    return data


def entries(data):
    places, y = data.problems.x[0].tolist(), data.problems.y[0].tolist()
    return {(data.row_names[i], data.column_names[j], value) for (i, j), value in zip(places, y, strict=True)}


def test_a_csv_a_parquet_and_an_archive_hold_the_same_entries(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    columns = list(zip(*ROWS, strict=True))
    pandas.DataFrame(dict(zip(("who", "what", "stars"), columns, strict=True))).to_parquet(tmp_path / "r.parquet")
    np.savez(tmp_path / "r.npz", who=columns[0], what=columns[1], stars=columns[2])
    for path in (csv(tmp_path), str(tmp_path / "r.parquet"), str(tmp_path / "r.npz")):
        data = prepared(path)
        assert data.problems.matrix_shape == (3, 3)
        assert data.row_names == ["ann", "bob", "eve"]
        assert entries(data) == set(ROWS)


def test_columns_are_chosen_by_name(tmp_path):
    data = prepared(csv(tmp_path), row="what", column="who", value="stars")
    assert entries(data) == {(b, a, value) for a, b, value in ROWS}


def test_three_columns_are_meant_by_name_or_because_there_are_no_others(tmp_path):
    path = tmp_path / "ratings.csv"
    for header, keys in (
        ("value,row,time,column", {}),
        (",who,what,stars", {}),
        ("a,b,c,d", {"row": 1, "column": "c", "value": -1}),
    ):
        places = (
            [header.split(",").index(name) for name in ("row", "column", "value")] if "row" in header else [1, 2, 3]
        )
        lines = [["7"] * 4 for _ in ROWS]
        for number, (line, row) in enumerate(zip(lines, ROWS, strict=True)):
            line[0] = str(number)
            for place, cell in zip(places, row, strict=True):
                line[place] = str(cell)
        path.write_text("\n".join([header, *map(",".join, lines)]))
        assert entries(prepared(str(path), **keys)) == set(ROWS)


WHOLE = np.round(np.random.default_rng(0).normal(size=(4, 5)), 3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (
            WHOLE,
            r"has 5 columns \(a, b, c, d, e\) and entries need three: give the names or numbers of row, column, value",
        ),
        (np.arange(20).reshape(4, 5), "has 5 columns .* a whole matrix must be turned into one line for each entry"),
        (WHOLE[:, :3], "rows and columns are named by texts or whole numbers. A matrix written out whole"),
        (WHOLE[:, :2], "has 2 columns"),
        (WHOLE[:, :1], "has 1 columns .* none of tab ; , | :: spaces divides its rows"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_a_whole_matrix_is_not_taken_for_entries(tmp_path, matrix, message, suffix):
    path = tmp_path / f"whole.{suffix}"
    columns = dict(zip("abcde", matrix.T, strict=False))
    if suffix == "csv":
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in matrix.tolist())]))
    else:
        np.savez(path, **columns)
        message = message.split(" .* none of")[0]
    with pytest.raises(ValueError, match=message):
        prepared(str(path))


def test_names_are_compared_as_they_are_written(tmp_path):
    path = tmp_path / "ratings.dat"
    path.write_text("007::x::1\n7::x::2\n12345678901234567890::x::3\n12345678901234567891::y::4\n")
    assert prepared(str(path), header=False).row_names == ["007", "7", "12345678901234567890", "12345678901234567891"]


def test_each_seed_has_its_own_test_entries_and_units_come_from_the_training_entries(tmp_path):
    rows = [(i, j, float(i + 3 * j)) for i in range(8) for j in range(5)]
    data = ObservedEntries(csv(tmp_path, rows), test_fraction=0.25)
    data.ensemble = Ensemble(seed=2)
    data.setup()
    x, y, test = data.problems.x, data.problems.y, data.problems.x_test
    assert test.shape == (2, 10, 2)
    assert not torch.equal(test[0], test[1])
    for p in range(2):
        assert len({tuple(place) for place in torch.cat((x[p], test[p])).tolist()}) == 40
        raw = (x[p, :, 0] + 3 * x[p, :, 1]).double()  # rows and columns appear in ascending order
        torch.testing.assert_close(y[p], (raw - raw.mean()) / raw.std(correction=0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("ann", "book", 1.0), r'line 7 \(row 6\): "who" ann, "what" book is already given in line 2 \(row 1\)'),
        (("zoe", "book", "good"), r"line 7 \(row 6\), column \"stars\": 'good': every entry must be a finite number"),
        (("zoe", "book", "nan"), r"line 7 \(row 6\), column \"stars\": 'nan': .* \(a hole: fill it in"),
        (("zoe", "NA", 1.0), r"line 7 \(row 6\), column \"what\": 'NA': every entry must have a name"),
        (
            ("0.5", "book", 1.0),
            r"line 7 \(row 6\), column \"who\": '0.5': the matrix's rows and columns are named by texts",
        ),
        ((" ", "book", 1.0), r"line 7 \(row 6\), column \"who\": empty: every entry must have a name"),
        (("zoe", "book"), r"line 7 \(row 6\): 2 entries: every row must have 3"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        prepared(csv(tmp_path, [*ROWS, row]))


def test_a_missing_file_column_or_too_few_entries_are_refused(tmp_path):
    with pytest.raises(OSError, match="no such file"):
        prepared(str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match='has no column "rating"; it has who, what, stars'):
        prepared(csv(tmp_path), value="rating")
    with pytest.raises(ValueError, match="must be three columns"):
        prepared(csv(tmp_path), column="who")
    with pytest.raises(ValueError, match="at least 2 left to train on"):
        prepared(csv(tmp_path), test_fraction=0.9)
    with pytest.raises(ValueError, match='column "stars": must vary'):
        prepared(csv(tmp_path, [(*row[:2], 3.0) for row in ROWS]), standardize=True)


def test_the_wine_table_is_read_without_a_file():
    pytest.importorskip("sklearn")
    data = ObservedEntries()
    data.setup()
    assert data.problems.matrix_shape == (178, 13)
    assert data.problems.x.shape[1] + data.problems.x_test.shape[1] == 178 * 13
