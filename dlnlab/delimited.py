"""Tables in text files: which separator divides the cells, whether the first row is a header, and what the cells hold."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

SEPARATORS = {"\t": "tab", ";": ";", ",": ",", "|": "|", "::": "::", " ": "spaces"}
"""Separators that are tried, with the names that messages give them; of equally good ones the first is taken."""
HOLES = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "+nan", "-nan", "null", "none", "?", "-", "."})
"""Cells that stand for a missing value, in lower case."""
_SAMPLE = 100
"""Rows that the separator and the header are recognised from."""
_COMMENT = re.compile(r"^[^\S\n]*#", re.MULTILINE)
_LOCAL = re.compile(r"[-+]?(\d{1,3}([,.' ’\u00a0\u202f]\d{3})+([.,]\d+)?|\d*,\d+)")
"""A number with separated thousands or a decimal comma."""
# The float parser that always rounds to nearest, as Python does: the only one since pandas 3.1, which deprecates the name.
_EXACT = {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}


class Delimited(Mapping[str, Sequence[str]]):
    """The columns of a text table.

    A table of plain cells is read by pandas. The row-by-row reader handles what pandas reads too leniently (quotes,
    comments between the rows) and names the line of whatever is wrong.

    Args:
        source: What messages call the file.
        text: Its contents. Lines that begin with `#` are comments.
        header: Whether the first row holds the names of the columns; None guesses it.

    Raises:
        ValueError: If there is no row at all.

    Attributes:
        notes: What was guessed, one sentence each.
        unnamed: Columns without a name in the header, such as the row labels that pandas and R write.
        repeated: Columns that share a name with another, and the message that says so.
    """

    def __init__(self, source: str, text: str, header: bool | None = None) -> None:
        self.source, self.notes = source, []
        self._text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
        self.separator = _separator(self._text)
        rows, comment = self._beginning()
        if not rows:
            raise ValueError(f"{source}: the file is empty")
        self._first_line, first = rows[0]
        first = [" ".join(cell.split()) for cell in first]
        rest = [[cell.strip() for cell in row] for _, row in rows[1:]]
        if header is not False and self._lacks_a_name(first, rest):
            first = ["", *first]
        rest = [row for row in rest if len(row) == len(first)]
        has_header = self._guess(first, rest, comment) if header is None else header
        names = first if has_header else [str(place) for place in range(len(first))]
        if header is None and not has_header and self._named_by(comment, len(first)):
            names = comment
        self._skipped = int(has_header)
        self.names, self.unnamed, self.repeated = labels(names)
        self._places = {name: place for place, name in enumerate(self.names)}
        self._sample = rest if has_header else [first, *rest]
        count = len(_COMMENT.findall(self._body)) if "#" in self._body else 0
        if count:
            self.notes.append(f"{source}: {count} lines between the rows begin with # and were left out as comments")

    def _beginning(self) -> tuple[list[tuple[int, list[str]]], list[str]]:
        """The first rows, and the cells of the last comment above them."""
        rows, comment = [], []
        for line, row in _split(self.source, self._text, self.separator, comments=True):
            if not _is_comment(row):
                rows.append((line, row))
            elif not rows:
                row = [row[0].lstrip()[1:], *row[1:]]
                comment = [" ".join(cell.split()) for cell in (row if row[0] or self.separator != " " else row[1:])]
            if len(rows) > _SAMPLE:
                break
        return rows, comment

    def _lacks_a_name(self, first: list[str], rest: list[list[str]]) -> bool:
        """Whether the first row names all columns but one of row labels, as R writes it."""
        if not rest or any(len(row) != len(first) + 1 for row in rest) or any(map(_is_numeric, first)):
            return False
        # 0,5 in a table divided by commas is a decimal comma and not a row's number
        return _are_row_labels(rest) and (self.separator != "," or not _is_numeric(rest[0][0]))

    def _guess(self, first: list[str], rest: list[list[str]], comment: list[str]) -> bool:
        """Whether the first row is a header: it is data if each of its cells could stand further down in its column."""
        numeric = [_is_column_of_numbers(column) for column in zip(*rest, strict=True)] or [False] * len(first)
        given, holes = [_is_numeric(cell) for cell in first], [is_hole(cell) for cell in first]
        misfit = any(n and not (g or h) for n, g, h in zip(numeric, given, holes, strict=True))
        labelled = len(first) > 1 and not first[0] and _are_row_labels(rest)
        fits = any(given) or any(n and h for n, h in zip(numeric, holes, strict=True))
        shown = f"the first row ({_listed(first)}) was taken for"
        if misfit or labelled or not fits:
            if any(given) or not misfit:
                self._say(f"{shown} the names of the columns", "it is data", False)
            return True
        if self._named_by(comment, len(first)):
            self._say(f"the names of the columns ({_listed(comment)}) are from the comment above", "it has none", False)
        else:
            numbers = f"0 to {len(first) - 1}"
            self._say(f"{shown} data, so the columns are called {numbers}", "it holds their names", True)
        return False

    @staticmethod
    def _named_by(comment: list[str], width: int) -> bool:
        return len(comment) == width > 1 and not any(map(_is_numeric, comment))

    def _say(self, guess: str, otherwise: str, header: bool) -> None:
        remedy = f"if {otherwise}, give `header: {str(header).lower()}`"
        self.notes.append(f"{self.source}, line {self._first_line}: {guess}; {remedy}")

    def __getitem__(self, name: str) -> Sequence[str]:
        return self._cells[self._places[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def lines(self) -> list[int]:
        """Where each row begins, counted from 1."""
        return [line for line, _ in self._rows]

    @cached_property
    def _rows(self) -> list[tuple[int, list[str]]]:
        found = itertools.islice(_split(self.source, self._text, self.separator), self._skipped, None)
        rows, width = [], len(self.names)
        for line, row in found:
            if len(row) != width:
                split = self.separator == "," and len(row) > width
                hint = " (does a decimal comma or a thousands separator divide a cell? write 1234.5)" if split else ""
                raise ValueError(
                    f"{self.source}, line {line} (row {len(rows) + 1}): {len(row)} entries: every row must have {width}, "
                    f"as line {self._first_line} has{hint}"
                )
            rows.append((line, row))
        return rows

    @cached_property
    def _cells(self) -> list[Sequence[str]]:
        return list(zip(*(row for _, row in self._rows), strict=True)) or [()] * len(self.names)

    @cached_property
    def _body(self) -> str:
        """The text from the first row of data on."""
        rows = itertools.islice(_split(self.source, self._text, self.separator), self._skipped, None)
        line = next(rows, (None, []))[0]
        if line is None:
            return ""
        return self._text[_after_lines(self._text, line - 1) :]

    @cached_property
    def _is_plain(self) -> bool:
        comments = "#" in self._body and _COMMENT.search(self._body)
        return bool(self._body) and not comments and not any(mark in self._body for mark in '"\0\x1f')

    def read(self, names: Sequence[str], kind: type) -> list[np.ndarray] | None:
        """Some columns as pandas reads them.

        Args:
            names: Columns.
            kind: float, or str for the cells as they are written.

        Returns:
            An array of each column; None where a cell is no number or the row-by-row reader is needed.
        """
        places = [self._places[name] for name in names]
        if not self._is_plain:
            return None
        # pandas reads columns of True and False as numbers, Python does not
        if kind is float and any(math.isnan(number(row[i])) for row in self._sample for i in places):
            return None
        separator = {"::": "\x1f", " ": r"\s+"}.get(self.separator, self.separator)
        body = self._body.replace("::", "\x1f") if self.separator == "::" else self._body
        dtypes = dict.fromkeys(places, np.float64 if kind is float else object)
        try:
            frame = pd.read_csv(io.StringIO(body), header=None, sep=separator, dtype=dtypes, na_filter=False,
                                quoting=csv.QUOTE_NONE, low_memory=False, **_EXACT)  # fmt: skip
        except (ValueError, OverflowError):
            return None
        # pandas fills short rows up without a word
        cells = len(body.split()) if self.separator == " " else body.count(separator) + len(frame)
        if cells != len(frame) * len(self.names) or frame.shape[1] != len(self.names):
            return None
        return [frame[place].to_numpy() for place in places]


def labels(names: Sequence[str]) -> tuple[list[str], frozenset[str], dict[str, str]]:
    """Distinct keys for the columns of a header, those without a name, and those whose name is not theirs alone.

    Args:
        names: As they were found.

    Returns:
        The keys in order; the unnamed ones among them, called `Unnamed: 0` as pandas does; a message for each repeated one.
    """
    keys = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
    unnamed = frozenset(key for key in keys if re.fullmatch(r"Unnamed: \d+(\.\d+)*", key))
    repeated: dict[str, str] = {}
    for i, key in enumerate(keys):
        before = keys.index(key)
        if before < i:
            message = f'columns {before} and {i} (from 0) are both called "{key}": names must differ'
            keys[i] = f"{key} (column {i})"
            repeated |= {key: message, keys[i]: message}
    return keys, unnamed - repeated.keys(), repeated


def number(cell: Any) -> float:
    """The number in a cell as Python's `float` reads it, NaN if there is none."""
    try:
        # Python reads "2024_01" as a number; no table means it so.
        return math.nan if isinstance(cell, str) and "_" in cell else float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_hole(cell: Any) -> bool:
    """Whether a cell stands for a missing value."""
    if isinstance(cell, str):
        return cell.strip().lower() in HOLES
    return cell is None or cell != cell


