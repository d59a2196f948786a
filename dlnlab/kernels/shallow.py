"""Many steps of the shallow linear network a^T b against a target, exactly reduced to two numbers a member.

In p = (a + b)/sqrt2 and m = (a - b)/sqrt2 a step of gradient descent multiplies all of p by 1 - x and all of m by 1 + x,
x = lr eps. So p = P p(0), m = M m(0), and the products P, M that the gain is made of anyway carry the whole path:

    x = lr (P^2 |p(0)|^2/2 - M^2 |m(0)|^2/2 - target),    P <- P (1 - x),    M <- M (1 + x),

whatever the width (derived here). P and M are float64 with an exponent of their own, renormalised at absolute steps
divisible by `PERIOD`, so no result depends on where calls begin and end. A member's bits depend on no other's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dlnlab.kernels.factors import PERIOD, Factors, floors
from dlnlab.kernels.guard import ABOVE_BOUND, LARGEST, NOT_FINITE, Limits
from dlnlab.kernels.rates import Rates, rate_arrays

LOWEST = -400
"""Where a step is computed, smaller exponents of P and M are as this. Their squares count for nothing beside Phi, but as
denormal numbers they would take ten times as long."""
_SLICES_PER_THREAD = 4


@dataclass
class Multipliers:
    """What the steps have made of each member; tensors (..., E), float64 but for the exponents (int64).

    The fields are `Factors` of one coordinate, all of whose coordinates are the same, but for `square_sum`, which is the
    sum over all.
    """

    product_plus: Tensor
    product_minus: Tensor
    exponent_plus: Tensor
    exponent_minus: Tensor
    step_sum: Tensor
    square_sum: Tensor
    largest_step: Tensor

    @classmethod
    def of(cls, factors: Factors) -> "Multipliers":
        """Those of the factors p, m (E, D), a copy."""

        def one(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.ndim == 1 else tensor[:, 0].clone()

        return cls(**{field.name: one(getattr(factors, field.name)) for field in fields(cls)})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Multipliers":
        """Apply one function to every tensor."""
        return Multipliers(**{name: change(value) for name, value in vars(self).items()})

    def factors(self, like: Factors) -> Factors:
        """The factors that have begun as `like` has, (..., E, D); those near the edge of numbers are held there."""
        shape = (*self.product_plus.shape, like.initial_plus.shape[-1])

        def spread(tensor: Tensor) -> Tensor:
            return tensor[..., None].expand(shape)

        floor = floors(like.w_plus.dtype)[0]
        return Factors(
            _factor(like.initial_plus, self.product_plus, self.exponent_plus, floor).to(like.w_plus.dtype),
            _factor(like.initial_minus, self.product_minus, self.exponent_minus, floor).to(like.w_plus.dtype),
            *(spread(getattr(self, field.name)) for field in fields(self)[:5]),
            like.log_decay.expand(shape), like.initial_plus, like.initial_minus, self.square_sum, self.largest_step,
        )  # fmt: skip


def _factor(initial: Tensor, product: Tensor, exponent: Tensor, floor: float) -> Tensor:
    factor = initial * (product * two_to(exponent))[..., None]
    held = (factor.abs() < floor) & (initial != 0) & (product != 0)[..., None]
    return torch.where(held, torch.copysign(torch.full_like(factor, floor), initial * product[..., None]), factor)


def two_to(exponent: Tensor, least: int = -1000) -> Tensor:
    """2^exponent exactly, int64 -> float64; exponents below `least` are as it is."""
    return ((exponent.clamp(least, 1023) + 1023) << 52).view(torch.float64)


@dataclass
class Course:
    """What does not change, (E,) float64.

    Attributes:
        lr: Step size.
        target: Phi.
        half_plus: |p(0)|^2/2.
        half_minus: |m(0)|^2/2.
        peak_plus: Largest |p_i(0)|.
        peak_minus: Largest |m_i(0)|.
        width: D, coordinates of p.
    """

    lr: Tensor
    target: Tensor
    half_plus: Tensor
    half_minus: Tensor
    peak_plus: Tensor
    peak_minus: Tensor
    width: int

    @classmethod
    def of(cls, factors: Factors, lr: Tensor, target: Tensor) -> "Course":
        """That of members which have begun with the factors' initial values."""
        plus, minus = factors.initial_plus, factors.initial_minus
        # The last of the running sums: added in order, whatever the number of members.
        halves = (w.square().cumsum(-1)[:, -1] / 2 for w in (plus, minus))
        peaks = (w.abs().amax(-1) for w in (plus, minus))
        return cls(lr.double().contiguous(), target.double().contiguous(), *halves, *peaks, plus.shape[-1])


