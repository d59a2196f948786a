"""What does one step of one member of the shallow network cost, and what a phase diagram?

    python benchmarks/shallow.py            # writes benchmarks/results/shallow.md; two minutes on one core
    python benchmarks/shallow.py --quick    # a few seconds: does it run?

Contenders take turns (`contest.py`). Everybody has one thread, steps a and b (or p and m) and keeps what is left of the
imbalance.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from contest import Run, comparison, header, jax_run, one_thread, parser, train, train_everyone, write

from dlnlab import Ensemble
from dlnlab.data import ScalarTarget
from dlnlab.kernels import Course, Factors, Log, Multipliers, Rule
from dlnlab.kernels.shallow import advance_cpu, advance_torch
from dlnlab.models import ShallowLinearNetwork

LR, ALPHA, EVERY = 1e-5, 1.0, 100  # so small that no member converges within a measurement
SIZES = [(10, 1), (10, 100), (10, 40_000), (100, 1000)]


def starts(width: int, members: int) -> np.ndarray:
    """The factors a and b, (2, E, D)."""
    return np.random.default_rng(0).standard_normal((2, members, width)) * ALPHA / width**0.5


def numpy_batched(width: int, members: int) -> Run:
    a, b = starts(width, members)
    left = np.ones(members)

    def run(steps: int) -> None:
        nonlocal a, b, left
        for _ in range(steps):
            x = LR * ((a * b).sum(-1) - 1)
            a, b = a - x[:, None] * b, b - x[:, None] * a
            left *= 1 - x * x

    return run


def torch_batched(width: int, members: int) -> Run:
    a, b = torch.from_numpy(starts(width, members))
    left = torch.ones(members, dtype=torch.float64)

    def run(steps: int) -> None:
        nonlocal a, b
        for _ in range(steps):
            x = LR * ((a * b).sum(-1, keepdim=True) - 1)
            a, b = torch.addcmul(a, x, b, value=-1), torch.addcmul(b, x, a, value=-1)
            left.mul_(1 - x[:, 0].square())

    return run


def jax_scan(width: int, members: int) -> Run:
    import jax
    import jax.numpy as jnp

    def step(state: tuple) -> tuple:
        a, b, left = state
        x = LR * (a @ b - 1)
        return a - x * b, b - x * a, left * (1 - x * x)

    everyone = jax.vmap(step)
    state = (*jnp.asarray(starts(width, members)), jnp.ones(members))
    per_call = max(1, min(10_000, 20_000_000 // (members * width)))
    return jax_run(lambda state, _: everyone(state), state, None, per_call)


def kernel(width: int, members: int, advance: Callable = advance_cpu, device: str = "cpu") -> Run:
    """The bare kernel, with a check of every member and a record every 100 steps."""
    a, b = torch.from_numpy(starts(width, members)).to(device)
    factors = Factors.start((a + b) / 2**0.5, (a - b) / 2**0.5)
    state, ones = Multipliers.of(factors), torch.ones_like(a[:, 0])
    course, rule = Course.of(factors, LR * ones, ones), Rule(0.0, 1e10, EVERY, Multipliers.of(factors))
    status, stopped_at = ones.to(torch.int8) - 1, ones.long() - 2
    now = 0

    def run(steps: int) -> None:
        nonlocal now
        log = Log.allocate(list(range(now - now % EVERY + EVERY, now + steps + 1, EVERY)), state)
        taken = advance(state, course, now, now + steps, status, stopped_at, rule, log, 1)
        assert taken == steps and not status.any(), "a member stopped: the rates would be wrong"
        now += steps

    run(1)  # compiles
    return run


def fit(width: int, members: int) -> Run:
    """This project, through `Trainer.fit`: guard, records 12 times a decade, result segments and TensorBoard."""

    def run(steps: int) -> None:
        model = ShallowLinearNetwork(ensemble=Ensemble(lr=[LR], seed=members), width=width)
        train_everyone(model, ScalarTarget(), steps)

    return run


CONTENDERS: dict[str, Callable[[int, int], Run]] = {
    "NumPy, batched": numpy_batched,
    "torch, eager and batched": torch_batched,
    "JAX jit(scan(vmap))": jax_scan,
    "dlnlab, two numbers a member, in torch": lambda width, members: kernel(width, members, advance_torch),
    "dlnlab, the kernel alone": kernel,
    "dlnlab, `Trainer.fit`": fit,
}
LONGER = 20


def phase_diagram(side: int, steps: int) -> str:
    """A map of `beneventano2025/imbalance`, from nothing to its end."""
    axes = {"lr": {"log10": [-3, 0.602, side]}, "init_scale": {"log10": [-1.15, 0.85, side]}}
    began = time.perf_counter()
    model = ShallowLinearNetwork(ensemble=Ensemble(**axes), init="orthogonal", width=1)
    guard = {"tol": 5e-17, "every_n_steps": 10}
    train(model, ScalarTarget(), steps, guard, at={"log10": [0, 5, 6]}, variables=["train_loss"])
    seconds = time.perf_counter() - began
    ends = torch.where(model.status == 0, steps, model.stopped_at).sum()
    return (
        f"A map of {side} x {side} step sizes and initial scales, up to {steps:,} steps each: {seconds:.1f} s of wall time "
        f"from the model to its records, {int(ends):,} member-steps taken."
    )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    one_thread()
    sizes, rounds, seconds = ([(2, 1), (2, 20)], 1, 0.002) if arguments.quick else (SIZES, 5, 0.1)
    cases = {f"D={width} E={members:,}": (width, members) for width, members in sizes}
    lines = header("The shallow network: one step of one member")
    note = (
        "D is the width. The kernel checks and records all members every 100 steps; a fit checks them as often and records "
        "train_loss, distance and gain 12 times a decade."
    )
    lines += comparison(CONTENDERS, cases, rounds, seconds, LONGER, note)
    lines += ["", phase_diagram(*((10, 300) if arguments.quick else (200, 100_000)))]
    write(arguments.output / "shallow.md", lines)


if __name__ == "__main__":
    main()
