r"""How stable an interpolator is: its sharpness, and the largest step sizes at which (S)GD stays at it.

Near an interpolator the residuals r = X (beta - beta_inf) move linearly, and all that matters of the weights is
:math:`h = u^2 + v^2 = 2\sqrt{\beta^2 + \alpha_k^4}`: a batch B takes r to `r - (gamma/b) K N_B r`, with K = X diag(h) X^T
and N_B counting how often each sample is drawn. `init` is alpha_k, the effective initialisation at that moment.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlnlab import checks, streams
from dlnlab.theory.bounds import batch_weight
from dlnlab.theory.inputs import as_float64, as_problems, in_units
from dlnlab.theory.interpolation import Rows, min_hypentropy, min_l1, min_l2

_STACK = 2**23
_FLAT = 1e-13
"""Directions with less than this part of the largest curvature are left out of Lyapunov exponents: they are rounding."""


@dataclass(frozen=True)
class Interpolator:
    """A solution of X beta = y with what its weights have kept of the initialisation.

    Args:
        x: Inputs (N, D) or (P, N, D).
        beta: (D,) or (P, D).
        init: Effective initialisation alpha_k, a number, (D,) or (P, D); 0 where it is below floating point.
    """

    x: Any
    beta: Any
    init: Any

    def stacked(self) -> tuple[bool, Tensor, Tensor]:
        """Whether there is a single problem, X (P, N, D), and h = u^2 + v^2 (P, D)."""
        x = as_float64(self.x)
        single, x, _, (beta, init) = as_problems(x, torch.zeros_like(x[..., 0]), self.beta, self.init)
        return single, x, weight_square(beta, init)


@dataclass(frozen=True)
class Stability:
    """What `stability` returns: thresholds of one interpolator, or of a stack.

    Attributes:
        interpolator: Whose they are.
        batch_size: b.
        sampling: How batches are drawn.
        sharpness: Largest eigenvalue of the loss's Hessian in the weights, () or (P,).
        edge: 2/sharpness: gradient descent with a larger step leaves the interpolator. Infinite without curvature (X = 0).
        mean_square_edge: The step size up to which E|r|^2 decays; likewise.
    """

    interpolator: Interpolator
    batch_size: int
    sampling: str
    sharpness: Tensor
    edge: Tensor
    mean_square_edge: Tensor

    def lyapunov(self, lr: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The top Lyapunov exponent at step sizes `lr`, and its standard error: see `lyapunov`."""
        return lyapunov(self.interpolator, lr, self.batch_size, self.sampling, **options)

    def almost_sure_edge(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The step size where that exponent passes 0, and its standard error: see `almost_sure_edge`."""
        return almost_sure_edge(self.interpolator, self.batch_size, self.sampling, **options)


def weight_square(beta: Any, init: Any) -> Tensor:
    r"""The squared weights behind a predictor, :math:`u^2 + v^2 = 2\sqrt{\beta^2 + \alpha_k^4}` (exact, at every step).

    Args:
        beta: (..., D).
        init: alpha_k, broadcastable with beta.

    Returns:
        (..., D).

    Reference:
        Derived here, from u^2 - v^2 = 2 alpha_k^2 and beta = u v.

    Example:
        >>> u, v = torch.tensor(2.0), torch.tensor(0.5)
        >>> torch.allclose(weight_square(u * v, ((u**2 - v**2) / 2) ** 0.5).float(), u**2 + v**2)
        True
    """
    beta = as_float64(beta)
    return 2 * torch.hypot(beta, as_float64(init, beta) ** 2)


def sharpness(X: Any, weight_square: Any) -> Tensor:
    r"""The loss's sharpness at an interpolator, :math:`\lambda_{\max}(X \,\mathrm{diag}(u^2 + v^2)\, X^T/n)`.

    There the Hessian has no residual part; elsewhere this is its Gauss-Newton part.

    Args:
        X: Inputs (N, D) or (P, N, D).
        weight_square: u^2 + v^2, (D,) or (P, D).

    Returns:
        () or (P,).

    Raises:
        ValueError: If a curvature is not finite.

    Reference:
        Derived here.

    Example:
        >>> sharpness([[1.0, 2.0]], [3.0, 1.0])  # 1 * 3 + 4 * 1
        tensor(7., dtype=torch.float64)
    """
    X = as_float64(X)
    return torch.linalg.eigvalsh(_kernel(X, as_float64(weight_square, X)))[..., -1] / X.shape[-2]


def _kernel(X: Tensor, weight_square: Tensor) -> Tensor:
    """K = X diag(h) X^T."""
    K = (X * weight_square[..., None, :]) @ X.mT
    if not torch.isfinite(K).all():
        raise ValueError("X diag(u^2 + v^2) X^T: X, beta and init must be finite, and small enough that it is")
    return K


def trace_flattest_interpolator(X: Any, y: Any) -> tuple[Tensor, Tensor]:
    r"""The interpolator with the least trace of the Hessian, as alpha_k -> 0.

    A weighted least l1 norm, :math:`\min \frac2n \sum_j |X_j|^2 |\beta_j| : X \beta = y`, X_j the columns of X.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).

    Returns:
        beta, (D,) or (P, D), and the residual of `min_l1`, () or (P,).

    Raises:
        ValueError: If no interpolator exists.

    Reference:
        Derived here.

    Example:
        A column twice as long needs half of beta, but bends the loss four times as much for it:

        >>> beta, _ = trace_flattest_interpolator([[1.0, 2.0]], [2.0])
        >>> torch.allclose(beta, torch.tensor([2.0, 0.0]).double())
        True
    """
    X = as_float64(X)
    weights = 2 * (X * X).sum(-2) / X.shape[-2]
    return min_l1(X, y, torch.where(weights == 0, 1, weights))


def flattest_interpolator(X: Any, y: Any, return_bound: bool = False) -> tuple[Tensor, ...]:
    r"""The interpolator of least sharpness, as alpha_k -> 0: where gradient descent can converge with the largest steps.

    .. math:: \min_\beta \lambda_{\max}\Big(\tfrac2n X \,\mathrm{diag}|\beta|\, X^T\Big) : X \beta = y
              \;=\; \max_{Z \succeq 0, \mathrm{tr} Z = 1,\, \nu} \langle y, \nu \rangle :
              |x_j^T \nu| \le \tfrac2n x_j^T Z x_j

    A semidefinite program in N x N matrices, solved by a barrier method on `|beta_j| <= s_j`. The right-hand side at its
    final Z, a weighted least l1 norm, is a lower bound that proves how near the answer is to the minimum.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        return_bound: Also return the lower bound.

    Returns:
        beta, (D,) or (P, D); its sharpness, () or (P,); if asked for, the bound, () or (P,).

    Raises:
        ValueError: If no interpolator exists.

    Reference:
        The program: derived here. That GD needs lr <= 2/sharpness of it: dynamical stability (Nacson et al. 2022).

    Example:
        >>> beta, least, bound = flattest_interpolator([[1.0, 1.0]], [1.0], return_bound=True)
        >>> round(least.item(), 6), round(bound.item(), 6)
        (2.0, 2.0)
    """
    single, X, y, _ = as_problems(X, y)
    X, y, x_unit, y_unit = in_units(X, y)
    n = X.shape[1]
    rows = Rows(X, y)
    start, _ = min_l2(X, y)
    unit = torch.where(y.abs().amax(-1) == 0, 1, start.abs().amax(-1))[:, None]
    size = torch.linalg.matrix_norm(X)
    scaled = X / torch.where(size == 0, 1, size)[:, None, None]
    beta = torch.zeros_like(start)
    Z = torch.eye(n, dtype=X.dtype, device=X.device).repeat(len(X), 1, 1) / n
    posed = (y != 0).any(-1)  # else the answer is 0, which no barrier reaches
    if posed.any():
        beta[posed], Z[posed] = _least_sharpness(scaled[posed], rows.A[posed], rows.keep[posed], (start / unit)[posed])
    beta = beta * unit
    beta = beta + (rows.A.mT @ (rows.c[..., None] - rows.A @ beta[..., None]))[..., 0]
    least = sharpness(X, 2 * beta.abs())
    found = (beta * (y_unit / x_unit)[:, None], least * x_unit * y_unit)
    if return_bound:
        weights = 2 * (X * (Z @ X)).sum(1) / n
        nearest, _ = min_l1(X, y, torch.where(weights > 0, weights, 1))
        found = (*found, (weights * nearest.abs()).sum(-1) * x_unit * y_unit)
    return tuple(value[0] for value in found) if single else found


def _least_sharpness(X: Tensor, A: Tensor, keep: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`flattest_interpolator` of inputs and a solution of order 1, subject to A (step of beta) = 0.

    Minimises t/mu - ln det(t I - X diag(s) X^T) - sum ln(s^2 - beta^2) for mu -> 0 by Newton's method.

    Returns:
        beta, and Z of trace 1.
    """
    P, n, D = X.shape
    eye = torch.eye(n, dtype=X.dtype, device=X.device)
    s = beta.abs() + 0.1
    t = 2 * torch.linalg.eigvalsh((X * s[:, None, :]) @ X.mT)[:, -1] + 1e-3
    R = A.shape[1]
    b_part, s_part, t_part = slice(0, D), slice(D, 2 * D), 2 * D
    system = torch.zeros(P, 2 * D + 1 + R, 2 * D + 1 + R, dtype=X.dtype, device=X.device)
    system[:, 2 * D + 1 :, b_part] = A
    system[:, b_part, 2 * D + 1 :] = A.mT
    dropped = torch.arange(2 * D + 1, 2 * D + 1 + R, device=X.device)
    system[:, dropped, dropped] = -(~keep).double()
    each = torch.arange(D, device=X.device)

    def barrier(beta: Tensor, s: Tensor, t: Tensor, mu: float) -> Tensor:
        inside = ((s + beta) > 0).all(-1) & ((s - beta) > 0).all(-1)
        factor, failed = torch.linalg.cholesky_ex(t[:, None, None] * eye - (X * s[:, None, :]) @ X.mT)
        log_det = 2 * torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)
        value = t / mu - log_det - torch.log(s + beta).sum(-1) - torch.log(s - beta).sum(-1)
        return torch.where(inside & (failed == 0), value, torch.inf).nan_to_num(nan=torch.inf)

    mu = 1.0
    while mu > 1e-9 / (n + 2 * D):
        mu = 0.2 * mu
        for _ in range(30):
            G = torch.linalg.inv(t[:, None, None] * eye - (X * s[:, None, :]) @ X.mT)
            GX = G @ X
            p, m = 1 / (s + beta), 1 / (s - beta)
            gradient = torch.cat(
                ((m - p), (X * GX).sum(1) - p - m, (1 / mu - G.diagonal(dim1=1, dim2=2).sum(-1))[:, None]), 1
            )
            system[:, each, each] = p * p + m * m
            system[:, each, D + each] = system[:, D + each, each] = p * p - m * m
            system[:, s_part, s_part] = (X.mT @ GX) ** 2 + torch.diag_embed(p * p + m * m)
            system[:, s_part, t_part] = system[:, t_part, s_part] = -(GX * GX).sum(1)
            system[:, t_part, t_part] = (G * G).sum((1, 2))
            wanted = torch.cat((-gradient, torch.zeros_like(A[:, :, 0])), 1)
            # Scaled to a unit diagonal: entries span the square of the barrier's range.
            scale = torch.cat((system.diagonal(dim1=1, dim2=2)[:, : 2 * D + 1] ** -0.5, torch.ones_like(A[:, :, 0])), 1)
            step = torch.linalg.solve(system * scale[:, :, None] * scale[:, None, :], wanted * scale) * scale
            decrement = -(gradient * step[:, : 2 * D + 1]).sum(-1)
            now, length = barrier(beta, s, t, mu), torch.ones_like(t)
            for _ in range(50):
                k = length[:, None]
                there = barrier(beta + k * step[:, b_part], s + k * step[:, s_part], t + length * step[:, t_part], mu)
                poor = there > now - 0.1 * length * decrement + 1e-12 * now.abs()
                if not poor.any():
                    break
                length = torch.where(poor, length / 2, length)
            length = torch.where(poor, 0, length)
            beta, s = beta + length[:, None] * step[:, b_part], s + length[:, None] * step[:, s_part]
            t = t + length * step[:, t_part]
            if (decrement < 1e-6).all() or not (length > 0).any():
                break
    Z = G / G.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    return beta, Z


