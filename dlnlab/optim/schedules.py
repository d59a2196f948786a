"""Step sizes, weight decays and batch sizes that change on the way: pure functions of the optimizer step.

A function of the step has no state: where a chunk ends, what a resume remembers and which members share it change nothing.
One of your own:

    class InverseRoot(StepSchedule):
        def __call__(self, steps):
            return (1 + steps / 100.0) ** -0.5
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np

from dlnlab import checks
from dlnlab.schedule import expand


class StepSchedule(ABC):
    """A number as a function of the step: a factor of lr or weight decay, or a batch size."""

    @abstractmethod
    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """The number at each of some steps.

        Args:
            steps: Absolute optimizer steps, int64 (k,), in any order; step k is the one update number k is made with, and
                the first update is number 0.

        Returns:
            Float64 (k,), each a function of its own step alone. For batch sizes infinity is the full batch.
        """


class Piecewise(StepSchedule):
    """Constant between given steps: `values[i]` from `steps[i]` to the step before `steps[i + 1]`.

    Args:
        steps: Where each value begins, ascending from 0; any form of an axis (`{range: [0, 5]}`, ...).
        values: As many numbers; for batch sizes also `full`.
        period: Steps after which all begins again; None = never.

    Raises:
        ValueError: If the steps do not ascend from 0, the period ends before the last, or a value is none.

    Reference:
        wang2024 (step size and weight decay that alternate between large and small).

    Example:
        >>> Piecewise([0, 3], [1.0, 0.1], period=5)(np.arange(8)).tolist()
        [1.0, 1.0, 1.0, 0.1, 0.1, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        steps: Any = [0],  # noqa: B006 - never changed
        values: list[float | Literal["full"]] = [1.0],  # noqa: B006 - never changed
        period: int | None = None,
    ) -> None:
        begins = [checks.integer(f"steps[{i}]", step) for i, step in enumerate(expand(steps, "steps"))]
        if begins[0] != 0:
            raise ValueError(f"steps[0] = {begins[0]}: must be 0, what holds from the first step on")
        for i in range(1, len(begins)):
            if begins[i] <= begins[i - 1]:
                raise ValueError(f"steps[{i}] = {begins[i]}: must be later than the one before, {begins[i - 1]}")
        found = expand(values, "values")
        if len(found) != len(begins):
            raise ValueError(f"values has {len(found)} entries: must have one for each of the {len(begins)} steps")
        numbers = [math.inf if v == "full" else checks.number(f"values[{i}]", v) for i, v in enumerate(found)]
        self.steps, self.values = np.array(begins), np.array(numbers)
        self.period = None if period is None else checks.integer("period", period, at_least=begins[-1] + 1)

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """See `StepSchedule`."""
        steps = np.asarray(steps)
        places = steps if self.period is None else steps % self.period
        return self.values[np.searchsorted(self.steps, places, side="right") - 1]


class Cosine(StepSchedule):
    r"""Half a cosine from 1 down to `final`, once or again and again.

    .. math:: f(t) = f_\infty + (1 - f_\infty) (1 + \cos(\pi t/T))/2

    Args:
        num_steps: T; from step T on it stays at `final`, or starts anew.
        final: Not negative.
        restarts: Start from 1 again after T steps, then after T growth, T growth^2, ... (rounded) more.
        growth: At least 1.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Cosine(2, final=0.5)(np.arange(4)).tolist()
        [1.0, 0.75, 0.5, 0.5]
        >>> Cosine(2, restarts=True, growth=2.0)(np.array([0, 2, 4, 6])).round(3).tolist()
        [1.0, 1.0, 0.5, 1.0]
    """

    def __init__(self, num_steps: int = 1000, final: float = 0.0, restarts: bool = False, growth: float = 1.0) -> None:
        self.num_steps = checks.integer("num_steps", num_steps, at_least=1)
        self.final = checks.number("final", final, at_least=0)
        self.restarts = checks.flag("restarts", restarts)
        self.growth = checks.number("growth", growth, at_least=1)

    def __call__(self, steps: np.ndarray) -> np.ndarray:
        """See `StepSchedule`."""
        steps = np.asarray(steps)
        if not self.restarts:
            share = np.minimum(steps / self.num_steps, 1.0)
        elif self.growth == 1:
            share = steps % self.num_steps / self.num_steps
        else:
            begins = self._begins(int(steps.max(initial=0)))
            cycle = np.searchsorted(begins, steps, side="right") - 1
            share = (steps - begins[cycle]) / np.diff(begins)[cycle]
        return self.final + (1 - self.final) * (1 + np.cos(math.pi * share)) / 2

    def _begins(self, last: int) -> np.ndarray:
        """The steps at which a cycle begins, as far as the first one after `last`."""
        found, length = [0], float(self.num_steps)
        while found[-1] <= last:
            found.append(found[-1] + round(length))
            length *= self.growth
        return np.array(found)
