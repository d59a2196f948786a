r"""The hyperbolic entropy, whose mirror flow the diagonal network's gradient flow is.

.. math:: \psi_\alpha(\beta) = \tfrac12 \sum_i \Big( \beta_i \,\mathrm{asinh}(\beta_i/\alpha_i^2)
          - \sqrt{\beta_i^2 + \alpha_i^4} + \alpha_i^2 \Big)

All functions take beta (..., D) and alpha as `init` (a number, or broadcastable with beta), or `log_init` = ln alpha where
alpha^2 is below floating point, and lose no digits at either end: neither beta^2/(4 alpha^2) where alpha is large, nor
`|beta| (ln(2|beta|) - 2 ln alpha - 1)/2` where it is small.

Reference:
    woodworth2020 (their Q is 2 psi); even2023.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dlnlab.theory.inputs import as_float64, positive


def log_of(init: Any, log_init: Any, like: Tensor | None = None) -> Tensor:
    """The logarithm of an initialisation that is given as it is or as its logarithm.

    Raises:
        ValueError: If both or none are given, or init is not positive and finite.
    """
    if (init is None) == (log_init is None):
        raise ValueError("exactly one of init and log_init must be given")
    return as_float64(log_init, like) if init is None else torch.log(positive("init", as_float64(init, like)))


def hypentropy(beta: Any, init: Any = None, *, log_init: Any = None) -> Tensor:
    r"""psi_alpha(beta), the hyperbolic entropy; 0 at beta = 0.

    Args:
        beta: (..., D).
        init: alpha > 0, broadcastable with beta.
        log_init: ln alpha instead.

    Returns:
        Summed over coordinates, (...).

    Raises:
        ValueError: If alpha is not positive and finite.

    Example:
        >>> hypentropy([3.0], 1e4)  # beta^2/(4 alpha^2), twelve digits below the terms of the formula
        tensor(2.2500e-08, dtype=torch.float64)
    """
    beta = as_float64(beta)
    log_scale = 2 * log_of(init, log_init, beta)
    # With t = asinh(beta/a^2): beta t - sqrt(beta^2 + a^4) + a^2 = beta (t - tanh(t/2)).
    t = asinh_ratio(beta, log_scale)
    return (beta * (t - torch.tanh(t / 2))).sum(-1) / 2


def hypentropy_gradient(beta: Any, init: Any = None, *, log_init: Any = None) -> Tensor:
    r"""The mirror map, :math:`\nabla \psi_\alpha(\beta) = \tfrac12 \mathrm{asinh}(\beta/\alpha^2)`.

    Args:
        beta: (..., D).
        init: alpha > 0, broadcastable with beta.
        log_init: ln alpha instead.

    Returns:
        (..., D).

    Raises:
        ValueError: If alpha is not positive and finite.

    Example:
        >>> beta = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
        >>> torch.allclose(torch.autograd.grad(hypentropy(beta, 0.5), beta)[0], hypentropy_gradient(beta, 0.5))
        True
    """
    beta = as_float64(beta)
    return asinh_ratio(beta, 2 * log_of(init, log_init, beta)) / 2


def hypentropy_conjugate(z: Any, init: Any = None, *, log_init: Any = None) -> Tensor:
    r"""The convex conjugate, :math:`\psi_\alpha^*(z) = \tfrac12 \sum_i \alpha_i^2 (\cosh 2 z_i - 1)`.

    Args:
        z: Mirror coordinates (..., D).
        init: alpha > 0, broadcastable with z.
        log_init: ln alpha instead.

    Returns:
        Summed over coordinates, (...).

    Raises:
        ValueError: If alpha is not positive and finite.

    Example:
        Fenchel's equality holds at z = grad psi(beta):

        >>> beta = torch.tensor([0.3, -2.0], dtype=torch.float64)
        >>> z = hypentropy_gradient(beta, 0.5)
        >>> torch.allclose(hypentropy(beta, 0.5) + hypentropy_conjugate(z, 0.5), (beta * z).sum())
        True
    """
    z = as_float64(z)
    log_scale = 2 * log_of(init, log_init, z)
    # cosh(2z) - 1 = 2 sinh(z)^2, each sinh with half of the scale in its exponent.
    size = z.abs()
    half = torch.exp(size + log_scale / 2) * -torch.expm1(-2 * size) / 2
    return (half * half).sum(-1)


def hypentropy_bregman(beta: Any, reference: Any, init: Any = None, *, log_init: Any = None) -> Tensor:
    r"""The Bregman divergence, :math:`D_\psi(\beta, b) = \psi(\beta) - \psi(b) - \langle\nabla\psi(b), \beta - b\rangle`.

    With t = asinh(beta/alpha^2) and s the same of b it is
    `sum_i (beta_i (t_i - s_i) - sqrt(beta_i^2 + alpha_i^4) + sqrt(b_i^2 + alpha_i^4))/2`, summed here in a form in which
    near points cancel nothing.

    Args:
        beta: (..., D).
        reference: b, broadcastable with beta.
        init: alpha > 0, broadcastable with beta.
        log_init: ln alpha instead.

    Returns:
        Summed over coordinates, (...); not negative, and 0 where beta = b.

    Raises:
        ValueError: If alpha is not positive and finite.

    Example:
        >>> beta, b = torch.tensor([0.3, -2.0]).double(), torch.tensor([1.0, 0.0]).double()
        >>> plain = hypentropy(beta, 0.5) - hypentropy(b, 0.5) - (hypentropy_gradient(b, 0.5) * (beta - b)).sum()
        >>> torch.allclose(hypentropy_bregman(beta, b, 0.5), plain)
        True
    """
    beta = as_float64(beta)
    b = as_float64(reference, beta)
    log_scale = 2 * log_of(init, log_init, beta)
    s, t = asinh_ratio(b, log_scale), asinh_ratio(beta, log_scale)
    h = _asinh_difference(beta, b, log_scale, t - s)
    # beta h - (sqrt(beta^2 + a^4) - sqrt(b^2 + a^4)) with beta = a^2 sinh(s + h), b = a^2 sinh s:
    # a^2 [ sinh s (h cosh h - sinh h) + cosh s (h sinh h - cosh h + 1) ], whose brackets are h^3/3 and h^2/2 near 0.
    root = torch.hypot(b, torch.exp(log_scale))
    h2 = h * h
    odd = h * h2 * (1 / 3 + h2 * (1 / 30 + h2 * (1 / 840 + h2 / 45360)))
    even = h2 * (1 / 2 + h2 * (1 / 8 + h2 * (1 / 144 + h2 / 5760)))
    near = b * odd + root * even
    far = beta * h - torch.hypot(beta, torch.exp(log_scale)) + root
    return torch.where(h.abs() < 0.03, near, far).sum(-1) / 2


def asinh_ratio(value: Tensor, log_scale: Tensor) -> Tensor:
    """Asinh(value/exp(log_scale)), whatever the scale.

    Example:
        >>> asinh_ratio(torch.ones(()), torch.tensor(-10_000.0))
        tensor(10000.6934)
    """
    size = torch.where(value == 0, 1, value.abs())
    log_ratio = torch.log(size) - log_scale
    small = torch.asinh(size * torch.exp(-log_scale.clamp(min=torch.log(size) - 20)))
    return torch.where(value == 0, value, value.sign() * torch.where(log_ratio > 20, log_ratio + math.log(2), small))


def _asinh_difference(beta: Tensor, b: Tensor, log_scale: Tensor, plain: Tensor) -> Tensor:
    """Asinh(beta/a^2) - asinh(b/a^2), to relative accuracy where the points are near."""
    # tanh((t - s)/2) = (sinh t - sinh s)/(cosh t + cosh s)
    a2 = torch.exp(log_scale)
    sum_of_roots = torch.hypot(beta, a2) + torch.hypot(b, a2)
    ratio = (beta - b) / torch.where(sum_of_roots == 0, 1, sum_of_roots)
    return torch.where(ratio.abs() < 0.5, 2 * torch.atanh(ratio.clamp(-0.5, 0.5)), plain)
