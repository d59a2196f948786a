"""LinearNetwork: what every model of dlnlab promises.

A subclass writes its parameters, each with a leading axis of members, and `predictor()`, what the network computes.
Whatever sizes are not given come from the data:

    class Cubic(LinearNetwork):                                   # beta = u^3 - v^3
        def build(self, num_features, num_outputs):
            self.u = Parameter(torch.full((self.num_members, num_features), 0.5))
            self.v = Parameter(torch.full((self.num_members, num_features), 0.5))

        def predictor(self):
            return self.u**3 - self.v**3                          # (E, D)

    class Fixed(LinearNetwork):                                   # the same, its size known beforehand
        def __init__(self, dim=3, **kwargs):
            super().__init__(**kwargs)
            self.u = Parameter(torch.ones(self.num_members, dim))

It inherits everything else: `losses(batch)` -> (G,), mini-batches, the optimizer, true steps, the guard, records,
checkpoints. It may add `advance_closed_form` where its updates need no autograd (see `DiagonalLinearNetwork`), its own
hyperparameters as axes (name them in `axes`, read them with `per_member`), and its own variables (`variables`). Its own
`losses`, or a predictor that is no product of factors, take nothing away but the formulas of theory that are about the
squared loss, or about the product: they are refused unless `squared_loss_refusal` and `product_refusal` let them through.

**Members never influence each other.** The loss that is differentiated is the sum over members; they share no parameter.
The compiled kernels give a member the same bits alone, in any company and in any order. Where batched products of torch or
autograd are used, it is the same to the rounding of each step (1e-12 after 200 stable steps); at the edge of stability
rounding grows as any other difference does.

**The unit of time is the optimizer step.** One `training_step` takes a chunk of many, ending at the next event any
callback has announced; `trainer.global_step` is true at every event, and no result depends on where chunks end.
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from dlnlab import checks, streams
from dlnlab.data.base import Problems, refuse_beyond_memory
from dlnlab.ensemble import Ensemble
from dlnlab.kernels import Batches, Rates
from dlnlab.kernels.guard import ABOVE_BOUND, NOT_FINITE, bound_of
from dlnlab.metrics import MemberLoss
from dlnlab.models.batch import Batch, NullBatch
from dlnlab.models.programme import CONSTANT, Programme, checked_schedules
from dlnlab.models.trainer import (
    count_steps,
    leave_requeueing_alone,
    limit_steps,
    next_event_of,
    refuse_checkpoint_of_requeueing,
    refuse_what_chunks_cannot_honour,
)
from dlnlab.optim import GainSGD, GradientFlow, StepSchedule, StochasticGradientFlow
from dlnlab.schedule import Schedule

RUNNING, CONVERGED, DIVERGED = range(3)
STATUSES = ("running", "converged", "diverged")
SOURCE = 3
CAUSES = {0: "", ABOVE_BOUND: "loss", NOT_FINITE: "not finite", SOURCE: "source"}
"""Why a member has diverged: `source` if it had in the run this one started from."""
LR_UNITS = ("one", "max_row", "flow_edge", "mean_square_edge")

_CHUNK_SECONDS = 0.25
"""A chunk aims at no more than this, so that Ctrl-C, signals and the progress bar stay prompt, ..."""
_AMORTISED = 3
"""... or at so many times the shortest one: what a chunk costs whatever its length must not be most of it."""
_SAMPLED_STEPS = 64
"""Mini-batches are drawn this many steps at a time."""
_SCHEDULED_STEPS = 2**16
"""A chunk of members with schedules takes no more: each schedule's factors are held for all of it."""
_COPIES = 16
"""Of every parameter, in the end: gradient, optimizer, the guard's, temporaries. Measured: 15 (Adam) to 20 (GainSGD)."""
_ERROR_COPIES = 4
"""Of every member's error on every row: a full batch's predictions. Measured."""
_DTYPES = {"float64": torch.float64, "float32": torch.float32}

_LOSS = ("losses", "training_step", "batches")
"""Methods that say what is minimised. Closed forms and formulas stand for those of the class they are written for."""


@dataclass(frozen=True)
class Guard:
    """When a member stops.

    Args:
        tol: A member whose full clean data loss is below this has converged; 0 = never, None = 1e-20 (float64) or
            1e-12 (float32).
        bound: A member has diverged whose full clean data loss is more than this times the larger of its loss at step 0 and
            the loss of the zero predictor, or whose loss or a parameter is not finite. Where neither of the two losses is
            positive and finite, the latter alone counts.
        every_n_steps: Members are checked at steps divisible by this, an absolute grid, and where a fit ends.

    Raises:
        ValueError: If a number is out of range.
    """

    tol: float | None = None
    bound: float = 1e10
    every_n_steps: int = 100

    def __post_init__(self) -> None:
        if self.tol is not None:
            checks.number("guard.tol", self.tol, at_least=0)
        checks.positive("guard.bound", self.bound)
        checks.integer("guard.every_n_steps", self.every_n_steps, at_least=1)


