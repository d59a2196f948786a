"""What does one step of one member of the shallow network cost, and what a phase diagram?

    python benchmarks/shallow.py            # writes benchmarks/results/shallow.md; two minutes on one core
    python benchmarks/shallow.py --quick    # a few seconds: does it run?

Contenders take turns, and the medians of their rounds are compared: on a shared machine trust the ratios only. Everybody
has one thread, steps a and b (or p and m) and keeps what is left of the imbalance.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from trajectories import ONE_THREAD, header, seconds_per_step, steps_in, write

from dlnlab import Ensemble
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.data import ScalarTarget
from dlnlab.kernels import Course, Factors, Log, Multipliers, Rule
from dlnlab.kernels.shallow import advance_cpu, advance_torch
from dlnlab.models import ShallowLinearNetwork

LR, ALPHA, EVERY = 1e-5, 1.0, 100  # so small that no member converges within a measurement
SIZES = [(10, 1), (10, 100), (10, 40_000), (100, 1000)]
BATCHED = "torch, eager and batched"


def starts(width: int, members: int) -> np.ndarray:
    """The factors a and b, (2, E, D)."""
    return np.random.default_rng(0).standard_normal((2, members, width)) * ALPHA / width**0.5


def numpy_batched(width: int, members: int) -> Callable[[int], None]:
    a, b = starts(width, members)
    left = np.ones(members)

    def run(steps: int) -> None:
        nonlocal a, b, left
        for _ in range(steps):
            x = LR * ((a * b).sum(-1) - 1)
            a, b = a - x[:, None] * b, b - x[:, None] * a
            left *= 1 - x * x

    return run


def torch_batched(width: int, members: int) -> Callable[[int], None]:
    a, b = torch.from_numpy(starts(width, members))
    left = torch.ones(members, dtype=torch.float64)

    def run(steps: int) -> None:
        nonlocal a, b
        for _ in range(steps):
            x = LR * ((a * b).sum(-1, keepdim=True) - 1)
            a, b = torch.addcmul(a, x, b, value=-1), torch.addcmul(b, x, a, value=-1)
            left.mul_(1 - x[:, 0].square())

    return run


def jax_scan(width: int, members: int) -> Callable[[int], int]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    per_call = max(1, min(10_000, 20_000_000 // (members * width)))

    def step(state: tuple, _: Any) -> tuple:
        a, b, left = state
        x = LR * ((a * b).sum(-1) - 1)
        return (a - x[:, None] * b, b - x[:, None] * a, left * (1 - x * x)), None

    call = jax.jit(lambda state: jax.lax.scan(step, state, None, per_call)[0])
    state = (*jnp.asarray(starts(width, members)), jnp.ones(members))
    jax.block_until_ready(call(state))  # compiles

    def run(wanted: int) -> int:
        now, calls = state, max(1, round(wanted / per_call))
        for _ in range(calls):
            now = call(now)
        jax.block_until_ready(now)
        return calls * per_call

    return run


def kernel(width: int, members: int, advance: Callable = advance_cpu) -> Callable[[int], None]:
    """The bare kernel, with a check of every member and a record every 100 steps."""
    a, b = torch.from_numpy(starts(width, members))
    factors = Factors.start((a + b) / 2**0.5, (a - b) / 2**0.5)
    state, ones = Multipliers.of(factors), torch.ones(members, dtype=torch.float64)
    course, rule = Course.of(factors, LR * ones, ones), Rule(0.0, 1e10, EVERY, Multipliers.of(factors))
    status, stopped_at, now = torch.zeros(members, dtype=torch.int8), torch.full((members,), -1), 0

    def run(steps: int) -> None:
        nonlocal now
        log = Log.allocate(list(range(now - now % EVERY + EVERY, now + steps + 1, EVERY)), state)
        taken = advance(state, course, now, now + steps, status, stopped_at, rule, log, 1)
        assert taken == steps and not status.any(), "a member stopped: the rates would be wrong"
        now += steps

    run(1)  # compiles
    return run


def fit(width: int, members: int) -> Callable[[int], None]:
    """This project, through `Trainer.fit`: guard, records 12 times a decade, result segments and TensorBoard."""

    def run(steps: int) -> None:
        trainer = train(ShallowLinearNetwork(ensemble=Ensemble(lr=[LR], seed=members), width=width), steps, {"tol": 0})
        assert trainer.global_step == steps, "a member stopped: the rates would be wrong"

    return run


def train(model: ShallowLinearNetwork, steps: int, guard: dict[str, Any], **record: Any) -> Trainer:
    recorder = Recorder(**record)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        recorder.directory = Path(folder)
        trainer = Trainer(
            max_steps=steps, callbacks=[MemberGuard(**guard), recorder], accelerator="cpu", devices=1, **off
        )
        trainer.fit(model, ScalarTarget())
    return trainer


CONTENDERS: dict[str, Callable[[int, int], Callable[[int], Any]]] = {
    "NumPy, batched": numpy_batched,
    BATCHED: torch_batched,
    "JAX jit(scan)": jax_scan,
    "dlnlab, two numbers a member, in torch": lambda width, members: kernel(width, members, advance_torch),
    "dlnlab, the kernel alone": kernel,
    "dlnlab, `Trainer.fit`": fit,
}
SETUP = 20
"""A fit takes so many times the steps of the bare kernel's round, so that it is not mostly setting up."""


