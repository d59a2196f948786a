"""The compiled steps of the diagonal linear network; `dlnlab.kernels.cpu` is the way in.

Read from the bottom up: `advance` takes one block of members after another from the first step to the last, stopping at
every renormalisation, check and record; three kinds of steps move it in between:

- `_single_row_steps`: one member, mini-batches of one row; the pass over the coordinates that ends a step begins the next
  (`_few_coordinates_steps`: the same where a member fits into registers);
- `_batch_steps`: one member, mini-batches of several rows or all; a row is read for its residual and, four rows later,
  for the gradient, while it is in the first-level cache;
- `_lanes_steps`: full batches, `LANES` members of one problem side by side; what is read of x serves all of them.

**A member's bits depend on no layout.** Sums run in an order written here, the same with vectors that hold coordinates
of one member or one coordinate of several members: a residual adds the coordinates 0, 8, 16, ..., those 1, 9, 17, ...
and so on, and then these eight sums; a gradient adds row after row. Everything else is element by element, or done
member by member.

Kernels are called with named tuples of arrays and pass them on as named tuples of pointers (`vectors.pointers`), so row
m of an (E, D) array begins at m D. The arrays of a block's `Work` are flat: coordinate after coordinate, and within a
coordinate lane after lane; a single member is a block of one lane. Coordinates are padded to a multiple of `PAD` with
w+ = w- = 1 and columns of zeros in x, which move nothing.

The compiled code is kept on disk and made anew when this file changes: after changing `vectors` or `cpu_streams` alone,
touch this file.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from dlnlab.kernels.caching import cached_njit
from dlnlab.kernels.cpu_streams import draw_normals, draw_rows
from dlnlab.kernels.factors import PERIOD
from dlnlab.kernels.guard import ABOVE_BOUND, LARGEST, NOT_FINITE
from dlnlab.kernels.vectors import (
    as_integers,
    double,
    fma,
    largest,
    load,
    peak,
    pointers,
    shift,
    splat,
    spread,
    store,
    total,
    width,
    zeros,
)

LANES = 16
"""Members side by side in a full-batch block."""
PAD = 16
"""Coordinates are padded to a multiple of this."""
STRETCH = 128
"""Columns whose eight sums are taken in turn: they stay in the first-level cache."""
RUNNING, CONVERGED, DIVERGED = range(3)

_LN2 = math.log(2)

part = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Parts of a kernel: compiled into the one function that is called, `advance`."""


class Problems(NamedTuple):
    """The data of P problems, padded with zeros to N' rows and D' columns."""

    x: np.ndarray  # (P, N', D')
    y: np.ndarray  # (P, N')
    squares: np.ndarray  # (P, N): |x_i|^2, float64
    peaks: np.ndarray  # (P, N): max_j |x_ij|, float64
    num_samples: int
    dim: int
    rows: int  # N'
    columns: int  # D'


class State(NamedTuple):
    """The `Factors` of all members as arrays, but for the initial values."""

    w_plus: np.ndarray  # (E, D), as all but the last two
    w_minus: np.ndarray
    product_plus: np.ndarray
    product_minus: np.ndarray
    exponent_plus: np.ndarray
    exponent_minus: np.ndarray
    step_sum: np.ndarray
    log_decay: np.ndarray
    square_sum: np.ndarray  # (E,)
    largest_step: np.ndarray  # (E,)


class Members(NamedTuple):
    """What each member does, (E,) unless said."""

    lr: np.ndarray
    decay: np.ndarray  # 1 - 2 lr weight_decay
    problem: np.ndarray
    batch_size: np.ndarray  # 0 = full
    sampling: np.ndarray  # as in `cpu_streams`
    sampling_key: np.ndarray  # (E, 2)
    noise_key: np.ndarray  # (E, 2)
    noise_std: np.ndarray
    initial_plus: np.ndarray  # (E, D)
    initial_minus: np.ndarray  # (E, D)
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
    everything: bool  # else only w+ and w- of the state
    train_loss: np.ndarray
    status: np.ndarray


class Memory(NamedTuple):
    """What a block works in; `new_memory` makes it."""

    numbers: np.ndarray  # of the data's type
    doubles: np.ndarray
    integers: np.ndarray
    beta: np.ndarray  # (D'), zero, of the data's type
    sums: np.ndarray  # (32 LANES,), of the data's type: those of four rows that wait
    rows: np.ndarray  # drawn in a period
    all_rows: np.ndarray  # (N,): 0, 1, ...
    order: np.ndarray  # (N + 1,), for `draw_rows`


class Work(NamedTuple):
    """One block of members: coordinates by lanes, flat."""

    w_plus: np.ndarray
    w_minus: np.ndarray
    product_plus: np.ndarray
    product_minus: np.ndarray
    exponent_plus: np.ndarray
    exponent_minus: np.ndarray
    step_sum: np.ndarray
    initial_plus: np.ndarray
    initial_minus: np.ndarray
    beta: np.ndarray
    gradient: np.ndarray
    residual: np.ndarray  # samples by lanes
    noise: np.ndarray  # likewise, or one for each step on one row
    scale: np.ndarray  # by step of a period and lane: lr/decay/(rows of a batch)
    decay: np.ndarray  # likewise: 1 - 2 lr weight_decay
    log_decay: np.ndarray  # by lane, as all below
    square_sum: np.ndarray
    largest_step: np.ndarray
    loss: np.ndarray  # when last computed


