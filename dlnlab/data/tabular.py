"""Linear regression on a person's own table."""

import hashlib
import math
import warnings
from itertools import combinations_with_replacement
from typing import Any, Literal

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream
from dlnlab.tables import Table, TableWarning, read_table

EXPANSIONS = ("polynomial", "random_features")


class TabularRegression(SyntheticData):
    r"""Linear regression on the rows of a table, your own or scikit-learn's diabetes table.

    Each seed divides the rows into a training and a test set of its own. There is no teacher, so `distance` is not
    defined. A linear network has no intercept: `standardize` takes the means out, and it puts the target in units of
    its standard deviation, so a test loss of 0.5 is about that of always predicting the mean.

    Args:
        path: A text table (.csv, .tsv, .txt, .data, .dat), .parquet (needs `dlnlab[parquet]`), .npz or .pt file, with .gz
            after it where it is packed; None is the diabetes table (442 rows, 10 features), which needs `dlnlab[examples]`.
            A .npz or .pt file holds arrays `X` (N, D) and `y` (N,), (N, 1) or (N, K). Pickled objects are never loaded.
        target: Name or number (from 0, -1 is the last) of the column to predict; in .npz and .pt files the name of its
            array. A number counts columns, whatever they are called; a name made of digits that is also a column's number
            needs quotes of its own, '"1"'. None is the last column that has a name, or `y`.
        features: Names or numbers of the columns to predict from; where the file has an array `X`, numbers count its
            columns. None is those of `X`, or all but the target and columns without a name (row labels). Holes, texts and
            dates in other columns do no harm.
        exclude: Names or numbers, likewise, of columns that are left out of the features.
        header: Whether the first row of a text table holds the columns' names. None guesses: it is data if each of its
            cells could stand further down in its column (numbers over numbers); what is not certain is said. Without a
            header the columns are called 0, 1, ....
        standardize: Give every feature mean 0 and standard deviation 1, and the target likewise, by the training rows
            alone. A feature that is constant over one seed's training rows is centred only.
        test_fraction: Share of the rows in the test set, in [0, 1).
        num_samples: n, training rows, drawn from those outside the test set; None is all of them. The test set does not
            depend on it.
        expansion: `polynomial`: all monomials of 1 to `degree` factors; `random_features`: relu(W x) with entries of W
            from N(0, 1/D), drawn by the seed. Either is made of the standardized features and standardized again.
        degree: Of the polynomial.
        num_features: Random features.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the table has not what is asked for.
        OSError: In `setup`, if the file cannot be read.
    """

    def __init__(
        self,
        path: str | None = None,
        target: int | str | None = None,
        features: list[int | str] | None = None,
        standardize: bool = True,
        test_fraction: float = 0.25,
        num_samples: int | None = None,
        expansion: Literal["polynomial", "random_features"] | None = None,
        degree: int = 2,
        num_features: int = 100,
        exclude: list[int | str] | None = None,
        header: bool | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.source = path or "the diabetes table"
        self.target = target
        self.features = features
        self.exclude = exclude
        self.header = None if header is None else checks.flag("header", header)
        if header is not None and path is None:
            raise ValueError("header: only a text table has a header, and path is not given")
        self.standardize = checks.flag("standardize", standardize)
        self.test_fraction = checks.number("test_fraction", test_fraction, at_least=0)
        if test_fraction >= 1:
            raise ValueError(f"test_fraction = {test_fraction}: must be below 1")
        # One row has no standard deviation.
        self.num_samples = None if num_samples is None else checks.integer("num_samples", num_samples, at_least=2)
        self.expansion = None if expansion is None else checks.one_of("expansion", expansion, EXPANSIONS)
        self.degree = checks.integer("degree", degree, at_least=1)
        self.num_features = checks.integer("num_features", num_features, at_least=1)
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read the table, once, and draw each seed's rows."""
        if self._x is None:
            self._read()
        super().setup(stage)

    def _read(self) -> None:
        table = diabetes() if self.path is None else read_table(self.path, self.header)
        x_names, y_names = self._columns(table)
        try:
            values = table.numbers([*x_names, *y_names])
        except ValueError as error:
            if self.features is None and "finite number" in str(error):
                raise ValueError(f"{error}; `exclude` leaves columns out of the features") from None
            raise
        rows = len(values)
        num_test = round(self.test_fraction * rows)
        available = rows - num_test
        wanted = available if self.num_samples is None else self.num_samples
        if not 2 <= wanted <= available:
            needed = "at least 2" if self.num_samples is None else f"num_samples = {wanted}"
            raise ValueError(
                f"{table.source} has {rows} rows, of which test_fraction = {self.test_fraction:g} takes {num_test}: "
                f"{available} are left to train on, and there must be {needed}"
            )
        if self.standardize:
            for name, column in zip([*x_names, *y_names], values.T, strict=True):
                if (column == column[0]).all():
                    advice = "choose another target" if name in y_names else "leave it out with `features`"
                    raise ValueError(
                        f'{table.source}, column "{name}": must vary to be standardized, but is {column[0]:g} in every '
                        f"row: {advice}"
                    )
        self.checksum = hashlib.sha256(values.tobytes()).hexdigest()
        x, y = torch.from_numpy(values).split((len(x_names), len(y_names)), dim=1)
        self.num_test_samples, self._num_train = num_test, wanted
        self._x, self._y = x, y.squeeze(1) if y.shape[1] == 1 else y

    def _columns(self, table: Table) -> tuple[list[str], list[str]]:
        """The names of the features' and the target's columns."""
        inputs = table.find("X") if "X" in table.arrays or "X" in table.refused else list(table.columns)
        target = self.target
        if target is None:
            target = "y" if table.is_archive else next((n for n in reversed(inputs) if n not in table.unnamed), -1)
        y_names = table.find(target, argument="target")
        excluded = [name for key in self.exclude or () for name in table.find(key, inputs, "exclude")]
        if self.features is None:
            x_names = [name for name in inputs if name not in y_names]
            unnamed = [str(inputs.index(name)) for name in x_names if name in table.unnamed and name not in excluded]
            if unnamed:
                plural = "columns {} have no name and are" if len(unnamed) > 1 else "column {} has no name and is"
                warnings.warn(
                    f"{table.source}: {plural.format(', '.join(unnamed))} left out of the features, as row labels are; to "
                    "use such a column give its number in `features`",
                    TableWarning,
                    stacklevel=2,
                )
            x_names = [name for name in x_names if name not in table.unnamed]
        else:
            x_names = [name for key in self.features for name in table.find(key, inputs, "features")]
        for i, name in enumerate(x_names):
            if name in x_names[:i]:
                raise ValueError(f'features: column "{name}" is given twice')
            if name in y_names:
                raise ValueError(f'features: column "{name}" is the target')
        for name in excluded:
            if name in y_names:
                default = " (the last column, for `target` is not given)" if self.target is None else ""
                raise ValueError(f'exclude: column "{name}" is the target{default}')
        x_names = [name for name in x_names if name not in excluded]
        if not x_names or not y_names:
            raise ValueError(
                f"{table.source}: there must be at least one feature beside the target, got {len(table.columns)} "
                f"columns in all, features = {self.features} and exclude = {self.exclude}{table.undivided()}"
            )
        return x_names, y_names

    def bytes_per_problem(self) -> int | None:
        """Of the expanded x and y in float64, once the table is read."""
        if self._x is None:
            return None
        width = self._x.shape[1]
        if self.expansion == "polynomial":
            width = math.comb(width + self.degree, self.degree) - 1
        elif self.expansion == "random_features":
            width = self.num_features
        outputs = self._y.shape[1:].numel()
        return 8 * (self._num_train + self.num_test_samples) * (width + outputs)

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, None]:
        """One seed's rows; see the class."""
        del values
        # 53-bit uniforms are the same on every device, and so is their stable order.
        order = stream.uniforms("test", (len(self._x),)).argsort(stable=True)
        test, train = order[: self.num_test_samples], order[self.num_test_samples :][: self._num_train]
        rows = torch.cat((train, test))
        x, y = (self._scale(part.to(stream.device)[rows]) for part in (self._x, self._y))
        if self.expansion == "polynomial":
            x = self._scale(monomials(x, self.degree))
        elif self.expansion == "random_features":
            weights = stream.normals("inputs", (self.num_features, x.shape[1])) / x.shape[1] ** 0.5
            x = self._scale(torch.relu(x @ weights.T))
        return x, y, None

    def _scale(self, part: Tensor) -> Tensor:
        """Standardize by the training rows, which come first."""
        if not self.standardize:
            return part
        train = part[: self._num_train]
        std, mean = torch.std_mean(train, dim=0, correction=0)
        # A constant column comes out at rounding error, which must not be blown up to 1.
        constant = std <= 1e-12 * train.abs().amax(0)
        return (part - mean) / torch.where(constant, torch.ones_like(std), std)


