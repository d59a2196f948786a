"""The diagonal linear network, x -> <u*v, x>."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from dlnlab import checks, kernels, theory
from dlnlab.kernels import DualFlow, Factors, diagonal_steps
from dlnlab.models.base import SCHEDULED, Guard, LinearNetwork, stack_records
from dlnlab.models.batch import Batch, Layout
from dlnlab.optim import GainSGD, GradientFlow, StochasticGradientFlow


class DiagonalLinearNetwork(LinearNetwork):
    r"""The diagonal linear network beta = u*v.

    .. math:: \beta = u \odot v = (w_+^2 - w_-^2)/2, \qquad w_\pm = (u \pm v)/\sqrt2, \qquad w_\pm(0) = \alpha

    The parameters are `w_plus`, `w_minus` (E, D): a rotation of (u, v), so paths and Hessian spectrum are the same, but
    the imbalance u^2 - v^2 = 2 w+ w- does not cancel when the gain is large. u(0) = sqrt2 alpha, v(0) = 0, beta(0) = 0.

    Args:
        init_scale: alpha: a positive number, or one per feature (D,). May be an axis (numbers).
        init_on_support: Multiplies alpha on the support of the data's teacher: what an effective initialisation of that
            shape does, made by hand. May be an axis.
        dim: D; None takes the data's.
        start_at: What is taken of a run this one starts from: its `parameters`, or its `effective_init` alone, that is
            w+ = w- = sqrt|w+ w-| and beta = 0.
        **kwargs: Those of `LinearNetwork`.

    Raises:
        ValueError: If init_scale is not positive and finite, or does not fit dim.

    Reference:
        even2023, section 2 (u, v and their initialisation); the rotated state: derived here.
    """

    axes: ClassVar[tuple[str, ...]] = (*LinearNetwork.axes, "init_scale", "init_on_support")
    closed_form_optimizers: ClassVar = (GainSGD, GradientFlow, StochasticGradientFlow)

    def __init__(
        self,
        init_scale: float | list[float] = 0.1,
        dim: int | None = None,
        init_on_support: float = 1.0,
        start_at: Literal["parameters", "effective_init"] = "parameters",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.start_at = checks.one_of("start_at", start_at, ("parameters", "effective_init"))
        self.init_scale, self.init_on_support = init_scale, init_on_support
        if dim is not None:
            checks.integer("dim", dim, at_least=1)
        for value in self.per_member("init_scale"):
            for entry in value if isinstance(value, list | tuple) else [value]:
                checks.positive("init_scale", entry)
        for value in self.per_member("init_on_support"):
            checks.positive("init_on_support", value)
        self._kernel: Any = None
        self._flow: DualFlow | None = None
        if dim is not None:
            self.build(dim, None)

    def build(self, num_features: int, num_outputs: int | None) -> None:
        """w+ = w- = alpha."""
        if num_outputs is not None:
            raise ValueError(
                f"DiagonalLinearNetwork predicts one number, the data ask for {num_outputs}; use DeepLinearNetwork"
            )
        scales = torch.tensor(self.per_member("init_scale"), dtype=self.number_type)
        if scales.ndim == 1:
            scales = scales[:, None]
        if scales.shape[1] not in (1, num_features):
            raise ValueError(
                f"init_scale has {scales.shape[1]} entries: must be one number or {num_features}, one per feature"
            )
        scales = scales.expand(-1, num_features)
        factors = self.per_member("init_on_support")
        if set(factors) != {1.0}:
            support = self._support()
            factors = torch.tensor(factors, dtype=self.number_type)[:, None]
            scales = torch.where(support.cpu(), scales * factors, scales)
        self.w_plus = Parameter(scales.clone())
        self.w_minus = Parameter(scales.clone())

    def _support(self) -> Tensor:
        """Where the teacher of each member's problem is not zero, boolean (E, D)."""
        if self.problems is None:
            raise ValueError("init_on_support: the support is the data's; leave dim to them")
        if self.problems.teacher is None:
            raise ValueError("init_on_support: the data have no teacher; it must be 1")
        return self.problems.teacher[self.problem_index] != 0

    def numbers_per_member(self, num_features: int, num_outputs: int | None) -> int:
        """w+ and w-."""
        return 2 * num_features

    def predictor(self) -> Tensor:
        """beta, (E, D)."""
        return (self.w_plus.square() - self.w_minus.square()) / 2

    @property
    def u(self) -> Tensor:
        """(w+ + w-)/sqrt2, (E, D)."""
        return (self.w_plus + self.w_minus) * 0.5**0.5

    @property
    def v(self) -> Tensor:
        """(w+ - w-)/sqrt2, (E, D)."""
        return (self.w_plus - self.w_minus) * 0.5**0.5

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One pair of factors."""
        return [{"params": [self.w_plus, self.w_minus], "form": "squares"}]

    def unit_of_lr(self) -> Tensor:
        """See `LinearNetwork.unit_of_lr`."""
        if self.lr_unit not in ("flow_edge", "mean_square_edge"):
            return super().unit_of_lr()
        if (reason := self.squared_loss_refusal() or self.product_refusal()) is not None:
            raise ValueError(
                f"lr_unit = {self.lr_unit}: is of the squared loss and beta = u*v, but {reason}; use one or max_row"
            )
        # As the members begin; those that agree in all that the edge depends on share it.
        names = ["problem", "init", "on_support"]
        if self.lr_unit == "mean_square_edge":
            names += ["batch_size", "sampling"]
        columns = {
            "problem": self.problem_index.tolist(),
            "init": [
                tuple(value) if isinstance(value, list | tuple) else value for value in self.per_member("init_scale")
            ],
            "on_support": self.per_member("init_on_support"),
            "batch_size": self.per_member("batch_size"),
            "sampling": self.per_member("sampling"),
        }
        kinds = list(zip(*(columns[name] for name in names), strict=True))
        edges: dict[Any, Tensor] = {}
        for batches in dict.fromkeys(kind[3:] for kind in kinds):
            alike = list(dict.fromkeys(kind for kind in kinds if kind[3:] == batches))
            x, y = (tensor[[kind[0] for kind in alike]] for tensor in (self.problems.x, self.problems.y))
            scale = torch.tensor([kind[1] for kind in alike], dtype=torch.float64, device=x.device)
            scale = scale if scale.ndim == 2 else scale[:, None]
            scale = scale.expand(-1, x.shape[-1])
            factors = [kind[2] for kind in alike]
            if set(factors) != {1.0}:
                support = self.problems.teacher[[kind[0] for kind in alike]] != 0
                factors = torch.tensor(factors, dtype=torch.float64, device=x.device)[:, None]
                scale = torch.where(support, scale * factors, scale)
            if not batches or batches[0] == "full":
                found = theory.flow_edge(x, y, scale)
            else:
                found = theory.mean_square_edge(x, y, scale, *batches)
            edges |= dict(zip(alike, found, strict=True))
        return torch.stack([edges[kind] for kind in kinds]).to(self.number_type)

    @property
    def kernel(self) -> Any:
        """The compiled kernel of the model's device, or a line saying why it has none."""
        if self._kernel is None:
            self._kernel = kernels.diagonal_kernel(self.problems.x, self.problems.y)
        return self._kernel

    def start_from(self, parameters: dict[str, Tensor]) -> None:
        """See `LinearNetwork.start_from`, and `start_at`."""
        if self.start_at == "effective_init":
            # The root of each: the product of the two may be below the range of numbers.
            alpha = parameters["w_plus"].abs().sqrt() * parameters["w_minus"].abs().sqrt()
            parameters = {**parameters, "w_plus": alpha, "w_minus": alpha}
        super().start_from(parameters)

    def product_refusal(self) -> str | None:
        """See `LinearNetwork.product_refusal`."""
        return self.changed_since(DiagonalLinearNetwork, ("predictor", "parameter_groups"))

    def closed_form_refusal(self) -> str | None:
        """As `LinearNetwork.closed_form_refusal`; a flow with weight decay has none."""
        if isinstance(self._optimizer, GradientFlow):
            kappa = torch.as_tensor(self._optimizer.param_groups[0]["weight_decay"])
            if bool((kappa != 0).any()):
                return "gradient flow with weight decay is no flow of the dual"
        return super().closed_form_refusal()

    @property
    def path(self) -> str:
        """How this model is advanced, and why."""
        path = super().path
        stepwise = self.closed_form_refusal() is None and isinstance(self._optimizer, GainSGD)
        refusal = self.kernel_refusal() if stepwise else None
        return path if refusal is None else f"{path}, in torch: {refusal}"

    def kernel_refusal(self) -> str | None:
        """Why the closed form runs in torch and not in the device's kernel, or None if it does not."""
        if isinstance(self.kernel, str):
            return self.kernel
        if type(self).variables is not LinearNetwork.variables:
            return f"{type(self).__name__} has its own variables, which the kernel does not record"
        return None

    def restart(self) -> None:
        """See `LinearNetwork.restart`; the data may be others."""
        super().restart()
        self._kernel = self._flow = None

    def advance_closed_form(
        self, k: int, record_steps: list[int], variables: tuple[str, ...], guard: Guard | None
    ) -> tuple[int, dict[str, Tensor]]:
        """Steps in w+, w- without autograd; see `LinearNetwork.advance_closed_form`."""
        if isinstance(self._optimizer, GainSGD):
            if self.kernel_refusal() is None and len(self.running):
                return self._advance_compiled(k, record_steps, variables, guard)
            advance = self._advance_members
        else:
            advance = self._follow_flow if isinstance(self._optimizer, GradientFlow) else self._diffuse
        start = step = self._optimizer.num_steps
        end, records, due = start + k, [], set(record_steps)
        running = self.running
        while step < end:
            stop = min([end, *(s for s in record_steps if s > step)])
            if guard is not None:
                stop = min(stop, step - step % guard.every_n_steps + guard.every_n_steps)
            if len(running):
                advance(running, step, stop)
                self._optimizer.num_steps = stop
            step = stop
            self._arrive(step)
            if guard is not None and step % guard.every_n_steps == 0:
                self.check_members(step)
                running = self.running
            if step in due:
                records.append(self.measure(variables))
            if len(running) == 0:
                break
        return step - start, stack_records(records)

    # The compiled kernel ----------------------------------------------------------------------------------------------

    def _advance_compiled(
        self, k: int, record_steps: list[int], variables: tuple[str, ...], guard: Guard | None
    ) -> tuple[int, dict[str, Tensor]]:
        """The same in one call of the device's kernel, guard and records included."""
        optimizer = self._optimizer
        group, start = optimizer.pairs[0], optimizer.num_steps
        lr, kappa = self.unscheduled("lr"), self.unscheduled("weight_decay")
        rule = None
        if guard is not None:
            self.begin(start)
            kept = {name.rpartition(".")[2]: value for name, value in self._kept.items()}
            rule = kernels.Guard(
                self.guard_tol, self.loss_bound, guard.every_n_steps, Factors(**kept), self.diverged_by
            )
        factors = optimizer.factors(group)
        everything = not _PREDICTOR_ONLY.issuperset(variables)
        row = (10 if everything else 2) * 8 * self.w_plus.numel()
        if len(record_steps) > (most := max(1, _RECORD_BYTES // row)):  # so that memory stays bounded
            record_steps = record_steps[:most]
            k = record_steps[-1] - start
        records = kernels.Records.allocate(record_steps, factors, everything)
        taken = self.kernel.advance(
            factors, lr, 1 - 2 * lr * kappa if bool((kappa != 0).any()) else None, self.problem_index, self._batches, start,
            start + k, self.status, self.stopped_at, rule, records, num_threads=kernels.num_threads(),
            rates=self.rates(start, start + k),
        )  # fmt: skip
        optimizer.num_steps += taken
        reached = sum(step <= start + taken for step in record_steps)
        values = self._recorded(records, reached, variables, lr)
        self._arrive(start + taken)
        return taken, values

    def _recorded(self, records: Any, reached: int, variables: tuple[str, ...], lr: Tensor) -> dict[str, Tensor]:
        """The kernel's records of the steps it has reached -> variables (T, E, ...)."""
        w_plus, w_minus = records.w_plus[:reached], records.w_minus[:reached]
        beta = (w_plus.square() - w_minus.square()) / 2
        if records.factors is not None:
            now = self._optimizer.factors(self._optimizer.pairs[0])
            factors = records.factors.map(lambda tensor: tensor[:reached])
            factors = replace(factors, initial_plus=now.initial_plus, initial_minus=now.initial_minus)
        values = {"status": records.status[:reached]}
        said = self._at_steps(records.steps[:reached].tolist()) if self.programme else {}
        for name in variables:
            if name in said:
                values[name] = said[name]
            elif name == "beta":
                values[name] = beta
            elif name == "train_loss":
                values[name] = records.train_loss[:reached]
            elif name == "time":
                values[name] = records.steps[:reached, None] * lr.double()
            elif name == "teacher":
                values[name] = self.problems.teacher[self.problem_index].expand(reached, -1, -1)
            elif name == "distance":
                values[name] = (beta - self.problems.teacher[self.problem_index]).square().sum(-1)
            elif name == "test_loss":
                batch = self.full_batch(test=True)
                rows = [batch.losses(row) for row in beta]
                values[name] = torch.stack(rows) if rows else beta[..., 0]
            else:
                values[name] = _OF_FACTORS[name](factors)
        return values

    # The reference ----------------------------------------------------------------------------------------------------

    def _advance_members(self, members: Tensor, start: int, stop: int) -> None:
        """Take the steps start, ..., stop - 1 with the given members; the others stay as they are."""
        optimizer = self._optimizer
        group = optimizer.pairs[0]
        whole, rates = optimizer.factors(group), self.rates(start, stop)
        for size, sampling, everyone in self._kinds:
            chosen = everyone[torch.isin(everyone, members)]
            if len(chosen) == 0:
                continue
            if size == "full":
                layout = Layout(self.problem_index[chosen])
                places, gradient = chosen[layout.slots], self._full_gradient(chosen, layout)
            else:
                layout, places, gradient = None, chosen, self._mini_gradient(chosen, size, sampling)
            state = whole.map(lambda tensor: tensor[places])  # noqa: B023 - used at once
            if rates is None:
                lr = _spread(group["lr"], places, self.number_type)
                kappa = _spread(group["weight_decay"], places, self.number_type)
                decay = 1 - 2 * lr * kappa if bool((kappa != 0).any()) else None
                diagonal_steps(state, lr, decay, gradient, start, stop)
            else:
                for step in range(start, stop):
                    lr, decay = (value[places][..., None] for value in rates.at(step, self.number_type))
                    diagonal_steps(state, lr, decay, gradient, step, step + 1)
            for target, source in zip(vars(whole).values(), vars(state).values(), strict=True):
                target[chosen] = source if layout is None else layout.collect(source)

    def _follow_flow(self, members: Tensor, start: int, stop: int) -> None:
        """Go from time `start` to time `stop` of a gradient flow's times with the given members."""
        optimizer = self._optimizer
        if self._flow is None:  # the first time, or after a resume
            initial = optimizer.state[self.w_plus]
            factors = initial["initial_plus"], initial["initial_minus"]
            problems = self.problems.x, self.problems.y, self.problem_index
            self._flow = DualFlow(*problems, *factors, optimizer.times[-1], optimizer.tol)
        plus, minus, integral = self._flow.at(members, optimizer.times[stop])
        self.w_plus[members], self.w_minus[members] = plus.to(self.number_type), minus.to(self.number_type)
        integrals = optimizer.loss_integral.to(self.device).expand(self.num_members).clone()
        integrals[members] = integral
        optimizer.loss_integral = integrals

    def _diffuse(self, members: Tensor, start: int, stop: int) -> None:
        """Take the steps start, ..., stop - 1 of a stochastic gradient flow with the given members."""
        optimizer = self._optimizer
        whole = optimizer.diffusion(optimizer.pairs[0])
        layout = Layout(self.problem_index[members])
        places = members[layout.slots]
        x, y = self.problems.x[layout.problems], self.problems.y[layout.problems][:, None]
        state = whole.map(lambda tensor: tensor[places])
        lr = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=self.number_type, device=self.device)
        lr = lr.expand(self.num_members)[places]
        for step in range(start, stop):
            residual = ((state.w_plus.square() - state.w_minus.square()) / 2) @ x.mT - y
            normals = optimizer.normals(step, y.shape[-1])[places].to(self.number_type)
            state.step(x, residual, normals, lr, optimizer.dt * lr, optimizer.noise, optimizer.scheme)
        for target, source in zip(vars(whole).values(), vars(state).values(), strict=True):
            target[members] = layout.collect(source)

    def _full_gradient(self, members: Tensor, layout: Layout) -> Any:
        """(beta, step) -> gradient of the full loss, (P', M, D): each problem's x enters two matrix products."""
        x, y = self.problems.x[layout.problems], self.problems.y[layout.problems][:, None]
        scaled, n = x / x.shape[1], x.shape[1]

        def gradient(beta: Tensor, step: int) -> Tensor:
            residual = (beta @ x.mT).sub_(y)  # (P', M, N)
            noise = self.label_noise_at(step, members, n)
            if noise is not None:
                residual -= layout.spread(noise)
            return residual @ scaled

        return gradient

    def _mini_gradient(self, members: Tensor, size: int, sampling: str) -> Any:
        """(beta, step) -> gradient of the mini-batch loss, (G, D)."""
        problem = self.problem_index[members]

        def gradient(beta: Tensor, step: int) -> Tensor:
            rows = self.sampled_rows(size, sampling, members, step)
            x, y = self.problems.x[problem[:, None], rows], self.problems.y[problem[:, None], rows]  # (G, B, D), (G, B)
            noise = self.label_noise_at(step, members, size)
            if size == 1:
                x, y = x[:, 0], y[:, 0]
                residual = (x * beta).sum(-1).sub_(y)
                if noise is not None:
                    residual -= noise[:, 0]
                return x * residual[:, None]
            residual = Batch(x, y, members, None, noise).predictions(beta) - (y if noise is None else y + noise)
            return (residual[:, None] @ x).squeeze(1) / size

        return gradient


_RECORD_BYTES = 64 * 2**20
"""What the kernel may write between two looks of the recorder."""
_PREDICTOR_ONLY = {"train_loss", "test_loss", "distance", "beta", "teacher", "time", *SCHEDULED}
_OF_FACTORS = {
    "gain": Factors.gain,
    "gain_plus": Factors.gain_plus,
    "gain_minus": Factors.gain_minus,
    "effective_init": Factors.effective_init,
    "imbalance": Factors.imbalance,
    "imbalance_error": Factors.imbalance_error,
    "mirror_error": Factors.mirror_error,
    "gain_sandwich_error": Factors.gain_sandwich_error,
}


def _spread(value: Any, places: Tensor, dtype: torch.dtype) -> Tensor:
    """A hyperparameter of each member (or of all) at the members' places, with a trailing axis for coordinates."""
    value = torch.as_tensor(value, dtype=dtype, device=places.device)
    return value if value.ndim == 0 else value[places][..., None]
