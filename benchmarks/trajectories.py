"""What does one step of one member of the diagonal network cost, and how does the cost of a fit grow?

    python benchmarks/trajectories.py             # writes benchmarks/results/trajectories.md; ten minutes on one core
    python benchmarks/trajectories.py --growth    # writes benchmarks/results/growth.md and growth.png; two minutes
    python benchmarks/trajectories.py --profile   # writes benchmarks/results/profile.md; two minutes
    python benchmarks/trajectories.py --quick     # a minute's worth less of either: does it run?

Contenders take turns (`contest.py`). Everybody has one thread and keeps the gain, but for torch's own optimizer.
"""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import (
    NO_JAX,
    Run,
    header,
    in_turns,
    jax_run,
    number,
    one_thread,
    parser,
    seconds_per_step,
    steps_in,
    times,
    train_everyone,
    write,
)

from dlnlab import Ensemble, streams
from dlnlab.data import SparseRegression
from dlnlab.kernels import Batches, Factors, Guard, Records, diagonal_steps
from dlnlab.kernels.cpu import DiagonalKernel
from dlnlab.models import DiagonalLinearNetwork

ALPHA, EVERY = 0.1, 100
LONGER = 50
"""A fit takes so many times the steps that the kernel is timed with: five seconds, a quarter of one of them to set up."""
SIZES = [(20, 30, 1), (20, 30, 30), (20, 30, 1000), (40, 100, 100), (200, 1000, 1), (200, 1000, 100)]


@dataclass
class Case:
    """E members on one problem (N, D), each row drawn with replacement where the batch size is 1, 0 the full batch."""

    n: int
    d: int
    members: int
    batch_size: int

    def __post_init__(self) -> None:
        self.lr = 0.2 / self.d if self.batch_size else 0.05
        data = self.data()
        data.setup("fit")
        self.x, self.y = data.problems.x[0].numpy(), data.problems.y[0].numpy()

    def data(self) -> SparseRegression:
        """The problem, as a fit takes it."""
        return SparseRegression(self.n, self.d, num_test_samples=0)

    @property
    def flops(self) -> int:
        """Of one step of one member: two matrix-vector products (one row's, for a batch of 1) and ten per coordinate."""
        rows = self.batch_size or self.n
        return 4 * rows * self.d + rows + 10 * self.d

    @property
    def row_of_step(self) -> Callable[[int], np.ndarray]:
        """How many steps -> their rows."""
        return partial(np.random.default_rng(0).integers, 0, self.n)


# Contenders: each is built from a case and takes a number of steps ----------------------------------------------------


def numpy_lean(case: Case) -> Run:
    """The shortest loop: u, v and the gain; rows drawn ahead."""
    x, y, n, lr = case.x, case.y, case.n, case.lr

    def run(steps: int) -> None:
        u, v, gain = np.full(case.d, 2**0.5 * ALPHA), np.zeros(case.d), np.zeros(case.d)
        for i in case.row_of_step(steps) if case.batch_size else range(steps):
            if case.batch_size:
                row = x[i]
                step = lr * (row @ (u * v) - y[i]) * row
            else:
                step = lr * ((x @ (u * v) - y) @ x / n)
            u, v = u - step * v, v - step * u
            gain -= np.log(np.abs(1 - step * step))

    return run


def numpy_notebook(case: Case) -> Run:
    """As notebooks have it: rows by `rng.choice` each step, and the loss logged each step."""
    rng, x, y = np.random.default_rng(0), case.x, case.y

    def run(steps: int) -> None:
        u, v, gain, losses = np.full(case.d, 2**0.5 * ALPHA), np.zeros(case.d), np.zeros(case.d), []
        for _ in range(steps):
            rows = rng.choice(case.n, case.batch_size, replace=False) if case.batch_size else slice(None)
            xb, yb = x[rows], y[rows]
            step = case.lr * xb.T @ (xb @ (u * v) - yb) / len(yb)
            u, v = u - step * v, v - step * u
            gain -= np.log(np.abs(1 - step**2))
            losses.append(np.mean((x @ (u * v) - y) ** 2) / 2)

    return run


