"""What does one step of one member cost in the CPU kernel, against the shortest NumPy loop that keeps the gain?

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 taskset -c 0 python benchmarks/diagonal_kernel.py

Contenders of a row take turns, and the medians of their rounds are printed: on a shared machine trust the ratios only.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np
import torch

from dlnlab import streams
from dlnlab.kernels.cpu import DiagonalKernel
from dlnlab.kernels.diagonal import Batches, DiagonalState, Guard

CASES = [(20, 30, 1), (20, 30, 30), (20, 30, 1000), (40, 100, 1), (40, 100, 100), (200, 1000, 1), (200, 1000, 100)]
ALPHA = 0.1


def numpy_full(x, y, lr, steps):
    """The lean loop: u, v and the gain; full batches."""
    n, d = x.shape
    u, v, gain = np.full(d, 2**0.5 * ALPHA), np.zeros(d), np.zeros(d)
    for _ in range(steps):
        step = lr * ((x @ (u * v) - y) @ x / n)
        u, v = u - step * v, v - step * u
        gain -= np.log(np.abs(1 - step * step))


def numpy_sampled(x, y, lr, steps):
    """The same with one row a step, drawn ahead."""
    n, d = x.shape
    u, v, gain = np.full(d, 2**0.5 * ALPHA), np.zeros(d), np.zeros(d)
    for i in np.random.default_rng(0).integers(0, n, steps):
        row = x[i]
        step = lr * (row @ (u * v) - y[i]) * row
        u, v = u - step * v, v - step * u
        gain -= np.log(np.abs(1 - step * step))


class Kernel:
    """The kernel on one problem, with the full loss checked every 100 steps."""

    def __init__(self, x, y, lr, members, batch_size, dtype):
        self.kernel = DiagonalKernel(torch.from_numpy(x)[None].to(dtype), torch.from_numpy(y)[None].to(dtype))
        w = torch.full((members, x.shape[1]), ALPHA, dtype=dtype)
        self.state = DiagonalState.start(w, w.clone())
        self.lr = torch.full((members,), lr, dtype=dtype)
        self.problem = torch.zeros(members, dtype=torch.int64)
        size = torch.full((members,), batch_size, dtype=torch.int64)
        key = streams.keys(0, "sampling", torch.arange(members))
        self.batches = Batches(size, torch.zeros_like(size), key, key, torch.zeros(members))
        self.guard = Guard(0.0, 1e10, 100, self.state.clone())
        self.now = 0

    def run(self, steps):
        """That many more steps."""
        members = self.state, self.lr, None, self.problem, self.batches
        taken = self.kernel.advance(*members, self.now, self.now + steps, guard=self.guard)
        assert taken == steps, "a member stopped: the rates would be wrong"
        self.now += steps


def seconds(run, steps):
    """Processor time of one call."""
    began = time.process_time()
    run(steps)
    return time.process_time() - began


def steps_in(run, target):
    """How many steps take about that many seconds."""
    steps = 1
    while (took := seconds(run, steps)) < 0.2 * target:
        steps *= 4
    return max(1, round(steps * target / took))


def compare(contenders, rounds, target):
    """Seconds per step of each contender: the median of rounds in which they take turns."""
    steps = [steps_in(run, target) for run in contenders]
    times = [[seconds(run, k) / k for run, k in zip(contenders, steps, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="per round and contender")
    parser.add_argument("--float32", action="store_true")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.float32 else torch.float64
    rng = np.random.default_rng(0)
    print(f"{'(N, D)':>12} {'E':>5} {'batch':>5} {'NumPy ns':>9} {'kernel ns':>9} {'ratio':>7}")
    for n, d, members in CASES:
        x, teacher = rng.standard_normal((n, d)), np.zeros(d)
        teacher[:3] = 1.0
        y = x @ teacher
        for batch_size, lean, lr in ((0, numpy_full, 0.05), (1, numpy_sampled, 0.2 / d)):
            kernel = Kernel(x, y, lr, members, batch_size, dtype)
            kernel.run(1)  # compiles
            contenders = (partial(lean, x, y, lr), kernel.run)
            lean_ns, kernel_ns = (1e9 * s for s in compare(contenders, arguments.rounds, arguments.seconds))
            kernel_ns /= members
            print(f"{f'({n}, {d})':>12} {members:>5} {batch_size or 'full':>5} {lean_ns:9.0f} {kernel_ns:9.1f} "
                  f"{lean_ns / kernel_ns:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