def stability(interpolator: Interpolator, batch_size: int, sampling: str = "replacement") -> Stability:
    r"""The step sizes up to which (S)GD stays at an interpolator.

    The mean-square edge is where the operator on symmetric matrices that takes the second moment of one step to the
    next has spectral radius 1, `gamma = 2/lambda_max(C^-1 D)`, with `C S = (H S + S H)/2` and
    `D S = E[A_B S A_B] = (1 - w) H S H + w/n sum a_i a_i^T S a_i a_i^T`; a_i a_i^T are the samples' Hessians, H their mean.
    For b = 1 it is `1/rho(T)`, `T_ij = sum_ab V_ia V_ib V_ja V_jb L_a L_b/(L_a + L_b)`, X diag(h) X^T = V diag(L) V^T. For
    GD it is 2/sharpness.

    Args:
        interpolator: (X, beta, effective initialisation), or a stack.
        batch_size: b.
        sampling: `replacement`, `subset`, or `epochs`, whose batches are taken as independent subsets.

    Returns:
        Thresholds, and methods for the almost-sure one.

    Raises:
        ValueError: If shapes do not fit, or the batch size or sampling is not one.

    Reference:
        Derived here; for general b also Mulayoff & Michaeli 2306.07850.

    Example:
        One sample: SGD is GD.

        >>> found = stability(Interpolator([[1.0, 2.0]], [0.0, 1.0], 0.0), 1)
        >>> found.edge, found.mean_square_edge
        (tensor(0.2500, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    single, X, h = interpolator.stacked()
    n = X.shape[1]
    w = batch_weight(batch_size, n, sampling)
    L, V = torch.linalg.eigh(_kernel(X, h))
    L = L.clamp(min=0)
    top = L[:, -1] / n
    step = max(1, _STACK // n**3)
    edges = torch.cat(
        [_mean_square_edge(values, vectors, w) for values, vectors in zip(L.split(step), V.split(step), strict=True)]
    )
    found = (top, 2 / top, edges)
    top, edge, mean_square = (value[0] for value in found) if single else found
    return Stability(interpolator, batch_size, sampling, top, edge, mean_square)


def _mean_square_edge(L: Tensor, V: Tensor, w: float) -> Tensor:
    """2/lambda_max(C^-1 D), (P,), from K = V diag(L) V^T (P, n, n)."""
    n = L.shape[-1]
    unit = torch.where(L[:, -1:] == 0, 1, L[:, -1:])
    L = L / unit
    total = L[:, :, None] + L[:, None, :]
    F = torch.where(total == 0, 0, L[:, :, None] * L[:, None, :] / torch.where(total == 0, 1, total))
    pairs = (V[:, :, None, :] * V[:, None, :, :]).flatten(1, 2)  # (P, n^2, n)

    def radius(weights: Tensor) -> Tensor:
        T = ((pairs @ weights) * pairs).sum(-1).unflatten(1, (n, n))
        return torch.linalg.eigvalsh(T)[:, -1]

    # C^-1 D is a diagonal, 2 (1-w) F/n, and w times a sum of n rank-one parts. Its largest eigenvalue x solves
    # radius(2 w F/(x - diagonal)) = 1, whose left side falls from infinity to 0 beyond the diagonal's largest entry: its
    # reciprocal is nearly linear, so false positions (Illinois) find x in a few steps.
    diagonal = 2 * (1 - w) * F / n
    low = diagonal.amax((1, 2))
    flat = (total == 0).all((1, 2))  # without curvature no step size is too large
    if w == 0:
        return 2 / (low * unit[:, 0])
    high = x = low + 2 * w * radius(F)
    f_low = -torch.ones_like(low)
    f_high = torch.full_like(low, torch.nan)
    for _ in range(60):
        weights = torch.where(flat[:, None, None], 1, 2 * w * F / (x[:, None, None] - diagonal))
        f = torch.where(flat, 0, 1 / radius(weights) - 1)
        if (f.abs() < 1e-13).all():
            break
        above = f > 0
        f_low = torch.where(above, f_low / 2, f)
        f_high = torch.where(above | f_high.isnan(), f, f_high / 2)
        low, high = torch.where(above, low, x), torch.where(above, x, high)
        x = torch.where(f == 0, x, low - f_low * (high - low) / (f_high - f_low))
    return 2 / (x * unit[:, 0])


def mean_square_edge(X: Any, y: Any, init: Any, batch_size: int = 1, sampling: str = "replacement") -> Tensor:
    """The step size up to which SGD is mean-square stable where gradient flow ends.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        init: alpha, a number, (D,) or (P, D).
        batch_size: b.
        sampling: See `stability`.

    Returns:
        () or (P,).

    Raises:
        ValueError: If no interpolator exists, or as `stability`.

    Reference:
        Derived here.

    Example:
        >>> torch.allclose(mean_square_edge([[2.0]], [1.0], 1e-9), torch.tensor(0.5).double())
        True
    """
    beta, _ = min_hypentropy(X, y, init)
    return stability(Interpolator(X, beta, init), batch_size, sampling).mean_square_edge


def lyapunov(
    interpolator: Interpolator,
    lr: Any,
    batch_size: int = 1,
    sampling: str = "replacement",
    num_steps: int = 2000,
    num_chains: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""The top Lyapunov exponent of (S)GD near an interpolator: almost surely |r_k| goes as exp(k times it).

    Negative: the iterates converge to the interpolator from nearby, even where their mean square explodes. Estimated
    from `num_chains` independent runs of the linearised step, after `num_steps`/10 steps that are not counted; all step
    sizes and problems see the same batches (`dlnlab.streams`), so that differences between them are not noise.

    Args:
        interpolator: (X, beta, effective initialisation), or a stack.
        lr: gamma: a number or (R,); for a stack a number, (P,) or (P, R).
        batch_size: b.
        sampling: `replacement`, `subset` or `epochs`.
        num_steps: Steps that are averaged over.
        num_chains: Independent chains, at least 2.
        seed: Root of their random numbers.

    Returns:
        The exponent a step and its standard error (over chains), of lr's shape, (P,) at least for a stack. Where a step
        takes all residuals to 0, or X is 0 and there are none, the exponent is minus infinity and has no error (NaN).

    Raises:
        ValueError: If shapes do not fit, or the batch size or sampling is not one.

    Reference:
        Chemnitz & Engel 2407.20209 (that its sign decides); the estimate is plain Monte Carlo.

    Example:
        With one sample of curvature 4 every step multiplies by 1 - 4 lr:

        >>> exponent, error = lyapunov(Interpolator([[1.0, 1.0]], [2.0, 0.0], 0.0), [0.1, 0.6], num_steps=10)
        >>> torch.allclose(exponent, torch.tensor([0.6, 1.4]).double().log())
        True
    """
    single, X, h = interpolator.stacked()
    n = X.shape[1]
    batch_weight(batch_size, n, sampling)
    checks.integer("num_steps", num_steps, at_least=1)
    checks.integer("num_chains", num_chains, at_least=2)
    lr = as_float64(lr, X)
    rates = lr.expand(len(X)) if lr.ndim == 0 else lr
    rates = rates.reshape(1, -1) if single else rates.reshape(len(X), -1)
    # K = a a^T. In r = a z the step is z - gamma/b sum a_i (a_i z): symmetric, and within the range of K also as rounded,
    # outside of which nothing would decay.
    L, V = torch.linalg.eigh(_kernel(X, h))
    present = L > _FLAT * L[:, -1:]
    a = V * torch.where(present, L, 0).clamp(min=0).sqrt()[:, None, :]
    chains = torch.arange(num_chains, device=X.device)
    key = streams.keys(seed, "sampling", chains)
    start = streams.normals(streams.keys(seed, "init", chains), torch.zeros(1, dtype=torch.int64, device=X.device), n)[
        :, 0
    ]
    z = (start * present[:, None])[:, None].expand(-1, rates.shape[1], -1, -1)  # (P, R, chains, n)
    warm_up = num_steps // 10
    growth = torch.zeros(z.shape[:3], dtype=z.dtype, device=z.device)
    factor = rates[:, :, None, None] / batch_size
    for first in range(0, warm_up + num_steps, 500):
        last = min(first + 500, warm_up + num_steps)
        batches = streams.sample(sampling, key, first, last, batch_size, n)  # (chains, steps, b)
        for k in range(last - first):
            drawn = a[:, None, batches[:, k]]  # (P, 1, chains, b, n)
            products = drawn @ z[..., None]
            z = z - factor * (drawn.mT @ products)[..., 0]
            size = torch.linalg.vector_norm(z, dim=-1)
            if first + k >= warm_up:
                growth += torch.log(size)
            z = z / torch.where(size == 0, 1, size)[..., None]
    exponent = (growth / num_steps).mean(-1)
    error = (growth / num_steps).std(-1) / num_chains**0.5
    shape = lr.shape if single else (len(X), *lr.shape[1:])
    return exponent.reshape(shape), error.reshape(shape)