# Element by element ---------------------------------------------------------------------------------------------------


@part
def _set_beta(work, size, like):
    """Beta = (w+^2 - w-^2)/2."""
    half = splat(0.5, like)
    for o in range(0, size, width(like)):
        plus, minus = load(work.w_plus, o, like), load(work.w_minus, o, like)
        store(work.beta, o, fma(-minus, minus, plus * plus) * half)


@part
def _update(work, size, scale, decay):
    """One step along `work.gradient`, which becomes x = scale g; beta follows."""
    half = splat(0.5, scale)
    for o in range(0, size, width(scale)):
        x = scale * load(work.gradient, o, scale)
        store(work.gradient, o, x)
        plus, minus = load(work.w_plus, o, scale), load(work.w_minus, o, scale)
        plus, minus = fma(-x, plus, plus) * decay, fma(x, minus, minus) * decay
        store(work.w_plus, o, plus)
        store(work.w_minus, o, minus)
        store(work.beta, o, fma(-minus, minus, plus * plus) * half)
        _accumulate(work, o, double(x))


@part
def _accumulate(work, o, x):
    """The gain's part of a step, in double precision."""
    product = load(work.product_plus, o, x)
    store(work.product_plus, o, fma(-x, product, product))
    product = load(work.product_minus, o, x)
    store(work.product_minus, o, fma(x, product, product))
    store(work.step_sum, o, load(work.step_sum, o, x) + x)


@part
def _renormalise(work, size, lanes, floor, near):
    """`Factors.renormalise`."""
    _split_powers(work.product_plus, work.exponent_plus, size)
    _split_powers(work.product_minus, work.exponent_minus, size)
    _hold(
        work.w_plus, work.initial_plus, work.product_plus, work.exponent_plus, work.log_decay, size, lanes, floor, near
    )
    _hold(
        work.w_minus,
        work.initial_minus,
        work.product_minus,
        work.exponent_minus,
        work.log_decay,
        size,
        lanes,
        floor,
        near,
    )


@part
def _split_powers(product, exponent, size):
    """Bring products to [1/2, 1), the powers of two going into the exponents; zeros and non-finite ones stay."""
    bits, odd = as_integers(product), 0
    for i in range(size):
        field = (bits[i] >> 52) & 0x7FF
        normal = (field != 0) & (field != 0x7FF)
        odd += not normal
        bits[i] = (bits[i] & ~(0x7FF << 52)) | (0x3FE << 52) if normal else bits[i]
        exponent[i] += field - 0x3FE if normal else 0
    if odd:
        for i in range(size):
            if product[i] != 0 and abs(product[i]) < 0.5:  # it was a denormal number
                product[i], power = math.frexp(product[i])
                exponent[i] += power


@part
def _hold(w, initial, product, exponent, log_decay, size, lanes, floor, near):
    """Set factors near the floor from their products, and never below the floor."""
    low = 0
    for i in range(size):
        low += abs(w[i]) <= near
    if low == 0:
        return
    log_floor = math.log(floor)
    for i in range(size):
        if abs(w[i]) <= near and initial[i] != 0:  # a factor that starts at zero stays there
            log_size = math.log(abs(initial[i])) + log_decay[i % lanes] + exponent[i] * _LN2
            length = floor
            if not log_size < log_floor:  # else it is below the floor whatever the product's mantissa
                length = math.exp(log_size + math.log(abs(product[i])))
                if length < floor:
                    length = floor
            w[i] = -length if (initial[i] < 0) != (product[i] < 0) else length


# Residuals and gradients ----------------------------------------------------------------------------------------------


@part
def _row_sum(x, row, columns, beta, zero):
    """<x_row, beta> for a row at a flat offset."""
    sums = zero
    for o in range(0, columns, width(zero)):
        sums = fma(load(x, row + o, zero), load(beta, o, zero), sums)
    return total(sums)


@part
def _four_row_sums(x, r0, r1, r2, r3, columns, beta, zero):
    """The same for four rows."""
    s0, s1, s2, s3 = zero, zero, zero, zero
    for o in range(0, columns, width(zero)):
        b = load(beta, o, zero)
        s0, s1 = fma(load(x, r0 + o, zero), b, s0), fma(load(x, r1 + o, zero), b, s1)
        s2, s3 = fma(load(x, r2 + o, zero), b, s2), fma(load(x, r3 + o, zero), b, s3)
    return total(s0), total(s1), total(s2), total(s3)


