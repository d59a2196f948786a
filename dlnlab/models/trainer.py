"""What chunks need of Lightning's Trainer: the next event, true step counts, and no option they cannot honour.

All that is private in Lightning is touched here alone.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
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


# Clusters -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Make a fit rank 0 of its own, whichever task of a job runs it.

    Lightning reads the rank from SLURM's and MPI's variables, and loggers of any rank but 0 write nothing.
    """
    rank, rank_zero_only.rank = rank_zero_only.rank, 0
    try:
        yield
    finally:
        rank_zero_only.rank = rank


def resume_from_nothing(trainer: Trainer) -> None:
    """Keep a fit without `ckpt_path` from resuming from a file that Lightning finds by itself.

    Under SLURM it takes `hpc_ckpt_N.ckpt` of the working folder, and beside OnExceptionCheckpoint the newest checkpoint.
    """
    trainer.ckpt_path = None
    trainer._checkpoint_connector._user_managed = True


def leave_requeueing_alone(trainer: Trainer) -> None:
    """Keep Lightning's SLURM handler from writing `hpc_ckpt_N.ckpt` in the middle of a chunk and requeueing the job."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def refuse_checkpoint_of_requeueing(trainer: Trainer | None) -> None:
    """Raise ValueError where a fit is about to resume from the checkpoint of somebody's requeued job."""
    path = None if trainer is None else trainer.ckpt_path
    if path is not None and re.fullmatch(r"hpc_ckpt_\d+\.ckpt", Path(path).name):
        raise ValueError(
            f"{path}: Lightning takes this file by itself under SLURM, whichever fit has left it there; move it away, or "
            "rename it and give it as ckpt_path"
        )


# Metrics --------------------------------------------------------------------------------------------------------------


def metrics_of(callback: Callback) -> set[str]:
    """The metrics that a callback of Lightning's reads from `trainer.callback_metrics`."""
    if not isinstance(callback, EarlyStopping | ModelCheckpoint):
        return set()
    found = {callback.monitor} - {None}
    if isinstance(callback, ModelCheckpoint):
        found |= set(re.findall(r"\{([^:}]*)", callback.filename or "")) - {"step", "epoch"}
    return found


def reads_at(callback: Callback) -> int:
    """The period in optimizer steps at which a callback of `metrics_of` reads them; EarlyStopping looks at records."""
    return callback._every_n_train_steps if isinstance(callback, ModelCheckpoint) else 1


def saves_at(callback: Callback, step: int) -> bool:
    """Whether a ModelCheckpoint that reads metrics saves at this step."""
    if not isinstance(callback, ModelCheckpoint) or not metrics_of(callback):
        return False
    return callback._every_n_train_steps > 0 and step % callback._every_n_train_steps == 0


def check_early_stopping(callback: EarlyStopping, trainer: Trainer) -> None:
    """Let EarlyStopping look at its metric, which it would do at ends of epochs or validations."""
    callback._run_early_stopping_check(trainer)


class _CountsSteps(ProgressBar):
    """A bar of Lightning's that is told optimizer steps where Lightning would tell it chunks."""

    _shown = -1

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        del batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _should_update(self, current: int, total: Any) -> bool:
        period = max(1, getattr(self, "refresh_rate", 1))
        before, self._shown = self._shown, current
        return self.is_enabled and (current == total or current // period != before // period)


def adapt_callbacks(trainer: Trainer) -> None:
    """Let Lightning's callbacks that count batches or look at ends of epochs do so in optimizer steps and at records."""
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping):
            callback._check_on_train_epoch_end = False
        if isinstance(callback, ProgressBar) and not isinstance(callback, _CountsSteps) and not _is_ours(callback):
            callback.__class__ = _counting_steps(type(callback))


@functools.cache
def _counting_steps(kind: type[ProgressBar]) -> type[ProgressBar]:
    # Not of the same name: a config's short class names are looked up among subclasses.
    return type(f"_{kind.__name__}InSteps", (_CountsSteps, kind), {"__module__": __name__})


def _is_ours(callback: Callback) -> bool:
    return hasattr(callback, "next_event")


# Options --------------------------------------------------------------------------------------------------------------


