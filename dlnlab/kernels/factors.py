"""The state of a pair of factors under gradient descent, and the gain kept with it.

A pair u, v is carried as w+ = (u + v)/sqrt2, w- = (u - v)/sqrt2. One step of gradient descent with x = lr g/(1 - c) and
the decay c = 2 lr weight_decay multiplies them,

    w+ <- (1 - c)(1 - x) w+,    w- <- (1 - c)(1 + x) w-,

so everything the theory asks for is a product over steps. The products of (1 - x) and (1 + x) are accumulated as they
are and brought back to [1/2, 1) every `PERIOD` steps, the powers of two going into an integer exponent: this is exact,
and costs no logarithm a step. After T steps the gain's error is about 1e-16 sqrt(T) absolute; it stays so where |x| is
near 1 and when the gain passes thousands, long after w- itself has left the range of floating point.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dlnlab.theory.gain import QUADRATIC

PERIOD = 32
"""Products are renormalised at absolute steps divisible by this, so that no result depends on chunks."""


def floors(dtype: torch.dtype) -> tuple[float, float]:
    """The least magnitude of a factor, and the one below which it is set from its product.

    No factor crosses the distance between the two within one period.
    """
    limits = torch.finfo(dtype)
    floor = limits.tiny**0.45
    return floor, floor * (2.0**64 if limits.bits == 64 else 2.0**24)


@dataclass
class Factors:
    """w+, w- and what their steps have accumulated; tensors of the factors' shape (..., D), or (...) where it says so.

    `w_plus`, `w_minus` are in the network's dtype; all else is float64 (exponents int64), because a float32 product is
    wrong where x is near 1.
    """

    w_plus: Tensor
    w_minus: Tensor
    product_plus: Tensor  # of 1 - x, divided by 2^exponent_plus
    product_minus: Tensor  # of 1 + x, divided by 2^exponent_minus
    exponent_plus: Tensor
    exponent_minus: Tensor
    step_sum: Tensor  # of x
    log_decay: Tensor  # of ln(1 - c)
    initial_plus: Tensor  # w+ before the first step
    initial_minus: Tensor
    square_sum: Tensor  # of |x|^2, (...)
    largest_step: Tensor  # of |x_j| over steps and coordinates, (...)

    @classmethod
    def start(cls, w_plus: Tensor, w_minus: Tensor) -> "Factors":
        """The state before the first step."""
        shape, device = w_plus.shape, w_plus.device
        ones = torch.ones(shape, dtype=torch.float64, device=device)
        zeros = torch.zeros_like(ones)
        exponents = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(
            w_plus, w_minus, ones, ones.clone(), exponents, exponents.clone(), zeros, zeros.clone(),
            w_plus.double().clone(), w_minus.double().clone(), zeros.sum(-1), zeros.sum(-1),
        )  # fmt: skip

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """Apply one function to every tensor (indexing, usually)."""
        return Factors(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def copy_(self, other: "Factors") -> None:
        """Take over another state's numbers, in place."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not theirs:
                mine.copy_(theirs)

    def multiply(self, x: Tensor, decay: Tensor | None) -> None:
        """One step, in place.

        Args:
            x: lr g/(1 - c), of the factors' shape and dtype.
            decay: 1 - c where there is weight decay, broadcastable, else None.
        """
        down, up = 1 - x, 1 + x
        self.accumulate(x, down, up, decay)
        if decay is not None:
            down, up = down * decay, up * decay
        self.w_plus.mul_(down)
        self.w_minus.mul_(up)

    def accumulate(self, x: Tensor, down: Tensor, up: Tensor, decay: Tensor | None) -> None:
        """The gain's part of a step, for factors that are updated elsewhere; `down` and `up` are 1 - x and 1 + x."""
        if x.dtype != torch.float64:
            x = x.double()
            down, up = 1 - x, 1 + x
        self.product_plus.mul_(down)
        self.product_minus.mul_(up)
        self.step_sum.add_(x)
        size = x.abs()
        self.square_sum.add_((size * size).sum(-1))
        self.largest_step.copy_(torch.maximum(self.largest_step, size.amax(-1)))
        if decay is not None:
            self.log_decay.add_(torch.log(decay.double()))

    def renormalise(self) -> Tensor:
        """Bring the products back to [1/2, 1) and hold factors that leave floating point at its edge, in place.

        A factor below `floor` in magnitude adds less than rounding to anything, but as a zero or a denormal number it
        would lose the gradient that the gain is computed from, and its own way back. So near the floor a factor is set
        from its product, which knows its true size, and never below the floor.

        Returns:
            Where both factors were set, boolean, of the factors' shape.
        """
        for product, exponent in ((self.product_plus, self.exponent_plus), (self.product_minus, self.exponent_minus)):
            mantissa, shift = torch.frexp(product)
            finite = torch.isfinite(product)
            product.copy_(torch.where(finite, mantissa, product))
            exponent.add_(torch.where(finite, shift, 0))
        floor, near = floors(self.w_plus.dtype)
        low_plus, low_minus = self.w_plus.abs() <= near, self.w_minus.abs() <= near
        for w, low, initial, log_abs, product in (
            (self.w_plus, low_plus, self.initial_plus, self.log_plus, self.product_plus),
            (self.w_minus, low_minus, self.initial_minus, self.log_minus, self.product_minus),
        ):
            # A factor that starts at zero, or is multiplied by it, stays there; a product that is NaN says nothing.
            low &= (initial != 0) & (product.abs() > 0)
            if low.any():
                size = torch.exp(torch.log(initial.abs()) + self.log_decay + log_abs()).clamp(min=floor)
                sign = torch.where((initial < 0) ^ (product < 0), -1.0, 1.0)
                w.copy_(torch.where(low, (sign * size).to(w.dtype), w))
        return low_plus & low_minus

    def log_plus(self) -> Tensor:
        """Ln of the product of |1 - x|."""
        return torch.log(self.product_plus.abs()) + self.exponent_plus.double() * math.log(2)

    def log_minus(self) -> Tensor:
        """Ln of the product of |1 + x|."""
        return torch.log(self.product_minus.abs()) + self.exponent_minus.double() * math.log(2)

    def gain(self) -> Tensor:
        """Sum of q(x) = -ln|1 - x^2|."""
        exponent = (self.exponent_plus + self.exponent_minus).double()  # times a number, an int64 would become float32
        return -(torch.log((self.product_plus * self.product_minus).abs()) + exponent * math.log(2))

    def gain_plus(self) -> Tensor:
        """Sum of q+(x) = -2 x - ln (1 - x)^2."""
        return -2 * (self.step_sum + self.log_plus())

    def gain_minus(self) -> Tensor:
        """Sum of q-(x) = 2 x - ln (1 + x)^2."""
        return 2 * (self.step_sum - self.log_minus())

    def imbalance(self) -> Tensor:
        """u^2 - v^2 = 2 w+ w- of the present factors."""
        return 2 * self.w_plus.double() * self.w_minus.double()

    def effective_init(self) -> Tensor:
        """alpha_k, with alpha_k^2 = |w+(0) w-(0)| prod (1 - c)^2 exp(-Gain); 0 once below floating point."""
        return torch.exp(self.log_effective_init())

    def log_effective_init(self) -> Tensor:
        """Ln alpha_k, which does not underflow."""
        return 0.5 * (self._logs(1) - self.gain()) + self.log_decay

    def mirror_shift(self) -> Tensor:
        """asinh(beta~_0/alpha_k^2): where the mirror's origin has moved to, the start's own ln|w+(0)/w-(0)| included."""
        return self._logs(-1) + (self.gain_minus() - self.gain_plus()) / 2

    # What exact arithmetic would make zero --------------------------------------------------------------------------

    def imbalance_error(self) -> Tensor:
        """Largest |ln|w+ w-| - ln alpha_k^2| over the coordinates that are not held at the edge of numbers, (...)."""
        return self._error(self._logs(1) - self.gain() + 2 * self.log_decay, 1)

    def mirror_error(self) -> Tensor:
        """Largest error of ln|w+/w-| = 2 theta_k (plus what it was at the start), likewise."""
        return self._error(self._logs(-1) + self.log_plus() - self.log_minus(), -1)

    def gain_sandwich_error(self) -> Tensor:
        """By how much sum |x|^2 <= |Gain|_1 <= 2 sum |x|^2 fails, (...); NaN once a step had |x| > 0.8926."""
        size = self.gain().sum(-1)
        excess = torch.maximum(self.square_sum - size, size - 2 * self.square_sum).clamp(min=0)
        return torch.where(self.largest_step <= QUADRATIC, excess, torch.nan)

    def _logs(self, way: int) -> Tensor:
        return torch.log(self.initial_plus.abs()) + way * torch.log(self.initial_minus.abs())

    def _error(self, exact: Tensor, way: int) -> Tensor:
        w_plus, w_minus = self.w_plus.double().abs(), self.w_minus.double().abs()
        error = (torch.log(w_plus) + way * torch.log(w_minus) - exact).abs()
        near = floors(self.w_plus.dtype)[1]
        usable = (w_plus > near) & (w_minus > near) & torch.isfinite(error)
        undefined = self.product_plus.isnan()  # the loss is no function of the product (`PairOptimizer.undefine`)
        return torch.where(usable, error, torch.where(undefined, torch.nan, 0.0)).amax(-1)