def monomials(x: Tensor, degree: int) -> Tensor:
    """All products of 1 to `degree` features, repeats allowed, in lexicographic order within each degree.

    Args:
        x: (N, D).
        degree: The most factors.

    Returns:
        (N, C(D + degree, degree) - 1); the first D columns are x. The constant is left out.

    Example:
        >>> monomials(torch.tensor([[2.0, 3.0]]), 2)
        tensor([[2., 3., 4., 6., 9.]])
    """
    parts = []
    for count in range(1, degree + 1):
        chosen = torch.tensor(list(combinations_with_replacement(range(x.shape[1]), count)), device=x.device)
        parts.append(x[:, chosen].prod(-1))
    return torch.cat(parts, dim=1)


def diabetes() -> Table:
    """Scikit-learn's diabetes table: age, sex, bmi, bp, six blood values, and the disease's progression a year later.

    Raises:
        ValueError: If scikit-learn is not installed.

    Reference:
        Efron et al. 2004, "Least angle regression", section 1.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        raise ValueError(
            "path: not given, and the built-in diabetes table needs scikit-learn: pip install 'dlnlab[examples]', or "
            "give a file of your own"
        ) from None
    # scaled=False: the values as measured, for the scaled ones were standardized with the test rows
    found = load_diabetes(scaled=False)
    columns = dict(zip(found.feature_names, found.data.T, strict=True))
    return Table("the diabetes table", {**columns, "progression": found.target})
