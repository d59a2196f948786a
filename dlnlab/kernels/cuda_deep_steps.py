"""The steps of the deep linear network on observed entries in Triton; `dlnlab.kernels.cuda_deep` is the way in.

One program takes one member through a whole launch. With h_1 = W_1 e_j, h_l = W_l h_{l-1} and g_{L-1} = W_L^T e_i,
g_{l-1} = W_l^T g_l, an entry (i, j) is <g_1, h_1> and the gradient of layer l is g_l h_{l-1}^T. A step finds the g's of all
its entries on the way down, and on the way up the h's in the rows of the layers that it moves: a layer between the outer
ones is read twice and written once, `ROWS` rows at a time. Layers and vectors are in memory, which for the widths of
interest means the caches.

The outer layers are kept as V = W/c, c the product of the decays since it has last gone into V
(`dlnlab.kernels.cpu_deep_steps`): V of W_1, transposed, and of W_L are what a launch works on.

**A member's bits depend on no company.** The order of sums follows from the network's widths, and nothing that a launch
decides is known at compile time (`Plan`).

Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dlnlab.kernels import deep
from dlnlab.kernels.cuda_steps import PERIOD, Rates, draw, normal

SMALLEST_SCALE = tl.constexpr(deep.SMALLEST_SCALE)
FLUSH = tl.constexpr(1024)
"""Numbers of an outer layer that c goes into at once."""


class Members(NamedTuple):
    """What each member does, (E,) unless said."""

    lr: Tensor  # float64, as all that is no integer
    decay: Tensor  # 1 - 2 lr weight_decay
    slope: Tensor  # the loss's derivative for a residual of one
    scale: Tensor  # c, changed in place
    problem: Tensor
    batch_size: Tensor
    sampling: Tensor
    sampling_key: Tensor  # (E, 2)
    noise_key: Tensor  # (E, 2)
    noise_std: Tensor


class Problems(NamedTuple):
    """The observed entries of P matrices, (P, N)."""

    rows: Tensor
    columns: Tensor
    y: Tensor


class Memory(NamedTuple):
    """What programs work in."""

    h: Tensor  # (programs, batch, L - 1, WIDTH): h_1, ..., h_{L-1} of each entry
    g: Tensor  # likewise
    along: Tensor  # float64, (programs, batch): lr times the loss's derivative in each entry
    rows: Tensor  # int32, (programs, drawn entries)
    order: Tensor  # int32, (programs, N): the permutation of `subset` and `epochs`


class Plan(NamedTuple):
    """The numbers of a launch, in memory so that the kernel is compiled for none of them."""

    integers: Tensor
    """int64: first and last step, N, the largest batch, the drawn entries there is room for, the step of the rates' first
    column, and their columns."""
    sizes: Tensor  # int64: D, H_1, ..., H_{L-1}, K


@triton.jit
def _rows(w, m, a, height, width, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows a, a + 1, ... of member m's layer are, and which of their numbers there are."""
    unit, row = tl.arange(0, WIDTH), a + tl.arange(0, ROWS)
    return w + (m * height + row)[:, None] * width + unit[None, :], (row < height)[:, None] & (unit < width)[None, :]


@triton.jit
def _reach(weights, first, last, sizes, m, i, j, h, g, c, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
           ROWS: tl.constexpr):  # fmt: skip
    """g_{L-1}, ..., g_1 and h_1 of an entry to memory; returns the entry."""
    unit, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    top, bottom = tl.load(sizes + DEPTH - 1), tl.load(sizes + 1)
    vector = tl.load(last + i * top + unit, mask=unit < top, other=0.0) * c
    tl.store(g + (DEPTH - 2) * WIDTH + unit, vector)
    for layer in tl.static_range(DEPTH - 2, 0, -1):
        height, width = tl.load(sizes + layer + 1), tl.load(sizes + layer)
        tl.debug_barrier()  # what one thread wrote to memory another may read from here on
        vector = tl.zeros([WIDTH], vector.dtype)
        for a in range(0, height, ROWS):
            at, inside = _rows(weights[layer], m, a, height, width, WIDTH, ROWS)
            w = tl.load(at, mask=inside, other=0.0)
            vector += tl.sum(w * tl.load(g + layer * WIDTH + a + row)[:, None], axis=0)
        tl.store(g + (layer - 1) * WIDTH + unit, vector)
    start = tl.load(first + j * bottom + unit, mask=unit < bottom, other=0.0) * c
    tl.store(h + unit, start)
    return tl.sum(vector * start, axis=0)


