"""Extreme eigenpairs of an operator: a thick-restarted Krylov method that starts where the last one ended."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dlnlab.curvature.operators import Matrix, Operator

_EXTRA = 2
"""Ritz vectors kept beyond the wanted ones between solves: what may overtake them."""
_GUARD = 0.1
"""How much of the random guard is mixed into the last of them."""
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

    Rayleigh-Ritz on a growing space: it holds the rows of `start` and a random guard, and grows by the residual of the
    wanted pair that is furthest from done, which from a single row is the Lanczos method. Without a start it begins with
    the guard, and the gradient where the operator is a loss's. A full space is restarted from its best Ritz vectors. Every
    member of an ensemble has a space of its own; all grow together.

    The guard is there because a residual bounds the distance to *some* eigenvalue: where two cross without mixing, a warm
    vector alone would follow the wrong one. So the last of the rows beyond the wanted ones has a part that is random, and
    a warm solve first spends products on the best pair that is not wanted; what rises from deep in the spectrum may still
    be found one solve late. At rest it takes k + 4.

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
    """One solve; all tensors have a leading axis of members, of length 1 for a single operator.

    `rows` are orthonormal. The first `count` of them, V, have been multiplied; the `ahead` rows after them, F, span what
    the images of V have outside of V: A V^T = V^T T + F^T P, with T above P in `projected`. So the residual of a Ritz pair
    (theta, V^T s) is F^T P s, and its norm |P s|: no image is stored, and no residual computed. To grow is to turn F until
    its first row points where it should, to multiply that row, and to add what its image has outside of all rows to F.
    What is small is of NumPy, in float64, whatever the operator's type: its calls cost a fifth of torch's.
    """

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
        self.lost = np.zeros(self.members, dtype=bool)
        self.count = self.ahead = self.num_products = 0

    def solve(self, start: Eigenpairs | Tensor | None) -> Eigenpairs:
        first = self._start_rows(start)
        most = min(self.size, self.most + first.shape[1])
        self.rows = torch.empty(self.members, most, self.size, dtype=self.dtype, device=self.device)
        self.projected = np.zeros((self.members, most, most))
        for row in first.unbind(1):
            self._put(row, self.ahead)
        for _ in range(self.ahead):
            self._grow()
        for _ in range(0 if start is None else min(_RIVAL_STEPS, self.size - self.count)):
            self._turn(self._residuals(self._ritz_pairs()[1], self._best(self.needed + 1)[-1:])[..., 0])
            self._grow()
        while True:
            values, coefficients = self._ritz_pairs()
            chosen = self._chosen(self.count)
            residuals = self._residuals(coefficients, chosen)
            scale = np.abs(values).max(-1)
            norms = np.linalg.norm(residuals, axis=1)
            norms = np.divide(norms, scale[:, None], out=np.zeros_like(norms), where=norms > 0)
            done = (norms <= self.tol).all(-1) | self.lost
            complete = self.count >= self.needed and bool(done.all())
            exhausted = self.ahead == 0 or self.num_products >= self.max_products
            if self._agree(complete or exhausted):
                return self._result(values, coefficients, chosen, norms, scale, done & (self.count >= self.needed))
            self._turn(residuals[np.arange(self.members), :, norms.argmax(-1)])
            if self.count == self.most:
                self._restart(values, coefficients)
            self._grow()

    # The space --------------------------------------------------------------------------------------------------------

    def _start_rows(self, start: Eigenpairs | Tensor | None) -> Tensor:
        rows = start.basis if isinstance(start, Eigenpairs) else start
        if rows is None:
            rows = self._random(self.k - 1)
        elif self.single:
            rows = rows[None] if rows.ndim > 1 else rows[None, None]
        if rows.ndim != 3 or rows.shape[0] != self.members or rows.shape[-1] != self.size:
            raise ValueError(
                f"start of shape {tuple(rows.shape)}: must be rows of {self.size} numbers for each of {self.members}"
            )
        rows = normalize(rows[:, : self.most - 1].to(self.device, self.dtype).nan_to_num(0, 0, 0), dim=-1)
        guard = normalize(self._random(1), dim=-1)
        gradient = self.operator.gradient if isinstance(self.operator, Operator) else None
        if start is None and gradient is not None:
            gradient = gradient.to(guard).reshape(self.members, 1, self.size).nan_to_num(0, 0, 0)
            guard = normalize(gradient, dim=-1) + _GUARD * guard
        if rows.shape[1] > self.needed:
            rows[:, -1:] += _GUARD * guard
        else:
            rows = torch.cat([rows, guard], 1)
        return rows[:, : self.size]

    def _random(self, count: int) -> Tensor:
        # The same for every member and on every device, so that a member's numbers do not depend on its company.
        # Uniform: any direction will do, and normal numbers take ten times as long.
        draws = 2 * torch.rand(count, self.size, generator=self.generator, dtype=torch.float64) - 1
        return draws.to(self.device, self.dtype).expand(self.members, -1, -1)

    def _grow(self) -> None:
        """Multiply the first row ahead, and add to those ahead what its image has outside of all rows."""
        m, total = self.count, self.count + self.ahead
        row = self.rows[:, m]
        image = self.operator.matvec(row[0] if self.single else row).detach().reshape(row.shape)
        self.num_products += 1
        expected = self.projected[:, m, 0].copy()
        column = self._put(image, total)
        self.count, self.ahead = m + 1, self.ahead - 1
        self.projected[:, : column.shape[1], m] = column
        self.projected[:, m, :m] = column[:, :m]
        if self.num_products == 2:
            self._check_symmetry(expected, column)

    def _put(self, vectors: Tensor, place: int) -> np.ndarray:
        """Add to the rows ahead what vectors (E, n), one for each member, have outside of the first `place` rows.

        Returns:
            The vectors' coefficients in those rows and the one that was added, (E, place + 1).
        """
        rest, column, norm, whole = self._outside(vectors, place)
        if not (finite := np.isfinite(whole)).all():
            # A member whose curvature is not finite is given up; the others go on.
            self.lost |= ~finite
            return self._put(vectors.masked_fill(torch.as_tensor(~finite[:, None], device=self.device), 0), place)
        if place == self.size:
            return column
        length, spent = norm, norm <= 100 * torch.finfo(self.dtype).eps * whole
        if spent.any():  # a vector that lies in the space, or is none at all, makes room for a random one
            other, _, length, _ = self._outside(self._random(1)[:, 0], place)
            rest = torch.where(torch.as_tensor(spent[:, None], device=self.device), other, rest)
            length, norm = np.where(spent, length, norm), np.where(spent, 0.0, norm)
        torch.div(rest, torch.as_tensor(length[:, None]).to(rest), out=self.rows[:, place])
        self.ahead += 1
        return np.concatenate([column, norm[:, None]], -1)

    def _outside(self, vectors: Tensor, place: int) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Their parts outside of the first `place` rows, the coefficients inside, and the norms of the parts and of all."""
        basis, column, whole = self.rows[:, :place], 0.0, None
        while True:
            part = torch.bmm(vectors[:, None], basis.mT)
            vectors = torch.baddbmm(vectors[:, None], part, basis, alpha=-1)[:, 0]
            norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
            numbers = torch.cat([part[:, 0], norm], -1).double().cpu().numpy()  # one transfer
            before, after = np.linalg.norm(numbers, axis=-1), numbers[:, -1]
            column = column + numbers[:, :-1]
            # Twice is enough (Kahan), and once where little was taken away.
            if whole is not None or (after >= 0.7 * before).all():
                return vectors, column, after, before if whole is None else whole
            whole = before

    def _turn(self, directions: np.ndarray) -> None:
        """Turn the rows ahead so that the first of them points in directions (E, ahead); zero is any."""
        if self.ahead == 1:
            return
        m, total = self.count, self.count + self.ahead
        norms = np.linalg.norm(directions, axis=-1, keepdims=True)
        normal = np.divide(directions, norms, out=np.zeros_like(directions), where=norms > 0)
        normal[:, 0] += np.where(normal[:, 0] < 0, -1.0, 1.0)
        normal *= np.sqrt(2) / np.linalg.norm(normal, axis=-1, keepdims=True)
        self.projected[:, m:total, :m] -= normal[:, :, None] * (normal[:, None] @ self.projected[:, m:total, :m])
        mirror, ahead = torch.as_tensor(normal[:, None]).to(self.rows), self.rows[:, m:total]
        ahead.baddbmm_(mirror.mT, torch.bmm(mirror, ahead), alpha=-1)

    def _restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Shrink the space to its best Ritz vectors."""
        keep = min(self.most - 2, max(self.keep, self.most // 2))
        best, m, p = self._best(keep), self.count, self.ahead
        mix = coefficients[..., best]
        ahead = self.projected[:, m : m + p, :m] @ mix
        self.rows[:, : keep + p] = torch.cat([self._mixed(mix), self.rows[:, m : m + p]], 1)
        self.projected[:] = 0
        self.projected[:, range(keep), range(keep)] = values[:, best]
        self.projected[:, keep : keep + p, :keep] = ahead
        self.count = keep

    def _check_symmetry(self, expected: np.ndarray, column: np.ndarray) -> None:
        images = np.square(self.projected[:, :, 0]).sum(-1) + np.square(column).sum(-1)
        if (np.abs(expected - column[:, 0]) > 0.01 * np.sqrt(images)).any():
            warnings.warn(
                "the operator is not symmetric: either the loss is not the same function at every evaluation, or one of "
                "its operations has a wrong second derivative; compare with method='finite_differences'",
                stacklevel=4,
            )

    # Ritz pairs -------------------------------------------------------------------------------------------------------

    def _ritz_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values, ascending, (E, count), and coefficients, a pair a column, (E, count, count)."""
        values, coefficients = torch.linalg.eigh(torch.from_numpy(self.projected[:, : self.count, : self.count]))
        return values.numpy(), coefficients.numpy()

    def _residuals(self, coefficients: np.ndarray, places: list[int]) -> np.ndarray:
        """Coefficients of A x - theta x in the rows ahead, (E, ahead, len(places))."""
        return self.projected[:, self.count : self.count + self.ahead, : self.count] @ coefficients[..., places]

    def _mixed(self, coefficients: np.ndarray) -> Tensor:
        """Ritz vectors, (E, number, n), from coefficients (E, count, number)."""
        return torch.as_tensor(coefficients).mT.to(self.rows) @ self.rows[:, : self.count]

    def _chosen(self, count: int) -> list[int]:
        """Places of the wanted pairs among `count` ascending Ritz values, descending."""
        k = min(self.k, count)
        top, bottom = list(range(count - 1, count - 1 - k, -1)), list(range(k - 1, -1, -1))
        return {"largest": top, "smallest": bottom[::-1], "both": top + bottom}[self.which]

    def _best(self, count: int) -> list[int]:
        """Places of the `count` pairs next to the wanted end or ends, the best first."""
        total = self.count
        order = {
            "largest": list(range(total - 1, -1, -1)),
            "smallest": list(range(total)),
            "both": [place for i in range((total + 1) // 2) for place in (total - 1 - i, i)],
        }[self.which]
        return list(dict.fromkeys(order))[:count]

    def _agree(self, decision: bool) -> bool:
        agree = getattr(self.operator, "agree", None)
        return decision if agree is None else agree(decision)

    def _result(self, values, coefficients, chosen, norms, scale, converged) -> Eigenpairs:
        found, norms = (np.where(self.lost[:, None], np.nan, part) for part in (values[:, chosen], norms))
        vectors, basis = (self._mixed(coefficients[..., places]) for places in (chosen, self._best(self.keep)))
        found, norms, scale = (torch.as_tensor(part).to(self.rows) for part in (found, norms, scale))
        parts = [found, vectors, norms, torch.as_tensor(converged & ~self.lost, device=self.device), scale, basis]
        found, vectors, norms, converged, scale, basis = (part[0] if self.single else part for part in parts)
        method = getattr(self.operator, "method", "exact")
        return Eigenpairs(found, vectors, norms, self.num_products, converged, scale, basis, method)
