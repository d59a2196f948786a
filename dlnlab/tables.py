"""Tables of numbers from a person's files: text (.csv and its like), .parquet, .npz and .pt.

Nothing in a file is ever run: pickled Python objects are refused in every format. A table is read whole, but only the
columns that are asked for must hold numbers, so that a file may carry names and dates beside them.
"""

import gzip
import io
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dlnlab.arrays import dense
from dlnlab.delimited import SEPARATORS, Delimited, advice, is_hole, is_local, labels, number

_TEXT = (".txt", ".data", ".dat", ".csv", ".tsv")
_SHOWN = 20
"""Names that a message lists before it stops."""


class TableWarning(Warning):
    """A guess about a table that may be wrong."""


@dataclass(frozen=True)
class Table:
    """Named columns of equal meaning in every format.

    In a table of text or parquet each column has a name; without a header the columns are called `0`, `1`, ... In an
    archive (.npz, .pt) a vector is a column of its own name and a matrix `X` is the columns `X[0]`, `X[1]`, ...

    Args:
        source: What messages call it, usually the path.
        columns: The cells of each column as they were found: numbers, texts, or None for a hole.
        arrays: In an archive, the columns of each array.
        refused: Arrays of an archive that cannot be columns, or columns with one name, and why.
        unnamed: Columns whose header is empty: row labels, as pandas and R write them, or nothing.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    arrays: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unnamed: frozenset[str] = frozenset()

    @property
    def is_archive(self) -> bool:
        """Whether the columns come from named arrays."""
        return bool(self.arrays or self.refused)

    def find(self, key: str | int, among: Sequence[str] | None = None, argument: str = "") -> list[str]:
        """The names of the columns that `key` means: several where it names a matrix of an archive.

        Args:
            key: A text is the name of a column or array, in quotes or not; a number counts columns from 0, or with a minus
                from the end. A number beyond all columns is a name too: a config reads digits as a number.
            among: What a number counts; all columns by default.
            argument: Where `key` was given, for messages.

        Returns:
            Names of columns.

        Raises:
            ValueError: If there is no such column, or it cannot be used.
        """
        about, kind = f"{argument}: " if argument else "", "array" if self.is_archive else "column"
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise ValueError(f"{about}a {kind} is given by its name or its number, got {key!r}")
        counted = list(self.columns if among is None else among)
        found = self._called(str(key))
        if isinstance(key, int) and -len(counted) <= key < len(counted):
            if found not in (None, [counted[key]]):
                warnings.warn(
                    f'{about}{key} counts columns and is "{counted[key]}" of {self.source}; to have the {kind} that is '
                    f"called {key}, give its name in quotes of its own, as '\"{key}\"'",
                    TableWarning,
                    stacklevel=2,
                )
            found = [counted[key]]
        if found is None and isinstance(key, str) and len(key) > 2 and key[0] == key[-1] == '"':
            found = self._called(key[1:-1])
        if found is None:
            known = [*self.arrays, *self.refused] if self.is_archive else list(self.columns)
            more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
            raise ValueError(f'{about}{self.source} has no {kind} "{key}"; it has {", ".join(known[:_SHOWN])}{more}')
        self._refuse(found)
        return found

    def _called(self, name: str) -> list[str] | None:
        return self.arrays.get(name, [name] if name in self.columns or name in self.refused else None)

    def _refuse(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.refused:
                array = f', array "{name}": ' if self.is_archive else ": "
                raise ValueError(f"{self.source}{array}{self.refused[name]}")

    def place(self, row: int) -> str:
        """Where a row is, for messages: its line in a text file, and its number counted from 1."""
        if isinstance(self.columns, Delimited):
            return f"line {self.columns.lines[row]} (row {row + 1})"
        return f"row {row + 1}"

    def undivided(self) -> str:
        """What to say of a text table of a single column: the separators that were tried."""
        if len(self.columns) > 1 or not isinstance(self.columns, Delimited):
            return ""
        return f" (it was read as one column: none of {' '.join(SEPARATORS.values())} divides its rows)"

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """Some columns as numbers.

        Args:
            names: Names of C columns.

        Returns:
            float64 of shape (N, C), all finite.

        Raises:
            ValueError: If an entry is no finite number, naming its line, row (counted from 1) and column; if the
                columns differ in length or have no rows.
        """
        self._refuse(names)
        columns = self.columns.read(names, float) if isinstance(self.columns, Delimited) else None
        if columns is None or not all(np.isfinite(column).all() for column in columns):
            columns = [_floats(self.columns[name]) for name in names]
        lengths = dict(zip(names, map(len, columns), strict=True))
        short, long = min(lengths, key=lengths.get), max(lengths, key=lengths.get)
        if lengths[short] != lengths[long]:
            raise ValueError(
                f'{self.source}: "{long}" has {lengths[long]} rows and "{short}" has {lengths[short]}: they must have '
                "the same"
            )
        if not lengths[long]:
            raise ValueError(f"{self.source} has no rows")
        table = np.stack(columns, axis=1)
        bad = np.argwhere(~np.isfinite(table))
        if len(bad):
            row, column = bad[0]
            cell = self.columns[names[column]][row]
            raise ValueError(
                f'{self.source}, {self.place(row)}, column "{names[column]}": {_say(cell)}: every entry must be a finite '
                f"number{advice(cell)}"
            )
        return table

    def names_in(self, columns: Sequence[str]) -> list[tuple[np.ndarray, list[Any]]]:
        """The different names in some columns, numbered in the order of their first appearance.

        Args:
            columns: Names of columns.

        Returns:
            For each column the number of each row's name, int64 (N,), and the names: texts, or whole numbers.

        Raises:
            ValueError: If an entry is a hole, or a number with a fraction.
        """
        self._refuse(columns)
        found = self.columns.read(columns, str) if isinstance(self.columns, Delimited) else None
        return [
            self._numbered(name, cells)
            for name, cells in zip(columns, found or map(self.columns.get, columns), strict=True)
        ]

    def _numbered(self, name: str, cells: Sequence[Any]) -> tuple[np.ndarray, list[Any]]:
        cells = (
            np.asarray(cells, dtype=object) if isinstance(cells, np.ndarray) else np.fromiter(cells, object, len(cells))
        )
        try:
            first, found = pd.factorize(cells, use_na_sentinel=False)
        except TypeError:
            raise ValueError(f'{self.source}, column "{name}": names must be texts or whole numbers') from None
        stripped = [cell.strip() if isinstance(cell, str) else cell for cell in found.tolist()]
        for i, cell in enumerate(stripped):
            if not (is_hole(cell) or _has_fraction(cell)):
                continue
            where = f'{self.source}, {self.place(int((first == i).argmax()))}, column "{name}": {_say(cell)}'
            if is_hole(cell):
                raise ValueError(f"{where}: every entry must have a name")
            raise ValueError(
                f"{where}: the matrix's rows and columns are named by texts or whole numbers. A matrix written out whole "
                "must be turned into one line for each entry: row, column, value"
            )
        again, names = pd.factorize(np.fromiter(stripped, object, len(stripped)))
        return again[first], names.tolist()


def read_table(path: str | Path, header: bool | None = None) -> Table:
    """Read a table; the format is told by the suffix, `.gz` after it is unpacked.

    - `.csv`, `.tsv`, `.txt`, `.data`, `.dat`: UTF-8 text, numbers with a decimal point. The cells are separated by tabs,
      `;`, `,`, `|`, `::` or spaces, whichever divides the first rows evenly. Lines that begin with `#` are comments.
    - `.parquet`: needs pyarrow.
    - `.npz`: numpy's archive of named arrays; `.pt`: a dictionary of tensors, as saved by torch.save.

    Args:
        path: The file; `~` is the home folder.
        header: Whether the first row of a text table holds names. None guesses: it is data if each of its cells could
            stand further down in its column, numbers over numbers; a guess that may be wrong is said in a `TableWarning`.

    Returns:
        The table; its entries are checked when they are asked for.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not of its format, or the format is not one of these.
    """
    source, path = str(path), Path(path).expanduser()
    name = path.name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in _READERS and suffix not in _TEXT:
        known = ", ".join((*_TEXT, *_READERS))
        raise ValueError(
            f"{source}: the suffix must be one of {known}, or one of these and .gz, got {suffix or 'none'!r}"
        )
    if header is not None and suffix not in _TEXT:
        raise ValueError(f"header = {str(header).lower()}: only a text table has a header, {source} is {suffix}")
    if not path.exists():
        raise FileNotFoundError(f"{source}: there is no such file (looked for in {path.absolute().parent})")
    content = path.read_bytes()
    if packed:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise ValueError(f"{source}: not a whole .gz file") from None
    if not content.strip():
        raise ValueError(f"{source}: the file is empty")
    return _read_text(source, content, header) if suffix in _TEXT else _READERS[suffix](source, content)


def _read_text(source: str, content: bytes, header: bool | None) -> Table:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{source}, line {line}: not UTF-8: save the table as UTF-8 text") from None
    columns = Delimited(source, text, header)
    for note in columns.notes:
        warnings.warn(note, TableWarning, stacklevel=3)
    return Table(source, columns, refused=columns.repeated, unnamed=columns.unnamed)


def _read_parquet(source: str, content: bytes) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{source}: reading .parquet needs pyarrow: pip install 'dlnlab[parquet]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source}: not a whole .parquet file: {str(error).splitlines()[0]}") from None
    names, unnamed, repeated = labels(table.column_names)
    columns = {}
    for name, column in zip(names, table.columns, strict=True):
        if name.startswith("__index_level_"):  # pandas' row labels, which it takes off itself when it reads
            continue
        # A hole in a column of whole numbers would become NaN in numpy; as a list it stays a hole, and is called so.
        plain = pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)
        columns[name] = column.to_numpy() if plain and not column.null_count else column.to_pylist()
    return Table(source, columns, refused=repeated, unnamed=unnamed)


def _read_npz(source: str, content: bytes) -> Table:
    def plain(archive: Any, name: str) -> Any:
        try:
            return archive[name]
        except Exception:  # numpy, zipfile and zlib each have their own for damage and for pickles
            return None

    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            names = list(archive.files)
            arrays = {name: plain(archive, name) for name in names}
    except Exception:  # the same, and a lone array is no archive
        raise ValueError(
            f"{source}: must be a whole archive of arrays, saved with numpy.savez(path, X=X, y=y); Python objects are "
            "never loaded"
        ) from None
    if len(set(names)) < len(names):
        raise ValueError(f"{source}: two arrays have one name: names must differ")
    return _archive(source, arrays)


def _read_pt(source: str, content: bytes) -> Table:
    def plain(tensor: Any) -> np.ndarray | None:
        try:
            return dense("tensor", tensor)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None  # not a tensor, or of a kind that holds no plain numbers

    try:
        arrays = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # what torch raises for contents it refuses differs from version to version
        arrays = None
    if not isinstance(arrays, dict) or not arrays:
        raise ValueError(
            f"{source}: must be a whole file of plain tensors, saved with torch.save({{'X': X, 'y': y}}, path); Python "
            "objects are never loaded"
        )
    return _archive(source, {str(name): plain(tensor) for name, tensor in arrays.items()})


def _archive(source: str, found: dict[str, np.ndarray | None]) -> Table:
    columns, arrays, refused = {}, {}, {}
    for name, array in found.items():
        if not isinstance(array, np.ndarray):
            refused[name] = "must be an array of plain numbers, undamaged; Python objects are never loaded"
        elif array.ndim not in (1, 2):
            refused[name] = f"must be of shape (N,) or (N, columns), got {array.shape}"
        else:
            parts = {name: array} if array.ndim == 1 else {f"{name}[{j}]": part for j, part in enumerate(array.T)}
            arrays[name] = list(parts)
            columns |= parts
    return Table(source, columns, arrays=arrays, refused=refused)


_READERS: dict[str, Callable[[str, bytes], Table]] = {
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".pt": _read_pt,
}


def _floats(cells: Sequence[Any]) -> np.ndarray:
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind in "biuf":
            with np.errstate(over="ignore"):  # what is too large for float64 becomes infinite, and is refused
                return cells.astype(np.float64)
        if cells.dtype.kind in "cmMV":  # of these, dates in nanoseconds would pass for numbers
            return np.full(len(cells), np.nan)
        cells = cells.tolist()
    return np.array([number(cell) for cell in cells])


def _has_fraction(cell: Any) -> bool:
    value = number(cell)
    return is_local(cell) or (value == value and not value.is_integer())


def _say(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return "empty"
    text = repr(cell) if isinstance(cell, str) else str(cell)
    return text if len(text) <= 40 else text[:37] + "..."