def is_local(cell: Any) -> bool:
    """Whether a cell is a number with a decimal comma or separated thousands."""
    return isinstance(cell, str) and bool(_LOCAL.fullmatch(cell.strip()))


def advice(cell: Any) -> str:
    """What to do about a cell that is no number, for the end of a message."""
    if is_hole(cell):
        return " (a hole: fill it in, or leave out its row or its column)"
    if is_local(cell):
        return ", with a decimal point and without a thousands separator, as 1234.5"
    return ""


def _is_numeric(cell: str) -> bool:
    return not math.isnan(number(cell)) or is_local(cell)


def _is_column_of_numbers(cells: Sequence[str]) -> bool:
    found = [cell for cell in cells if not is_hole(cell)]
    # A wrong entry further down must not make a text of the column.
    return bool(found) and 2 * sum(map(_is_numeric, found)) >= len(found)


def _are_row_labels(rows: list[list[str]]) -> bool:
    """Whether the first column, which has no name, counts the rows or names them apart by texts."""
    found = [row[0] for row in rows]
    if not found or len(set(found)) < len(found) or "" in found:
        return False
    counts = any(found == [str(i + start) for i in range(len(found))] for start in (0, 1))
    return counts or not any(map(_is_numeric, found))


def _is_comment(row: list[str]) -> bool:
    # "sep=;" is what Excel reads the separator from
    return row[0].lstrip().startswith("#") or re.fullmatch(r"sep=.?", row[0].strip()) is not None


