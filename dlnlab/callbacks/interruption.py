"""Interruption: Ctrl-C and SIGTERM end a fit in order."""

import os
import signal
import threading
from pathlib import Path
from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dlnlab.callbacks.run_checkpoint import RunCheckpoint


class Interruption(Callback):
    """Ends a fit at the end of the chunk in progress on Ctrl-C or SIGTERM, measured, recorded and saved as at any end.

    A second Ctrl-C ends the process at once; what is on disk is whole even then. Listens within `with`:

        with interruption:
            trainer.fit(model, data)
        if interruption.signal is not None: ...

    Args:
        checkpoint: Where to save the state if no `RunCheckpoint` does; None does not save it.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.signal: int | None = None
        """The signal that has ended the fit."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.signal = None
        self._listen()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python
        self._before = {}

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._handle)
                self._before.setdefault(number, before)

    def _handle(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = self.signal or number

    def next_event(self, step: int) -> None:
        """None: it looks wherever a chunk ends."""
        del step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen alone: Lightning has put a handler before ours that would end the fit with an exception."""
        del trainer, pl_module
        if self._before:
            self._listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop if a signal came."""
        del pl_module
        if self.signal is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state, where nobody else does."""
        del pl_module
        saved = any(isinstance(callback, RunCheckpoint) for callback in trainer.checkpoint_callbacks)
        if self.signal is not None and self.checkpoint is not None and not saved:
            trainer.save_checkpoint(self.checkpoint)
