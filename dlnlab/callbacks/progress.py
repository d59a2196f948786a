"""A progress bar that counts optimizer steps and members."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from dlnlab.callbacks.member_guard import MemberGuard
from dlnlab.models import LinearNetwork

_REFRESH_SECONDS = 0.5


class MemberProgress(ProgressBar):
    """True optimizer steps, how many members run, and the time left at the present speed; on standard error.

    Silent where standard error is not a terminal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._shown_at = 0.0
        self._enabled = sys.stderr.isatty()

    def next_event(self, step: int) -> None:
        """None: it looks wherever a chunk ends."""
        del step

    def disable(self) -> None:
        """Show nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        del pl_module
        if self._enabled:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            # smoothing: recent steps count, because members that stop make steps cheaper.
            self._bar = tqdm(total=total, initial=trainer.global_step, unit=" steps", file=sys.stderr, smoothing=0.1,
                             dynamic_ncols=True, leave=True)  # fmt: skip

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move it, at most twice a second."""
        if self._bar is not None and time.monotonic() - self._shown_at > _REFRESH_SECONDS:
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        self._shown_at = time.monotonic()
        if isinstance(module, LinearNetwork):
            self._bar.set_postfix_str(MemberGuard.summary(module), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the end and close."""
        if self._bar is not None:
            self._show(trainer, pl_module)
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar so that a message does not land in it."""
        del trainer, pl_module, exception
        if self._bar is not None:
            self._bar.close()
            self._bar = None
