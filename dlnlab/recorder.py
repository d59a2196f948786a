"""What was measured, when and for whom -> result segments and TensorBoard. The only place that knows tags."""

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from dlnlab import checks, results
from dlnlab.data.base import refuse_beyond_memory
from dlnlab.ensemble import Ensemble
from dlnlab.models import LinearNetwork
from dlnlab.schedule import Schedule

DEFAULT_VARIABLES = ("train_loss", "test_loss", "distance", "gain")

TAGS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "distance": "recovery/distance",
    "support_f1": "recovery/support_f1",
    "l1_norm": "predictor/l1_norm",
    "gain_l1": "gain/l1",
    "gain_support_ratio": "gain/support_ratio",
    "sharpness": "curvature/sharpness",
    "effective_sharpness": "curvature/effective_sharpness",
    "sharpness_residual": "curvature/sharpness_residual",
    **{f"sharpness_{place}": f"curvature/sharpness_{place}" for place in range(2, 21)},
    "smallest_eigenvalue": "curvature/smallest_eigenvalue",
    "preconditioned_sharpness": "curvature/preconditioned_sharpness",
    "gauss_newton_sharpness": "curvature/gauss_newton_sharpness",
    "batch_sharpness": "curvature/batch_sharpness",
    "batch_sharpness_error": "curvature/batch_sharpness_error",
    "effective_batch_sharpness": "curvature/effective_batch_sharpness",
    "critical_sharpness": "curvature/critical_sharpness",
    "effective_critical_sharpness": "curvature/effective_critical_sharpness",
    "trace": "curvature/trace",
    "trace_error": "curvature/trace_error",
    "sharpness_products": "curvature/products",
    "effective_rank": "rank/effective",
}
"""TensorBoard tags of variables; any other variable with one number per member is `measured/<name>`."""
_UNDERFLOW = ("train_loss", "test_loss", "distance")  # event files hold float32, so these are logged as log10 too
_UNTAGGED = ("status", "time")

_SEGMENT_SECONDS = 30.0
_SEGMENT_BYTES = 64 * 2**20


