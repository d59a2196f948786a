"""Steps of the diagonal linear network as batched tensor arithmetic, on any device: what other kernels are held to."""

from collections.abc import Callable

import torch
from torch import Tensor

from dlnlab.kernels.factors import PERIOD, Factors


def diagonal_steps(
    factors: Factors,
    lr: Tensor,
    decay: Tensor | None,
    gradient: Callable[[Tensor, int], Tensor],
    start: int,
    stop: int,
) -> None:
    """Advance beta = (w+^2 - w-^2)/2 by gradient descent from step `start` to step `stop`, in place.

    Args:
        factors: The members' state, tensors of shape (..., D).
        lr: Step sizes, broadcastable with the state.
        decay: 1 - 2 lr weight_decay, likewise, or None without weight decay.
        gradient: (beta, step) -> the mini-batch loss's gradient in beta, of the state's shape.
        start: The first step.
        stop: The step after the last.

    Reference:
        even2023, section 2, in the rotated factors.
    """
    scale = lr if decay is None else lr / decay
    beta, square = torch.empty_like(factors.w_plus), torch.empty_like(factors.w_plus)
    for step in range(start, stop):
        torch.mul(factors.w_minus, factors.w_minus, out=square)
        torch.mul(factors.w_plus, factors.w_plus, out=beta).sub_(square).mul_(0.5)
        factors.multiply(scale * gradient(beta, step), decay)
        if (step + 1) % PERIOD == 0:
            factors.renormalise()
