r"""Gradient flow of the diagonal network: what its loss adds up to, where it goes from here, and how sharp it is there."""

from typing import Any

import torch
from torch import Tensor

from dlnlab.theory.hypentropy import hypentropy, hypentropy_conjugate, hypentropy_gradient, log_of
from dlnlab.theory.inputs import as_float64
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
