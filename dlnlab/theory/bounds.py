r"""What batches of b samples do on average: moments of gradients and Hessians, and the gain that follows from them.

Everything depends on the batch through one weight, :math:`w = 1/b` with replacement and :math:`(n - b)/(b(n - 1))` without:
the second moment of a batch mean is w times the samples' second moment and 1 - w times the square of their mean.

X is (N, D) or (P, N, D) throughout, H = X^T X/N, H_B the same over a batch. `sampling` is `replacement`, `subset`
(distinct indices) or `epochs` (each batch alone is a subset).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.streams import SAMPLINGS
from dlnlab.theory.inputs import as_float64

ENUMERATED = 20_000
"""Batches are gone through one by one where there are no more than this."""


def batch_weight(batch_size: int, num_samples: int, sampling: str = "replacement") -> float:
    """The weight w of single samples in second moments of batch means: 1/b, or (n - b)/(b (n - 1)) without replacement.

    Args:
        batch_size: b, from 1 to num_samples (with replacement any size).
        num_samples: n.
        sampling: `replacement`, `subset` or `epochs`.

    Returns:
        w in [0, 1]; 0 for the full set without replacement.

    Raises:
        ValueError: If the batch size or sampling is not one.

    Reference:
        Derived here (the weight is also in Mulayoff & Michaeli 2306.07850).

    Example:
        >>> [batch_weight(b, 5, "subset") for b in (1, 5)], batch_weight(5, 5, "replacement")
        ([1.0, 0.0], 0.2)
    """
    checks.one_of("sampling", sampling, SAMPLINGS)
    checks.integer("num_samples", num_samples, at_least=1)
    if sampling == "replacement":
        return 1 / checks.integer("batch_size", batch_size, at_least=1)
    checks.integer("batch_size", batch_size, at_least=1, at_most=num_samples)
    return 0.0 if batch_size == num_samples else (num_samples - batch_size) / (batch_size * (num_samples - 1))


def hessian_second_moment(X: Any, batch_size: int, sampling: str = "replacement") -> Tensor:
    r"""E[H_B^2] over batches, :math:`w M + (1 - w) H^2` with :math:`M = \frac1n \sum_i |x_i|^2 x_i x_i^T`.

    Args:
        X: Inputs (N, D) or (P, N, D).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        (D, D) or (P, D, D).

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        Derived here.

    Example:
        The full set without replacement has no noise:

        >>> X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]).double()
        >>> torch.allclose(hessian_second_moment(X, 3, "subset"), torch.linalg.matrix_power(X.T @ X / 3, 2))
        True
    """
    X = as_float64(X)
    n = X.shape[-2]
    w = batch_weight(batch_size, n, sampling)
    H = X.mT @ X / n
    M = X.mT @ (X * (X * X).sum(-1, keepdim=True)) / n
    return w * M + (1 - w) * H @ H


def gain_bounds(X: Any, batch_size: int, sampling: str = "replacement") -> tuple[Tensor, Tensor]:
    r"""The extreme constants with :math:`\lambda_b H \le E[H_B^2] \le \Lambda_b H`.

    They bound the expected gain by the losses along the way, while |gamma g| <= 0.8926,

    .. math:: 2 \lambda_b \gamma^2 \sum_k E L(\beta_k) \le E|\mathrm{Gain}|_1 \le 4 \Lambda_b \gamma^2 \sum_k E L(\beta_k).

    In the left singular vectors U of X, on its range, E[H_B^2] relative to H is `w U^T diag|x_i|^2 U + (1 - w) S^2/n`.

    Args:
        X: Inputs (N, D) or (P, N, D).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        lambda_b and Lambda_b, () or (P,): the extreme generalised eigenvalues on the range of X^T.

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        even2023, section 3 (that such bounds hold); the constants here are derived, with proof.

    Example:
        For GD they are the extreme positive eigenvalues of H:

        >>> X = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).double()
        >>> [bound.item() for bound in gain_bounds(X, 2, "subset")]
        [0.5, 2.0]
    """
    X = as_float64(X)
    n = X.shape[-2]
    w = batch_weight(batch_size, n, sampling)
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    keep = S > max(X.shape[-2:]) * torch.finfo(S.dtype).eps * S[..., :1]
    U = U * keep[..., None, :]
    relative = w * U.mT @ (U * (X * X).sum(-1, keepdim=True)) + torch.diag_embed((1 - w) * S * S / n * keep)
    eigenvalues = torch.linalg.eigvalsh(relative)  # 0 for each direction outside the range
    lowest = eigenvalues.gather(-1, (~keep).sum(-1, keepdim=True).clamp(max=S.shape[-1] - 1))[..., 0]
    return lowest, eigenvalues[..., -1]


def expected_gain_bounds(
    lr: Any, loss_sum: Any, X: Any, batch_size: int, sampling: str = "replacement"
) -> tuple[Tensor, Tensor]:
    """The bounds 2 lambda_b lr^2 sum E L and 4 Lambda_b lr^2 sum E L on the expected l1 norm of the gain.

    They hold in expectation over batches while max|lr g| <= 0.8926, at every step size.

    Args:
        lr: gamma, broadcastable with `loss_sum`.
        loss_sum: The sum over steps of E L(beta_k), L = |X beta - y|^2/(2N), () or (P,).
        X: Inputs (N, D) or (P, N, D).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        Derived here; see `gain_bounds`.

    Example:
        >>> lower, upper = expected_gain_bounds(0.1, 1.0, torch.eye(2), 1)
        >>> lower.item() <= upper.item() == 4 * 0.1**2
        True
    """
    low, high = gain_bounds(X, batch_size, sampling)
    lr = as_float64(lr, low)
    loss = lr * as_float64(loss_sum, low)  # times each in turn: lr^2 alone may leave the range of numbers
    return 2 * (loss * low * lr), 4 * (loss * high * lr)


def gradient_second_moment(X: Any, residual: Any, batch_size: int, sampling: str = "replacement") -> Tensor:
    r"""E[(grad L_B)_i^2] over batches, :math:`\frac wn \sum_j x_{ji}^2 r_j^2 + (1 - w) g_i^2`, g = X^T r/n.

    Args:
        X: Inputs (N, D) or (P, N, D).
        residual: r = X beta - y, (N,) or (P, N).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        (D,) or (P, D).

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        Derived here.

    Example:
        Its sum is the residual's energy in E[H_B^2]:

        >>> X, error = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]]).double(), torch.tensor([1.0, 2.0]).double()
        >>> total = gradient_second_moment(X, X @ error, 2).sum()
        >>> torch.allclose(total, error @ hessian_second_moment(X, 2) @ error)
        True
    """
    X = as_float64(X)
    r = as_float64(residual, X)
    n = X.shape[-2]
    w = batch_weight(batch_size, n, sampling)
    single = (X * r[..., None]).square().mean(-2)
    mean = (X.mT @ r[..., None])[..., 0] / n
    return w * single + (1 - w) * mean * mean


def initial_gradient_second_moment(teacher: Any, batch_size: int, input_std: float = 1.0) -> Tensor:
    r"""E[(grad L_B)_j^2] at beta = 0 over batches and data, inputs N(0, s^2 I), y = X beta*, no label noise.

    .. math:: s^4 \big( \beta_j^{*2} + (|\beta^*|^2 + \beta_j^{*2})/b \big)

    SGD's gradients are spread over all coordinates, GD's (b = n) lie on the support.

    Args:
        teacher: beta*, (..., D).
        batch_size: b distinct samples; n for GD.
        input_std: s.

    Returns:
        (..., D).

    Reference:
        even2023, Propositions 3 and 4 (subject); the exact form is derived here.

    Example:
        Off the support one sample of 20 has 20 times the full batch's moment:

        >>> sgd, gd = (initial_gradient_second_moment([1.0, 0.0], b)[1] for b in (1, 20))
        >>> round((sgd / gd).item())
        20
    """
    checks.integer("batch_size", batch_size, at_least=1)
    square = (input_std * (input_std * as_float64(teacher))) ** 2
    return square + (square.sum(-1, keepdim=True) + square) / batch_size


def leading_gain(
    lr: Any,
    X: Any,
    residual_integral: Any,
    gradient_integral: Any,
    batch_size: int,
    sampling: str = "replacement",
) -> Tensor:
    r"""The gain to leading order in the step size, :math:`\gamma [ w M_i + (1 - w) I_i ]`.

    .. math:: M_i = \frac1n \sum_j x_{ji}^2 \int r_j^2 dt, \qquad I_i = \int g_i^2 dt

    along gradient flow. Within 1 % at 0.005 of 2/sharpness. For GD (w = 0) it lives where the gradient does, on the
    support; the linear scaling rule lr/b holds where M dominates and w is nearly 1/b.

    Args:
        lr: gamma, broadcastable with (..., D).
        X: Inputs (N, D) or (P, N, D).
        residual_integral: The flow's time integral of r_j^2, (N,) or (P, N).
        gradient_integral: The flow's time integral of g_i^2, (D,) or (P, D).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        The gain, (D,) or (P, D).

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        Derived here.

    Example:
        One sample: the flow of r' = -r has both integrals r^2/2, and every batch is the full one.

        >>> leading_gain(0.01, [[1.0]], [0.5], [0.5], 1)
        tensor([0.0050], dtype=torch.float64)
    """
    X = as_float64(X)
    w = batch_weight(batch_size, X.shape[-2], sampling)
    samples = (X * (X * as_float64(residual_integral, X)[..., None])).mean(-2)
    lr = as_float64(lr, X)
    return lr * (w * samples + (1 - w) * as_float64(gradient_integral, X))


def batch_smoothness(X: Any, batch_size: int, sampling: str = "replacement") -> tuple[Tensor, bool]:
    """The largest curvature of any batch's loss in beta, L = max over batches of lambda_max(H_B), or a bound on it.

    With replacement the worst batch repeats the longest row, so L = max|x_i|^2 for every b. Without it all batches are
    gone through where they are at most 20,000; else the least of three upper bounds is returned: n/b times lambda_max(H),
    the mean of the b largest |x_i|^2, and the largest sum of b entries in a row of |X X^T|, over b.

    Args:
        X: Inputs (N, D) or (P, N, D).
        batch_size: b.
        sampling: See `batch_weight`.

    Returns:
        L, () or (P,), and whether it is exact (else an upper bound).

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        The L of even2023's gamma <= c/(L B); its evaluation is derived here.

    Example:
        >>> batch_smoothness([[3.0, 0.0], [0.0, 2.0]], 2, "subset")
        (tensor(4.5000, dtype=torch.float64), True)
    """
    X = as_float64(X)
    n, b = X.shape[-2], batch_size
    batch_weight(b, n, sampling)
    gram = X @ X.mT
    squares = gram.diagonal(dim1=-2, dim2=-1)
    if sampling == "replacement" or b == 1:
        return squares.amax(-1), True
    if math.comb(n, b) <= ENUMERATED:
        best = torch.zeros_like(squares[..., 0])
        batches = torch.tensor(list(itertools.combinations(range(n), b)), device=X.device)
        for index in batches.split(2000):
            blocks = gram[..., index[:, :, None], index[:, None, :]]
            best = torch.maximum(best, torch.linalg.eigvalsh(blocks)[..., -1].amax(-1))
        return best / b, True
    whole = torch.linalg.eigvalsh(gram)[..., -1] / b
    longest = squares.topk(b, dim=-1).values.mean(-1)
    rows = gram.abs().topk(b, dim=-1).values.sum(-1).amax(-1) / b
    return torch.minimum(torch.minimum(whole, longest), rows), False


def gamma_LB(lr: Any, X: Any, batch_size: int, beta_max: Any, sampling: str = "replacement") -> Tensor:
    """The step size in units of even2023's condition, lr L B: a number to compare runs by, never a verdict.

    The paper proves convergence for gamma <= c/(L B) with a numerical c that no source here states; L is
    `batch_smoothness` (which says whether it is exact), B bounds the iterates.

    Args:
        lr: gamma, broadcastable with (P,).
        X: Inputs (N, D) or (P, N, D).
        batch_size: b.
        beta_max: B: the largest |beta_k|_inf of the run.
        sampling: See `batch_weight`.

    Returns:
        lr L B, () or (P,).

    Raises:
        ValueError: As `batch_weight`.

    Reference:
        even2023 (the condition's form).

    Example:
        >>> gamma_LB(0.1, [[3.0, 0.0], [0.0, 2.0]], 1, 2.0)
        tensor(1.8000, dtype=torch.float64)
    """
    smoothness, _ = batch_smoothness(X, batch_size, sampling)
    return as_float64(lr, smoothness) * smoothness * as_float64(beta_max, smoothness)
