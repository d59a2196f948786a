"""Lists of numbers as configs write them, and the optimizer steps at which something happens."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from dlnlab import checks

MOST_VALUES = 1_000_000
"""More are a mistake: no list of steps or axis is so long."""


def expand(spec: Any, where: str) -> list[Any]:
    """Turn one entry of a config into its list of values.

    A list is taken as it is and a scalar becomes a list of one. `{linear: [lo, hi, n]}` has n evenly spaced values
    with both ends, `{log10: [lo, hi, n]}` the powers of ten of such values, `{range: n}` and `{range: [a, b]}` the
    integers of Python's range.

    Args:
        spec: The entry.
        where: Its key, for messages.

    Returns:
        The values, as Python numbers or strings.

    Raises:
        ValueError: If the entry has none of these forms or is empty.
    """
    if isinstance(spec, dict):
        values = _expand_form(spec, where)
    elif isinstance(spec, str) or not isinstance(spec, Sequence | range | np.ndarray):
        values = [spec]
    else:
        values = [value.item() if isinstance(value, np.generic) else value for value in spec]
    if not values:
        raise ValueError(f"{where} is empty: it needs at least one value")
    return values


def _expand_form(spec: dict, where: str) -> list[Any]:
    forms = "linear: [lo, hi, n], log10: [lo, hi, n], range: n or range: [a, b]"
    if len(spec) != 1 or not set(spec) <= {"linear", "log10", "range"}:
        raise ValueError(f"{where} = {checks.shown(spec)}: must be a list, a scalar or one of {forms}")
    form, arguments = next(iter(spec.items()))
    if form == "range":
        bounds = arguments if isinstance(arguments, Sequence) else [arguments]
        if len(bounds) not in (1, 2):
            raise ValueError(f"{where}.range = {checks.shown(arguments)}: must be n or [a, b]")
        found = range(*(checks.integer(f"{where}.range", bound, at_least=-checks.LARGEST) for bound in bounds))
        if len(found) > MOST_VALUES:
            raise ValueError(
                f"{where}.range = {checks.shown(arguments)}: {len(found):,} values, at most {MOST_VALUES:,} make sense"
            )
        return list(found)
    if not isinstance(arguments, Sequence) or len(arguments) != 3:
        raise ValueError(f"{where}.{form} = {checks.shown(arguments)}: must be [lo, hi, n]")
    low, high = (checks.number(f"{where}.{form}", end) for end in arguments[:2])
    count = checks.integer(f"{where}.{form}[2]", arguments[2], at_least=1, at_most=MOST_VALUES)
    points = np.linspace(low, high, count)
    if form == "log10" and max(abs(low), abs(high)) > 307:
        raise ValueError(
            f"{where}.log10 = {checks.shown(arguments)}: lo and hi are exponents of ten and must lie within -307 and 307"
        )
    return (10.0**points if form == "log10" else points).tolist()


def _step(where: str, value: Any) -> float:
    step = checks.number(where, value, at_least=0)
    if step > checks.LARGEST:
        raise ValueError(f"{where} = {checks.shown(value)}: must be at most {checks.LARGEST}")
    return step


class Schedule:
    """The optimizer steps at which something is recorded or measured.

    Args:
        every_n_steps: A period in steps, or None.
        at: A list of steps in any form `expand` knows, rounded to whole steps; repeats are dropped.
        pairs: Add k + 1 for every step k: at the edge of stability gradient descent oscillates with period 2, and a
            schedule of even steps would only ever see one phase.
        of: Whose schedule it is, the beginning of messages.

    Raises:
        ValueError: If both or neither are given, or a value is no step.
    """

    def __init__(
        self, every_n_steps: int | None = None, at: Any = None, pairs: bool = False, of: str | None = None
    ) -> None:
        if (every_n_steps is None) == (at is None):
            raise ValueError(f"{of or 'a schedule'}: needs either every_n_steps or at, and not both")
        key = f"{of}." if of else ""
        self.pairs = checks.flag(f"{key}pairs", pairs)
        self.every_n_steps = every_n_steps
        self.steps: list[int] | None = None
        if at is not None:
            steps = {round(_step(f"{key}at", value)) for value in expand(at, f"{key}at")}
            self.steps = sorted(steps | {step + 1 for step in steps} if pairs else steps)
        else:
            checks.integer(f"{key}every_n_steps", every_n_steps, at_least=1)

    def next_after(self, step: int) -> int | None:
        """The first scheduled step later than `step`, or None."""
        if self.steps is not None:
            index = bisect_right(self.steps, step)
            return self.steps[index] if index < len(self.steps) else None
        offset = step % self.every_n_steps
        if self.pairs and offset == 0:
            return step + 1
        return step - offset + self.every_n_steps

    def nth_after(self, step: int, n: int) -> int | None:
        """The n-th scheduled step later than `step`, or None if there are fewer."""
        if self.steps is not None:
            index = bisect_right(self.steps, step) + n - 1
            return self.steps[index] if index < len(self.steps) else None
        period = self.every_n_steps
        first = self.next_after(step)
        if not self.pairs or period == 1:
            return first + (n - 1) * period
        count = first % period + n - 1  # from the start of the first pair
        return first - first % period + count // 2 * period + count % 2

    def __contains__(self, step: int) -> bool:
        return self.next_after(step - 1) == step

    def meets(self, period: int, last: int, always: bool = False) -> bool:
        """Whether one of the multiples of `period` from 1 to `last` is one of its steps; with `always`, all of them."""
        if self.steps is None:
            return period % self.every_n_steps == 0 if always else math.lcm(period, self.every_n_steps) <= last
        met = sum(0 < step <= last and step % period == 0 for step in self.steps)
        return met == last // period if always else met > 0

    def between(self, start: int, stop: int) -> list[int]:
        """The scheduled steps in (start, stop], ascending."""
        found = []
        step = self.next_after(start)
        while step is not None and step <= stop:
            found.append(step)
            step = self.next_after(step)
        return found

    def thinned(self, most: int, last: float) -> "Schedule":
        """Evenly chosen ones of its steps.

        Args:
            most: At most so many after step 0 and up to `last`.
            last: The last step; infinite where it is not known, and then nothing is left out.
        """
        if last == math.inf:
            return self
        pairs = self.pairs and self.every_n_steps != 1
        if self.steps is not None:
            count = bisect_right(self.steps, last) - bisect_right(self.steps, 0)
        else:
            count = last // self.every_n_steps * (1 + pairs)
        stride = max(1, math.ceil(count / most))
        stride += 1 - stride % 2  # an odd stride sees both phases of an oscillation with period 2
        if self.steps is not None:
            return Schedule(at=self.steps[::stride])
        return Schedule(self.every_n_steps * stride, pairs=pairs)
