"""GainSGD: gradient descent on pairs of factors that keeps the gain of every step."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from dlnlab.kernels.factors import PERIOD, Factors
from dlnlab.optim.base import PairOptimizer, check_numbers, per_member, rotate


class GainSGD(PairOptimizer):
    r"""Gradient descent with one step size per member, accumulating the gain of every pair of factors.

    .. math:: \mathrm{Gain} = \sum_k q(\gamma g_k), \qquad q(x) = -\tfrac12 \ln (1 - x^2)^2

    where g is the gradient of the loss in the product of the factors. It is computed from the factors' own gradients,
    `g = (g_u v + g_v u)/(u^2 + v^2)` for u*v and `g = (g_+ w_+ - g_- w_-)/(w_+^2 + w_-^2)` for (w_+^2 - w_-^2)/2, so the
    optimizer works for any model whose parameters come in such pairs. With weight decay the argument of q is
    gamma g/(1 - 2 gamma kappa).

    Every step is the plain step of gradient descent, whatever the loss. The gain is defined where the loss is a function
    of the product, so that the factors' gradients are g (v, u), or g (w_+, -w_-), up to rounding. For a pair (of each
    member) whose gradients are not, as under a penalty on one factor, it is not defined from that step on: the optimizer
    warns once, and the gains and `effective_init` are NaN.

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
    of_the_product = ("product_plus", "product_minus")

    def __init__(
        self,
        pairs: Iterable,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        form: Literal["product", "squares"] = "product",
    ) -> None:
        super().__init__(pairs, {"lr": lr, "weight_decay": weight_decay}, form)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group; see `pairs` of the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_numbers("lr", group["lr"], 0.0, positive=True)
        check_numbers("weight_decay", group["weight_decay"], 0.0)
        if bool((2 * torch.as_tensor(group["lr"]) * torch.as_tensor(group["weight_decay"]) >= 1).any()):
            raise ValueError("2 lr weight_decay must be below 1: the decay would overshoot zero in one step")

    def start(self, w_plus: Tensor, w_minus: Tensor) -> dict[str, Tensor]:
        """No factor has been multiplied yet."""
        return {name: value for name, value in vars(Factors.start(w_plus, w_minus)).items() if name[:2] != "w_"}

    def factors(self, group: dict[str, Any]) -> Factors:
        """One pair's state; in the form `squares` it shares memory with the parameters."""
        return Factors(*self.rotated(group), **self.state[group["params"][0]])

    def mirror(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A pair's `log_effective_init` and `mirror_shift`."""
        factors = self.factors(group)
        return factors.log_effective_init(), factors.mirror_shift()

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
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["form"] is None or len(with_gradient) == 1:  # of a pair, where one factor does not move
                for parameter in with_gradient:
                    parameter.copy_(_descended(parameter, *_step_sizes(group, parameter)))
                if group["form"] is not None:
                    self.undefine(group, torch.ones_like(group["params"][0], dtype=torch.bool))
            elif with_gradient:
                self._step_pair(group)
        self.warn()
        return loss

    def _step_pair(self, group: dict[str, Any]) -> None:
        u, v = group["params"]
        lr, keep = _step_sizes(group, u)
        g = self.gradient(group, group["lr"])
        undefined, plain = self.undefined(group), None
        if bool(undefined.any()):
            plain = [_descended(parameter, lr, keep) for parameter in (u, v)]
        x = lr * g if keep is None else lr * g / keep
        factors = self.factors(group)
        if group["form"] == "squares":
            factors.multiply(x, keep)
        else:
            factors.accumulate(x, 1 - x, 1 + x, keep)
            new_u, new_v = u - x * v, v - x * u
            u.copy_(new_u if keep is None else keep * new_u)
            v.copy_(new_v if keep is None else keep * new_v)
        if plain is not None:
            for parameter, value in zip((u, v), plain, strict=True):
                parameter.copy_(torch.where(undefined, value, parameter))
        if self.num_steps % PERIOD == 0:
            if group["form"] == "product":
                factors = self.factors(group)
                held = factors.renormalise()
                back_u, back_v = rotate(factors.w_plus, factors.w_minus)
                u.copy_(torch.where(held, back_u, u))
                v.copy_(torch.where(held, back_v, v))
            else:
                factors.renormalise()

    def _of_factors(self, quantity: Callable[[Factors], Tensor], name: str) -> Any:
        return self.of_pairs(lambda group: quantity(self.factors(group)), name)

    @property
    def gain(self) -> Any:
        """Sum of q over the steps so far, float64 of the factors' shape; a list where there are several pairs."""
        return self._of_factors(Factors.gain, "gain")

    @property
    def gain_plus(self) -> Any:
        """Sum of q+(x) = -2 x - ln (1 - x)^2, likewise."""
        return self._of_factors(Factors.gain_plus, "gain_plus")

    @property
    def gain_minus(self) -> Any:
        """Sum of q-(x) = 2 x - ln (1 + x)^2, likewise."""
        return self._of_factors(Factors.gain_minus, "gain_minus")

    @property
    def effective_init(self) -> Any:
        """alpha_k = alpha exp(-Gain/2), times the product of 1 - 2 lr weight_decay, likewise."""
        return self._of_factors(Factors.effective_init, "effective_init")

    @property
    def imbalance_error(self) -> Any:
        """Largest |ln|w+ w-| - ln alpha_k^2| over coordinates, (E,): rounding; a list where there are several pairs."""
        return self._of_factors(Factors.imbalance_error, "imbalance_error")

    @property
    def mirror_error(self) -> Any:
        """Largest error of the mirror form ln|w+/w-| = 2 theta_k, likewise."""
        return self._of_factors(Factors.mirror_error, "mirror_error")

    @property
    def gain_sandwich_error(self) -> Any:
        """By how much sum |x|^2 <= |Gain|_1 <= 2 sum |x|^2 fails, likewise; NaN once a step had |x| > 0.8926."""
        return self._of_factors(Factors.gain_sandwich_error, "gain_sandwich_error")

    @property
    def time(self) -> Any:
        """Steps times step size, a number or a tensor (E,)."""
        return self.num_steps * self.param_groups[0]["lr"]


def _descended(parameter: Tensor, lr: Tensor, keep: Tensor | None) -> Tensor:
    """A parameter after a plain step of gradient descent."""
    return (parameter if keep is None else keep * parameter) - lr * parameter.grad


def _step_sizes(group: dict[str, Any], parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    """Lr and 1 - 2 lr weight_decay (None without decay), broadcastable with the parameter."""
    lr, kappa = (per_member(group[name], parameter) for name in ("lr", "weight_decay"))
    return lr, (1 - 2 * lr * kappa) if bool((kappa != 0).any()) else None
