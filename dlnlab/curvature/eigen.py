"""Extreme eigenpairs of an operator: a thick-restarted Krylov method that starts where the last one ended."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlnlab.curvature.operators import Matrix, Operator

_EXTRA = 1
"""Ritz vectors kept beyond the wanted ones between solves: what may overtake them."""
_RIVAL_STEPS = 2
"""Products a warm solve spends on the best pair that is not wanted, before it looks at the wanted ones."""


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenpairs, and what is known of their errors.

    Args:
        values: Ritz values, descending, (k,); with members (E, k). For `both`, (2k,): the k largest, then the k smallest.
        vectors: Unit Ritz vectors, one a row, (k, n) or (E, k, n).
        residuals: |A x - theta x| relative to `scale`, of the shape of `values`.
        num_products: Products with the operator, each with one vector (per member).
        converged: Whether all residuals are at most the tolerance; a tensor () or (E,).
        scale: The largest Ritz magnitude, () or (E,): the operator's norm, from below.
        basis: The rows a later solve starts from, (m, n) or (E, m, n).
        method: How the products were computed.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_products: int
    converged: Tensor
    scale: Tensor
    basis: Tensor
    method: str = "exact"

    @property
    def bounds(self) -> Tensor:
        """|A x - theta x|: the operator has an eigenvalue within this distance of the Ritz value."""
        return self.residuals * self.scale[..., None]


def eigenpairs(
    operator: Operator | Tensor,
    k: int = 1,
    which: Literal["largest", "smallest", "both"] = "largest",
    tol: float = 1e-3,
    start: Eigenpairs | Tensor | None = None,
    max_products: int = 1000,
    basis_size: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    r"""The algebraically largest or smallest eigenpairs of a symmetric operator.

    Rayleigh-Ritz on a growing space: it holds the rows of `start` and a random guard vector, and grows by the residual of
    the wanted pair that is furthest from done, which from a single row is the Lanczos method. A full space is restarted
    from its best Ritz vectors. Every member of an ensemble has a space of its own; all grow together.

    The guard is there because a residual bounds the distance to *some* eigenvalue: where two cross without mixing, a warm
    vector alone would follow the wrong one. So a warm solve first spends products on the guard and on the best pair that
    is not wanted; what rises from deep in the spectrum may still be found one solve late. At rest it takes k + 5.

    Args:
        operator: A symmetric `Operator`, anything with its `shape` and `matvec`, or a symmetric matrix.
        k: How many, at each end for `both`.
        which: Which end of the spectrum.
        tol: A pair has converged when |A x - theta x| is at most this part of the largest Ritz magnitude. Below 1e-5 the
            operator must be float64.
        start: An earlier result, or rows (m, n) or (E, m, n) to start from.
        max_products: The solve ends after so many products, converged or not.
        basis_size: Rows the space may have; None is 40, or more where k needs it.
        seed: Of the guard and, without a start, the start.

    Returns:
        The pairs.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> found = eigenpairs(torch.diag(torch.tensor([3.0, -7.0, 1.0, 2.0])))
        >>> found.values.tolist(), bool(found.converged)
        ([3.0], True)

    Reference:
        Wu and Simon 2000 (thick restart); the guard vector: derived here.
    """
    operator = Matrix(operator) if isinstance(operator, Tensor) else operator
    size = operator.shape[-1]
    if which not in ("largest", "smallest", "both"):
        raise ValueError(f"which = {which!r}: must be one of largest, smallest, both")
    if not 1 <= k <= size:
        raise ValueError(f"k = {k}: must be between 1 and the operator's size, {size}")
    if not tol > 0:
        raise ValueError(f"tol = {tol}: must be positive")
    device = getattr(operator, "device", torch.device("cpu"))
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _Solver(operator, k, which, tol, max_products, basis_size, seed).solve(start)


class _Solver:
    """One solve; all tensors have a leading axis of members, of length 1 for a single operator."""

    def __init__(self, operator, k, which, tol, max_products, basis_size, seed) -> None:
        *members, self.size, _ = operator.shape
        self.operator, self.single, self.members = operator, not members, members[0] if members else 1
        self.k, self.which, self.tol, self.max_products = k, which, tol, max_products
        self.dtype = getattr(operator, "dtype", torch.float64)
        self.device = getattr(operator, "device", torch.device("cpu"))
        wanted = 2 * k if which == "both" else k
        self.needed = min(self.size, wanted)
        self.keep = min(self.size, wanted + _EXTRA)
        self.most = min(self.size, max(basis_size or 40, 2 * self.keep + 4))
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.empty(self.members, self.most, self.size, dtype=self.dtype, device=self.device)
        self.images = torch.empty_like(self.rows)
        # Small matrices live on the CPU in float64, whatever the operator's type.
        self.projected = torch.zeros(self.members, self.most, self.most, dtype=torch.float64)
        self.lost = torch.zeros(self.members, dtype=torch.bool, device=self.device)
        self.count = self.num_products = 0

    def solve(self, start: Eigenpairs | Tensor | None) -> Eigenpairs:
        for row in self._start_rows(start):
            self._append(row)
        if start is not None and self.count < self.size:
            self._append(self.images[:, self.count - 1])  # where the guard leads
            for _ in range(min(_RIVAL_STEPS, self.size - self.count)):
                values, coefficients = torch.linalg.eigh(self.projected[:, : self.count, : self.count])
                rival = self._best(self.needed + 1)[self.needed :]
                self._append(self._residuals(values, coefficients, rival)[:, 0])
        while True:
            values, coefficients = torch.linalg.eigh(self.projected[:, : self.count, : self.count])
            chosen = self._chosen(self.count)
            residuals = self._residuals(values, coefficients, chosen)
            scale = values.abs().amax(-1).to(self.device)
            norms = torch.linalg.vector_norm(residuals, dim=-1, dtype=torch.float64)
            norms = torch.where(norms > 0, norms / scale[:, None], 0)
            done = (norms <= self.tol).all(-1) | self.lost
            complete = self.count >= self.needed and bool(done.all())
            exhausted = self.count == self.size or self.num_products >= self.max_products
            if self._agree(complete or exhausted):
                return self._result(values, coefficients, chosen, norms, scale, done & (self.count >= self.needed))
            if self.count == self.most:
                self._restart(values, coefficients)
            self._append(residuals[torch.arange(self.members), norms.argmax(-1)])

    # The space --------------------------------------------------------------------------------------------------------

    def _start_rows(self, start: Eigenpairs | Tensor | None) -> list[Tensor]:
        rows = start.basis if isinstance(start, Eigenpairs) else start
        if rows is None:
            rows = self._random(self.k - 1)
        elif self.single:
            rows = rows[None] if rows.ndim > 1 else rows[None, None]
        if rows.ndim != 3 or rows.shape[0] != self.members or rows.shape[-1] != self.size:
            raise ValueError(
                f"start of shape {tuple(rows.shape)}: must be rows of {self.size} numbers for each of {self.members}"
            )
        rows = torch.cat([rows.to(self.rows)[:, : self.most - 1], self._random(1)], 1)
        return list(rows[:, : self.size].unbind(1))

    def _random(self, count: int) -> Tensor:
        # The same for every member and on every device, so that a member's numbers do not depend on its company.
        draws = torch.randn(count, self.size, generator=self.generator, dtype=torch.float64)
        return draws.to(self.rows).expand(self.members, -1, -1)

    def _append(self, rows: Tensor) -> None:
        """Orthonormalise rows (E, n), one for each member, multiply them and add them to the space."""
        rows = self._orthonormal(rows)
        images = self.operator.matvec(rows[0] if self.single else rows).detach().reshape(rows.shape)
        self.num_products += 1
        m = self.count
        self.count = m + 1
        self.rows[:, m], self.images[:, m] = rows, images
        column = torch.bmm(self.rows[:, : m + 1], images[..., None])[..., 0].double().cpu()
        if not bool((finite := column.isfinite().all(-1)).all()):
            # A member whose curvature is not finite is given up; the others go on.
            self.lost |= ~finite.to(self.device)
            self.images[:, m].masked_fill_(self.lost[:, None], 0)
            column = column.masked_fill(~finite[:, None], 0)
        self.projected[:, m, : m + 1] = self.projected[:, : m + 1, m] = column
        if self.num_products == 2:
            self._check_symmetry()

    def _check_symmetry(self) -> None:
        one, other = self.rows[:, 0], self.rows[:, 1]
        difference = ((self.images[:, 0] * other).sum(-1) - (self.images[:, 1] * one).sum(-1)).abs()
        if bool((difference > 0.01 * torch.linalg.vector_norm(self.images[:, :2], dim=(1, 2))).any()):
            warnings.warn(
                "the operator is not symmetric: either the loss is not the same function at every evaluation, or one of "
                "its operations has a wrong second derivative; compare with method='finite_differences'",
                stacklevel=4,
            )

    def _orthonormal(self, rows: Tensor) -> Tensor:
        basis = self.rows[:, : self.count]
        for _ in range(5):
            before = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            for _ in range(2):
                part = torch.bmm(rows[:, None], basis.mT)
                rows = torch.baddbmm(rows[:, None], part, basis, alpha=-1)[:, 0]
            norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            # A direction that lies in the space, or is no direction at all, makes room for a random one.
            spent = ~(norm > 100 * torch.finfo(self.dtype).eps * before)
            rows = rows / norm
            if not bool(spent.any()):
                return rows
            rows = torch.where(spent, self._random(1)[:, 0], rows)
        return rows

    def _restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Shrink the space to its best Ritz vectors."""
        keep = min(self.most - 2, max(self.keep, self.most // 2))
        best = self._best(keep)
        mix = coefficients[..., best].mT.to(self.rows)
        self.rows[:, :keep] = mix @ self.rows[:, : self.count]
        self.images[:, :keep] = mix @ self.images[:, : self.count]
        self.projected.zero_()
        self.projected[:, :keep, :keep] = torch.diag_embed(values[:, best])
        self.count = keep

    # Ritz pairs -------------------------------------------------------------------------------------------------------

    def _chosen(self, count: int) -> list[int]:
        """Places of the wanted pairs among `count` ascending Ritz values, descending."""
        k = min(self.k, count)
        top, bottom = list(range(count - 1, count - 1 - k, -1)), list(range(k - 1, -1, -1))
        return {"largest": top, "smallest": bottom[::-1], "both": top + bottom}[self.which]

    def _best(self, count: int) -> list[int]:
        """Places of the `count` pairs next to the wanted end or ends, the best last."""
        total = self.count
        order = {
            "largest": list(range(total - 1, -1, -1)),
            "smallest": list(range(total)),
            "both": [place for i in range((total + 1) // 2) for place in (total - 1 - i, i)],
        }[self.which]
        return list(dict.fromkeys(order))[:count]

    def _residuals(self, values: Tensor, coefficients: Tensor, chosen: list[int]) -> Tensor:
        """A x - theta x of the chosen pairs, (E, len(chosen), n)."""
        mix = coefficients[..., chosen].mT.to(self.rows)
        theta = values[:, chosen, None].to(self.rows)
        return mix @ self.images[:, : self.count] - (theta * mix) @ self.rows[:, : self.count]

    def _agree(self, decision: bool) -> bool:
        agree = getattr(self.operator, "agree", None)
        return decision if agree is None else agree(decision)

    def _result(self, values, coefficients, chosen, norms, scale, converged) -> Eigenpairs:
        def rows_of(places: list[int]) -> Tensor:
            return coefficients[..., places].mT.to(self.rows) @ self.rows[:, : self.count]

        found = values[:, chosen].to(self.rows)
        found, norms = (part.masked_fill(self.lost[:, None], torch.nan) for part in (found, norms.to(self.rows)))
        parts = [found, rows_of(chosen), norms, converged & ~self.lost, scale.to(self.rows),
                 rows_of(self._best(min(self.keep, self.count)))]  # fmt: skip
        found, vectors, norms, converged, scale, basis = (part[0] if self.single else part for part in parts)
        method = getattr(self.operator, "method", "exact")
        return Eigenpairs(found, vectors, norms, self.num_products, converged, scale, basis, method)
