"""A person's own arrays, from Python (`dlnlab.simulate`)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream


class ArrayRegression(SyntheticData):
    """Linear regression on arrays, the same for every seed. Not for configs, which hold no arrays: `TabularRegression`.

    Args:
        x: Inputs (N, D), a NumPy array, tensor or nested list.
        y: Targets (N,) or (N, K).
        x_test: Inputs of the test rows, or None.
        y_test: Their targets, or None.
        teacher: The truth behind the data, (D,) or (K, D), or None.

    Raises:
        ValueError: If shapes do not agree, or something is no finite number.

    Example:
        >>> data = ArrayRegression([[1.0, 2.0], [3.0, 4.0]], [1.0, 0.0])
        >>> data.setup()
        >>> data.problems.x.shape
        torch.Size([1, 2, 2])
    """

    depends_on_seed: ClassVar[bool] = False

    def __init__(self, x: Any, y: Any, x_test: Any = None, y_test: Any = None, teacher: Any = None) -> None:
        arrays = {name: _numbers(name, value) for name, value in (("X", x), ("y", y), ("X_test", x_test),
                  ("y_test", y_test), ("teacher", teacher))}  # fmt: skip
        for one, other in (("X", "y"), ("X_test", "y_test")):
            found = [None if arrays[name] is None else tuple(arrays[name].shape) for name in (one, other)]
            if found == [None, None] and one == "X_test":
                continue
            if None in found or len(found[0]) != 2 or len(found[1]) not in (1, 2) or found[0][0] != found[1][0]:
                raise ValueError(f"{one} must be (N, D) and {other} (N,) or (N, K), got {found[0]} and {found[1]}")
        features, outputs = arrays["X"].shape[1:], arrays["y"].shape[1:]
        if x_test is not None and (arrays["X_test"].shape[1:], arrays["y_test"].shape[1:]) != (features, outputs):
            raise ValueError(
                f"the test rows must be like the training rows, got X_test of shape {tuple(arrays['X_test'].shape)} and "
                f"y_test of shape {tuple(arrays['y_test'].shape)} for D = {features[0]}"
            )
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


def _numbers(name: str, value: Any) -> Tensor | None:
    if value is None:
        return None
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    bad = torch.nonzero(~torch.isfinite(numbers))
    if len(bad):
        raise ValueError(f"{name}{bad[0].tolist()} = {numbers[tuple(bad[0])]}: must be finite")
    return numbers
