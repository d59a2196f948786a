"""Tables of numbers from a person's files: .csv, .tsv, .parquet, .npz and .pt.

Nothing in a file is ever run: pickled Python objects are refused in every format. A table is read whole, but only the
columns that are asked for must hold numbers, so that a file may carry names and dates beside them.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

_DELIMITERS = "\t;,"
_SHOWN = 20
"""Names that a message lists before it stops."""


@dataclass(frozen=True)
class Table:
    """Named columns of equal meaning in every format.

    In a table of text or parquet each column has a name; without a header the columns are called `0`, `1`, ... In an
    archive (.npz, .pt) a vector is a column of its own name and a matrix `X` is the columns `X[0]`, `X[1]`, ...

    Args:
        source: What messages call it, usually the path.
        columns: The cells of each column as they were found: numbers, texts, or None for a hole.
        lines: Where each row begins in a text file, counted from 1.
        arrays: In an archive, the columns of each array.
        refused: Arrays of an archive that cannot be columns, and why.
    """

    source: str
    columns: dict[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    arrays: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def is_archive(self) -> bool:
        """Whether the columns come from named arrays."""
        return bool(self.arrays or self.refused)

    def find(self, key: str | int, among: Iterable[str] | None = None) -> list[str]:
        """The names of the columns that `key` means: several where it names a matrix of an archive.

        Args:
            key: The name of a column or array; where nothing is called so, a number counts columns from 0, or with a
                minus from the end.
            among: What a number counts; all columns by default.

        Returns:
            Names of columns.

        Raises:
            ValueError: If there is no such column, or an array that cannot be columns.
        """
        name = str(key)
        if name in self.refused:
            raise ValueError(f'{self.source}, array "{name}": {self.refused[name]}')
        if name in self.arrays:
            return self.arrays[name]
        if name in self.columns:
            return [name]
        counted = list(self.columns if among is None else among)
        if isinstance(key, int) and -len(counted) <= key < len(counted):
            return [counted[key]]
        kind = "array" if self.is_archive else "column"
        known = [*self.arrays, *self.refused] if self.is_archive else list(self.columns)
        more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
        raise ValueError(f'{self.source} has no {kind} "{name}"; it has {", ".join(known[:_SHOWN])}{more}')

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
        lengths = {name: len(self.columns[name]) for name in names}
        short, long = min(lengths, key=lengths.get), max(lengths, key=lengths.get)
        if lengths[short] != lengths[long]:
            raise ValueError(
                f'{self.source}: "{long}" has {lengths[long]} rows and "{short}" has {lengths[short]}: they must have '
                "the same"
            )
        if not lengths[long]:
            raise ValueError(f"{self.source} has no rows")
        table = np.stack([_floats(self.columns[name]) for name in names], axis=1)
        bad = np.argwhere(~np.isfinite(table))
        if len(bad):
            row, column = bad[0]
            line = f"line {self.lines[row]} " if self.lines is not None else ""
            place = f"{line}(row {row + 1})" if line else f"row {row + 1}"
            found = _say(self.columns[names[column]][row])
            hint = ", with a decimal point" if "," in found else ""
            raise ValueError(
                f'{self.source}, {place}, column "{names[column]}": {found}: every entry must be a finite number{hint}'
            )
        return table


def read_table(path: str | Path) -> Table:
    """Read a table; the format is told by the suffix.

    - `.csv`, `.tsv`: UTF-8, separated by tabs, `;` or `,` (the first of these that divides the first row), numbers with
      a decimal point. The first row is a header if any of its cells is no number: a header of numbers alone is data.
    - `.parquet`: needs pyarrow.
    - `.npz`: numpy's archive of named arrays; `.pt`: a dictionary of tensors, as saved by torch.save.

    Args:
        path: The file; `~` is the home folder.

    Returns:
        The table; its entries are checked when they are asked for.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not of its format, or the format is not one of these.
    """
    source, path = str(path), Path(path).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{source}: the suffix must be one of {', '.join(_READERS)}, got {path.suffix or 'none'!r}")
    if not path.exists():
        raise FileNotFoundError(f"{source}: there is no such file (looked for in {path.absolute().parent})")
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{source}: the file is empty")
    return reader(source, content)


def _read_text(source: str, content: bytes) -> Table:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{source}, line {line}: not UTF-8: save the table as UTF-8 text") from None
    delimiter = next((each for each in _DELIMITERS if len(_first_row(text, each)) > 1), ",")
    rows, lines, before = [], [], 0
    # strict, for otherwise a quote that is not closed would swallow the rest of the file into one cell
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                rows.append(row)
                lines.append(before + 1)
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{source}, line {before + 1}: not a row of a table: {error}") from None
    if not rows:
        raise ValueError(f"{source}: the file is empty")
    first = [" ".join(cell.split()) for cell in rows[0]]
    has_header = any(math.isnan(_float(cell)) and cell.lower() not in ("nan", "+nan", "-nan") for cell in first)
    names = first if has_header else [str(number) for number in range(len(first))]
    if "" in names:
        raise ValueError(
            f"{source}, line {lines[0]}: the first row's entry {names.index('')} (from 0) is empty: every column must "
            "have a name or a number there (a row index: write the table without it)"
        )
    _check_names(source, names)
    start = int(has_header)
    for row, line in zip(rows[start:], lines[start:], strict=True):
        if len(row) != len(names):
            number = lines.index(line) - start + 1
            raise ValueError(
                f"{source}, line {line} (row {number}): {len(row)} entries: every row must have {len(names)}, as line "
                f"{lines[0]} has"
            )
    columns = zip(*rows[start:], strict=True) if rows[start:] else [()] * len(names)
    return Table(source, dict(zip(names, columns, strict=True)), lines=lines[start:])


def _first_row(text: str, delimiter: str) -> list[str]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return next((row for row in reader if "".join(row).strip()), [])
    except csv.Error:  # a quote that closes before something else: this is not the delimiter
        return []


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
    _check_names(source, table.column_names)
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name.startswith("__index_level_"):  # pandas' row labels, which it takes off itself when it reads
            continue
        # A hole in a column of whole numbers would become NaN in numpy; as a list it stays a hole, and is called so.
        plain = pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)
        columns[name] = column.to_numpy() if plain and not column.null_count else column.to_pylist()
    return Table(source, columns)


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
    _check_names(source, names)
    return _archive(source, arrays)


def _read_pt(source: str, content: bytes) -> Table:
    def plain(tensor: Any) -> np.ndarray | None:
        try:
            dense = tensor.detach().to_dense()
            return None if dense.is_complex() else dense.to(torch.float64).numpy()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
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
    ".csv": _read_text,
    ".tsv": _read_text,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".pt": _read_pt,
}


def _check_names(source: str, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(
                f'{source}: columns {names.index(name)} and {i} (from 0) are both called "{name}": names must differ'
            )


def _float(cell: Any) -> float:
    """The number in a cell, NaN if there is none."""
    try:
        # Python reads "2024_01" as a number; no table means it so.
        return math.nan if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _floats(cells: Sequence[Any]) -> np.ndarray:
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind in "biuf":
            return cells.astype(np.float64)
        cells = cells.tolist()
    return np.array([_float(cell) for cell in cells])


def _say(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return "empty"
    text = repr(cell) if isinstance(cell, str) else str(cell)
    return text if len(text) <= 40 else text[:37] + "..."
