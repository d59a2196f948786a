"""The steps of the shallow linear network in Triton; `dlnlab.kernels.cuda_shallow` is the way in.

One program takes `LANES` members, one for each thread, through a whole launch: the two products and the sums of a member
stay in its thread's registers, and only checks, records and the ends of a launch touch memory. All arithmetic is lane by
lane, so a member's bits depend on no company; nothing that a launch decides is known at compile time (`Plan`), so there is
one compiled kernel.

Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dlnlab.kernels import shallow
from dlnlab.kernels.cuda_steps import (
    ABOVE_BOUND,
    CONVERGED,
    DIVERGED,
    INFINITY,
    NOT_FINITE,
    PERIOD,
    Rates,
    split_powers,
)

LOWEST = tl.constexpr(shallow.LOWEST)


class State(NamedTuple):
    """`Multipliers`, (E,), or (T, E) where they are records."""

    product_plus: Tensor
    product_minus: Tensor
    exponent_plus: Tensor
    exponent_minus: Tensor
    step_sum: Tensor
    square_sum: Tensor
    largest_step: Tensor


class Members(NamedTuple):
    """The `Course` of all members, and how far they are, (E,)."""

    lr: Tensor
    target: Tensor
    half_plus: Tensor
    half_minus: Tensor
    peak_plus: Tensor
    peak_minus: Tensor
    status: Tensor
    stopped_at: Tensor
    bound: Tensor  # of the loss
    cause: Tensor  # why a member has diverged, int8


class Records(NamedTuple):
    """What is written at each of T steps, for every member: rows t E + m."""

    steps: Tensor  # (T,)
    state: State
    status: Tensor


class Plan(NamedTuple):
    """The numbers of a launch, in memory so that the kernel is compiled for none of them."""

    integers: Tensor  # int64: see `advance`
    reals: Tensor  # float64: tol, width


@triton.jit
def _two_to(exponent):
    """2^exponent exactly, int64 -> float64; exponents below `LOWEST` are as it is."""
    return ((tl.minimum(tl.maximum(exponent, LOWEST), 1023) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _load(source: State, at, mask):
    """A member's state, as tuple; an idle lane has P = M = 1/2."""
    return (
        tl.load(source.product_plus + at, mask=mask, other=0.5), tl.load(source.product_minus + at, mask=mask, other=0.5),
        tl.load(source.exponent_plus + at, mask=mask, other=0), tl.load(source.exponent_minus + at, mask=mask, other=0),
        tl.load(source.step_sum + at, mask=mask, other=0.0), tl.load(source.square_sum + at, mask=mask, other=0.0),
        tl.load(source.largest_step + at, mask=mask, other=0.0),
    )  # fmt: skip


@triton.jit
def _store(target: State, at, now, mask):
    plus, minus, exponent_plus, exponent_minus, step_sum, square_sum, largest_step = now
    tl.store(target.product_plus + at, plus, mask=mask)
    tl.store(target.product_minus + at, minus, mask=mask)
    tl.store(target.exponent_plus + at, exponent_plus, mask=mask)
    tl.store(target.exponent_minus + at, exponent_minus, mask=mask)
    tl.store(target.step_sum + at, step_sum, mask=mask)
    tl.store(target.square_sum + at, square_sum, mask=mask)
    tl.store(target.largest_step + at, largest_step, mask=mask)


