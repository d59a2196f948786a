"""Operator: a symmetric matrix that is known only by its products with vectors, one for each member of an ensemble.

Vectors are rows. A single operator has shape (n, n) and maps (..., n) to (..., n); one with members has shape
(E, n, n), acts on each member's n numbers apart, and maps (..., E, n) to (..., E, n). A subclass writes `matvec`:

    class Identity(Operator):
        def matvec(self, vectors):
            return vectors
"""

import torch
from torch import Tensor


class Operator:
    """A symmetric matrix, or one per member, known by its products.

    Args:
        size: n.
        num_members: E, or None for a single matrix.
        dtype: Of the vectors.
        device: Of the vectors.
    """

    method = "exact"
    """How products are computed; `finite_differences` are approximate."""

    gradient: Tensor | None = None
    """Of the loss whose curvature it is, (n,) or (E, n): a good first vector, for it lies mostly where that is large."""

    def __init__(
        self,
        size: int,
        num_members: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (size, size) if num_members is None else (num_members, size, size)
        self.dtype, self.device = dtype, torch.device(device)

    def matvec(self, vectors: Tensor) -> Tensor:
        """The products with stacked rows.

        Args:
            vectors: (..., n), with members (..., E, n).

        Returns:
            The products, of the same shape.
        """
        raise NotImplementedError

    def agree(self, decision: bool) -> bool:
        """What all processes that share this operator decide; only one of several processes has to override it."""
        return decision

    def dense(self) -> Tensor:
        """The matrix itself, (n, n) or (E, n, n), by n products; for small n."""
        rows = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        if len(self.shape) == 2:
            return self.matvec(rows)
        return self.matvec(rows[:, None].expand(-1, self.shape[0], -1)).transpose(0, 1)


class Matrix(Operator):
    """The operator of a matrix that is at hand.

    Args:
        entries: Symmetric, (n, n) or (E, n, n).

    Raises:
        ValueError: If it is not square.
    """

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim not in (2, 3) or entries.shape[-1] != entries.shape[-2]:
            raise ValueError(f"entries of shape {tuple(entries.shape)}: must be (n, n) or (E, n, n)")
        members = entries.shape[0] if entries.ndim == 3 else None
        super().__init__(entries.shape[-1], members, entries.dtype, entries.device)
        self.entries = entries

    def matvec(self, vectors: Tensor) -> Tensor:
        """See `Operator.matvec`."""
        return (self.entries @ vectors[..., None])[..., 0]


class Preconditioned(Operator):
    r"""S (A + shift) S for a diagonal S: with S = P^{-1/2}, what decides the stability of an optimizer preconditioned by P.

    Args:
        operator: A.
        scale: The diagonal of S, (n,) or (E, n).
        shift: Added to A's diagonal: coupled weight decay.

    Raises:
        ValueError: If the scale does not fit the operator.
    """

    def __init__(self, operator: Operator, scale: Tensor, shift: float | Tensor = 0.0) -> None:
        *members, size, _ = operator.shape
        if tuple(scale.shape) != (*members, size):
            raise ValueError(
                f"scale of shape {tuple(scale.shape)}: must be {(*members, size)}, one per entry of a vector"
            )
        super().__init__(size, *members, dtype=operator.dtype, device=operator.device)
        self.operator, self.scale, self.shift = operator, scale.to(operator.dtype), shift
        self.method, self.agree = operator.method, operator.agree
        if operator.gradient is not None:
            self.gradient = self.scale * operator.gradient

    def matvec(self, vectors: Tensor) -> Tensor:
        """See `Operator.matvec`."""
        scaled = vectors * self.scale
        return self.scale * (self.operator.matvec(scaled) + self.shift * scaled)