@part
def _gradient(work, problems, p, rows, count, zero):
    """The sum of r_i x_i over `count` rows, r_i = <x_i, beta> - y_i - noise_i, for one member."""
    x, y, columns, first = problems.x, shift(problems.y, p * problems.rows), problems.columns, p * problems.rows
    for o in range(0, columns, width(zero)):
        store(work.gradient, o, zero)
    i = 0
    while count - i >= 4:
        i0, i1, i2, i3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        a0, a1, a2, a3 = (first + i0) * columns, (first + i1) * columns, (first + i2) * columns, (first + i3) * columns
        s0, s1, s2, s3 = _four_row_sums(x, a0, a1, a2, a3, columns, work.beta, zero)
        r0, r1 = splat(s0 - y[i0] - work.noise[i], zero), splat(s1 - y[i1] - work.noise[i + 1], zero)
        r2, r3 = splat(s2 - y[i2] - work.noise[i + 2], zero), splat(s3 - y[i3] - work.noise[i + 3], zero)
        for o in range(0, columns, width(zero)):
            g = fma(load(x, a1 + o, zero), r1, fma(load(x, a0 + o, zero), r0, load(work.gradient, o, zero)))
            store(work.gradient, o, fma(load(x, a3 + o, zero), r3, fma(load(x, a2 + o, zero), r2, g)))
        i += 4
    while i < count:
        at = (first + rows[i]) * columns
        r = splat(_row_sum(x, at, columns, work.beta, zero) - y[rows[i]] - work.noise[i], zero)
        for o in range(0, columns, width(zero)):
            store(work.gradient, o, fma(load(x, at + o, zero), r, load(work.gradient, o, zero)))
        i += 1


@part
def _two_classes(x, at, columns, begin, end, v, sums, more, zero):
    """The sums of x_ij v_j over j = begin, begin + 8, ... and over j = begin + 4, begin + 12, ... of four rows.

    Args:
        x: The rows, from `at` on.
        at: The first row.
        columns: From a row to the next.
        begin: The first j.
        end: No j beyond; a multiple of 8.
        v: (D', LANES).
        sums: Where they go, (2, 4, LANES).
        more: Whether they are added to what is there.
        zero: A vector of `LANES`.
    """
    r1, r2, r3 = at + columns, at + 2 * columns, at + 3 * columns
    s0, s1, s2, s3, t0, t1, t2, t3 = zero, zero, zero, zero, zero, zero, zero, zero
    if more:
        s0, s1 = load(sums, 0, zero), load(sums, LANES, zero)
        s2, s3 = load(sums, 2 * LANES, zero), load(sums, 3 * LANES, zero)
        t0, t1 = load(sums, 4 * LANES, zero), load(sums, 5 * LANES, zero)
        t2, t3 = load(sums, 6 * LANES, zero), load(sums, 7 * LANES, zero)
    for j in range(begin, end, 8):
        a, b = load(v, j * LANES, zero), load(v, (j + 4) * LANES, zero)
        s0, s1 = fma(spread(x, at + j, zero), a, s0), fma(spread(x, r1 + j, zero), a, s1)
        s2, s3 = fma(spread(x, r2 + j, zero), a, s2), fma(spread(x, r3 + j, zero), a, s3)
        t0, t1 = fma(spread(x, at + j + 4, zero), b, t0), fma(spread(x, r1 + j + 4, zero), b, t1)
        t2, t3 = fma(spread(x, r2 + j + 4, zero), b, t2), fma(spread(x, r3 + j + 4, zero), b, t3)
    store(sums, 0, s0)
    store(sums, LANES, s1)
    store(sums, 2 * LANES, s2)
    store(sums, 3 * LANES, s3)
    store(sums, 4 * LANES, t0)
    store(sums, 5 * LANES, t1)
    store(sums, 6 * LANES, t2)
    store(sums, 7 * LANES, t3)


@part
def _residuals_lanes(work, problems, p, sums, zero):
    """<x_i, beta> of `LANES` members, in the order of `_row_sum`: four rows at a time, `STRETCH` columns at a time."""
    size, pair = (problems.dim + 7) // 8 * 8, 8 * LANES
    for i in range(0, problems.num_samples, 4):
        at = (p * problems.rows + i) * problems.columns
        for begin in range(0, size, STRETCH):
            end = min(begin + STRETCH, size)
            for c in range(4):
                at_sums = shift(sums, c * pair)
                _two_classes(problems.x, at, problems.columns, begin + c, end, work.beta, at_sums, begin > 0, zero)
        for o in range(0, 4 * LANES, LANES):
            s04 = load(sums, o, zero) + load(sums, o + 4 * LANES, zero)
            s15 = load(sums, o + pair, zero) + load(sums, o + pair + 4 * LANES, zero)
            s26 = load(sums, o + 2 * pair, zero) + load(sums, o + 2 * pair + 4 * LANES, zero)
            s37 = load(sums, o + 3 * pair, zero) + load(sums, o + 3 * pair + 4 * LANES, zero)
            store(work.residual, i * LANES + o, (s04 + s26) + (s15 + s37))


