"""A person's own table of observed entries of a matrix: ratings, a survey, measurements with holes."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream
from dlnlab.tables import Table, read_table


class ObservedEntries(SyntheticData):
    """Observed entries of a matrix from a table of (row, column, value), your own or scikit-learn's wine table.

    Rows and columns of the matrix are named by texts or whole numbers and come in the order of their first appearance. Each
    seed holds back a test set of its own. There is no teacher, so `distance` is not defined. A network without an
    intercept predicts about 0 where it knows nothing: `standardize` makes that the mean.

    Args:
        path: A text table (.csv, .tsv, .txt, .data, .dat), .parquet (needs `dlnlab[parquet]`), .npz or .pt file with one
            row for each observed entry; None is the wine table (178 wines, 13 measurements, each in units of its standard
            deviation), which needs `dlnlab[examples]`.
        row: Name or number (from 0) of the column (in an archive: the array) that names the matrix's row. None is the
            column called `row`, else the first of exactly three: a wider table must say which it means, for it may be a
            whole matrix.
        column: Likewise, its column: `column` or the second.
        value: Likewise, what was observed: `value` or the third.
        standardize: Give the training values mean 0 and standard deviation 1, and the test values the same shift and unit.
        test_fraction: Share of the entries in the test set, in [0, 1).
        header: Whether the first row of a text table holds the columns' names; None guesses, as in `TabularRegression`.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the table has not what is asked for.
        OSError: In `setup`, if the file cannot be read.
    """

    def __init__(
        self,
        path: str | None = None,
        row: int | str | None = None,
        column: int | str | None = None,
        value: int | str | None = None,
        standardize: bool = True,
        test_fraction: float = 0.2,
        header: bool | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.source = path or "the wine table"
        self.row = row
        self.column = column
        self.value = value
        self.standardize = checks.flag("standardize", standardize)
        self.test_fraction = checks.number("test_fraction", test_fraction, at_least=0)
        if test_fraction >= 1:
            raise ValueError(f"test_fraction = {test_fraction}: must be below 1")
        self.header = None if header is None else checks.flag("header", header)
        if header is not None and path is None:
            raise ValueError("header: only a text table has a header, and path is not given")
        self.row_names: list[Any] = []
        self.column_names: list[Any] = []
        self._places: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the table, once, and draw each seed's test set."""
        if self._places is None:
            self._read()
        super().setup(stage)

    def _read(self) -> None:
        table = wine() if self.path is None else read_table(self.path, self.header)
        names = self._columns(table)
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f'{table.source}: row, column and value must be three columns, "{name}" is given twice'
                )
        y = table.numbers(names[2:])[:, 0]
        (rows, self.row_names), (columns, self.column_names) = table.names_in(names[:2])
        for name, found in zip(names, (rows, columns), strict=False):
            if len(found) != len(y):
                raise ValueError(
                    f'{table.source}: "{name}" has {len(found)} rows and the values have {len(y)}: must be the same'
                )
        self.matrix_shape = len(self.row_names), len(self.column_names)
        places = rows * self.matrix_shape[1] + columns
        order = np.argsort(places, kind="stable")
        twice = np.flatnonzero(np.diff(places[order]) == 0)
        if len(twice):
            first, again = order[twice[0]], order[twice[0] + 1]
            raise ValueError(
                f'{table.source}, {table.place(again)}: "{names[0]}" {self.row_names[rows[again]]!s}, "{names[1]}" '
                f"{self.column_names[columns[again]]!s} is already given in {table.place(first)}: an entry has one value"
            )
        self.num_test_samples = round(self.test_fraction * len(y))
        train = len(y) - self.num_test_samples
        if train < 2:
            raise ValueError(
                f"{table.source} has {len(y)} entries, of which test_fraction = {self.test_fraction:g} takes "
                f"{self.num_test_samples}: there must be at least 2 left to train on"
            )
        if self.standardize and (y == y[0]).all():
            raise ValueError(
                f'{table.source}, column "{names[2]}": must vary to be standardized, but is {y[0]:g} always'
            )
        self.checksum = hashlib.sha256(np.stack((rows, columns, y)).tobytes()).hexdigest()
        self._places, self._y = torch.from_numpy(np.stack((rows, columns), axis=1)), torch.from_numpy(y)

    def _columns(self, table: Table) -> list[str]:
        """The names of the three columns."""
        keys: dict[str, int | str | None] = {"row": self.row, "column": self.column, "value": self.value}
        named = [name for name in table.columns if name not in table.unnamed]
        missing = [part for part, key in keys.items() if key is None]
        if set(missing) <= set(named):
            keys |= {part: part for part in missing}
        elif len(named) == 3:
            keys |= {part: name for part, name in zip(keys, named, strict=True) if part in missing}
        else:
            shown = ", ".join(named[:6]) + (", ..." if len(named) > 6 else "")
            raise ValueError(
                f"{table.source} has {len(named)} columns ({shown}) and entries need three: give the names or numbers of "
                f"{', '.join(missing)}{table.undivided()}; a whole matrix must be turned into one line for each entry, of "
                "its row, column and value"
            )
        return [self._one(table, key, part) for part, key in keys.items()]

    @staticmethod
    def _one(table: Table, key: int | str, part: str) -> str:
        found = table.find(key, argument=part)
        if len(found) != 1:
            raise ValueError(f'{table.source}, array "{key}": must be of shape (N,), has {len(found)} columns')
        return found[0]

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, None]:
        """One seed's entries; see the class."""
        del values
        order = stream.uniforms("test", (len(self._y),)).argsort(stable=True)
        order = torch.cat((order[self.num_test_samples :], order[: self.num_test_samples]))
        places, y = self._places.to(stream.device)[order], self._y.to(stream.device)[order]
        if self.standardize:
            std, mean = torch.std_mean(y[: len(y) - self.num_test_samples], correction=0)
            y = (y - mean) / torch.where(std > 0, std, torch.ones_like(std))
        return places, y, None


def wine() -> Table:
    """Scikit-learn's wine table as entries: 13 measurements of 178 wines, each in units of its standard deviation.

    Raises:
        ValueError: If scikit-learn is not installed.

    Reference:
        Aeberhard and Forina 1991, "Wine", UCI machine learning repository.
    """
    try:
        from sklearn.datasets import load_wine
    except ImportError:
        raise ValueError(
            "path: not given, and the built-in wine table needs scikit-learn: pip install 'dlnlab[examples]', or give a "
            "file of your own"
        ) from None
    found = load_wine()
    values = (found.data - found.data.mean(0)) / found.data.std(0)
    rows, columns = np.indices(values.shape)
    return Table(
        "the wine table",
        {
            "wine": rows.ravel(),
            "measurement": [found.feature_names[j] for j in columns.ravel()],
            "value": values.ravel(),
        },
    )
