"""One command line -> a study: the main run and its variants, all checked before the first one starts."""

import contextlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from dlnlab import checks, config
from dlnlab.checkpoint import CheckpointError
from dlnlab.figures import Figure
from dlnlab.fitting import Interrupted, Run, quiet, without_noise
from dlnlab.messages import Mistake, about, explain, needs_no_traceback
from dlnlab.models.trainer import own_process
from dlnlab.start import Origin, Start

MAIN = "main"
PRINT = "--print_config"
_FOLDER = "variants"
_RESERVED = (MAIN, "self", "dataset", "directory")
"""No variants' names: figures have arguments called so."""
_NOT_OF_A_VARIANT = {
    "variants": "a variant has no variants of its own",
    "name": "a variant's name is its key",
    "ckpt_path": "a variant goes on from its own last checkpoint when its study is resumed",
}


@own_process()
def main(argv: list[str]) -> int:
    """Carry out fit, validate, test or predict; see `dlnlab.cli.main` for the exit codes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tensors here are small: more threads wait for each other
    command, printing = argv[0], PRINT in argv
    try:
        with quiet():
            study = Study([word for word in argv if word != PRINT])
            if printing:
                print(study.record(), end="")
                sys.exit(0)  # as --help does
            study.check()
    except Exception as error:  # whatever it is, nothing was made yet, and there is nothing to save
        if "DLNLAB_TRACEBACK" in os.environ:
            traceback.print_exc()
        print(f"dlnlab {command}: {explain(error)}", file=sys.stderr)
        return 2
    for remark in (*study.guesses(), *study.slow()):
        print(f"dlnlab {command}: {remark}", file=sys.stderr)
    try:
        with without_noise():
            study.carry_out()
    except Interrupted as end:
        print(f"dlnlab {command}: {end}", file=sys.stderr)
        print(f"run: {study.main.directory}")
        return 128 + end.signal
    except Exception as error:
        if "DLNLAB_TRACEBACK" in os.environ or not needs_no_traceback(error):
            traceback.print_exc()
        print(f"dlnlab {command}: {study.now.where()}: {explain(error)}{study.main.way_on()}", file=sys.stderr)
        return 1
    study.announce()
    return 0


class Study:
    """The main run of a command line and its variants: parsed by the constructor, then checked, then carried out.

    Args:
        argv: The command and its arguments.
        write: Make run directories; without it nothing is left on disk.
        replaced: Axes that take the place of scalars the config gives, where it would be an error to have both.
        silent: Show no progress bar, whatever the config says.
    """

    def __init__(self, argv: list[str], write: bool = True, replaced: Iterable[str] = (), silent: bool = False) -> None:
        self.main = self.now = Run(argv, write, replaced, silent)
        """The main run, and the one that is in progress."""
        self.runs = {MAIN: self.main}
        """By name, in the order in which they are carried out."""
        self.after: dict[str, str | None] = {}
        """Variant -> the run from whose end it starts."""
        self.write, self.silent = write, silent
        if self.main.subcommand != "fit":
            return
        partials = _partials(self.main.config.fit.variants)
        self.after = {name: partial.pop("after", None) for name, partial in partials.items()}
        for name in _order(self.after):
            with _inside(name):
                self.runs[name] = self._variant(argv, name, partials[name], replaced)
        # As it is with all flags, so that the run's config.yaml makes the same variants.
        self.main.resolved["variants"] = {
            name: ({} if source is None else {"after": source})
            | config.changes(self.main.resolved, self.runs[name].resolved)
            for name, source in self.after.items()
        }

    def _variant(self, argv: list[str], name: str, partial: dict[str, Any], replaced: Iterable[str]) -> Run:
        own = config.own_axes(partial)
        if own is not None:  # its axes take the place of scalars, but not of its own
            config.refuse_scalars_of_axes(own, partial)
            replaced = own
        run = Run(config.variant_command_line(argv, name, partial), self.write, replaced, self.silent)
        if self.after[name] is not None and run.config.fit.init_from is not None:
            raise ValueError("init_from: give it or `after`, not both")
        return run

    def record(self) -> str:
        """What config.yaml of the run would hold; nothing is set up for it but what names the start.

        Raises:
            CheckpointError: If there is no such run to start from.
        """
        given = self.main.config[self.main.subcommand].init_from
        if given is not None and self.main.subcommand == "fit":
            self.main.resolved["init_from"] = Start.read(given).source
        return self.main.record

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Set everything up in memory and refuse what cannot run; then, for a fit that writes, claim the run directory.

        Raises:
            ValueError, OSError: What is wrong, in words.
        """
        self.main.check()
        for name in self.after:
            run = self.runs[name]
            with _inside(name):
                if self.main.ckpt_path is not None:
                    last = self._folder(self.main.directory_of_checkpoint(), name) / "checkpoints" / "last.ckpt"
                    run.ckpt_path = str(last) if last.exists() else None
                run.check()
        for name in self.runs:
            if name != MAIN:
                with _inside(name):
                    self._check_source(name, self.after[name])
        if self.after:
            for figure in self.main.figures:
                with about("figures", type(figure)):
                    _refuse_what_draws_no_variants(figure, self.after)
        for name, run in self.runs.items() if self.main.subcommand == "fit" else ():
            for figure in run.figures:
                with contextlib.nullcontext() if name == MAIN else _inside(name), about("figures", type(figure)):
                    _refuse_unwritten(figure)
        if self.main.subcommand == "fit" and self.write:
            self._claim()

    def _check_source(self, name: str, source: str | None) -> None:
        """Refuse a variant that cannot start from its source, or has started from another one before a resume."""
        run, recorded = self.runs[name], self.runs[name].resolved["init_from"]
        if source is not None:
            self._stand(source).check(run.model, f"after = {source}")
        if run.checkpoint is None:
            if source is not None:
                run.origin = Origin(self.runs[source].identity)
            return
        if source is None:
            changed = recorded is not None and run.config.fit.init_from is None
        else:
            directory = self._folder(self.main.directory_of_checkpoint(), source)
            changed = not run.origin.may_be(self.runs[source].identity, directory)
        if changed:
            now = "" if source is None else f", which is not what {source} is now"
            raise CheckpointError(
                f"after = {source}: the run of {run.ckpt_path} has started from {recorded or 'its own parameters'}{now}; a "
                "resume must not change it (start a new run instead)"
            )

    def _claim(self) -> None:
        """Claim the main run's directory, and those of variants that have begun."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.main.give_back)
            self.main.claim()
            for name in self.after:
                if self.runs[name].checkpoint is not None:
                    undo.callback(self.runs[name].give_back)
                    with _inside(name):
                        self.runs[name].claim(self._folder(self.main.directory, name))
            self.main.tie()
            undo.pop_all()

    @staticmethod
    def _folder(directory: Path, name: str) -> Path:
        return directory if name == MAIN else directory / _FOLDER / name

    def _stand(self, name: str) -> Start:
        """Where a run stands now."""
        run = self.runs[name]
        directory, source_axes = str(run.directory or name), run.recorder.source_axes
        return Start.at(directory, run.trainer.global_step, run.model, run.resolved, run.identity, source_axes)

    # Carrying out -----------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """Do what was asked for; a fit that writes draws its figures at the end.

        Raises:
            Interrupted: If a signal has ended a fit.
        """
        with contextlib.ExitStack() as stack:
            for run in self.runs.values():
                stack.callback(run.let_go)
            for name, run in self.runs.items():
                self.now = run
                if name != MAIN:
                    self._begin(name)
                try:
                    run.carry_out()
                except Interrupted as end:
                    which = "" if name == MAIN else f"variant {name} "
                    raise Interrupted(f"{which}{end}{self.main.way_on()}", end.signal) from None
                if name != MAIN:
                    run.draw()
            self.now = self.main
            if self.main.subcommand == "fit":
                self.main.draw({name: self.runs[name] for name in self.after})

    def _begin(self, name: str) -> None:
        """Point a variant at its start and its directory."""
        run, source = self.runs[name], self.after[name]
        start = None if source is None else self._stand(source)
        changed = start is not None and not run.origin.is_at(start)
        if run.checkpoint is None or changed:
            if self.write and run.directory is None:
                run.claim(self._folder(self.main.directory, name))
            self._forget(name)
            if start is not None:
                run.start_from(start)
        if self.write:
            run.tie()

    def _forget(self, name: str) -> None:
        """Let a variant begin anew, and before it those that start from its end, which a crash must not leave behind."""
        for other, source in self.after.items():
            if source == name:
                self._forget(other)
        run = self.runs[name]
        if run.checkpoint is not None:
            print(
                f"dlnlab fit: {run.directory} begins anew: it started from {run.resolved['init_from']}, which has changed",
                file=sys.stderr,
            )
        run.begin_anew()

    def results(self) -> dict[str, xr.Dataset]:
        """What the runs of a fit have recorded: `main`, then the variants in the order written."""
        return {name: self.runs[name].results() for name in (MAIN, *self.after)}

    def guesses(self) -> list[str]:
        """What was guessed about the tables that the runs read, each guess once."""
        return list(dict.fromkeys(guess for run in self.runs.values() for guess in run.guesses))

    def slow(self) -> Iterator[str]:
        """Why runs do not take the closed form, of those that do not."""
        for name in (MAIN, *self.after):
            reason = self.runs[name].slow
            if reason is not None:
                yield reason if name == MAIN else f"variant {name}: {reason}"

    def announce(self) -> None:
        """Say how a fit's members ended and, last, where its run directory is."""
        if self.main.subcommand != "fit":
            return
        for name in (MAIN, *self.after):
            end = self.runs[name].end
            if end is not None:
                print(end if name == MAIN else f"{name}: {end}")
        print(f"run: {self.main.directory}")


