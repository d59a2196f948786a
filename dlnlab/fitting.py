"""A config -> a checked run -> a run directory. All is checked in memory before anything is made on disk."""

import contextlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

import dlnlab
from dlnlab import checks, strict_yaml
from dlnlab.callbacks import Interruption, Measurement, MemberGuard, MemberProgress, Recorder, RunCheckpoint
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.data import SyntheticData
from dlnlab.ensemble import Ensemble
from dlnlab.event_files import RunLogger
from dlnlab.figures import Figure
from dlnlab.files import hold, remove_leftovers, write_atomic
from dlnlab.messages import about, explain, home, trainer_mistake
from dlnlab.models import LinearNetwork
from dlnlab.results import HEADER, ResultError, load_results, verify_segments
from dlnlab.start import Start

_LOGS = "lightning_logs"
_FIXED = ("ensemble", "model", "data", "seed", "guard", "record")
"""Sections that a resumed run must share with its checkpoint (the model but for max_chunk)."""


def main(argv: list[str]) -> int:
    """Carry out fit, validate, test or predict; see `dlnlab.cli.main` for the exit codes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tensors here are small: more threads wait for each other
    command = argv[0]
    try:
        with quiet():
            run = Run(argv)
            run.check()
    except Exception as error:  # whatever it is, nothing was made yet, and there is nothing to save
        if "DLNLAB_TRACEBACK" in os.environ:
            traceback.print_exc()
        print(f"dlnlab {command}: {explain(error)}", file=sys.stderr)
        return 2
    if run.slow is not None:
        print(f"dlnlab {command}: {run.slow}", file=sys.stderr)
    try:
        with without_noise():
            run.carry_out()
    except Interrupted as end:
        print(f"dlnlab {command}: {end}", file=sys.stderr)
        print(f"run: {run.directory}")
        return 128 + end.signal
    except Exception as error:
        if not isinstance(error, OSError | CheckpointError | ResultError):  # a full disk needs no traceback, a bug does
            traceback.print_exc()
        print(f"dlnlab {command}: {run.where()}: {explain(error)}{run.way_on()}", file=sys.stderr)
        return 1
    run.announce()
    return 0


class Interrupted(KeyboardInterrupt):
    """A fit that a signal has ended in order; says at which step, and how it goes on.

    Args:
        message: That.
        signal: The signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Run(LightningCLI):
    """One command line: parsed and built by the constructor, then checked, then carried out.

    Args:
        argv: The command and its arguments.
        write: Make a run directory; without it a fit leaves nothing on disk and its results in the recorder.
        replaced: Axes that take the place of scalars the config gives, where it would be an error to have both.
    """

    def __init__(self, argv: list[str], write: bool = True, replaced: Iterable[str] = ()) -> None:
        self.directory: Path | None = None
        self._last_checkpoint: Path | None = None
        self._let_go = contextlib.ExitStack()
        self.write = write
        self.replaced = tuple(replaced)
        self.command = argv[0]
        patient = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"devices": 1, "num_sanity_val_steps": 0, "enable_model_summary": False},
            parser_kwargs={**patient, self.command: patient},
            args=argv,
        )

    # Parsing ----------------------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:
        """The one that is called (each builds a parser), without `weights_only`: checkpoints are always loaded so."""
        return {self.command: LightningCLI.subcommands()[self.command] | {"weights_only"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys."""
        parser.add_argument("--name", type=str | None, default=None, help="The run is lightning_logs/NAME/version_N; "
                            "the last config file's stem unless given.")  # fmt: skip
        parser.add_argument("--seed", type=int, default=0, help="The root of all random streams.")
        parser.add_argument("--init_from", type=str | None, default=None, help="RUN or RUN@STEP: a fit starts, at step "
                            "0, from the parameters of another run's last checkpoint, or the one of STEP.")  # fmt: skip
        parser.add_argument("--ensemble", type=dict[str, Any], default={}, help="Named axes, whose product is the "
                            "members: {lr: {log10: [-2, 0, 9]}, batch_size: [1, full], seed: 20}.")  # fmt: skip
        parser.add_class_arguments(Recorder, "record")
        parser.add_class_arguments(MemberGuard, "guard")
        parser.add_argument("--figures", type=list[Figure], default=[], help="Drawn from the results after the fit.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Lightning's, but the ensemble is a section of its own and reaches the model from there."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        options = {"fail_untyped": False, "skip": {"ensemble"}}
        parser.add_subclass_arguments(LightningModule, "model", required=True, **options)
        parser.add_subclass_arguments(LightningDataModule, "data", required=False, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse, and keep what was given apart from what are defaults."""
        jsonargparse.set_loader("yaml", strict_yaml.load, (yaml.YAMLError,))
        args = _configs_first(args)
        strict_yaml.check_arguments(args)
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)
        for _, arguments in _init_args(self.given[self.given.subcommand]):
            for name in self.replaced:
                arguments.pop(name, None)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take hyperparameters from the checkpoint here; ours are compared instead (`check`)."""

    def _set_seed(self) -> None:
        """Lightning would ask for `seed_everything`; the root of our streams also seeds what plain modules draw."""
        seed = checks.integer("seed", self.config[self.subcommand].seed, at_most=2**32 - 1)
        seed_everything(seed, verbose=False)

    # Building ---------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build the ensemble, then model, data and trainer."""
        config, given = self.config[self.subcommand], self.given[self.subcommand]
        for section in ("record", "guard", "trainer"):
            if not isinstance(config[section], jsonargparse.Namespace):
                raise ValueError(f"{section} = {checks.shown(config[section])}: must be a mapping")
        self.ensemble = ensemble = _ensemble(config)
        _refuse_scalars_of_axes(ensemble, given)
        self.resolved = _resolved(self.parser, self.config, self.subcommand, ensemble)
        linear = issubclass(_class_of(config.model.class_path), LinearNetwork)
        if linear:
            config["model.init_args.ensemble"] = ensemble
            if given.get("trainer.log_every_n_steps") is None:
                config.trainer.log_every_n_steps = 0  # nothing of ours calls self.log in a fit, and it would cut chunks
        elif config.ensemble:
            raise ValueError(f"ensemble: {config.model.class_path} is no LinearNetwork and trains a single member")
        # Whatever a constructor raises names its class and, where it can, its key.
        self.parser.add_instantiator(self._instantiate, object)
        super().instantiate_classes()
        if isinstance(self.datamodule, SyntheticData) and not linear:
            self.datamodule.ensemble = ensemble

    def _instantiate(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        with about(home(kind), kind, self.ensemble.axes):
            return kind(*args, **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with the recorder, the guard, the progress bar and checkpoints; its logger comes with the run."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        for key, parameter in inspect.signature(Trainer).parameters.items():
            if config.get(key) is None and type(None) not in (*get_args(parameter.annotation), type(parameter.default)):
                raise ValueError(f"trainer.{key} = null: must have a value; leave it out for {parameter.default!r}")
        chosen = config["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        for callback in chosen:
            if isinstance(callback, Recorder | MemberGuard):
                section = home(type(callback))
                raise ValueError(f"trainer.callbacks: {type(callback).__name__} is always on; set it in `{section}:`")
        self.recorder, guard = self.config_init[self.subcommand].record, self.config_init[self.subcommand].guard
        if not self.write:
            config |= {"logger": False, "enable_checkpointing": False}
            chosen = [callback for callback in chosen if not isinstance(callback, Checkpoint)]
        self.wants_logger = config["logger"] in (None, True)
        if self.wants_logger:
            config["logger"] = False
        if self.subcommand == "fit":
            self.interruption = Interruption()
            chosen = [guard, *chosen, self.recorder, self.interruption]
            if config["enable_checkpointing"] is not False and not any(isinstance(c, ModelCheckpoint) for c in chosen):
                chosen.append(RunCheckpoint(grid=guard.settings.every_n_steps))
            if config["enable_progress_bar"] is not False:
                chosen.append(MemberProgress())
        plugins = config["plugins"] or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        try:
            return Trainer(**{**config, "callbacks": chosen})
        except Exception as error:
            given = self.given[self.subcommand].get("trainer") or {}
            raise trainer_mistake(error, dict(given.items(branches=False))) from error

    def _remember(self, **kwargs: Any) -> None:
        self._arguments = kwargs

    fit = validate = test = predict = _remember  # what LightningCLI calls; `carry_out` does it, after `check`

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Set everything up in memory and refuse what cannot run; then, for a fit that writes, claim the run directory.

        Raises:
            ValueError, OSError: What is wrong, in words.
        """
        trainer, model, datamodule = self.trainer, self.model, self.datamodule
        trainer.strategy.connect(model)
        model.trainer = trainer
        if datamodule is not None:
            datamodule.trainer, trainer.datamodule = trainer, datamodule
            if isinstance(datamodule, SyntheticData):
                with about("data", type(datamodule), self.ensemble.axes):
                    datamodule.setup(self.subcommand)
        if isinstance(model, LinearNetwork):
            with about("model", type(model), self.ensemble.axes):
                model.setup(self.subcommand)
        elif self.subcommand == "fit":
            _refuse_what_cannot_be_fitted(model, datamodule)
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            with about("ckpt_path"):
                self._compare(checkpoint)
        if self.subcommand != "fit":
            return
        start = self._start(checkpoint)
        if start is not None:
            start.apply(model)
        with about("record", Recorder):
            self.recorder.prepare(trainer, model)
        variables = set(self.recorder.names)
        for callback in trainer.callbacks:
            if isinstance(callback, Measurement):
                with about("trainer.callbacks", type(callback)):
                    callback.prepare(trainer, model)
                    variables |= set(callback.names(model))
        self.figures = self.config_init.fit.figures
        for figure in self.figures:
            if [other.name for other in self.figures].count(figure.name) > 1:
                raise ValueError(f"figures: two are called {figure.name!r} and would overwrite each other; give a name")
            with about("figures", type(figure)):
                figure.check(variables, self.recorder.ensemble.axes)
        self._describe(start)
        if not self.write:
            return
        if checkpoint is not None:
            self.directory = self._directory_of_checkpoint()
        else:
            root = Path(self.config.fit.trainer.default_root_dir or "")
            self.directory = claim(root / _LOGS / self._name())
        try:
            with about("ckpt_path"):
                self._hold()
                if checkpoint is not None:
                    self._verify_records(checkpoint)
            self._tie(checkpoint)
        except BaseException:
            self._let_go.close()
            if checkpoint is None:
                give_back(self.directory)
            raise

    def _name(self) -> str:
        name = self.config.fit.name
        if name is None:
            files = [file for file in self.config.fit.config or [] if file is not None]  # None: given as text
            name = Path(str(files[-1])).stem if files else type(self.model).__name__
        if not name.isprintable() or name != Path(name).name or name in ("", ".."):
            raise ValueError(f"name = {name!r}: must be the name of a folder, not a path")
        return name

    def _checkpoint(self) -> dict[str, Any] | None:
        path = self._arguments.get("ckpt_path")
        if path is None:
            return None
        if not Path(path).is_file():
            raise CheckpointError(f"ckpt_path = {path}: there is no such file")
        with about("ckpt_path"), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        for warning in heard:  # that the one before is used instead
            print(f"dlnlab {self.subcommand}: {warning.message}", file=sys.stderr)
        return checkpoint

    def _directory_of_checkpoint(self) -> Path:
        return Path(os.path.normpath(Path(self._arguments["ckpt_path"]).parent / ".."))  # its name alone may be given

    def _start(self, checkpoint: dict[str, Any] | None) -> Start | None:
        """What the fit starts from, if it is another run; a resumed fit did so when it began."""
        given = self.config.fit.init_from
        if checkpoint is None:
            start = None if given is None else Start.read(given)
            self.resolved["init_from"] = None if start is None else start.source
            return start
        recorded = (checkpoint["dlnlab_config"] or {}).get("init_from")
        if given is not None and given not in (recorded, str(recorded).rpartition("@")[0]):
            raise CheckpointError(
                f"init_from = {given}: the checkpoint's run started from {recorded}; a resume must not change it "
                "(start a new run instead)"
            )
        self.resolved["init_from"] = recorded
        return None

    def _compare(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another config, before anything of it is used."""
        path = Path(self._arguments["ckpt_path"])
        recorded = checkpoint.get("dlnlab_config") if isinstance(checkpoint, dict) else None
        if not recorded or not {"state_dict", "optimizer_states", "loops", "callbacks"} <= checkpoint.keys():
            raise CheckpointError(f"ckpt_path = {path}: is no checkpoint of a fit of dlnlab")
        fitting = self.subcommand == "fit"
        directory = self._directory_of_checkpoint()
        if fitting and not (directory / "results" / HEADER).exists():
            raise CheckpointError(
                f"ckpt_path = {path}: a resumed fit goes on in its run directory, and {directory} is none"
            )
        then, now = _what_must_agree(recorded, fitting), _what_must_agree(self.resolved, fitting)
        for key in dict.fromkeys((*then, *now)):
            if then.get(key) != now.get(key):
                raise CheckpointError(
                    f"{key} = {checks.shown(now.get(key))}: the run of ckpt_path has {checks.shown(then.get(key))}"
                    + ("; a resume must not change it (start a new run instead)" if fitting else "")
                )
        if isinstance(self.model, LinearNetwork):
            try:
                self.model.load_state_dict(checkpoint["state_dict"])
            except RuntimeError as error:
                reason = str(error).partition("\n")[2]  # the first line names the class
                raise CheckpointError(f"ckpt_path = {path}: does not fit the model: {reason}") from error

    def _describe(self, start: Start | None) -> None:
        """Tell the recorder what its results shall say about the run."""
        versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics", "numpy", "scipy", "xarray")}
        versions |= {"dlnlab": dlnlab.__version__, "python": platform.python_version(), "machine": platform.machine()}
        config = yaml.safe_dump(self.resolved, sort_keys=False)
        self.recorder.config = self.resolved
        self.recorder.attributes |= {"config": config, "versions": json.dumps(versions, indent=1)}
        if start is not None:
            self.recorder.attributes["init_from"] = start.provenance

    def _verify_records(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on after segments that are not there as they were."""
        records = checkpoint["callbacks"].get(self.recorder.state_key)
        if records is None:
            raise CheckpointError(f"ckpt_path = {self._arguments['ckpt_path']}: says nothing about the run's records")
        verify_segments(self.directory / "results", records["segments"], records["chain"])

    def _hold(self) -> None:
        """Keep others from the run directory: two fits in one would tear each other's results."""
        try:
            self._let_go.callback(hold(self.directory))
        except BlockingIOError:
            raise CheckpointError(f"{self.directory} is in use: the fit that writes it has not ended") from None

    def _tie(self, checkpoint: dict[str, Any] | None) -> None:
        """Point logger, checkpoints, records and config to the run directory."""
        if self.wants_logger:
            last = None if checkpoint is None else checkpoint["global_step"] + 1
            logger = RunLogger(self.directory, purge_step=last)
            self.trainer.loggers = [*self.trainer.loggers, logger]
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.directory / "checkpoints")
        self._last_checkpoint = self.directory / "checkpoints" / "last.ckpt"
        if self.trainer.checkpoint_callbacks:
            self.interruption.checkpoint = self._last_checkpoint
        if checkpoint is not None:
            for folder in (self.directory, self.directory / "results", self.directory / "checkpoints"):
                remove_leftovers(folder)
        write_atomic(self.directory / "config.yaml", self.recorder.attributes["config"].encode())
        write_atomic(self.directory / "versions.json", self.recorder.attributes["versions"].encode())
        self.recorder.directory = self.directory

    # Carrying out -----------------------------------------------------------------------------------------------------

    def where(self) -> str:
        """Which run has failed and how far it has come, the beginning of a message; its records until then are kept."""
        if self.subcommand != "fit":
            return "failed"
        return f"run {self.directory} failed after step {self.trainer.global_step}"

    def carry_out(self) -> None:
        """Do what was asked for; a fit that writes draws its figures.

        Raises:
            Interrupted: If a signal has ended a fit.
        """
        with self._let_go:
            if self.subcommand == "fit":
                self._fit()
            else:
                getattr(self.trainer, self.subcommand)(**self._arguments)

    def _fit(self) -> None:
        with self.interruption:
            self.trainer.fit(**self._arguments)
        number = self.interruption.signal
        if number is not None:
            name, step = signal.Signals(number).name, self.trainer.global_step
            raise Interrupted(f"stopped at step {step} by {name}{self.way_on()}", number)
        if self.write and self.figures:
            dataset = load_results(self.directory)
            saved = [file for figure in self.figures for file in figure.save(dataset, self.directory / "figures")]
            pictures = {file.stem: file for file in saved if file.suffix == ".png"}
            self.recorder.add_images(pictures, self.trainer.global_step)

    def announce(self) -> None:
        """Say how a fit's members ended and, last, where its run directory is."""
        if self.subcommand != "fit":
            return
        if isinstance(self.model, LinearNetwork):
            print(f"members: {MemberGuard.summary(self.model)}")
        print(f"run: {self.directory}")

    @property
    def slow(self) -> str | None:
        """Why a fit does not take the closed form, if it does not."""
        linear = self.subcommand == "fit" and isinstance(self.model, LinearNetwork)
        return self.model.path if linear and self.model.closed_form_refusal() is not None else None

    def way_on(self) -> str:
        """How a fit that was cut short goes on, the end of a sentence."""
        last = self._last_checkpoint
        return f"; go on with --ckpt_path {last}" if last is not None and last.exists() else ""


def claim(parent: Path) -> Path:
    """Make the next free `version_N` of a folder; `mkdir` is atomic, so no two runs share one.

    Raises:
        ValueError: If it cannot be made; no folder on the way to it is left then.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdecimal()]
        number = max(taken, default=-1) + 1
        while True:
            try:
                (parent / f"version_{number}").mkdir()
                return parent / f"version_{number}"
            except FileExistsError:
                number += 1
    except (OSError, ValueError) as error:
        _remove_empty(parent)
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"trainer.default_root_dir = {str(parent.parent.parent)!r}: {checks.shown(str(parent))} cannot be made: "
            f"{reason}"
        ) from error


def give_back(directory: Path) -> None:
    """Remove a claimed directory, and the folders above it that are empty now."""
    shutil.rmtree(directory, ignore_errors=True)
    _remove_empty(directory.parent)


def _remove_empty(parent: Path) -> None:
    for folder in (parent, parent.parent):  # lightning_logs/NAME
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()


def _class_of(class_path: str) -> type:
    module, name = class_path.rsplit(".", 1)
    return getattr(import_module(module), name)


def _refuse_what_cannot_be_fitted(model: LightningModule, datamodule: LightningDataModule | None) -> None:
    """What Lightning would say of a plain module only once the run directory is there."""
    for name in ("training_step", "configure_optimizers"):
        if not is_overridden(name, model):
            raise ValueError(f"model: {type(model).__name__} does not define `{name}`")
    if not any(is_overridden("train_dataloader", each) for each in (model, datamodule) if each is not None):
        raise ValueError(f"data: neither they nor {type(model).__name__} define `train_dataloader`")


def _ensemble(config: jsonargparse.Namespace) -> Ensemble:
    axes = config.ensemble
    if not isinstance(axes, dict):
        raise ValueError(f"ensemble = {checks.shown(axes)}: must be a mapping of axes, {{lr: [0.1, 0.2], seed: 10}}")
    for name in axes:
        if not isinstance(name, str) or name in ("self", "root"):
            raise ValueError(f"ensemble.{name}: no such axis")
    return Ensemble(root=config.seed, **axes)


def _init_args(config: Any) -> Iterator[tuple[str, Any]]:
    """(key, mapping) of every set of arguments whose scalars could be axes."""
    for key in ("model.init_args", "model.init_args.optimizer.init_args", "data.init_args"):
        found = config
        for part in key.split("."):
            found = found.get(part) if hasattr(found, "get") else None
        if found is not None:
            yield key, found


def _refuse_scalars_of_axes(ensemble: Ensemble, given: jsonargparse.Namespace) -> None:
    for key, arguments in _init_args(given):
        for name in ensemble.axes:
            if name in arguments and not (name == "seed"):
                raise ValueError(
                    f"{key}.{name} = {arguments[name]!r}: {name} is also an axis of the ensemble; give it in one place"
                )


def _resolved(parser: Any, config: Any, subcommand: str, ensemble: Ensemble) -> dict[str, Any]:
    """The config as a plain dictionary that can be run again: without arguments that are axes."""
    try:
        resolved = yaml.safe_load(parser.dump(config, skip_none=False))[subcommand]
    except Exception as error:
        found = re.search(r"cannot represent an object', (.*?)\)", str(error))
        raise ValueError(
            f"config.yaml of the run could not hold {found[1] if found else error}: give that argument a plain value"
        ) from None
    resolved.pop("ckpt_path", None)
    for _, arguments in _init_args(resolved):
        for name in ensemble.axes:
            arguments.pop(name, None)
    return resolved


def _what_must_agree(resolved: dict[str, Any], fitting: bool) -> dict[str, Any]:
    """The parts of a config that a checkpoint's run must share, flat: {"model.init_args.init_scale": 0.1, ...}.

    What is evaluated on other data or by other measurements is still the same ensemble.
    """
    parts = {section: resolved.get(section) for section in (_FIXED if fitting else ("ensemble", "model", "seed"))}
    if fitting:
        measurements = resolved["trainer"].get("callbacks") or []
        parts["trainer.callbacks"] = measurements if isinstance(measurements, list) else [measurements]
    flat: dict[str, Any] = {}

    def flatten(key: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                flatten(f"{key}.{name}", inner)
        else:
            flat[key] = value

    for section, value in parts.items():
        flatten(section, value)
    flat.pop("model.init_args.max_chunk", None)
    return flat


def _configs_first(args: list[str]) -> list[str]:
    """The same command line with its config files before all else: the parser lets whatever comes later win."""
    configs, others, rest = [], [], iter(args[1:])
    for argument in rest:
        if argument in ("--config", "-c"):
            configs += [argument, *([following] if (following := next(rest, None)) is not None else [])]
        elif argument.startswith("--config="):
            configs.append(argument)
        else:
            others.append(argument)
    return [args[0], *configs, *others]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what Lightning has to say until it is known that there will be a run."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Leave out messages of Lightning that do not apply to chunks: loaders, workers, device advertisements."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", "Checkpoint directory .* exists", ".*dataloader.*length.*",
                            ".* is damaged.*; using .*",  # was said before the fit
                            "Using ModelCheckpoint with manual optimization.*", ".*LeafSpec.* is deprecated"):  # fmt: skip
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
