"""The compiled steps of the shallow linear network; `dlnlab.kernels.shallow` is the way in and says what they are.

Members run sixteen at a time from one check or record to the next, and those that still run close ranks after it: what
has stopped costs nothing. All arithmetic is lane by lane, so a member's bits depend on no layout.
"""

from typing import NamedTuple

import numpy as np

from dlnlab.kernels.caching import cached_njit
from dlnlab.kernels.cpu_steps import CONVERGED, DIVERGED, RUNNING, _split_powers, part
from dlnlab.kernels.factors import PERIOD
from dlnlab.kernels.guard import ABOVE_BOUND, LARGEST, NOT_FINITE
from dlnlab.kernels.shallow import LOWEST
from dlnlab.kernels.vectors import as_integers, fma, largest, load, pointers, shift, splat, store, zeros

LANES = 16


class State(NamedTuple):
    """The `Multipliers` of all members as arrays (E,)."""

    product_plus: np.ndarray
    product_minus: np.ndarray
    exponent_plus: np.ndarray
    exponent_minus: np.ndarray
    step_sum: np.ndarray
    square_sum: np.ndarray
    largest_step: np.ndarray


class Members(NamedTuple):
    """The `Course` of all members, and how far they are, (E,) unless said."""

    lr: np.ndarray
    target: np.ndarray
    half_plus: np.ndarray
    half_minus: np.ndarray
    peak_plus: np.ndarray
    peak_minus: np.ndarray
    width: float
    status: np.ndarray
    stopped_at: np.ndarray
    num_members: int


class Guard(NamedTuple):
    """When members stop, and where the diverged go back to."""

    tol: float
    bound: np.ndarray  # (E,), of the loss
    every_n_steps: int  # 0 = never
    kept: State
    cause: np.ndarray  # (E,): why a member has diverged


class Records(NamedTuple):
    """What is written at each of T steps, for every member: row t E + m of every array but the first."""

    steps: np.ndarray  # (T,)
    num_steps: int
    state: State
    status: np.ndarray


class Work(NamedTuple):
    """Sixteen lanes."""

    product_plus: np.ndarray
    product_minus: np.ndarray
    step_sum: np.ndarray
    square_sum: np.ndarray
    largest_step: np.ndarray
    lr: np.ndarray
    target: np.ndarray
    two_plus: np.ndarray  # 2^exponent_plus
    two_minus: np.ndarray
    half_plus: np.ndarray  # |p(0)|^2/2
    half_minus: np.ndarray
    scale_plus: np.ndarray  # lr |p(0)|^2/2 4^exponent_plus
    scale_minus: np.ndarray
    shift: np.ndarray  # lr target
    factors: np.ndarray  # of lr, at a step
    exponent_plus: np.ndarray
    exponent_minus: np.ndarray
    at: np.ndarray  # where the factors of lr begin in their table; -1 where there are none


@part
def _new_work(numbers, integers):
    return Work(
        numbers, shift(numbers, LANES), shift(numbers, 2 * LANES), shift(numbers, 3 * LANES), shift(numbers, 4 * LANES),
        shift(numbers, 5 * LANES), shift(numbers, 6 * LANES), shift(numbers, 7 * LANES), shift(numbers, 8 * LANES),
        shift(numbers, 9 * LANES), shift(numbers, 10 * LANES), shift(numbers, 11 * LANES), shift(numbers, 12 * LANES),
        shift(numbers, 13 * LANES), shift(numbers, 14 * LANES), integers, shift(integers, LANES),
        shift(integers, 2 * LANES),
    )  # fmt: skip


@part
def _take(work, order, first, count, state, members):
    """Copy the members order[first], ... into lanes; the rest are idle."""
    for lane in range(count):
        m = order[first + lane]
        work.product_plus[lane], work.product_minus[lane] = state.product_plus[m], state.product_minus[m]
        work.exponent_plus[lane], work.exponent_minus[lane] = state.exponent_plus[m], state.exponent_minus[m]
        work.step_sum[lane], work.square_sum[lane] = state.step_sum[m], state.square_sum[m]
        work.largest_step[lane] = state.largest_step[m]
        work.lr[lane], work.target[lane] = members.lr[m], members.target[m]
        work.half_plus[lane], work.half_minus[lane] = members.half_plus[m], members.half_minus[m]
    for lane in range(count, LANES):
        work.product_plus[lane], work.product_minus[lane] = 0.5, 0.5
        work.exponent_plus[lane], work.exponent_minus[lane] = 0, 0
        work.step_sum[lane], work.square_sum[lane], work.largest_step[lane] = 0.0, 0.0, 0.0
        work.lr[lane], work.target[lane], work.half_plus[lane], work.half_minus[lane] = 0.0, 0.0, 0.0, 0.0


