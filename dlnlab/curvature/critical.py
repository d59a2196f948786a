"""Critical sharpness: curvature along one direction, from a few evaluations of the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CriticalSharpness:
    """The critical sharpness and what it was read from.

    Args:
        value: 2/eta_c, () or (E,); 0 where no step raised the loss, infinite where none lowered it (with momentum the
            update may lead uphill).
        step: eta_c; infinite or 0 there.
        num_evaluations: Of the loss.
    """

    value: Tensor
    step: Tensor
    num_evaluations: int


@torch.no_grad()
def critical_sharpness(
    loss: Callable[[Tensor], Tensor],
    start: float | Tensor = 1.0,
    tol: float = 0.02,
    max_evaluations: int = 60,
) -> CriticalSharpness:
    r"""2/eta_c, where eta_c is the smallest step along a direction that raises the loss: forward passes only.

    Where the loss is quadratic and the direction minus its gradient g, it is g^T H g/|g|^2, at most the sharpness; along
    -P^{-1} g the same for the preconditioned Hessian. The step is doubled or halved until it is bracketed, then the bracket
    bisected in its logarithm, so a start near the last eta_c saves most evaluations.

    Args:
        loss: A step eta (a tensor, () or one per member (E,)) -> the loss there, of the same shape.
        start: Where to begin, > 0; of the loss's shape.
        tol: Relative width of the last bracket.
        max_evaluations: The search ends after so many.

    Returns:
        The critical sharpness.

    Example:
        >>> found = critical_sharpness(lambda eta: (1 - 4 * eta) ** 2)
        >>> abs(float(found.value) - 4) < 0.1
        True

    Reference:
        Kalra et al. 2026, arXiv 2601.16979 (the quantity); the search: derived here.
    """
    here = loss(torch.zeros_like(torch.as_tensor(start, dtype=torch.float64)))
    eta = torch.as_tensor(start, dtype=torch.float64, device=here.device).expand(here.shape).clone()
    low, high = torch.zeros_like(eta), torch.full_like(eta, torch.inf)
    evaluations, lowered = 1, torch.zeros_like(here)
    while evaluations < max_evaluations:
        found = loss(eta)
        evaluations += 1
        lowered = torch.fmax(lowered, here - found)
        raised = ~(found <= here)  # NaN counts as raised
        low, high = torch.where(raised, low, eta), torch.where(raised, eta, high)
        bracketed = (low > 0) & high.isfinite()
        if bool((bracketed & (high <= (1 + tol) * low)).all()):
            break
        eta = torch.where(bracketed, torch.sqrt(low * high), torch.where(high.isfinite(), high / 2, 2 * low))
    step = torch.where(high.isfinite(), torch.sqrt(low * high), torch.inf)
    if bool((lowered <= 0).any()):  # not even at eta_c, where it is the same again?
        lowered = torch.fmax(lowered, here - loss(torch.where(step.isfinite(), step / 2, 0.0)))
        evaluations += 1
    # Steps so small that the loss is the same to rounding lower nothing.
    uphill = high.isfinite() & (lowered <= 4 * torch.finfo(here.dtype).eps * here.abs())
    step = torch.where(uphill, 0.0, step)
    return CriticalSharpness(2 / step, step, evaluations)
