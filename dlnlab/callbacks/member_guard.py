"""MemberGuard: stops members that have converged or diverged."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dlnlab.kernels.guard import ABOVE_BOUND, NOT_FINITE
from dlnlab.models import Guard, LinearNetwork
from dlnlab.models.base import SOURCE, STATUSES


class MemberGuard(Callback):
    """Freezes members that have converged or diverged, and ends the fit when none is running.

    The last step of a fit, and every step with a checkpoint, is a check too. Off the grid of `every_n_steps` it decides
    what the results and the checkpoint say of the members, but not which of them go on: a fit that is extended, or
    resumed from there, is bit for bit the fit that was never cut. A diverged member goes back to the last check on the
    grid, which is its `stopped_at`; `diverged_by` says why: `loss` (above its bound), `not finite`, or `source` (it had
    diverged in the run this one started from, and `stopped_at` is the step of that run).

    Args:
        tol: A member whose full clean data loss is below this has converged; 0 = never, None = 1e-20 (float64) or
            1e-12 (float32).
        bound: A member has diverged whose full clean data loss is more than this times the larger of its loss at step 0 and
            the loss of the zero predictor, or whose loss or a parameter is not finite. Where neither of the two losses is
            positive and finite, the latter alone counts.
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
        """Stop at once where no member is running: in a resumed fit, or after a run in which all have diverged."""
        if isinstance(pl_module, LinearNetwork):
            pl_module.begin(trainer.global_step)
        self._stop_if_none_runs(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop when no member is running."""
        self._stop_if_none_runs(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the last step, before the other callbacks look at it."""
        if isinstance(pl_module, LinearNetwork):
            pl_module.end(trainer.global_step)

    def _stop_if_none_runs(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(module, LinearNetwork) and len(module.running) == 0:
            trainer.should_stop = True

    @staticmethod
    def summary(module: LinearNetwork) -> str:
        """How many members have which status."""
        counts = torch.bincount(module.status.long(), minlength=len(STATUSES)).tolist()
        return ", ".join(f"{count} {status}" for count, status in zip(counts, STATUSES, strict=True))

    @staticmethod
    def causes(module: LinearNetwork) -> str:
        """Why how many members have diverged, in words; empty where none has."""
        counts = torch.bincount(module.diverged_by.long(), minlength=SOURCE + 1).tolist()
        bound = "" if module.guard is None else f"{module.guard.bound:g}"
        words = {
            ABOVE_BOUND: f"by a loss above {bound} times the larger of its first value and the zero predictor's",
            NOT_FINITE: "not finite",
            SOURCE: "in the run this one started from",
        }
        return "; ".join(f"{counts[code]} {text}" for code, text in words.items() if counts[code])
