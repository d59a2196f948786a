import gzip
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlnlab.delimited import Delimited, number
from dlnlab.tables import Table, TableWarning, read_table

NAMES = ["age", "bmi", "outcome"]
VALUES = np.array([[1.5, -2e-300, 3.0], [0.1, 7.0, -4.25], [1 / 3, 1e17, 0.0], [5.0, 6.0, 7.0]])


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def text(values=VALUES, names=NAMES, delimiter=","):
    rows = [[repr(float(entry)) for entry in row] for row in values]
    return "".join(delimiter.join(row) + "\n" for row in ([names] if names else []) + rows)


def all_numbers(path):
    table = read_table(path)
    return table.numbers(list(table.columns))


def written(path, content):
    path.write_bytes(content.encode())
    return path


def refusal(path, columns=None):
    with pytest.raises((ValueError, OSError)) as caught:
        table = read_table(path)
        table.numbers(columns or list(table.columns))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::", " ", "   ", ", "])
@pytest.mark.parametrize(
    ("suffix", "newline", "encoding"),
    [
        ("csv", "\n", "utf-8"),
        ("TSV", "\r\n", "utf-8-sig"),
        ("txt", "\r", "utf-8"),
        ("dat.gz", "\n", "utf-8"),
        ("data", "\n\n", "utf-8"),
    ],
)
def test_a_text_table_reads_back_exactly(tmp_path, separator, suffix, newline, encoding):
    path = tmp_path / f"my.{suffix}"
    for names in (NAMES, None):
        content = text(names=names, delimiter=separator).rstrip("\n").replace("\n", newline).encode(encoding)
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        table = read_table(path, header=names is not None)
        assert list(table.columns) == (names or ["0", "1", "2"])
        assert np.array_equal(table.numbers(list(table.columns)), VALUES)
        by_row = np.array([table.columns[name] for name in table.columns]).T
        assert np.array_equal(by_row.astype(float), VALUES)


# Each of these is read by pandas in one go, or is left to the row-by-row reader: both must agree with Python's float.
CELLS = st.one_of(
    st.floats().map(repr), st.integers().map(str), st.text("0123456789+-.eE_ ", max_size=9), st.text(max_size=3),
    st.sampled_from(["-0", "00012", "1e-400", "1e400", "True", "0x10", "inf", "nan", "NA", "1" * 400]),
)  # fmt: skip


@given(
    cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), separator=st.sampled_from([",", "\t", "::", " "])
)
def test_what_pandas_reads_is_what_python_reads(cells, separator):
    def agrees(kind):
        found = columns.read(["0", "1"], kind)
        rows = [[number(cell) if kind is float else cell for cell in columns[name]] for name in columns]
        return found is None or np.array_equal(np.array(found, kind), np.array(rows, kind), equal_nan=kind is float)

    content = "".join(separator.join(row) + "\n" for row in cells)
    try:
        columns = Delimited("t", "1" + separator + "2\n" + content, header=False)
        list(columns["0"])
    except ValueError:
        return
    if len(columns) == 2:
        assert agrees(float)
        assert agrees(str)


def test_pandas_reads_plain_numbers():
    assert (
        Delimited("t", "1,-0\n2,1e-320\n", header=False).read(["0", "1"], float)[1].tobytes()
        == np.array([-0.0, 1e-320]).tobytes()
    )


# Header, names and separators -----------------------------------------------------------------------------------------