@contextlib.contextmanager
def _inside(name: str) -> Iterator[None]:
    """Name the variant in any error raised inside."""
    try:
        yield
    except Exception as error:
        raise Mistake(f"variants.{name}.{explain(error)}") from error


def _partials(given: Any) -> dict[str, dict[str, Any]]:
    """What a config has under `variants`, checked as far as it can be before it is merged."""
    if not isinstance(given, dict):
        raise ValueError(f"variants = {checks.shown(given)}: must be a mapping of names, {{slow: {{ensemble: ...}}}}")
    for name, partial in given.items():
        key = f"variants.{name}"
        if not isinstance(name, str) or name in _RESERVED or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"{key}: must be a file name of letters, digits, '_', '-' and '.', and none of {', '.join(_RESERVED)}"
            )
        checks.file_name("variants: name", name)
        if not isinstance(partial, dict):
            raise ValueError(
                f"{key} = {checks.shown(partial)}: must be a mapping of what differs, {{ensemble: {{lr: 0.1}}}}"
            )
        for unwanted, why in _NOT_OF_A_VARIANT.items():
            if unwanted in partial:
                raise ValueError(f"{key}.{unwanted}: {why}")
    checks.different_names("variants", given)
    return {name: dict(partial) for name, partial in given.items()}


def _order(after: dict[str, str | None]) -> list[str]:
    """The variants, each behind the one from whose end it starts, else as written."""
    for name, source in after.items():
        if source is not None and (not isinstance(source, str) or source not in (MAIN, *after)):
            raise ValueError(
                f"variants.{name}.after = {checks.shown(source)}: there is no such run; there are "
                f"{', '.join((MAIN, *after))}"
            )
    order: list[str] = []
    while len(order) < len(after):
        waiting = [name for name in after if name not in order]
        ready = [name for name in waiting if after[name] in (None, MAIN, *order)]
        if not ready:
            raise ValueError(
                f"variants.{waiting[0]}.after = {after[waiting[0]]}: {', '.join(waiting)} wait for each other"
            )
        order.append(ready[0])
    return order


def _refuse_unwritten(figure: Figure) -> None:
    """Refuse what would fail only when the fit has ended."""
    for method in ("draw", "table"):
        if getattr(type(figure), method) is getattr(Figure, method):
            raise ValueError(f"{type(figure).__name__} does not define `{method}`: a figure defines draw and table")


def _refuse_what_draws_no_variants(figure: Any, names: Iterable[str]) -> None:
    for method in (figure.draw, figure.table):
        try:
            inspect.signature(method).bind(None, **dict.fromkeys(names))
        except TypeError:
            raise ValueError(
                f"{type(figure).__name__}.{method.__name__} does not take the variants {', '.join(names)}: declare it "
                f"as `{method.__name__}(self, dataset, **variants)`"
            ) from None
