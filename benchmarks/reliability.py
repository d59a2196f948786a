"""What does a fit survive? Kills, signals, full disks, damaged files, simultaneous starts, a million steps.

    python benchmarks/reliability.py            # writes benchmarks/results/reliability.md; half an hour on one core
    python benchmarks/reliability.py R12        # measures some rows of it again

A study takes an empty folder and how many trials to make, and returns how many it has made and what failed. The tests
call the same studies with fewer trials. Every fit and every resume is a fork of this process in a folder of its own, so
that it can be killed at an exact moment; what forks cannot show (signals to a whole program) starts real ones.
"""

import argparse
import contextlib
import errno
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

import dlnlab
from dlnlab import Ensemble, fitting, load_results, study
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.data import SparseRegression
from dlnlab.files import DamagedFileError
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.recorder import EventFile
from dlnlab.results import read_segment

RUN = Path("lightning_logs/trial/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
KILLED = -signal.SIGKILL

SMALL = {
    "ensemble": {
        "lr": [0.05, 0.9],
        "batch_size": [2, "full"],
        "sampling": ["replacement", "subset", "epochs"],
        "seed": 1,
    },
    "model": {"class_path": "DiagonalLinearNetwork", "init_args": {"init_scale": 0.3, "label_noise": 0.1}},
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "record": {"at": [0, 1, 17, 50, 51, 100, 129, 190], "max_runs": 5},
    "guard": {"every_n_steps": 10},
    "trainer": {
        "max_steps": 130,
        "callbacks": [
            {"class_path": "GainTracker", "init_args": {"every_n_steps": 41}},
            {"class_path": "PredictorNorm", "init_args": {"at": [13, 99]}},
        ],
    },
}
"""All samplings, batch sizes and label noise; members that diverge; schedules that share no period; 13 checkpoints."""

GENERIC = {
    **SMALL,
    "ensemble": {"batch_size": [1, "full"], "sampling": ["epochs", "subset"], "seed": 2},
    "model": {
        "class_path": "DiagonalLinearNetwork",
        "init_args": {
            "label_noise": 0.1,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}},
        },
    },
    "record": {"at": SMALL["record"]["at"], "variables": ["train_loss", "beta"]},
    "trainer": {
        "max_steps": 130,
        "callbacks": [{"class_path": "PredictorNorm", "init_args": {"every_n_steps": 7}}],
    },
}
"""Autograd and Adam."""

SHALLOW = {
    **SMALL,
    "ensemble": {"lr": [0.2, 1.2, 2.5], "init": ["equal", "orthogonal"], "target": [1.0, 0.7], "seed": 1},
    "model": {"class_path": "ShallowLinearNetwork", "init_args": {"init_scale": 0.8, "width": 3}},
    "data": {"class_path": "ScalarTarget"},
    "trainer": {
        "max_steps": 130,
        "callbacks": [{"class_path": "ShallowTheory", "init_args": {"every_n_steps": 41}}],
    },
}
"""The shallow network's kernel: members that converge, that are chaotic and that diverge."""


# Fits that can be killed ------------------------------------------------------------------------------------------------