def _listed(cells: Sequence[str]) -> str:
    shown = ", ".join(cell[:20] for cell in cells[:6])
    return f"{shown}, ..." if len(cells) > 6 else shown


def _separator(text: str) -> str:
    """The separator that divides the first rows into equally many cells, as many of them numbers as can be."""
    best, best_share, fallback = "", -1.0, ""
    text = text[: _after_lines(text, 10 * _SAMPLE)]
    for separator in SEPARATORS:
        try:
            rows = [row for _, row in itertools.islice(_split("", text, separator), _SAMPLE)]
        except ValueError:  # a quote that closes before something else: this is not the separator, or a row is broken
            continue
        if not rows:
            continue
        if not fallback and len(rows[0]) > 1 and separator != " ":
            fallback = separator
        width = len(rows[-1])
        if width < 2 or any(len(row) != width for row in rows[1:]) or len(rows[0]) not in (width, width - 1):
            continue
        body = rows[1:] or rows
        share = sum(_is_numeric(cell) or is_hole(cell) for row in body for cell in row) / (len(body) * width)
        if share > best_share:
            best, best_share = separator, share
    return best or fallback or ","


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, one at a time: io.StringIO would copy a whole file for its first rows."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _after_lines(text: str, count: int) -> int:
    """Where the text goes on after some lines, or ends."""
    start = 0
    for _ in range(count):
        start = text.find("\n", start) + 1
        if not start:
            return len(text)
    return start


def _split(source: str, text: str, separator: str, comments: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The line where a row begins, counted from 1, and its cells; blank lines are passed over."""
    if separator in ("::", " "):
        for line, row in enumerate(_lines(text), 1):
            cells = row.strip("\n").split("::") if separator == "::" else _words(row)
            if row.strip() and (comments or not _is_comment(cells)):
                yield line, cells
        return
    before = 0
    # strict, for otherwise a quote that is not closed would swallow the rest of the file into one cell
    reader = csv.reader(_lines(text), delimiter=separator, strict=True)
    try:
        for row in reader:
            if (len(row) > 1 or "".join(row).strip()) and (comments or not _is_comment(row)):
                yield before + 1, row
            before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"{source}, line {before + 1}: not a row of a table: {error}") from None


def _words(row: str) -> list[str]:
    found = re.findall(r'"[^"]*"|\S+', row)
    return [word[1:-1] if len(word) > 1 and word[0] == word[-1] == '"' else word for word in found]
