r"""The gain: what discrete steps do to the initialisation that the solution remembers.

A step of gradient descent with x = gamma g multiplies w+ by 1 - x and w- by 1 + x, so after any number of steps

.. math:: \alpha_k^2 = \alpha^2 e^{-\sum q(x)}, \qquad \alpha_{\pm,k}^2 = \alpha^2 e^{-\sum q_\pm(x)}.

`dlnlab.kernels.factors` accumulates the same sums over a run as products, without a logarithm a step.
"""

from typing import Any

import torch
from torch import Tensor

from dlnlab.theory.inputs import as_float64

QUADRATIC = 0.8926
"""Up to this |x|, x^2 <= q(x) <= 2 x^2; beyond it, up to 1, only the left side holds (root of -ln(1 - x^2) = 2 x^2)."""


def gain_increment(x: Any) -> Tensor:
    r"""What one step adds to the gain, :math:`q(x) = -\tfrac12 \ln (1 - x^2)^2`.

    Even; infinite at |x| = 1, where a factor becomes 0; negative beyond sqrt 2, where a step lowers the gain.

    Args:
        x: gamma g, any shape (over 1 - c with weight decay).

    Returns:
        q(x), of x's shape.

    Reference:
        even2023, Theorem 1.

    Example:
        The weights' own step agrees:

        >>> w_plus, w_minus, x = 2.0, 3.0, torch.tensor(1.2, dtype=torch.float64)
        >>> ratio = ((1 - x) * w_plus * (1 + x) * w_minus / (w_plus * w_minus)).abs()
        >>> torch.allclose(gain_increment(x), -torch.log(ratio))
        True
    """
    x = as_float64(x)
    # Small x is lost beside 1 in either factor; near |x| = 1 the square is.
    return torch.where(
        x.abs() < 0.5, -torch.log1p(-(x * x).clamp(max=0.25)), -_log_abs_one_plus(-x) - _log_abs_one_plus(x)
    )


def gain_increment_plus(x: Any) -> Tensor:
    r"""What one step adds to the gain of w+, :math:`q_+(x) = -2 x - \ln (1 - x)^2`; q = (q+ + q-)/2.

    Args:
        x: gamma g, any shape.

    Returns:
        q+(x), of x's shape; x^2 to leading order.

    Reference:
        even2023, Theorem 1.

    Example:
        >>> gain_increment_plus(1e-9)  # x^2, where -2 x - 2 log(1 - x) as written is rounding alone
        tensor(1.0000e-18, dtype=torch.float64)
    """
    x = as_float64(x)
    # Both terms are 2 x to rounding near 0: there the series of their difference.
    series = x * x * (1 + x * (2 / 3 + x * (1 / 2 + x * (2 / 5 + x * (1 / 3 + x * (2 / 7 + x * (1 / 4 + x * 2 / 9)))))))
    return torch.where(x.abs() < 5e-3, series, -2 * x - 2 * _log_abs_one_plus(-x))


def gain_increment_minus(x: Any) -> Tensor:
    r"""What one step adds to the gain of w-, :math:`q_-(x) = 2 x - \ln (1 + x)^2 = q_+(-x)`.

    Args:
        x: gamma g, any shape.

    Returns:
        q-(x), of x's shape.

    Reference:
        even2023, Theorem 1.

    Example:
        >>> x = torch.tensor([0.3, -1.7])
        >>> torch.allclose(gain_increment_plus(x) + gain_increment_minus(x), 2 * gain_increment(x))
        True
    """
    return gain_increment_plus(-as_float64(x))


def gain_increment_bounds(x: Any) -> tuple[Tensor, Tensor]:
    """The bounds x^2 <= q(x) <= 2 x^2 that hold up to |x| = 1 and 0.8926; infinite where they do not.

    Args:
        x: gamma g, any shape.

    Returns:
        Lower and upper bound, of x's shape.

    Reference:
        Derived here (even2023 bounds the gain in expectation).

    Example:
        >>> x = torch.linspace(-0.89, 0.89, 101)
        >>> lower, upper = gain_increment_bounds(x)
        >>> bool(((lower <= gain_increment(x)) & (gain_increment(x) <= upper)).all())
        True
    """
    square = as_float64(x) ** 2
    lower = torch.where(square <= 1, square, -torch.inf)
    return lower, torch.where(square <= QUADRATIC**2, 2 * square, torch.inf)