@part
def _gradient_lanes(work, problems, p, zero):
    """The sum of r_i x_i for `LANES` members, row after row as in `_gradient`; eight coordinates at a time."""
    x, columns, first = problems.x, problems.columns, p * problems.rows * problems.columns
    for j in range(0, problems.dim, 8):
        g0, g1, g2, g3, g4, g5, g6, g7 = zero, zero, zero, zero, zero, zero, zero, zero
        for i in range(problems.num_samples):
            r, at = load(work.residual, i * LANES, zero), first + i * columns + j
            g0, g1 = fma(spread(x, at, zero), r, g0), fma(spread(x, at + 1, zero), r, g1)
            g2, g3 = fma(spread(x, at + 2, zero), r, g2), fma(spread(x, at + 3, zero), r, g3)
            g4, g5 = fma(spread(x, at + 4, zero), r, g4), fma(spread(x, at + 5, zero), r, g5)
            g6, g7 = fma(spread(x, at + 6, zero), r, g6), fma(spread(x, at + 7, zero), r, g7)
        o = j * LANES
        store(work.gradient, o, g0)
        store(work.gradient, o + LANES, g1)
        store(work.gradient, o + 2 * LANES, g2)
        store(work.gradient, o + 3 * LANES, g3)
        store(work.gradient, o + 4 * LANES, g4)
        store(work.gradient, o + 5 * LANES, g5)
        store(work.gradient, o + 6 * LANES, g6)
        store(work.gradient, o + 7 * LANES, g7)


# Steps ----------------------------------------------------------------------------------------------------------------


@part
def _add_to_sums(work, size, zero):
    """|x|^2 and max |x| of a step just taken by one member."""
    squares, most = double(zero), double(zero)
    for o in range(0, size, width(zero)):
        x = double(load(work.gradient, o, zero))
        squares, most = fma(x, x, squares), largest(x, most)
    work.square_sum[0] += total(squares)
    work.largest_step[0] = max(work.largest_step[0], peak(most))


@part
def _add_to_sums_lanes(work, dim, zero):
    """The same for `LANES` members, in the same order: eight partial sums, upper half onto lower half."""
    wide = double(zero)
    s0, s1, s2, s3, s4, s5, s6, s7 = wide, wide, wide, wide, wide, wide, wide, wide
    most = load(work.largest_step, 0, zero)
    for o in range(0, dim * LANES, 8 * LANES):
        x0, x1 = double(load(work.gradient, o, zero)), double(load(work.gradient, o + LANES, zero))
        x2, x3 = double(load(work.gradient, o + 2 * LANES, zero)), double(load(work.gradient, o + 3 * LANES, zero))
        x4, x5 = double(load(work.gradient, o + 4 * LANES, zero)), double(load(work.gradient, o + 5 * LANES, zero))
        x6, x7 = double(load(work.gradient, o + 6 * LANES, zero)), double(load(work.gradient, o + 7 * LANES, zero))
        s0, s1, s2, s3 = fma(x0, x0, s0), fma(x1, x1, s1), fma(x2, x2, s2), fma(x3, x3, s3)
        s4, s5, s6, s7 = fma(x4, x4, s4), fma(x5, x5, s5), fma(x6, x6, s6), fma(x7, x7, s7)
        most = largest(x0, largest(x1, largest(x2, largest(x3, most))))
        most = largest(x4, largest(x5, largest(x6, largest(x7, most))))
    squares = ((s0 + s4) + (s2 + s6)) + ((s1 + s5) + (s3 + s7))
    store(work.square_sum, 0, load(work.square_sum, 0, zero) + squares)
    store(work.largest_step, 0, most)


@part
def _lanes_steps(work, members, block, problems, p, sums, start, stop):
    """Full-batch steps of `LANES` members."""
    n, first, size = problems.num_samples, p * problems.rows, (problems.dim + 7) // 8 * 8
    zero = zeros(work.beta, LANES)
    _set_beta(work, problems.columns * LANES, zero)
    noisy = False
    for lane in range(LANES):
        noisy |= block[lane] >= 0 and members.noise_std[block[lane]] > 0
    for step in range(start, stop):
        _residuals_lanes(work, problems, p, sums, zero)
        for i in range(n):
            store(work.residual, i * LANES, load(work.residual, i * LANES, zero) - spread(problems.y, first + i, zero))
        if noisy:
            for lane in range(LANES):
                m = block[lane]
                if m >= 0 and members.noise_std[m] > 0:
                    draw_normals(
                        shift(members.noise_key, 2 * m), step, n, members.noise_std[m], work.noise, lane, LANES
                    )
            for i in range(n * LANES):
                work.residual[i] -= work.noise[i]
        _gradient_lanes(work, problems, p, zero)
        at = (step - start) * LANES
        _update(work, size * LANES, load(work.scale, at, zero), load(work.decay, at, zero))
        _add_to_sums_lanes(work, size, zero)


@part
def _batch_steps(work, members, m, problems, p, count, rows, step_rows, start, stop):
    """Steps of one member on `count` rows each; those of the steps from `start` on are `step_rows` apart in `rows`."""
    zero, wide = zeros(work.beta, 8), zeros(work.beta, PAD)
    _set_beta(work, problems.columns, wide)
    for step in range(start, stop):
        if members.noise_std[m] > 0:
            draw_normals(shift(members.noise_key, 2 * m), step, count, members.noise_std[m], work.noise, 0, 1)
        _gradient(work, problems, p, shift(rows, (step - start) * step_rows), count, zero)
        _update(work, problems.columns, splat(work.scale[step - start], wide), splat(work.decay[step - start], wide))
        _add_to_sums(work, problems.columns, zero)