def torch_autograd(case: Case) -> Run:
    """One member with autograd and torch.optim.SGD, without the gain."""
    x, y = torch.from_numpy(case.x), torch.from_numpy(case.y)

    def run(steps: int) -> None:
        u = torch.full((case.d,), 2**0.5 * ALPHA, dtype=torch.float64, requires_grad=True)
        v = torch.zeros(case.d, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([u, v], lr=case.lr)
        for i in case.row_of_step(steps).tolist():
            xb, yb = (x[i : i + 1], y[i : i + 1]) if case.batch_size else (x, y)
            optimizer.zero_grad()
            (((xb @ (u * v)) - yb).square().mean() / 2).backward()
            optimizer.step()

    return run


def torch_batched(case: Case) -> Run:
    """All members at once, in eager torch: `dlnlab.kernels.reference`; rows drawn ahead."""
    x, y = torch.from_numpy(case.x), torch.from_numpy(case.y)
    scaled = x / case.n
    lr = torch.tensor(case.lr, dtype=torch.float64)

    def run(steps: int) -> None:
        w = torch.full((case.members, case.d), ALPHA, dtype=torch.float64)
        rows = torch.randint(case.n, (min(steps, 1000), case.members))

        def full(beta: torch.Tensor, step: int) -> torch.Tensor:
            return (beta @ x.T).sub_(y) @ scaled

        def sampled(beta: torch.Tensor, step: int) -> torch.Tensor:
            row = rows[step % len(rows)]
            xb = x[row]
            return xb * (xb * beta).sum(-1).sub_(y[row])[:, None]

        diagonal_steps(Factors.start(w, w.clone()), lr, None, sampled if case.batch_size else full, 0, steps)

    return run


def jax_scan(case: Case, product: bool) -> Run:
    """jit(scan(vmap)), the gain by a logarithm each step or by a product whose exponent is taken off every 32 steps.

    Rows are drawn once, outside the measurement.
    """
    import jax
    import jax.numpy as jnp

    x, y, n, lr, period = jnp.asarray(case.x), jnp.asarray(case.y), case.n, case.lr, 32
    periods = max(1, min(300, int(1e7 / (case.members * case.flops))))

    def step(state: tuple, i: Any) -> tuple:
        u, v, gain = state
        if case.batch_size:
            row = x[i]
            s = lr * (row @ (u * v) - y[i]) * row
        else:
            s = lr * ((x @ (u * v) - y) @ x / n)
        factor = 1 - s * s
        return u - s * v, v - s * u, gain * factor if product else gain - jnp.log(jnp.abs(factor))

    everyone = jax.vmap(step)

    def renormalised(carry: tuple, rows: Any) -> tuple:
        (u, v, gain), _ = jax.lax.scan(lambda now, row: (everyone(now, row), None), carry[0], rows)
        gain, more = jnp.frexp(gain)
        return (u, v, gain), carry[1] + more

    shape = (case.members, case.d)
    state = (jnp.full(shape, 2**0.5 * ALPHA), jnp.zeros(shape), jnp.ones(shape) if product else jnp.zeros(shape))
    rows = jnp.asarray(case.row_of_step((periods * period, case.members)))
    if not product:
        return jax_run(everyone, state, rows, periods * period)
    run = jax_run(renormalised, (state, jnp.zeros(shape, jnp.int32)), rows.reshape(-1, period, case.members), periods)
    return lambda steps: period * run(steps // period)


def kernel(case: Case, num_threads: int = 1, guarded: bool = True, recorded: bool = True) -> Run:
    """The bare kernel, with a check of every member and its loss recorded every 100 steps."""
    engine = DiagonalKernel(torch.from_numpy(case.x)[None], torch.from_numpy(case.y)[None])
    members = case.members
    factors = Factors.start(*torch.full((2, members, case.d), ALPHA, dtype=torch.float64))
    lr = torch.full((members,), case.lr, dtype=torch.float64)
    problem = torch.zeros(members, dtype=torch.int64)
    key = streams.keys(0, "sampling", torch.arange(members))
    size = torch.full_like(problem, case.batch_size)
    batches = Batches(size, problem, key, key, torch.zeros(members))
    guard = Guard(0.0, 1e10, EVERY, factors.map(torch.clone)) if guarded else None
    now = 0

    def run(steps: int) -> None:
        nonlocal now
        due = range(now - now % EVERY + EVERY, now + steps + 1, EVERY) if recorded else []
        records = Records.allocate(due, factors)
        arguments = factors, lr, None, problem, batches, now, now + steps
        taken = engine.advance(*arguments, guard=guard, records=records, num_threads=num_threads)
        assert taken == steps, "a member stopped: the rates would be wrong"
        now += steps

    run(1)  # compiles
    return run


def fit(case: Case, **record: Any) -> Run:
    """This project, through `Trainer.fit`: guard, records, result segments and TensorBoard."""

    def run(steps: int) -> None:
        lr = {"linear": [0.9 * case.lr, case.lr, case.members]} if case.members > 1 else case.lr
        model = DiagonalLinearNetwork(ensemble=Ensemble(lr=lr), init_scale=ALPHA, batch_size=case.batch_size or "full")
        train_everyone(model, case.data(), steps, **record)

    return run


LEAN, KERNEL, FIT = "NumPy, lean", "dlnlab, the kernel alone", "dlnlab, `Trainer.fit`, recorded 12 times a decade"
FIT_EVERY = "dlnlab, `Trainer.fit`, recorded every 100 steps"
CONTENDERS: dict[str, Callable[[Case], Run]] = {
    LEAN: numpy_lean,
    "NumPy, as in notebooks": numpy_notebook,
    "torch, autograd and optim.SGD, no gain": torch_autograd,
    "torch, eager and batched": torch_batched,
    "JAX jit(scan(vmap)), log": partial(jax_scan, product=False),
    "JAX jit(scan(vmap)), product": partial(jax_scan, product=True),
    KERNEL: kernel,
    FIT: fit,
    FIT_EVERY: partial(fit, every_n_steps=EVERY),
}
ALONE = (LEAN, "NumPy, as in notebooks", "torch, autograd and optim.SGD, no gain")
"""Contenders that run one member whatever E is: more of them take as long each."""


def gemm_peak() -> float:
    """GFLOP/s of the best of ten float64 matrix products of size 1024, on one thread."""
    a, product = np.random.default_rng(0).standard_normal((1024, 1024)), np.empty((1024, 1024))
    times = [seconds_per_step(lambda _: np.matmul(a, a, out=product) is None, 1) for _ in range(11)]
    return 2e-9 * 1024**3 / min(times)


# One step of one member -----------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int, seconds: float) -> tuple[dict[str, float], dict[str, int]]:
    """Nanoseconds per step of one member, and the steps of each contender's round."""
    runs, steps = {}, {}
    for name, build in CONTENDERS.items():
        if (name.startswith("JAX") and not find_spec("jax")) or (
            name.startswith("torch, autograd") and case.members > 1
        ):
            continue
        runs[name] = build(case)
        if name == FIT:
            steps[name] = LONGER * steps[KERNEL]
        elif name == FIT_EVERY:
            steps[name] = steps_in(runs[name], 10 * seconds, steps[KERNEL])
        else:
            steps[name] = steps_in(runs[name], seconds)
    found = in_turns(runs, steps, rounds)
    return {name: ns / (1 if name in ALONE else case.members) for name, ns in found.items()}, steps


def table(cases: list[Case], measured: list[tuple[dict[str, float], dict[str, int]]], peak: float) -> list[str]:
    """Contenders down, cases across."""
    lines = ["| | " + " | ".join(f"({case.n}, {case.d}) E={case.members}" for case in cases) + " |"]
    lines.append("| --- |" + " ---: |" * len(cases))
    for name in CONTENDERS:
        cells = []
        for case, (ns, _) in zip(cases, measured, strict=True):
            if name not in ns:
                cells.append("-")
                continue
            share = 100 * case.flops / ns[name] / peak
            cells.append(f"{number(ns[name])} ({times(ns[LEAN] / ns[name])}, {share:.2g} %)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, what in ((FIT, "12 times a decade"), (FIT_EVERY, "every 100 steps")):
        shares = [f"{1 - ns[KERNEL] / ns[name]:.0%} of {steps[name]:,} steps" for ns, steps in measured]
        lines.append(f"| not in the kernel, recorded {what} | " + " | ".join(shares) + " |")
    return lines


def trajectories(quick: bool, folder: Path) -> None:
    """All contenders in all cases."""
    sizes, rounds, seconds = ([(4, 6, 1), (4, 6, 20)], 1, 0.002) if quick else (SIZES, 3, 0.1)
    peak = gemm_peak()
    lines = header("The diagonal network: one step of one member")
    lines += [
        f"Nanoseconds (times faster than lean NumPy, share of the {peak:.0f} GFLOP/s that a float64 matrix product of size "
        f"1024 reaches here), medians of {rounds} interleaved rounds of process CPU time, float64. A step counts 4bD + b + "
        "10D operations, b rows; (N, D) problem, E members that share it. The kernel checks all members and records their "
        "losses every 100 steps, and so does `Trainer.fit`, which records train_loss, distance and gain, writes result "
        "segments and TensorBoard, and includes setting up; the other contenders write nothing.",
    ]  # fmt: skip
    lines += NO_JAX
    for batch_size, title in ((0, "Gradient descent"), (1, "Stochastic gradient descent, one row a step")):
        cases = [Case(*size, batch_size) for size in sizes]
        measured = []
        for case in cases:
            measured.append(measure(case, rounds, seconds))
            print(f"({case.n}, {case.d}) E={case.members} b={case.batch_size or 'full'}", flush=True)
            for name, ns in measured[-1][0].items():
                print(f"    {name:50} {ns:11,.1f} ns {times(measured[-1][0][LEAN] / ns):>8}", flush=True)
        lines += ["", f"## {title}", "", *table(cases, measured, peak)]
    write(folder / "trajectories.md", lines)


# Where the kernel's time goes -----------------------------------------------------------------------------------------


def profile(quick: bool, folder: Path) -> None:
    """The kernel with and without what happens every 100 steps, and what its steps reach."""
    sizes, rounds, seconds = ([(4, 6, 1)], 1, 0.002) if quick else (SIZES, 7, 0.1)
    peak = gemm_peak()
    lines = header("The diagonal network: where the kernel's time goes", " --profile")
    lines += [
        "Nanoseconds per member-step, medians of interleaved rounds of process CPU time: the kernel with a check and a "
        "record of every member every 100 steps; without the records; and without both, which leaves steps. Of these, the "
        f"operations per second (a matrix product of size 1024 has {peak:.0f} GFLOP/s) and the bytes of x per second.",
        "",
        "| (N, D) | E | b | NumPy, lean | kernel | without records | steps alone | GFLOP/s | x, GB/s |",
        "| ---: " * 9 + "|",
    ]
    for case in [Case(*size, b) for b in (0, 1) for size in sizes]:
        runs = {
            "numpy": numpy_lean(case),
            "kernel": kernel(case),
            "guarded": kernel(case, recorded=False),
            "steps": kernel(case, guarded=False, recorded=False),
        }
        steps = {name: steps_in(run, seconds) for name, run in runs.items()}
        found = in_turns(runs, steps, rounds)
        ns = {name: each / (1 if name == "numpy" else case.members) for name, each in found.items()}
        cells = [number(ns[name]) for name in runs]
        read = 8 * (case.batch_size or case.n) * case.d / ns["steps"]
        lines.append(
            f"| ({case.n}, {case.d}) | {case.members} | {case.batch_size or 'full'} | {' | '.join(cells)} | "
            f"{case.flops / ns['steps']:.1f} | {read:.1f} |"
        )
        print(lines[-1], flush=True)
    write(folder / "profile.md", [*lines, "", *BOUNDS])


BOUNDS = """\
What bounds a row (measured where a number says so, else concluded from the table):

- **One row a step, D <= 32**: a chain of dependent instructions of about sixty cycles. A step's factor is a sum over
  coordinates of what the last step left: three multiplications, five additions, shuffles between them, and back into
  every coordinate. Measured with E = 30: when the factor is taken from elsewhere, all else as it is, a step takes 19 ns in
  place of 28; without Philox 26. Two members in turns would fill the gaps.
- **One row a step, D = 1000**: the check, not the steps. It reads all of X (1.6 MB, of 2 MB second-level cache) for one
  loss, twice what the hundred steps between two checks draw.
- **Full batches, members side by side**: multiply-adds. What is missing to the matrix product is the update of the state
  and, at (20, 30), the eight sums of a residual, which have four terms each there and have to be stored and joined. This
  order of sums lets a member alone read x by rows: (200, 1000) E = 1 took 105 us with the order before it (even and odd
  coordinates, read from a transposed copy), and (20, 30) E = 1000 took 54 ns.
- **Full batches, one member, D = 1000**: reading X, once a step for both products (four rows at a time).""".splitlines()


# Growth ---------------------------------------------------------------------------------------------------------------


def cost(run: Run, steps: int) -> tuple[float, float]:
    """Processor seconds, and MB by which the memory of a process at its peak exceeds what it had before; in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            seconds = steps * seconds_per_step(run, steps)
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writer, f"{seconds} {(peak - before) / 1e6}".encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = file.read().split()
    os.waitpid(child, 0)
    return float(found[0]), float(found[1])


def growth(quick: bool, folder: Path) -> None:
    """Time against members, dimension and steps; memory against records; one thread against two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    scale = 1 if quick else 1000
    fit(Case(20, 30, 20, 0))(10)  # compiles, before the forks
    fit(Case(20, 30, 20, 1))(10)
    studies = {
        "members": [(e, Case(20, 30, e, b), scale, {}) for b in (0, 1) for e in _decades(0, 1 if quick else 5)],
        "dimension": [(d, Case(20, d, 10, b), scale, {}) for b in (0, 1) for d in _decades(1, 2 if quick else 4)],
        "steps": [(s, Case(20, 30, 1, b), s, {}) for b in (0, 1) for s in _decades(3, 3 if quick else 7)],
        "records": [
            (s // EVERY, Case(20, 30, 100, 1), s, {"every_n_steps": EVERY}) for s in _decades(3, 3 if quick else 5)
        ],
    }
    lines = header("The diagonal network: how a fit grows", " --growth")
    lines += [
        "Each row is one `Trainer.fit` in a process of its own, results and TensorBoard on, setting up included: processor "
        "seconds, and megabytes that it needs at its peak beyond the imported packages.",
    ]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for (what, rows), ax in zip(studies.items(), axes, strict=True):
        lines += ["", f"| {what} | (N, D) | E | b | steps | s | ns per member-step | MB |", "| ---: " * 8 + "|"]
        series: dict[int, list[tuple[float, float]]] = {}
        for value, case, steps, record in rows:
            seconds, size = cost(fit(case, **record), steps)
            each = 1e9 * seconds / steps / case.members
            lines.append(
                f"| {value:,} | ({case.n}, {case.d}) | {case.members:,} | {case.batch_size or 'full'} | {steps:,} | "
                f"{seconds:.2f} | {each:,.1f} | {size:.0f} |"
            )
            print(lines[-1], flush=True)
            series.setdefault(case.batch_size, []).append((value, size if what == "records" else seconds))
        for batch_size, points in series.items():
            ax.loglog(*zip(*points, strict=True), "o-", label=f"batch size {batch_size or 'full'}")
        ax.set(xlabel=what, ylabel="MB" if what == "records" else "seconds")
        ax.grid(alpha=0.3)
    axes[0].legend()
    members, steps = (100, 10) if quick else (10_000, 2_000)
    lines += ["", f"| kernel, (20, 30), E = {members:,} | one thread, s | two threads, s | ratio |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for batch_size, name in ((0, "gradient descent"), (1, "one row a step")):
        runs = [kernel(Case(20, 30, members, batch_size), threads) for threads in (1, 2)]
        times = [[steps * seconds_per_step(run, steps, time.perf_counter) for run in runs] for _ in range(3)]
        one, two = (min(column) for column in zip(*times, strict=True))
        lines.append(f"| {name}, {steps:,} steps, wall time, best of 3 | {one:.2f} | {two:.2f} | {one / two:.2f} |")
        print(lines[-1], flush=True)
    write(folder / "growth.md", [*lines, "", "![growth](growth.png)"])
    figure.savefig(folder / "growth.png", dpi=80)


def _decades(low: int, high: int) -> list[int]:
    return [10**k for k in range(low, high + 1)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--growth", action="store_true", help="how time and memory grow")
    options.add_argument("--profile", action="store_true", help="where the kernel's time goes")
    arguments = options.parse_args()
    one_thread()
    study = growth if arguments.growth else profile if arguments.profile else trajectories
    study(arguments.quick, arguments.output)


if __name__ == "__main__":
    main()