def refuse_what_chunks_cannot_honour(trainer: Trainer) -> None:
    """Raise ValueError for trainer options that would silently do nothing, or something else."""
    if trainer.max_steps < 1:
        raise ValueError("trainer.max_steps: must be given, the number of optimizer steps")
    checks.integer("trainer.max_steps", trainer.max_steps)
    no_epochs = "a fit has no epochs and its batches are chunks of steps: only trainer.max_steps says how long it is"
    refused = {
        "gradient_clip_val": (trainer.gradient_clip_val, "clipping would couple the members; use a smaller lr"),
        "gradient_clip_algorithm": (trainer.gradient_clip_algorithm, "clipping would couple the members"),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches != 1, "use the model's batch_size"),
        "precision": (trainer.precision != "32-true", "use the model's dtype, float64 or float32"),
        "num_nodes": (trainer.num_nodes != 1, ONE_DEVICE),
        "devices": (trainer.world_size != 1, ONE_DEVICE),
        "strategy": (not isinstance(trainer.strategy, SingleDeviceStrategy), "members share one device; leave it out"),
        "sync_batchnorm": (trainer._accelerator_connector._layer_sync, "members share one device; leave it out"),
        "fast_dev_run": (trainer.fast_dev_run, "it counts chunks, not steps; use --trainer.max_steps 10"),
        "overfit_batches": (trainer.overfit_batches, no_epochs),
        "limit_train_batches": (trainer.limit_train_batches not in (None, 1.0), no_epochs),
        "limit_val_batches": (trainer.limit_val_batches not in (None, 0, 1.0),
                              "a fit validates nothing; give it to `dlnlab validate`"),
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
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: {type(callback).__name__}: {reason}")
        if isinstance(callback, Timer) and callback._duration is not None and callback._interval != "step":
            raise ValueError(
                f"trainer.callbacks: Timer.interval = {str(callback._interval)!r}: must be step; {no_epochs}"
            )
        if isinstance(callback, ModelCheckpoint):
            _refuse_checkpoint_outside_steps(callback, no_epochs)


def _refuse_checkpoint_outside_steps(callback: ModelCheckpoint, no_epochs: str) -> None:
    name = f"trainer.callbacks: {type(callback).__name__}"
    if callback._train_time_interval is not None:
        raise ValueError(f"{name}.train_time_interval: must be left out; give every_n_train_steps")
    if not callback._every_n_train_steps:
        raise ValueError(f"{name} needs every_n_train_steps: {no_epochs}")
    if callback._save_on_train_epoch_end is not None:
        raise ValueError(f"{name}.save_on_train_epoch_end: {no_epochs}")
    if callback.save_on_exception:
        raise ValueError(f"{name}.save_on_exception: {_IN_A_CHUNK}")


ONE_DEVICE = "one device for one fit; run parts of the ensemble as fits of their own"
_IN_A_CHUNK = "an exception may come in the middle of a chunk, whose steps are not counted yet; last.ckpt is whole"
_AT_EPOCHS = "it acts at ends of epochs, and a fit has none"
_REFUSED_CALLBACKS: dict[type[Callback], str] = {
    callbacks.BaseFinetuning: _AT_EPOCHS,
    callbacks.BatchSizeFinder: "members have batch sizes of their own; make batch_size an axis",
    callbacks.GradientAccumulationScheduler: "use the model's batch_size",
    callbacks.LearningRateFinder: "members have step sizes of their own; make lr an axis",
    callbacks.LearningRateMonitor: "no learning-rate scheduler is honoured; `schedules` are recorded as scheduled_lr",
    callbacks.ModelPruning: _AT_EPOCHS,
    callbacks.OnExceptionCheckpoint: _IN_A_CHUNK,
    callbacks.SpikeDetection: "it needs the loss of every step; guard.bound ends a member that diverges",
    callbacks.StochasticWeightAveraging: _AT_EPOCHS,
    callbacks.ThroughputMonitor: "it counts batches, which are chunks of steps; the progress bar shows steps per second",
    callbacks.WeightAveraging: "it averages once a batch, which is a chunk of steps",
}
"""Lightning's callbacks that chunks cannot honour, and why."""
