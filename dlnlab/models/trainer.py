"""What chunks need of Lightning's Trainer: the next event, true step counts, and no option they cannot honour."""

from typing import Any

from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from dlnlab import checks


def next_event_of(callback: Callback, step: int) -> int | None:
    """The first step after `step` at which a callback wants to look, or None: its own answer, or its period."""
    if hasattr(callback, "next_event"):
        return callback.next_event(step)
    for name in ("every_n_steps", "every_n_train_steps", "_every_n_train_steps"):
        period = getattr(callback, name, None)
        if isinstance(period, int) and period > 0:
            return step - step % period + period
    return None


def count_steps(trainer: Any, k: int) -> None:
    """Tell Lightning that k optimizer steps were taken: the only place that touches its private counters.

    `optim_step_progress` is what `trainer.global_step` reads in manual optimization; `_batches_that_stepped` is the x
    axis of `self.log`, to which the loop itself adds the last one.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    try:
        epoch_loop.manual_optimization.optim_step_progress.increment_by(k)
        epoch_loop._batches_that_stepped += k - 1
    except AttributeError as error:
        raise RuntimeError("this version of lightning keeps its step counters elsewhere: dlnlab needs 2.6") from error


def limit_steps(trainer: Any, most: int) -> None:
    """Let a fit end after `most` optimizer steps, unless it was to end earlier."""
    if trainer.max_steps < 0:
        trainer.fit_loop.max_epochs = -1  # what Lightning takes where max_steps is given
    if trainer.max_steps < 0 or trainer.max_steps > most:
        trainer.fit_loop.epoch_loop.max_steps = most


def refuse_what_chunks_cannot_honour(trainer: Trainer) -> None:
    """Raise ValueError for trainer options that would silently do nothing, or something else."""
    if trainer.max_steps < 1:
        raise ValueError("trainer.max_steps: must be given, the number of optimizer steps")
    checks.integer("trainer.max_steps", trainer.max_steps)
    no_epochs = "a fit has no epochs and its batches are chunks of steps: only trainer.max_steps says how long it is"
    refused = {
        "gradient_clip_val": (trainer.gradient_clip_val, "clipping would couple the members; use a smaller lr"),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches != 1, "use the model's batch_size"),
        "precision": (trainer.precision != "32-true", "use the model's dtype, float64 or float32"),
        "num_nodes": (trainer.num_nodes != 1, "one device for one fit; run parts of the ensemble as fits of their own"),
        "devices": (trainer.world_size != 1, "one device for one fit; run parts of the ensemble as fits of their own"),
        "strategy": (not isinstance(trainer.strategy, SingleDeviceStrategy), "members share one device; leave it out"),
        "fast_dev_run": (trainer.fast_dev_run, "it counts chunks, not steps; use --trainer.max_steps 10"),
        "overfit_batches": (trainer.overfit_batches, no_epochs),
        "limit_train_batches": (trainer.limit_train_batches not in (None, 1.0), no_epochs),
        "max_epochs": (trainer.max_epochs not in (None, -1), no_epochs),
        "min_epochs": (trainer.min_epochs, no_epochs),
        "min_steps": (trainer.min_steps, "a fit ends when no member is running; guard.tol: 0 lets them go on"),
        "val_check_interval": (trainer.val_check_interval not in (None, 1.0),
                               "it counts chunks, not steps; use a measurement's every_n_steps"),
        "check_val_every_n_epoch": (trainer.check_val_every_n_epoch != 1, no_epochs),
        "reload_dataloaders_every_n_epochs": (trainer.reload_dataloaders_every_n_epochs, no_epochs),
        "detect_anomaly": (trainer._detect_anomaly, "one diverging member would end the fit of all; see guard.bound"),
        "barebones": (trainer.barebones, "use logger: false, enable_checkpointing: false"),
    }  # fmt: skip
    for name, (given, advice) in refused.items():
        if given:
            raise ValueError(f"trainer.{name}: {advice}")
    if trainer.log_every_n_steps:
        checks.integer("trainer.log_every_n_steps", trainer.log_every_n_steps)
    for callback in trainer.callbacks:
        if isinstance(callback, _REFUSED_CALLBACKS):
            raise ValueError(f"trainer.callbacks: {type(callback).__name__} has no effect here: {no_epochs}")
        if isinstance(callback, ModelCheckpoint) and not (
            callback._every_n_train_steps or callback._train_time_interval
        ):
            raise ValueError(f"trainer.callbacks: {type(callback).__name__} needs every_n_train_steps: {no_epochs}")


_REFUSED_CALLBACKS = (
    callbacks.BatchSizeFinder,
    callbacks.EarlyStopping,
    callbacks.GradientAccumulationScheduler,
    callbacks.LearningRateFinder,
    callbacks.LearningRateMonitor,
    callbacks.StochasticWeightAveraging,
    callbacks.WeightAveraging,
)
"""Lightning's callbacks that act at ends of epochs, or on one learning rate or one batch size."""
