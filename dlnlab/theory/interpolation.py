"""Interpolators of X beta = y: least l1 norm, least l2 norm, least hyperbolic entropy, nearest in its divergence.

All take one problem, X (N, D) and y (N,), or a stack, X (P, N, D) and y (P, N) (what is given once is shared), and return
`(beta, residual)`. The residual is the largest relative violation of the optimality (KKT) conditions of the beta that is
returned, recomputed from it, never an iteration's own stopping rule; it never looks at a solver's status. X may be
rank-deficient, and wide or tall. Where no beta interpolates, ValueError says which problem it is.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from dlnlab.theory.hypentropy import asinh_ratio, log_of
from dlnlab.theory.inputs import CONSISTENT, as_problems, in_units, positive, unit

_STACK = 2**22
"""Problems are solved together as long as their matrices hold no more numbers than this."""


def min_l2(X: Any, y: Any) -> tuple[Tensor, Tensor]:
    r"""The interpolator of least l2 norm, `X^+ y`: where gradient flow ends as the initialisation grows.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).

    Returns:
        beta, (D,) or (P, D), and the residual, () or (P,): the larger of `|X beta - y|/(|X|_F |beta| + |y|)` and the part
        of beta outside the range of X^T, over |beta|.

    Raises:
        ValueError: If no interpolator exists, or X or y is not finite.

    Reference:
        woodworth2020 (the limit).

    Example:
        >>> torch.allclose(min_l2([[1.0, 1.0]], [2.0])[0], torch.ones(2, dtype=torch.float64))
        True
    """
    single, X, y, _ = as_problems(X, y)
    X, y, x_unit, y_unit = in_units(X, y)
    rows = Rows(X, y)
    beta = _times(rows.A.mT, rows.c)
    beta = beta + _times(rows.A.mT, rows.reduce(y - _times(X, beta)))
    outside = _norm(beta - _times(rows.A.mT, _times(rows.A, beta)))
    residual = torch.maximum(feasibility(X, y, beta), _ratio(outside, _norm(beta)))
    return _unstack(single, beta * (y_unit / x_unit)[:, None], residual)


def min_l1(X: Any, y: Any, weights: Any = None, return_dual: bool = False) -> tuple[Tensor, ...]:
    r"""An interpolator of least (weighted) l1 norm: where gradient flow ends as the initialisation vanishes.

    .. math:: \min_\beta \sum_i w_i |\beta_i| \;:\; X \beta = y, \qquad
              \max_\nu \langle y, \nu \rangle \;:\; |x_i^T \nu| \le w_i

    A linear program (SciPy's HiGHS, dual simplex); its vertex is then solved for exactly. Where several interpolators
    attain the minimum this is one of them: `min_l1_is_unique` tells.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        weights: w > 0: a number, (D,) or (P, D); 1 by default.
        return_dual: Also return nu.

    Returns:
        beta, (D,) or (P, D); the residual, () or (P,); and, if asked for, the dual nu, (N,) or (P, N). The residual is the
        largest of `|X beta - y|/(|X|_F |beta| + |y|)`, the excess of `|x_i^T nu|/w_i` over 1, and
        `|x_i^T nu/w_i - sign beta_i|` where beta_i is not 0: zero proves beta minimal.

    Raises:
        ValueError: If no interpolator exists, a weight is not positive and finite, or X or y is not finite.

    Reference:
        woodworth2020 (the limit); the certificate is linear programming duality.

    Example:
        The least norm equals the dual's value:

        >>> beta, residual, nu = min_l1([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], [2.0, 1.0], return_dual=True)
        >>> beta.tolist(), nu @ torch.tensor([2.0, 1.0], dtype=torch.float64) == beta.abs().sum()
        ([0.0, 1.0, 0.0], tensor(True))
    """
    single, X, y, (w,) = as_problems(X, y, 1.0 if weights is None else weights)
    w_unit = unit(positive("weights", w), -1)
    w = w / w_unit[:, None]
    X, y, x_unit, y_unit = in_units(X, y)
    rows = Rows(X / w[:, None, :], y)
    solved = [_l1_vertex(A[keep], c[keep]) for A, c, keep in zip(rows.A, rows.c, rows.keep, strict=True)]
    scaled = torch.stack([beta for beta, _ in solved]).to(X)
    beta = scaled / w
    reduced = torch.zeros_like(rows.c)
    for i, (_, nu) in enumerate(solved):
        reduced[i, rows.keep[i]] = nu.to(X)
    nu = rows.expand(reduced)
    slope = _times(X.mT, nu) / w
    excess = (slope.abs() - 1).clamp(min=0)
    gap = torch.where(beta == 0, 0, (slope - beta.sign()).abs())
    residual = torch.maximum(feasibility(X, y, beta), torch.maximum(excess, gap).amax(-1))
    beta, nu = beta * (y_unit / x_unit)[:, None], nu * (w_unit / x_unit)[:, None]
    return _unstack(single, beta, residual, nu) if return_dual else _unstack(single, beta, residual)


def min_l1_is_unique(X: Any, y: Any, weights: Any = None, tol: float = 1e-9) -> Tensor:
    """Whether the interpolator of least (weighted) l1 norm is proved to be the only one.

    It is if the columns of X where a dual constraint is tight are linearly independent. (Where the dual is not unique the
    one found may have more tight constraints than another: True is a proof, False only its absence.)

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        weights: As for `min_l1`.
        tol: A constraint |x_i^T nu| <= w_i counts as tight when it is met to within tol w_i.

    Returns:
        Boolean, () or (P,).

    Raises:
        ValueError: As `min_l1`.

    Example:
        On |beta_1 + beta_2| = 1 every split has the same norm; with unequal columns the larger takes all:

        >>> [bool(min_l1_is_unique([[1.0, a]], [1.0])) for a in (1.0, 2.0)]
        [False, True]
    """
    single, X, y, (w,) = as_problems(X, y, 1.0 if weights is None else weights)
    _, residual, nu = min_l1(X, y, w, return_dual=True)
    slope = _times(X.mT, nu) / w
    unique = []
    for x, tight in zip(X / w[:, None, :], slope.abs() > 1 - tol, strict=True):
        columns = x[:, tight]
        unique.append(int(torch.linalg.matrix_rank(columns)) == columns.shape[1] if columns.shape[1] else True)
    found = torch.tensor(unique, device=X.device) & (residual < tol)
    return found[0] if single else found


def min_hypentropy(X: Any, y: Any, init: Any = None, *, log_init: Any = None) -> tuple[Tensor, Tensor]:
    r"""The interpolator of least hyperbolic entropy: where gradient flow from beta = 0 ends.

    .. math:: \min_\beta \psi_\alpha(\beta) \;:\; X \beta = y

    `min_bregman` with effective initialisation alpha and no perturbation.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        init: alpha > 0 (psi uses its square): a number, (D,) or (P, D).
        log_init: ln alpha instead, where alpha is below floating point.

    Returns:
        beta, (D,) or (P, D), and the residual, () or (P,), as `min_bregman`.

    Raises:
        ValueError: If no interpolator exists, or alpha is not positive and finite.

    Reference:
        woodworth2020; even2023 (gradient flow).

    Example:
        A large initialisation gives the least l2 norm, a small one the least l1 norm:

        >>> X, y = [[1.0, 2.0]], [2.0]
        >>> torch.allclose(min_hypentropy(X, y, 1e3)[0], min_l2(X, y)[0])
        True
        >>> torch.allclose(min_hypentropy(X, y, 1e-9)[0], min_l1(X, y)[0])
        True
    """
    return min_bregman(X, y, init, log_effective_init=log_init)


def min_bregman(
    X: Any,
    y: Any,
    effective_init: Any = None,
    perturbation: Any = None,
    *,
    log_effective_init: Any = None,
    shift: Any = None,
) -> tuple[Tensor, Tensor]:
    r"""The interpolator nearest to beta~_0 in the divergence of the hyperbolic entropy: where (S)GD ends.

    .. math:: \min_\beta D_{\psi_{\alpha_\infty}}(\beta, \tilde\beta_0) \;:\; X \beta = y, \qquad
              \beta = \alpha_\infty^2 \sinh(s + 2 X^T \nu), \quad s = \mathrm{asinh}(\tilde\beta_0/\alpha_\infty^2)

    Solved for nu in the log domain, so alpha_inf may be exp(-5000). A path is followed from `alpha_inf^sigma`, `sigma s`
    with a small sigma, where the problem is nearly linear, to sigma = 1; along it nu becomes affine in sigma as the
    interpolator nears a weighted least l1 norm, so that late steps are long. Newton's method keeps to the path and ends
    it, in rows of X made orthonormal.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        effective_init: alpha_inf > 0: a number, (D,) or (P, D).
        perturbation: beta~_0, likewise; 0 by default.
        log_effective_init: ln alpha_inf, instead of `effective_init`.
        shift: s = (sum of q- less sum of q+)/2, instead of `perturbation`; to be preferred, because beta~_0 can be below
            floating point where s is not small.

    Returns:
        beta, (D,) or (P, D), and the residual, () or (P,): the largest of
        `|X beta - y|/(|X|_F (|beta| + |s w|) + |y|)`, `w^2 = beta^2 + alpha_inf^4` (s w is how far beta was moved), and,
        over coordinates, how far beta_i is from `b_i = alpha_inf^2 sinh(z_i)`, `z = s + 2 X^T nu`: the smaller of
        `|beta_i - b_i|/max|beta|` and, in the mirror's coordinates, `|asinh(beta_i/alpha_inf^2) - z_i|` over the
        largest of |z| and |s| (the first is at rounding where beta_i is next to nothing, the second where alpha_inf is).

    Raises:
        ValueError: If no interpolator exists, alpha_inf is not positive and finite, or an argument is given twice.

    Reference:
        even2023, Theorem 1; the dual and the method are derived here.

    Example:
        A perturbation that interpolates already is its own nearest point:

        >>> X, reference = torch.tensor([[1.0, 2.0, -1.0]]).double(), torch.tensor([0.5, 0.1, 0.2]).double()
        >>> torch.allclose(min_bregman(X, X @ reference, 0.01, reference)[0], reference)
        True
    """
    log_init = log_of(effective_init, log_effective_init)
    if perturbation is not None and shift is not None:
        raise ValueError("perturbation and shift are both given: they are the same thing")
    moved = 0.0 if perturbation is None and shift is None else shift if perturbation is None else perturbation
    single, X, y, (log_init, moved) = as_problems(X, y, log_init, moved)
    for name, value in (("log_effective_init", log_init), ("perturbation or shift", moved)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds a number that is not finite")
    shifts = moved if perturbation is None else asinh_ratio(moved, 2 * log_init)
    X, y, x_unit, y_unit = in_units(X, y)
    log_init = log_init + ((torch.log(x_unit) - torch.log(y_unit)) / 2)[:, None]
    beta, residual = torch.zeros_like(log_init), torch.zeros_like(log_init[:, 0])
    rows = Rows(X, y)
    for chunk in torch.arange(len(y), device=X.device).split(max(1, _STACK // X[0].numel())):
        beta[chunk], residual[chunk] = _bregman(
            rows.A[chunk], rows.c[chunk], -2 * log_init[chunk], shifts[chunk], X[chunk], y[chunk]
        )
    return _unstack(single, beta * (y_unit / x_unit)[:, None], residual)


def feasibility(X: Tensor, y: Tensor, beta: Tensor, moved: Tensor | float = 0.0) -> Tensor:
    """The backward error |X beta - y|/(|X|_F (|beta| + moved) + |y|) of stacked problems, (P,); 0 where all is 0."""
    return _ratio(_norm(_times(X, beta) - y), torch.linalg.matrix_norm(X) * (_norm(beta) + moved) + _norm(y))


class Rows:
    """The same equations with orthonormal rows, A beta = c, from a singular value decomposition.

    Dependent rows become rows of zeros, and `keep` (P, R) is False there.
    """

    def __init__(self, X: Tensor, y: Tensor) -> None:
        shared = X.stride(0) == 0  # one matrix for all problems is decomposed once
        U, S, Vh = torch.linalg.svd(X[:1] if shared else X, full_matrices=False)
        keep = S > max(X.shape[-2:]) * torch.finfo(S.dtype).eps * S[:, :1]
        self.U = (U * keep[:, None, :]).expand(len(y), -1, -1)
        self.S = torch.where(keep, S, 1).expand(len(y), -1)
        self.A = (Vh * keep[..., None]).expand(len(y), -1, -1)
        self.keep = keep.expand(len(y), -1)
        self.c = self.reduce(y)
        outside = _ratio(_norm(y - _times(self.U, _times(self.U.mT, y))), _norm(y))
        if (outside > CONSISTENT).any():
            worst = int(outside.argmax())
            raise ValueError(
                f"problem {worst}: no beta solves X beta = y: y is {outside[worst]:.1e} of its length out of X's range"
            )

    def reduce(self, y: Tensor) -> Tensor:
        """(P, N) -> (P, R)."""
        return _times(self.U.mT, y) / self.S

    def expand(self, nu: Tensor) -> Tensor:
        """The multipliers (P, N) of the equations as given."""
        return _times(self.U, nu / self.S)


class _Path:
    """Points of the path of one stack: exponents, b and w = sqrt(b^2 + a^4), at (theta, sigma).

    `costs` = -2 ln a and `shifts` are scaled by sigma: b = e^(-sigma costs) sinh(sigma shifts + 2 A^T theta).
    """

    def __init__(self, A: Tensor, c: Tensor, costs: Tensor, shifts: Tensor) -> None:
        self.A, self.c, self.costs, self.shifts = A, c, costs, shifts

    def part(self, index: Tensor) -> "_Path":
        return _Path(self.A[index], self.c[index], self.costs[index], self.shifts[index])

    def arguments(self, theta: Tensor, sigma: Tensor) -> Tensor:
        return sigma[:, None] * self.shifts + 2 * _times(self.A.mT, theta)

    def beta(self, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        size = torch.exp((z.abs() - sigma[:, None] * self.costs).clamp(max=690)) / 2
        return z.sign() * size * -torch.expm1(-2 * z.abs()), size * (1 + torch.exp(-2 * z.abs()))

    def residual(self, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """What is missing from c, and its length beside what is there."""
        r = self.c - _times(self.A, b)
        size = _norm(self.c) + _norm(b)
        return r, _ratio((_norm(r) - 2e-15 * _norm(self.shifts * w)).clamp(min=0), size)

    def factor(self, b: Tensor, w: Tensor, damping: float = 1e-14) -> Tensor:
        """The Cholesky factor of the dual's Hessian 2 A diag(w) A^T, a little damped.

        Directions in which nothing of size is left are not determined in floating point; the damping keeps their noise
        from moving nu and is far below what moves beta.
        """
        H = (self.A * (2 * w)[:, None, :]) @ self.A.mT
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        added = damping * (diagonal + torch.maximum(b.abs().amax(-1), self.c.abs().amax(-1))[:, None]) + 1e-290
        diagonal.add_(added)
        for _ in range(16):
            factor, failed = torch.linalg.cholesky_ex(H)
            if not failed.any():
                break
            added = 10 * added
            diagonal.add_(torch.where(failed[:, None] > 0, added, 0))
        return factor


def _bregman(A: Tensor, c: Tensor, costs: Tensor, shifts: Tensor, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`min_bregman` of a stack, with costs = -2 ln alpha_inf."""
    # In units of the largest entry that is in play, a cost is the distance in e-folds from a^2 to it.
    least = torch.log(_times(A.mT, c).abs().amax(-1))
    nearest = shifts.abs() - costs + torch.log(-torch.expm1(-2 * shifts.abs())) - math.log(2)
    log_unit = torch.maximum(least, nearest.amax(-1))
    log_unit = torch.where(torch.isfinite(log_unit), log_unit, 0)
    unit = torch.exp(log_unit)
    costs = costs + log_unit[:, None]
    turn = _graded(A, costs)
    A = turn @ A
    A = torch.where(A.abs() < 1e-14, 0, A)
    path = _Path(A, _times(turn, c) / unit[:, None], costs, shifts)
    theta = _follow(path)
    one = torch.ones_like(unit)
    z = path.arguments(theta, one)
    b, w = path.beta(z, one)
    # z is rounded to 1e-16 of itself and b feels it absolutely: what is left is put right in b itself.
    factor = path.factor(b, w, damping=1e-12)
    for _ in range(3):
        step = _solve(factor, path.c - _times(path.A, b))
        theta = theta + step
        b = b + 2 * w * _times(A.mT, step)
    beta = b * unit[:, None]
    z = path.arguments(theta, one)
    off = (b - path.beta(z, one)[0]).abs()
    off_mirror = torch.where(off == 0, 0, (asinh_ratio(b, -path.costs) - z).abs())
    largest = torch.maximum(z.abs(), shifts.abs()).amax(-1, True)
    off = torch.minimum(_ratio(off, b.abs().amax(-1, True)), _ratio(off_mirror, largest))
    return beta, torch.maximum(feasibility(X, y, beta, _norm(shifts * w) * unit), off.amax(-1))


def _graded(A: Tensor, costs: Tensor) -> Tensor:
    """Rotations of the rows, (P, R, R), after which coordinates of large a^2 = e^-costs see few of them.

    A coordinate whose a^2 is far above what is in play has a z far below 1, and those beside it may have z in the
    hundreds. From rows in which they are mixed the small one could only come out by cancellation. In those of a QR
    decomposition that takes its columns in the order of a^2 each is a sum of terms of its own size.
    """
    P, R, _ = A.shape
    turn = torch.eye(R, dtype=A.dtype, device=A.device).expand(P, R, R)
    if (costs > -5).all() or float((costs.amax(-1) - costs.amin(-1)).max()) < 10:
        return turn
    turn, A = turn.clone(), A.clone()
    each = torch.arange(P, device=A.device)
    for k in range(R):
        left = torch.linalg.vector_norm(A[:, k:], dim=1)
        pivot = torch.where(left > 1e-12, torch.log(left) - costs, -math.inf).argmax(-1)
        v = A[each, k:, pivot].clone()  # Householder's reflection of the pivot's column onto its first entry
        v[:, 0] += torch.where(v[:, 0] < 0, -1, 1) * _norm(v)
        v = v / _norm(v).clamp(min=1e-300)[:, None]
        for M in (A, turn):
            M[:, k:] -= 2 * v[:, :, None] * (v[:, None, :] @ M[:, k:])
    return turn


def _follow(path: _Path, max_iterations: int = 1000) -> Tensor:
    """Theta at sigma = 1, (P, R).

    One Newton system is solved an iteration for each problem that is not done. Close to the path, its solution is
    combined with the path's tangent into a step along it; elsewhere, or at its end, it is a damped Newton step.
    """
    theta_end = torch.zeros_like(path.c)
    index = torch.arange(len(path.c), device=path.c.device)
    spread = torch.maximum(path.costs.amax(-1), path.shifts.abs().amax(-1)).clamp(min=1)
    theta, sigma = torch.zeros_like(path.c), 1 / spread
    stride = sigma.clone()
    best, stalled = torch.full_like(sigma, math.inf), torch.zeros_like(sigma)
    for _ in range(max_iterations):
        z = path.arguments(theta, sigma)
        b, w = path.beta(z, sigma)
        r, error = path.residual(b, w)
        # At the end, an error that no longer shrinks has reached rounding, which grows with z.
        floor = 4e-16 * z.abs().amax(-1).clamp(min=2)
        ended = sigma >= 1
        stalled = torch.where(ended, torch.where(error > 0.5 * best, stalled + 1, 0), 0)
        best = torch.where(ended, torch.minimum(best, error), best)
        done = ended & ((error < 1e-15) | ((stalled >= 8) & (best < 20 * floor)) | (stalled >= 50))
        theta_end[index] = theta
        if done.any():
            if done.all():
                break
            on = ~done
            path, index = path.part(on), index[on]
            theta, sigma, stride, best, stalled = (t[on] for t in (theta, sigma, stride, best, stalled))
            z, b, w, r, error, ended = (t[on] for t in (z, b, w, r, error, ended))
        factor = path.factor(b, w)
        tangent = _times(path.A, path.costs * b - path.shifts * w)
        newton, along = torch.cholesky_solve(torch.stack((r, tangent), -1), factor).unbind(-1)
        near = ~ended & (error < 0.1)
        ahead = torch.minimum(sigma + stride, torch.ones_like(sigma))
        trial = theta + newton + (ahead - sigma)[:, None] * along
        _, error_there = path.residual(*path.beta(path.arguments(trial, ahead), ahead))
        good = near & (error_there < 0.3)
        damped = theta + _line_search(path, z, sigma, r, newton)[:, None] * newton
        theta = torch.where(good[:, None], trial, damped)
        sigma = torch.where(good, ahead, sigma)
        stride = torch.where(good, 3 * stride, torch.where(near, stride / 3, stride))
    return theta_end


def _line_search(path: _Path, z: Tensor, sigma: Tensor, r: Tensor, step: Tensor) -> Tensor:
    """The largest of 1, 1/2, 1/4, ... at which the dual objective's slope along the step is not far past zero."""
    dz = 2 * _times(path.A.mT, step)
    slope = (r * step).sum(-1)
    t = torch.ones_like(sigma)
    for _ in range(60):
        slope_there = (path.beta(z + t[:, None] * dz, sigma)[0] * dz / 2).sum(-1) - (path.c * step).sum(-1)
        far = (slope_there > 0.3 * slope) & (slope_there > 0)
        if not far.any():
            break
        t = torch.where(far, t / 2, t)
    return t


def _l1_vertex(A: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The least l1 norm on A beta = c with orthonormal rows: beta (D,) and the dual (R,)."""
    dim = A.shape[1]
    unit = float((A.mT @ c).abs().max()) if len(c) else 0.0
    if unit == 0:
        return torch.zeros(dim, dtype=A.dtype), torch.zeros(len(c), dtype=A.dtype)
    A, c = A.cpu(), (c / unit).cpu()
    found = linprog(
        np.ones(2 * dim), A_eq=torch.cat((A, -A), 1).numpy(), b_eq=c.numpy(), bounds=(0, None), method="highs-ds"
    )
    if found.x is None:
        raise ValueError(f"the linear program of the least l1 norm was not solved: {found.message}")
    p, m = torch.from_numpy(found.x).unflatten(0, (2, dim))
    beta, nu = p - m, torch.from_numpy(found.eqlin.marginals)
    slope = A.mT @ nu
    tight = slope.abs() > 1 - 1e-6
    nu = nu + _lstsq(A[:, tight].mT, slope.sign()[tight] - slope[tight])
    support = tight & (beta.abs() > 1e-9)
    beta = torch.where(support, beta, 0)
    for _ in range(2):
        beta[support] += _lstsq(A[:, support], c - A @ beta)
    return beta * unit, nu


def _lstsq(M: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.lstsq(M, v[:, None], driver="gelsd").solution[:, 0]


def _solve(factor: Tensor, v: Tensor) -> Tensor:
    return torch.cholesky_solve(v[..., None], factor)[..., 0]


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v[..., None])[..., 0]


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def _ratio(value: Tensor, of: Tensor) -> Tensor:
    return torch.where(value == 0, 0, value / of)


def _unstack(single: bool, *values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value[0] for value in values) if single else values