def almost_sure_edge(
    interpolator: Interpolator,
    batch_size: int = 1,
    sampling: str = "replacement",
    num_rates: int = 17,
    num_steps: int = 2000,
    num_chains: int = 32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The step size at which (S)GD stops converging to an interpolator almost surely: the Lyapunov exponent's first zero.

    Never below the mean-square edge (Jensen), at most a few times it. Searched for from there up to twice, four times, ...
    the mean-square edge, then between the two neighbouring step sizes that enclose it.

    Args:
        interpolator: (X, beta, effective initialisation), or a stack.
        batch_size: b.
        sampling: `replacement`, `subset` or `epochs`.
        num_rates: Step sizes tried at once.
        num_steps: See `lyapunov`.
        num_chains: See `lyapunov`.
        seed: See `lyapunov`.

    Returns:
        The step size, () or (P,), infinite where there is no curvature, and its standard error: the exponent's over its
        slope.

    Raises:
        ValueError: As `lyapunov`.

    Reference:
        Chemnitz & Engel 2407.20209; the search is ours.

    Example:
        >>> edge, _ = almost_sure_edge(Interpolator([[1.0, 1.0]], [2.0, 0.0], 0.0), num_steps=10)
        >>> torch.allclose(edge, torch.tensor(0.5).double())
        True
    """
    below = stability(interpolator, batch_size, sampling).mean_square_edge
    single = below.ndim == 0
    below = torch.atleast_1d(below)
    flat = below == torch.inf
    below = torch.where(flat, 1, below)
    low, high = 0.99 * below, 2 * below
    grid = torch.linspace(0, 1, num_rates, dtype=below.dtype, device=below.device)
    num_left = 3  # searches once the zero lies between two rates, each narrowing the gap num_rates - 1 times
    for _ in range(30):
        rates = low[:, None] + (high - low)[:, None] * grid
        exponent, noise = lyapunov(
            interpolator, rates[0] if single else rates, batch_size, sampling, num_steps, num_chains, seed
        )
        exponent, noise = exponent.reshape(rates.shape), noise.reshape(rates.shape)
        # Directions of next to no curvature have exponents of next to 0, below it but for rounding.
        passed = exponent >= 1e-12
        enclosed = passed.any(-1)
        k = passed.long().argmax(-1, keepdim=True).clamp(min=1)
        (left, right), (f_left, f_right) = (
            [values.gather(-1, k + i)[:, 0] for i in (-1, 0)] for values in (rates, exponent)
        )
        slope = (f_right - f_left) / (right - left)
        edge, error = left - f_left / slope, noise.gather(-1, k)[:, 0] / slope
        edge = torch.where(flat, torch.inf, edge)
        error = torch.where(flat, 0, error)
        num_left -= int((enclosed | flat).all())
        if num_left == 0:
            break
        low, high = torch.where(enclosed, left, high), torch.where(enclosed, right, 2 * high)
    return (edge[0], error[0]) if single else (edge, error)
