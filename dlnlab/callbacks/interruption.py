"""Interruption: Ctrl-C and the signals that end a job end a fit in order."""

import os
import signal
import threading
from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has two of them
)


class Interruption(Callback):
    """Ends a fit at the end of the chunk in progress on Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2.

    The end is measured, recorded and saved as any other. A second Ctrl-C ends the process at once; what is on disk is
    whole even then. A signal that was ignored before (by nohup, or in a job in the background) stays ignored, and a
    handler that the program has set itself is called once the fit has ended. Listens within `with`:

        with interruption:
            trainer.fit(model, data)
        if interruption.signal is not None: ...
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that has ended the fit."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.signal = None
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            # None is a handler that was not set from Python and could not be put back.
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {number: handler for number, handler in before.items() if handler is not None}
            self._listen()
        return self

    def __exit__(self, *_: Any) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.signal is not None and before[self.signal] not in (signal.SIG_DFL, signal.default_int_handler):
            signal.raise_signal(self.signal)

    def _listen(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler == signal.SIG_IGN else self._handle)

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
        self._listen()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop if a signal came."""
        del pl_module
        if self.signal is not None:
            trainer.should_stop = True
