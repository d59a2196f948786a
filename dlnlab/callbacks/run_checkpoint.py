"""RunCheckpoint: Lightning's ModelCheckpoint with the periods a run wants."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dlnlab import checks
from dlnlab.callbacks.member_guard import MemberGuard

_PARTS = 20


class RunCheckpoint(ModelCheckpoint):
    """Saves a fit's whole state every max_steps/20 steps and at the end, with `last.ckpt`; none is removed.

    A fit always has one, beside any ModelCheckpoint of its config. Name it in the config to choose the period.

    Args:
        every_n_train_steps: A period in optimizer steps; None is max_steps/20, rounded up to the guard's grid.

    Raises:
        ValueError: If the period is no positive whole number.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None:
            checks.integer("every_n_train_steps", every_n_train_steps, at_least=1)
        # A run that goes on from an earlier checkpoint replaces the later ones, instead of writing `last-v1.ckpt` beside.
        super().__init__(filename="{step}", save_top_k=-1, save_last=True, enable_version_counter=False,
                         every_n_train_steps=every_n_train_steps or 1)  # fmt: skip
        self._given = every_n_train_steps

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what is saved depends on the step alone, and a run directory may move."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the period, now that max_steps is known."""
        if self._given is None:
            guards = (callback for callback in trainer.callbacks if isinstance(callback, MemberGuard))
            grid = next((guard.settings.every_n_steps for guard in guards), 1)
            self._every_n_train_steps = grid * math.ceil(max(trainer.max_steps, 1) / _PARTS / grid)
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, where it was not just saved."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step != self._last_global_step_saved:
            for name in (f"step={trainer.global_step}", self.CHECKPOINT_NAME_LAST):
                trainer.save_checkpoint(Path(self.dirpath) / f"{name}{self.FILE_EXTENSION}")