@part
def _give(work, order, first, count, state):
    """Copy lanes back."""
    for lane in range(count):
        m = order[first + lane]
        state.product_plus[m], state.product_minus[m] = work.product_plus[lane], work.product_minus[lane]
        state.exponent_plus[m], state.exponent_minus[m] = work.exponent_plus[lane], work.exponent_minus[lane]
        state.step_sum[m], state.square_sum[m] = work.step_sum[lane], work.square_sum[lane]
        state.largest_step[m] = work.largest_step[lane]


@part
def _rescale(work):
    """What the exponents decide: exact powers of two, those below `LOWEST` as it is."""
    plus, minus = as_integers(work.two_plus), as_integers(work.two_minus)
    for i in range(LANES):
        plus[i] = (min(max(work.exponent_plus[i], LOWEST), 1023) + 1023) << 52
        minus[i] = (min(max(work.exponent_minus[i], LOWEST), 1023) + 1023) << 52
    for i in range(LANES):
        work.scale_plus[i] = work.lr[i] * work.half_plus[i] * work.two_plus[i] * work.two_plus[i]
        work.scale_minus[i] = work.lr[i] * work.half_minus[i] * work.two_minus[i] * work.two_minus[i]
        work.shift[i] = work.lr[i] * work.target[i]


@part
def _take_steps(work, count, width):
    """`count` steps between two renormalisations, all in registers."""
    like = zeros(work.product_plus, 16)
    plus, minus = load(work.product_plus, 0, like), load(work.product_minus, 0, like)
    step_sum, square_sum = load(work.step_sum, 0, like), load(work.square_sum, 0, like)
    peak = load(work.largest_step, 0, like)
    scale_plus, scale_minus = load(work.scale_plus, 0, like), -load(work.scale_minus, 0, like)
    away, wide = -load(work.shift, 0, like), splat(width, like)
    for _ in range(count):
        x = fma(scale_plus * plus, plus, fma(scale_minus * minus, minus, away))
        plus, minus = fma(-x, plus, plus), fma(x, minus, minus)
        step_sum = step_sum + x
        square_sum = fma(wide * x, x, square_sum)
        peak = largest(x, peak)
    store(work.product_plus, 0, plus)
    store(work.product_minus, 0, minus)
    store(work.step_sum, 0, step_sum)
    store(work.square_sum, 0, square_sum)
    store(work.largest_step, 0, peak)


@part
def _take_scheduled_steps(work, count, width, at, rates, now):
    """The same where lr has a factor; `at` says where in the tables each lane's begin, -1 for a factor of 1."""
    like, factors = zeros(work.product_plus, 16), work.factors
    plus, minus = load(work.product_plus, 0, like), load(work.product_minus, 0, like)
    step_sum, square_sum = load(work.step_sum, 0, like), load(work.square_sum, 0, like)
    peak = load(work.largest_step, 0, like)
    scale_plus, scale_minus = load(work.scale_plus, 0, like), -load(work.scale_minus, 0, like)
    away, wide = -load(work.shift, 0, like), splat(width, like)
    for step in range(now, now + count):
        for lane in range(LANES):
            factors[lane] = rates.lr_factor[at[lane] + step - rates.first] if at[lane] >= 0 else 1.0
        x = load(factors, 0, like) * fma(scale_plus * plus, plus, fma(scale_minus * minus, minus, away))
        plus, minus = fma(-x, plus, plus), fma(x, minus, minus)
        step_sum = step_sum + x
        square_sum = fma(wide * x, x, square_sum)
        peak = largest(x, peak)
    store(work.product_plus, 0, plus)
    store(work.product_minus, 0, minus)
    store(work.step_sum, 0, step_sum)
    store(work.square_sum, 0, square_sum)
    store(work.largest_step, 0, peak)


@part
def _copy(source, m, target, row):
    """Member m of a state, to a row of another."""
    target.product_plus[row], target.product_minus[row] = source.product_plus[m], source.product_minus[m]
    target.exponent_plus[row], target.exponent_minus[row] = source.exponent_plus[m], source.exponent_minus[m]
    target.step_sum[row], target.square_sum[row] = source.step_sum[m], source.square_sum[m]
    target.largest_step[row] = source.largest_step[m]


