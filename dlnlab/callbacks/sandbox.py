"""A sandbox: evaluate a LightningModule in the midst of its training as if nothing had happened."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

_CONTAINERS = (list, dict, OrderedDict, set, deque)


@contextmanager
def sandbox(module: LightningModule, dtype: torch.dtype | None = None) -> Iterator[Callable[[Any], Any]]:
    """Put copies in the place of all that a module holds, for as long as the context lasts.

    Parameters, buffers, the states of metrics, counters, lists and flags of the module and its children are copies inside
    and the untouched originals afterwards; `self.log` and the trainer's loggers are silent. Nothing that refers to the
    originals (optimizers, DDP, hooks on parameters) notices. Random generators are none of its business.

    Args:
        module: The module.
        dtype: Of the copies of floating-point tensors, and of new tensors; None leaves them as they are.

    Yields:
        What maps an original, or a container of originals, to its copy.
    """
    copies: dict[int, Any] = {}

    def copy_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = _copied(value, dtype)
            return copies[id(value)]
        if type(value) is deque:
            return deque(map(copy_of, value), value.maxlen)
        if type(value) in (list, set):
            return type(value)(map(copy_of, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, copy_of(item)) for key, item in value.items())
        return value

    attributes = [(child, dict(vars(child))) for child in module.modules()]
    trainer, usual = module._trainer, torch.get_default_dtype()
    loggers = None if trainer is None else trainer.loggers
    try:
        for child, held in attributes:
            for name, value in held.items():
                if name != "_modules" and (isinstance(value, Tensor) or type(value) in _CONTAINERS):
                    vars(child)[name] = copy_of(value)
            if isinstance(child, LightningModule):
                vars(child)["log"] = vars(child)["log_dict"] = _say_nothing
        if trainer is not None:
            trainer.loggers = [DummyLogger() for _ in loggers]
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield copy_of
    finally:
        torch.set_default_dtype(usual)
        if trainer is not None:
            trainer.loggers = loggers
        for child, held in attributes:
            vars(child).clear()
            vars(child).update(held)


def _copied(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        copy = value.detach().clone()
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        return nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy


def _say_nothing(*_: Any, **__: Any) -> None:
    """In the place of `self.log`."""
