"""PairOptimizer: what the optimizers of pairs of factors share.

A pair (u, v) of parameters stands for its product u*v, or, in the form `squares`, for (u^2 - v^2)/2. A subclass writes
`step`; it inherits the groups, their checks, and one value per pair for each quantity it exposes.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlnlab import checks

FORMS = ("product", "squares")

_ROUNDINGS = {64: 1024, 32: 16}
"""Units in the last place, of itself and of its factors, by which a step may be off the form g (v, u), by bits. Autograd
stays within 3 where sums over rows cancel, and within 0.3 otherwise (measured). float64 has room for losses whose terms
cancel a thousandfold; in float32 so much would hide a weak penalty."""


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

    carried: tuple[str, ...] = ("num_steps", "notice", "_warned")
    """Attributes that go with a copy; torch copies and pickles only what it knows of."""

    of_the_product: tuple[str, ...] = ()
    """Those of a pair's tensors that have no meaning unless the loss is a function of the product; then they are NaN."""

    def __init__(self, pairs: Iterable, defaults: dict[str, Any], form: str) -> None:
        checks.one_of("form", form, FORMS)
        groups = [_as_group(entry, form) for entry in pairs]
        self.num_steps = 0
        self.notice: str | None = None
        """What there is to say of pairs whose gain is not defined; said once, by the next step."""
        self._warned = False
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

    def gradient(self, group: dict[str, Any], lr: Any) -> Tensor:
        """The gradient g in a pair's product, after marking the pair as `undefined` where there is none.

        Where the loss is a function of the product, the gradients of u and v are g (v, u) (`squares`: those of w+ and w-
        are g (w+, -w-)) up to rounding. What is across that direction counts as rounding as long as a step along it
        would be lost in the factors, or in the step as a whole.

        Args:
            group: A pair.
            lr: The size of the step, a number or a tensor (E,).

        Returns:
            g, of the factors' shape; of gradients that are not of this form, what lies along it.
        """
        (u, v), squares = group["params"], group["form"] == "squares"
        grad_u, grad_v = (torch.zeros_like(p) if p.grad is None else p.grad for p in (u, v))
        largest = torch.maximum(u.abs(), v.abs())
        zero = largest == 0
        safe = torch.where(zero, 1, largest)  # divided out, so that u^2 + v^2 cannot underflow
        a, b = u / safe, v / safe
        apart, crossed = grad_u * a - grad_v * b, grad_u * b + grad_v * a
        along, across = (apart, crossed) if squares else (crossed, apart)
        limits = torch.finfo(u.dtype)
        rounding = (largest / per_member(lr, u)).add_(along.abs()).mul_(_ROUNDINGS.get(limits.bits, 16) * limits.eps)
        off = across.abs_() > rounding
        if bool(zero.any()):  # such factors have no gradient
            off |= zero & ((grad_u != 0) | (grad_v != 0))
        if bool(off.any()):
            self.undefine(group, off)
        return along / (safe * (a * a + b * b).clamp(min=0.5))

    def undefine(self, group: dict[str, Any], where: Tensor) -> None:
        """Mark a pair as one whose product the loss is no function of, from now on.

        Args:
            group: A pair.
            where: Boolean, of the factors' shape; each leading index (member) in which it holds anywhere is marked.
        """
        members = where if where.ndim < 2 else where.flatten(1).any(1)
        for name in self.of_the_product:
            self.state[group["params"][0]][name][members] = math.nan
        if self.notice is None:
            which = f" (leading indices {_listed(members)})" if members.ndim and not members.all() else ""
            form = "g (w+, -w-)" if group["form"] == "squares" else "g (v, u)"
            self.notice = (
                f"{type(self).__name__}: the gradients of a pair of factors{which} are not of the form {form}, so the loss "
                "is no function of the pair's product: its gain and effective initialisation are not defined and are NaN; "
                "its steps are those of plain gradient descent"
            )

    def undefined(self, group: dict[str, Any]) -> Tensor:
        """Where what is stated of a pair's product is not defined, boolean, of the factors' shape."""
        return self.state[group["params"][0]][self.of_the_product[0]].isnan()

    def warn(self) -> None:
        """Say once, at a step, what `undefine` has marked."""
        if self.notice is not None and not self._warned:
            self._warned = True
            warnings.warn(self.notice, stacklevel=5)  # past the wrappers that torch puts around `step`

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


def _listed(where: Tensor, most: int = 8) -> str:
    """The indices of a boolean vector's true entries."""
    found = torch.nonzero(where).squeeze(1).tolist()
    return ", ".join(map(str, found[:most])) + (f" and {len(found) - most} more" if len(found) > most else "")


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
    """A hyperparameter in the shape that an update of a parameter needs.

    Args:
        value: A number for all members, or one per member, (E,).
        parameter: A parameter, (E, ...).

    Returns:
        The value in the parameter's dtype and on its device, with as many trailing axes as it takes to broadcast.

    Example:
        >>> per_member([0.1, 0.2], torch.ones(2, 3)).shape
        torch.Size([2, 1])
    """
    value = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
    return value if value.ndim == 0 else value.view(-1, *[1] * (parameter.ndim - 1))


def _as_group(entry: Any, form: str) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    if isinstance(entry, Tensor):
        return {"params": [entry]}
    return {"params": list(entry), "form": form}