@dataclass
class Rule(Limits):
    """When members stop, and what the diverged go back to; see `Limits`."""

    kept: Multipliers


@dataclass
class Log:
    """What is written at each of T steps, (T, E): the multipliers and the status (int8)."""

    steps: list[int]
    state: Multipliers
    status: Tensor

    @classmethod
    def allocate(cls, steps: list[int], state: Multipliers) -> "Log":
        """Room for some steps of a state (E,)."""
        room = state.map(lambda tensor: tensor.new_empty(len(steps), len(tensor)))
        return cls(list(steps), room, room.exponent_plus.to(torch.int8))


Advance = Callable[[Multipliers, Course, int, int, Tensor, Tensor, Rule | None, Log, int, Rates | None], int]


def shallow_kernel(device: torch.device) -> tuple[Advance, str | None]:
    """The function that takes members many steps on a device, and why it is not a compiled one, if so.

    It is called with

    - the members' `Multipliers`, changed in place, and their `Course`;
    - the first step, and the step after the last;
    - `status` (int8) and `stopped_at` (int64), (E,), changed in place; only running members move;
    - a `Rule`, or None where no member is ever stopped; members are checked at steps divisible by its period;
    - a `Log` of steps after the first one, filled; a step that has both a check and a record is checked first;
    - the threads of a CPU that share the members;
    - `Rates`, of which lr alone counts here, or None where every lr is constant;

    and returns the steps taken, fewer than asked for where the last running member stopped at a check before.
    """
    if device.type == "cpu":
        return advance_cpu, None
    from dlnlab.kernels import cuda, cuda_shallow

    refusal = cuda.refusal(device)
    return (cuda_shallow.advance_cuda, None) if refusal is None else (advance_torch, refusal)


def advance_torch(
    state: Multipliers, course: Course, start: int, stop: int, status: Tensor, stopped_at: Tensor, rule: Rule | None,
    log: Log, num_threads: int = 1, rates: Rates | None = None,
) -> int:  # fmt: skip
    """Batched tensor arithmetic on any device: what the compiled kernel is held to; see `shallow_kernel`."""
    del num_threads
    running = torch.nonzero(status == 0).squeeze(1)
    step, t = start, 0
    while step < stop and len(running):
        end = min([stop, *log.steps[t : t + 1]])
        if rule is not None:
            end = min(end, step - step % rule.every_n_steps + rule.every_n_steps)
        part = state.map(lambda tensor: tensor[running])  # noqa: B023 - used at once
        here = Course(**{name: value if name == "width" else value[running] for name, value in vars(course).items()})
        _take_steps(part, here, step, end, None if rates is None else rates.pick(running))
        for whole, some in zip(vars(state).values(), vars(part).values(), strict=True):
            whole[running] = some
        step = end
        if rule is not None and step % rule.every_n_steps == 0:
            _check(step, running, part, here, state, status, stopped_at, rule)
            running = torch.nonzero(status == 0).squeeze(1)
        if t < len(log.steps) and log.steps[t] == step:
            _write(log, t, state, status)
            t += 1
    for later in range(t, len(log.steps)):  # stopped members stay as they are
        _write(log, later, state, status)
    return step - start