@part
def _single_row_steps(work, problems, p, decays, rows, start, stop):
    """Steps of one member on one row each: x = lr r x_i, and the pass that updates also finds the next residual.

    Args:
        work: The member.
        problems: The data.
        p: The member's problem.
        decays: 1 - c of each step, or None for a kernel without weight decay.
        rows: Those of the steps from `start` on.
        start: The first step.
        stop: The step after the last.
    """
    num_rows, columns = problems.rows, problems.columns
    zero = zeros(work.beta, PAD)
    partial = zero  # of <x_i, w+^2 - w-^2>, which is twice the prediction
    for o in range(0, columns, width(zero)):
        plus, minus = load(work.w_plus, o, zero), load(work.w_minus, o, zero)
        row = load(problems.x, (p * num_rows + rows[0]) * columns + o, zero)
        partial = fma(row, fma(-minus, minus, plus * plus), partial)
    for step in range(start, stop):
        i = rows[step - start]
        following = rows[min(step + 1, stop - 1) - start]
        here, there = (p * num_rows + i) * columns, (p * num_rows + following) * columns
        doubled = total(partial) - 2 * (problems.y[p * num_rows + i] + work.noise[step - start])
        factor = work.scale[step - start] / 2 * doubled
        along = splat(factor, zero)
        if decays is not None:
            decay = splat(decays[step - start], zero)
        partial = zero
        for o in range(0, columns, width(zero)):
            x = along * load(problems.x, here + o, zero)
            plus, minus = load(work.w_plus, o, zero), load(work.w_minus, o, zero)
            plus, minus = fma(-x, plus, plus), fma(x, minus, minus)
            if decays is not None:
                plus, minus = plus * decay, minus * decay
            store(work.w_plus, o, plus)
            store(work.w_minus, o, minus)
            partial = fma(load(problems.x, there + o, zero), fma(-minus, minus, plus * plus), partial)
        work.residual[step - start] = factor


@part
def _few_coordinates_steps(work, problems, p, rows, start, stop, zero):
    """`_single_row_steps` and `_accumulate_rows` in one, for a member whose coordinates are one vector in registers."""
    at, y = p * problems.rows * problems.columns, shift(problems.y, p * problems.rows)
    plus, minus, wide = load(work.w_plus, 0, zero), load(work.w_minus, 0, zero), double(zero)
    product_plus, product_minus = load(work.product_plus, 0, wide), load(work.product_minus, 0, wide)
    step_sum = load(work.step_sum, 0, wide)
    for step in range(start, stop):
        i = rows[step - start]
        row = load(problems.x, at + i * problems.columns, zero)
        decay = splat(work.decay[step - start], zero)
        doubled = total(row * fma(-minus, minus, plus * plus)) - 2 * (y[i] + work.noise[step - start])
        factor = work.scale[step - start] / 2 * doubled
        along = splat(factor, zero)  # what it is multiplied by is known before it: four cycles less to wait
        plus, minus = fma(-along, row * plus, plus) * decay, fma(along, row * minus, minus) * decay
        x = double(along * row)
        product_plus, product_minus = fma(-x, product_plus, product_plus), fma(x, product_minus, product_minus)
        step_sum = step_sum + x
        work.residual[step - start] = factor
    store(work.w_plus, 0, plus)
    store(work.w_minus, 0, minus)
    store(work.product_plus, 0, product_plus)
    store(work.product_minus, 0, product_minus)
    store(work.step_sum, 0, step_sum)


@part
def _add_to_sums_of_rows(work, problems, p, rows, count):
    """|x|^2 and max |x| of `count` steps x = factor x_i, the factors being left in `work.residual`."""
    first = p * problems.num_samples
    for t in range(count):
        size = abs(np.float64(work.residual[t]))
        work.square_sum[0] += size * size * problems.squares[first + rows[t]]
        work.largest_step[0] = max(work.largest_step[0], size * problems.peaks[first + rows[t]])


@part
def _accumulate_rows(work, problems, p, rows, count):
    """The gain's part of `count` steps x = factor x_i at once, the factors being left in `work.residual`.

    Coordinate by coordinate the same multiplications in the same order as step by step, but in registers.
    """
    num_rows, columns = problems.rows, problems.columns
    zero = zeros(work.beta, PAD)
    wide = double(zero)
    for o in range(0, columns, PAD):
        plus, minus = load(work.product_plus, o, wide), load(work.product_minus, o, wide)
        step_sum = load(work.step_sum, o, wide)
        for t in range(count):
            row = load(problems.x, (p * num_rows + rows[t]) * columns + o, zero)
            x = double(spread(work.residual, t, zero) * row)
            plus, minus, step_sum = fma(-x, plus, plus), fma(x, minus, minus), step_sum + x
        store(work.product_plus, o, plus)
        store(work.product_minus, o, minus)
        store(work.step_sum, o, step_sum)


