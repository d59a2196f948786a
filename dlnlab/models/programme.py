"""Programme: what the members' schedules say, step by step."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dlnlab import checks
from dlnlab.optim import StepSchedule

CONSTANT = "constant"
QUANTITIES = ("lr", "weight_decay", "batch_size")

_BLOCK = 4096
"""A schedule is only ever asked for whole blocks of so many steps: how a chunk is cut can then not even change the
rounding of its cosines."""
_MOST_BLOCKS = 64


def checked_schedules(schedules: Any) -> dict[str, dict[str, StepSchedule]]:
    """The argument `schedules` of a model, if it is one.

    Raises:
        ValueError: That names what is none.
    """
    if schedules is None:
        return {}
    forms = f"a mapping of {', '.join(QUANTITIES)} to schedules"
    if not isinstance(schedules, dict):
        raise ValueError(f"schedules = {checks.shown(schedules)}: must be a mapping of names to {forms}")
    for name, of in schedules.items():
        if name == CONSTANT:
            raise ValueError(
                f"schedules.{name}: {CONSTANT!r} is what a member without a schedule has; give another name"
            )
        checks.file_name("schedules: name", name)
        if not isinstance(of, dict) or not of:
            raise ValueError(f"schedules.{name} = {checks.shown(of)}: must be {forms}")
        for quantity, schedule in of.items():
            if quantity not in QUANTITIES:
                raise ValueError(
                    f"schedules.{name}.{quantity}: there is no such key; there are {', '.join(QUANTITIES)}"
                )
            if not callable(schedule):
                raise ValueError(f"schedules.{name}.{quantity} = {checks.shown(schedule)}: must be a StepSchedule")
    return schedules


class Programme:
    """Which schedules are in force, for whom, and what they say.

    Args:
        of_members: The name of each member's schedule; `constant` is none.
        schedules: name -> {quantity: schedule}.
    """

    def __init__(self, of_members: list[str], schedules: dict[str, dict[str, StepSchedule]]) -> None:
        self.names = [name for name in dict.fromkeys(of_members) if name != CONSTANT]
        """The S schedules in force."""
        self.rows = torch.tensor([self.names.index(name) if name in self.names else -1 for name in of_members])
        """Which of them each member has, int64 (E,); -1 for none."""
        self._schedules = [schedules[name] for name in self.names]
        self._blocks: dict[tuple[int, str, int], np.ndarray] = {}

    def __bool__(self) -> bool:
        return bool(self.names)

    def changes(self, quantity: str) -> bool:
        """Whether any schedule in force says something of a quantity."""
        return any(quantity in of for of in self._schedules)

    def is_shared(self, quantity: str) -> bool:
        """Whether all members have the same schedule of a quantity, or none."""
        of_rows = [of.get(quantity) for of in self._schedules]
        return len({id(of_rows[row] if row >= 0 else None) for row in self.rows.tolist()}) == 1

    def values(self, quantity: str, start: int, stop: int) -> np.ndarray:
        """What the schedules say at the steps start, ..., stop - 1, (S, k); NaN where one says nothing of a quantity."""
        found = np.full((len(self.names), stop - start), np.nan)
        for row, of in enumerate(self._schedules):
            if quantity in of:
                blocks = [self._block(row, quantity, block) for block in range(start // _BLOCK, -(-stop // _BLOCK))]
                skip = start - start // _BLOCK * _BLOCK
                if blocks:
                    found[row] = np.concatenate(blocks)[skip : skip + stop - start]
        return found

    def factors(self, quantity: str, start: int, stop: int) -> np.ndarray:
        """The same, 1 where a schedule says nothing."""
        return np.nan_to_num(self.values(quantity, start, stop), nan=1.0)

    def elapsed(self, before: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The sums of lr's factors up to the steps start, ..., stop, (S, k + 1), beginning with those `before`, (S,).

        One is added after the other, so that a sum depends on no chunk.
        """
        return np.cumsum(np.column_stack((before, self.factors("lr", start, stop))), axis=1)

    def _block(self, row: int, quantity: str, block: int) -> np.ndarray:
        key = (row, quantity, block)
        if key not in self._blocks:
            if len(self._blocks) >= _MOST_BLOCKS * len(QUANTITIES) * len(self.names):
                self._blocks.clear()
            self._blocks[key] = self._ask(row, quantity, np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        return self._blocks[key]

    def _ask(self, row: int, quantity: str, steps: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(self._schedules[row][quantity](steps), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._key(row, quantity)}: must give numbers: {error}") from error
        if found.shape != steps.shape:
            raise ValueError(
                f"{self._key(row, quantity)}: gave shape {found.shape} for {len(steps)} steps; must give a number for each"
            )
        return found

    def _key(self, row: int, quantity: str) -> str:
        return f"schedules.{self.names[row]}.{quantity}"

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(self, num_steps: int, num_samples: int) -> np.ndarray:
        """Refuse what no step can be made with.

        Args:
            num_steps: Steps the fit takes at most.
            num_samples: N.

        Returns:
            The largest product of the factors of lr and weight decay, (S,).

        Raises:
            ValueError: That names the schedule and the step.
        """
        largest = np.zeros(len(self.names))
        for start, stop in self._stretches(num_steps):
            lr, decay = (self.values(quantity, start, stop) for quantity in ("lr", "weight_decay"))
            sizes = self.values("batch_size", start, stop)
            whole = (sizes >= 1) & (sizes <= num_samples) & (sizes == np.round(sizes)) | (sizes == math.inf)
            self._refuse("lr", lr, (lr > 0) & np.isfinite(lr), "a factor of lr must be positive and finite", start)
            self._refuse("weight_decay", decay, (decay >= 0) & np.isfinite(decay),
                         "a factor of weight_decay must be finite and not negative", start)  # fmt: skip
            words = f"must be a whole number from 1 to {num_samples}, the training samples, or full"
            self._refuse("batch_size", sizes, whole, words, start)
            lr, decay = (np.nan_to_num(values, nan=1.0) for values in (lr, decay))
            largest = np.maximum(largest, (lr * decay).max(1))
        return largest

    @staticmethod
    def _stretches(num_steps: int) -> Iterator[tuple[int, int]]:
        for start in range(0, num_steps, _BLOCK):
            yield start, min(start + _BLOCK, num_steps)

    def _refuse(self, quantity: str, values: np.ndarray, fine: np.ndarray, words: str, start: int) -> None:
        said = np.array([quantity in of for of in self._schedules])
        wrong = np.argwhere(~fine & said[:, None])
        if len(wrong):
            row, column = wrong[0]
            raise ValueError(f"{self._key(row, quantity)} = {values[row, column]:g} at step {start + column}: {words}")