class LinearNetwork(LightningModule):
    """A linear network trained as an ensemble.

    Args:
        ensemble: The members; None is a single one.
        optimizer: Makes the optimizer from parameter groups. `lr`, `weight_decay` and whatever else its class names in
            `axes` may be axes of the ensemble; it is then given their values, a tensor (E,) where members differ.
        batch_size: b, rows per step, or `full` (the whole set, without sampling). May be an axis.
        sampling: How mini-batches are drawn: `replacement`, `subset` (distinct rows, afresh each step) or `epochs` (a
            fresh permutation every floor(n/b) steps). May be an axis.
        label_noise: Standard deviation of fresh noise on each drawn label. May be an axis.
        lr_unit: What `lr` is multiplied by: `one`; `max_row`, 1/max_i |x_i|^2 of the member's problem; `flow_edge`,
            2/sharpness where gradient flow ends; `mean_square_edge`, the step size up to which SGD with the member's own
            batches is mean-square stable there. The product is recorded as `step_size`.
        dtype: `float64` or `float32`, of parameters and data.
        max_chunk: Optimizer steps one `training_step` takes at most; None ends a chunk at the next event. Results do
            not depend on it.
        schedule: Which of `schedules` is in force; `constant`, or None, is none of them. May be an axis.
        schedules: name -> {lr: ..., weight_decay: ..., batch_size: ...}, each a `StepSchedule` and each optional: at every
            step lr and weight decay are multiplied by what theirs say, the batch size is what its own says.

    Raises:
        ValueError: If an argument is out of range.
    """

    axes: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "batch_size", "sampling", "label_noise", "schedule")
    """The hyperparameters that may be axes of the ensemble. A subclass adds its own."""

    dims: ClassVar[dict[str, list[str]]] = {}
    """Names of its variables' trailing dimensions, where they are not `coordinate` or `row` and `column`."""

    lr_symbol: ClassVar[str] = r"\gamma"
    """The step size in figures, as the papers on this network write it: TeX, without dollar signs."""

    closed_form_optimizers: ClassVar[tuple[type[Optimizer], ...]] = (GainSGD,)
    """The optimizers whose steps `advance_closed_form` takes, where there is one."""

    def __init__(
        self,
        ensemble: Ensemble | None = None,
        optimizer: Callable[[Iterable], Optimizer] = GainSGD,
        batch_size: int | Literal["full"] = "full",
        sampling: Literal["replacement", "subset", "epochs"] = "replacement",
        label_noise: float = 0.0,
        lr_unit: Literal["one", "max_row", "flow_edge", "mean_square_edge"] = "one",
        dtype: Literal["float64", "float32"] = "float64",
        max_chunk: int | None = None,
        schedule: str | None = None,
        schedules: dict[str, dict[str, StepSchedule]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.ensemble = ensemble if ensemble is not None else Ensemble()
        self.num_members = self.ensemble.num_members
        if not callable(optimizer):
            raise ValueError(f"optimizer = {checks.shown(optimizer)}: must be an optimizer, {{class_path: GainSGD}}")
        self.make_optimizer = optimizer
        self.batch_size = batch_size
        self.sampling = sampling
        self.label_noise = label_noise
        self.lr_unit = checks.one_of("lr_unit", lr_unit, LR_UNITS)
        self.number_type = _DTYPES[checks.one_of("dtype", dtype, _DTYPES)]
        if max_chunk is not None:
            checks.integer("max_chunk", max_chunk, at_least=1)
        self.max_chunk = max_chunk
        for value in self.per_member("batch_size"):
            if value != "full":
                checks.integer("batch_size", value, at_least=1)
        for value in self.per_member("sampling"):
            checks.one_of("sampling", value, streams.SAMPLINGS)
        for value in self.per_member("label_noise"):
            checks.number("label_noise", value, at_least=0)
        self.schedule = CONSTANT if schedule is None else schedule
        self.schedules = checked_schedules(schedules)
        for value in self.per_member("schedule"):
            checks.one_of("schedule", value, (CONSTANT, *self.schedules))
        self.programme = Programme(self.per_member("schedule"), self.schedules)

        self.register_buffer("status", torch.zeros(self.num_members, dtype=torch.int8))
        self.register_buffer("stopped_at", torch.full((self.num_members,), -1, dtype=torch.int64))
        self.register_buffer("diverged_by", torch.zeros(self.num_members, dtype=torch.int8), persistent=False)
        self.reference_loss: Tensor | None = None
        """What `guard.bound` is relative to, float64 (E,); known once the fit has begun."""
        self.member_loss = MemberLoss(self.num_members)
        self.guard: Guard | None = None
        """Set by `MemberGuard`; without it no member is ever stopped."""
        self.record_schedule: Schedule | None = None
        """Set by the recorder: the steps at which `record_variables` are taken, inside chunks."""
        self.record_variables: tuple[str, ...] = ()
        self.problems: Problems | None = None
        self._records: list[tuple[list[int], dict[str, Tensor]]] = []
        self._kept: dict[str, Tensor] = {}
        self._ended_at = -1
        """The step at which `end` has looked."""
        self._provisional: dict[str, Any] = {}
        """Members that `end` has stopped, and their state before."""
        self._optimizer: Optimizer | None = None
        self._optimizer_axes: list[str] = []
        """The ensemble's axes that are the optimizer's own, beside lr and weight decay."""
        self._gain_refusal: str | None = None
        self._fitted_by: Any = None
        self._seconds_per_step, self._shortest_chunk = 0.0, math.inf
        self._sampled: dict[int, tuple[int, Tensor]] = {}
        self._at = 0
        """The step schedules have been followed to, ..."""
        self._elapsed = np.zeros(len(self.programme.names))
        """... and the sum of each one's factors of lr until there."""

    # What a subclass writes ------------------------------------------------------------------------------------------

    def build(self, num_features: int, num_outputs: int | None) -> None:
        """Create the parameters, each with a leading axis of members, unless `__init__` has done so.

        Args:
            num_features: D of the data.
            num_outputs: K of the data, or None where y is a vector.
        """

    def numbers_per_member(self, num_features: int, num_outputs: int | None) -> int:
        """Parameters of one member, for an estimate of the memory they need before they are made.

        Args:
            num_features: D of the data.
            num_outputs: K of the data, or None where y is a vector.
        """
        return num_features * (num_outputs or 1)

    def predictor(self) -> Tensor:
        """What the network computes, (E, D) or (E, K, D)."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each member of the batch, 1/(2B) times the sum of squared errors.

        Args:
            batch: Rows for G members.

        Returns:
            Losses (G,).
        """
        return batch.losses(self.predictor()[batch.members])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: torch parameter groups; a group with `form` is a pair of factors (`GainSGD`)."""
        return [{"params": list(self.parameters())}]

    @torch.no_grad()
    def start_from(self, parameters: dict[str, Tensor]) -> None:
        """Take over the parameters another model has ended with, as the beginning of a new fit; all of them, as they are.

        Args:
            parameters: By name, the names and shapes those of this model, which has been set up.
        """
        for name, parameter in self.named_parameters():
            parameter.copy_(parameters[name])

    def advance_closed_form(
        self, k: int, record_steps: list[int], variables: tuple[str, ...], guard: Guard | None
    ) -> tuple[int, dict[str, Tensor]]:
        """Advance up to k steps without autograd; optional.

        Args:
            k: Steps to take.
            record_steps: Those steps in (now, now + k], ascending, at which to record.
            variables: What to record.
            guard: When members stop, or None.

        Returns:
            The steps taken (fewer than k where the last running member stopped at a guard step) and the records, each
            (T, E, ...) for the T record steps that were reached.
        """
        raise NotImplementedError

    def closed_form_refusal(self) -> str | None:
        """Why the closed form does not apply to this model as it is set up, or None if it does."""
        home = next(cls for cls in type(self).__mro__ if "advance_closed_form" in vars(cls))
        if home is LinearNetwork:
            return f"{type(self).__name__} has no closed form"
        if (changed := self.changed_since(home, ("predictor", *_LOSS))) is not None:
            return changed
        if type(self._optimizer) not in self.closed_form_optimizers:
            return f"the optimizer is {type(self._optimizer).__name__}"
        return None

    def changed_since(self, cls: type, names: Iterable[str] = _LOSS) -> str | None:
        """Which methods of a class this model's own class has replaced, as a sentence; None if none of them.

        Args:
            cls: A class it derives from.
            names: The methods that count; by default those that say what is minimised.
        """
        changed = [name for name in names if getattr(type(self), name) is not getattr(cls, name)]
        return f"{type(self).__name__} has its own {', '.join(changed)}" if changed else None

    def squared_loss_refusal(self) -> str | None:
        """Why the loss is not the squared loss |X beta - y|^2/(2B), or None if it is.

        Every formula of theory that is about this loss asks here. A subclass with `losses` (or `batches`, or
        `training_step`) of its own has another one, unless it overrides this method as well and returns None.
        """
        return self.changed_since(LinearNetwork)

    def product_refusal(self) -> str | None:
        """Why beta is not the product of the one pair of factors in `parameter_groups`, or None if it is.

        Every formula of theory that is about such a network asks here. A subclass that is one overrides this method.
        """
        return f"{type(self).__name__} does not say that its predictor is the product of a pair of factors"

    @property
    def path(self) -> str:
        """How this model is advanced, and why."""
        refusal = self.closed_form_refusal()
        return "closed form" if refusal is None else f"generic (autograd): {refusal}"

    # Hyperparameters --------------------------------------------------------------------------------------------------

    def per_member(self, name: str) -> list[Any]:
        """One hyperparameter's value for every member: the ensemble's axis, else the constructor's argument."""
        if name in self.ensemble.axes:
            return self.ensemble.values(name)
        return [getattr(self, name)] * self.num_members

    def per_member_tensor(self, name: str) -> Tensor:
        """The same as a tensor (E,) of the model's dtype, on its device."""
        return torch.tensor(self.per_member(name), dtype=self.number_type, device=self.device)

    def drawn(self, size: int | Literal["full"], sampling: str) -> tuple[int, str]:
        """A batch size and its sampling as theory takes them: the full batch is all rows, none of them twice."""
        return (self.problems.x.shape[1], "subset") if size == "full" else (size, sampling)

    def init_normals(self, *shape: int) -> Tensor:
        """Standard normal numbers for an initialisation, (E, *shape), each member's from its own seed."""
        key = streams.keys(self.ensemble.root, "init", self.ensemble.seed)
        draws = streams.normals(key, torch.tensor([0]), math.prod(shape))[:, 0]
        return draws.reshape(self.num_members, *shape).to(self.number_type)

    def unit_of_lr(self) -> Tensor:
        """What `lr` is multiplied by, (E,), of the model's dtype.

        Raises:
            ValueError: If `lr_unit` is not defined for this network or its data.
        """
        if self.lr_unit == "one":
            return torch.ones(self.num_members, dtype=self.number_type, device=self.device)
        if self.lr_unit == "max_row" and self.problems.matrix_shape is None:
            return (1 / self.problems.x.square().sum(-1).amax(-1))[self.problem_index]
        known = "one or max_row" if self.problems.matrix_shape is None else "one"
        raise ValueError(f"lr_unit = {self.lr_unit}: not known for {type(self).__name__} on these data; use {known}")

    # Setting up -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the data's problems, build what is not yet built, and check that all fits; may be called twice."""
        data = getattr(self.trainer, "datamodule", None)
        if getattr(data, "problems", None) is None or getattr(data, "data_index", None) is None:
            raise ValueError(
                f"{type(self).__name__} trains on a dlnlab data set (a SyntheticData), got "
                f"{type(data).__name__ if data is not None else 'none'}"
            )
        device = self.trainer.strategy.root_device
        known = {"seed", *self.axes, *data.axes}
        self._optimizer_axes = [name for name in self.ensemble.axes if name not in known]
        self.problems = data.problems.to(self.number_type)
        self.problem_index = data.data_index.to(device)
        if not list(self.parameters()):
            *outputs, features = self.problems.predictor_shape
            sizes = features, outputs[0] if outputs else None
            self._check_memory(self.numbers_per_member(*sizes), device)
            with _default_dtype(self.number_type):
                self.build(*sizes)
        self.to(device=device, dtype=self.number_type)
        self._check_shapes()
        if self._optimizer_axes:
            self._make_optimizer(known)
        self._check_memory(sum(parameter.numel() for parameter in self.parameters()) // self.num_members, device)
        sizes = self.per_member("batch_size")
        for size in sizes:
            if size != "full" and size > self.problems.x.shape[1]:
                raise ValueError(
                    f"batch_size = {size}: must be at most the number of training samples, {self.problems.x.shape[1]}"
                )
        self._group_members(sizes)
        if self.lr_unit == "mean_square_edge" and self.programme.changes("batch_size"):
            raise ValueError(
                "lr_unit = mean_square_edge: it is of one batch size, which a schedule changes; use another"
            )
        self.unit = self.unit_of_lr()
        if stage == "fit":
            if type(self).configure_optimizers is not LinearNetwork.configure_optimizers:
                raise ValueError(
                    f"{type(self).__name__}.configure_optimizers: its optimizer and schedulers would not be used; "
                    "give `optimizer` as an argument (learning-rate schedulers are not honoured)"
                )
            if self.programme:
                self._largest_factors = self.programme.check(max(self.trainer.max_steps, 1), self.problems.x.shape[1])
            if self._fitted_by is not self.trainer:  # another fit starts from the present parameters, at step 0
                self._fitted_by = self.trainer
                self.restart()
            if isinstance(self._optimizer, _FLOWS):
                self._refuse_what_flows_cannot_follow()
            if isinstance(self._optimizer, GradientFlow):
                limit_steps(self.trainer, self._optimizer.max_steps)
                if self.guard is not None:  # its steps are few and long
                    self.guard = replace(self.guard, every_n_steps=1)
            refuse_what_chunks_cannot_honour(self.trainer)
            leave_requeueing_alone(self.trainer)

    def _refuse_what_flows_cannot_follow(self) -> None:
        kind = type(self._optimizer).__name__
        for size in self.per_member("batch_size"):
            if size != "full":
                raise ValueError(f"batch_size = {size}: {kind} follows the full loss; it must be full")
        if self._has_noise:
            raise ValueError(f"label_noise: {kind} follows the full loss without label noise; it must be 0")
        if isinstance(self._optimizer, StochasticGradientFlow) and (reason := self.closed_form_refusal()) is not None:
            raise ValueError(f"optimizer: {kind} needs the closed form of the diagonal linear network, but {reason}")

    def _check_memory(self, numbers: int, device: torch.device) -> None:
        """Refuse members that would not fit: parameters, optimizer, what the guard keeps, and what a step needs."""
        _, rows, features = self.problems.x.shape
        outputs = self.problems.y.shape[2:].numel()
        test_rows = 0 if self.problems.x_test is None else self.problems.x_test.shape[1]
        drawn = sum(min(size, rows) * features for size in self.per_member("batch_size") if size != "full")
        each = _COPIES * numbers + _ERROR_COPIES * max(rows, test_rows) * outputs
        needed = (self.num_members * each + drawn) * self.number_type.itemsize
        refuse_beyond_memory(
            needed,
            device,
            f"ensemble: {self.num_members:,} members",
            f"{numbers:,} parameters and {max(rows, test_rows):,} rows each",
            "use fewer members, smaller sizes or dtype: float32",
        )

    def _check_shapes(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.shape[:1] != (self.num_members,):
                raise ValueError(
                    f"parameter {name} has shape {tuple(parameter.shape)}: its first axis must be the {self.num_members} "
                    "members of the ensemble"
                )
        shape, wanted = tuple(self.predictor().shape[1:]), self.problems.predictor_shape
        if shape[-1] != wanted[-1]:
            raise ValueError(f"the model's predictor has {shape[-1]} features and the data have {wanted[-1]}")
        if self.problems.matrix_shape is not None and shape != wanted:
            raise ValueError(f"the data are entries of a matrix {wanted}, the model's predictor has shape {shape}")

    def _group_members(self, sizes: list[Any]) -> None:
        """Sort the members by their present batch size, which decides the shape of what they see."""
        self.batch_sizes = sizes
        sampling, seeds = self.per_member("sampling"), self.ensemble.seed.to(self.device)
        kinds = [("full" if size == "full" else size, None if size == "full" else kind)
                 for size, kind in zip(sizes, sampling, strict=True)]  # fmt: skip
        self._kinds = [
            (
                size,
                kind,
                torch.tensor([i for i, other in enumerate(kinds) if other == (size, kind)], device=self.device),
            )
            for size, kind in dict.fromkeys(kinds)
        ]
        self._sampling_keys = streams.keys(self.ensemble.root, "sampling", seeds)
        self._noise_keys = streams.keys(self.ensemble.root, "label_noise", seeds)
        self._noise_std = self.per_member_tensor("label_noise")
        self._has_noise = bool((self._noise_std > 0).any())
        self._sampled, self._batches = {}, self.kernel_batches()

    def _make_optimizer(self, known: Iterable[str] = ()) -> Optimizer:
        """The optimizer with those of its hyperparameters that are axes of the ensemble.

        Args:
            known: The axes that are not the optimizer's, for the message about one that is nobody's.
        """
        given: dict[str, Tensor | None] = {}
        for name in self.ensemble.axes:
            if name in ("lr", "weight_decay", *self._optimizer_axes):
                given[name] = None
                with suppress(TypeError, ValueError):  # texts
                    given[name] = torch.tensor(self.ensemble.values(name), dtype=torch.float64, device=self.device)
        numbers = {name: values for name, values in given.items() if values is not None}
        refusal = None
        try:
            # Where a factory is a partial of a class, its own `lr` is the one in force.
            optimizer = self.make_optimizer(self.parameter_groups(), **_plain_if_equal(numbers))
        except (TypeError, ValueError, RuntimeError) as error:
            if (refusal := self._refusal_of_axes(given, known, str(error))) is None:
                raise
        if refusal is not None:  # without what the class said of arguments that no person has given
            raise ValueError(refusal)
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer: must make a torch optimizer, got {checks.shown(optimizer)}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty and not isinstance(optimizer, _FLOWS):
            raise ValueError(f"optimizer: {type(optimizer).__name__} takes several losses a step, one is computed here")
        vectors = getattr(optimizer, "axes", ())
        for name in given:
            if name in self._optimizer_axes and name not in (*vectors, *optimizer.defaults):
                raise ValueError(self._no_such_axis(name, (*known, *vectors)))
            if name not in numbers:
                raise ValueError(f"ensemble.{name} = {checks.shown(self.ensemble.axes[name])}: must be numbers")
            if name not in vectors and len(set(numbers[name].tolist())) > 1:
                raise ValueError(f"ensemble.{name}: {type(optimizer).__name__} takes one {name} for all members")
        return optimizer

    def _refusal_of_axes(self, given: dict[str, Tensor | None], known: Iterable[str], said: str) -> str | None:
        """What an error of an optimizer's constructor means, if it is about an axis of the ensemble."""
        for name, value in given.items():
            if f"unexpected keyword argument {name!r}" in said:
                if name in self._optimizer_axes:
                    return self._no_such_axis(name, known)
                return f"ensemble.{name}: this optimizer takes no {name}"
            # What torch says of a vector lr, and of any other vector that it compares with a number.
            refused = any(words in said for words in ("Tensor lr must be 1-element", "Boolean value of Tensor"))
            if refused and value is not None and len(set(value.tolist())) > 1:
                other = "; use GainSGD, which takes one per member" if name in GainSGD.axes else ""
                return f"ensemble.{name}: this optimizer takes one {name} for all members{other}"
        return None

    def _no_such_axis(self, name: str, known: Iterable[str]) -> str:
        factory = self.make_optimizer
        makers = [factory, getattr(factory, "func", None), *getattr(factory, "args", ())]  # what a partial wraps
        axes = {axis for maker in makers if isinstance(maker, type) for axis in getattr(maker, "axes", ())}
        return f"ensemble.{name}: no such axis; the axes here are {', '.join(sorted({*known, *axes}))}"

    def _build_optimizer(self) -> Optimizer:
        optimizer = self._make_optimizer()
        if bool((self.unit != 1).any()):
            for group in optimizer.param_groups:
                if "lr" not in getattr(optimizer, "axes", ()):
                    raise ValueError(
                        f"lr_unit = {self.lr_unit}: {type(optimizer).__name__} takes one lr for all members"
                    )
                if "lr" in group:
                    lr = torch.as_tensor(group["lr"], dtype=torch.float64, device=self.device)
                    group["lr"] = lr * self.unit.double()
        if isinstance(optimizer, StochasticGradientFlow):
            optimizer.keys = streams.keys(self.ensemble.root, "flow", self.ensemble.seed.to(self.device))
        if self.programme:
            self._attach_schedules(optimizer)
        return optimizer

    def _attach_schedules(self, optimizer: Optimizer) -> None:
        """Keep lr and weight decay as `initial_lr` and `initial_weight_decay`, which schedules multiply."""
        kind, vectors = type(optimizer).__name__, getattr(optimizer, "axes", ())
        if isinstance(optimizer, _FLOWS):
            raise ValueError(f"schedule: {kind} has no steps whose size a schedule could change; it must be constant")
        for name in ("lr", "weight_decay"):
            for group in optimizer.param_groups:
                if name in group:
                    value = torch.as_tensor(group[name], dtype=torch.float64, device=self.device)
                    group[f"initial_{name}"] = value if name in vectors else float(value)
                elif self.programme.changes(name):
                    raise ValueError(f"schedule: {kind} has no {name} that a schedule could change")
            if name not in vectors and not self.programme.is_shared(name):
                raise ValueError(f"schedule: {kind} takes one {name} for all members, so all must share its schedule")
        if isinstance(optimizer, GainSGD):
            lr, kappa = (_of_group(optimizer, name, self.num_members) for name in ("lr", "weight_decay"))
            largest = np.append(self._largest_factors, 1.0)[self.programme.rows.numpy()]
            for member, product in enumerate((2 * lr * kappa).cpu().numpy() * largest):
                if product >= 1:
                    name = self.programme.names[self.programme.rows[member]]
                    raise ValueError(
                        f"schedules.{name}: 2 lr weight_decay comes to {product:g} (member {self.ensemble.label(member)}); "
                        "must stay below 1, or the decay overshoots zero in one step"
                    )

    def restart(self) -> None:
        """Take the present parameters as the beginning: all members run, and the optimizer has no past, its gain is 0."""
        self._optimizer = self._build_optimizer()
        self._kept, self._records = {}, []
        self.reference_loss, self._ended_at, self._provisional = None, -1, {}
        self.status.fill_(RUNNING)
        self.stopped_at.fill_(-1)
        self.diverged_by.zero_()
        self._at, self._elapsed = 0, np.zeros_like(self._elapsed)
        self._arrive(0)
        self._probe_pairs()

    def _probe_pairs(self) -> None:
        """Mark the members whose loss is no function of the product of their factors, before a gain is recorded.

        The gradients are probed near the start, where no factor is zero and no two are equal. A closed form needs no probe.
        """
        optimizer, self._gain_refusal = self._optimizer, None
        pairs = optimizer.pairs if isinstance(optimizer, GainSGD | GradientFlow) else []
        if not pairs or self.closed_form_refusal() is None:
            return
        factors = [factor for group in pairs for factor in group["params"]]
        before = [factor.detach().clone() for factor in factors]
        generator = torch.Generator().manual_seed(0)
        try:
            with torch.no_grad():
                for factor in factors:  # the same for every member, in units of its own largest entry
                    scale = _largest([factor]).view(-1, *[1] * (factor.ndim - 1))
                    away = 0.1 * (1 + torch.rand(factor.shape[1:], generator=generator, dtype=torch.float64))
                    factor.add_(torch.where(scale == 0, 1, scale) * away.to(factor))
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self._differentiate(0, torch.arange(self.num_members, device=self.device))
            for group in pairs:
                gradients = [factor.grad for factor in group["params"] if factor.grad is not None]
                if gradients:
                    # A flow has no step size: then a step as long as the factors themselves.
                    lr = group["lr"] if "lr" in group else _largest(group["params"]) / _largest(gradients)
                    optimizer.gradient(group, lr)
        except Exception:  # a person's own losses may need what is there only during a fit; the steps are checked too
            return
        finally:
            optimizer.zero_grad()
            for factor, value in zip(factors, before, strict=True):
                factor.data.copy_(value)
        undefined = [optimizer.undefined(group).reshape(self.num_members, -1).any(1) for group in pairs]
        if bool(torch.stack(undefined).any(0).all()):
            self._gain_refusal = f"the loss of {type(self).__name__} is no function of the product of its factors"

    def inherit(self, status: Tensor, stopped_at: Tensor) -> None:
        """Let members stay diverged that had diverged in the run whose parameters they start from.

        Args:
            status: How that run's members ended, (E,).
            stopped_at: Where they stopped, in steps of the run that they diverged in, (E,); it is kept.
        """
        gone = status.to(self.device) == DIVERGED
        self.status[gone], self.diverged_by[gone] = DIVERGED, SOURCE
        self.stopped_at[gone] = stopped_at.to(self.device)[gone]

    @property
    def diverged_before(self) -> Tensor:
        """The members that had diverged in the run this one has started from, boolean (E,): they take no step here."""
        return self.diverged_by == SOURCE

    def configure_optimizers(self) -> Optimizer:
        """The optimizer `setup` has made and checked."""
        return self._optimizer

    @property
    def step_size(self) -> Tensor:
        """Lr times its unit, (E,), which schedules multiply; NaN where the optimizer has no lr."""
        return _of_group(self._optimizer, "lr", self.num_members)

    def unscheduled(self, name: str) -> Tensor:
        """`lr` or `weight_decay` before schedules, (E,), of the model's dtype and device; NaN where there is none."""
        return _of_group(self._optimizer, name, self.num_members).to(device=self.device, dtype=self.number_type)

    # Schedules --------------------------------------------------------------------------------------------------------

    @property
    def scheduled_lr(self) -> Tensor:
        """The step size of the next step, (E,); NaN where the optimizer has none."""
        return _of_group(self._optimizer, "lr", self.num_members, present=True)

    @property
    def scheduled_weight_decay(self) -> Tensor:
        """The weight decay of the next step, (E,); NaN where the optimizer has none."""
        return _of_group(self._optimizer, "weight_decay", self.num_members, present=True)

    @property
    def scheduled_batch_size(self) -> Tensor:
        """Rows of the next step, (E,); that of the full batch is N."""
        n = self.problems.x.shape[1]
        return torch.tensor([float(n if size == "full" else size) for size in self.batch_sizes], dtype=torch.float64)

    def rates(self, start: int, stop: int) -> Rates | None:
        """Lr and weight decay of the steps start, ..., stop - 1 as kernels take them; None where they are constant."""
        if not (self.programme.changes("lr") or self.programme.changes("weight_decay")):
            return None
        first = Rates.first_of(start)
        tables = (self.programme.factors(name, first, stop) for name in ("lr", "weight_decay"))
        return Rates(
            *(_of_group(self._optimizer, name, self.num_members).to(self.device) for name in ("lr", "weight_decay")),
            self.programme.rows.to(self.device),
            *(torch.from_numpy(np.ascontiguousarray(table)).to(self.device) for table in tables),
            first,
        )

    def _arrive(self, step: int) -> None:
        """Be at a step, having taken those before it: the optimizer holds what the next one is made with."""
        if not self.programme:
            return
        if step > self._at:
            self._elapsed = self.programme.elapsed(self._elapsed, self._at, step)[:, -1]
        self._at = step
        rows = self.programme.rows.numpy()
        for name in ("lr", "weight_decay"):
            factor = np.append(self.programme.factors(name, step, step + 1)[:, 0], 1.0)[rows]
            for group in self._optimizer.param_groups if self.programme.changes(name) else ():
                initial = group[f"initial_{name}"]
                vector = isinstance(initial, Tensor)
                group[name] = initial * torch.from_numpy(factor).to(initial) if vector else initial * float(factor[0])
        if self.programme.changes("batch_size"):
            said = np.append(self.programme.values("batch_size", step, step + 1)[:, 0], math.nan)[rows].tolist()
            given, n = self.per_member("batch_size"), self.problems.x.shape[1]
            sizes = [
                base if math.isnan(size) else "full" if size == math.inf else int(min(size, n))
                for size, base in zip(said, given, strict=True)
            ]
            if sizes != self.batch_sizes:
                self._group_members(sizes)

    def _steps_alike(self, step: int, k: int) -> int:
        """How many of k steps from `step` no batch size changes in."""
        if not self.programme.changes("batch_size"):
            return k
        sizes = np.nan_to_num(self.programme.values("batch_size", step, step + k), nan=0.0, posinf=math.inf)
        changed = np.flatnonzero((sizes != sizes[:, :1]).any(0))
        return int(changed[0]) if len(changed) else k

    def _at_steps(self, steps: list[int]) -> dict[str, Tensor]:
        """`time` and what schedules say, (T, E) each, at steps that come after the present one, ascending."""
        rows, place = self.programme.rows.numpy(), np.array(steps, dtype=np.int64) - self._at
        last = max([self._at, *steps])
        sums = self.programme.elapsed(self._elapsed, self._at, last)[:, place]
        elapsed = np.vstack((sums, np.array(steps, dtype=float)))[rows].T
        found = {"time": torch.from_numpy(elapsed).to(self.device) * self.step_size.to(self.device)}
        for name in ("lr", "weight_decay"):
            table = self.programme.factors(name, self._at, last + 1)[:, place]
            factor = np.vstack((table, np.ones(len(steps))))[rows].T
            base = _of_group(self._optimizer, name, self.num_members).to(self.device)
            found[f"scheduled_{name}"] = torch.from_numpy(np.ascontiguousarray(factor)).to(self.device) * base
        table = self.programme.values("batch_size", self._at, last + 1)[:, place]
        said, n = np.vstack((table, np.full(len(steps), math.nan)))[rows].T, self.problems.x.shape[1]
        base = np.array([float(n if size == "full" else size) for size in self.per_member("batch_size")])
        sizes = np.where(np.isnan(said), base, np.minimum(said, n))
        found["scheduled_batch_size"] = torch.from_numpy(sizes).to(self.device)
        return found

    # Batches ----------------------------------------------------------------------------------------------------------

    def full_batch(self, members: Tensor | None = None, test: bool = False) -> Batch:
        """All training rows (or test rows) for some members, all of them by default."""
        if members is None:
            members = torch.arange(self.num_members, device=self.device)
        x, y = (self.problems.x_test, self.problems.y_test) if test else (self.problems.x, self.problems.y)
        return Batch(x, y, members, self.problem_index[members])

    def sampled_rows(self, size: int, sampling: str, members: Tensor, step: int) -> Tensor:
        """The rows that members draw at one step, int64 (G, size)."""
        index = next(i for i, (s, kind, _) in enumerate(self._kinds) if (s, kind) == (size, sampling))
        block = step // _SAMPLED_STEPS
        cached = self._sampled.get(index)
        if cached is None or cached[0] != block:
            start = block * _SAMPLED_STEPS
            everyone = self._kinds[index][2]
            # Members of one seed draw the same rows.
            unique, seed_of = torch.unique(self._sampling_keys[everyone], dim=0, return_inverse=True)
            rows = streams.sample(sampling, unique, start, start + _SAMPLED_STEPS, size, self.problems.x.shape[1])
            where = torch.full((self.num_members,), -1, device=self.device)
            where[everyone] = seed_of
            cached = self._sampled[index] = (block, rows, where)
        _, rows, where = cached
        return rows[:, step - block * _SAMPLED_STEPS][where[members]]

    def label_noise_at(self, step: int, members: Tensor, count: int) -> Tensor | None:
        """Fresh noise for the labels that members draw at one step, (G, count[, K]); None without label noise."""
        if not self._has_noise:
            return None
        outputs = self.problems.y.shape[2:]
        steps = torch.tensor([step], device=self.device)
        draws = streams.normals(self._noise_keys[members], steps, count * math.prod(outputs))[:, 0]
        draws = draws.to(self.number_type).reshape(len(members), count, *outputs)
        return draws * self._noise_std[members].view(-1, *[1] * (draws.ndim - 1))

    def batches(self, step: int, members: Tensor | None = None) -> list[Batch]:
        """What members (all by default) see at one step: one batch for each batch size and sampling."""
        found = []
        for size, sampling, everyone in self._kinds:
            group = everyone if members is None else everyone[torch.isin(everyone, members)]
            if len(group) == 0:
                continue
            problem = self.problem_index[group]
            if size == "full":
                noise = self.label_noise_at(step, group, self.problems.x.shape[1])
                found.append(Batch(self.problems.x, self.problems.y, group, problem, noise))
            else:
                rows = self.sampled_rows(size, sampling, group, step)
                noise = self.label_noise_at(step, group, size)
                x, y = self.problems.x[problem[:, None], rows], self.problems.y[problem[:, None], rows]
                found.append(Batch(x, y, group, None, noise))
        return found

    def kernel_batches(self) -> Batches:
        """What each member sees at a step, as compiled kernels take it."""
        sampling = [streams.SAMPLINGS.index(name) for name in self.per_member("sampling")]
        sizes = [0 if size == "full" else size for size in self.batch_sizes]
        return Batches(
            torch.tensor(sizes, device=self.device),
            torch.tensor(sampling, device=self.device),
            self._sampling_keys,
            self._noise_keys,
            self._noise_std,
        )

    # Chunks -----------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take a chunk of optimizer steps, up to the next event."""
        del batch, batch_idx
        step = self.trainer.global_step
        began = time.perf_counter()
        taken = self.advance(step, self._next_event(step) - step)
        seconds = time.perf_counter() - began
        self._seconds_per_step, self._shortest_chunk = seconds / max(taken, 1), min(self._shortest_chunk, seconds)
        count_steps(self.trainer, taken)

    def _next_event(self, step: int) -> int:
        """The first step after `step` at which someone wants to look."""
        trainer = self.trainer
        events = [trainer.max_steps] if trainer.max_steps > 0 else [step + 1]
        for callback in trainer.callbacks:
            events.append(next_event_of(callback, step))
        if trainer.loggers and trainer.log_every_n_steps:
            events.append(step - step % trainer.log_every_n_steps + trainer.log_every_n_steps)
        end = min(event for event in events if event is not None)
        if self.max_chunk is not None:
            return min(end, step + self.max_chunk)
        if self._seconds_per_step > 0:
            seconds = max(_CHUNK_SECONDS, _AMORTISED * self._shortest_chunk)
            end = min(end, step + max(1, round(seconds / self._seconds_per_step)))
        else:
            end = min(end, step + 10)  # the first chunk measures how long a step takes
        return end

    def advance(self, step: int, k: int) -> int:
        """Take up to k steps from `step`; fewer where the last running member stops.

        Returns:
            The number of steps taken.
        """
        if self.programme:
            self._arrive(step)
            k = self._steps_alike(step, min(k, _SCHEDULED_STEPS))
        schedule = self.record_schedule
        record_steps = schedule.between(step, step + k) if schedule is not None else []
        if self.closed_form_refusal() is None:
            with torch.no_grad():
                taken, records = self.advance_closed_form(k, record_steps, self.record_variables, self.guard)
        else:
            taken, records = self._advance_generic(step, k, record_steps)
        reached = [s for s in record_steps if s <= step + taken]
        if reached:
            self._records.append((reached, records))
        return taken

    def _advance_generic(self, step: int, k: int, record_steps: list[int]) -> tuple[int, dict[str, Tensor]]:
        optimizer, due, records = self._optimizer, set(record_steps), []
        members = self.running
        for now in range(step, step + k):
            if len(members):
                if isinstance(optimizer, GradientFlow):
                    optimizer.step(lambda: self._differentiate(now, members))  # noqa: B023 - used at once
                else:
                    self._differentiate(now, members)
                    optimizer.step()
                self._hold_stopped()
            self._arrive(now + 1)
            if self.guard is not None and (now + 1) % self.guard.every_n_steps == 0:
                self.check_members(now + 1)
                members = self.running
            if now + 1 in due:
                records.append(self.measure(self.record_variables))
            if len(members) == 0:
                break
        return now + 1 - step, stack_records(records)

    def _differentiate(self, step: int, members: Tensor) -> Tensor:
        """The gradients of some members' losses at a step, the others' zero; returns the losses (E,), likewise."""
        self._optimizer.zero_grad()
        values = torch.zeros(self.num_members, dtype=self.number_type, device=self.device)
        with torch.enable_grad():
            found = [(batch, self.losses(batch)) for batch in self.batches(step, members)]
            sum(losses.sum() for _, losses in found).backward()
        for batch, losses in found:
            values[batch.members] = losses.detach()
        return values

    def take_records(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Hand over what was recorded since the last call: (T steps, {name: (T, E, ...)})."""
        records, self._records = self._records, []
        return records

    # The guard --------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> Tensor:
        """The members that still run, int64."""
        return torch.nonzero(self.status == RUNNING).squeeze(1)

    def full_losses(self, members: Tensor | None = None) -> Tensor:
        """The full clean data loss of some members (all by default): no penalty, no label noise; (G,)."""
        with torch.no_grad():
            return self.losses(self.full_batch(members))

    def member_state(self) -> dict[str, Tensor]:
        """Every tensor that belongs to members, by name: parameters and the optimizer's state."""
        state = {f"parameter.{name}": parameter.data for name, parameter in self.named_parameters()}
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for i, parameter in enumerate(parameters):
            for name, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape[:1] == (self.num_members,):
                    state[f"optimizer.{i}.{name}"] = value
        return state

    @property
    def guard_tol(self) -> float:
        """The loss below which a member has converged."""
        if self.guard.tol is not None:
            return self.guard.tol
        return 1e-20 if self.number_type == torch.float64 else 1e-12

    def on_train_start(self) -> None:
        """See `begin`."""
        self.begin(self.trainer.global_step)

    def on_train_end(self) -> None:
        """See `end`."""
        self.end(self.trainer.global_step)

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Show the guard the first state, once; members go on that a fit which ended here, off the grid, has stopped.

        The first state is what a member that diverges at once goes back to, and `guard.bound` is relative to its loss.
        """
        if self.guard is None:
            return
        self._reopen()
        if not self._kept:
            self._kept = {name: value.clone() for name, value in self.member_state().items()}
            batch = self.full_batch()
            losses = torch.stack((self.losses(batch), self.losses(NullBatch.of(batch)))).double()
            self.reference_loss = losses.nan_to_num(0.0, 0.0, 0.0).amax(0)
            self.check_members(step)

    @property
    def loss_bound(self) -> Tensor:
        """The largest full loss of a member that has not diverged, float64 (E,), finite."""
        return bound_of(self.reference_loss, self.guard.bound)

    @torch.no_grad()
    def check_members(self, step: int) -> None:
        """Let the guard decide at `step` who goes on: keep the running, freeze the converged, take back the diverged."""
        members = self.running
        if len(members) == 0:
            return
        diverged, converged, cause = self._judge(members)
        safe = members[~diverged]
        for name, value in self.member_state().items():
            if name not in self._kept:  # an optimizer that makes its state at the first step
                self._kept[name] = torch.zeros_like(value)
            self._kept[name][safe] = value[safe]
        self._stop(step, members, diverged, converged, cause)

    @torch.no_grad()
    def end(self, step: int) -> None:
        """Check the members where the fit, or a checkpoint's part of it, ends off the guard's grid; once.

        What has diverged goes back to the last check on the grid, as the next one would find. Nothing of this decides about
        the steps to come: a fit that goes on from here begins with the state before (`begin`), and is bit for bit the fit
        that was never cut.
        """
        members = self.running
        if self.guard is None or step == self._ended_at or step % self.guard.every_n_steps == 0:
            return
        self._ended_at = step
        if len(members) == 0:
            return
        diverged, converged, cause = self._judge(members)
        stopped = members[diverged | converged]
        if len(stopped):
            state = {name: value[stopped].clone() for name, value in self.member_state().items()}
            self._provisional = {"members": stopped, "state": state}
            self._stop(step, members, diverged, converged, cause)

    @property
    def has_provisional_ends(self) -> bool:
        """Whether `end` has stopped members, so that they are no longer as the last step's records show them."""
        return bool(self._provisional)

    def _reopen(self) -> None:
        """Undo what `end` has done."""
        self._ended_at = -1
        if self._provisional:
            members, before = self._provisional["members"], self._provisional["state"]
            for name, value in self.member_state().items():
                value[members] = before[name]
            self.status[members], self.stopped_at[members], self.diverged_by[members] = RUNNING, -1, 0
            self._provisional = {}

    def _judge(self, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which of some members have diverged, which converged, and why the former have, (G,) each."""
        losses = self.full_losses(members).double()
        finite = losses.isfinite()
        for parameter in self.parameters():
            finite &= parameter[members].isfinite().flatten(1).all(1)
        fine = finite & (losses <= self.loss_bound[members])
        cause = torch.where(finite, ABOVE_BOUND, NOT_FINITE).to(self.diverged_by.dtype)
        return ~fine, fine & (losses < self.guard_tol), cause

    def _stop(self, step: int, members: Tensor, diverged: Tensor, converged: Tensor, cause: Tensor) -> None:
        """Freeze the converged, take the diverged back to the last check on the grid before `step`."""
        gone, done = members[diverged], members[converged]
        for name, value in self.member_state().items():
            value[gone] = self._kept[name][gone] if name in self._kept else 0
        self.status[gone], self.diverged_by[gone], self.status[done] = DIVERGED, cause[diverged], CONVERGED
        every = self.guard.every_n_steps
        self.stopped_at[gone], self.stopped_at[done] = max((step - 1) // every * every, 0), step

    def _hold_stopped(self) -> None:
        """Give stopped members back the state they stopped with, after a step that moved everyone."""
        stopped = torch.nonzero(self.status != RUNNING).squeeze(1)
        if len(stopped):
            for name, value in self.member_state().items():
                if name in self._kept:
                    value[stopped] = self._kept[name][stopped]

    # Variables --------------------------------------------------------------------------------------------------------

    def variables(self) -> dict[str, Callable[[], Tensor] | str]:
        """What can be recorded: name -> function giving (E, ...), or a text saying why it is not defined here."""
        no_teacher = "the data have no teacher"
        found: dict[str, Callable[[], Tensor] | str] = {
            "train_loss": self.full_losses,
            "test_loss": "the data have no test set (num_test_samples = 0)",
            "distance": no_teacher,
            "teacher": no_teacher,
            "beta": self.predictor,
            "time": self._time,
            **dict.fromkeys(SCHEDULED, "no member has a schedule"),
        }
        if self.programme:
            found |= {name: lambda name=name: getattr(self, name).to(self.device) for name in SCHEDULED}
            if "weight_decay" not in self._optimizer.param_groups[0]:
                found["scheduled_weight_decay"] = f"{type(self._optimizer).__name__} has no weight_decay"
        if self.problems.x_test is not None:
            found["test_loss"] = lambda: self.losses(self.full_batch(test=True))
        if self.problems.teacher is not None:
            found["distance"] = self._distance
            found["teacher"] = lambda: self.problems.teacher[self.problem_index]
            if self.problems.matrix_shape is not None and self.problems.x.shape[1] == self.problems.teacher[0].numel():
                found["distance"] = "every entry of the matrix is observed"
        for name in ("gain", "gain_plus", "gain_minus", "effective_init", "imbalance"):
            found[name] = self._of_optimizer(name)
        for name in INVARIANTS:
            found[name] = self._of_optimizer(name)
            if callable(found[name]) and self._optimizer.pairs[0]["form"] != "squares":
                found[name] = "the factors are u and v, in which the imbalance cancels; keep w+ and w- (form `squares`)"
        if hasattr(self._optimizer, "loss_integral"):
            found["loss_integral"] = lambda: self._optimizer.loss_integral.expand(self.num_members)
        return found

    def _of_optimizer(self, name: str) -> Callable[[], Tensor] | str:
        kind = type(self._optimizer).__name__
        if not hasattr(type(self._optimizer), name):
            return f"the optimizer {kind} does not state it"
        pairs = getattr(self._optimizer, "pairs", [])
        if len(pairs) != 1:
            return f"{type(self).__name__} has {len(pairs) or 'no'} pairs of factors"
        if self._gain_refusal is not None and name != "imbalance":
            return self._gain_refusal
        return lambda: getattr(self._optimizer, name)

    def invariant_tolerance(self, step: int) -> float:
        """What rounding may make of `INVARIANTS` by a step."""
        # A step rounds each factor and each product, by 1/|1 - x| where x is near 1, which some step of a run is to 1e-5;
        # and it adds to a sum of logarithms that may reach hundreds.
        return torch.finfo(self.number_type).eps * (1e6 + 10 * step) + 1e-13 * step

    def _distance(self) -> Tensor:
        squares = (self.predictor() - self.problems.teacher[self.problem_index]).square().flatten(1)
        if self.problems.matrix_shape is None:
            return squares.sum(1)
        places = self.problems.x[..., 0] * self.problems.matrix_shape[1] + self.problems.x[..., 1]
        unseen = torch.ones_like(squares).scatter_(1, places[self.problem_index], 0)
        return (squares * unseen).sum(1) / unseen.sum(1)

    def _time(self) -> Tensor:
        elapsed = getattr(self._optimizer, "time", None)
        if elapsed is None:
            elapsed = math.nan
        elif self.programme:
            elapsed = (
                torch.from_numpy(np.append(self._elapsed, self._at)[self.programme.rows.numpy()]) * self.step_size.cpu()
            )
        return torch.as_tensor(elapsed, dtype=torch.float64, device=self.device).expand(self.num_members)

    @torch.no_grad()
    def measure(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The present values of some variables and the members' status, detached copies."""
        variables = self.variables()
        values = {name: variables[name]().detach().clone() for name in names}
        return {**values, "status": self.status.clone()}

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (part.to(self.number_type) if part.is_floating_point() else part for part in batch)
        everyone = torch.arange(self.num_members, device=self.device)
        losses = self.losses(Batch(x, y, everyone, self.problem_index))
        self.member_loss.update(losses, x.shape[1])
        return losses

    def _log_evaluation(self, name: str) -> None:
        losses = self.member_loss.compute()
        self.member_loss.reset()
        self.log_dict({f"{name}/median": losses.median(), f"{name}/min": losses.min(), f"{name}/max": losses.max()})

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Losses (E,) on some training rows."""
        del batch_idx
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the median, smallest and largest loss over members."""
        self._log_evaluation("loss/train")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Losses (E,) on some test rows."""
        del batch_idx
        return self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log the median, smallest and largest loss over members."""
        self._log_evaluation("loss/test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Predictions (E, N[, K]) on the test rows."""
        del batch_idx
        x, y = (part.to(self.number_type) if part.is_floating_point() else part for part in batch)
        everyone = torch.arange(self.num_members, device=self.device)
        return Batch(x, y, everyone, self.problem_index).predictions(self.predictor())

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the guard keeps and knows of each member, and how far schedules are; the step is a check."""
        goes_on = self._ended_at != self.trainer.global_step
        self.end(self.trainer.global_step)
        checkpoint["dlnlab_kept"] = dict(self._kept)
        if self.reference_loss is not None:
            checkpoint["dlnlab_guard"] = {
                "reference_loss": self.reference_loss,
                "diverged_by": self.diverged_by.clone(),
                "provisional": self._provisional,
            }
        if goes_on and self._provisional:  # the checkpoint's members are checked, the fit's go on as they are
            for name in ("state_dict", "optimizer_states"):
                if name in checkpoint:
                    checkpoint[name] = copy.deepcopy(checkpoint[name])
            self._reopen()
        if self.programme:
            checkpoint["dlnlab_schedules"] = {"step": self._at, "elapsed": torch.from_numpy(self._elapsed.copy())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it.

        Raises:
            ValueError: If a fit cannot go on from it; see `refuse_old_checkpoint`.
        """
        refuse_checkpoint_of_requeueing(self._trainer)
        if self.guard is not None:
            self.refuse_old_checkpoint(checkpoint)
        self._kept = _on(self.device, checkpoint.get("dlnlab_kept", {}))
        known = _on(self.device, checkpoint.get("dlnlab_guard", {}))
        if known:
            self.reference_loss, self._provisional = known["reference_loss"], known["provisional"]
            self.diverged_by.copy_(known["diverged_by"])
        if self.programme and "dlnlab_schedules" in checkpoint:
            reached = checkpoint["dlnlab_schedules"]
            self._at, self._elapsed = reached["step"], reached["elapsed"].numpy().copy()
            if self._optimizer is not None:
                self._arrive(self._at)

    @staticmethod
    def refuse_old_checkpoint(checkpoint: dict[str, Any]) -> None:
        """Raise ValueError if a fit's checkpoint lacks the losses that `guard.bound` is relative to."""
        if checkpoint.get("dlnlab_kept") and "dlnlab_guard" not in checkpoint:
            raise ValueError(
                "the checkpoint was written by an earlier version of dlnlab, without the first losses that guard.bound is "
                "relative to now; start a new run (--init_from takes over its parameters)"
            )


def _on(device: torch.device, values: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of tensors, on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else _on(device, value) for name, value in values.items()
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let `torch.ones(...)` and the like make parameters of the model's own precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


INVARIANTS = ("imbalance_error", "mirror_error", "gain_sandwich_error")
"""Variables that exact arithmetic would make zero at every step and step size."""

SCHEDULED = ("scheduled_lr", "scheduled_weight_decay", "scheduled_batch_size")
"""Variables that are recorded wherever a member has a schedule: what the next step is made with."""

_FLOWS = (GradientFlow, StochasticGradientFlow)


def stack_records(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[{name: (E, ...)}] -> {name: (T, E, ...)}."""
    return {name: torch.stack([record[name] for record in records]) for name in records[0]} if records else {}


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude among each member's entries, (E,)."""
    return torch.stack([tensor.detach().reshape(len(tensor), -1).abs().amax(1) for tensor in tensors]).amax(0)


def _of_group(optimizer: Optimizer, name: str, num_members: int, present: bool = False) -> Tensor:
    """A hyperparameter of each member before schedules, or the present one, (E,) float64; NaN where there is none."""
    group = optimizer.param_groups[0]
    value = group.get(name, math.nan)
    value = value if present else group.get(f"initial_{name}", value)
    return torch.as_tensor(value, dtype=torch.float64).expand(num_members)


def _plain_if_equal(given: dict[str, Tensor]) -> dict[str, Any]:
    """A number where all members agree: torch's own optimizers take no vectors."""
    return {name: float(value[0]) if len(set(value.tolist())) == 1 else value for name, value in given.items()}
