r"""Gradient flow of the diagonal network: what its loss adds up to, where it goes from here, and how sharp it is there."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlnlab.theory.dual_flow import DualPath
from dlnlab.theory.hypentropy import hypentropy, hypentropy_conjugate, hypentropy_gradient, log_of
from dlnlab.theory.inputs import as_float64, as_problems, in_units, positive
from dlnlab.theory.interpolation import min_bregman, min_hypentropy
from dlnlab.theory.stability import sharpness, weight_square

_MOST_STEPS = 20_000
"""Of the integrator; a thousand are usual."""


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

    of the residuals r = X beta - y and of the gradient g = X^T r/N, to about 1e-8 of the largest. They are integrated with
    the flow's N dual unknowns, in units in which X and y are of order 1, until what is left of the first's sum, which is
    known at every time (`loss_integral`), is 1e-10 of it; and the sum that was found is held to the one that is known.

    Args:
        X: Inputs (N, D) or (P, N, D).
        y: Targets (N,) or (P, N); an interpolator must exist.
        init: alpha, a number, (D,) or (P, D).

    Returns:
        (N,) and (D,), or (P, N) and (P, D).

    Raises:
        ValueError: If alpha is not positive and finite, no interpolator exists, or the flow is too stiff to be followed to
            its end (inputs that are dependent to many digits).

    Reference:
        Derived here.

    Example:
        Their sum is known: the loss adds up to `loss_integral`.

        >>> residual, _ = flow_integrals([[2.0]], [1.0], 0.5)
        >>> torch.allclose(residual.sum() / 2, loss_integral([0.5], 0.5))
        True
    """
    single, X, y, (init,) = as_problems(X, y, init)
    X, y, x_unit, y_unit = in_units(X, y)
    log_init = torch.log(positive("init", init)) + (torch.log(x_unit) - torch.log(y_unit))[:, None] / 2
    limit, _ = min_hypentropy(X, y, log_init=log_init)
    whole = hypentropy(limit, log_init=log_init)
    problems = zip(*(value.cpu().numpy() for value in (X, y, log_init, limit, whole)), strict=True)
    found = [_integrals(f"problem {i}", *problem) for i, problem in enumerate(problems)]
    units = (y_unit / x_unit, x_unit * y_unit)
    parts = [
        torch.from_numpy(np.stack(part)).to(X.device) * scale[:, None]
        for part, scale in zip(zip(*found, strict=True), units, strict=True)
    ]
    return tuple(part[0] if single else part for part in parts)


def _integrals(
    name: str, x: np.ndarray, y: np.ndarray, log_init: np.ndarray, limit: np.ndarray, whole: float
) -> tuple[np.ndarray, np.ndarray]:
    n, d = x.shape
    if whole == 0:
        return np.zeros(n), np.zeros(d)
    path = DualPath(x, y, log_init, log_init, math.inf, 1e-10, rest=0.0)
    try:
        for _ in range(_MOST_STEPS):
            path.step()
            z, of_residual, of_gradient = path.at(path.time)
            # Twice what the loss adds up to so far: psi(limit) less its divergence from where the flow is.
            half = np.exp(log_init + np.abs(z)) * np.expm1(-2 * np.abs(z)) / 2
            so_far = limit @ z - half @ half
            if so_far >= (1 - 1e-10) * whole:
                break
        else:
            raise RuntimeError(f"not at its end after {_MOST_STEPS} steps of the integrator")
        error = abs(of_residual.sum() / n - whole) / whole
        if not error < 1e-6:
            raise RuntimeError(f"the loss integrated along it is {error:.1e} of its known value off")
    except RuntimeError as reason:
        raise ValueError(
            f"flow_integrals: {name}: gradient flow could not be followed to the end: {reason}; "
            f"its inputs have singular values from {np.linalg.norm(x, 2):.1e} to {np.linalg.norm(x, -2):.1e}"
        ) from None
    return of_residual, of_gradient
