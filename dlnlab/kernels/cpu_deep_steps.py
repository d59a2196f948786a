"""The compiled steps of the deep linear network on observed entries; `dlnlab.kernels.cpu_deep` is the way in.

Members run one after another, so a member's bits depend on nobody. Three kinds of steps:

- `_entry_step`, one entry (i, j): with h_1 = W_1 e_j, h_l = W_l h_{l-1} and g_{L-1} = W_L^T e_i, g_{l-1} = W_l^T g_l the
  entry is <g_1, h_1> and the gradient of layer l is g_l h_{l-1}^T. One pass down the layers finds the g's, and one up finds
  h_l in the rows that it updates. The way up ends at W_{L-1}, where the next step's way down begins: if that step's entry
  has been drawn, one pass over W_{L-1} serves both (`_turn`);
- `_entries_step`, several entries: the vectors of all, then one pass that updates;
- `_full_step`: through the products W_l ... W_1.

**Lazy weight decay.** A step on entries moves one column of W_1 and one row of W_L; only decay moves the others. These two
layers are kept as V = W/c with c the product of the decays since c has last gone into V: at every step divisible by
`BLOCK`, and as soon as c is small (`_shrink`). Where a call begins in between it finds c from the decays since the last
such step, and takes up V as the last call has left it (`lazy_first`, `lazy_last`), so that paths depend on no chunk.

A member's `Work` holds every layer padded with zeros to multiples of `PAD` rows and columns, W_1 transposed.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from dlnlab.kernels.caching import cached_njit
from dlnlab.kernels.cpu_streams import draw_normals, draw_rows
from dlnlab.kernels.deep import SMALLEST_SCALE
from dlnlab.kernels.factors import PERIOD
from dlnlab.kernels.guard import ABOVE_BOUND, LARGEST, NOT_FINITE
from dlnlab.kernels.vectors import fma, load, pointer_at, pointers, shift, splat, store, total, zeros

PAD = 8
BLOCK = PERIOD
"""Mini-batches are drawn for so many steps at a time, and c goes into V at the latest after as many."""
RUNNING, CONVERGED, DIVERGED = range(3)

part = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Parts of a kernel: compiled into the one function that is called, `advance`."""


class Problems(NamedTuple):
    """The observed entries of P matrices."""

    rows: np.ndarray  # (P, N)
    columns: np.ndarray  # (P, N)
    y: np.ndarray  # (P, N)
    num_samples: int


class Network(NamedTuple):
    """The shape that all members share."""

    depth: int  # L
    sizes: np.ndarray  # (L + 1,): D, H_1, ..., H_{L-1}, K
    padded: np.ndarray  # (L + 1,)
    layers: np.ndarray  # (L + 1,): where each layer begins in `Work.layers`, and the end
    hidden: np.ndarray  # (L + 1,): where h_l begins in `Work.h`, l = 1, ..., L - 1; [L] is the end
    products: np.ndarray  # (L + 1,): where (W_l ... W_1)^T begins in `Work.products`, l = 2, ..., L - 1; [L] is the end


class Members(NamedTuple):
    """What each member does, (E,) unless said."""

    weights: np.ndarray  # (L,): addresses of (E, H_l, H_{l-1})
    lazy_first: np.ndarray  # (E, D, H_1)
    lazy_last: np.ndarray  # (E, K, H_{L-1})
    lr: np.ndarray  # float64, as decay and noise_std
    decay: np.ndarray  # 1 - 2 lr weight_decay
    problem: np.ndarray
    batch_size: np.ndarray  # 0 = full
    sampling: np.ndarray
    sampling_key: np.ndarray  # (E, 2)
    noise_key: np.ndarray  # (E, 2)
    noise_std: np.ndarray
    status: np.ndarray
    stopped_at: np.ndarray


class Loss(NamedTuple):
    """Loss = scale (sum of squares), divided by their number if `mean`."""

    scale: float
    mean: bool


class Guard(NamedTuple):
    """When members stop, and where the diverged go back to."""

    tol: float
    bound: np.ndarray  # (E,), of the loss
    every_n_steps: int  # 0 = never
    kept: np.ndarray  # (L,): addresses, as those of the weights
    cause: np.ndarray  # (E,): why a member has diverged