def log_effective_init(init: Any, gain: Any) -> Tensor:
    """Ln alpha_k = ln alpha - Gain/2, also where alpha_k itself is below floating point.

    Args:
        init: alpha > 0, any shape.
        gain: The sum of q, broadcastable with it.

    Returns:
        Their common shape.

    Reference:
        even2023, Theorem 1.

    Example:
        >>> log_effective_init(1.0, 10_000.0), effective_init(1.0, 10_000.0)
        (tensor(-5000., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    init = as_float64(init)
    return torch.log(init) - as_float64(gain, init) / 2


def effective_init(init: Any, gain: Any) -> Tensor:
    """alpha_k = alpha exp(-Gain/2): the initialisation from which gradient flow has the same bias, up to beta~_0.

    Args:
        init: alpha > 0, any shape.
        gain: The sum of q, broadcastable with it.

    Returns:
        Their common shape; 0 once below floating point (`log_effective_init`).

    Reference:
        even2023, Theorem 1.

    Example:
        >>> effective_init(0.1, gain_increment(0.0))  # gradient flow's limit: no gain
        tensor(0.1000, dtype=torch.float64)
    """
    return torch.exp(log_effective_init(init, gain))


def mirror_shift(gain_plus: Any, gain_minus: Any) -> Tensor:
    r"""Where the steps moved the mirror's origin.

    .. math:: \mathrm{asinh}(\tilde\beta_0/\alpha_\infty^2) = \tfrac12 \Big(\sum q_- - \sum q_+\Big)

    What `min_bregman` takes as `shift`: unlike beta~_0 it does not underflow.

    Args:
        gain_plus: The sum of q+, any shape.
        gain_minus: The sum of q-, broadcastable with it.

    Returns:
        Their common shape.

    Reference:
        even2023, Theorem 1 (beta~_0); this form is derived here.

    Example:
        >>> plus, minus = 3.0, 1.0
        >>> a = effective_init(0.1, (plus + minus) / 2)
        >>> torch.allclose(torch.asinh(perturbation(0.1, plus, minus) / a**2), mirror_shift(plus, minus))
        True
    """
    gain_plus = as_float64(gain_plus)
    return (as_float64(gain_minus, gain_plus) - gain_plus) / 2


def perturbation(init: Any, gain_plus: Any, gain_minus: Any) -> Tensor:
    r"""The point the solution is nearest to.

    .. math:: \tilde\beta_0 = \tfrac12 (\alpha_+^2 - \alpha_-^2), \qquad \alpha_\pm^2 = \alpha^2 e^{-\sum q_\pm}

    Args:
        init: alpha > 0, any shape.
        gain_plus: The sum of q+, broadcastable with it.
        gain_minus: The sum of q-, likewise.

    Returns:
        Their common shape; 0 once below floating point.

    Reference:
        even2023, Theorem 1.

    Example:
        >>> perturbation(0.5, 1.0, 1.0)  # equal gains of both factors leave the start at 0
        tensor(0., dtype=torch.float64)
    """
    init = as_float64(init)
    gain_plus, gain_minus = as_float64(gain_plus, init), as_float64(gain_minus, init)
    smaller = torch.minimum(gain_plus, gain_minus)  # the difference of the exponentials without cancellation
    ahead = gain_minus - gain_plus
    return torch.exp(2 * torch.log(init) - smaller) * torch.sign(ahead) * -torch.expm1(-ahead.abs()) / 2


def _log_abs_one_plus(x: Tensor) -> Tensor:
    """Ln|1 + x|, accurate near x = 0."""
    return torch.where(x > -1, torch.log1p(x.clamp(min=-1)), torch.log((1 + x).abs()))
