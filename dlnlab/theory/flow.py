r"""Gradient flow of the diagonal network: what its loss adds up to, where it goes from here, and how sharp it is there."""

from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from dlnlab.theory.hypentropy import hypentropy, hypentropy_conjugate, hypentropy_gradient, log_of
from dlnlab.theory.inputs import as_float64, as_problems, positive
from dlnlab.theory.interpolation import min_bregman, min_hypentropy
from dlnlab.theory.stability import sharpness, weight_square


def loss_integral(beta_inf: Any, init: Any = None, beta: Any = None, *, log_init: Any = None) -> Tensor:
    r"""The time integral of the loss along gradient flow from beta = 0 (exact).

    .. math:: \int_0^\infty L\, dt = \tfrac12 \psi_\alpha(\beta_\infty), \qquad
              \int_0^t L\, dt = \tfrac12 \big(\psi_\alpha(b) - D_{\psi_\alpha}(b, \beta_t)\big)

    with b any interpolator, beta_inf in particular. The first is the second at the flow's end.

    Args:
        beta_inf: Where the flow ends, (..., D); with `beta`, any interpolator.
        init: alpha > 0, broadcastable with it.
        beta: beta_t, where the flow is at the time that is asked for; the end by default.
        log_init: ln alpha instead of `init`.

    Returns:
        The integral of L = |X beta - y|^2/(2N), (...).

    Raises:
        ValueError: If alpha is not positive and finite.

    Reference:
        Derived here.

    Example:
        Nothing has been integrated at the start:

        >>> loss_integral([1.0, -2.0], 0.1, beta=[0.0, 0.0])
        tensor(0., dtype=torch.float64)
    """
    if beta is None:
        return hypentropy(beta_inf, init, log_init=log_init) / 2
    beta_inf = as_float64(beta_inf)
    z = hypentropy_gradient(as_float64(beta, beta_inf), init, log_init=log_init)
    # psi(b) - D(b, beta_t) without the cancellation at early times
    return ((z * beta_inf).sum(-1) - hypentropy_conjugate(z, init, log_init=log_init)) / 2


def flow_sharpness(
    X: Any, y: Any, beta: Any, effective_init: Any = None, *, log_effective_init: Any = None
) -> tuple[Tensor, Tensor]:
    r"""The sharpness where gradient flow would end if it took over now ("gradient flow sharpness").

    Its limit is the interpolator nearest to beta_k in the entropy at alpha_k.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        beta: The present predictor beta_k, (D,) or (P, D).
        effective_init: alpha_k, a number, (D,) or (P, D).
        log_effective_init: ln alpha_k instead.

    Returns:
        The sharpness, () or (P,), and the residual of `min_bregman`.

    Raises:
        ValueError: If no interpolator exists, or as `min_bregman`.

    Reference:
        Kreisler et al. 2305.13064 (the quantity); its evaluation is derived here.

    Example:
        At an interpolator the flow stays, so this is the sharpness there:

        >>> now, _ = flow_sharpness([[2.0, 0.0]], [1.0], [0.5, 0.1], 0.1)
        >>> torch.allclose(now, sharpness([[2.0, 0.0]], weight_square([0.5, 0.1], 0.1)))
        True
    """
    limit, residual = min_bregman(X, y, effective_init, beta, log_effective_init=log_effective_init)
    log_init = log_of(effective_init, log_effective_init, limit)
    return sharpness(X, weight_square(limit, torch.exp(log_init))), residual


def flow_edge(X: Any, y: Any, init: Any) -> Tensor:
    """2/sharpness where gradient flow ends: a step size to measure others by.

    Gradient descent with larger steps cannot stay where the flow ends: its recovery of a sparse teacher breaks between 1.0
    and 1.1 times this (measured). It still converges elsewhere, up to 2/sharpness of the flattest interpolator.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N).
        init: alpha, a number, (D,) or (P, D).

    Returns:
        () or (P,).

    Raises:
        ValueError: If no interpolator exists, or alpha is not positive and finite.

    Reference:
        Derived here.

    Example:
        >>> torch.allclose(flow_edge([[2.0]], [1.0], 1e-9), torch.tensor(0.5).double())
        True
    """
    beta, _ = min_hypentropy(X, y, init)
    return 2 / sharpness(X, weight_square(beta, init))


def flow_integrals(X: Any, y: Any, init: Any) -> tuple[Tensor, Tensor]:
    r"""The time integrals along gradient flow from beta = 0 that `leading_gain` is made of.

    .. math:: \int_0^\infty r_j^2\, dt, \qquad \int_0^\infty g_i^2\, dt

    of the residuals r = X beta - y and of the gradient g = X^T r/N, to about 1e-7. They are integrated with the flow's N
    dual unknowns, until |r|^2 has fallen by 1e-16.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N); an interpolator must exist.
        init: alpha, a number, (D,) or (P, D).

    Returns:
        (N,) and (D,), or (P, N) and (P, D).

    Raises:
        ValueError: If alpha is not positive and finite, or the flow does not come to an interpolator.

    Reference:
        Derived here.

    Example:
        Their sum is known: the loss adds up to `loss_integral`.

        >>> residual, _ = flow_integrals([[2.0]], [1.0], 0.5)
        >>> torch.allclose(residual.sum() / 2, loss_integral([0.5], 0.5))
        True
    """
    single, X, y, (init,) = as_problems(X, y, init)
    scale = positive("init", init).square().cpu().numpy()
    rows = [_integrals(*problem) for problem in zip(X.cpu().numpy(), y.cpu().numpy(), scale, strict=True)]
    found = [torch.from_numpy(np.stack(column)).to(X.device) for column in zip(*rows, strict=True)]
    return tuple(part[0] if single else part for part in found)


def _integrals(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, d = x.shape

    def residual(dual: np.ndarray) -> np.ndarray:
        # A trial step may ask for the exponential of anything.
        return x @ (scale * np.sinh(np.clip(2 * dual @ x, -600, 600))) - y

    def velocity(_time: float, state: np.ndarray) -> np.ndarray:
        r = residual(state[:n])
        gradient = r @ x / n
        return np.concatenate([-r / n, r * r, gradient * gradient])

    def settled(_time: float, state: np.ndarray) -> float:
        r = residual(state[:n])
        return r @ r - 1e-16 * (y @ y)

    settled.terminal = True
    if not y.any():
        return np.zeros(n), np.zeros(d)
    if np.linalg.norm(x @ (np.linalg.pinv(x) @ y) - y) > 1e-8 * np.linalg.norm(y):
        raise ValueError("flow_integrals: no interpolator exists, so the integrals are infinite")
    # The time goes with the inverse square of the inputs, and with 1/alpha^2 at worst.
    end = 1e6 * n / (x * x).sum() * max(1.0, 1.0 / scale.min())
    found = solve_ivp(
        velocity, (0.0, end), np.zeros(2 * n + d), "LSODA", events=settled, rtol=1e-9, atol=1e-10 * float(y @ y)
    )
    if found.status != 1:
        raise ValueError(f"flow_integrals: the flow has not come to an interpolator by time {found.t[-1]:.3g}")
    return found.y[n : 2 * n, -1], found.y[2 * n :, -1]