class EventFile:
    """A TensorBoard event file that is written in order and can be cut back to an earlier length."""

    def __init__(self, folder: Path, length: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "events.out.tfevents.0.dlnlab"
        if length is not None and self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(min(length, self.path.stat().st_size))
        if not self.path.exists() or self.path.stat().st_size == 0:
            self._append([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def _append(self, events: list[Event]) -> None:
        with open(self.path, "ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())

    def add(self, moments: list[tuple[int, Summary]]) -> None:
        """Append one event for each (step, summary)."""
        self._append([Event(wall_time=time.time(), step=step, summary=summary) for step, summary in moments])

    @property
    def length(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size


class Recorder(Callback):
    """Records the model's variables and every measurement of a fit.

    A `LinearNetwork` records its own variables inside chunks; a plain LightningModule has `train_loss`, what its
    training_step returns, recorded at the step whose parameters it was computed with.

    Args:
        every_n_steps: Record every so many optimizer steps.
        at: Record at these steps: `[0, 10, 100]`, `{log10: [0, 5, 60]}`, .... Step 0 and the last step are always
            recorded. With neither, 12 steps per decade, evenly spaced in their logarithm.
        variables: What to record; None is those of train_loss, test_loss, distance and gain that are defined.
        pairs: Record step k + 1 with every step k (period 2 at the edge of stability).
        max_runs: At most so many cells of the grid become TensorBoard runs, evenly chosen.

    Raises:
        ValueError: If a variable is not defined for the model, or the schedule is none.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        at: Any = None,
        variables: list[str] | None = None,
        pairs: bool = False,
        max_runs: int = 64,
    ) -> None:
        self.schedule = None if every_n_steps is None and at is None else Schedule(every_n_steps, at, pairs, "record")
        self.pairs = checks.flag("record.pairs", pairs)
        self.variables = variables
        self.max_runs = checks.integer("record.max_runs", max_runs, at_least=1)
        self.directory: Path | None = None
        """The run directory; None keeps everything in memory (`dataset`)."""
        self.attributes: dict[str, Any] = {}
        """What the data set says about the run: config, versions, ...."""
        self._pending: dict[str, tuple[list[int], list[Tensor]]] = {}
        self._final: dict[str, tuple[list[int], list[Tensor]]] = {}
        self._finished = False
        self._dims: dict[str, list[str]] = {}
        self._last_recorded: dict[str, int] = {}
        self._bytes = 0
        self._bytes_per_record = 0
        self._flushed_at = time.monotonic()
        self._parts: list[dict[str, np.ndarray]] = []  # in memory, where there is no directory
        self._num_segments = 0
        self._chain = ""  # the checksum of the segments so far
        self._restored: dict[str, Any] | None = None
        self._event_files: dict[str, EventFile] = {}
        self.names: tuple[str, ...] = ()
        """The model's variables that are recorded, once the fit is prepared."""
        self.config: dict[str, Any] | None = None
        """The resolved config, which every checkpoint carries."""
        self._module: LightningModule | None = None

    # The fit ----------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that all that is asked for exists; the model has been set up."""
        if self.schedule is None:
            # It does not depend on max_steps, so that a run that is extended records what a longer one would have.
            self.schedule = Schedule(at={"log10": [0, 12, 145]}, pairs=self.pairs)
        self._module = module
        self.ensemble: Ensemble = getattr(module, "ensemble", None) or Ensemble()
        if isinstance(module, LinearNetwork):
            self.names = self._check_variables(module)
            self._check_memory(module)
            module.record_schedule, module.record_variables = self.schedule, self._variable_names()
        elif self.variables is not None:
            raise ValueError(f"record.variables: {type(module).__name__} is no LinearNetwork and states no variables")

    def _check_variables(self, module: LinearNetwork) -> tuple[str, ...]:
        defined = module.variables()
        if self.variables is None:
            return tuple(name for name in DEFAULT_VARIABLES if callable(defined.get(name)))
        for name in self.variables:
            if name not in defined:
                raise ValueError(f"record.variables: no variable {name!r}; there are {', '.join(defined)}")
            if not callable(defined[name]):
                raise ValueError(f"record.variables: {name} is not defined here: {defined[name]}")
        return tuple(dict.fromkeys(self.variables))

    def _check_memory(self, module: LinearNetwork) -> None:
        """Refuse records too large to be held until their segment is written."""
        variables = module.variables()
        with torch.no_grad():
            each = sum(found.numel() * found.element_size() for found in (variables[name]() for name in self.names))
        refuse_beyond_memory(
            4 * max(each, _SEGMENT_BYTES),  # recorded, stacked, as a file in memory, and its checksummed copy
            module.device,
            "record.variables",
            f"one record of {', '.join(self.names)} has {each:,}",
            "record less, or use fewer members",
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare, where `prepare` was not called before."""
        self.prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the results, or go on after the last segment a checkpoint knew of."""
        self._flushed_at = time.monotonic()
        self._finished = False
        if self._restored is not None and self.directory is not None:
            results.drop_segments(self.directory / "results", self._num_segments)
        self._open_event_files()
        if self.directory is not None:
            (self.directory / "results").mkdir(parents=True, exist_ok=True)
            self._write_header()  # anew in a resumed run, whose config may go further
        if isinstance(pl_module, LinearNetwork) and trainer.global_step == 0:
            pl_module.begin(0)
            self.record(0, pl_module.measure(self._variable_names()))

    def _variable_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.names, "time")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Collect what the chunk has recorded."""
        if isinstance(pl_module, LinearNetwork):
            for steps, values in pl_module.take_records():
                self.record_block(steps, values)
        else:
            before = trainer.global_step - 1
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None and (before == 0 or before in self.schedule):
                self.record(before, {"train_loss": loss.detach().reshape(1)})
        if self._bytes > _SEGMENT_BYTES or time.monotonic() - self._flushed_at > _SEGMENT_SECONDS:
            self.flush()

    def next_event(self, step: int) -> int | None:
        """A chunk ends before its records fill a segment, so that memory stays bounded."""
        room = (_SEGMENT_BYTES - self._bytes) // max(self._bytes_per_record, 1)
        return self.schedule.nth_after(step, max(1, room))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step for every variable that was not due then."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a resumed fit had no step left to take, and so never began or ended its training."""
        if not self._finished:
            self.on_train_start(trainer, pl_module)
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._finished = True
        step = trainer.global_step
        if isinstance(module, LinearNetwork):
            due = [name for name in self._variable_names() if self._last_recorded.get(name, -1) < step]
            if due:
                self.record(step, module.measure(due), final=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was recorded until then; a disk that is full must not hide what happened."""
        del trainer, pl_module, exception
        with contextlib.suppress(OSError):
            self.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what is left, the last step's extra records in a segment of their own that no checkpoint counts."""
        del trainer, pl_module, stage
        self.flush()
        self._pending, self._final = self._final, {}
        self.flush()

    def record(
        self, step: int, values: dict[str, Tensor], dims: dict[str, list[str]] | None = None, final: bool = False
    ) -> None:
        """Take values (E, ...) measured at a step.

        Args:
            step: The optimizer step.
            values: name -> one entry per member.
            dims: Names of trailing dimensions, where they are not `coordinate` or `row` and `column`.
            final: The values were not due but belong to the fit's last step: a fit that goes on drops them.
        """
        self.record_block([step], {name: value[None] for name, value in values.items()}, final)
        self._dims |= dims or {}

    def record_block(self, steps: list[int], values: dict[str, Tensor], final: bool = False) -> None:
        """Take values (T, E, ...) measured at T ascending steps; see `record`."""
        pending, size = self._final if final else self._pending, 0
        for name, value in values.items():
            known, blocks = pending.setdefault(name, ([], []))
            seen = int(known[-1:] == steps[:1])  # the model's own variable and a measurement's are the same
            if seen == len(steps):
                continue
            known += steps[seen:]
            blocks.append(value[seen:])
            size += value.numel() * value.element_size()
            if not final:
                self._last_recorded[name] = steps[-1]
        self._bytes += size
        self._bytes_per_record = max(self._bytes_per_record, size // len(steps))

    def flush(self) -> None:
        """Close the present segment: to disk (or memory) and to TensorBoard."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        series = {name: (steps, _to_numpy(torch.cat(blocks))) for name, (steps, blocks) in self._pending.items()}
        constants = {}
        if isinstance(self._module, LinearNetwork):
            constants = {
                "stopped_at": _to_numpy(self._module.stopped_at),
                "step_size": _to_numpy(self._module.step_size),
            }
        if self.directory is None:
            arrays = {name: values for name, (_, values) in series.items()}
            steps = {name + results._STEPS: np.array(at) for name, (at, _) in series.items()}
            self._parts.append({**constants, **arrays, **steps, "dims": np.array(json.dumps(self._dims))})
        else:
            folder = self.directory / "results"
            written = results.write_segment(folder, self._num_segments, series, constants, self._dims)
            self._write_events(series)
            self._chain = results.chain(self._chain, written)
        self._num_segments += 1
        self._pending, self._bytes = {}, 0

    # Results ----------------------------------------------------------------------------------------------------------

    def _header(self) -> tuple[dict, dict, dict]:
        axes = dict(self.ensemble.axes)
        coordinates = {}
        if isinstance(self._module, LinearNetwork) and "batch_size" in axes:
            rows = self._module.problems.x.shape[1]
            numbers = [rows if size == "full" else size for size in axes["batch_size"]]
            coordinates["batch_size_number"] = ("batch_size", numbers)
            axes["batch_size"] = [str(size) for size in axes["batch_size"]]
        attributes = dict(self.attributes)
        if isinstance(self._module, LinearNetwork):
            attributes |= {"path": self._module.path, "lr_unit": self._module.lr_unit}
        return axes, coordinates, attributes

    def _write_header(self) -> None:
        results.write_header(self.directory / "results", *self._header())

    def dataset(self) -> xr.Dataset:
        """What was recorded in memory, as `load_results` gives it for a run directory."""
        if self.directory is not None:
            return results.load_results(self.directory)
        axes, coordinates, attributes = self._header()
        header = {"axes": axes, "coordinates": coordinates, "attributes": attributes}
        return results._assemble(header, [dict(part) for part in self._parts])

    # TensorBoard ------------------------------------------------------------------------------------------------------

    def _open_event_files(self) -> None:
        if self.directory is None:
            return
        cell_axes = tuple(name for name in self.ensemble.axes if name != "seed")
        self._cell, cells = self.ensemble.group(cell_axes)
        self._cell = self._cell.numpy()
        names = [",".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.items()) or "members"
                 for cell in cells]  # fmt: skip
        chosen = np.unique(np.linspace(0, len(names) - 1, min(self.max_runs, len(names))).round().astype(int))
        lengths = (self._restored or {}).get("events", {})
        self._event_files = {
            int(i): EventFile(self.directory / "cells" / names[i], lengths.get(names[i])) for i in chosen
        }
        self._cell_names = names
        if len(chosen) < len(names):
            note = (
                f"{len(chosen)} of {len(names)} cells of the grid, evenly chosen (record.max_runs); all are in results/"
            )
            self.attributes["tensorboard"] = note

    def _write_events(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        for cell, file in self._event_files.items():
            inside = self._cell == cell
            moments: defaultdict[int, Summary] = defaultdict(Summary)
            for name, (steps, values) in series.items():
                if name == "status":
                    codes = values[:, inside]
                    for code, status in enumerate(results.STATUSES):
                        _add(moments, steps, f"members/{status}", (codes == code).sum(1))
                elif name not in _UNTAGGED and values.ndim == 2:
                    tag = TAGS.get(name, f"measured/{name}")
                    summary = _summarise(values[:, inside])
                    for suffix, numbers in summary.items():
                        _add(moments, steps, tag + suffix, numbers)
                        if name in _UNDERFLOW:
                            with np.errstate(divide="ignore", invalid="ignore"):
                                _add(moments, steps, f"{tag}_log10{suffix}", np.log10(numbers))
            file.add(sorted(moments.items(), key=lambda moment: moment[0]))

    def add_images(self, pictures: dict[str, Path]) -> None:
        """Show pictures (PNG) in the run's TensorBoard page as `figures/<name>`, in place of earlier ones."""
        values = [
            Summary.Value(tag=f"figures/{name}", image=Summary.Image(encoded_image_string=path.read_bytes()))
            for name, path in pictures.items()
        ]
        EventFile(self.directory, length=0).add([(max(self._last_recorded.values(), default=0), Summary(value=values))])

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Closes the segment, so that none straddles a checkpoint, and says how far the records go."""
        self.flush()
        events = {self._cell_names[cell]: file.length for cell, file in self._event_files.items()}
        return {"segments": self._num_segments, "chain": self._chain, "last_recorded": dict(self._last_recorded),
                "events": events}  # fmt: skip

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the resolved config, with which a resumed run is compared."""
        del trainer, pl_module
        checkpoint["dlnlab_config"] = self.config

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._restored = state_dict
        self._num_segments, self._chain = state_dict["segments"], state_dict["chain"]
        self._last_recorded = dict(state_dict["last_recorded"])


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _summarise(values: np.ndarray) -> dict[str, np.ndarray]:
    """(T, seeds) -> median, and 10 % and 90 % where there is more than one seed; NaN counts as infinite."""
    values = np.where(np.isnan(values), np.inf, values.astype(np.float64))
    if values.shape[1] == 1:
        return {"": values[:, 0]}
    found = {}
    for suffix, level in (("", 0.5), ("/p10", 0.1), ("/p90", 0.9)):
        with np.errstate(invalid="ignore"):
            smooth = np.quantile(values, level, axis=1)
        # Between a finite number and infinity there is nothing to interpolate.
        found[suffix] = np.where(np.isnan(smooth), np.quantile(values, level, axis=1, method="higher"), smooth)
    return found


def _add(moments: defaultdict[int, Summary], steps: list[int], tag: str, numbers: np.ndarray) -> None:
    for step, number in zip(steps, numbers.tolist(), strict=True):
        moments[step].value.add(tag=tag, simple_value=number)