# What a file holds; the names of its columns; how many rows; what of it is said ("" nothing).
GUESSES = {
    "names over numbers": ("age,bmi\n1,2\n", ["age", "bmi"], 1, ""),
    "names over texts": ("a,b\nx,y\n", ["a", "b"], 1, "header: false"),
    "numbers": ("1,2\n3,4\n", ["0", "1"], 2, "header: true"),
    "a hole": ("1,NA,3\n4,5,6\n", ["0", "1", "2"], 2, "header: true"),
    "a hole in front": (",2,3\n4,5,6\n7,8,9\n", ["0", "1", "2"], 3, "header: true"),
    "holes alone": ("?,-\n1,2\n", ["0", "1"], 2, "header: true"),
    "texts beside numbers": ("M,0.4,15\nF,0.5,9\n", ["0", "1", "2"], 2, "header: true"),
    "holes beside texts": ("3,?,alfa\n1,164,audi\n2,?,vw\n", ["0", "1", "2"], 3, "header: true"),
    "decimal commas": ("3,5;4,2\n1,5;2\n", ["0", "1"], 2, "header: true"),
    "years": ("2010,2011\n1,2\n", ["0", "1"], 2, "header: true"),
    "a name beside years": ("id,2010,2011\n5,1,2\n6,3,4\n", ["id", "2010", "2011"], 2, "header: false"),
    "pandas' index": (",a,b\n0,1,2\n1,3,4\n", ["Unnamed: 0", "a", "b"], 2, ""),
    "pandas' index of texts": (",a\nann,1\nbob,3\n", ["Unnamed: 0", "a"], 2, ""),
    "pandas' index and numbers": (",0,1\n0,.5,.2\n1,.3,.4\n", ["Unnamed: 0", "0", "1"], 2, "header: false"),
    "R's row names": ('"a" "b"\n"1" 1 2\n"2" 3 4\n', ["Unnamed: 0", "a", "b"], 2, ""),
    "a last comma": ("a,b,\n1,2,\n3,4,\n", ["a", "b", "Unnamed: 2"], 2, ""),
    "savetxt's header": ("# a,b\n1,2\n3,4\n", ["a", "b"], 2, "comment above"),
    "a remark": ("# by me, today\na,b\n1,2\n", ["a", "b"], 1, ""),
    "comments between": ("a,b\n1,2\n# no\n3,4\n", ["a", "b"], 2, "1 lines"),
    "a wrong entry": ("a,b\n1,old\n3,4\n", ["a", "b"], 2, ""),
    "quotes": ('"weight; kg","length\t(m)\nof arm"\n1,2\n3,4\n', ["weight; kg", "length (m) of arm"], 2, ""),
    "commas in texts": ("a;b\nx, y;1\nz;2\n", ["a", "b"], 2, ""),
    "bars in texts": ("id,title,genre\n1,A B,x|y\n2,C,z|w\n", ["id", "title", "genre"], 2, ""),
    "a tab before a text": ('18.0   8   3.\t"chevrolet x"\n15.0   8   ?\t"vw"\n', ["0", "1", "2", "3"], 2, "header: true"),
    "times": ("when,v\n2024-01-01 10:00,3.5\n2024-01-02 11:00,4\n", ["when", "v"], 2, ""),
    "Excel's first line": ("sep=;\na;b\n1;2\n", ["a", "b"], 1, ""),
    "one column": ("a:b\n1:2\n", ["a:b"], 1, "header: false"),
    "MovieLens": ("1::1193::5\n1::661::3\n", ["0", "1", "2"], 2, "header: true"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "names", "rows", "said"), GUESSES.values(), ids=GUESSES)
def test_the_header_and_the_separator_are_recognised_and_a_doubt_is_said(tmp_path, content, names, rows, said):
    path = written(tmp_path / "my.csv", content)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        table = read_table(path)
    assert (list(table.columns), len(table.columns[names[0]])) == (names, rows)
    assert len(heard) == bool(said)
    assert all(said in str(each.message) and each.category is TableWarning for each in heard)
    assert table.unnamed == {name for name in names if name.startswith("Unnamed")}


