"""What the benchmarks of steps share: contenders take turns on one thread, and the medians of their rounds are compared.

A contender is built from its case and takes a number of steps; one that takes another number of them returns it. On a
shared machine trust the ratios only.
"""

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

import dlnlab
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.models import LinearNetwork

Run = Callable[[int], int | None]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_ENABLE_X64": "1",
}
"""One thread for everybody; libraries read it when they are imported."""
ALONE = "one member"
"""Contenders with this in their names run one member whatever E is: more of them take as long each."""
NO_JAX = [] if find_spec("jax") else ["", "JAX is not installed (`pip install dlnlab[benchmark]`): its rows are empty."]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every one of these programs has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    return options


def one_thread() -> None:
    """Start this program again where libraries might take more threads, and silence what is no result."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # lightning's advice on workers


def seconds_per_step(run: Run, steps: int, clock: Callable[[], float] = time.process_time) -> float:
    """Processor time of one step."""
    began = clock()
    taken = run(steps)
    return (clock() - began) / (taken or steps)


def steps_in(run: Run, target: float, steps: int = 1) -> int:
    """How many steps take about that many seconds, tried from `steps` on."""
    run(1)  # whatever happens only once
    while (took := seconds_per_step(run, steps) * steps) < 0.2 * target:
        steps *= 4 if took > 0.02 * target else 16
    return max(1, round(steps * target / took))


def in_turns(runs: dict[str, Run], steps: dict[str, int], rounds: int) -> dict[str, float]:
    """Nanoseconds of one step of each: the median of its rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_per_step(run, steps[name]))
    return {name: 1e9 * statistics.median(found) for name, found in times.items()}


def comparison(
    contenders: dict[str, Callable[..., Run]],
    cases: dict[str, tuple[int, int]],
    rounds: int,
    seconds: float,
    longer: int,
    note: str,
) -> list[str]:
    """The table of some contenders in some cases, and how many times faster the last of them is than each other.

    Args:
        contenders: What builds each from (size, members); the last two are the bare kernel and a fit.
        cases: (size, members) of each column.
        rounds: Of each contender.
        seconds: Of a round.
        longer: A fit takes so many times the steps of the kernel, so that it is not mostly setting up.
        note: What else there is to say.
    """
    names = [name for name in contenders if not name.startswith("JAX") or not NO_JAX]
    kernel, fit, columns = *names[-2:], []
    for title, (size, members) in cases.items():
        runs = {name: contenders[name](size, members) for name in names}
        steps = {name: steps_in(run, seconds) for name, run in runs.items() if name != fit}
        steps[fit] = longer * steps[kernel]
        each = {name: 1 if ALONE in name else members for name in names}
        columns.append({name: ns / each[name] for name, ns in in_turns(runs, steps, rounds).items()})
        print(title, {name: round(ns, 1) for name, ns in columns[-1].items()}, flush=True)
    lines = [
        f"Nanoseconds of one step of one member, and such steps per second: medians of {rounds} interleaved rounds of "
        "process CPU time, float64. Below, how many times faster a fit is: it includes setting up, the guard, records, "
        f"result segments and TensorBoard, and takes {longer} times the steps of the kernel's round. The others write "
        f"nothing. {note}",
        "",
    ]
    lines += ["| | " + " | ".join(cases) + " |", "| --- |" + " ---: |" * len(cases)]
    for name in names:
        lines.append(
            f"| {name} | " + " | ".join(f"{number(ns[name])} ns, {1e9 / ns[name]:,.0f}/s" for ns in columns) + " |"
        )
    for name in names[:-2]:
        lines.append(f"| a fit, beside {name} | " + " | ".join(times(ns[name] / ns[fit]) for ns in columns) + " |")
    return lines + NO_JAX


def jax_run(step: Callable, state: Any, inputs: Any, steps_per_call: int) -> Run:
    """jit(scan) of `step(state, input) -> state`; each call has the same inputs, (steps, ...) or None."""
    import jax

    call = jax.jit(
        lambda state, inputs: jax.lax.scan(lambda now, i: (step(now, i), None), state, inputs, steps_per_call)[0]
    )
    jax.block_until_ready(call(state, inputs))  # compiles

    def run(wanted: int) -> int:
        now, calls = state, max(1, round(wanted / steps_per_call))
        for _ in range(calls):
            now = call(now, inputs)
        jax.block_until_ready(now)
        return calls * steps_per_call

    return run


def train(model: LinearNetwork, data: LightningDataModule, steps: int, guard: dict[str, Any], **record: Any) -> Trainer:
    """A whole `Trainer.fit`, setting up included: guard, records, result segments and TensorBoard."""
    recorder = Recorder(**record)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with tempfile.TemporaryDirectory() as folder:
        recorder.directory = Path(folder)
        callbacks = [MemberGuard(**guard), recorder]
        trainer = Trainer(max_steps=steps, callbacks=callbacks, accelerator="cpu", devices=1, **off)
        trainer.fit(model, data)
    return trainer


def train_everyone(
    model: LinearNetwork, data: LightningDataModule, steps: int, guard: dict[str, Any] | None = None, **record: Any
) -> None:
    """The same, for a rate: every member takes all of the steps."""
    trainer = train(model, data, steps, {"tol": 0, **(guard or {})}, **record)
    assert trainer.global_step == steps and not model.status.any(), "a member stopped: the rates would be wrong"


def times(ratio: float) -> str:
    """A ratio for a table."""
    return f"{ratio:.0f}x" if ratio > 9.9 else f"{ratio:.2g}x"


def number(value: float) -> str:
    """Nanoseconds for a table."""
    return f"{value:,.0f}" if value > 99 else f"{value:.3g}"


def header(title: str, option: str = "") -> list[str]:
    """Where and when it was measured."""
    with open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "?")
    packages = ("torch", "lightning", "numpy", "numba", "jax")
    versions = ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return [
        f"# {title}",
        "",
        f"Measured by `python benchmarks/{Path(sys.argv[0]).name}{option}` on {time.strftime('%Y-%m-%d')}, one thread: "
        f"{cpu}, {os.cpu_count()} shared cores, load {load}; dlnlab {dlnlab.__version__}, {versions}, "
        f"Python {platform.python_version()}.",
        "",
    ]


def write(path: Path, lines: list[str]) -> None:
    """Write a table, and show it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
