"""PairOptimizer: what the optimizers of pairs of factors share.

A pair (u, v) of parameters stands for its product u*v, or, in the form `squares`, for (u^2 - v^2)/2. A subclass writes
`step`; it inherits the groups, their checks, and one value per pair for each quantity it exposes.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlnlab import checks

FORMS = ("product", "squares")


class PairOptimizer(Optimizer):
    """An optimizer whose parameters come in pairs of factors.

    Args:
        pairs: Pairs (u, v) of parameters of equal shape. A group `{"params": [u, v], "form": ...}` is a pair with a form
            of its own; a single parameter, or a group without `form`, belongs to no pair.
        defaults: What a group has unless it says otherwise.
        form: What a pair stands for unless its group says otherwise.

    Raises:
        ValueError: If a pair is none, or the form is unknown.
    """

    axes: tuple[str, ...] = ()
    """The arguments that may be axes of the ensemble: tensors with one entry per member."""

    carried: tuple[str, ...] = ("num_steps",)
    """Attributes that go with a copy; torch copies and pickles only what it knows of."""

    def __init__(self, pairs: Iterable, defaults: dict[str, Any], form: str) -> None:
        checks.one_of("form", form, FORMS)
        groups = [_as_group(entry, form) for entry in pairs]
        self.num_steps = 0
        super().__init__(groups, {**defaults, "form": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group; see `pairs` of the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["form"] is None:
            return
        checks.one_of("form", group["form"], FORMS)
        if len(group["params"]) != 2 or group["params"][0].shape != group["params"][1].shape:
            shapes = [tuple(parameter.shape) for parameter in group["params"]]
            raise ValueError(f"a pair of factors needs two parameters of one shape, got shapes {shapes}")
        self.state[group["params"][0]] = self.start(*self.rotated(group))

    def start(self, w_plus: Tensor, w_minus: Tensor) -> dict[str, Tensor]:
        """What is kept of a pair beside its parameters, before the first step."""
        raise NotImplementedError

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """The parameter groups that are pairs of factors."""
        return [group for group in self.param_groups if group["form"] is not None]

    @staticmethod
    def rotated(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A pair's w+, w-; in the form `squares` they share memory with the parameters."""
        u, v = (parameter.detach() for parameter in group["params"])
        return rotate(u, v) if group["form"] == "product" else (u, v)

    def of_pairs(self, quantity: Callable[[dict[str, Any]], Tensor], name: str) -> Any:
        """One value per pair of factors: the value itself where there is one pair, else a list."""
        values = [quantity(group) for group in self.pairs]
        if not values:
            raise AttributeError(f"{name} is not defined: no parameters were given as a pair of factors")
        return values[0] if len(values) == 1 else values

    @property
    def log_effective_init(self) -> Any:
        """Ln alpha_k, float64 of the factors' shape, which does not underflow; a list where there are several pairs."""
        return self.of_pairs(lambda group: self.mirror(group)[0], "log_effective_init")

    @property
    def mirror_shift(self) -> Any:
        """asinh(beta~_0/alpha_k^2), ln|w+(0)/w-(0)| included: the dual X^T nu is (ln|w+/w-| less this)/2; likewise."""
        return self.of_pairs(lambda group: self.mirror(group)[1], "mirror_shift")

    def mirror(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A pair's `log_effective_init` and `mirror_shift`."""
        raise NotImplementedError

    @property
    def imbalance(self) -> Any:
        """u^2 - v^2 = 2 w+ w- of the present factors, float64 of their shape; a list where there are several pairs."""

        def of(group: dict[str, Any]) -> Tensor:
            w_plus, w_minus = self.rotated(group)
            return 2 * w_plus.double() * w_minus.double()

        return self.of_pairs(of, "imbalance")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.carried}}

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the number of steps taken."""
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but what is kept in float64 beside float32 parameters stays so."""
        self.num_steps = state_dict["num_steps"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "num_steps"})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)


def log_start(plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """Ln alpha = ln|w+ w-|/2 and ln|w+/w-| of initial factors."""
    plus, minus = plus.abs().log(), minus.abs().log()
    return (plus + minus) / 2, plus - minus


def rotate(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(u + v)/sqrt2 and (u - v)/sqrt2, its own inverse."""
    return (u + v) * math.sqrt(0.5), (u - v) * math.sqrt(0.5)


def check_numbers(name: str, given: Any, low: float, positive: bool = False) -> None:
    """Raise ValueError unless a number, or one per member, is finite and at least `low` (or above it)."""
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} = {checks.shown(given)}: must be a number, or one per member") from None
    for i, value in enumerate(values.flatten().tolist()):
        if not (low <= value < math.inf) or (positive and value == low):
            where = name if values.ndim == 0 else f"{name}[{i}]"
            raise ValueError(f"{where} = {value}: must be {'positive' if positive else f'at least {low:g}'} and finite")


def per_member(value: Any, parameter: Tensor) -> Tensor:
    """A hyperparameter of each member (or of all), broadcastable with a parameter."""
    value = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
    return value if value.ndim == 0 else value.view(-1, *[1] * (parameter.ndim - 1))


def _as_group(entry: Any, form: str) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    if isinstance(entry, Tensor):
        return {"params": [entry]}
    return {"params": list(entry), "form": form}
