"""The Lasso, by following its path."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlnlab.theory.inputs import as_float64, as_problems, in_units, positive


def lasso(X: Any, y: Any, penalty: Any, weights: Any = None) -> tuple[Tensor, Tensor]:
    r"""The (weighted) Lasso.

    .. math:: \min_\beta \frac{1}{2n} |X \beta - y|^2 + \lambda \sum_i w_i |\beta_i|

    The solution is a piecewise linear function of lambda, followed from where it is 0; so lambda = 0 is the limit, the
    interpolator of least l1 norm where there is one. On the support that is found it is then solved for exactly.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        penalty: lambda >= 0, a number or (P,).
        weights: w > 0: a number, (D,) or (P, D); 1 by default.

    Returns:
        beta, (D,) or (P, D), and the residual, () or (P,): the largest violation of the optimality conditions,
        `|x_i^T (X beta - y)|/(n w_i) <= lambda` with equality and the sign opposite to beta_i's where beta_i is not 0, in
        units of the smallest lambda at which beta is 0.

    Raises:
        ValueError: If the penalty is negative, a weight is not positive and finite, or X or y is not finite.

    Reference:
        Osborne, Presnell and Turlach 2000; Efron, Hastie, Johnstone and Tibshirani 2004 (recollected).

    Example:
        With orthogonal features it is soft thresholding:

        >>> beta, _ = lasso([[2.0, 0.0], [0.0, 2.0]], [2.0, -0.4], penalty=0.5)
        >>> beta.abs().tolist()
        [0.75, 0.0]
    """
    given = as_float64(penalty)
    if given.ndim > 1 or not bool(torch.isfinite(given).all()) or bool((given < 0).any()):
        raise ValueError(f"penalty = {penalty}: must be a number of at least 0, or one for each problem")
    single, X, y, (w,) = as_problems(X, y, 1.0 if weights is None else weights)
    positive("weights", w)
    if given.ndim and len(X) == 1:  # one problem, several penalties
        single, X, y, w = False, X.expand(len(given), -1, -1), y.expand(len(given), -1), w.expand(len(given), -1)
    scaled, y, x_unit, y_unit = in_units(X / w[:, None, :], y)
    scaled, targets = scaled.cpu().numpy(), y.cpu().numpy()
    lams = (given.to(X) / x_unit / y_unit).cpu().numpy()
    found = [_follow(A, b, lam) for A, b, lam in zip(scaled, targets, lams, strict=True)]
    beta = torch.from_numpy(np.stack([b for b, _ in found])).to(X) * (y_unit / x_unit)[:, None] / w
    residual = torch.tensor([r for _, r in found]).to(X)
    return (beta[0], residual[0]) if single else (beta, residual)


def _follow(A: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The solution with unit weights, and its residual."""
    n, dim = A.shape
    start = A.T @ y / n
    lam = top = float(np.abs(start).max())
    beta, signs, dropped, left = np.zeros(dim), np.zeros(dim), -1, 0.0
    if lam <= penalty:
        return beta, 0.0
    first = int(np.abs(start).argmax())
    active, signs[first] = [first], np.sign(start[first])
    rank = np.linalg.matrix_rank(A)
    for _ in range(20 * (n + dim)):
        slope = A.T @ (y - A @ beta) / n
        step = np.linalg.lstsq(A[:, active].T @ A[:, active] / n, signs[active], rcond=None)[0]
        fall = A.T @ (A[:, active] @ step) / n
        until = np.full(dim, np.inf)  # the fall of lambda after which a coordinate joins, or leaves
        # As many as the rank interpolate at lambda = 0: none joins before.
        out = np.setdiff1d(np.arange(dim), active) if len(active) < rank else np.array([], int)
        with np.errstate(divide="ignore", invalid="ignore"):
            for sign in (1, -1):
                reach = (lam - sign * slope[out]) / (1 - sign * fall[out])
                # Within one piece nothing comes back to the bound it has just left, nor to one that falls faster.
                reach[((out == dropped) & (left == sign)) | (sign * fall[out] >= 1)] = np.inf
                until[out] = np.minimum(until[out], np.maximum(reach, 0))
            leave = -beta[active] / step
            until[active] = np.where((leave > 0) & (beta[active] != 0), leave, np.inf)
        change = int(until.argmin())
        if until[change] >= (1 - 1e-9) * (lam - penalty):
            break
        fell = float(until[change])
        beta[active] += fell * step
        lam -= fell
        dropped = -1
        if change in active:
            active.remove(change)
            dropped, left = change, signs[change]
            beta[change], signs[change] = 0.0, 0.0
        else:
            active.append(change)
            signs[change] = np.sign(slope[change] - fell * fall[change])
    gram = A[:, active].T @ A[:, active] / n
    beta[active] = np.linalg.lstsq(gram, start[active] - penalty * signs[active], rcond=None)[0]
    slope = A.T @ (y - A @ beta) / n
    broken = np.where(beta == 0, np.maximum(np.abs(slope) - penalty, 0), np.abs(slope - penalty * np.sign(beta)))
    return beta, float(broken.max() / top)
