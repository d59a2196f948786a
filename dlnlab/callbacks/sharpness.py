"""Sharpness: the curvature of the training loss, while it trains."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from itertools import islice
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DistributedSampler

from dlnlab import checks
from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.edge import Edge, edge
from dlnlab.callbacks.sandbox import sandbox
from dlnlab.curvature import (
    LossOperator,
    Operator,
    Preconditioned,
    Trace,
    batch_sharpness,
    critical_sharpness,
    eigenpairs,
    gauss_newton,
    hessian,
    mean_loss,
    trace,
)
from dlnlab.curvature.products import Passes, num_rows
from dlnlab.models import LinearNetwork

OPERATORS = ("hessian", "gauss_newton", "preconditioned")
QUANTITIES = ("sharpness", "batch_sharpness", "trace", "critical")
_PREFIX = {"hessian": "", "gauss_newton": "gauss_newton_", "preconditioned": "preconditioned_"}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_DRAWS_FROM = 2**40
"""Steps from here on are never trained, so that mini-batches drawn for a measurement are not those of training."""
_PATIENCE = 20.0
"""Seconds of training before the share that measuring takes is judged."""


class Sharpness(Measurement):
    r"""The largest eigenvalue of the training loss's Hessian, beside the edge of stability of the optimizer in use.

    On any LightningModule, with any Trainer: `Trainer(callbacks=[Sharpness(every_n_steps=100)])`. It is measured before
    the optimizer's step, at the parameters that `trainer.global_step` steps have led to, and training goes on bit for bit
    as without it: the loss is evaluated on copies, with the random generators put back, and nothing it logs is kept. With
    gradient accumulation it is the mean loss of the accumulated batches, in DDP that of all processes. Half precision and
    autocast are measured in float32. In ensembles of dlnlab it is one number per member, of the full training loss.

    Logged: `curvature/sharpness`; `curvature/effective_sharpness`, 2 x sharpness/(the optimizer's largest stable one), so
    that the edge is at 2, where it is known (SGD, momentum, Nesterov, GainSGD; Adam, AdamW, RMSprop and Adagrad with
    `operator: preconditioned`) and all measured parameters share it; `curvature/sharpness_residual`, |H v - theta v|: some
    eigenvalue lies within it; `curvature/products`; `curvature/seconds`. Cost: about 5 to 20 Hessian-vector products once
    warm, each about two steps of gradient descent on the measured data.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.
        k: How many eigenvalues: also `sharpness_2`, ... and `smallest_eigenvalue_2`, ....
        which: `largest`, `smallest` or `both` ends of the spectrum.
        tol: Residual, relative to the largest Ritz magnitude.
        operator: `hessian`; `gauss_newton`; or `preconditioned`, P^{-1/2} H P^{-1/2} with P from the optimizer's state.
        quantity: `sharpness`; `batch_sharpness`, the mean of g^T H g/|g|^2 over mini-batches, which is at 2/lr where
            mini-batch SGD is at its edge, with its 95 % interval; `trace`; `critical`, 2/(the smallest step along the
            update that raises the loss), from forward passes only.
        data: `batch`, those of the step; `fixed`, those of the first step measured; or a loader (any iterable of
            batches), of which each process of several takes its part. Of a whole data set: the loss's mean over rows.
        params: Only parameters whose names match one of these patterns (`encoder.*`); None is all that train.
        loss_fn: (module, batch) -> loss, where training_step cannot be called again (manual optimization). For
            `gauss_newton` (module, batch) -> (outputs, function of the outputs that gives the loss).
        dtype: `float32` or `float64` to measure in; None is the parameters' own, at least float32.
        mode: `as_is`, the module's present modes (dropout with one mask, batch norm with the batch's statistics), or
            `eval`.
        autocast: Measure under the trainer's precision, as training computes.
        differences: Take central differences of gradients instead of second derivatives, for losses that have none; the
            value is approximate.
        num_batches: Mini-batches to draw for the batch sharpness of an ensemble, and at most from a loader.
        max_products: Hessian-vector products a measurement may take.
        memory: Bytes of graphs to keep over several batches; beyond, they are computed again for every product.
        max_share: Say once where measuring takes more than this part of the time; None never.

    Raises:
        ValueError: If an argument is out of range, or the module cannot be measured so.

    Reference:
        cohen2021 (edge of stability); Cohen et al. 2022, arXiv 2207.14484 (preconditioned); arXiv 2412.20553 (batch
        sharpness); arXiv 2601.16979 (critical sharpness).
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        at: Any = None,
        k: int = 1,
        which: Literal["largest", "smallest", "both"] = "largest",
        tol: float = 1e-3,
        operator: Literal["hessian", "gauss_newton", "preconditioned"] = "hessian",
        quantity: Literal["sharpness", "batch_sharpness", "trace", "critical"] = "sharpness",
        data: Any = "batch",
        params: str | list[str] | None = None,
        loss_fn: Callable[[LightningModule, Any], Any] | None = None,
        dtype: Literal["float32", "float64"] | None = None,
        mode: Literal["as_is", "eval"] = "as_is",
        autocast: bool = False,
        differences: bool = False,
        num_batches: int = 32,
        max_products: int = 300,
        memory: float = 2**30,
        max_share: float | None = 0.25,
    ) -> None:
        super().__init__(every_n_steps, at)
        self.k = checks.integer("Sharpness.k", k, at_least=1)
        self.which = checks.one_of("Sharpness.which", which, ("largest", "smallest", "both"))
        self.tol = checks.positive("Sharpness.tol", tol)
        self.operator = checks.one_of("Sharpness.operator", operator, OPERATORS)
        self.quantity = checks.one_of("Sharpness.quantity", quantity, QUANTITIES)
        if operator != "hessian" and quantity in ("batch_sharpness", "critical"):
            raise ValueError(f"Sharpness.operator = {operator!r}: {quantity} has no choice of operator, leave it out")
        if isinstance(data, str):
            checks.one_of("Sharpness.data", data, ("batch", "fixed"))
        elif not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise ValueError(f"Sharpness.data = {checks.shown(data)}: must be batch, fixed or a loader")
        self.data = data
        self.params = [params] if isinstance(params, str) else params
        if loss_fn is not None and not callable(loss_fn):
            raise ValueError(f"Sharpness.loss_fn = {checks.shown(loss_fn)}: must be a function (module, batch) -> loss")
        self.loss_fn = loss_fn
        self.dtype = None if dtype is None else _DTYPES[checks.one_of("Sharpness.dtype", dtype, _DTYPES)]
        self.mode = checks.one_of("Sharpness.mode", mode, ("as_is", "eval"))
        self.autocast = checks.flag("Sharpness.autocast", autocast)
        self.differences = checks.flag("Sharpness.differences", differences)
        if self.differences and (operator == "gauss_newton" or quantity == "critical"):
            raise ValueError("Sharpness.differences: only Hessians are measured by differences of gradients")
        self.num_batches = checks.integer("Sharpness.num_batches", num_batches, at_least=1)
        self.max_products = checks.integer("Sharpness.max_products", max_products, at_least=1)
        self.memory = checks.number("Sharpness.memory", memory, at_least=0)
        self.max_share = None if max_share is None else checks.positive("Sharpness.max_share", max_share)
        self._optimizer: Any = None
        self._basis: Tensor | None = None
        self._guess: Tensor | None = None
        self._solves = 0
        self._window: list[tuple[Any, int]] = []
        self._window_step = -1
        self._fixed: list[tuple[Any, int]] = []
        self._before: list[Tensor] | None = None
        self._seconds, self._count, self._began = 0.0, 0, 0.0

    # What is measured -------------------------------------------------------------------------------------------------

    def names(self, model: LightningModule) -> tuple[str, ...]:
        """The variables this adds to the results; `effective_...` only where the optimizer's edge is known."""
        if self.quantity == "batch_sharpness":
            return ("batch_sharpness", "batch_sharpness_error", "effective_batch_sharpness")
        if self.quantity == "critical":
            return ("critical_sharpness", "effective_critical_sharpness")
        if self.quantity == "trace":
            return tuple(f"{_PREFIX[self.operator]}{name}" for name in ("trace", "trace_error"))
        own = (
            *self._value_names(),
            *(f"{_PREFIX[self.operator]}{name}" for name in ("sharpness_residual", "sharpness_products")),
        )
        known = self.which != "smallest" and self.operator != "gauss_newton"
        return (*own, "effective_sharpness") if known else own

    def defining(self, name: str) -> dict[str, Any]:
        """As `Measurement.defining`; an optimizer's edge is of one operator, whichever measurement asks for it."""
        found = super().defining(name)
        if name == "effective_sharpness":
            found.pop("operator", None)
        return found

    def _value_names(self) -> list[str]:
        places = ["", *(f"_{place}" for place in range(2, self.k + 1))]
        top, bottom = ([f"{_PREFIX[self.operator]}{end}{place}" for place in places]
                       for end in ("sharpness", "smallest_eigenvalue"))  # fmt: skip
        return {"largest": top, "smallest": bottom, "both": [*top, *bottom[::-1]]}[self.which]

    def check(self, model: LightningModule) -> None:
        """Raise ValueError where the module cannot be measured so."""
        if isinstance(model, LinearNetwork):
            given = {"data": not isinstance(self.data, str) or self.data != "batch", "loss_fn": self.loss_fn is not None,
                     "dtype": self.dtype is not None, "mode": self.mode != "as_is", "autocast": self.autocast}  # fmt: skip
            for name in (name for name, there in given.items() if there):
                raise ValueError(
                    f"Sharpness.{name}: a {type(model).__name__} is measured on its full training loss, in its own dtype"
                )
        else:
            strategy = type(model.trainer.strategy).__name__
            if strategy in _SHARDED:
                raise ValueError(f"Sharpness: the parameters are sharded by {strategy}: every process must hold all")
            if self.loss_fn is None and not model.automatic_optimization:
                raise ValueError(
                    "Sharpness.loss_fn: with manual optimization training_step takes the steps itself and cannot be "
                    "called to measure: give loss_fn, a function (module, batch) -> loss"
                )
            if self.loss_fn is None and self.operator == "gauss_newton":
                raise ValueError(
                    "Sharpness.loss_fn: gauss_newton needs a function (module, batch) -> (outputs, function of them)"
                )
        self._chosen(model)

    def _chosen(self, module: LightningModule) -> list[Tensor]:
        """The original parameters that are measured."""
        named = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        if self.params is not None:
            named = [(name, param) for name, param in named if any(fnmatch(name, pattern) for pattern in self.params)]
        if not named:
            asked = "" if self.params is None else f" matches {', '.join(self.params)}"
            raise ValueError(f"Sharpness.params: no parameter that trains{asked}")
        return [param for _, param in named]

    def measure(self, model: LightningModule, batch: Any) -> dict[str, Tensor]:
        """Curvature now.

        Args:
            model: The module.
            batch: The full training batch of a `LinearNetwork`; else the batches to measure on, each with its index.

        Returns:
            One value per member for each of `names`; `effective_...` only where the edge is known.
        """
        originals = self._chosen(model)
        with torch.autocast(model.device.type, enabled=False):
            if isinstance(model, LinearNetwork):
                values = self._values(EnsembleLoss(self, model, originals, batch))
            else:
                with sandbox(model, self._kind(model)) as copy_of:
                    if self.mode == "eval":
                        model.eval()
                    values = self._values(ModuleLoss(self, model, originals, batch, copy_of))
        return {name: torch.atleast_1d(value) for name, value in values.items()}

    def _kind(self, module: LightningModule) -> torch.dtype:
        kinds = {param.dtype for param in module.parameters() if param.is_floating_point()}
        return self.dtype or (torch.float64 if kinds == {torch.float64} else torch.float32)

    def _values(self, loss: "EnsembleLoss | ModuleLoss") -> dict[str, Tensor]:
        limits = Edge(math.nan) if loss.optimizer is None else edge(loss.optimizer, loss.originals)
        measured = {"sharpness": self._sharpness, "batch_sharpness": self._batch_sharpness, "trace": self._trace,
                    "critical": self._critical}[self.quantity]  # fmt: skip
        return measured(loss, limits)

    def _operator(self, loss: "EnsembleLoss | ModuleLoss", limits: Edge) -> Operator | None:
        """What is measured; None while the optimizer has no state to precondition by."""
        found = loss.gauss_newton() if self.operator == "gauss_newton" else loss.hessian()
        if self.operator != "preconditioned" or limits.preconditioner is None:
            return found
        if not limits.preconditioner:
            return None
        scale = found.flatten([part.to(found.dtype) for part in limits.preconditioner]).rsqrt()
        return Preconditioned(found, scale, torch.as_tensor(limits.shift).to(scale)[..., None])

    def _sharpness(self, loss: "EnsembleLoss | ModuleLoss", limits: Edge) -> dict[str, Tensor]:
        names, prefix = self._value_names(), _PREFIX[self.operator]
        operator = self._operator(loss, limits)
        if operator is None:
            missing = [*names, f"{prefix}sharpness_residual", f"{prefix}sharpness_products"]
            return dict.fromkeys(missing, torch.full((loss.num_members,), torch.nan))
        start = self._basis
        if start is not None and (start.ndim != len(operator.shape) or start.shape[-1] != operator.shape[-1]):
            start = None  # of other parameters
        found = eigenpairs(operator, self.k, self.which, self.tol, start, self.max_products, seed=self._solves)
        self._solves += 1
        self._basis = found.basis.cpu() if bool(found.basis.isfinite().all()) else None
        values = dict(zip(names, found.values.unbind(-1), strict=True))
        values[f"{prefix}sharpness_residual"] = found.bounds.amax(-1)
        values[f"{prefix}sharpness_products"] = torch.full_like(found.scale, found.num_products)
        if self.which == "smallest" or self.operator == "gauss_newton":
            return values
        if limits.preconditioner is None:
            return values | _effective("effective_sharpness", found.values[..., 0], limits)
        if self.operator == "preconditioned":  # its shift is in the operator
            return values | _effective("effective_sharpness", found.values[..., 0], Edge(limits.threshold))
        return values

    def _trace(self, loss: "EnsembleLoss | ModuleLoss", limits: Edge) -> dict[str, Tensor]:
        operator = self._operator(loss, limits)
        nothing = torch.full((loss.num_members,), torch.nan)
        found = Trace(nothing, nothing, 0) if operator is None else trace(operator, 60, seed=self._solves)
        self._solves += 1
        return {f"{_PREFIX[self.operator]}trace": found.value, f"{_PREFIX[self.operator]}trace_error": found.error}

    def _batch_sharpness(self, loss: "EnsembleLoss | ModuleLoss", limits: Edge) -> dict[str, Tensor]:
        found = batch_sharpness(loss.batch_hessians())
        values = {"batch_sharpness": found.value, "batch_sharpness_error": found.half_width}
        plain = limits.preconditioner is None
        return values | (_effective("effective_batch_sharpness", found.value, limits) if plain else {})

    def _critical(self, loss: "EnsembleLoss | ModuleLoss", limits: Edge) -> dict[str, Tensor]:
        along, lr = loss.along_the_update()
        found = critical_sharpness(along, lr if self._guess is None else self._guess.to(lr))
        self._guess = torch.where(found.step.isfinite() & (found.step > 0), found.step, lr).cpu()
        # The step is counted in lr, with momentum and preconditioner in the direction.
        value = {"critical_sharpness": found.value}
        return value | _effective("effective_critical_sharpness", found.value, Edge(2 / lr))

    # When -------------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure step 0 of an ensemble; begin to count time."""
        self._seconds, self._count, self._began = 0.0, 0, time.perf_counter()
        if isinstance(pl_module, LinearNetwork):
            self._optimizer = pl_module._optimizer
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the step's batches, which training_step may change."""
        step = trainer.global_step
        if isinstance(pl_module, LinearNetwork) or step not in self.schedule or step == self._last_step:
            return
        if step != self._window_step:
            self._window, self._window_step = [], step
        if self.data == "batch" or (self.data == "fixed" and not self._fixed):
            self._window.append((apply_to_collection(batch, Tensor, torch.clone), batch_idx))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Measure where the schedule says so, at the parameters the step starts from."""
        step = trainer.global_step
        if isinstance(pl_module, LinearNetwork) or step not in self.schedule or step == self._last_step:
            return
        if self.data == "fixed" and not self._fixed:
            self._fixed = self._window
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        if self.quantity == "critical":  # where the step leads to is known only once it is taken
            self._last_step = step
            self._before = [param.detach().clone() for param in self._chosen(pl_module)]
            return
        self._measure(trainer, pl_module, self._batches_of_step(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *rest: Any
    ) -> None:
        """Measure an ensemble, or along the step that was just taken."""
        if isinstance(pl_module, LinearNetwork):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, *rest)
        elif self._before is not None:
            self._measure(trainer, pl_module, self._batches_of_step(pl_module), at=self._last_step)
            self._before = None

    def _batches_of_step(self, module: LightningModule) -> Iterable[tuple[Any, int]]:
        if isinstance(self.data, str):
            return self._fixed if self.data == "fixed" else self._window
        return LoaderBatches(self.data, module, self.num_batches if self.quantity == "batch_sharpness" else None)

    def _measure(
        self, trainer: Trainer, module: LightningModule, batch: Any, final: bool = False, at: int | None = None
    ) -> None:
        began = time.perf_counter()
        super()._measure(trainer, module, batch, final, at)
        self._window = []
        seconds = time.perf_counter() - began
        for logger in trainer.loggers:
            logger.log_metrics({"curvature/seconds": seconds}, step=trainer.global_step if at is None else at)
        self._count += 1
        if self._count > 1:  # the first starts cold, and torch with it
            self._seconds += seconds
        passed = time.perf_counter() - self._began
        if self.max_share is None or isinstance(module, LinearNetwork) or passed < _PATIENCE:
            return
        if self._seconds > self.max_share * passed:
            rank_zero_warn(
                f"Sharpness: {self._count} measurements have taken {self._seconds:.0f} of {passed:.0f} seconds: measure "
                f"less often, on less data, or set max_share (now {self.max_share:g})"
            )
            self.max_share = None

    def state_dict(self) -> dict[str, Any]:
        """The last measured step, and the vectors the next measurement starts from."""
        return {**super().state_dict(), "basis": self._basis, "guess": self._guess, "solves": self._solves,
                "fixed": [list(pair) for pair in self._fixed]}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state_dict)
        self._basis, self._guess, self._solves = (state_dict[name] for name in ("basis", "guess", "solves"))
        self._fixed = [(batch, index) for batch, index in state_dict["fixed"]]


def _effective(name: str, value: Tensor, limits: Edge) -> dict[str, Tensor]:
    """2 x (value + shift)/threshold, where that is known."""
    threshold, shift = (torch.as_tensor(part, dtype=torch.float64).to(value.device)
                        for part in (limits.threshold, limits.shift))  # fmt: skip
    return {} if bool(threshold.isnan().all()) else {name: 2 * (value + shift) / threshold}


# Losses --------------------------------------------------------------------------------------------------------------


class EnsembleLoss:
    """The losses of a `LinearNetwork` on its full training batch, one per member.

    Args:
        options: What is to be measured.
        model: The network.
        originals: Its parameters.
        batch: Its full training batch.
    """

    def __init__(self, options: Sharpness, model: LinearNetwork, originals: list[Tensor], batch: Any) -> None:
        self.options, self.model, self.batch = options, model, batch
        self.originals, self.optimizer, self.num_members = originals, model._optimizer, model.num_members
        self.method = "finite_differences" if options.differences else "auto"

    def hessian(self) -> LossOperator:
        """Of the full loss."""
        return hessian(lambda: self.model.losses(self.batch), self.originals, method=self.method)

    def gauss_newton(self) -> LossOperator:
        """Of the squared error, halved."""

        def loss(outputs: Tensor) -> Tensor:
            squares = (outputs - self.batch.targets).square()
            return (squares if squares.ndim == 2 else squares.sum(-1)).mean(-1) / 2

        return gauss_newton(lambda: self.batch.predictions(self.model.predictor()), loss, self.originals)

    def batch_hessians(self) -> Iterator[LossOperator]:
        """Of mini-batches drawn as each member draws them, at steps that are never trained."""

        def losses(step: int) -> Tensor:
            found = torch.zeros(self.num_members, dtype=self.model.number_type, device=self.model.device)
            for batch in self.model.batches(step):
                found = found.index_copy(0, batch.members, self.model.losses(batch))
            return found

        first = _DRAWS_FROM + self.model.trainer.global_step * self.options.num_batches
        for step in range(first, first + self.options.num_batches):
            yield hessian(lambda step=step: losses(step), self.originals, method=self.method)

    def along_the_update(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The losses along minus the full gradient, and the step sizes."""
        with torch.enable_grad():
            directions = torch.autograd.grad(self.model.losses(self.batch).sum(), self.originals)
        places = [param.data for param in self.originals]

        def losses(eta: Tensor) -> Tensor:
            steps = [eta.to(at).reshape(-1, *[1] * (at.ndim - 1)) for at in places]
            with moved(self.originals, [at - step * d for at, step, d in zip(places, steps, directions, strict=True)]):
                return self.model.losses(self.batch)

        return losses, self.model.scheduled_lr.to(self.model.device)