@part
def _check(work, lane, m, step, state, members, guard):
    """`LinearNetwork.check_members` for the running member of a lane; the powers of two are up to date."""
    plus, minus = work.product_plus[lane] * work.two_plus[lane], work.product_minus[lane] * work.two_minus[lane]
    eps = work.half_plus[lane] * plus * plus - work.half_minus[lane] * minus * minus - work.target[lane]
    loss = eps * eps / 2
    finite = (
        abs(plus) * members.peak_plus[m] <= LARGEST and abs(minus) * members.peak_minus[m] <= LARGEST
    )  # NaN is false
    finite = finite and loss <= LARGEST
    if finite and loss <= guard.bound[m]:
        _copy(state, m, guard.kept, m)
        if loss < guard.tol:
            members.status[m] = CONVERGED
            members.stopped_at[m] = step
    else:
        _copy(guard.kept, m, state, m)
        members.status[m] = DIVERGED
        guard.cause[m] = ABOVE_BOUND if finite else NOT_FINITE
        members.stopped_at[m] = max(step - guard.every_n_steps, 0)


@cached_njit(nogil=True, error_model="numpy")
def advance(everyone, count, state, members, guard, records, start, stop, rates):
    """Take members to step `stop`, in place.

    Args:
        everyone: The members' numbers, int64; those that do not run are only recorded.
        count: How many.
        state: Changed in place.
        members: Status and stopped_at change in place.
        guard: The kept state changes in place.
        records: Filled.
        start: The first step.
        stop: The step after the last.
        rates: Of the members whose lr changes.

    Returns:
        `stop`, or the step at which the last running member stopped.
    """
    numbers, integers, running = np.zeros(15 * LANES), np.zeros(3 * LANES, np.int64), np.zeros(count, np.int64)
    work, order, everyone = _new_work(pointers(numbers), pointers(integers)), pointers(running), pointers(everyone)
    state, members, guard, records = pointers(state), pointers(members), pointers(guard), pointers(records)
    rates = pointers(rates)
    num_running = 0
    for i in range(count):
        if members.status[everyone[i]] == RUNNING:
            order[num_running] = everyone[i]
            num_running += 1
    step, t = start, 0
    while step < stop and num_running > 0:
        end = stop
        if guard.every_n_steps > 0:
            end = min(end, step - step % guard.every_n_steps + guard.every_n_steps)
        if t < records.num_steps:
            end = min(end, records.steps[t])
        checked = guard.every_n_steps > 0 and end % guard.every_n_steps == 0
        left = 0
        for first in range(0, num_running, LANES):
            lanes = min(LANES, num_running - first)
            _take(work, order, first, lanes, state, members)
            _rescale(work)
            scheduled = False
            for lane in range(LANES):
                row = rates.schedule[order[first + lane]] if lane < lanes else -1
                work.at[lane] = row * rates.num_steps if row >= 0 else -1
                scheduled |= row >= 0
            now = step
            while now < end:
                until = min(end, now - now % PERIOD + PERIOD)
                if scheduled:
                    _take_scheduled_steps(work, until - now, members.width, work.at, rates, now)
                else:
                    _take_steps(work, until - now, members.width)
                now = until
                if now % PERIOD == 0:
                    _split_powers(work.product_plus, work.exponent_plus, LANES)
                    _split_powers(work.product_minus, work.exponent_minus, LANES)
                    _rescale(work)
            _give(work, order, first, lanes, state)
            if checked:
                for lane in range(lanes):
                    m = order[first + lane]
                    _check(work, lane, m, end, state, members, guard)
                    if members.status[m] == RUNNING:  # at or before the place it is read from
                        order[left] = m
                        left += 1
        step = end
        if checked:
            num_running = left
        if t < records.num_steps and records.steps[t] == step:
            for i in range(count):
                row = t * members.num_members + everyone[i]
                _copy(state, everyone[i], records.state, row)
                records.status[row] = members.status[everyone[i]]
            t += 1
    for later in range(t, records.num_steps):  # stopped members stay as they are
        for i in range(count):
            row = later * members.num_members + everyone[i]
            _copy(state, everyone[i], records.state, row)
            records.status[row] = members.status[everyone[i]]
    return step if num_running == 0 else stop
