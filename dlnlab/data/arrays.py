"""A person's own arrays, from Python (`dlnlab.simulate`)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab.arrays import floats, labels
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream


class ArrayRegression(SyntheticData):
    """Linear regression on arrays, the same for every seed. Not for configs, which hold no arrays: `TabularRegression`.

    Args:
        x: Inputs (N, D), from any array library; see `dlnlab.arrays.floats`.
        y: Targets (N,) or (N, K); one column is a vector.
        x_test: Inputs of the test rows, or None.
        y_test: Their targets, or None.
        teacher: The truth behind the data, (D,) or (K, D), or None; for a vector of targets also (1, D) or (D, 1).

    Raises:
        ValueError: If shapes or the labels of pandas and xarray objects do not agree, or something is no finite number.

    Example:
        >>> data = ArrayRegression([[1.0, 2.0], [3.0, 4.0]], [1.0, 0.0])
        >>> data.setup()
        >>> data.problems.x.shape
        torch.Size([1, 2, 2])
    """

    depends_on_seed: ClassVar[bool] = False

    def __init__(self, x: Any, y: Any, x_test: Any = None, y_test: Any = None, teacher: Any = None) -> None:
        given = {"X": x, "y": y, "X_test": x_test, "y_test": y_test, "teacher": teacher}
        arrays = {
            name: None if value is None else torch.from_numpy(floats(name, value)) for name, value in given.items()
        }
        for name in ("y", "y_test"):
            if arrays[name] is not None and arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
                arrays[name] = arrays[name].squeeze(1)
        for one, other in (("X", "y"), ("X_test", "y_test")):
            found = [None if arrays[name] is None else tuple(arrays[name].shape) for name in (one, other)]
            if found == [None, None] and one == "X_test":
                continue
            if None in found or len(found[0]) != 2 or len(found[1]) not in (1, 2) or found[0][0] != found[1][0]:
                raise ValueError(f"{one} must be (N, D) and {other} (N,) or (N, K), got {found[0]} and {found[1]}")
            if 0 in (*found[0], *found[1]):
                raise ValueError(f"{one} and {other} must not be empty, got {found[0]} and {found[1]}")
        for one, other, axis in (("X", "y", 0), ("X_test", "y_test", 0), ("X", "X_test", 1), ("y", "y_test", 1),
                                 ("X", "teacher", -1)):  # fmt: skip
            _refuse_other_labels(one, given[one], other, given[other], axis)
        features, outputs = arrays["X"].shape[1:], arrays["y"].shape[1:]
        if x_test is not None and (arrays["X_test"].shape[1:], arrays["y_test"].shape[1:]) != (features, outputs):
            raise ValueError(
                f"the test rows must be like the training rows, got X_test of shape {tuple(arrays['X_test'].shape)} and "
                f"y_test of shape {tuple(arrays['y_test'].shape)} for D = {features[0]}"
            )
        if teacher is not None and not outputs and arrays["teacher"].shape in ((1, *features), (*features, 1)):
            arrays["teacher"] = arrays["teacher"].flatten()
        if teacher is not None and arrays["teacher"].shape != (*outputs, *features):
            raise ValueError(f"teacher must have shape {(*outputs, *features)}, got {tuple(arrays['teacher'].shape)}")
        super().__init__(0 if x_test is None else len(arrays["X_test"]))
        self._x = torch.cat([arrays[name] for name in ("X", "X_test") if arrays[name] is not None])
        self._y = torch.cat([arrays[name] for name in ("y", "y_test") if arrays[name] is not None])
        self._teacher = arrays["teacher"]

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arrays."""
        del values
        return tuple(None if part is None else part.to(stream.device) for part in (self._x, self._y, self._teacher))


def _refuse_other_labels(one: str, first: Any, other: str, second: Any, axis: int) -> None:
    """Raise where pandas or xarray objects that are matched by position would be matched otherwise by their labels."""
    (dim, mine), (other_dim, theirs) = labels(first, axis), labels(second, axis)
    transposed = dim != other_dim and None not in (dim, other_dim) and other_dim in first.dims
    if transposed or (mine is not None and theirs is not None and not mine.equals(theirs)):
        what = "rows" if axis == 0 else "columns"
        raise ValueError(
            f"{one} and {other} must have the same {what} in the same order, but their labels differ: align them, or give "
            "plain arrays (.to_numpy()) if the order is right"
        )
