"""GainSGD: gradient descent on pairs of factors that keeps the gain of every step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlnlab import checks
from dlnlab.kernels.factors import PERIOD, Factors

FORMS = ("product", "squares")


class GainSGD(Optimizer):
    r"""Gradient descent with one step size per member, accumulating the gain of every pair of factors.

    .. math:: \mathrm{Gain} = \sum_k q(\gamma g_k), \qquad q(x) = -\tfrac12 \ln (1 - x^2)^2

    where g is the gradient of the loss in the product of the factors. It is computed from the factors' own gradients,
    `g = (g_u v + g_v u)/(u^2 + v^2)` for u*v and `g = (g_+ w_+ - g_- w_-)/(w_+^2 + w_-^2)` for (w_+^2 - w_-^2)/2, so the
    optimizer works for any model whose parameters come in such pairs. With weight decay the argument of q is
    gamma g/(1 - 2 gamma kappa).

    The gain is a product of up to 32 factors at a time with an exact binary exponent (`dlnlab.kernels.factors`): its
    error is about 1e-16 sqrt(number of steps) absolute, at the edge of stability and beyond a gain of thousands too.
    A coordinate whose two factors both reach |w| < 1e-138 (float64) is held there; the gain goes on.

    Args:
        pairs: Pairs (u, v) of parameters of equal shape. A group `{"params": [u, v], "form": ...}` is a pair with a form
            of its own; a single parameter, or a group without `form`, is stepped without a gain.
        lr: Step size gamma, in units of parameter^2 per unit of loss: a number, or a tensor (E,) with one entry per
            leading index (member) of the parameters. Positive and finite.
        weight_decay: kappa of the penalty kappa |theta|^2, a number or a tensor (E,); 2 lr weight_decay must be below 1.
        form: What a pair stands for: `product` u*v, or `squares` (u^2 - v^2)/2.

    Raises:
        ValueError: If a step size or weight decay is out of range, or a pair is not one.

    Reference:
        even2023, Theorem 1 (gain, effective initialisation); the accumulation and weight decay: derived here.

    Example:
        The gain is how far the imbalance |u^2 - v^2| has shrunk:

        >>> u, v = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        >>> opt = GainSGD([(u, v)], lr=0.1)
        >>> for _ in range(5):
        ...     opt.zero_grad()
        ...     ((u * v - torch.tensor([1.0, -1.0, 0.0])) ** 2).sum().backward()
        ...     opt.step()
        >>> torch.allclose(opt.gain, -torch.log((u**2 - v**2).abs()).double(), atol=1e-5)
        True
    """

    axes = ("lr", "weight_decay")
    """The arguments that may be axes of the ensemble: tensors with one entry per member."""

    def __init__(
        self,
        pairs: Iterable,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        form: Literal["product", "squares"] = "product",
    ) -> None:
        checks.one_of("form", form, FORMS)
        groups = [_as_group(entry, form) for entry in pairs]
        self.num_steps = 0
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "form": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group; see `pairs` of the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name, low in (("lr", math.nextafter(0.0, 1.0)), ("weight_decay", 0.0)):
            try:
                values = torch.as_tensor(group[name], dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{name} = {checks.shown(group[name])}: must be a number, or one per member") from None
            for i, value in enumerate(values.flatten().tolist()):
                where = name if values.ndim == 0 else f"{name}[{i}]"
                if not (low <= value < math.inf):
                    raise ValueError(f"{where} = {value}: must be {'positive' if low else 'at least 0'} and finite")
        if bool((2 * torch.as_tensor(group["lr"]) * torch.as_tensor(group["weight_decay"]) >= 1).any()):
            raise ValueError("2 lr weight_decay must be below 1: the decay would overshoot zero in one step")
        if group["form"] is None:
            return
        checks.one_of("form", group["form"], FORMS)
        if len(group["params"]) != 2 or group["params"][0].shape != group["params"][1].shape:
            shapes = [tuple(parameter.shape) for parameter in group["params"]]
            raise ValueError(f"a pair of factors needs two parameters of one shape, got shapes {shapes}")
        u, v = (parameter.detach() for parameter in group["params"])
        factors = Factors.start(*(_rotate(u, v) if group["form"] == "product" else (u, v)))
        self.state[group["params"][0]] = {name: value for name, value in vars(factors).items() if name[:2] != "w_"}

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The parameter groups that are pairs of factors."""
        return [group for group in self.param_groups if group["form"] is not None]

    def factors(self, group: dict[str, Any]) -> Factors:
        """One pair's state; in the form `squares` it shares memory with the parameters."""
        u, v = (parameter.detach() for parameter in group["params"])
        if group["form"] == "product":
            u, v = _rotate(u, v)
        return Factors(u, v, **self.state[group["params"][0]])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of gradient descent.

        Args:
            closure: Re-evaluates the model and returns the loss, as for any torch optimizer.

        Returns:
            The closure's value, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.num_steps += 1
        for group in self.param_groups:
            if group["form"] is None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        lr, keep = _step_sizes(group, parameter)
                        parameter.sub_(lr * parameter.grad) if keep is None else parameter.mul_(keep).sub_(
                            lr * parameter.grad
                        )
            elif group["params"][0].grad is not None:
                self._step_pair(group)
        return loss

    def _step_pair(self, group: dict[str, Any]) -> None:
        u, v = group["params"]
        lr, keep = _step_sizes(group, u)
        largest = torch.maximum(u.abs(), v.abs())
        safe = torch.where(largest == 0, 1, largest)  # divided out, so that u^2 + v^2 cannot underflow
        a, b = u / safe, v / safe
        if group["form"] == "product":
            g = (u.grad * b + v.grad * a) / (safe * (a * a + b * b).clamp(min=0.5))
        else:
            g = (u.grad * a - v.grad * b) / (safe * (a * a + b * b).clamp(min=0.5))
        x = lr * g if keep is None else lr * g / keep
        factors = self.factors(group)
        if group["form"] == "squares":
            factors.multiply(x, keep)
        else:
            factors.accumulate(x, 1 - x, 1 + x, keep)
            new_u, new_v = u - x * v, v - x * u
            u.copy_(new_u if keep is None else keep * new_u)
            v.copy_(new_v if keep is None else keep * new_v)
        if self.num_steps % PERIOD == 0:
            if group["form"] == "product":
                factors = self.factors(group)
                held = factors.renormalise()
                back_u, back_v = _rotate(factors.w_plus, factors.w_minus)
                u.copy_(torch.where(held, back_u, u))
                v.copy_(torch.where(held, back_v, v))
            else:
                factors.renormalise()

    def _of_pairs(self, quantity: Callable[[Factors], Tensor], name: str) -> Any:
        values = [quantity(self.factors(group)) for group in self.pairs]
        if not values:
            raise AttributeError(f"{name} is not defined: no parameters were given as a pair of factors")
        return values[0] if len(values) == 1 else values

    @property
    def gain(self) -> Any:
        """Sum of q over the steps so far, float64 of the factors' shape; a list where there are several pairs."""
        return self._of_pairs(Factors.gain, "gain")

    @property
    def gain_plus(self) -> Any:
        """Sum of q+(x) = -2 x - ln (1 - x)^2, likewise."""
        return self._of_pairs(Factors.gain_plus, "gain_plus")

    @property
    def gain_minus(self) -> Any:
        """Sum of q-(x) = 2 x - ln (1 + x)^2, likewise."""
        return self._of_pairs(Factors.gain_minus, "gain_minus")

    @property
    def effective_init(self) -> Any:
        """alpha_k = alpha exp(-Gain/2), times the product of 1 - 2 lr weight_decay, likewise."""
        return self._of_pairs(Factors.effective_init, "effective_init")

    @property
    def imbalance(self) -> Any:
        """u^2 - v^2 = 2 w+ w- of the present factors, likewise."""
        return self._of_pairs(Factors.imbalance, "imbalance")

    @property
    def time(self) -> Any:
        """Steps times step size, a number or a tensor (E,)."""
        return self.num_steps * self.param_groups[0]["lr"]

    def __getstate__(self) -> dict[str, Any]:
        # Torch copies and pickles only what it knows of.
        return {**super().__getstate__(), "num_steps": self.num_steps}

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the number of steps taken."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but accumulators keep their float64 beside float32 parameters."""
        self.num_steps = state_dict["num_steps"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "num_steps"})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)


def _as_group(entry: Any, form: str) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    if isinstance(entry, Tensor):
        return {"params": [entry]}
    return {"params": list(entry), "form": form}


def _rotate(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(u + v)/sqrt2 and (u - v)/sqrt2, its own inverse."""
    return (u + v) * math.sqrt(0.5), (u - v) * math.sqrt(0.5)


def _step_sizes(group: dict[str, Any], parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Lr and 1 - 2 lr weight_decay (None without decay), broadcastable with the parameter."""
    lr, kappa = (_per_member(group[name], parameter) for name in ("lr", "weight_decay"))
    return lr, (1 - 2 * lr * kappa) if bool((kappa != 0).any()) else None


def _per_member(value: Any, parameter: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
    return value if value.ndim == 0 else value.view(-1, *[1] * (parameter.ndim - 1))
