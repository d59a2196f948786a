"""The shallow linear network, L = (a^T b - Phi)^2/2: what gradient descent keeps, where it and the flow end, and when.

Arguments, tensors of one shape (...) that broadcast: `target` is Phi, `eps` = a^T b - Phi, `norm_squared` = |a|^2 + |b|^2
(lambda), `spread` = |a + b||a - b| = sqrt(lambda^2 - 4 (a^T b)^2) (S), `lr` = eta. Vectors are p = (a + b)/sqrt2 and
m = (a - b)/sqrt2, (..., D). One step of gradient descent is p <- (1 - eta eps) p, m <- (1 + eta eps) m.

Reference:
    beneventano2025 (the loss, the imbalance, Theorem 1's condition); whatever says so: derived here.
"""

import math

import torch
from torch import Tensor


def spread(p: Tensor, m: Tensor) -> Tensor:
    """S = 2 |p| |m|, what gradient flow keeps and a step multiplies by |1 - eta^2 eps^2|.

    Args:
        p: (a + b)/sqrt2, (..., D).
        m: (a - b)/sqrt2, (..., D).

    Returns:
        (...).
    """
    return 2 * p.norm(dim=-1) * m.norm(dim=-1)


def next_eps(eps: Tensor, norm_squared: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """Eps after one step, exactly: eps (1 - eta lambda + eta^2 eps (eps + Phi)).

    Args:
        eps: a^T b - Phi.
        norm_squared: lambda.
        lr: eta.
        target: Phi.

    Returns:
        (...).

    Reference:
        beneventano2025, eqs. 6 to 8.
    """
    return eps * (1 - lr * norm_squared + lr * eps * (lr * (eps + target)))


def next_norm_squared(eps: Tensor, norm_squared: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """Lambda after one step, exactly: (1 + eta^2 eps^2) lambda - 4 eta eps (eps + Phi).

    Args:
        eps: a^T b - Phi.
        norm_squared: lambda.
        lr: eta.
        target: Phi.

    Returns:
        (...).

    Reference:
        beneventano2025, eqs. 6 to 8.
    """
    return (1 + (lr * eps) ** 2) * norm_squared - 4 * lr * eps * (eps + target)


def imbalance_factor(eps: Tensor, lr: Tensor) -> Tensor:
    """What one step multiplies every a_i^2 - b_i^2 by, exactly: 1 - eta^2 eps^2.

    Args:
        eps: a^T b - Phi.
        lr: eta.

    Returns:
        (...).

    Reference:
        beneventano2025, eqs. 6 to 8.
    """
    return 1 - (lr * eps) ** 2


def norm_squared_at(product: Tensor, spread: Tensor, contraction: Tensor | float = 1.0) -> Tensor:
    """Lambda of a network with a^T b = `product` whose imbalance has shrunk by a factor R: sqrt(4 (a^T b)^2 + S^2 R^2).

    At a minimum, with `product` = Phi, this is the sharpness. R = 1 is where gradient flow ends, the sharpness of the
    gradient flow solution; so the minimum is flatter than the flow's if and only if |R| < 1.

    Args:
        product: a^T b.
        spread: S at the start.
        contraction: R, the product of 1 - eta^2 eps^2 over the steps.

    Returns:
        (...).

    Reference:
        Derived here.

    Example:
        >>> norm_squared_at(torch.tensor(2.0), torch.tensor(6.0), 0.5).item()
        5.0
    """
    return torch.hypot(2 * product, spread * contraction)


def flow_limit(p: Tensor, m: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where gradient flow ends: p -> s p, m -> m/s with s^2 |p|^2 - |m|^2/s^2 = 2 Phi.

    A start on the saddle's stable manifold (p = 0 with Phi > 0, m = 0 with Phi < 0) ends at zero.

    Args:
        p: (a + b)/sqrt2, (..., D).
        m: (a - b)/sqrt2, (..., D).
        target: Phi, (...).

    Returns:
        The limits of p and m, (..., D).

    Reference:
        Derived here.
    """
    size_p, size_m = p.norm(dim=-1), m.norm(dim=-1)
    root = torch.hypot(target, size_p * size_m)
    large = root + target.abs()
    small = size_p * size_m * (size_p * size_m / large)
    end_p, end_m = torch.where(target >= 0, large, small).sqrt(), torch.where(target >= 0, small, large).sqrt()
    return p * _or_zero(end_p / size_p)[..., None], m * _or_zero(end_m / size_m)[..., None]


def theorem_lr(eps: Tensor, norm_squared: Tensor, target: Tensor) -> Tensor:
    """The step size below which Theorem 1 speaks: min(1/(2 |eps(0)|), 2/sqrt(lambda(0)^2 + 4 Phi^2)).

    Below it members converge with |eps| falling at every step, to a minimum no sharper than the flow's (derived here).

    Args:
        eps: a^T b - Phi at the start.
        norm_squared: lambda at the start.
        target: Phi.

    Returns:
        (...).

    Reference:
        beneventano2025, Theorem 1 (the condition).
    """
    return torch.minimum(1 / (2 * eps.abs()), 2 / torch.hypot(norm_squared, 2 * target))


def log_contraction_bound(eps: Tensor, norm_squared: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """The least that -ln |Q_i(inf)/Q_i(0)| can be under Theorem 1's condition.

    It is eta eps(0)^2/(2 sqrt(lambda(0)^2 + 4 Phi^2)).

    Args:
        eps: a^T b - Phi at the start.
        norm_squared: lambda at the start.
        lr: eta.
        target: Phi.

    Returns:
        (...).

    Reference:
        Derived here; the formula of beneventano2025's Theorem 1 was not at hand.
    """
    return lr * eps * (eps / (2 * torch.hypot(norm_squared, 2 * target)))


def leading_log_contraction(p: Tensor, m: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """-ln |Q_i(inf)/Q_i(0)| to first order in eta: eta times the integral of eps^2 along gradient flow, in closed form.

    eta [(lambda(0) - lambda_GF)/4 - (Phi/2) (asinh(2 a^T b/S) - asinh(2 Phi/S))]; larger steps shrink more than it says.

    Args:
        p: (a + b)/sqrt2 at the start, (..., D).
        m: (a - b)/sqrt2 at the start, (..., D).
        lr: eta, (...).
        target: Phi, (...).

    Returns:
        (...); not defined where p or m is zero.

    Reference:
        Derived here.
    """
    s, product = spread(p, m), (p.square().sum(-1) - m.square().sum(-1)) / 2
    norms = (norm_squared_at(product, s) - norm_squared_at(target, s)) / 4
    return lr * (norms - target / 2 * (torch.asinh(2 * product / s) - torch.asinh(2 * target / s)))


def rate(lr: Tensor, norm_squared: Tensor) -> Tensor:
    """What |eps| is multiplied by in a step near a minimum with this lambda: |1 - eta lambda|.

    Fastest where eta lambda = 1; as eta lambda goes to 2 the minimum is flat for its step size and reached slowly.

    Args:
        lr: eta.
        norm_squared: lambda at the minimum.

    Returns:
        (...).

    Reference:
        Derived here.
    """
    return (1 - lr * norm_squared).abs()


def escape(eps: Tensor, norm_squared: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """V = eta lambda - eta^2 Phi eps; v - 4 keeps its sign: a step multiplies it by 1 + eta^2 eps a^T b.

    For |eta Phi| < 2 a member stays bounded if v(0) < 4 and diverges if v(0) > 4.

    Args:
        eps: a^T b - Phi.
        norm_squared: lambda.
        lr: eta.
        target: Phi.

    Returns:
        (...).

    Reference:
        Derived here; Phi = 0 is the catapult's 4/lambda(0) of Lewkowycz et al. 2020.
    """
    return lr * norm_squared - lr * target * (lr * eps)


def diverges(eps: Tensor, norm_squared: Tensor, lr: Tensor, target: Tensor) -> Tensor:
    """Whether a member that starts here diverges, boolean: v > 4, or |eta Phi| > 2.

    Args:
        eps: a^T b - Phi.
        norm_squared: lambda.
        lr: eta.
        target: Phi.

    Returns:
        (...); starts with p = 0 or m = 0 and |eta Phi| > 2 may be exceptions.

    Reference:
        Derived here.
    """
    return (escape(eps, norm_squared, lr, target) > 4) | ((lr * target).abs() > 2)


def sharpness(eps: Tensor, norm_squared: Tensor, target: Tensor) -> Tensor:
    """Largest eigenvalue of the Hessian anywhere: (lambda + sqrt(lambda^2 + 8 a^T b eps + 4 eps^2))/2; lambda at a minimum.

    Args:
        eps: a^T b - Phi.
        norm_squared: lambda.
        target: Phi.

    Returns:
        (...).

    Reference:
        Derived here.
    """
    size = torch.maximum(norm_squared, eps.abs())
    size = torch.where(size == 0, 1, size)
    norm, error, product = norm_squared / size, eps / size, (eps + target) / size
    root = norm**2 + 8 * product * error + 4 * error**2
    return size * (norm + torch.sqrt(root.clamp(min=0))) / 2


def next_on_edge(x: Tensor) -> Tensor:
    """X = eta eps after one step on the line v = 4: x^3 - 3 x, whose Lyapunov exponent is ln 3.

    With x = 2 cos(theta) it is theta -> 3 theta.

    Args:
        x: eta eps, in [-2, 2].

    Returns:
        (...).

    Reference:
        Derived here.
    """
    return x**3 - 3 * x


def lyapunov_exponent(p: Tensor, m: Tensor, lr: Tensor, target: Tensor, num_steps: int = 10_000) -> Tensor:
    """The mean growth of ln|change| per step along gradient descent from here, of a change of |p| and |m|.

    Where m = 0 the change stays in a = b. Members that leave all bounds have none (NaN); one that falls on a superstable
    point has minus infinity.

    Args:
        p: (a + b)/sqrt2, (..., D).
        m: (a - b)/sqrt2, (..., D).
        lr: eta, (...).
        target: Phi, (...).
        num_steps: How many steps the mean is taken over; its error falls as one over their number's root.

    Returns:
        (...).

    Reference:
        Derived here.
    """
    s, z = p.double().norm(dim=-1), m.double().norm(dim=-1)
    lr, target = lr.double(), target.double()
    ds, dz = (s != 0).double(), (z != 0).double()
    growth = torch.zeros_like(s)
    for _ in range(num_steps):
        x = lr * ((s**2 - z**2) / 2 - target)
        dx = lr * (s * ds - z * dz)
        ds, dz = (1 - x) * ds - s * dx, (1 + x) * dz + z * dx
        s, z = (1 - x) * s, (1 + x) * z
        size = torch.hypot(ds, dz)
        growth += torch.log(size)
        ds, dz = ds / size, dz / size
    bounded = torch.isfinite(s) & torch.isfinite(z)
    return torch.where(bounded, torch.nan_to_num(growth, nan=-math.inf), torch.nan) / num_steps


def _or_zero(ratio: Tensor) -> Tensor:
    """Zero in place of what division by zero gives."""
    return torch.where(torch.isfinite(ratio), ratio, 0.0)
