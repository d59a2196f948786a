"""What the formulas take: anything torch.as_tensor takes, one problem or a stack of them, as float64."""

from typing import Any

import torch
from torch import Tensor

from dlnlab import checks

CONSISTENT = 1e-10
"""y is taken to lie in the range of X if what is outside is this small beside it: rounding of y = X beta is 1e-16."""


def as_float64(value: Any, like: Tensor | None = None) -> Tensor:
    """A float64 tensor, on the device of `like` if that is given."""
    return torch.as_tensor(value, dtype=torch.float64, device=None if like is None else like.device)


def as_problems(X: Any, y: Any, *of_coordinates: Any) -> tuple[bool, Tensor, Tensor, list[Tensor]]:
    """Inputs, targets and numbers per coordinate, stacked along a leading axis.

    Args:
        X: Inputs (N, D), or (P, N, D).
        y: Targets (N,), or (P, N).
        of_coordinates: Numbers, (D,) or (P, D).

    Returns:
        Whether there is a single problem, X (P, N, D), y (P, N), and the others (P, D). What is given once is shared by
        all problems without being copied.

    Raises:
        ValueError: If shapes do not fit or X or y is not finite.
    """
    X = as_float64(X).detach()
    y = as_float64(y, X).detach()
    others = [as_float64(other, X).detach() for other in of_coordinates]
    if X.ndim not in (2, 3) or y.ndim not in (1, 2) or X.shape[-2] != y.shape[-1] or 0 in X.shape:
        raise ValueError(
            f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}: must be (N, D) and (N,), or stacks (P, N, D) and (P, N)"
        )
    for other in others:
        if other.ndim > 2 or (other.ndim > 0 and other.shape[-1] not in (1, X.shape[-1])):
            raise ValueError(f"got shape {tuple(other.shape)} for D = {X.shape[-1]}: must be a number, (D,) or (P, D)")
    for name, value in (("X", X), ("y", y)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds a number that is not finite")
    leading = [t.shape[: t.ndim - k] for t, k in ((X, 2), (y, 1), *((o, 1) for o in others if o.ndim))]
    try:
        stack = torch.broadcast_shapes(*leading)
    except RuntimeError:
        raise ValueError(f"stacks of different lengths: {[tuple(shape) for shape in leading]}") from None
    count = stack[0] if stack else 1
    return (
        not stack,
        X.expand(count, *X.shape[-2:]),
        y.expand(count, y.shape[-1]),
        [other.expand(count, X.shape[-1]) for other in others],
    )


def in_units(X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stacked problems in units in which they are of order 1, so that no formula meets the ends of floating point.

    The units are powers of two, so no digit is lost: beta has the unit y_unit/x_unit, the sharpness x_unit y_unit, a time
    or step size one over it.

    Args:
        X: Inputs (P, N, D).
        y: Targets (P, N).

    Returns:
        X/x_unit and y/y_unit, whose largest entries lie in [1, 2), or are 0; x_unit and y_unit, (P,).
    """
    x_unit, y_unit = unit(X[:1] if X.stride(0) == 0 else X, (-2, -1)), unit(y, -1)  # what is shared stays so
    scaled = (X[:1] if X.stride(0) == 0 else X) / x_unit[:, None, None]
    return scaled.expand(X.shape), y / y_unit[:, None], x_unit.expand(len(X)), y_unit


def unit(value: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The power of two next below the largest entry along some axes; 1 where all entries are 0."""
    largest = value.abs().amax(dim)
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest == 0, 1, largest / (2 * mantissa))


def positive(name: str, value: Tensor) -> Tensor:
    """Check that all entries are positive and finite."""
    bad = ~((value > 0) & torch.isfinite(value))
    if bad.any():
        raise ValueError(f"{name} = {checks.shown(value[bad].flatten()[0].item())}: must be positive and finite")
    return value