@triton.jit
def _move(w, m, height, width, count, size, h, g, along, decay, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The h's after a layer from those before it, and W <- decay W - (sum over entries of along g h^T).

    The vectors of an entry are `size` numbers after those of the one before; h and g are those before the layer, and what
    is after it is `WIDTH` further.
    """
    unit, row = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    for a in range(0, height, ROWS):
        at, inside = _rows(w, m, a, height, width, WIDTH, ROWS)
        old = tl.load(at, mask=inside, other=0.0)
        new = old * decay
        for e in range(0, count):
            x = tl.load(h + e * size + unit)
            tl.store(h + e * size + WIDTH + a + row, tl.sum(old * x[None, :], axis=1))
            push = tl.load(along + e).to(new.dtype) * tl.load(g + e * size + WIDTH + a + row)
            new -= push[:, None] * x[None, :]
        tl.store(at, new, mask=inside)


@triton.jit
def _add(target, source, width, scale, WIDTH: tl.constexpr):
    """Add a number times a vector."""
    unit = tl.arange(0, WIDTH)
    old = tl.load(target + unit, mask=unit < width, other=0.0)
    tl.store(target + unit, old + tl.load(source + unit) * scale, mask=unit < width)


@triton.jit
def _multiply(values, count, factor):
    """So many numbers in memory times another."""
    place = tl.arange(0, FLUSH)
    for o in range(0, count, FLUSH):
        inside = o + place < count
        tl.store(values + o + place, tl.load(values + o + place, mask=inside, other=0.0) * factor, mask=inside)


@triton.jit
def advance(chosen, members: Members, rates: Rates, problems: Problems, weights, first, last, memory: Memory, plan: Plan,
            DEPTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Take one member from one step to another.

    Args:
        chosen: Numbers of the running members, int64.
        members: c changes in place.
        rates: Of the members whose lr or weight decay changes.
        problems: The data.
        weights: W_1, ..., W_L, (E, H_l, H_{l-1}); those between the outer ones change in place.
        first: V of W_1 transposed, (E, D, H_1), changed in place.
        last: V of W_L, (E, K, H_{L-1}), likewise.
        memory: Scratch.
        plan: See there.
        DEPTH: L.
        WIDTH: The largest hidden width, padded to a power of two.
        ROWS: Rows of a layer that are taken at once.
    """
    program = tl.program_id(0).to(tl.int64)
    start, stop, n = tl.load(plan.integers), tl.load(plan.integers + 1), tl.load(plan.integers + 2)
    batch, room = tl.load(plan.integers + 3), tl.load(plan.integers + 4)
    sizes, m = plan.sizes, tl.load(chosen + program)
    dim, bottom = tl.load(sizes), tl.load(sizes + 1)
    top, height = tl.load(sizes + DEPTH - 1), tl.load(sizes + DEPTH)
    first += m * dim * bottom
    last += m * height * top
    NUMBER: tl.constexpr = first.dtype.element_ty
    size: tl.constexpr = (DEPTH - 1) * WIDTH  # of an entry's vectors
    h, g = memory.h + program * batch * size, memory.g + program * batch * size
    along, rows, order = memory.along + program * batch, memory.rows + program * room, memory.order + program * n

    count, sampling = tl.load(members.batch_size + m), tl.load(members.sampling + m)
    one = tl.zeros([1], tl.int64)
    key0 = tl.load(members.sampling_key + 2 * m + one).to(tl.uint32)
    key1 = tl.load(members.sampling_key + 2 * m + 1 + one).to(tl.uint32)
    noise0 = tl.load(members.noise_key + 2 * m).to(tl.uint32)
    noise1 = tl.load(members.noise_key + 2 * m + 1).to(tl.uint32)
    noise_std, slope = tl.load(members.noise_std + m), tl.load(members.slope + m)
    lr, decay, c = tl.load(members.lr + m), tl.load(members.decay + m), tl.load(members.scale + m)
    schedule = tl.load(rates.schedule + m)
    base_lr, base_kappa = lr, lr * 0
    if schedule >= 0:
        base_lr, base_kappa = tl.load(rates.lr + m), tl.load(rates.weight_decay + m)
    factor_at = schedule * tl.load(plan.integers + 6) - tl.load(plan.integers + 5)
    entries = tl.load(members.problem + m) * n

    step, epoch = start, start * 0 - 1
    while step < stop:
        end = tl.minimum(stop, step + room // count)
        epoch = draw(rows, order, epoch, key0, key1, sampling, step, end, count, n, 1)
        for passed in range(0, end - step):
            now = step + passed
            if schedule >= 0:
                lr = base_lr * tl.load(rates.lr_factor + factor_at + now)
                decay = 1 - 2 * lr * (base_kappa * tl.load(rates.weight_decay_factor + factor_at + now))
            drawn = rows + passed * count
            for e in range(0, count):
                entry = entries + tl.load(drawn + e)
                i, j = tl.load(problems.rows + entry), tl.load(problems.columns + entry)
                target = tl.load(problems.y + entry).to(tl.float64)
                if noise_std > 0:
                    target += noise_std * normal(noise0, noise1, count * 0 + e, now)
                found = _reach(weights, first, last, sizes, m, i, j, h + e * size, g + e * size, c.to(NUMBER), DEPTH, WIDTH,
                               ROWS)  # fmt: skip
                tl.store(along + e, lr * slope * (found.to(tl.float64) - target))
            for layer in tl.static_range(1, DEPTH - 1):
                tl.debug_barrier()
                _move(weights[layer], m, tl.load(sizes + layer + 1), tl.load(sizes + layer), count, size,
                      h + (layer - 1) * WIDTH, g + (layer - 1) * WIDTH, along, decay.to(NUMBER), WIDTH, ROWS)  # fmt: skip
            c *= decay
            for e in range(0, count):
                tl.debug_barrier()
                entry = entries + tl.load(drawn + e)
                scale = (-tl.load(along + e) / c).to(NUMBER)
                _add(first + tl.load(problems.columns + entry) * bottom, g + e * size, bottom, scale, WIDTH)
                _add(last + tl.load(problems.rows + entry) * top, h + e * size + (DEPTH - 2) * WIDTH, top, scale, WIDTH)
            tl.debug_barrier()
            if ((now + 1) % PERIOD == 0) | (c < SMALLEST_SCALE):
                _multiply(first, dim * bottom, c.to(NUMBER))
                _multiply(last, height * top, c.to(NUMBER))
                tl.debug_barrier()
                c = c * 0 + 1
        step = end
    tl.store(members.scale + m, c)
