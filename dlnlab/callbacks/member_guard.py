"""MemberGuard: which members go on."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dlnlab.models import Guard, LinearNetwork
from dlnlab.models.base import STATUSES


class MemberGuard(Callback):
    """Freezes members that have converged or diverged, and ends the fit when none is running.

    Args:
        tol: A member whose full clean data loss is below this has converged; 0 = never, None = 1e-20 (float64) or
            1e-12 (float32).
        bound: A member whose loss or a parameter is non-finite or above this has diverged; it goes back to the last
            check.
        every_n_steps: Members are checked at optimizer steps divisible by this (`GradientFlow`: at every step).

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, tol: float | None = None, bound: float = 1e10, every_n_steps: int = 100) -> None:
        self.settings = Guard(tol, bound, every_n_steps)

    def next_event(self, step: int) -> None:
        """None: the model checks on the guard's grid inside its chunks."""
        del step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model its guard."""
        del trainer, stage
        if isinstance(pl_module, LinearNetwork):
            pl_module.guard = self.settings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where a resumed fit has no running member."""
        self._stop_if_none_runs(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop when no member is running."""
        self._stop_if_none_runs(trainer, pl_module)

    def _stop_if_none_runs(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(module, LinearNetwork) and len(module.running) == 0:
            trainer.should_stop = True

    @staticmethod
    def summary(module: LinearNetwork) -> str:
        """How many members have which status."""
        counts = torch.bincount(module.status.long(), minlength=len(STATUSES)).tolist()
        return ", ".join(f"{count} {status}" for count, status in zip(counts, STATUSES, strict=True))
