"""Rates: step sizes and weight decays that change with the step, as kernels take them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlnlab.kernels.factors import PERIOD


@dataclass
class Rates:
    """What each member's lr and weight decay are at the steps of one call: a factor for each step and schedule.

    At step k a member of schedule s has lr f and weight_decay f' with f = lr_factor[s, k - first] and f' likewise, and its
    factors decay by 1 - 2 lr f weight_decay f'. A member without a schedule has what the call says beside this.

    Attributes:
        lr: Of a factor of 1, float64 (E,).
        weight_decay: Likewise.
        schedule: Row of the factors, int64 (E,); -1 for a member whose rates are constant.
        lr_factor: float64 (S, k).
        weight_decay_factor: Likewise.
        first: The step of the first column, at or before the last one divisible by `PERIOD` that the call has not passed.
    """

    lr: Tensor
    weight_decay: Tensor
    schedule: Tensor
    lr_factor: Tensor
    weight_decay_factor: Tensor
    first: int

    @staticmethod
    def first_of(start: int) -> int:
        """Where the factors of a call that begins at step `start` begin."""
        return start - start % PERIOD

    def covers(self, start: int, stop: int) -> bool:
        """Whether it says all that a call from step `start` to step `stop` needs."""
        return self.first <= self.first_of(start) and stop <= self.first + self.lr_factor.shape[1]

    def pick(self, members: Tensor) -> "Rates":
        """Those of some members."""
        own = {name: getattr(self, name)[members] for name in ("lr", "weight_decay", "schedule")}
        return replace(self, **own)

    def to(self, device: torch.device) -> "Rates":
        """On another device."""
        return Rates(*(value.to(device) if isinstance(value, Tensor) else value for value in vars(self).values()))

    def factor(self, step: int) -> tuple[Tensor, Tensor]:
        """What lr and weight decay are multiplied by at a step, (E,) each; 1 for a member without a schedule."""
        row, column = self.schedule.clamp(min=0), step - self.first
        found = (factors[row, column] for factors in (self.lr_factor, self.weight_decay_factor))
        return tuple(torch.where(self.schedule < 0, 1.0, factor) for factor in found)

    def at(self, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Lr and decay, 1 - 2 lr weight_decay, at a step, (E,) of the given type."""
        lr, kappa = ((v * f).to(dtype) for v, f in zip((self.lr, self.weight_decay), self.factor(step), strict=True))
        return lr, 1 - 2 * lr * kappa


class RateArrays(NamedTuple):
    """`Rates` for a kernel of the CPU."""

    lr: np.ndarray  # (E,), float64, as all but the schedule
    weight_decay: np.ndarray  # (E,)
    schedule: np.ndarray  # (E,), int64: -1 for constant
    lr_factor: np.ndarray  # (S k,)
    weight_decay_factor: np.ndarray  # (S k,)
    first: int
    num_steps: int  # k


def rate_arrays(rates: Rates | None, num_members: int) -> RateArrays:
    """Rates as arrays; without any no member has a schedule."""
    if rates is None:
        none = np.zeros(1)
        return RateArrays(none, none, np.full(num_members, -1), none, none, 0, 0)
    own = (tensor.contiguous().numpy() for tensor in (rates.lr, rates.weight_decay, rates.schedule))
    tables = (tensor.flatten().contiguous().numpy() for tensor in (rates.lr_factor, rates.weight_decay_factor))
    return RateArrays(*own, *tables, rates.first, rates.lr_factor.shape[1])