class Work(NamedTuple):
    """One member, flat arrays of the data's type."""

    layers: np.ndarray
    h: np.ndarray  # a batch of them
    g: np.ndarray
    along: np.ndarray  # (batch,): lr times the loss's derivative in each entry
    noise: np.ndarray  # for each label of a step
    products: np.ndarray
    one: np.ndarray  # W_l ... W_1, any l
    other: np.ndarray
    gradient: np.ndarray  # of one layer
    rows: np.ndarray  # drawn entries, int64
    order: np.ndarray  # (N + 1,), for `draw_rows`


def new_network(sizes: list[int]) -> Network:
    """The layout for layers of sizes D, H_1, ..., H_{L-1}, K."""
    depth = len(sizes) - 1
    padded = [-(-size // PAD) * PAD for size in sizes]
    layers, hidden, products = [0], [0, 0], [0, 0, 0]
    for layer in range(depth):
        layers.append(layers[-1] + padded[layer] * padded[layer + 1])
    for layer in range(1, depth):
        hidden.append(hidden[-1] + padded[layer])
    for layer in range(2, depth):
        products.append(products[-1] + padded[layer] * padded[0])
    tables = (np.array(table[: depth + 1], dtype=np.int64) for table in (sizes, padded, layers, hidden, products))
    return Network(depth, *tables)


def new_work(network: Network, num_samples: int, largest_batch: int, dtype: np.dtype) -> Work:
    """Memory for one thread.

    Args:
        network: The shape.
        num_samples: N.
        largest_batch: The largest batch size that is not full.
        dtype: Of the weights.
    """
    batch, widest = max(largest_batch, 1), int(network.padded.max())
    vectors, matrix = int(network.hidden[-1]) * max(batch, 2), widest * widest  # two steps on one entry overlap
    sizes = (int(network.layers[-1]), vectors, vectors, batch, max(batch, num_samples), int(network.products[-1]),
             matrix, matrix, matrix)  # fmt: skip
    arrays = (np.zeros(max(size, PAD), dtype) for size in sizes)
    return Work(*arrays, np.zeros(BLOCK * batch, np.int64), np.zeros(num_samples + 1, np.int64))


# Vectors along a member's layers -------------------------------------------------------------------------------------


@part
def _scaled_row(source, at, target, to, size, scale, zero):
    """A row times a number, written elsewhere."""
    factor = splat(scale, zero)
    for o in range(0, size, PAD):
        store(target, to + o, factor * load(source, at + o, zero))


@part
def _add_to_row(target, at, source, frm, size, scale, zero):
    """Add a number times a row."""
    factor = splat(scale, zero)
    for o in range(0, size, PAD):
        store(target, at + o, fma(factor, load(source, frm + o, zero), load(target, at + o, zero)))


@part
def _dot(a, at, b, bt, size, zero):
    """The inner product of two rows."""
    sums = zero
    for o in range(0, size, PAD):
        sums = fma(load(a, at + o, zero), load(b, bt + o, zero), sums)
    return total(sums)


@part
def _pull_back(w, at, rows, columns, g, frm, to, zero):
    """g_to = W^T g_from, rows four at a time."""
    for o in range(0, columns, PAD):
        store(g, to + o, zero)
    for a in range(0, rows, 4):
        r0 = at + a * columns
        r1, r2, r3 = r0 + columns, r0 + 2 * columns, r0 + 3 * columns
        g0, g1 = splat(g[frm + a], zero), splat(g[frm + a + 1], zero)
        g2, g3 = splat(g[frm + a + 2], zero), splat(g[frm + a + 3], zero)
        for o in range(0, columns, PAD):
            sums = fma(g1, load(w, r1 + o, zero), fma(g0, load(w, r0 + o, zero), load(g, to + o, zero)))
            store(g, to + o, fma(g3, load(w, r3 + o, zero), fma(g2, load(w, r2 + o, zero), sums)))


@part
def _push_forward(w, at, rows, columns, h, frm, to, zero):
    """h_to = W h_from."""
    for a in range(0, rows, 4):
        r0 = at + a * columns
        r1, r2, r3 = r0 + columns, r0 + 2 * columns, r0 + 3 * columns
        s0, s1, s2, s3 = zero, zero, zero, zero
        for o in range(0, columns, PAD):
            x = load(h, frm + o, zero)
            s0, s1 = fma(load(w, r0 + o, zero), x, s0), fma(load(w, r1 + o, zero), x, s1)
            s2, s3 = fma(load(w, r2 + o, zero), x, s2), fma(load(w, r3 + o, zero), x, s3)
        h[to + a], h[to + a + 1], h[to + a + 2], h[to + a + 3] = total(s0), total(s1), total(s2), total(s3)


@part
def _push_and_update(w, at, rows, columns, h, frm, to, g, of, along, keep, zero):
    """h_to = W h_from, and then W <- keep W - along g h_from^T, in one pass over W."""
    for a in range(0, rows, 4):
        r0 = at + a * columns
        r1, r2, r3 = r0 + columns, r0 + 2 * columns, r0 + 3 * columns
        g0, g1 = splat(-along * g[of + a], zero), splat(-along * g[of + a + 1], zero)
        g2, g3 = splat(-along * g[of + a + 2], zero), splat(-along * g[of + a + 3], zero)
        s0, s1, s2, s3 = zero, zero, zero, zero
        for o in range(0, columns, PAD):
            x = load(h, frm + o, zero)
            w0, w1, w2, w3 = load(w, r0 + o, zero), load(w, r1 + o, zero), load(w, r2 + o, zero), load(w, r3 + o, zero)
            s0, s1, s2, s3 = fma(w0, x, s0), fma(w1, x, s1), fma(w2, x, s2), fma(w3, x, s3)
            store(w, r0 + o, fma(g0, x, keep * w0))
            store(w, r1 + o, fma(g1, x, keep * w1))
            store(w, r2 + o, fma(g2, x, keep * w2))
            store(w, r3 + o, fma(g3, x, keep * w3))
        h[to + a], h[to + a + 1], h[to + a + 2], h[to + a + 3] = total(s0), total(s1), total(s2), total(s3)


@part
def _turn(w, at, rows, columns, h, frm, to, g, of, down, along, keep, old, push, c, zero):
    """`_push_and_update` of the top layer between the outer ones, and the next step's way down through it, in one pass.

    The g above it is c (V + push h_to) then, V at `old`; that and the g below go `down` from where those of this step are,
    with the bits that `_scaled_row` and `_pull_back` would give them.
    """
    above, below, size, moves = of + down, frm + down, splat(c, zero), splat(push, zero)
    for o in range(0, columns, PAD):
        store(g, below + o, zero)
    for first in range(0, rows, PAD):
        for a in range(first, first + PAD, 4):
            r0 = at + a * columns
            r1, r2, r3 = r0 + columns, r0 + 2 * columns, r0 + 3 * columns
            s0, s1, s2, s3 = zero, zero, zero, zero
            for o in range(0, columns, PAD):
                x = load(h, frm + o, zero)
                s0, s1 = fma(load(w, r0 + o, zero), x, s0), fma(load(w, r1 + o, zero), x, s1)
                s2, s3 = fma(load(w, r2 + o, zero), x, s2), fma(load(w, r3 + o, zero), x, s3)
            h[to + a], h[to + a + 1], h[to + a + 2], h[to + a + 3] = total(s0), total(s1), total(s2), total(s3)
        store(g, above + first, size * fma(moves, load(h, to + first, zero), load(w, old + first, zero)))
        for a in range(first, first + PAD, 4):
            r0 = at + a * columns
            r1, r2, r3 = r0 + columns, r0 + 2 * columns, r0 + 3 * columns
            g0, g1 = splat(-along * g[of + a], zero), splat(-along * g[of + a + 1], zero)
            g2, g3 = splat(-along * g[of + a + 2], zero), splat(-along * g[of + a + 3], zero)
            p0, p1 = splat(g[above + a], zero), splat(g[above + a + 1], zero)
            p2, p3 = splat(g[above + a + 2], zero), splat(g[above + a + 3], zero)
            for o in range(0, columns, PAD):
                x = load(h, frm + o, zero)
                w0, w1 = fma(g0, x, keep * load(w, r0 + o, zero)), fma(g1, x, keep * load(w, r1 + o, zero))
                w2, w3 = fma(g2, x, keep * load(w, r2 + o, zero)), fma(g3, x, keep * load(w, r3 + o, zero))
                store(w, r0 + o, w0)
                store(w, r1 + o, w1)
                store(w, r2 + o, w2)
                store(w, r3 + o, w3)
                sums = fma(p1, w1, fma(p0, w0, load(g, below + o, zero)))
                store(g, below + o, fma(p3, w3, fma(p2, w2, sums)))


# Steps on entries ----------------------------------------------------------------------------------------------------


@part
def _reach(work, net, i, j, shift_of, c, turned, zero):
    """g_{L-1}, ..., g_1 and h_1 of an entry, at `shift_of` of the batch's vectors; returns the entry.

    The first two g's are there already if the last step has `turned`.
    """
    last, top = net.depth - 1, net.padded[net.depth - 1]
    if not turned:
        _scaled_row(work.layers, net.layers[last] + i * top, work.g, shift_of + net.hidden[last], top, c, zero)
    for layer in range(last - 2 if turned else last - 1, 0, -1):
        _pull_back(
            work.layers, net.layers[layer], net.padded[layer + 1], net.padded[layer], work.g,
            shift_of + net.hidden[layer + 1], shift_of + net.hidden[layer], zero,
        )  # fmt: skip
    first = net.padded[1]
    _scaled_row(work.layers, net.layers[0] + j * first, work.h, shift_of + net.hidden[1], first, c, zero)
    return _dot(work.g, shift_of + net.hidden[1], work.h, shift_of + net.hidden[1], first, zero)


@part
def _update_ends(work, net, i, j, shift_of, along, zero):
    """Move column j of W_1 and row i of W_L, as V."""
    last, first, top = net.depth - 1, net.padded[1], net.padded[net.depth - 1]
    _add_to_row(work.layers, net.layers[0] + j * first, work.g, shift_of + net.hidden[1], first, -along, zero)
    _add_to_row(work.layers, net.layers[last] + i * top, work.h, shift_of + net.hidden[last], top, -along, zero)


@part
def _entry_step(work, net, i, j, target, slope, decay, c, here, turned, turn, next_i, zero):
    """One step on one entry; `slope` is lr times the derivative of the loss for a residual of one.

    Its vectors are at `here`. If it is to `turn`, the next step is on row `next_i` and has its own at the other place.
    """
    along = slope * (np.float64(_reach(work, net, i, j, here, c, turned, zero)) - target)
    keep, top = splat(decay, zero), net.depth - 2
    push = -(along / (c * decay))
    for layer in range(1, net.depth - 1):
        at, rows, columns = net.layers[layer], net.padded[layer + 1], net.padded[layer]
        below, above = here + net.hidden[layer], here + net.hidden[layer + 1]
        if turn and layer == top:
            old, down = net.layers[net.depth - 1] + next_i * rows, net.hidden[net.depth] - 2 * here
            _turn(work.layers, at, rows, columns, work.h, below, above, work.g, above, down, along, keep, old,
                  push if next_i == i else 0.0, c * decay, zero)  # fmt: skip
        else:
            _push_and_update(
                work.layers, at, rows, columns, work.h, below, above, work.g, above, along, keep, zero
            )  # fmt: skip
    _update_ends(work, net, i, j, here, along / (c * decay), zero)


@part
def _entries_step(work, net, problems, p, count, drawn, slope, decay, c, zero):
    """One step on `count` entries, whose numbers begin at `drawn` of `work.rows`."""
    size, keep, n = net.hidden[net.depth], splat(decay, zero), problems.num_samples
    for e in range(count):
        entry = p * n + work.rows[drawn + e]
        found = _reach(work, net, problems.rows[entry], problems.columns[entry], e * size, c, False, zero)
        for layer in range(1, net.depth - 1):
            _push_forward(
                work.layers, net.layers[layer], net.padded[layer + 1], net.padded[layer], work.h,
                e * size + net.hidden[layer], e * size + net.hidden[layer + 1], zero,
            )  # fmt: skip
        work.along[e] = slope * (np.float64(found) - problems.y[entry] - work.noise[e])
    for layer in range(1, net.depth - 1):
        columns = net.padded[layer]
        for a in range(net.sizes[layer + 1]):
            at = net.layers[layer] + a * columns
            for o in range(0, columns, PAD):
                w = keep * load(work.layers, at + o, zero)
                for e in range(count):
                    push = splat(-work.along[e] * work.g[e * size + net.hidden[layer + 1] + a], zero)
                    w = fma(push, load(work.h, e * size + net.hidden[layer] + o, zero), w)
                store(work.layers, at + o, w)
    for e in range(count):
        entry = p * n + work.rows[drawn + e]
        along = work.along[e] / (c * decay)
        _update_ends(work, net, problems.rows[entry], problems.columns[entry], e * size, along, zero)


# Steps on everything -------------------------------------------------------------------------------------------------


@part
def _multiply(target, to, a, at, by_row, by_inner, b, bt, rows, inner, columns, zero):
    """C = A B; A's entry (r, k) is at `at + r by_row + k by_inner`, so that A may be a transpose."""
    for r in range(0, rows, 4):
        p0 = at + r * by_row
        p1, p2, p3 = p0 + by_row, p0 + 2 * by_row, p0 + 3 * by_row
        for o in range(0, columns, PAD):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for k in range(inner):
                x, step = load(b, bt + k * columns + o, zero), k * by_inner
                s0, s1 = fma(splat(a[p0 + step], zero), x, s0), fma(splat(a[p1 + step], zero), x, s1)
                s2, s3 = fma(splat(a[p2 + step], zero), x, s2), fma(splat(a[p3 + step], zero), x, s3)
            store(target, to + r * columns + o, s0)
            store(target, to + (r + 1) * columns + o, s1)
            store(target, to + (r + 2) * columns + o, s2)
            store(target, to + (r + 3) * columns + o, s3)


@part
def _transpose(source, at, rows, columns, target, to):
    """(rows, columns) -> (columns, rows)."""
    for r in range(rows):
        for o in range(columns):
            target[to + o * rows + r] = source[at + r * columns + o]


@part
def _product(work, net, keep_all, zero):
    """W_{L-1} ... W_1 to `work.one`, with W_L to `work.other`; their transposes to `work.products` if asked."""
    width = net.padded[0]
    _transpose(work.layers, net.layers[0], width, net.padded[1], work.one, 0)
    for layer in range(1, net.depth - 1):
        rows, inner = net.padded[layer + 1], net.padded[layer]
        _multiply(
            work.other, 0, work.layers, net.layers[layer], inner, 1, work.one, 0, rows, inner, width, zero
        )  # fmt: skip
        for o in range(0, rows * width, PAD):
            store(work.one, o, load(work.other, o, zero))
        if keep_all:
            _transpose(work.one, 0, rows, width, work.products, net.products[layer + 1])
    rows, inner = net.padded[net.depth], net.padded[net.depth - 1]
    _multiply(
        work.other, 0, work.layers, net.layers[net.depth - 1], inner, 1, work.one, 0, rows, inner, width, zero
    )  # fmt: skip


@part
def _descend(work, net, layer, rows, columns, keep, zero):
    """Layer l <- keep W - gradient."""
    for o in range(0, rows * columns, PAD):
        at = net.layers[layer] + o
        store(work.layers, at, fma(keep, load(work.layers, at, zero), -load(work.gradient, o, zero)))


@part
def _full_step(work, net, problems, p, slope, decay, zero):
    """One step on all entries."""
    keep, width, n = splat(decay, zero), net.padded[0], problems.num_samples
    last, height = net.depth - 1, net.padded[net.depth]
    _product(work, net, True, zero)
    for o in range(0, height * width, PAD):
        store(work.one, o, zero)
    for s in range(n):
        entry = p * n + s
        place = problems.rows[entry] * width + problems.columns[entry]
        residual = np.float64(work.other[place]) - problems.y[entry] - work.noise[s]
        work.one[place] += slope * residual
    # `one` holds W_{l+1}^T ... W_L^T R from here on, R the residuals' matrix
    rows = height
    for layer in range(last, 0, -1):
        columns = net.padded[layer]
        if layer == 1:
            _multiply(work.gradient, 0, work.one, 0, width, 1, work.layers, net.layers[0], rows, width, columns, zero)
        else:
            _multiply(
                work.gradient, 0, work.one, 0, width, 1, work.products, net.products[layer], rows, width, columns, zero
            )
        _multiply(work.other, 0, work.layers, net.layers[layer], 1, columns, work.one, 0, columns, rows, width, zero)
        _descend(work, net, layer, rows, columns, keep, zero)
        for o in range(0, columns * width, PAD):
            store(work.one, o, load(work.other, o, zero))
        rows = columns
    _transpose(work.one, 0, net.padded[1], width, work.gradient, 0)
    _descend(work, net, 0, width, net.padded[1], keep, zero)


@part
def _full_loss(work, net, problems, p, loss, c, zero):
    """The clean data loss of all entries."""
    _product(work, net, False, zero)
    squares, n, width = 0.0, problems.num_samples, net.padded[0]
    for entry in range(p * n, (p + 1) * n):
        found = c * c * np.float64(work.other[problems.rows[entry] * width + problems.columns[entry]])
        squares += (found - problems.y[entry]) ** 2
    return loss.scale * squares / (n if loss.mean else 1)


# Members -------------------------------------------------------------------------------------------------------------


@part
def _take(work, net, members, m, c, like):
    """Copy member m in, the outer layers as V."""
    for o in range(net.layers[net.depth]):
        work.layers[o] = 0
    for layer in range(net.depth):
        rows, columns = net.sizes[layer + 1], net.sizes[layer]
        w = shift(pointer_at(members.weights[layer], like), m * rows * columns)
        for a in range(rows):
            for b in range(columns):
                if layer == 0:
                    here, there = b * net.padded[1] + a, (m * columns + b) * rows + a
                    _take_lazy(work.layers, here, members.lazy_first, there, w[a * columns + b], c)
                elif layer == net.depth - 1:
                    here, there = net.layers[layer] + a * net.padded[layer] + b, (m * rows + a) * columns + b
                    _take_lazy(work.layers, here, members.lazy_last, there, w[a * columns + b], c)
                else:
                    work.layers[net.layers[layer] + a * net.padded[layer] + b] = w[a * columns + b]


@part
def _take_lazy(layers, here, lazy, there, w, c):
    """V as the last call has left it, or W/c where someone has changed W since."""
    layers[here] = c * lazy[there]
    layers[here] = lazy[there] if layers[here] == w else w / c


@part
def _leave_lazy(work, net, members, m):
    """V of the outer layers for the next call."""
    d, first, height, top = net.sizes[0], net.sizes[1], net.sizes[net.depth], net.sizes[net.depth - 1]
    for j in range(d):
        for a in range(first):
            members.lazy_first[(m * d + j) * first + a] = work.layers[j * net.padded[1] + a]
    for i in range(height):
        at = net.layers[net.depth - 1] + i * net.padded[net.depth - 1]
        for a in range(top):
            members.lazy_last[(m * height + i) * top + a] = work.layers[at + a]


@part
def _give(work, net, members, m, c, like):
    """Copy the weights back; returns the largest of their sizes, NaN counting as infinite."""
    most = 0.0
    for layer in range(net.depth):
        rows, columns = net.sizes[layer + 1], net.sizes[layer]
        w = shift(pointer_at(members.weights[layer], like), m * rows * columns)
        scale = c if layer == 0 or layer == net.depth - 1 else 1.0
        for a in range(rows):
            for b in range(columns):
                if layer == 0:
                    value = work.layers[b * net.padded[1] + a]
                else:
                    value = work.layers[net.layers[layer] + a * net.padded[layer] + b]
                w[a * columns + b] = scale * value
                size = abs(np.float64(w[a * columns + b]))
                most = size if not size <= most else most
                if size != size:
                    most = np.inf
    return most


@part
def _flush(work, net, c, zero):
    """Put c into V."""
    factor = splat(c, zero)
    for o in range(0, net.layers[1], PAD):
        store(work.layers, o, factor * load(work.layers, o, zero))
    for o in range(net.layers[net.depth - 1], net.layers[net.depth], PAD):
        store(work.layers, o, factor * load(work.layers, o, zero))


@part
def _copy_weights(source, target, net, m, like):
    """One member's weights."""
    for layer in range(net.depth):
        size = net.sizes[layer] * net.sizes[layer + 1]
        a, b = shift(pointer_at(source[layer], like), m * size), shift(pointer_at(target[layer], like), m * size)
        for o in range(size):
            b[o] = a[o]


@part
def _shrink(c, decay, step):
    """C after the step that leads to `step`, and whether it is to go into V."""
    c *= decay
    return c, step % BLOCK == 0 or c < SMALLEST_SCALE


@part
def _rates_at(rates, m, step):
    """Lr and decay of a member with a schedule at a step."""
    at = rates.schedule[m] * rates.num_steps + step - rates.first
    lr = rates.lr[m] * rates.lr_factor[at]
    return lr, 1 - 2 * lr * (rates.weight_decay[m] * rates.weight_decay_factor[at])


@cached_njit(nogil=True, error_model="numpy")
def advance(chosen, members, problems, network, loss, guard, work, start, stop, rates):
    """Take members from `start` to `stop`, one after another.

    Args:
        chosen: Member numbers (M,); stopped ones stay as they are.
        members: Weights, lazy state, status and stopped_at change in place.
        problems: The data.
        network: The shape.
        loss: Its scale.
        guard: The kept weights change in place.
        work: Scratch, see `new_work`.
        start: The first step.
        stop: The step after the last.
        rates: Of the members whose lr or weight decay changes.

    Returns:
        `stop`, or the step at which the last running member stopped.
    """
    count_chosen, last = len(chosen), start
    chosen, members, problems, net = pointers(chosen), pointers(members), pointers(problems), pointers(network)
    guard, work, rates = pointers(guard), pointers(work), pointers(rates)
    like, zero, n = work.layers, zeros(work.layers, 8), problems.num_samples
    for place in range(count_chosen):
        m = chosen[place]
        if members.status[m] != RUNNING:
            continue
        p, count, decay = members.problem[m], members.batch_size[m], members.decay[m]
        labels, noise, scheduled = count if count > 0 else n, members.noise_std[m], rates.schedule[m] >= 0
        steepness = 2.0 * loss.scale
        slope = steepness * members.lr[m]
        if loss.mean:
            slope /= labels
        c, flushed = 1.0, True
        for now in range(start - start % BLOCK, start if count > 0 else 0):
            if scheduled:
                _, decay = _rates_at(rates, m, now)
            c, flushed = _shrink(c, decay, now + 1)
            c = 1.0 if flushed else c
        _take(work, net, members, m, c, like)
        work.order[n] = -1
        for e in range(labels):
            work.noise[e] = 0
        step, here, turned = start, 0, False
        while step < stop:
            end = min(stop, step - step % BLOCK + BLOCK)
            if guard.every_n_steps > 0:
                end = min(end, step - step % guard.every_n_steps + guard.every_n_steps)
            if count > 0:
                key = shift(members.sampling_key, 2 * m)
                draw_rows(members.sampling[m], key, step, end, count, n, work.rows, work.order)
            for now in range(step, end):
                if scheduled:
                    lr, decay = _rates_at(rates, m, now)
                    slope = steepness * lr
                    if loss.mean:
                        slope /= labels
                if noise > 0:
                    draw_normals(shift(members.noise_key, 2 * m), now, labels, noise, work.noise, 0, 1)
                if count == 0:
                    _full_step(work, net, problems, p, slope, decay, zero)
                    continue
                if count == 1:
                    entry = p * n + work.rows[now - step]
                    target = problems.y[entry] + work.noise[0]
                    turn = net.depth > 2 and now + 1 < end
                    next_i = problems.rows[p * n + work.rows[now + 1 - step]] if turn else 0
                    _entry_step(
                        work, net, problems.rows[entry], problems.columns[entry], target, slope, decay, c, here, turned,
                        turn, next_i, zero,
                    )  # fmt: skip
                    here, turned = net.hidden[net.depth] - here if turn else here, turn
                else:
                    _entries_step(work, net, problems, p, count, (now - step) * count, slope, decay, c, zero)
                c, flushed = _shrink(c, decay, now + 1)
                if flushed:
                    if c != 1:
                        _flush(work, net, c, zero)
                    c = 1.0
            step = end
            if guard.every_n_steps > 0 and step % guard.every_n_steps == 0:
                most = _give(work, net, members, m, c, like)
                now_loss = _full_loss(work, net, problems, p, loss, c, zero)
                finite = most <= LARGEST and now_loss <= LARGEST  # NaN compares false
                if not (finite and now_loss <= guard.bound[m]):
                    _copy_weights(guard.kept, members.weights, net, m, like)
                    members.status[m] = DIVERGED
                    guard.cause[m] = ABOVE_BOUND if finite else NOT_FINITE
                    members.stopped_at[m] = max(step - guard.every_n_steps, 0)
                    break
                _copy_weights(members.weights, guard.kept, net, m, like)
                if now_loss < guard.tol:
                    members.status[m] = CONVERGED
                    members.stopped_at[m] = step
                    break
        if members.status[m] == RUNNING:
            _give(work, net, members, m, c, like)
            if count > 0:
                _leave_lazy(work, net, members, m)
        last = max(last, step)
    return last
