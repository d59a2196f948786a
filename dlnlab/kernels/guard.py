"""When a kernel stops members: what the guards of all kernels share."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ABOVE_BOUND, NOT_FINITE = 1, 2
"""Why a member has diverged: its loss is above its bound, or its loss or a parameter is not finite."""
LARGEST = sys.float_info.max
"""Whatever is finite is at most this. NaN compares false."""


def bound_of(reference: Tensor, factor: float) -> Tensor:
    """So many times a reference loss (E,); the largest number where that is no positive and finite one."""
    known = reference.isfinite() & (reference > 0)
    return torch.where(known, factor * reference.double(), LARGEST).clamp(max=LARGEST)


@dataclass
class Limits:
    """When members stop (`dlnlab.models.base.Guard`), and the state that diverged ones go back to.

    Attributes:
        tol: A member whose full clean loss is below this has converged.
        bound: A member whose full clean loss is above this, or whose loss or parameters are not finite, has diverged:
            float64 (E,), or one number for all.
        every_n_steps: Members are checked at steps divisible by this.
        kept: Each member at its last check, changed in place; a copy of the first state before the first step.
        cause: Why members have diverged, int8 (E,), changed in place; 0 for those that have not.
    """

    tol: float
    bound: Any
    every_n_steps: int
    kept: Any
    cause: Any = None

    def __post_init__(self) -> None:
        first: Tensor = next(iter(self.kept if isinstance(self.kept, list) else vars(self.kept).values()))
        bound = torch.as_tensor(self.bound, dtype=torch.float64, device=first.device)
        # Below infinity, so that an infinite loss is above any bound.
        self.bound = bound.clamp(max=LARGEST).expand(len(first)).contiguous()
        if self.cause is None:
            self.cause = torch.zeros(len(first), dtype=torch.int8, device=first.device)