def _take_steps(state: Multipliers, course: Course, start: int, stop: int, rates: Rates | None) -> None:
    """Take the steps start, ..., stop - 1, in place."""
    for first in range(start - start % PERIOD, stop, PERIOD):
        scales = course.lr * course.half_plus, course.lr * course.half_minus
        exponents = state.exponent_plus, state.exponent_minus
        plus, minus = (scale * two_to(e, LOWEST) ** 2 for scale, e in zip(scales, exponents, strict=True))
        shift = course.lr * course.target
        for step in range(max(first, start), min(first + PERIOD, stop)):
            x = plus * state.product_plus.square() - minus * state.product_minus.square() - shift
            if rates is not None:
                x *= rates.factor(step)[0]
            state.product_plus.mul_(1 - x)
            state.product_minus.mul_(1 + x)
            state.step_sum.add_(x)
            state.square_sum.add_(course.width * x.square())
            torch.maximum(state.largest_step, x.abs(), out=state.largest_step)
        if first + PERIOD <= stop:
            for product, exponent in zip((state.product_plus, state.product_minus), exponents, strict=True):
                mantissa, power = torch.frexp(product)
                finite = torch.isfinite(product)
                product.copy_(torch.where(finite, mantissa, product))
                exponent.add_(torch.where(finite, power, 0))


def _check(
    step: int, running: Tensor, part: Multipliers, course: Course, state: Multipliers, status: Tensor,
    stopped_at: Tensor, rule: Rule,
) -> None:  # fmt: skip
    """`LinearNetwork.check_members` for the running members, `part` of the state."""
    plus, minus = part.product_plus * two_to(part.exponent_plus), part.product_minus * two_to(part.exponent_minus)
    eps = course.half_plus * plus.square() - course.half_minus * minus.square() - course.target
    loss = eps.square() / 2
    finite = (loss <= LARGEST) & (plus.abs() * course.peak_plus <= LARGEST)  # NaN compares false
    finite &= minus.abs() * course.peak_minus <= LARGEST
    fine = finite & (loss <= rule.bound[running])
    rule.cause[running[~fine]] = torch.where(finite, ABOVE_BOUND, NOT_FINITE)[~fine].to(torch.int8)
    gone, safe, done = running[~fine], running[fine], running[fine & (loss < rule.tol)]
    for now, kept in zip(vars(state).values(), vars(rule.kept).values(), strict=True):
        kept[safe] = now[safe]
        now[gone] = kept[gone]
    status[gone], status[done] = 2, 1
    stopped_at[gone], stopped_at[done] = max(step - rule.every_n_steps, 0), step


def _write(log: Log, t: int, state: Multipliers, status: Tensor) -> None:
    for rows, now in zip(vars(log.state).values(), vars(state).values(), strict=True):
        rows[t] = now
    log.status[t] = status


def advance_cpu(
    state: Multipliers, course: Course, start: int, stop: int, status: Tensor, stopped_at: Tensor, rule: Rule | None,
    log: Log, num_threads: int = 1, rates: Rates | None = None,
) -> int:  # fmt: skip
    """Sixteen members side by side in compiled code, those that have stopped left out; see `shallow_kernel`."""
    import numpy as np

    from dlnlab.kernels import shallow_steps  # brings numba, which only a fit needs

    assert status.is_contiguous() and stopped_at.is_contiguous(), "they are changed in place"
    arrays = shallow_steps.State(*(tensor.numpy() for tensor in vars(state).values()))
    members = shallow_steps.Members(
        *(tensor.numpy() for name, tensor in vars(course).items() if name != "width"),
        float(course.width), status.numpy(), stopped_at.numpy(), len(status),
    )  # fmt: skip
    guard = shallow_steps.Guard(0.0, arrays.step_sum, 0, arrays, status.numpy())  # never read
    if rule is not None:
        kept = shallow_steps.State(*(tensor.numpy() for tensor in vars(rule.kept).values()))
        guard = shallow_steps.Guard(float(rule.tol), rule.bound.numpy(), rule.every_n_steps, kept, rule.cause.numpy())
    rows = shallow_steps.State(*(tensor.flatten().numpy() for tensor in vars(log.state).values()))
    steps = np.array(log.steps, dtype=np.int64)
    records = shallow_steps.Records(steps, len(steps), rows, log.status.flatten().numpy())
    numbers = rate_arrays(rates, len(status))

    def run(part: np.ndarray) -> int:
        return shallow_steps.advance(part, len(part), arrays, members, guard, records, start, stop, numbers)

    everyone = np.arange(len(status))
    if num_threads == 1 or len(everyone) <= shallow_steps.LANES:
        return run(everyone) - start
    with ThreadPoolExecutor(num_threads) as pool:
        return max(pool.map(run, np.array_split(everyone, num_threads * _SLICES_PER_THREAD))) - start
