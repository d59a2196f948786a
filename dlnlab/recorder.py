"""What was measured, when and for whom -> result segments, TensorBoard and loggers. The only place that knows tags."""

import contextlib
import json
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dlnlab import checks, event_files, results
from dlnlab.data.base import refuse_beyond_memory
from dlnlab.ensemble import Ensemble
from dlnlab.event_files import EventFile, RunLogger
from dlnlab.models import LinearNetwork
from dlnlab.models.base import CAUSES, DIVERGED, INVARIANTS, SCHEDULED
from dlnlab.models.trainer import adapt_callbacks, check_early_stopping, metrics_of, reads_at, saves_at
from dlnlab.optim import GradientFlow
from dlnlab.schedule import Schedule

DEFAULT_VARIABLES = ("train_loss", "test_loss", "distance", "gain")

_PREDICTIONS = ("unperturbed", "mean_gain", "weighted_l1", "gradient_flow", "min_l1", "min_l2")
_SHALLOW_LAWS = (
    "eps_law", "norm_squared_law", "imbalance_law", "escape_law", "norm_squared", "divergence"
)  # fmt: skip
_DEEP_LAWS = ("layer_imbalance", "square_norm", "representation")
TAGS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "distance": "recovery/distance",
    "support_f1": "recovery/support_f1",
    "l1_norm": "predictor/l1_norm",
    "gain_l1": "gain/l1",
    "gain_support_ratio": "gain/support_ratio",
    "scheduled_lr": "schedule/lr",
    "scheduled_weight_decay": "schedule/weight_decay",
    "scheduled_batch_size": "schedule/batch_size",
    "sharpness": "curvature/sharpness",
    "effective_sharpness": "curvature/effective_sharpness",
    "flow_sharpness": "curvature/flow_sharpness",
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
    "rank": "rank/rank",
    "effective_rank": "rank/effective",
    "stable_rank": "rank/stable",
    "smooth_rank": "rank/smooth",
    "jumps_down": "rank/jumps_down",
    "jumps_up": "rank/jumps_up",
    "in_set": "rank/in_set",
    "set_exits": "rank/set_exits",
    "imbalance_error": "theory/imbalance_error",
    "mirror_error": "theory/mirror_error",
    "gain_sandwich_error": "theory/gain_sandwich_error",
    "bregman_error": "theory/bregman_error",
    "bregman_residual": "theory/bregman_residual",
    **{f"error_{name}": f"theory/error_{name}" for name in _PREDICTIONS},
    "loss_integral_error": "theory/loss_integral_error",
    "gain_formula_error": "theory/gain_formula_error",
    "gain_lower_bound": "theory/gain_lower_bound",
    "gain_upper_bound": "theory/gain_upper_bound",
    "gain_l1_law": "theory/gain_l1_law",
    "gamma_LB": "theory/gamma_LB",
    **{
        f"gamma{kind}_max{of}": f"theory/gamma{kind}_max{of}"
        for kind in ("", "_tilde")
        for of in ("", "_first_failure", "_last_success", "_islands")
    },
    "flow_edge": "theory/flow_edge",
    "flattest_edge": "theory/flattest_edge",
    "mean_square_edge": "theory/mean_square_edge",
    "almost_sure_edge": "theory/almost_sure_edge",
    "gamma_max_over_flow_edge": "theory/gamma_max_over_flow_edge",
    "gamma_max_over_flattest_edge": "theory/gamma_max_over_flattest_edge",
    "gamma_max_over_mean_square_edge": "theory/gamma_max_over_mean_square_edge",
    "gamma_max_over_almost_sure_edge": "theory/gamma_max_over_almost_sure_edge",
    **{f"{name}_error": f"theory/{name}_error" for name in _SHALLOW_LAWS + _DEEP_LAWS},
    "layer_imbalance": "theory/layer_imbalance",
    "norm_over_least": "theory/norm_over_least",
    "norm_over_absorbing": "theory/norm_over_absorbing",
}
"""TensorBoard tags of variables; any other variable with one number per member is `measured/<name>`."""
_UNDERFLOW = ("train_loss", "test_loss", "distance")  # event files hold float32, so these are logged as log10 too
_UNTAGGED = ("time",)

