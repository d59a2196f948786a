"""The steps of the diagonal linear network in Triton; `dlnlab.kernels.cuda` is the way in.

One program takes a block of `LANES` members through a whole launch. Its tensors are (coordinates, members), and all that
changes every step stays in registers: w+, w-, the two products and the sum of x. Only checks, records, renormalisations
and the ends of a launch touch the state's memory.

**How a warp is laid out.** Members go along the lanes first, what is left of the warp goes along coordinates (D = 30: 8
members by 4, each thread has 8 coordinates of one member), so a sum over coordinates is mostly inside a thread and two
exchanges end it. Triton derives a layout from the addresses that a program reads, and would put neighbouring
coordinates into neighbouring lanes, which takes eight times as many exchanges; `_places` hides from it that they are
neighbours.

**What bounds it** (an H200, float64, N x D = 20 x 30, counted, not measured). Full batches: a row of x is read from the
first-level cache for every member, at one number for two multiply-adds. That takes 16 of the 128-byte reads a
multiprocessor does per cycle for a row of 8 members, and the exchanges 4 more, while the multiply-adds take 8 cycles:
about 50 cycles a member-step of a multiprocessor, 0.2 ns a member-step of the device. Single rows: the arithmetic of the
update and of the stream's integers, about 8 cycles, 0.03 ns.

**A member's bits depend on no company.** There is one compiled kernel per (padded D, number type, full or drawn batches,
clean or noisy labels, constant or scheduled rates), which are the member's own; a column of a tensor is added up in the
same order whichever column it is; and members share nothing else. Therefore nothing that a launch decides is a
compile-time constant or an argument by value (Triton compiles a kernel anew for integers that are 1 or divisible by 16,
and passes floats in single precision): see `Plan`.

Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dlnlab.kernels import factors, guard

PERIOD = tl.constexpr(factors.PERIOD)
RUNNING, CONVERGED, DIVERGED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ABOVE_BOUND, NOT_FINITE = tl.constexpr(guard.ABOVE_BOUND), tl.constexpr(guard.NOT_FINITE)
INFINITY = tl.constexpr(float("inf"))
REPLACEMENT, SUBSET = tl.constexpr(0), tl.constexpr(1)  # the order of `dlnlab.streams.SAMPLINGS`; the third is epochs
LN2 = tl.constexpr(0.6931471805599453)
TWO_PI = tl.constexpr(6.283185307179586)
DRAWS = tl.constexpr(32)
"""Indices with replacement that are drawn at once."""
UNROLL = tl.constexpr(4)
"""Rows of x on their way at once."""
ROWS = tl.constexpr(256)
"""Room for the indices of a member; more only where one batch needs more."""


class State(NamedTuple):
    """`Factors`: the first ten as (E, D), the sums (E,)."""

    w_plus: Tensor
    w_minus: Tensor
    product_plus: Tensor
    product_minus: Tensor
    exponent_plus: Tensor
    exponent_minus: Tensor
    step_sum: Tensor
    log_decay: Tensor
    initial_plus: Tensor
    initial_minus: Tensor
    square_sum: Tensor
    largest_step: Tensor


class Members(NamedTuple):
    """What each member does, (E,) unless said."""

    scale: Tensor  # lr/decay/(rows of a batch)
    decay: Tensor  # 1 - 2 lr weight_decay
    problem: Tensor
    batch_size: Tensor  # rows of a batch: N for the full one
    sampling: Tensor
    sampling_key: Tensor  # (E, 2)
    noise_key: Tensor  # (E, 2)
    noise_std: Tensor
    status: Tensor
    stopped_at: Tensor
    bound: Tensor  # of the loss, float64
    cause: Tensor  # why a member has diverged


class Rates(NamedTuple):
    """`dlnlab.kernels.Rates`: float64, the schedule int64."""

    lr: Tensor  # (E,)
    weight_decay: Tensor  # (E,)
    schedule: Tensor  # (E,)
    lr_factor: Tensor  # (S, k)
    weight_decay_factor: Tensor  # (S, k)


class Problems(NamedTuple):
    """The data of P problems."""

    x: Tensor  # (P, N, COLUMNS), padded with zeros
    y: Tensor  # (P, N)


class Records(NamedTuple):
    """What is written at each of T steps, for every member: rows t E + m."""

    steps: Tensor  # (T,)
    state: State
    train_loss: Tensor
    status: Tensor


class Memory(NamedTuple):
    """What blocks work in, and what they report."""

    rows: Tensor  # int32, (blocks, drawn rows, LANES)
    order: Tensor  # int32, (blocks, N, LANES): the permutation of `subset` and `epochs`
    last: Tensor  # int64, (blocks,): the step at which a block had no member left that runs, or the last one


class Plan(NamedTuple):
    """The numbers of a launch, in memory so that the kernel is compiled for none of them."""

    integers: Tensor  # int64: see `advance`
    reals: Tensor  # float64: tol, floor, near, log(floor)


# Coordinates and members ----------------------------------------------------------------------------------------------


@triton.jit
def _places(SIZE: tl.constexpr):
    """The coordinates or lanes 0, 1, ..., of which Triton is told that they are scattered (see the top)."""
    return tl.max_contiguous(tl.arange(0, SIZE), 1)


@triton.jit
def _any(condition):
    """Whether a condition (coordinates, members) holds anywhere."""
    return tl.max(tl.max(condition.to(tl.int32), axis=0), axis=0) > 0


# Streams --------------------------------------------------------------------------------------------------------------


@triton.jit
def _words(key0, key1, position, step):
    """The four words at one position of a step, uint32 of the shape of `position`; `dlnlab.streams`."""
    zero = position.to(tl.uint32) * 0
    low, high = (step & 0xFFFFFFFF).to(tl.uint32) + zero, (step >> 32).to(tl.uint32) + zero
    return tl.philox_impl(position.to(tl.uint32), zero, low, high, key0 + zero, key1 + zero)


@triton.jit
def _word(key0, key1, number, step):
    """Word `number` of a step."""
    w0, w1, w2, w3 = _words(key0, key1, number // 4, step)
    place = number % 4
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def _uniform(high, low):
    """53 bits of two words as a number in [0, 1)."""
    return ((high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)) * 1.1102230246251565e-16


@triton.jit
def normal(key0, key1, number, step):
    """Standard normal number `number` of a step (Box-Muller)."""
    w0, w1, w2, w3 = _words(key0, key1, number // 2, step)
    radius = tl.sqrt(-2.0 * tl.log(1.0 - _uniform(w0, w1)))  # 1 - u is exact
    angle = TWO_PI * _uniform(w2, w3)
    return radius * tl.where(number % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def _shuffle(order, key0, key1, step, count, size, LANES: tl.constexpr):
    """Put `count` distinct indices out of `size` first in `order` (size, LANES): a partial Fisher-Yates shuffle."""
    lane = _places(LANES)
    tl.debug_barrier()  # whoever still reads the last order
    for i in range(0, size):
        tl.store(order + i * LANES + lane, lane * 0 + i)
    tl.debug_barrier()
    for i in range(0, count):
        word = _word(key0, key1, lane * 0 + i, step)
        pick = tl.umulhi(word, (lane * 0 + (size - i)).to(tl.uint32)).to(tl.int32) + i
        here = tl.load(order + i * LANES + lane)
        there = tl.load(order + pick * LANES + lane)
        tl.debug_barrier()  # several threads hold a member here, and one of them writes
        tl.store(order + i * LANES + lane, there)
        tl.store(order + pick * LANES + lane, here)
        tl.debug_barrier()


@triton.jit
def draw(rows, order, epoch, key0, key1, sampling, step, end, count, size, LANES: tl.constexpr):
    """The mini-batches of the steps step, ..., end - 1, one after another in `rows` (drawn rows, LANES).

    Returns:
        The epoch of which `order` is the permutation; drawn once, however many steps share it.
    """
    lane = _places(LANES)
    if sampling == REPLACEMENT:
        num_draws, per_step = ((end - step) * count).to(tl.int32), count.to(tl.int32)  # 64-bit division is slow
        number = tl.arange(0, DRAWS)[:, None] + tl.zeros([1, LANES], tl.int32)
        for first in range(0, num_draws, DRAWS):
            drawn = number + first
            word = _word(key0[None, :], key1[None, :], drawn % per_step, step + drawn // per_step)
            index = tl.umulhi(word, (number * 0 + size).to(tl.uint32)).to(tl.int32)
            tl.store(rows + drawn * LANES + lane[None, :], index, mask=drawn < num_draws)
    else:
        length = size // count
        for i in range(0, end - step):
            now = step + i
            place = now * 0
            if sampling == SUBSET:
                _shuffle(order, key0, key1, now, count, size, LANES)
            else:
                if now // length != epoch:
                    epoch = now // length
                    _shuffle(order, key0, key1, epoch, size, size, LANES)
                place = now % length * count
            for k in range(0, count):
                index = tl.load(order + (place + k) * LANES + lane)
                tl.store(rows + (i * count + k) * LANES + lane, index)
    tl.debug_barrier()
    return epoch


# The gain and the floor -----------------------------------------------------------------------------------------------


@triton.jit
def split_powers(product):
    """A product in [1/2, 1) and its power of two; zeros and non-finite ones stay as they are."""
    denormal = (tl.abs(product) < 2.2250738585072014e-308) & (product != 0)
    bits = tl.where(denormal, product * 18014398509481984.0, product).to(tl.int64, bitcast=True)  # 2^54
    field = (bits >> 52) & 0x7FF
    usual = (field != 0) & (field != 0x7FF)
    mantissa = ((bits & -9218868437227405313) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    power = tl.where(usual, field - 0x3FE, 0) - tl.where(denormal, 54, 0)
    return tl.where(usual, mantissa, product), power


@triton.jit
def _hold(w, initial, product, exponent, log_decay, floor, near, log_floor):
    """Factors near the floor set from their products, and never below the floor; `Factors.renormalise`."""
    log_size = tl.log(tl.abs(initial)) + log_decay[None, :] + (tl.log(tl.abs(product)) + exponent.to(tl.float64) * LN2)
    size = tl.where(log_size < log_floor, floor, tl.maximum(tl.exp(log_size), floor))
    signed = tl.where((initial < 0) != (product < 0), -size, size)
    # A factor that starts at zero, or is multiplied by it, stays there.
    return tl.where((tl.abs(w) <= near) & (initial != 0) & (product != 0), signed.to(w.dtype), w)


@triton.jit
def _renormalise(w, product, exponents, initials, log_decay, at, moving, floor, near, log_floor):
    """Both of the above for one factor, where `moving`; the exponents are changed in memory."""
    mantissa, power = split_powers(product)
    exponent = tl.load(exponents + at, mask=moving, other=0) + power
    tl.store(exponents + at, exponent, mask=moving)
    product = tl.where(moving, mantissa, product)
    if _any(moving & (tl.abs(w) <= near)):
        initial = tl.load(initials + at, mask=moving, other=0.0)
        w = _hold(w, initial, product, exponent, log_decay, floor, near, log_floor)
    return w, product


# Steps ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(beta, x_at, y_at, rows, count, noise_std, key0, key1, step, SAMPLED: tl.constexpr, NOISY: tl.constexpr,
              COLUMNS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """`count` times the gradient of the mini-batch loss in beta; each row of x is read once."""
    lane = _places(LANES)
    total = tl.zeros([COLUMNS, LANES], beta.dtype)
    for k in tl.range(0, count, loop_unroll_factor=UNROLL):
        if SAMPLED:
            row = tl.load(rows + k * LANES + lane)
            x, y = tl.load(x_at + (row * COLUMNS)[None, :]), tl.load(y_at + row)
        else:
            x, y = tl.load(x_at + k * COLUMNS), tl.load(y_at + k)
        residual = tl.sum(x * beta, axis=0) - y
        if NOISY:
            residual -= (noise_std * normal(key0, key1, lane * 0 + k, step)).to(beta.dtype)
        total = tl.fma(x, residual[None, :], total)
    return total


@triton.jit
def _loss(plus, minus, x_at, y_at, size, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """The full clean data loss of each member."""
    beta = (plus * plus - minus * minus) * 0.5
    squares = tl.zeros([LANES], tl.float64)
    for i in range(0, size):
        error = (tl.sum(tl.load(x_at + i * COLUMNS) * beta, axis=0) - tl.load(y_at + i)).to(tl.float64)
        squares += error * error
    return squares / (2 * size).to(tl.float64)


# A block of members ---------------------------------------------------------------------------------------------------


@triton.jit
def _write(target: State, at, sum_at, inside, mask, now, everything):
    """Registers to a state's memory, but for the exponents; `inside` masks (coordinates, members), `mask` members."""
    plus, minus, product_plus, product_minus, step_sum, log_decay, square_sum, largest_step = now
    tl.store(target.w_plus + at, plus, mask=inside)
    tl.store(target.w_minus + at, minus, mask=inside)
    if everything:
        tl.store(target.product_plus + at, product_plus, mask=inside)
        tl.store(target.product_minus + at, product_minus, mask=inside)
        tl.store(target.step_sum + at, step_sum, mask=inside)
        tl.store(target.log_decay + at, log_decay[None, :] + step_sum * 0, mask=inside)
        tl.store(target.square_sum + sum_at, square_sum, mask=mask)
        tl.store(target.largest_step + sum_at, largest_step, mask=mask)