def in_child(function: Callable[[], int], folder: Path, after: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Run a function in a fork whose working folder is `folder`.

    Args:
        function: What to run; what it returns is the exit code.
        folder: The working folder.
        after: Called here with the child's number while it runs.

    Returns:
        The exit code, -N for a death by signal N, and what was printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.chdir(folder)
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = function()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        if after is not None:
            after(child)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


class Program:
    """`dlnlab fit` with one config, parsed once, to be run in forks.

    Args:
        config: The config.
        folder: Where the config file goes.
        *arguments: Further arguments.
    """

    def __init__(self, config: dict[str, Any], folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with fitting.quiet():
            self.study = study.Study(["fit", "--config", str(folder / "trial.yaml"), *arguments])
        torch.set_num_threads(1)

    def __call__(
        self,
        folder: Path,
        resume: bool | Path = False,
        before: Callable[[fitting.Run], None] | None = None,
        after: Callable[[int], None] | None = None,
    ) -> tuple[int, str]:
        """Run it in `folder`; see `in_child`.

        Args:
            folder: The working folder.
            resume: Whether to go on from last.ckpt, or from which checkpoint.
            before: Called in the fork with the run before anything happens.
            after: Called here with the fork's number while it runs.
        """

        def fit() -> int:
            self.study.main.ckpt_path = str(LAST if resume is True else resume) if resume else None
            if before is not None:
                before(self.study.main)
            study.Study = lambda argv: self.study
            return study.main(["fit"])

        return in_child(fit, folder, after)


class At(Callback):
    """Does something at one optimizer step, before or after all others have looked."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act = step, act

    def next_event(self, step: int) -> int | None:
        """The step."""
        return self.step if step < self.step else None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Act."""
        if trainer.global_step == self.step:
            self.act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, act: Callable[[], Any] = die, last: bool = False) -> Callable[[fitting.Run], None]:
    """Act when a step is reached, before the checkpoint of that step is written or after it."""

    def prepare(run: fitting.Run) -> None:
        callbacks = run.trainer.callbacks
        callbacks.insert(len(callbacks) if last else 0, At(step, act))

    return prepare


class Disk:
    """Counts what touches the disk, and acts just before or after one of these moments, or halfway through a write."""

    CALLS = ("fsync", "replace", "link", "unlink")

    def __init__(self, moment: int = -1, act: Callable[[], Any] = die) -> None:
        self.count, self.moment, self.act = 0, moment, act

    def _passes(self) -> None:
        if self.count == self.moment:
            self.act()
        self.count += 1

    def __call__(self, run: fitting.Run) -> None:
        """Watch from now on."""
        del run
        for name in self.CALLS:
            setattr(os, name, self._watched(getattr(os, name)))
        append = EventFile._append

        def halfway(file: EventFile, events: list) -> None:
            if self.count == self.moment:
                append(file, events)
                with open(file.path, "r+b") as opened:
                    opened.truncate(file.length - 5)
            self._passes()
            append(file, events)

        EventFile._append = halfway

    def _watched(self, call: Callable) -> Callable:
        def watched(*arguments: Any, **options: Any) -> Any:
            self._passes()
            result = call(*arguments, **options)
            self._passes()
            return result

        return watched


def count_moments(program: Program, folder: Path) -> int:
    """How many moments of `Disk` one fit has."""
    disk = Disk()

    def prepare(run: fitting.Run) -> None:
        disk(run)
        run.recorder.teardown = _then(run.recorder.teardown, lambda: Path("moments").write_text(str(disk.count)))

    program(folder, before=prepare)
    return int((folder / "moments").read_text())


def _then(function: Callable, act: Callable[[], Any]) -> Callable:
    def both(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        act()

    return both


# What a run leaves ------------------------------------------------------------------------------------------------------


def difference(folder: Path, other: Path, last: str = "last.ckpt") -> str | None:
    """What differs between two runs: last state, results or TensorBoard series; None if they are bitwise the same."""
    if not load_results(folder / RUN).identical(load_results(other / RUN)):
        return "results"
    one, two = (AtomicCheckpointIO().load_checkpoint(path / RUN / "checkpoints" / last) for path in (folder, other))
    for key in ("global_step", "state_dict", "optimizer_states", "dlnlab_kept", "dlnlab_guard"):
        if not same(one[key], two[key]):
            return f"checkpoint: {key}"
    if one["callbacks"]["Recorder"]["last_recorded"] != two["callbacks"]["Recorder"]["last_recorded"]:
        return "checkpoint: last_recorded"
    if events(folder) != events(other):
        return "TensorBoard"
    strays = [path.name for path in (folder / RUN).rglob(".*.tmp")]
    return f"left behind: {strays}" if strays else None


def same(one: Any, two: Any) -> bool:
    """Bitwise equality of nested containers of tensors; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        equal = torch.equal(torch.nan_to_num(one, 1.5e300), torch.nan_to_num(two, 1.5e300))
        return one.dtype == two.dtype and one.shape == two.shape and equal
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def events(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """{cell/tag: [(step, value), ...]} of scalars as the event loader reads them, in the order of the file."""
    series: dict[str, list[tuple[int, str]]] = {}
    for path in sorted((folder / RUN / "cells").rglob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name != "scalars":
                    continue
                number = float(tensor_util.make_ndarray(value.tensor))
                series.setdefault(f"{path.parent.name}/{value.tag}", []).append((event.step, repr(number)))
    return series


def same_as_before(program: Program, folder: Path, reference: Path) -> str | None:
    """Resume a run, or start it again where it had no checkpoint yet, and compare it with the reference."""
    if (folder / LAST).exists():
        code, output = program(folder, resume=True)
    else:
        shutil.rmtree(folder)
        code, output = program(folder)
    return f"exit code {code}: {output[-500:]}" if code != 0 else difference(folder, reference)


# Studies ----------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a study has found.

    Args:
        bar: What must hold.
        trials: How often it was tried.
        failures: What went wrong.
        note: What was measured beside.
    """

    bar: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def add(self, name: Any, failure: str | None) -> None:
        """Count one trial."""
        self.trials += 1
        if failure is not None:
            self.failures.append(f"{name}: {failure}")


def killed_at_steps(folder: Path, config: dict = SMALL, steps: list[int] | range = range(1, 130, 9)) -> Outcome:
    """R1: death at exact steps, before and after the checkpoint of that step."""
    found = Outcome("killed at an exact step and resumed: bitwise the uninterrupted run")
    program = Program(config, folder)
    program(folder / "reference")
    for step in steps:
        for last in (False, True):
            place = folder / f"{step}-{last}"
            code, output = program(place, before=at_step(step, last=last))
            found.add(
                (step, last), output[-300:] if code != KILLED else same_as_before(program, place, folder / "reference")
            )
            shutil.rmtree(place)
    return found


def killed_while_writing(folder: Path, config: dict = SMALL, stride: int = 7) -> Outcome:
    """R1, R4: death at moments that touch the disk (every seventh), in the middle of a write too."""
    found = Outcome(
        "killed while a checkpoint, segment or event is written, and resumed: bitwise the uninterrupted run"
    )
    program = Program(config, folder)
    program(folder / "reference")
    for moment in range(0, count_moments(program, folder / "count"), stride):
        place = folder / str(moment)
        code, output = program(place, before=Disk(moment))
        found.add(moment, output[-300:] if code != KILLED else same_as_before(program, place, folder / "reference"))
        shutil.rmtree(place, ignore_errors=True)
    return found


def long(config: dict, steps: int) -> dict:
    """The same config with more steps, recorded on a logarithmic schedule, and without label noise: the kernel's path."""
    model = {"class_path": "DiagonalLinearNetwork", "init_args": {"init_scale": 0.3}}
    record = {**config["record"], "at": {"log10": [0, 4, 40]}}
    return {**config, "model": model, "record": record, "trainer": {**config["trainer"], "max_steps": steps}}


def killed_at_random(folder: Path, trials: int = 20, steps: int = 4000, seed: int = 0) -> Outcome:
    """R1: `kill -9` at random times, again and again until the run has ended."""
    found = Outcome("kill -9 at random times, several in a run, each resumed: bitwise the uninterrupted run")
    program, clock = Program(long(SMALL, steps), folder), random.Random(seed)
    began = time.monotonic()
    program(folder / "reference")
    duration, kills = time.monotonic() - began, 0

    def kill(child: int) -> None:
        time.sleep(clock.uniform(0, duration))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    while kills < trials:
        place = folder / str(kills)
        code = KILLED
        while code == KILLED and kills < trials:
            if (place / RUN).exists() and not (place / LAST).exists():
                shutil.rmtree(place)
            code, output = program(place, resume=(place / LAST).exists(), after=kill)
            kills += code == KILLED
            found.trials += code == KILLED
            if code not in (KILLED, 0):
                found.failures.append(f"{place.name}: exit code {code}: {output[-300:]}")
        failure = same_as_before(program, place, folder / "reference") if code == KILLED else difference(
            place, folder / "reference"
        )  # fmt: skip
        if failure is not None:
            found.failures.append(f"{place.name}: {failure}")
        shutil.rmtree(place)
    return found


def resumed_from_every_checkpoint(folder: Path, config: dict = SMALL) -> Outcome:
    """R2: every checkpoint of a run, epoch ends included."""
    found = Outcome("resumed from every checkpoint of a finished run: bitwise the same run")
    program = Program(config, folder)
    program(folder / "reference")
    for path in sorted((folder / "reference" / RUN / "checkpoints").glob("*.ckpt")):
        place = folder / path.stem
        shutil.copytree(folder / "reference", place)
        code, output = program(place, resume=RUN / "checkpoints" / path.name)
        found.add(path.name, output[-300:] if code != 0 else difference(place, folder / "reference"))
        shutil.rmtree(place)
    return found


def signals(folder: Path, trials: int = 20, steps: int = 4000, seed: int = 0) -> Outcome:
    """SIGTERM and Ctrl-C at random times: an end in order, exit code 143 or 130, and a resume that is the same run."""
    found = Outcome(
        "SIGTERM or Ctrl-C at random times: ends in order with a checkpoint; resumed: the uninterrupted run"
    )
    program, clock = Program(long(SMALL, steps), folder), random.Random(seed)
    began = time.monotonic()
    program(folder / "reference")
    duration = time.monotonic() - began
    while found.trials < trials:
        number, place = clock.choice([signal.SIGTERM, signal.SIGINT]), folder / str(found.trials)

        def send(child: int, number: int = number, place: Path = place) -> None:
            while not (place / RUN / "results").exists():  # before that nothing can be saved, and nothing is lost
                time.sleep(0.01)
            time.sleep(clock.uniform(0, 0.8 * duration))
            os.kill(child, number)

        code, output = program(place, after=send)
        if code == 0:  # it was faster
            shutil.rmtree(place)
            continue
        found.add(place.name, _ended_in_order(program, place, folder / "reference", code, output, number))
        shutil.rmtree(place)
    return found


def _ended_in_order(program: Program, place: Path, reference: Path, code: int, output: str, number: int) -> str | None:
    if code != 128 + number:
        return f"exit code {code}: {output[-300:]}"
    step = AtomicCheckpointIO().load_checkpoint(place / LAST)["global_step"]
    lines = output.splitlines()
    said = f"dlnlab fit: stopped at step {step} by {signal.Signals(number).name}; go on with --ckpt_path {LAST}"
    if said not in lines or f"run: {RUN}" not in lines or len(lines) != 2:
        return f"said {output!r}"
    if int(load_results(place / RUN).step[-1]) != step:
        return "the last step was not recorded"
    return same_as_before(program, place, reference)


def damaged(folder: Path, trials: int = 1000, seed: int = 0) -> Outcome:
    """R6: single flipped bits and truncations of a checkpoint and of segments."""
    found = Outcome("one flipped bit or a truncation of a checkpoint or segment: detected, no wrong number is loaded")
    program, dice = Program(SMALL, folder), random.Random(seed)
    program(folder / "run")
    checkpoint = folder / "run" / RUN / "checkpoints" / "step=100.ckpt"
    parts = sorted((folder / "run" / RUN / "results").glob("part-*.npz"))
    for trial in range(trials):
        path = checkpoint if trial % 2 else dice.choice(parts)
        whole = path.read_bytes()
        broken = bytearray(whole)
        if trial % 10 < 8:
            broken[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        else:
            del broken[dice.randrange(len(whole)) :]
        path.write_bytes(broken)
        try:
            AtomicCheckpointIO().load_checkpoint(path) if path is checkpoint else read_segment(path)
            found.add(f"{path.name}, {trial}", "was loaded")
        except (CheckpointError, DamagedFileError) as error:
            found.add(trial, None if path.name in str(error) else f"{path.name} is not named: {error}")
        path.write_bytes(whole)
    return found


def simultaneous(folder: Path, starts: int = 16) -> Outcome:
    """R10: programs started at once in one folder."""
    found = Outcome("16 simultaneous starts of `dlnlab fit` in one folder: 16 directories, 0 errors")
    program = Program(SMALL, folder)  # writes the config
    program(folder / "reference")
    command = [sys.executable, "-m", "dlnlab", "fit", "--config", str(folder / "trial.yaml")]
    place = folder / "place"
    place.mkdir()
    started = [
        subprocess.Popen(command, cwd=place, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(starts)
    ]
    for process in started:
        output, errors = process.communicate()
        found.add(process.pid, None if process.returncode == 0 else errors.decode()[-300:])
        found.note = output.decode().splitlines()[-1] if output else ""
    names = sorted(path.name for path in (place / RUN.parent).iterdir())
    if names != sorted(f"version_{number}" for number in range(starts)):
        found.failures.append(f"directories {names}")
    expected = load_results(folder / "reference" / RUN)
    for name in names:
        if not load_results(place / RUN.parent / name).identical(expected):
            found.failures.append(f"{name}: other results")
    found.note = f"{len(names)} directories"
    return found


def _environment() -> dict[str, str]:
    here = str(Path(dlnlab.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of a few pages at `folder`; False where this system does not let us mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system's options."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def one_line(output: str, code: int, expected: int, *words: str) -> str | None:
    """None if a failed fit said one line with these words and gave the expected exit code."""
    lines = output.splitlines()
    if code != expected or len(lines) != 1 or not all(word in lines[0] for word in ("dlnlab fit: ", *words)):
        return f"exit code {code}, said {output!r}"
    return None


def full_disk(folder: Path, sizes: list[int] | range = range(64, 1025, 32)) -> Outcome | None:
    """R5: a full disk at many moments: one line, exit code 1 (2 before the fit); more room and a resume mend it."""
    found = Outcome("full disk (tmpfs of 64 KiB to 1 MiB): one line; with room again, the uninterrupted run")
    program = Program(SMALL, folder)
    program(folder / "reference")
    for size in sizes:
        place = folder / str(size)
        with tiny_disk(place, f"{size}k") as mounted:
            if not mounted:
                return None
            code, output = program(place)
            if code == 0:
                found.note = f"{size} KiB were enough"
                break
            failure = one_line(output, code, 1 if (place / RUN).exists() else 2, "No space left on device")
            if failure is None and (place / LAST).exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # the checkpoint itself, not the one before
                    AtomicCheckpointIO().load_checkpoint(place / LAST)
                load_results(place / RUN)
                remount(place, "size=16m")
                code, output = program(place, resume=True)
                failure = output[-300:] if code else difference(place, folder / "reference")
            found.add(f"{size} KiB", failure)
    return found


def no_disk(folder: Path, steps: tuple[int, ...] = (0, 35, 70)) -> Outcome | None:
    """R5: a disk that is or becomes read-only, a run directory that is removed."""
    found = Outcome("read-only file system, run directory removed: one line; writable again, the uninterrupted run")
    program = Program(SMALL, folder)
    program(folder / "reference")
    for step in steps:
        place = folder / f"read-only-{step}"
        with tiny_disk(place, "16m") as mounted:
            if not mounted:
                return None
            if step == 0:
                remount(place, "ro")
                code, output = program(place)
                found.add(place.name, one_line(output, code, 2, "Read-only file system"))
                continue
            before = at_step(step, lambda place=place: remount(place, "ro"))
            code, output = program(place, before=before)
            failure = one_line(output, code, 1, "Read-only file system", f"go on with --ckpt_path {LAST}")
            remount(place, "rw")
            found.add(place.name, failure or same_as_before(program, place, folder / "reference"))
    for step in steps[1:]:
        place = folder / f"removed-{step}"
        code, output = program(place, before=at_step(step, lambda: shutil.rmtree(RUN)))
        found.add(place.name, one_line(output, code, 1, "No such file or directory"))
    return found


def disk_error_at_every_moment(folder: Path, stride: int = 9) -> Outcome:
    """R5: the disk is full at one moment (every ninth): one line, and a resume gives the uninterrupted run."""
    found = Outcome("an error of the disk at any moment: one line, exit code 1 or 2; resumed, the uninterrupted run")
    program = Program(SMALL, folder)
    program(folder / "reference")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for moment in range(0, count_moments(program, folder / "count"), stride):
        place = folder / str(moment)
        code, output = program(place, before=Disk(moment, full))
        started = (place / RUN / "results").exists()
        # The folder's own sync may fail: then the file is there all the same, and the fit goes on.
        failure = None if code == 0 else one_line(output, code, 1 if started else 2, "No space left on device")
        if failure is None:
            failure = difference(place, folder / "reference") if code == 0 else same_as_before(
                program, place, folder / "reference"
            )  # fmt: skip
        found.add(moment, failure)
        shutil.rmtree(place, ignore_errors=True)
    return found


class Generic(DiagonalLinearNetwork):
    """The same network without its closed form."""

    def losses(self, batch: Any) -> torch.Tensor:
        """As before."""
        return super().losses(batch)


class Poison(Callback):
    """Makes one member infinite after a step."""

    def __init__(self, step: int, member: int) -> None:
        self.step, self.member = step, member

    def next_event(self, step: int) -> int | None:
        """The step."""
        return self.step if step < self.step else None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Do it."""
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.w_plus[self.member] = torch.inf


def isolation(folder: Path, steps: list[int] | range = range(1, 61)) -> Outcome:
    """R8: one member diverges at any step; the others' paths and records stay bitwise the same."""
    del folder
    found = Outcome(
        "one member diverges at any step: all others bitwise as beside a tame one (closed form and autograd)"
    )
    axes = {"lr": [0.05, 0.1, 0.15], "batch_size": [1, 4, "full"], "seed": 2}
    for model in (DiagonalLinearNetwork, Generic):
        tame = _ensemble_with(model, axes, None, 0)
        for number, step in enumerate(steps):
            member = number * 5 % 18
            wild = _ensemble_with(model, axes, step, member)
            failure = None
            if [place for place in range(18) if wild["status"][place] == 2] != [member]:
                failure = f"status {wild['status']}"
            others = [place for place in range(18) if place != member]
            for name in tame.keys() - {"status"}:
                if not np.array_equal(_members(tame[name], others), _members(wild[name], others)):
                    failure = f"{name} of another member"
            found.add((model.__name__, step), failure)
    return found


def _members(values: np.ndarray, members: list[int]) -> np.ndarray:
    """Some members of records (T, E, D) or of a state (E, ...)."""
    return values[:, members] if values.ndim == 3 else values[members]


def _ensemble_with(model: type, axes: dict, step: int | None, member: int) -> dict[str, np.ndarray]:
    from lightning.pytorch import Trainer

    network = model(ensemble=Ensemble(**axes))
    recorder = Recorder(every_n_steps=7, variables=["beta", "gain"])
    callbacks = [MemberGuard(every_n_steps=10, tol=0.0), recorder]
    callbacks += [] if step is None else [Poison(step, member)]
    with warnings.catch_warnings(), fitting.quiet():
        warnings.simplefilter("ignore")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_steps=80, callbacks=callbacks, enable_checkpointing=False, accelerator="cpu", **quiet)
        trainer.fit(network, SparseRegression(6, 5, 2))
    dataset = recorder.dataset()
    records = {
        name: dataset[name].transpose("step", ..., "coordinate").values.reshape(len(dataset.step), 18, 5)
        for name in ("beta", "gain")
    }
    state = {name: value.numpy().reshape(18, -1) for name, value in network.member_state().items()}
    return {**records, **state, "status": network.status.numpy()}


def memory(folder: Path, steps: int = 10**6) -> Outcome:
    """R12: memory and open files from step 1e4 to the end, recorded every 100 steps.

    The first checkpoint and the first segment take some 9 MB, once. They would lie at step 50,000, which would look like
    growth, so checkpoints are written every 5,000 steps here.
    """
    found = Outcome("step 10^4 to 10^6, recorded every 100: memory grows by less than 5 MB, no file stays open")
    checkpoints = {"class_path": "dlnlab.callbacks.RunCheckpoint", "init_args": {"every_n_train_steps": 5000}}
    config = {
        **SMALL,
        "ensemble": {"lr": [0.01, 0.02], "seed": 1},
        "model": {"class_path": "DiagonalLinearNetwork"},
        "record": {"every_n_steps": 100},
        "guard": {"every_n_steps": 100, "tol": 0},
        "trainer": {"max_steps": steps, "callbacks": [{"class_path": "GainTracker"}, checkpoints]},
    }
    program = Program(config, folder)

    def note() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open("memory", "a") as file:
            print(pages * resource.getpagesize(), len(os.listdir("/proc/self/fd")), file=file)

    def prepare(run: fitting.Run) -> None:
        for step in (10**4, steps // 10, steps // 2, steps):
            at_step(step, note, last=True)(run)

    code, output = program(folder / "run", before=prepare)
    measured = [[int(word) for word in line.split()] for line in (folder / "run" / "memory").read_text().splitlines()]
    grown = max(size - measured[0][0] for size, _ in measured[1:]) / 1e6
    files = {count for _, count in measured}
    found.note = f"{grown:+.1f} MB, {max(files)} open files; at 10^4, 10^5, 5 10^5, 10^6: " + ", ".join(
        f"{size / 1e6:.1f}" for size, _ in measured
    )
    found.add("fit", None if code == 0 and len(measured) == 4 else f"exit code {code}: {output[-300:]}")
    found.add("memory", None if grown < 5 else found.note)
    found.add("files", None if len(files) == 1 else found.note)
    return found


STUDIES: dict[str, Callable[[Path], Outcome | None]] = {
    "R12 memory": memory,  # first, while this process has nothing to give back that would hide what a fork takes
    "R1 random kills": killed_at_random,
    "R1 exact steps": killed_at_steps,
    "R1 exact steps, autograd": lambda folder: killed_at_steps(folder, GENERIC, range(3, 130, 21)),
    "R1, R4 while writing": killed_while_writing,
    "R2 every checkpoint": resumed_from_every_checkpoint,
    "R2 every checkpoint, autograd": lambda folder: resumed_from_every_checkpoint(folder, GENERIC),
    "signals": signals,
    "R5 full disk": full_disk,
    "R5 read-only, removed": no_disk,
    "R5 errors at any moment": disk_error_at_every_moment,
    "R6 damage": damaged,
    "R8 isolation": isolation,
    "R10 simultaneous starts": simultaneous,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), help="names or parts of names; all by default")
    wanted = parser.parse_args().studies
    rows = _rows_before()
    for name in [name for name in STUDIES if any(part in name for part in wanted)]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = STUDIES[name](Path(folder))
        if outcome is None:
            print(f"{name}: no file system can be mounted here")
            continue
        seconds, count = time.monotonic() - began, len(outcome.failures)
        print(f"{name}: {outcome.trials} trials, {count} failures, {seconds:.0f} s. {outcome.note}", flush=True)
        for failure in outcome.failures[:10]:
            print("   ", failure)
        date = time.strftime("%Y-%m-%d")
        rows[name] = f"| {name} | {outcome.bar} | {outcome.trials} | {count} | {outcome.note} | {date} |"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numpy", "tensorboard"))
    lines = [
        "# What a fit survives",
        "",
        f"Measured by `python benchmarks/reliability.py`: dlnlab {dlnlab.__version__}, {packages}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        '"The uninterrupted run" means bitwise: last state, recorded results and TensorBoard series.',
        "",
        "| study | bar | trials | failures | measured | date |",
        "| --- | --- | --- | --- | --- | --- |",
        *(rows[name] for name in STUDIES if name in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


TABLE = Path(__file__).parent / "results" / "reliability.md"


def _rows_before() -> dict[str, str]:
    """The table's rows by study: those that are not measured again stay."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


if __name__ == "__main__":
    main()