_MOST_POINTS = 1000
_PAGE = "."  # what TensorBoard calls the run that is its folder itself

_SEGMENT_SECONDS = 30.0
_SEGMENT_BYTES = 64 * 2**20


class Recorder(Callback):
    """Records the model's variables and every measurement of a fit.

    A `LinearNetwork` records its own variables inside chunks; a plain LightningModule has `train_loss`, what its
    training_step returns, recorded at the step whose parameters it was computed with.

    The results hold every record. TensorBoard shows at most about 1000 points of a curve, the first, the last and
    evenly chosen ones between them: which they are follows from the schedule and max_steps alone.

    A logger of one's own gets the same points of every variable with one number per member: its median over the members
    that have not diverged and for which it is defined, under the variable's tag (`recovery/distance`), and how many
    members have each status. `trainer.callback_metrics` holds the last record's medians under the variable's name
    (`distance`) and its tag. A ModelCheckpoint that reads a variable of the model has it measured when it saves, and
    EarlyStopping looks at every record of what it monitors.

    Where a member has a schedule of lr, weight decay or batch size, what they are at the next step is recorded too.

    Args:
        every_n_steps: Record every so many optimizer steps.
        at: Record at these steps: `[0, 10, 100]`, `{log10: [0, 5, 60]}`, .... Step 0 and the last step are always
            recorded. With neither, 12 steps per decade, evenly spaced in their logarithm (every step of `GradientFlow`).
        variables: What to record; None is those of train_loss, test_loss, distance and gain that are defined.
        pairs: Record step k + 1 with every step k (period 2 at the edge of stability).
        max_runs: At most so many cells of the grid become TensorBoard runs, evenly chosen.
        invariants: Record with every record how far the theory's exact identities (imbalance, mirror form, the gain's
            sandwich) are from holding, and warn once of a member where rounding does not explain it.

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
        invariants: bool = True,
    ) -> None:
        self.schedule = None if every_n_steps is None and at is None else Schedule(every_n_steps, at, pairs, "record")
        self.pairs = checks.flag("record.pairs", pairs)
        self.variables = variables
        self.invariants = checks.flag("record.invariants", invariants)
        self.max_runs = checks.integer("record.max_runs", max_runs, at_least=1)
        self.directory: Path | None = None
        """The run directory; None keeps everything in memory (`dataset`)."""
        self.attributes: dict[str, Any] = {}
        """What the data set says about the run: config, versions, ...."""
        self.source_axes: dict[str, list[Any]] = {}
        """Axes of the run this one has started from, one value per member."""
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
        self._cells: list[str] = []  # the runs of the cells
        self._members = np.zeros((0, 0), dtype=int)  # (cells, seeds)
        self._schedules: defaultdict[str, list[Schedule]] = defaultdict(list)  # of variables that have their own
        self._unshown: dict[str, tuple[int, np.ndarray]] = {}  # the last record of a curve that TensorBoard has not
        self._shown_until = np.inf  # it is shown no moment from this step on: they may be recorded again
        self._invariants: tuple[str, ...] = ()
        self._violated: set[str] = set()
        self.names: tuple[str, ...] = ()
        """The model's variables that are recorded, once the fit is prepared."""
        self.config: dict[str, Any] | None = None
        """The resolved config, which every checkpoint carries."""
        self.origin: dict[str, Any] | None = None
        """What the run has started from, as every checkpoint says it (`dlnlab.start.Origin`)."""
        self._module: LightningModule | None = None
        self._trainer: Trainer | None = None
        self._loggers: list[Logger] = []
        self._end: float = np.inf
        self._diverged: dict[int, Tensor] = {}  # step -> (E,), for the loggers' medians
        self._metrics_checked = False
        self._metric_steps: dict[str, int] = {}  # variable -> the step of its number in trainer.callback_metrics

    # The fit ----------------------------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Check that all that is asked for exists; the model has been set up."""
        if self.schedule is None:
            if isinstance(getattr(module, "_optimizer", None), GradientFlow):  # its steps are the times asked for
                self.schedule = Schedule(every_n_steps=1)
            else:
                # It does not depend on max_steps: a run that is extended records what a longer one would have.
                self.schedule = Schedule(at={"log10": [0, 12, 145]}, pairs=self.pairs)
        self._module, self._trainer = module, trainer
        self.ensemble: Ensemble = getattr(module, "ensemble", None) or Ensemble()
        if isinstance(module, LinearNetwork):
            defined = module.variables()
            scheduled = (name for name in SCHEDULED if callable(defined[name]))
            self.names = tuple(dict.fromkeys((*self._check_variables(module), *scheduled)))
            self._dims |= module.dims
            self._invariants = tuple(name for name in INVARIANTS if self.invariants and callable(defined[name]))
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

    def check_metrics(self, trainer: Trainer, measured: dict[str, Schedule]) -> None:
        """Raise ValueError where a callback of Lightning's would wait for a metric that never comes.

        Args:
            trainer: The fit's trainer; every measurement is prepared.
            measured: The variables that measurements record, and when.
        """
        wanted = [(callback, metric) for callback in trainer.callbacks for metric in metrics_of(callback)]
        known = (*self._curves(), *measured) if wanted else ()
        for callback, metric in wanted:
            kind = f"trainer.callbacks: {type(callback).__name__} reads the metric {metric!r}"
            name = next((name for name in known if metric in (name, _tag(name))), None)
            if name is None:
                raise ValueError(f"{kind}: there is no such variable; there are {', '.join(known)}")
            if name in self.names:
                continue
            schedule, period = measured[name], reads_at(callback)
            last = trainer.max_steps if trainer.max_steps > 0 else checks.LARGEST
            if not schedule.meets(period, last, always=metric != callback.monitor):
                raise ValueError(
                    f"{kind} at multiples of {period} steps, where it is not measured: give its measurement another "
                    "schedule"
                )
        self._metrics_checked = True

    def _curves(self) -> tuple[str, ...]:
        """The model's variables with one number per member."""
        if not isinstance(self._module, LinearNetwork):
            return ()
        variables = self._module.variables()
        with torch.no_grad():
            return tuple(name for name in self.names if variables[name]().ndim == 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare, where `prepare` was not called before."""
        self.prepare(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the results, or go on after the last segment a checkpoint knew of."""
        self._flushed_at = time.monotonic()
        self._finished = False
        self._end = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._loggers = [logger for logger in trainer.loggers if not isinstance(logger, RunLogger)]
        if self.config is not None and trainer.enable_autolog_hparams:
            for logger in self._loggers:
                logger.log_hyperparams(self.config)
        if isinstance(pl_module, LinearNetwork):
            adapt_callbacks(trainer)
            if not self._metrics_checked and any(map(metrics_of, trainer.callbacks)):
                measurements = (
                    callback for callback in trainer.callbacks if callable(getattr(callback, "names", None))
                )
                self.check_metrics(trainer, {name: m.schedule for m in measurements for name in m.names(pl_module)})
        if self._restored is not None and self.directory is not None:
            results.drop_segments(self.directory / "results", self._num_segments)
        if self.directory is not None:
            self._open_event_files(trainer)
            (self.directory / "results").mkdir(parents=True, exist_ok=True)
            self._write_header()  # anew in a resumed run, whose config may go further
        if isinstance(pl_module, LinearNetwork) and trainer.global_step == 0:
            pl_module.begin(0)
            self.record(0, pl_module.measure(self._variable_names()))

    def _variable_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.names, *self._invariants, "time")))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Collect what the chunk has recorded."""
        if isinstance(pl_module, LinearNetwork):
            for steps, values in pl_module.take_records():
                self.record_block(steps, values)
            self._serve_callbacks(trainer, pl_module)
        else:
            before = trainer.global_step - 1
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None and (before == 0 or before in self.schedule):
                self.record(before, {"train_loss": loss.detach().reshape(1)})
        if self._bytes > _SEGMENT_BYTES or time.monotonic() - self._flushed_at > _SEGMENT_SECONDS:
            self.flush()

    def next_event(self, step: int) -> int | None:
        """A chunk ends before its records fill a segment, so that memory stays bounded, and where EarlyStopping looks."""
        if any(isinstance(callback, EarlyStopping) for callback in self._trainer.callbacks):
            return self.schedule.next_after(step)
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
            module.end(step)
            changed = module.has_provisional_ends  # a fit that goes on starts from what was recorded at this step
            if changed:
                self._shown_until = min(self._shown_until, step)
            due = [name for name in self._variable_names() if changed or self._last_recorded.get(name, -1) < step]
            if due:
                self.record(step, module.measure(due), final=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was recorded until then; a full disk or memory must not hide what happened."""
        del trainer, pl_module, exception
        with contextlib.suppress(Exception):
            self.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what is left, the last step's extra records in a segment of their own that no checkpoint counts."""
        del trainer, pl_module, stage
        self.flush()
        self._pending, self._final = self._final, {}
        self.flush()
        if self.directory is not None and self._num_segments == 0 and (self.directory / "results").is_dir():
            self._write_segment({}, {})  # a run that has ended says so, though it has recorded nothing
        self._show({name: ([step], value[None]) for name, (step, value) in self._unshown.items()})

    def record(
        self,
        step: int,
        values: dict[str, Tensor],
        dims: dict[str, list[str]] | None = None,
        final: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        """Take values (E, ...) measured at a step.

        Args:
            step: The optimizer step.
            values: name -> one entry per member.
            dims: Names of trailing dimensions, where they are not `coordinate` or `row` and `column`.
            final: The values were not due but belong to the fit's last step: a fit that goes on drops them.
            schedule: When they are recorded; None is the recorder's.
        """
        self.record_block([step], {name: value[None] for name, value in values.items()}, final)
        self._dims |= dims or {}
        for name in values if schedule is not None else ():
            if not any(known is schedule for known in self._schedules[name]):
                self._schedules[name].append(schedule)

    def record_block(self, steps: list[int], values: dict[str, Tensor], final: bool = False) -> None:
        """Take values (T, E, ...) measured at T ascending steps; see `record`."""
        pending, size = self._final if final else self._pending, 0
        self._keep_metrics(steps, values)
        for name, value in values.items():
            # The model's own variable and a measurement's are the same, as are two measurements' with other schedules. The
            # end of a fit may differ from what was recorded at its step: the guard has looked since.
            seen = int(name in pending if final else self._last_recorded.get(name) == steps[0])
            if seen == len(steps):
                continue
            known, blocks = pending.setdefault(name, ([], []))
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
        self._check_invariants(series)
        constants = {}
        if isinstance(self._module, LinearNetwork):
            constants = {
                "stopped_at": _to_numpy(self._module.stopped_at),
                "diverged_by": np.array([CAUSES[code] for code in self._module.diverged_by.tolist()]),
                "step_size": _to_numpy(self._module.step_size),
            }
        if self.directory is None:
            arrays = {name: values for name, (_, values) in series.items()}
            steps = {name + results._STEPS: np.array(at) for name, (at, _) in series.items()}
            self._parts.append({**constants, **arrays, **steps, "dims": np.array(json.dumps(self._dims))})
            if self._loggers:
                self._show(self._thin(series))
        else:
            written = self._write_segment(series, constants)
            if self._num_segments == 0:
                self._lay_out(series)
            self._show(self._thin(series))
            self._chain = results.chain(self._chain, written)
        self._num_segments += 1
        self._pending, self._bytes = {}, 0
        kept = {step for step, _ in self._unshown.values()}.union(*(steps for steps, _ in self._final.values()))
        self._diverged = {step: members for step, members in self._diverged.items() if step in kept}

    def _write_segment(self, series: dict[str, tuple[list[int], np.ndarray]], constants: dict[str, np.ndarray]) -> str:
        place = results.follows(self._header()[0], self._chain)
        folder = self.directory / "results"
        return results.write_segment(folder, self._num_segments, series, constants, self._dims, place)

    def _check_invariants(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        """Warn, once for each, of what exact arithmetic would make zero and more than rounding has not."""
        for name in set(self._invariants) & series.keys() - self._violated:
            steps, values = series[name]
            allowed = np.array([self._module.invariant_tolerance(step) for step in steps])[:, None]
            beyond = np.argwhere(values > allowed)
            if len(beyond):
                self._violated.add(name)
                i, member = beyond[0]
                warnings.warn(
                    f"{name} of member {self.ensemble.labels[member]} is {values[i, member]:.2g} at step {steps[i]}, where "
                    f"rounding explains {allowed[i, 0]:.1g}: an exact identity of the theory does not hold in this run",
                    stacklevel=2,
                )

    # Results ----------------------------------------------------------------------------------------------------------

    def _header(self) -> tuple[dict, dict, dict]:
        axes = dict(self.ensemble.axes)
        coordinates = {}
        if isinstance(self._module, LinearNetwork) and "batch_size" in axes:
            rows = self._module.problems.x.shape[1]
            numbers = [rows if size == "full" else size for size in axes["batch_size"]]
            coordinates["batch_size_number"] = ("batch_size", numbers)
            axes["batch_size"] = [str(size) for size in axes["batch_size"]]
        coordinates |= {
            f"source_{name}": _along_axes(self.ensemble, values)
            for name, values in self.source_axes.items()
            if name not in self.ensemble.axes or self.ensemble.values(name) != values
        }
        attributes = dict(self.attributes)
        if isinstance(self._module, LinearNetwork):
            module = self._module
            attributes |= {"path": module.path, "lr_unit": module.lr_unit, "lr_symbol": module.lr_symbol}
            if module.problems.matrix_shape is not None:
                attributes["distance_units"] = results.UNOBSERVED
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

    def _open_event_files(self, trainer: Trainer) -> None:
        """One file for each cell and one, the page, for what belongs to all; a resume cuts back and goes on."""
        self._shown_until = self._end
        axes = {name: values for name, values in self._header()[0].items() if name != "seed"}
        cell_of_member, cells = self.ensemble.group(tuple(axes))
        names = [",".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.items()) or "members"
                 for cell in cells]  # fmt: skip
        names = checks.names_from_values(names, [json.dumps(cell) for cell in cells])
        chosen = np.unique(np.linspace(0, len(names) - 1, min(self.max_runs, len(names))).round().astype(int)).tolist()
        self._cells = [f"cells/{names[i]}" for i in chosen]
        self._members = np.stack([np.flatnonzero(cell_of_member.numpy() == i) for i in chosen])
        lengths = (self._restored or {}).get("events", {})
        self._event_files = {run: EventFile(self.directory / run, lengths.get(run)) for run in (_PAGE, *self._cells)}
        if self._restored is None:
            for run, i in zip(self._cells, chosen, strict=True):
                values = {name: str(v) if isinstance(axes[name][0], str) else v for name, v in cells[i].items()}
                self._event_files[run].add([(0, event_files.session(values))])
        for name, language in (("config", "yaml"), ("versions", "json")):
            text = event_files.listings({name: self.attributes.get(name, "")}, language)
            self._event_files[_PAGE].add([(trainer.global_step, text)])
        if len(chosen) < len(names):
            note = (
                f"{len(chosen)} of {len(names)} cells of the grid, evenly chosen (record.max_runs); all are in results/"
            )
            self.attributes["tensorboard"] = note

    def _lay_out(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        """Say on the page which charts and which hyperparameters and final numbers of the cells there are."""
        tags, final = [], []
        order = [*TAGS, *sorted(series.keys() - TAGS.keys())]
        for name in order:
            if name in series and name != "status" and _is_curve(name, series[name][1]):
                found = [_tag(name)] if name not in _UNDERFLOW else [f"{_tag(name)}_log10", _tag(name)]
                tags = tags + found
                if name not in INVARIANTS:  # they are rounding, whatever the hyperparameters
                    final.append(found[0])
        if "status" in series:
            counts = [f"members/{status}" for status in results.STATUSES]
            tags, final = tags + counts, final + counts
        axes = {name: values for name, values in self._header()[0].items() if name != "seed"}
        seeds = len(self.ensemble.axes.get("seed", [0]))
        self._event_files[_PAGE].add(
            [(0, event_files.layout(tags, banded=seeds > 1)), (0, event_files.experiment(axes, final))]
        )

    def _thin(self, series: dict[str, tuple[list[int], np.ndarray]]) -> dict[str, tuple[list[int], np.ndarray]]:
        """Choose the moments that TensorBoard shows now.

        The last one is kept back where it is not among them, or where the fit may end: it is then recorded again, and
        shown as recorded last.
        """
        found = {}
        for name, (steps, values) in series.items():
            if _is_curve(name, values):
                if name in self._unshown and (held := self._unshown.pop(name))[0] < steps[0]:
                    steps, values = [held[0], *steps], np.concatenate((held[1][None], values))
                schedules = (self.schedule, *self._schedules.get(name, ()))
                thinned = [schedule.thinned(_MOST_POINTS, self._end) for schedule in schedules]
                shown = {0}.union(*(schedule.between(steps[0] - 1, steps[-1]) for schedule in thinned))
                undefined = np.isnan(values).all(1)  # not yet, as a ratio of two zeros at step 0
                now = shown - set(steps[-1:] if steps[-1] >= self._shown_until else ())
                chosen = [i for i, step in enumerate(steps) if step in now and not undefined[i]]
                found[name] = [steps[i] for i in chosen], values[chosen]
                if steps[-1] not in now and not undefined[-1]:
                    self._unshown[name] = steps[-1], values[-1].copy()
        return found

    def _show(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        """Hand curves to TensorBoard's files and to the loggers."""
        if self.directory is not None:
            self._write_events(series)
        self._log(series)

    def _write_events(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        """One event for each cell and moment, with all that was measured then."""
        curves: dict[str, np.ndarray] = {}  # tag -> (T, cells)
        moments: defaultdict[int, dict[str, int]] = defaultdict(dict)  # step -> {tag: place among its T}
        before = (
            _to_numpy(self._module.diverged_before) if isinstance(self._module, LinearNetwork) else np.zeros(1, bool)
        )
        for name, (steps, values) in series.items():
            for tag, numbers in _summarise(name, values[:, self._members], before[self._members]).items():
                curves[tag] = numbers
                for place, step in enumerate(steps):
                    moments[step][tag] = place
        blocks: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for step, places in moments.items():
            blocks[tuple(places)].append(step)
        written: list[list[tuple[int, bytes]]] = [[] for _ in self._cells]
        for tags, steps in blocks.items():
            numbers = [curves[tag][[moments[step][tag] for step in steps]] for tag in tags]
            summaries = event_files.scalars(tags, np.stack(numbers, -1))
            for i, events in enumerate(written):
                events += zip(steps, map(bytes, summaries[:, i]), strict=True)
        for run, events in zip(self._cells, written, strict=True):
            self._event_files[run].add(sorted(events))

    # Loggers and callbacks of Lightning's ----------------------------------------------------------------------------

    def _keep_metrics(self, steps: list[int], values: dict[str, Tensor]) -> None:
        """Put the medians of the last of some steps where Lightning's callbacks look for metrics."""
        if self._trainer is None:
            return
        diverged = values["status"] == DIVERGED if "status" in values else None
        if diverged is None and isinstance(self._module, LinearNetwork):
            diverged = (self._module.status == DIVERGED).expand(len(steps), -1)
        if self._loggers and diverged is not None:
            self._diverged |= {step: members for step, members in zip(steps, diverged, strict=True)}
        metrics, bar = self._trainer.callback_metrics, self._trainer.progress_bar_callback
        shown = self._trainer.progress_bar_metrics if bar is not None and not hasattr(bar, "next_event") else None
        for name, value in values.items():
            if name == "status" or not _is_curve(name, value):
                continue
            number = median(value[-1], None if diverged is None else diverged[-1])
            self._metric_steps[name] = steps[-1]
            for key in (name, _tag(name)):
                metrics[key] = number
                if bool(number.isnan()):
                    del metrics[key]
            if shown is not None and name in self.names:
                shown[name] = float(number)

    def _serve_callbacks(self, trainer: Trainer, module: LinearNetwork) -> None:
        """Measure what a ModelCheckpoint reads that saves now, and let EarlyStopping look at a record."""
        step = trainer.global_step
        if any(saves_at(callback, step) for callback in trainer.checkpoint_callbacks):
            stale = [name for name in self.names if self._metric_steps.get(name) != step]
            if stale:
                self._keep_metrics([step], {name: value[None] for name, value in module.measure(stale).items()})
            for name in [name for name, at in self._metric_steps.items() if at != step]:
                for key in (name, _tag(name)):  # it is no metric of this step, so nothing is saved by it
                    trainer.callback_metrics.pop(key, None)
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback.monitor in trainer.callback_metrics:
                name = next(name for name in self._metric_steps if callback.monitor in (name, _tag(name)))
                schedules = self._schedules.get(name, (self.schedule,))
                if self._metric_steps[name] == step and any(step in schedule for schedule in schedules):
                    check_early_stopping(callback, trainer)

    def _log(self, series: dict[str, tuple[list[int], np.ndarray]]) -> None:
        """Give the loggers the medians of curves, the steps ascending, all of a step at once."""
        if not self._loggers:
            return
        rows: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name, (steps, values) in series.items():
            for step, row in zip(steps, values, strict=True):
                if name == "status":
                    rows[step] |= {
                        f"members/{status}": int((row == code).sum()) for code, status in enumerate(results.STATUSES)
                    }
                    continue
                number = float(median(torch.from_numpy(row), self._diverged.get(step)))
                if not np.isnan(number):
                    rows[step][_tag(name)] = number
        for logger in self._loggers:
            for step in sorted(rows):
                logger.log_metrics(dict(rows[step]), step=step)
            logger.save()

    def add_images(self, pictures: dict[str, Path], step: int) -> None:
        """Show pictures (PNG) on the run's TensorBoard page as `figures/<name>`, once the fit has ended at `step`."""
        shown = event_files.images({f"figures/{name}": path for name, path in pictures.items()})
        self._event_files[_PAGE].add([(step, shown)])

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Closes the segment, so that none straddles a checkpoint, and says how far the records go."""
        self.flush()
        return {
            "segments": self._num_segments,
            "chain": self._chain,
            "last_recorded": dict(self._last_recorded),
            "events": {run: file.length for run, file in self._event_files.items()},
            "unshown": {name: (step, torch.from_numpy(value)) for name, (step, value) in self._unshown.items()},
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the resolved config, with which a resumed run is compared, and what the run has started from."""
        del trainer, pl_module
        checkpoint["dlnlab_config"] = self.config
        checkpoint["dlnlab_init_from"] = self.attributes.get("init_from")
        checkpoint["dlnlab_source_axes"] = self.source_axes
        checkpoint["dlnlab_origin"] = self.origin

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._restored = state_dict
        self._num_segments, self._chain = state_dict["segments"], state_dict["chain"]
        self._last_recorded = dict(state_dict["last_recorded"])
        self._unshown = {name: (step, value.numpy()) for name, (step, value) in state_dict["unshown"].items()}


def _quantiles(values: np.ndarray, levels: list[float]) -> np.ndarray:
    """Quantiles (Q, ...) over the last axis of numbers that may be infinite."""
    numbers = np.quantile(values, levels, axis=-1)
    if np.isnan(numbers).any():  # between a finite number and infinity there is nothing to interpolate
        numbers = np.where(np.isnan(numbers), np.quantile(values, levels, axis=-1, method="higher"), numbers)
    return numbers


def _along_axes(ensemble: Ensemble, values: list[Any]) -> tuple[list[str], Any]:
    """One value per member as a coordinate: the axes that it varies along, and its values over them, nested."""
    numbers = {value: i for i, value in enumerate(dict.fromkeys(values))}
    grid = np.array([numbers[value] for value in values]).reshape(ensemble.shape)
    axes = []
    for place, name in enumerate(ensemble.axes):
        first = grid.take([0], axis=place)
        if (grid == first).all():
            grid = first
        else:
            axes.append(name)
    texts = any(isinstance(value, str) for value in values)
    table = np.array([str(value) if texts else value for value in numbers])
    return axes, table[grid.reshape([len(ensemble.axes[name]) for name in axes])].tolist()


def median(values: Tensor, diverged: Tensor | None = None) -> Tensor:
    """The median over members (E,) that have not diverged and whose value is no NaN; NaN where there is none.

    Args:
        values: One number per member, (E,).
        diverged: Which members have diverged, (E,); None is none of them.
    """
    values = values.detach().double()
    keep = ~values.isnan() if diverged is None else ~(values.isnan() | diverged.to(values.device))
    ordered = values[keep].sort().values
    if not len(ordered):
        return values.new_tensor(float("nan"))
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return lower if bool(lower == upper) else (lower + upper) / 2  # the same infinity twice has no mean


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _tag(name: str) -> str:
    return TAGS.get(name, f"measured/{name}")


def _is_curve(name: str, values: np.ndarray | Tensor) -> bool:
    return name not in _UNTAGGED and values.ndim == 2


def _summarise(name: str, values: np.ndarray, left_out: np.ndarray) -> dict[str, np.ndarray]:
    """The curves (T, cells) of a variable (T, cells, seeds) by their tags.

    They are its median over seeds, and 10 % and 90 % where there is more than one; NaN counts as infinite. Of `status`
    they are how many members have each. Members that had diverged before the run (cells, seeds) count for `status` alone.
    """
    if name == "status":
        return {f"members/{status}": (values == code).sum(-1) for code, status in enumerate(results.STATUSES)}
    values = np.where(np.isnan(values), np.inf, values.astype(np.float64))
    levels = {"": 0.5, "/p10": 0.1, "/p90": 0.9} if values.shape[-1] > 1 else {"": 0.5}
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = _quantiles(values, list(levels.values()))
        for cell in np.flatnonzero(left_out.any(1)):
            rest = values[:, cell, ~left_out[cell]]
            numbers[:, :, cell] = _quantiles(rest, list(levels.values())) if rest.shape[1] else np.inf
        found = {_tag(name) + suffix: each for suffix, each in zip(levels, numbers, strict=True)}
        if name in _UNDERFLOW:
            found |= {
                f"{_tag(name)}_log10{suffix}": np.log10(each) for suffix, each in zip(levels, numbers, strict=True)
            }
    return found