@triton.jit
def _copy_exponents(source: State, source_at, target: State, target_at, inside):
    """The exponents of one state to another."""
    tl.store(target.exponent_plus + target_at, tl.load(source.exponent_plus + source_at, mask=inside), mask=inside)
    tl.store(target.exponent_minus + target_at, tl.load(source.exponent_minus + source_at, mask=inside), mask=inside)


@triton.jit
def _record(t, records: Records, state: State, places, now, status, loss, everything):
    """Write the block as it is as that of record step number t."""
    num_members, dim, m, j, at, inside, there = places
    row = t * num_members + m
    row_at = (row * dim)[None, :] + j[:, None]
    tl.debug_barrier()  # exponents that a check took back
    _write(records.state, row_at, row, inside, there, now, everything)
    if everything:
        _copy_exponents(state, at, records.state, row_at, inside)
    tl.store(records.train_loss + row, loss, mask=there)
    tl.store(records.status + row, status.to(tl.int8), mask=there)


@triton.jit
def advance(blocks, members: Members, rates: Rates, problems: Problems, state: State, kept: State, records: Records,
            memory: Memory, plan: Plan, SAMPLED: tl.constexpr, NOISY: tl.constexpr, SCHEDULED: tl.constexpr,
            COLUMNS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Take one block of members from one step to another.

    Args:
        blocks: Member numbers (blocks, LANES), int64, -1 for none. Members of a block have one batch size and sampling.
        members: Status, stopped_at and cause change in place.
        rates: Of the members whose lr or weight decay changes.
        problems: The data.
        state: Advanced in place; a stopped member stays as it is.
        kept: Each member at its last check, changed in place.
        records: Filled.
        memory: Scratch, and the last step of each block.
        plan: First and last step, the guard's period, the first record and the one after the last, whether records are of
            everything, N, D, E, the drawn rows there is room for, and the step of the first factor and how many there are.
        SAMPLED: Whether the block's batches are drawn, or full.
        NOISY: Whether their labels are.
        SCHEDULED: Whether their rates change with the step.
        COLUMNS: D, padded to a power of two.
        LANES: Members of a block.
    """
    block = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(plan.integers), tl.load(plan.integers + 1)
    every, t, num_records = tl.load(plan.integers + 2), tl.load(plan.integers + 3), tl.load(plan.integers + 4)
    everything, size, dim = tl.load(plan.integers + 5), tl.load(plan.integers + 6), tl.load(plan.integers + 7)
    num_members, room = tl.load(plan.integers + 8), tl.load(plan.integers + 9)
    tol, floor = tl.load(plan.reals), tl.load(plan.reals + 1)
    near, log_floor = tl.load(plan.reals + 2), tl.load(plan.reals + 3)

    lane, j = _places(LANES), _places(COLUMNS)
    m = tl.load(blocks + block * LANES + lane)
    there = m >= 0
    first = tl.load(blocks + block * LANES)  # never empty
    count, sampling = tl.load(members.batch_size + first), tl.load(members.sampling + first)
    m = tl.where(there, m, first)
    at = (m * dim)[None, :] + j[:, None]
    inside = (j < dim)[:, None] & there[None, :]

    # Coordinates beyond D and empty lanes have w+ = w- = 1, and x = 0: nothing moves them.
    plus, minus = tl.load(state.w_plus + at, mask=inside, other=1), tl.load(state.w_minus + at, mask=inside, other=1)
    product_plus = tl.load(state.product_plus + at, mask=inside, other=1)
    product_minus = tl.load(state.product_minus + at, mask=inside, other=1)
    step_sum = tl.load(state.step_sum + at, mask=inside, other=0)
    log_decay = tl.load(state.log_decay + m * dim)
    square_sum, largest_step = tl.load(state.square_sum + m), tl.load(state.largest_step + m)
    status, stopped_at = tl.load(members.status + m).to(tl.int32), tl.load(members.stopped_at + m)
    scale, decay = tl.load(members.scale + m), tl.load(members.decay + m)
    noise_std = tl.load(members.noise_std + m)
    sampling0 = tl.load(members.sampling_key + 2 * m).to(tl.uint32)
    sampling1 = tl.load(members.sampling_key + 2 * m + 1).to(tl.uint32)
    noise0 = tl.load(members.noise_key + 2 * m).to(tl.uint32)
    noise1 = tl.load(members.noise_key + 2 * m + 1).to(tl.uint32)
    if SCHEDULED:
        base_lr, base_decay = tl.load(rates.lr + m), tl.load(rates.weight_decay + m)
        factor_at = tl.load(rates.schedule + m) * tl.load(plan.integers + 11) - tl.load(plan.integers + 10)
    problem = tl.load(members.problem + m)
    x_at = problems.x + (problem * size * COLUMNS)[None, :] + j[:, None]
    y_at = problems.y + problem * size
    places = num_members, dim, m, j, at, inside, there
    rows = memory.rows + block * room * LANES
    order = memory.order + block * size * LANES

    running = there & (status == RUNNING)
    num_running = tl.sum(running.to(tl.int32), axis=0)
    step, epoch, any_ran = start, start * 0 - 1, num_running > 0
    while (step < stop) & (num_running > 0):
        end = tl.minimum(tl.minimum(step - step % PERIOD + PERIOD, step - step % every + every), stop)
        end = tl.minimum(end, tl.load(records.steps + t, mask=t < num_records, other=stop))
        if SAMPLED:
            end = tl.minimum(end, step + room // count)
            epoch = draw(rows, order, epoch, sampling0, sampling1, sampling, step, end, count, size, LANES)
        moving = running[None, :] & inside
        shrink = tl.where(running, decay, 1)
        log_shrink = tl.log(shrink.to(tl.float64))
        for i in range(0, end - step):
            if SCHEDULED:
                lr = base_lr * tl.load(rates.lr_factor + factor_at + step + i)
                kappa = base_decay * tl.load(rates.weight_decay_factor + factor_at + step + i)
                keep = 1.0 - 2.0 * lr * kappa
                scale = (lr / keep / count.to(tl.float64)).to(scale.dtype)
                shrink = tl.where(running, keep, 1.0).to(shrink.dtype)
                log_shrink = tl.log(shrink.to(tl.float64))
            beta = tl.fma(-minus, minus, plus * plus) * 0.5
            g = _gradient(beta, x_at, y_at, rows + i * count * LANES, count, noise_std, noise0, noise1, step + i,
                          SAMPLED, NOISY, COLUMNS, LANES)  # fmt: skip
            x = tl.where(moving, scale[None, :] * g, 0)
            plus, minus = tl.fma(-x, plus, plus) * shrink[None, :], tl.fma(x, minus, minus) * shrink[None, :]
            wide = x.to(tl.float64)
            product_plus, product_minus = (
                tl.fma(-wide, product_plus, product_plus),
                tl.fma(wide, product_minus, product_minus),
            )
            step_sum += wide
            log_decay += log_shrink
            square_sum += tl.sum(wide * wide, axis=0)
            length = tl.abs(wide)
            largest_step = tl.maximum(largest_step, tl.max(tl.where(length == length, length, 0), axis=0))
        step = end

        if step % PERIOD == 0:
            plus, product_plus = _renormalise(plus, product_plus, state.exponent_plus, state.initial_plus, log_decay, at,
                                              moving, floor, near, log_floor)  # fmt: skip
            minus, product_minus = _renormalise(minus, product_minus, state.exponent_minus, state.initial_minus,
                                                log_decay, at, moving, floor, near, log_floor)  # fmt: skip
        tl.debug_barrier()  # what one thread wrote to memory another may read from here on
        if step % every == 0:
            loss = _loss(plus, minus, x_at, y_at, size, COLUMNS, LANES)
            usual = (tl.abs(plus) < INFINITY) & (tl.abs(minus) < INFINITY)  # NaN is false
            finite = (tl.max((inside & ~usual).to(tl.int32), axis=0) == 0) & (loss < INFINITY)
            well = running & finite & (loss <= tl.load(members.bound + m))
            lost = running & ~well
            tl.store(members.cause + m, tl.where(finite, ABOVE_BOUND, NOT_FINITE).to(tl.int8), mask=lost)
            back, forth = inside & lost[None, :], inside & well[None, :]
            plus = tl.where(back, tl.load(kept.w_plus + at, mask=back, other=1), plus)
            minus = tl.where(back, tl.load(kept.w_minus + at, mask=back, other=1), minus)
            product_plus = tl.where(back, tl.load(kept.product_plus + at, mask=back, other=1), product_plus)
            product_minus = tl.where(back, tl.load(kept.product_minus + at, mask=back, other=1), product_minus)
            step_sum = tl.where(back, tl.load(kept.step_sum + at, mask=back, other=0), step_sum)
            log_decay = tl.where(lost, tl.load(kept.log_decay + m * dim), log_decay)
            square_sum = tl.where(lost, tl.load(kept.square_sum + m), square_sum)
            largest_step = tl.where(lost, tl.load(kept.largest_step + m), largest_step)
            _copy_exponents(kept, at, state, at, back)
            _copy_exponents(state, at, kept, at, forth)
            now = plus, minus, product_plus, product_minus, step_sum, log_decay, square_sum, largest_step
            _write(kept, at, m, forth, well, now, True)
            converged = well & (loss < tol)
            status = tl.where(lost, DIVERGED, tl.where(converged, CONVERGED, status))
            stopped_at = tl.where(lost, tl.maximum(step - every, 0), tl.where(converged, step, stopped_at))
            running = well & ~converged
            num_running = tl.sum(running.to(tl.int32), axis=0)
        if tl.load(records.steps + t, mask=t < num_records, other=stop + 1) == step:
            now = plus, minus, product_plus, product_minus, step_sum, log_decay, square_sum, largest_step
            loss = _loss(plus, minus, x_at, y_at, size, COLUMNS, LANES)
            _record(t, records, state, places, now, status, loss, everything)
            t += 1
    now = plus, minus, product_plus, product_minus, step_sum, log_decay, square_sum, largest_step
    loss = _loss(plus, minus, x_at, y_at, size, COLUMNS, LANES)
    while t < num_records:  # stopped members stay as they are
        _record(t, records, state, places, now, status, loss, everything)
        t += 1
    _write(state, at, m, inside, there, now, True)
    tl.store(members.status + m, status.to(tl.int8), mask=there)
    tl.store(members.stopped_at + m, stopped_at, mask=there)
    tl.store(memory.last + block, step, mask=any_ran)