@triton.jit
def advance(chosen, members: Members, rates: Rates, state: State, kept: State, records: Records, last, plan: Plan,
            LANES: tl.constexpr):  # fmt: skip
    """Take `LANES` members from one step to another.

    Args:
        chosen: Numbers of the running members, int64.
        members: Status, stopped_at and cause change in place.
        rates: Of the members whose lr changes.
        state: Advanced in place; a stopped member stays as it is.
        kept: Each member at its last check, changed in place.
        records: Filled for the chosen.
        last: One int64, raised to the last step that any member has taken.
        plan: First and last step, the guard's period, the first record and the one after the last, E, how many are chosen,
            and the first column's step and the number of columns of the rates.
        LANES: Members of a program.
    """
    start, stop, every = tl.load(plan.integers), tl.load(plan.integers + 1), tl.load(plan.integers + 2)
    t, num_records = tl.load(plan.integers + 3), tl.load(plan.integers + 4)
    num_members, num_chosen = tl.load(plan.integers + 5), tl.load(plan.integers + 6)
    tol, width = tl.load(plan.reals), tl.load(plan.reals + 1)

    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = place < num_chosen
    m = tl.load(chosen + place, mask=there, other=0)
    lr, target = tl.load(members.lr + m), tl.load(members.target + m)
    half_plus, half_minus = tl.load(members.half_plus + m), tl.load(members.half_minus + m)
    peak_plus, peak_minus = tl.load(members.peak_plus + m), tl.load(members.peak_minus + m)
    status, stopped_at = tl.load(members.status + m).to(tl.int32), tl.load(members.stopped_at + m)
    plus, minus, exponent_plus, exponent_minus, step_sum, square_sum, largest_step = _load(state, m, there)

    schedule = tl.load(rates.schedule + m)
    scheduled, factor_at = schedule >= 0, schedule * tl.load(plan.integers + 8) - tl.load(plan.integers + 7)

    running = there
    num_running = tl.sum(running.to(tl.int32), axis=0)
    step = start
    while (step < stop) & (num_running > 0):
        end = tl.minimum(tl.minimum(step - step % PERIOD + PERIOD, step - step % every + every), stop)
        end = tl.minimum(end, tl.load(records.steps + t, mask=t < num_records, other=stop))
        two_plus, two_minus = _two_to(exponent_plus), _two_to(exponent_minus)
        scale_plus, scale_minus = half_plus * two_plus * two_plus, half_minus * two_minus * two_minus
        for i in range(0, end - step):
            rate = lr * tl.load(rates.lr_factor + factor_at + step + i, mask=scheduled, other=1.0)
            eps = tl.fma(scale_plus * plus, plus, tl.fma(-scale_minus * minus, minus, -target))
            x = tl.where(running, rate * eps, 0.0)  # a stopped member's eps may be infinite
            plus, minus = tl.fma(-x, plus, plus), tl.fma(x, minus, minus)
            step_sum += x
            square_sum = tl.fma(width * x, x, square_sum)
            length = tl.abs(x)
            largest_step = tl.maximum(largest_step, tl.where(length == length, length, 0.0))
        step = end

        if step % PERIOD == 0:
            mantissa_plus, power_plus = split_powers(plus)
            mantissa_minus, power_minus = split_powers(minus)
            plus, minus = tl.where(running, mantissa_plus, plus), tl.where(running, mantissa_minus, minus)
            exponent_plus += tl.where(running, power_plus, 0)
            exponent_minus += tl.where(running, power_minus, 0)
        if step % every == 0:
            whole_plus, whole_minus = plus * _two_to(exponent_plus), minus * _two_to(exponent_minus)
            eps = half_plus * whole_plus * whole_plus - half_minus * whole_minus * whole_minus - target
            loss = eps * eps * 0.5
            finite = (loss < INFINITY) & (tl.abs(whole_plus) * peak_plus < INFINITY)  # NaN is false
            finite &= tl.abs(whole_minus) * peak_minus < INFINITY
            well = running & finite & (loss <= tl.load(members.bound + m))
            lost = running & ~well
            tl.store(members.cause + m, tl.where(finite, ABOVE_BOUND, NOT_FINITE).to(tl.int8), mask=lost)
            now = plus, minus, exponent_plus, exponent_minus, step_sum, square_sum, largest_step
            _store(kept, m, now, well)
            old = _load(kept, m, lost)
            plus, minus = tl.where(lost, old[0], plus), tl.where(lost, old[1], minus)
            exponent_plus = tl.where(lost, old[2], exponent_plus)
            exponent_minus = tl.where(lost, old[3], exponent_minus)
            step_sum, square_sum = tl.where(lost, old[4], step_sum), tl.where(lost, old[5], square_sum)
            largest_step = tl.where(lost, old[6], largest_step)
            converged = well & (loss < tol)
            status = tl.where(lost, DIVERGED, tl.where(converged, CONVERGED, status))
            stopped_at = tl.where(lost, tl.maximum(step - every, 0), tl.where(converged, step, stopped_at))
            running = well & ~converged
            num_running = tl.sum(running.to(tl.int32), axis=0)
        if tl.load(records.steps + t, mask=t < num_records, other=stop + 1) == step:
            now = plus, minus, exponent_plus, exponent_minus, step_sum, square_sum, largest_step
            _store(records.state, t * num_members + m, now, there)
            tl.store(records.status + t * num_members + m, status.to(tl.int8), mask=there)
            t += 1
    now = plus, minus, exponent_plus, exponent_minus, step_sum, square_sum, largest_step
    while t < num_records:  # stopped members stay as they are
        _store(records.state, t * num_members + m, now, there)
        tl.store(records.status + t * num_members + m, status.to(tl.int8), mask=there)
        t += 1
    _store(state, m, now, there)
    tl.store(members.status + m, status.to(tl.int8), mask=there)
    tl.store(members.stopped_at + m, stopped_at, mask=there)
    tl.atomic_max(last, step)