# Checks and records ---------------------------------------------------------------------------------------------------


@part
def _copy_array(source, a, target, b, count):
    """Alone in its loop, so that the compiler makes it a few instructions."""
    for j in range(count):
        target[b + j] = source[a + j]


@part
def _copy(source, m, target, t, dim):
    """Row m of a state, to row t of another."""
    a, b = m * dim, t * dim
    _copy_array(source.w_plus, a, target.w_plus, b, dim)
    _copy_array(source.w_minus, a, target.w_minus, b, dim)
    _copy_array(source.product_plus, a, target.product_plus, b, dim)
    _copy_array(source.product_minus, a, target.product_minus, b, dim)
    _copy_array(source.exponent_plus, a, target.exponent_plus, b, dim)
    _copy_array(source.exponent_minus, a, target.exponent_minus, b, dim)
    _copy_array(source.step_sum, a, target.step_sum, b, dim)
    _copy_array(source.log_decay, a, target.log_decay, b, dim)
    target.square_sum[t], target.largest_step[t] = source.square_sum[m], source.largest_step[m]


@part
def _loss(state, m, problems, p, beta):
    """The full clean data loss of member m; `beta` is scratch, zero beyond the problem's dimension."""
    n, d, columns, zero = problems.num_samples, problems.dim, problems.columns, zeros(beta, 8)
    x, y = shift(problems.x, p * problems.rows * columns), shift(problems.y, p * problems.rows)
    for j in range(d):
        plus, minus = state.w_plus[m * d + j], state.w_minus[m * d + j]
        beta[j] = (plus * plus - minus * minus) / 2
    squares = 0.0
    for i in range(0, n, 4):  # beyond N there are rows of zeros
        at = i * columns
        s0, s1, s2, s3 = _four_row_sums(x, at, at + columns, at + 2 * columns, at + 3 * columns, columns, beta, zero)
        e0, e1 = np.float64(s0 - y[i]), np.float64(s1 - y[i + 1])
        e2, e3 = np.float64(s2 - y[i + 2]), np.float64(s3 - y[i + 3])
        squares += e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3
    return squares / (2 * n)


@part
def _check(m, step, loss, state, dim, members, guard):
    """`LinearNetwork.check_members` for one running member."""
    beyond = 0
    for i in range(m * dim, (m + 1) * dim):
        beyond += not (abs(state.w_plus[i]) <= LARGEST and abs(state.w_minus[i]) <= LARGEST)  # NaN is false
    finite = beyond == 0 and loss <= LARGEST
    if not (finite and loss <= guard.bound[m]):
        _copy(guard.kept, m, state, m, dim)
        members.status[m] = DIVERGED
        guard.cause[m] = ABOVE_BOUND if finite else NOT_FINITE
        members.stopped_at[m] = max(step - guard.every_n_steps, 0)
    else:
        _copy(state, m, guard.kept, m, dim)
        if loss < guard.tol:
            members.status[m] = CONVERGED
            members.stopped_at[m] = step


@part
def _record(t, m, loss, state, dim, members, records):
    """Write member m's state as that of record step number t."""
    row = t * members.num_members + m
    if records.everything:
        _copy(state, m, records.state, row, dim)
    else:
        _copy_array(state.w_plus, m * dim, records.state.w_plus, row * dim, dim)
        _copy_array(state.w_minus, m * dim, records.state.w_minus, row * dim, dim)
    records.train_loss[row] = loss
    records.status[row] = members.status[m]


# Blocks ---------------------------------------------------------------------------------------------------------------


def new_memory(problems: Problems, largest_batch: int) -> Memory:
    """Memory for one thread.

    Args:
        problems: The data.
        largest_batch: The largest batch size that is not full.
    """
    coordinates, dtype = problems.columns * LANES, problems.x.dtype
    numbers = 4 * coordinates + 2 * max(problems.rows * LANES, largest_batch + PAD, PERIOD) + 2 * PERIOD * LANES
    return Memory(
        aligned_zeros(numbers, dtype), aligned_zeros(5 * coordinates + 4 * LANES, np.float64),
        aligned_zeros(2 * coordinates, np.int64), aligned_zeros(problems.columns, dtype), aligned_zeros(32 * LANES, dtype),
        np.zeros(PERIOD * largest_batch, np.int64), np.arange(problems.num_samples),
        np.zeros(problems.num_samples + 1, np.int64),
    )  # fmt: skip