def test_a_header_of_numbers_is_possible_and_belongs_to_text_tables_alone(tmp_path):
    path = written(tmp_path / "my.csv", "2010,2011\n1,2\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for is not said
        assert np.array_equal(read_table(path, header=False).numbers(["0", "1"]), [[2010, 2011], [1, 2]])
        table = read_table(path, header=True)
    assert table.find("2011") == table.find(2011) == table.find(1) == ["2011"]
    np.savez(tmp_path / "my.npz", X=VALUES)
    with pytest.raises(ValueError, match="header = true: only a text table"):
        read_table(tmp_path / "my.npz", header=True)


def test_columns_of_one_name_cannot_be_used_and_others_can(tmp_path):
    table = read_table(written(tmp_path / "my.csv", "age,bmi, age\n1,2,3\n"))
    assert table.numbers(table.find("bmi")) == [[2]]
    for use in (lambda: table.find("age"), lambda: table.find(2), lambda: table.numbers(list(table.columns))):
        with pytest.raises(ValueError, match=r'columns 0 and 2 \(from 0\) are both called "age"'):
            use()


def test_a_parquet_table_reads_back_exactly(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "my.parquet"
    columns = dict(zip(NAMES, VALUES.T, strict=True)) | {"whole": [1, 2, 3, 4], "yes": [True, False, True, True]}
    parquet.write_table(pyarrow.table(columns), path)
    assert list(read_table(path).columns) == [*NAMES, "whole", "yes"]
    expected = np.column_stack([VALUES, [1, 2, 3, 4], [1, 0, 1, 1]])
    assert np.array_equal(all_numbers(path), expected)


def test_row_labels_that_pandas_stored_are_no_column(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = tmp_path / "my.parquet"
    pandas.DataFrame(VALUES, columns=NAMES, index=[4, 7, 1, 2]).to_parquet(path)
    assert list(read_table(path).columns) == NAMES


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8, np.uint16, bool])
def test_an_npz_archive_reads_back_exactly(tmp_path, dtype):
    path = tmp_path / "my.npz"
    x, y = np.arange(8).reshape(4, 2).astype(dtype), np.arange(4).astype(dtype)
    np.savez(path, X=x, y=y)
    table = read_table(path)
    assert list(table.columns) == ["X[0]", "X[1]", "y"]
    assert np.array_equal(table.numbers(table.find("X")), x.astype(float))
    assert np.array_equal(table.numbers(["y"])[:, 0], y.astype(float))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_a_pt_file_reads_back_exactly(tmp_path, dtype):
    path = tmp_path / "my.pt"
    x, y = torch.arange(8).reshape(4, 2).to(dtype), torch.arange(4).to(dtype)
    torch.save({"X": x, "y": y}, path)
    table = read_table(path)
    assert np.array_equal(table.numbers(table.find("X")), x.double().numpy())
    assert np.array_equal(table.numbers(["y"])[:, 0], y.double().numpy())


def test_tensors_with_a_gradient_or_sparse_are_numbers_too(tmp_path):
    path = tmp_path / "my.pt"
    x = torch.eye(3, 2)
    torch.save({"X": x.to_sparse(), "y": torch.nn.Parameter(torch.ones(3))}, path)
    table = read_table(path)
    assert np.array_equal(table.numbers([*table.find("X"), "y"]), np.column_stack([x, np.ones(3)]))


# Asking for columns ---------------------------------------------------------------------------------------------------


def test_only_the_columns_asked_for_must_hold_numbers(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("name,age,bmi\nAnna,1,\nBert,2,x\n")
    assert np.array_equal(read_table(path).numbers(["age"]), [[1], [2]])


def test_arrays_that_are_not_asked_for_may_be_anything(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, X=VALUES, y=VALUES[:, 0], names=np.array(NAMES), cube=np.zeros((1, 2, 3)), scalar=np.float64(3))
    table = read_table(path)
    assert np.array_equal(table.numbers(table.find("X")), VALUES)


def test_numbers_count_columns_and_texts_are_names():
    table = Table("t", {"1": [0.0], "7": [1.0], "b": [2.0]})
    assert table.find("b") == table.find(2) == table.find(-1) == ["b"]
    assert table.find("1") == table.find('"1"') == table.find(0) == ["1"]
    assert table.find(-1, among=["7"]) == ["7"]
    assert table.find(7) == ["7"]  # beyond all columns: as a config reads "7"
    with pytest.warns(TableWarning, match=r'target: 1 counts columns and is "7"'):
        assert table.find(1, argument="target") == ["7"]
    with pytest.raises(ValueError, match="features: a column is given by its name or its number, got True"):
        table.find(True, argument="features")


def test_a_matrix_is_found_whole_or_by_column(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, X=VALUES, y=VALUES[:, 0])
    table = read_table(path)
    assert table.find("X") == ["X[0]", "X[1]", "X[2]"]
    assert table.find("X[1]") == ["X[1]"]


@pytest.mark.parametrize("key", ["weight", 3, -4])
def test_an_unknown_column_lists_the_known_ones(tmp_path, key):
    path = tmp_path / "my.csv"
    path.write_text(text())
    with pytest.raises(ValueError, match=rf'my.csv has no column "{key}"; it has age, bmi, outcome$'):
        read_table(path).find(key)


def test_of_many_known_columns_some_are_listed():
    with pytest.raises(ValueError, match=r'no column "x"; it has 0, 1, .*, 19, \.\.\. \(65 in all\)$'):
        Table("t", {str(i): [0.0] for i in range(65)}).find("x")


def test_an_unknown_array_lists_the_known_ones(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, data=VALUES, target=VALUES[:, 0])
    with pytest.raises(ValueError, match=r'my.npz has no array "X"; it has data, target$'):
        read_table(path).find("X")


# Entries that are no numbers ------------------------------------------------------------------------------------------


HOLE = r" (a hole: fill it in, or leave out its row or its column)"
LOCAL = ", with a decimal point and without a thousands separator, as 1234.5"


@pytest.mark.parametrize(
    ("entry", "said", "advice"),
    [
        *((hole, "empty", HOLE) for hole in ("", "  ")),
        *((hole, repr(hole), HOLE) for hole in ("NA", "N/A", "?", "nan", "null", "-")),
        *((entry, repr(entry), "") for entry in ("old", "inf", "-Infinity", "1e999", "2024_01", "True")),
        *((entry, repr(entry), LOCAL) for entry in ("1,5", "1,234.5", "1.234,5", "1'234", "-1 234,5", ",5")),
        ("x" * 100, "'" + "x" * 36 + "...", ""),
    ],
)  # fmt: skip
def test_an_entry_that_is_no_number_is_named_by_line_row_and_column(tmp_path, entry, said, advice):
    path = written(tmp_path / "my.csv", f"age;bmi\n1;2\n{entry};4\n")
    message = refusal(path)
    assert message == f'{path}, line 3 (row 2), column "age": {said}: every entry must be a finite number{advice}'
    assert np.array_equal(read_table(path).numbers(["bmi"]), [[2], [4]])


def test_lines_are_those_of_the_file_even_after_blank_lines_and_quoted_breaks(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text('\n"age\nin years",bmi\n\n1,2\n  \n3,old\n')
    assert 'line 7 (row 2), column "bmi"' in refusal(path)


def test_the_first_bad_row_is_the_one_named(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("a,b\n1,2\n3,\n,6\n")
    assert 'line 3 (row 2), column "b"' in refusal(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", ["npz", "pt", "parquet"])
def test_a_number_that_is_not_finite_is_named_in_every_format(tmp_path, bad, suffix):
    path = tmp_path / f"my.{suffix}"
    x = VALUES.copy()
    x[2, 1] = bad
    if suffix == "npz":
        np.savez(path, X=x)
    elif suffix == "pt":
        torch.save({"X": torch.from_numpy(x)}, path)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({f"X[{j}]": x[:, j] for j in range(3)}), path)
    advice = HOLE if np.isnan(bad) else ""
    assert refusal(path) == f'{path}, row 3, column "X[1]": {bad}: every entry must be a finite number{advice}'


@pytest.mark.parametrize(
    ("cells", "said"), [([1, None, 3], "empty"), ([1.5, None, 3.0], "empty"), (["1", "old", "3"], "'old'")]
)
def test_holes_and_texts_in_parquet_are_named(tmp_path, cells, said):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "my.parquet"
    parquet.write_table(pyarrow.table({"age": cells}), path)
    assert f'row 2, column "age": {said}' in refusal(path)


@pytest.mark.parametrize(
    "array", [["a", "b"], np.array([1 + 2j, 3]), np.array(["2024-01-01"], "M8[D]"), np.array([1], "M8[ns]")]
)
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path, array):
    np.savez(tmp_path / "my.npz", y=array)
    assert 'row 1, column "y"' in refusal(tmp_path / "my.npz")


def test_a_complex_tensor_is_refused(tmp_path):
    path = tmp_path / "my.pt"
    torch.save({"X": torch.ones(3, 2), "y": torch.ones(3, dtype=torch.complex64)}, path)
    with pytest.raises(ValueError, match=r'my.pt, array "y": must be an array of plain numbers'):
        read_table(path).find("y")


# Files that are no tables ---------------------------------------------------------------------------------------------


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"my\.csv: there is no such file") as caught:
        read_table("my.csv")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "npz", "pt"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_is_called_so(tmp_path, suffix, content):
    path = tmp_path / f"my.{suffix}"
    path.write_bytes(content)
    assert "the file is empty" in refusal(path)


def test_a_byte_order_mark_alone_is_an_empty_file(tmp_path):
    assert "the file is empty" in refusal(written(tmp_path / "my.csv", "\ufeff"))


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "my.csv.gz"
    for content in (b"a,b\n1,2\n", gzip.compress(text().encode())[:-9], gzip.compress(b"a,b\n1,2")[:-4] + b"1234"):
        path.write_bytes(content)
        assert "not a whole .gz file" in refusal(path)


@pytest.mark.parametrize("suffix", ["parquet", "npz", "pt"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"my.{suffix}"
    if suffix == "npz":
        np.savez(path, X=VALUES)
    elif suffix == "pt":
        torch.save({"X": torch.from_numpy(VALUES)}, path)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"a": VALUES[:, 0]}), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"a,b\n1,2\n", whole[-40:]):
        path.write_bytes(content)
        assert "whole" in refusal(path)


def test_an_array_with_flipped_bits_is_refused(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, X=VALUES)
    content = bytearray(path.read_bytes())
    content[content.index(VALUES.tobytes()) + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'my.npz, array "X": .*undamaged'):
        read_table(path).find("X")


@pytest.mark.parametrize("suffix", ["json", "pkl", "npy", ""])
def test_an_unsupported_suffix_lists_the_supported_ones(tmp_path, suffix):
    path = tmp_path / ("my." + suffix if suffix else "my")
    path.write_text("{}")
    message = refusal(path)
    assert "must be one of .txt, .data, .dat, .csv, .tsv, .parquet, .npz, .pt" in message
    assert (f"got '.{suffix}'" if suffix else "got 'none'") in message


@pytest.mark.parametrize(("row", "entries"), [("1", 1), ("1,2,3", 3), ("1,2,", 3), ('"1",2,3', 3), ("1,5,2", 3)])
def test_a_ragged_row_is_named(tmp_path, row, entries):
    message = refusal(written(tmp_path / "my.csv", f"a,b\n1,2\n{row}\n"))
    assert f"line 3 (row 2): {entries} entries: every row must have 2, as line 1 has" in message
    assert ("decimal comma" in message) == (entries > 2)


def test_rows_that_are_too_short_and_too_long_do_not_make_up_for_each_other(tmp_path):
    assert "line 4 (row 3): 4 entries" in refusal(written(tmp_path / "my.csv", "a,b,c\n1,2,3\n1,2,3\n4,5,6,7\n8,9\n"))


def test_a_header_without_rows_is_refused(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text("age,bmi\n")
    assert "has no rows" in refusal(path)


def test_a_quote_that_is_never_closed_is_refused(tmp_path):
    path = tmp_path / "my.csv"
    path.write_text('a,b\n1,2\n"3,4\n5,6\n')
    assert "line 3: not a row of a table" in refusal(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_text_in_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "my.csv"
    path.write_bytes("größe,y\n1,2\n".encode(encoding))
    assert "line 1: not UTF-8" in refusal(path)


def test_columns_of_different_lengths_are_named(tmp_path):
    path = tmp_path / "my.npz"
    np.savez(path, X=np.ones((5, 2)), y=np.ones(4))
    assert '"X[0]" has 5 rows and "y" has 4' in refusal(path)


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_an_array_that_is_no_column_or_matrix_is_refused(tmp_path, shape, suffix):
    path = tmp_path / f"my.{suffix}"
    if suffix == "npz":
        np.savez(path, X=np.ones(shape))
    else:
        torch.save({"X": torch.ones(shape)}, path)
    with pytest.raises(ValueError) as caught:
        read_table(path).find("X")
    assert str(caught.value) == f'{path}, array "X": must be of shape (N,) or (N, columns), got {shape}'


def test_a_pt_file_of_one_tensor_says_what_it_must_be(tmp_path):
    path = tmp_path / "my.pt"
    torch.save(torch.ones(3, 2), path)
    assert "torch.save({'X': X, 'y': y}, path)" in refusal(path)


def test_a_missing_pyarrow_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "my.parquet"
    path.write_bytes(b"PAR1")
    assert "pip install 'dlnlab[parquet]'" in refusal(path)


# Nothing in a file is run ---------------------------------------------------------------------------------------------


def test_the_malicious_pickle_of_these_tests_does_run_where_pickles_are_allowed(tmp_path):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()


def test_an_object_array_in_an_npz_is_refused_and_never_run(tmp_path):
    path, mark = tmp_path / "my.npz", tmp_path / "mark"
    np.savez(path, X=np.array([[Malicious(mark)]], dtype=object), y=np.ones(1))
    with pytest.raises(ValueError, match=r'my.npz, array "X": .*Python objects are never loaded'):
        read_table(path).find("X")
    assert np.array_equal(read_table(path).numbers(["y"]), [[1.0]])
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["csv", "parquet", "npz", "pt"])
def test_a_bare_pickle_is_refused_and_never_run(tmp_path, suffix):
    path, mark = tmp_path / f"my.{suffix}", tmp_path / "mark"
    path.write_bytes(pickle.dumps({"X": Malicious(mark)}))
    refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_a_pt_file_is_refused_and_never_run(tmp_path, whole, zipped, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, mark = tmp_path / "my.pt", tmp_path / "mark"
    content = Malicious(mark) if whole else {"X": torch.ones(3, 2), "y": Malicious(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "Python objects are never loaded" in refusal(path)
    assert not mark.exists()
