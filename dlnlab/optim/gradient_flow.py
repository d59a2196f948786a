"""GradientFlow: the continuous-time limit of gradient descent."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from scipy.integrate import DOP853
from torch import Tensor

from dlnlab import checks
from dlnlab.optim.base import PairOptimizer, check_numbers, log_start, per_member
from dlnlab.schedule import expand

_RULE = {name: torch.tensor(getattr(DOP853, name)) for name in ("A", "B", "E3", "E5")}
_STAGES, _ORDER = DOP853.n_stages, DOP853.error_estimator_order + 1


class GradientFlow(PairOptimizer):
    r"""Gradient flow: step k takes the parameters to time `times[k]`.

    .. math:: \dot\theta = -\nabla (L + \kappa |\theta|^2)

    The diagonal network's own flow is an ODE in n unknowns whose logarithms are integrated (LSODA; any initialisation
    scale, however stiff). For whatever else has gradients this takes Dormand and Prince's steps of order 8, with a step
    size for each member, which is slow where the flow is stiff.

    The flow is of the full loss: `batch_size: full`, no label noise. A fit ends with the last time; `max_steps` may end
    it earlier.

    Args:
        pairs: Parameters, or pairs of factors as `GainSGD` takes them.
        times: Times in any form of `ensemble`'s axes, `{log10: [-1, 4, 60]}`; ascending. Step 0 is time 0, which is put
            in front unless it is there.
        weight_decay: kappa, a number or a tensor (E,).
        tol: Local error of a step, relative to the largest of a member's parameters (the closed form: of the dual
            variable).
        form: What a pair stands for: `product` u*v, or `squares` (u^2 - v^2)/2.
        lr: Not used: a flow that starts from the end of an ensemble over `lr` may keep that axis, as a label.

    Raises:
        ValueError: If the times do not ascend, or a number is out of range.

    Reference:
        woodworth2020, even2023 (the flow of the diagonal network); its dual form: derived here.

    Example:
        >>> w = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
        >>> opt = GradientFlow([w], times=[1.0, 3.0])
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (w**2 / 2).sum()
        ...     loss.backward()
        ...     return loss.detach()
        >>> for _ in range(2):
        ...     opt.step(closure)
        >>> abs(w.item() / (2 * math.exp(-3.0)) - 1) < 1e-10
        True
    """

    axes = ("weight_decay", "lr")
    of_the_product = ("initial_plus", "initial_minus")
    carried = (*PairOptimizer.carried, "times", "tol", "loss_integral", "substeps")

    def __init__(
        self,
        pairs: Iterable,
        times: Any = {"log10": [-1, 4, 60]},  # noqa: B006 - never changed
        weight_decay: float = 0.0,
        tol: float = 1e-12,
        form: Literal["product", "squares"] = "product",
        lr: Any = None,
    ) -> None:
        del lr
        values = [checks.number(f"times[{i}]", time, at_least=0) for i, time in enumerate(expand(times, "times"))]
        for i, (before, after) in enumerate(itertools.pairwise(values), 1):
            if after <= before:
                raise ValueError(f"times[{i}] = {after:g}: must be later than the one before, {before:g}")
        self.times: list[float] = values if values[0] == 0 else [0.0, *values]
        if len(self.times) < 2:
            raise ValueError("times = [0]: must name a time after 0")
        self.tol = checks.positive("tol", tol)
        self.loss_integral: Tensor = torch.zeros(1, dtype=torch.float64)
        """Integral of the loss from time 0, (E,) once the first step is taken."""
        self.substeps: Tensor | None = None
        """The step size each member takes next, (E,)."""
        super().__init__(pairs, {"weight_decay": weight_decay}, form)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group; see `pairs` of the class."""
        super().add_param_group(param_group)
        check_numbers("weight_decay", self.param_groups[-1]["weight_decay"], 0.0)

    def start(self, w_plus: Tensor, w_minus: Tensor) -> dict[str, Tensor]:
        """The initial factors."""
        return {"initial_plus": w_plus.double().clone(), "initial_minus": w_minus.double().clone()}

    @property
    def max_steps(self) -> int:
        """Steps until the last time."""
        return len(self.times) - 1

    @property
    def time(self) -> float:
        """The present time."""
        return self.times[self.num_steps]

    @property
    def effective_init(self) -> Any:
        """The flow's alpha exp(-2 kappa t), alpha = sqrt|w+ w-| at time 0; a list where there are several pairs.

        NaN where the loss is no function of the pair's product.
        """
        return self.of_pairs(lambda group: torch.exp(self.mirror(group)[0]), "effective_init")

    def mirror(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A pair's `log_effective_init` and `mirror_shift`: those of the start, but for what weight decay does."""
        initial = self.state[group["params"][0]]
        log_alpha, shift = log_start(initial["initial_plus"], initial["initial_minus"])
        return log_alpha - 2 * self.time * per_member(group["weight_decay"], log_alpha), shift

    def step(self, closure: Callable[[], Tensor]) -> None:
        """Go to the next time.

        Args:
            closure: Clears the gradients, computes the loss, calls `backward` on its sum, and returns it: (E,) where the
                parameters have a leading axis of E members, each with its own step size, else a number.

        Raises:
            RuntimeError: If there is no next time, or the steps become too small for it.
        """
        if self.num_steps >= self.max_steps:
            raise RuntimeError(f"gradient flow has come to its last time, {self.times[-1]:g}")
        now, end = self.times[self.num_steps : self.num_steps + 2]
        with torch.no_grad():
            self._integrate(closure, now, end)
        self.num_steps += 1
        self.warn()

    # The generic integrator -------------------------------------------------------------------------------------------

    def _integrate(self, closure: Callable[[], Tensor], start: float, end: float) -> None:
        losses, velocity = self._evaluate(closure)
        members = len(losses)
        at = self._read(members)
        time = torch.full((members,), start, dtype=torch.float64, device=at.device)
        if self.substeps is None:
            self.loss_integral = torch.zeros_like(time)
            self.substeps = self._first_substeps(at, velocity)
        tol = max(self.tol, 50 * torch.finfo(self._dtype).eps)
        rule = {name: values.to(at.device) for name, values in _RULE.items()}
        slopes, heights = at.new_empty(_STAGES + 1, *at.shape), at.new_empty(_STAGES + 1, members)
        while bool((time < end).any()):
            h = torch.minimum(self.substeps, end - time)
            slopes[0], heights[0] = velocity, losses
            for stage in range(1, _STAGES + 1):
                weights = rule["A"][stage, :stage] if stage < _STAGES else rule["B"]
                trial = at + h[:, None] * torch.tensordot(weights, slopes[:stage], 1)
                self._write(trial)
                heights[stage], slopes[stage] = self._evaluate(closure)
            fine, coarse = (torch.tensordot(rule[name], slopes, 1).abs().amax(-1) for name in ("E5", "E3"))
            error = h * fine * (fine / torch.hypot(fine, 0.1 * coarse).clamp(min=1e-300))
            ratio = error / (tol * torch.maximum(at.abs(), trial.abs()).amax(-1))
            ratio = torch.where(h == 0, 0.0, torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf))
            good = ratio <= 1
            for group in self.pairs:  # the last gradients are those at the end of the step
                self.gradient(group, torch.where(good, h, 0.0))
            gained = h * (rule["B"] @ heights[:_STAGES])
            self.loss_integral = torch.where(good, self.loss_integral + gained, self.loss_integral)
            time = torch.where(good, torch.where(h == end - time, end, time + h), time)
            at = torch.where(good[:, None], trial, at)
            velocity = torch.where(good[:, None], slopes[-1], velocity)
            losses = torch.where(good, heights[-1], losses)
            factor = (0.9 * ratio.clamp(min=1e-20) ** (-1 / _ORDER)).clamp(0.2, 10.0)
            # A step that was cut short at a time asked for says little about how long the next may be.
            cut = good & (h < self.substeps)
            grown = torch.where(cut, torch.maximum(self.substeps, h * factor), h * factor)
            self.substeps = torch.where(h > 0, grown, self.substeps)
            if bool((time + 1e-3 * self.substeps == time)[time < end].any()):
                raise RuntimeError(f"gradient flow: steps below the precision of time {float(time.min()):g}")
        self._write(at)

    def _first_substeps(self, at: Tensor, velocity: Tensor) -> Tensor:
        speed = velocity.abs().amax(-1)
        size = at.abs().amax(-1)
        return torch.where(speed > 0, 1e-3 * size.clamp(min=1e-300) / speed.clamp(min=1e-300), 1.0)

    @property
    def _parameters(self) -> list[tuple[Tensor, Any]]:
        return [(p, group["weight_decay"]) for group in self.param_groups for p in group["params"]]

    @property
    def _dtype(self) -> torch.dtype:
        return self._parameters[0][0].dtype

    def _evaluate(self, closure: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Losses (E,) and the velocity (E, M) of all parameters in float64."""
        with torch.enable_grad():
            losses = torch.as_tensor(closure()).detach().double().reshape(-1)
        parts = []
        for parameter, kappa in self._parameters:
            slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append((-slope - 2 * per_member(kappa, parameter) * parameter).reshape(len(losses), -1).double())
        return losses, torch.cat(parts, dim=1)

    def _read(self, members: int) -> Tensor:
        return torch.cat([p.detach().reshape(members, -1).double() for p, _ in self._parameters], dim=1)

    def _write(self, values: Tensor) -> None:
        sizes = [p.numel() // len(values) for p, _ in self._parameters]
        for (parameter, _), part in zip(self._parameters, values.split(sizes, dim=1), strict=True):
            parameter.copy_(part.reshape(parameter.shape))

    # Copies -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the integral of the loss and the members' step sizes."""
        return {**super().state_dict(), "loss_integral": self.loss_integral, "substeps": self.substeps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.loss_integral, self.substeps = state_dict["loss_integral"], state_dict["substeps"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("loss_integral", "substeps")})