class ModuleLoss:
    """The loss of any module, evaluated in its sandbox.

    Args:
        options: What is to be measured, and how.
        module: The module.
        originals: Its parameters outside of the sandbox.
        batches: Pairs of a batch and its index.
        copy_of: Maps an original parameter to its copy.
    """

    num_members = 1

    def __init__(
        self,
        options: Sharpness,
        module: LightningModule,
        originals: list[Tensor],
        batches: Iterable[tuple[Any, int]],
        copy_of: Callable[[Any], Any],
    ) -> None:
        self.options, self.module, self.batches = options, module, batches
        self.originals, self.optimizer = originals, options._optimizer
        self.copies = [copy_of(param) for param in originals]
        self.kind = options._kind(module)
        self.method = "finite_differences" if options.differences else "auto"

    def hessian(self) -> LossOperator:
        """Of the mean loss of all batches, on all processes."""
        return self._shared(lambda: hessian(self._loss, self.copies, self.batches, **self._settings()))

    def gauss_newton(self) -> LossOperator:
        """Likewise; `loss_fn` tells the outputs and the loss of them apart."""

        def build() -> LossOperator:
            split: list[Any] = []

            def outputs(pair: tuple[Any, int]) -> Tensor:
                found = self._call(pair)
                if not isinstance(found, tuple) or len(found) != 2 or not callable(found[1]):
                    raise ValueError(
                        "Sharpness.loss_fn: for gauss_newton it must return (outputs, function of the outputs), got "
                        f"{type(found).__name__}"
                    )
                split[:] = [found[1]]
                return found[0]

            settings = {name: value for name, value in self._settings().items() if name != "method"}
            return gauss_newton(outputs, lambda found, _: split[0](found), self.copies, self.batches, **settings)

        return self._shared(build)

    def batch_hessians(self) -> Iterator[LossOperator]:
        """Of the step's own batch, or of each of a loader's."""
        if isinstance(self.options.data, str):
            yield self.hessian()
            return
        settings = self._settings()
        with Passes(self.copies, self.batches, settings["rows"]).walk() as batches:
            for _, _, (pair,) in batches:  # the same on every process
                yield hessian(self._loss, self.copies, [pair], **settings)

    def along_the_update(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The mean loss along the step that was taken, per unit of lr, and lr."""
        lr = float(self.optimizer.param_groups[0].get("lr", 1.0))
        before = [param.to(self.kind) for param in self.options._before]
        directions = [(copy.detach() - at) / lr for copy, at in zip(self.copies, before, strict=True)]
        mean = mean_loss(self._loss, self.copies, self.batches, rows=self._settings()["rows"])

        def loss(eta: Tensor) -> Tensor:
            with moved(self.copies, [at + float(eta) * d for at, d in zip(before, directions, strict=True)]):
                value, weight = mean()
            if not _several():
                return value
            total = _summed(torch.stack([value * weight, torch.full_like(value, weight)]))
            return total[0] / total[1]

        return loss, torch.tensor(lr, dtype=torch.float64)

    def _settings(self) -> dict[str, Any]:
        return {"method": self.method, "memory": self.options.memory, "rows": lambda pair: num_rows(pair[0])}

    def _loss(self, pair: tuple[Any, int]) -> Tensor:
        found = self._call(pair)
        found = found["loss"] if isinstance(found, dict) else found
        if not isinstance(found, Tensor):
            name = "training_step" if self.options.loss_fn is None else "loss_fn"
            raise ValueError(f"Sharpness: {name} gave {type(found).__name__} where its loss was asked for")
        return found

    def _call(self, pair: tuple[Any, int]) -> Any:
        batch, index = pair
        batch = apply_to_collection(batch, Tensor, self._as_measured)
        precision = self.module.trainer.precision_plugin
        with precision.forward_context() if self.options.autocast else nullcontext():
            if self.options.loss_fn is not None:
                return self.options.loss_fn(self.module, batch)
            step = self.module.training_step
            return step(batch, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)

    def _as_measured(self, tensor: Tensor) -> Tensor:
        # A copy, which training_step may change, and which can be saved for a backward pass wherever it was made.
        return tensor.clone().to(self.kind) if tensor.is_floating_point() else tensor.clone()

    def _shared(self, build: Callable[[], LossOperator]) -> LossOperator:
        """The mean over processes; where one fails, all do, so that none waits for it."""
        if not _several():
            return build()
        failed = None
        try:
            operator = build()
        except Exception as error:
            failed = error
        device = self.copies[0].device
        if float(_summed(torch.tensor([0.0 if failed is None else 1.0], device=device))):
            raise failed or RuntimeError("Sharpness: another process could not measure, see its message")

        def agree(decision: bool) -> bool:
            found = torch.tensor([float(decision)], device=device)
            dist.broadcast(found, 0)
            return bool(found)

        return operator.share(_summed, agree)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


@contextmanager
def moved(params: list[Tensor], places: list[Tensor]) -> Iterator[None]:
    """Put parameters at other places for a while, without a trace on the tensors themselves."""
    saved = [param.data for param in params]
    try:
        for param, place in zip(params, places, strict=True):
            param.data = place
        yield
    finally:
        for param, at in zip(params, saved, strict=True):
            param.data = at


class LoaderBatches:
    """A loader's batches, each with its index, as training would get them; of several processes each has its part.

    Args:
        loader: The loader.
        module: The module, whose hooks move a batch to its device.
        most: At most so many, the same on every process.
    """

    def __init__(self, loader: Iterable, module: LightningModule, most: int | None) -> None:
        self.loader, self.module, self.most = loader, module, most
        self.generator = getattr(loader, "generator", None)
        sampled = isinstance(getattr(loader, "sampler", None), DistributedSampler)
        rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
        # Where there is not a batch for everyone, everyone takes all, which has the same mean.
        alone = sampled or most is not None or not hasattr(loader, "__len__") or len(loader) < size
        self._part = (0, most, 1) if alone else (rank, None, size)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        strategy, precision = self.module.trainer.strategy, self.module.trainer.precision_plugin
        for index, batch in islice(enumerate(self.loader), *self._part):
            yield strategy.batch_to_device(precision.convert_input(batch)), index