def phase_diagram(side: int, steps: int) -> str:
    """A map of `beneventano2025/imbalance`, from nothing to its end."""
    axes = {"lr": {"log10": [-3, 0.602, side]}, "init_scale": {"log10": [-1.15, 0.85, side]}}
    began = time.perf_counter()
    model = ShallowLinearNetwork(ensemble=Ensemble(**axes), init="orthogonal", width=1)
    train(model, steps, {"tol": 5e-17, "every_n_steps": 10}, at={"log10": [0, 5, 6]}, variables=["train_loss"])
    seconds = time.perf_counter() - began
    ends = torch.where(model.status == 0, steps, model.stopped_at).sum()
    return (
        f"A map of {side} x {side} step sizes and initial scales, up to {steps:,} steps each: {seconds:.1f} s of wall time "
        f"from the model to its records, {int(ends):,} member-steps taken."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the table")
    arguments = parser.parse_args()
    if not ONE_THREAD.items() <= os.environ.items():  # libraries read it when they are imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # lightning's advice on workers
    sizes, rounds, seconds = ([(2, 1), (2, 20)], 1, 0.002) if arguments.quick else (SIZES, 5, 0.1)
    lines = header("The shallow network: one step of one member", script="shallow")
    lines += [
        f"Nanoseconds (times faster than batched torch), medians of {rounds} interleaved rounds of process CPU time, "
        "float64; D the width, E members. The kernel checks and records all members every 100 steps; `Trainer.fit` checks "
        "them as often, records train_loss, distance and gain 12 times a decade, writes result segments and TensorBoard, "
        f"and includes setting up, in a fit of {SETUP} times the kernel's steps.",
        "",
        "| | " + " | ".join(f"D={width} E={members:,}" for width, members in sizes) + " |",
        "| --- |" + " ---: |" * len(sizes),
    ]  # fmt: skip
    columns = []
    for width, members in sizes:
        names = [name for name in CONTENDERS if not name.startswith("JAX") or find_spec("jax")]
        runs = {name: CONTENDERS[name](width, members) for name in names}
        steps = {name: steps_in(run, seconds) for name, run in runs.items() if name != names[-1]}
        steps[names[-1]] = SETUP * steps[names[-2]]
        times = {name: [] for name in names}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds_per_step(run, steps[name]))
        columns.append({name: 1e9 * statistics.median(found) / members for name, found in times.items()})
    for name in CONTENDERS:
        cells = (f"{ns[name]:,.3g} ({ns[BATCHED] / ns[name]:.2g}x)" if name in ns else "-" for ns in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", phase_diagram(*((10, 300) if arguments.quick else (200, 100_000)))]
    write(arguments.output / "shallow.md", lines)


if __name__ == "__main__":
    main()
