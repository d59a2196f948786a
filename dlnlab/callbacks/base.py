"""Measurement: what every measured quantity promises.

A subclass writes `measure(model, batch)`, which returns one value per member for each name it measures:

    class MaxEntry(Measurement):
        def measure(self, model, batch):
            return {"max_entry": model.predictor().abs().amax(-1)}

It inherits the schedule (in true optimizer steps; without one of its own it follows the recorder's), no-grad
discipline, and recording: under the recorder the values go to the results, to TensorBoard and to loggers, without one
their median over the members that have not diverged goes to the trainer's loggers. Members that had diverged in the run
this one has started from are NaN.

A trainer may have several of one class with other arguments, which it keeps under the attributes of the same names.
"""

import inspect
import json
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from dlnlab.models import LinearNetwork
from dlnlab.models.base import DIVERGED
from dlnlab.recorder import TAGS, Recorder, median
from dlnlab.schedule import Schedule


class Measurement(Callback):
    """Measures something of a model at scheduled optimizer steps.

    Args:
        every_n_steps: A period in optimizer steps.
        at: A list of steps in the forms of `record.at`.

    Raises:
        ValueError: If both are given or one is no schedule.
    """

    dims: dict[str, list[str]] = {}
    """Names of trailing dimensions, where they are not `coordinate` or `row` and `column`."""

    last_only: ClassVar[bool] = False
    """True for what costs more than a record: without a schedule of its own it is measured at the last step only."""

    of_constant_rates: ClassVar[bool] = False
    """True for what is defined of members whose lr, weight decay and batch size do not change with the step."""

    of_squared_loss: ClassVar[bool] = False
    """True for formulas of the squared loss |X beta - y|^2/(2B); see `LinearNetwork.squared_loss_refusal`."""

    of_product: ClassVar[bool] = False
    """True for formulas of beta = u*v, one pair of factors; see `LinearNetwork.product_refusal`."""

    def __init__(self, every_n_steps: int | None = None, at: Any = None) -> None:
        self.schedule = (
            None if every_n_steps is None and at is None else Schedule(every_n_steps, at, of=type(self).__name__)
        )
        self._given = {"every_n_steps": every_n_steps, "at": at}
        self._last_step = -1
        self._finished = False
        self._only_last = self.last_only and self.schedule is None

    def measure(self, model: LightningModule, batch: Any) -> dict[str, Tensor]:
        """Measure the model as it is now.

        Args:
            model: The model being trained.
            batch: The full training batch of a `LinearNetwork`; for any other module the batch it last trained on.

        Returns:
            name -> one entry per member, (E, ...).
        """
        raise NotImplementedError

    def names(self, model: LightningModule) -> tuple[str, ...]:
        """The variables this adds to the results of a model that has been set up."""
        with torch.no_grad():
            return tuple(self.measure(model, model.full_batch())) if isinstance(model, LinearNetwork) else ()

    def check(self, model: LightningModule) -> None:
        """Raise ValueError if this cannot be measured on the model; called once it is set up, before the fit."""

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Check, and take the recorder's schedule where there is none of its own."""
        if self._only_last:
            self.schedule = Schedule(at=[0])  # nothing is left of it once training has begun
        if self.schedule is None:
            recorder = _recorder_of(trainer)
            if recorder is None:
                raise ValueError(f"{type(self).__name__}: give every_n_steps or at, there is no recorder to follow")
            self.schedule = recorder.schedule
        if self.of_constant_rates and isinstance(module, LinearNetwork) and module.programme:
            raise ValueError(
                f"{type(self).__name__}: it is of a constant lr, weight decay and batch size, which the schedules "
                f"{', '.join(module.programme.names)} change; leave it out, or measure it in a variant without schedules"
            )
        self.check(module)
        if isinstance(module, LinearNetwork):
            self._refuse_other_laws(module)

    def _refuse_other_laws(self, module: LinearNetwork) -> None:
        asked = {
            "the squared loss |X beta - y|^2/(2B)": module.squared_loss_refusal() if self.of_squared_loss else None,
            "a predictor that is the product of a pair of factors": module.product_refusal()
            if self.of_product
            else None,
        }
        for law, reason in asked.items():
            if reason is not None:
                raise ValueError(f"{type(self).__name__}: its formulas are of {law}, but {reason}; leave it out")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare, where `prepare` was not called before."""
        recorder = _recorder_of(trainer)
        if recorder is not None and recorder.schedule is None:
            recorder.prepare(trainer, pl_module)
        self.prepare(trainer, pl_module)

    def next_event(self, step: int) -> int | None:
        """The next step at which this wants to look."""
        return self.schedule.next_after(step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure step 0."""
        self._finished = False
        if trainer.global_step == 0 and isinstance(pl_module, LinearNetwork) and not self._only_last:
            pl_module.begin(0)
            self._measure(trainer, pl_module, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Measure where the schedule says so."""
        del outputs
        if trainer.global_step in self.schedule:
            self._measure(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last step."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a resumed fit had no step left to take."""
        if not self._finished:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._finished = True
        if not isinstance(module, LinearNetwork):
            return
        module.end(trainer.global_step)
        if trainer.global_step > self._last_step or module.has_provisional_ends:
            before = self.state_dict()
            self._measure(trainer, module, None, final=True)
            self.load_state_dict(before)  # a fit that goes on from here has not measured now

    @torch.no_grad()
    def _measure(
        self, trainer: Trainer, module: LightningModule, batch: Any, final: bool = False, at: int | None = None
    ) -> None:
        step = trainer.global_step if at is None else at
        if not final:
            self._last_step = step
        if isinstance(module, LinearNetwork):
            batch = module.full_batch()
        values = {name: value.detach().clone() for name, value in self.measure(module, batch).items()}
        if isinstance(module, LinearNetwork) and bool((gone := module.diverged_before).any()):
            for name, value in values.items():
                rows = gone.to(value.device).view(-1, *[1] * (value.ndim - 1))
                values[name] = value.double().masked_fill(rows, torch.nan)
        recorder = _recorder_of(trainer)
        if recorder is not None:
            recorder.record(step, values, self.dims, final, self.schedule)
            return
        diverged = module.status == DIVERGED if isinstance(module, LinearNetwork) else None
        medians = {TAGS.get(name, f"measured/{name}"): float(median(value, diverged))
                   for name, value in values.items() if value.ndim == 1}  # fmt: skip
        medians = {tag: number for tag, number in medians.items() if number == number}
        for logger in trainer.loggers:
            logger.log_metrics(medians, step=step)

    def arguments(self) -> dict[str, Any]:
        """What it was made with, as its attributes tell."""
        defaults = {
            name: parameter.default
            for cls in reversed(type(self).__mro__)
            if "__init__" in vars(cls)
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
        }
        known = {**vars(self), **self._given}
        names = sorted(defaults.keys() & known.keys())
        return {name: known[name] for name in names if not _alike(known[name], defaults[name])}

    @cached_property
    def state_key(self) -> str:
        """Tells apart several of one class: the class, and the arguments that are not the default."""
        arguments = json.dumps(self.arguments(), default=lambda value: getattr(value, "__name__", type(value).__name__))
        return type(self).__qualname__ + (arguments if arguments != "{}" else "")

    def defining(self, name: str) -> dict[str, Any]:
        """The arguments that decide what the variable `name` is: all but the schedule."""
        return {argument: value for argument, value in self.arguments().items() if argument not in self._given}

    def refuse_to_share(self, name: str, other: "Measurement") -> None:
        """Raise ValueError where another measurement records a variable of the same name that is not the same."""
        mine = self.defining(name)
        if other is not self and (type(self) is not type(other) or not _alike(mine, other.defining(name))):
            raise ValueError(
                f"{name} is recorded already, by {type(self).__name__} with {mine or 'its defaults'}: two measurements "
                "cannot record one variable; leave one out, or measure it in a variant"
            )

    def state_dict(self) -> dict[str, Any]:
        """The last measured step."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self._last_step = state_dict["last_step"]


def _recorder_of(trainer: Trainer) -> Recorder | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, Recorder)), None)


def _alike(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # tensors and arrays of several entries
        return repr(one) == repr(other)


def refuse_twins(callbacks: Iterable[Callback]) -> None:
    """Raise ValueError for two measurements, or two checkpoints, whose states a checkpoint could not tell apart."""
    keys = Counter(callback.state_key for callback in callbacks if isinstance(callback, Measurement | Checkpoint))
    for key, count in keys.items():
        if count > 1:
            raise ValueError(f"trainer.callbacks: {count} of {key} with the same arguments; leave one")