def aligned_zeros(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that begin on a cache line: a vector across two costs twice."""
    raw = np.zeros(size * np.dtype(dtype).itemsize + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size * np.dtype(dtype).itemsize].view(dtype)


@part
def _rounded(count):
    """Up to the next multiple of `PAD`, so that what follows in memory begins where a vector may."""
    return (count + PAD - 1) // PAD * PAD


@part
def _new_work(memory, problems, lanes, num_rows):
    """A block of idle lanes in the given memory.

    Args:
        memory: Where it lives.
        problems: The data.
        lanes: 1 or LANES.
        num_rows: Rows of a batch.
    """
    size, row = problems.columns * lanes, _rounded(lanes)
    rows = _rounded(max(problems.rows * lanes, num_rows, PERIOD))
    numbers, doubles, integers = memory.numbers, memory.doubles, memory.integers
    for i in range(4 * size + 2 * rows):
        numbers[i] = 0
    for i in range(5 * size + 4 * row):
        doubles[i] = 0
    for i in range(2 * size):
        integers[i] = 0
    of_rows, of_lanes, sums = shift(numbers, 4 * size), shift(numbers, 4 * size + 2 * rows), shift(doubles, 5 * size)
    work = Work(
        w_plus=numbers, w_minus=shift(numbers, size), beta=shift(numbers, 2 * size), gradient=shift(numbers, 3 * size),
        residual=of_rows, noise=shift(of_rows, rows),
        scale=of_lanes, decay=shift(of_lanes, PERIOD * lanes),
        product_plus=doubles, product_minus=shift(doubles, size), step_sum=shift(doubles, 2 * size),
        initial_plus=shift(doubles, 3 * size), initial_minus=shift(doubles, 4 * size),
        log_decay=sums, square_sum=shift(sums, row), largest_step=shift(sums, 2 * row), loss=shift(sums, 3 * row),
        exponent_plus=integers, exponent_minus=shift(integers, size),
    )  # fmt: skip
    for lane in range(lanes):
        _idle(work, lane, lanes, problems.columns)
    return work


@part
def _idle(work, lane, lanes, columns):
    """Make a lane one that nothing moves, so that a stopped member's numbers slow nobody."""
    for i in range(lane, columns * lanes, lanes):
        work.w_plus[i], work.w_minus[i] = 1, 1
        work.product_plus[i], work.product_minus[i] = 1, 1
        work.initial_plus[i], work.initial_minus[i] = 1, 1
    _set_constant_rate(work, lane, lanes, 0, 1)
    work.log_decay[lane] = 0


@part
def _set_constant_rate(work, lane, lanes, scale, decay):
    """Of all steps."""
    for i in range(lane, PERIOD * lanes, lanes):
        work.scale[i], work.decay[i] = scale, decay


@part
def _set_rates(work, lane, lanes, m, count, rates, start, stop):
    """Those of the steps start, ..., stop - 1 of a member with a schedule, on `count` rows each."""
    at = rates.schedule[m] * rates.num_steps - rates.first
    for step in range(start, stop):
        lr = rates.lr[m] * rates.lr_factor[at + step]
        decay = 1 - 2 * lr * (rates.weight_decay[m] * rates.weight_decay_factor[at + step])
        i = (step - start) * lanes + lane
        work.scale[i], work.decay[i] = lr / decay / count, decay


@part
def _take(work, lane, lanes, state, members, m, problems):
    """Copy member m into a lane."""
    for j in range(problems.dim):
        i, a = j * lanes + lane, m * problems.dim + j
        work.w_plus[i], work.w_minus[i] = state.w_plus[a], state.w_minus[a]
        work.product_plus[i], work.product_minus[i] = state.product_plus[a], state.product_minus[a]
        work.exponent_plus[i], work.exponent_minus[i] = state.exponent_plus[a], state.exponent_minus[a]
        work.step_sum[i] = state.step_sum[a]
        work.initial_plus[i], work.initial_minus[i] = members.initial_plus[a], members.initial_minus[a]
    count = members.batch_size[m] if members.batch_size[m] > 0 else problems.num_samples
    _set_constant_rate(work, lane, lanes, members.lr[m] / members.decay[m] / count, members.decay[m])
    work.log_decay[lane] = state.log_decay[m * problems.dim]
    work.square_sum[lane], work.largest_step[lane] = state.square_sum[m], state.largest_step[m]


@part
def _give(work, lane, lanes, state, m, dim):
    """Copy a lane back to member m."""
    for j in range(dim):
        i, a = j * lanes + lane, m * dim + j
        state.w_plus[a], state.w_minus[a] = work.w_plus[i], work.w_minus[i]
        state.product_plus[a], state.product_minus[a] = work.product_plus[i], work.product_minus[i]
        state.exponent_plus[a], state.exponent_minus[a] = work.exponent_plus[i], work.exponent_minus[i]
        state.step_sum[a] = work.step_sum[i]
        state.log_decay[a] = work.log_decay[lane]
    state.square_sum[m], state.largest_step[m] = work.square_sum[lane], work.largest_step[lane]


@part
def _steps(work, lanes, members, block, problems, memory, start, stop, rates):
    """Take the steps start, ..., stop - 1 of a block, at most `PERIOD`."""
    first, columns = block[0], problems.columns
    p, count, rows = members.problem[first], members.batch_size[first], memory.rows
    for lane in range(lanes):
        m = block[lane]
        if m >= 0 and rates.schedule[m] >= 0 and members.status[m] == RUNNING:
            seen = count if count > 0 else problems.num_samples
            _set_rates(work, lane, lanes, m, seen, rates, start, stop)
    if count > 0:
        key, size = shift(members.sampling_key, 2 * first), problems.num_samples
        draw_rows(members.sampling[first], key, start, stop, count, size, rows, memory.order)
    if lanes > 1:
        _lanes_steps(work, members, block, problems, p, memory.sums, start, stop)
    elif count == 0:
        _batch_steps(work, members, first, problems, p, problems.num_samples, memory.all_rows, 0, start, stop)
    elif count > 1:
        _batch_steps(work, members, first, problems, p, count, rows, count, start, stop)
    else:
        if members.noise_std[first] > 0:
            key = shift(members.noise_key, 2 * first)
            for step in range(start, stop):
                draw_normals(key, step, 1, members.noise_std[first], work.noise, step - start, 1)
        if columns == 16:
            _few_coordinates_steps(work, problems, p, rows, start, stop, zeros(work.beta, 16))
        elif columns == 32:
            _few_coordinates_steps(work, problems, p, rows, start, stop, zeros(work.beta, 32))
        else:
            if work.decay[0] != 1 or rates.schedule[first] >= 0:
                _single_row_steps(work, problems, p, work.decay, rows, start, stop)
            else:
                _single_row_steps(work, problems, p, None, rows, start, stop)
            _accumulate_rows(work, problems, p, rows, stop - start)
        _add_to_sums_of_rows(work, problems, p, rows, stop - start)
    for lane in range(lanes):
        if block[lane] >= 0 and rates.schedule[block[lane]] >= 0:
            for t in range(stop - start):
                work.log_decay[lane] += math.log(np.float64(work.decay[t * lanes + lane]))
        elif work.decay[lane] != 1:
            log_decay = math.log(np.float64(work.decay[lane]))
            for _ in range(start, stop):  # one by one: a chunk may end anywhere
                work.log_decay[lane] += log_decay


@cached_njit(nogil=True, error_model="numpy")
def advance(blocks, state, members, problems, guard, records, memory, floor, near, start, stop, rates):
    """Take blocks of members from `start` to `stop`, one block after another.

    Args:
        blocks: Member numbers (B, LANES), -1 for none. Members of a block have one problem and full batches; a block with
            one member, the first, goes alone and may have any batch size.
        state: Advanced in place.
        members: Status and stopped_at change in place.
        problems: The data.
        guard: The kept state changes in place.
        records: Filled.
        memory: Scratch, see `memory_needed`.
        floor: No factor goes below it.
        near: Factors below it are set from their products.
        start: The first step.
        stop: The step after the last.
        rates: Of the members whose lr or weight decay changes.

    Returns:
        `stop`, or the step at which the last running member stopped.
    """
    num_blocks, last = len(blocks), start
    blocks, state, members, problems = pointers(blocks), pointers(state), pointers(members), pointers(problems)
    guard, records, memory, rates = pointers(guard), pointers(records), pointers(memory), pointers(rates)
    dim = problems.dim
    beta = memory.beta
    for b in range(num_blocks):
        block = shift(blocks, b * LANES)
        lanes = 1 if block[1] < 0 else LANES
        p, count = members.problem[block[0]], members.batch_size[block[0]]
        work = _new_work(memory, problems, lanes, count)
        memory.order[problems.num_samples] = -1
        num_running = 0
        for lane in range(lanes):
            m = block[lane]
            if m >= 0 and members.status[m] == RUNNING:
                _take(work, lane, lanes, state, members, m, problems)
                num_running += 1
            elif m >= 0:
                work.loss[lane] = _loss(state, m, problems, p, beta)
        step, t = start, 0
        while step < stop and num_running > 0:
            end = min(stop, step - step % PERIOD + PERIOD)
            if guard.every_n_steps > 0:
                end = min(end, step - step % guard.every_n_steps + guard.every_n_steps)
            if t < records.num_steps:
                end = min(end, records.steps[t])
            _steps(work, lanes, members, block, problems, memory, step, end, rates)
            step = end
            if step % PERIOD == 0:
                _renormalise(work, problems.columns * lanes, lanes, floor, near)
            checked = guard.every_n_steps > 0 and step % guard.every_n_steps == 0
            due = t < records.num_steps and records.steps[t] == step
            if not checked and not due:
                continue
            for lane in range(lanes):
                m = block[lane]
                if m < 0:
                    continue
                if members.status[m] == RUNNING:
                    _give(work, lane, lanes, state, m, dim)
                    work.loss[lane] = _loss(state, m, problems, p, beta)
                    if checked:
                        _check(m, step, work.loss[lane], state, dim, members, guard)
                        if members.status[m] != RUNNING:
                            work.loss[lane] = _loss(state, m, problems, p, beta)
                            _idle(work, lane, lanes, problems.columns)
                            num_running -= 1
                if due:
                    _record(t, m, work.loss[lane], state, dim, members, records)
            t += due
        for lane in range(lanes):
            m = block[lane]
            if m >= 0:
                if members.status[m] == RUNNING:
                    _give(work, lane, lanes, state, m, dim)
                for later in range(t, records.num_steps):  # a stopped member stays as it is
                    _record(later, m, work.loss[lane], state, dim, members, records)
        last = max(last, step if num_running == 0 else stop)
    return last
