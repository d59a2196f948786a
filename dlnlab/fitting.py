"""A config -> a checked run -> a run directory. All is checked in memory before anything is made on disk."""

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import dlnlab
from dlnlab.callbacks import Interruption, Measurement, MemberGuard, MemberProgress, Recorder, RunCheckpoint
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.data import SyntheticData
from dlnlab.ensemble import Ensemble
from dlnlab.figures import Figure
from dlnlab.files import hold, remove_leftovers, write_atomic
from dlnlab.messages import explain
from dlnlab.models import LinearNetwork
from dlnlab.results import HEADER, ResultError, load_results, verify_segments

_LOGS = "lightning_logs"
_FIXED = ("ensemble", "model", "data", "seed", "guard", "record")
"""Sections that a resumed run must share with its checkpoint (the model but for max_chunk)."""


def main(argv: list[str]) -> int:
    """Carry out fit, validate, test or predict; see `dlnlab.cli.main` for the exit codes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the tensors here are small: more threads wait for each other
    command = argv[0]
    try:
        with _quiet():
            run = Run(argv)
            run.check()
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, MisconfigurationException) as error:
        print("\n".join(f"dlnlab {command}: {explain(error)}".splitlines()[:3]), file=sys.stderr)
        return 2
    with _without_noise():
        try:
            run.carry_out()
        except Interrupted as end:
            print(f"dlnlab {command}: {end}", file=sys.stderr)
            print(f"run: {run.directory}")
            return 128 + end.signal
        except (OSError, CheckpointError, ResultError) as error:  # of the disk, not of the program
            print(f"dlnlab {command}: {_failure(error)}{run.way_on()}", file=sys.stderr)
            return 1
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
    """

    def __init__(self, argv: list[str]) -> None:
        self.directory: Path | None = None
        self._last_checkpoint: Path | None = None
        self._let_go = contextlib.ExitStack()
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
            parser_kwargs={**patient, **{command: patient for command in self.subcommands()}},
            args=argv,
        )

    # Parsing ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without `weights_only`: checkpoints are always loaded so."""
        return {command: skip | {"weights_only"} for command, skip in LightningCLI.subcommands().items()}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys."""
        parser.add_argument("--name", type=str | None, default=None, help="The run is lightning_logs/NAME/version_N; "
                            "the last config file's stem unless given.")  # fmt: skip
        parser.add_argument("--seed", type=int, default=0, help="The root of all random streams.")
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
        jsonargparse.set_loader("yaml", _load_yaml, (yaml.YAMLError,))
        args = _configs_first(args)
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)

    def _parse_ckpt_path(self) -> None:
        """Lightning would take hyperparameters from the checkpoint here; ours are compared instead (`check`)."""

    def _set_seed(self) -> None:
        """Lightning would ask for `seed_everything`; the root of our streams also seeds what plain modules draw."""
        seed_everything(self.config[self.subcommand].seed % 2**32, verbose=False)

    # Building ---------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build the ensemble, then model, data and trainer."""
        config, given = self.config[self.subcommand], self.given[self.subcommand]
        ensemble = Ensemble(root=config.seed, **config.ensemble)
        _refuse_scalars_of_axes(ensemble, given)
        self.resolved = _resolved(self.parser, self.config, self.subcommand, ensemble)
        linear = issubclass(_class_of(config.model.class_path), LinearNetwork)
        if linear:
            config.model.init_args.ensemble = ensemble
            if given.get("trainer.log_every_n_steps") is None:
                config.trainer.log_every_n_steps = 0  # nothing of ours calls self.log in a fit, and it would cut chunks
        elif config.ensemble:
            raise ValueError(f"ensemble: {config.model.class_path} is no LinearNetwork and trains a single member")
        super().instantiate_classes()
        if isinstance(self.datamodule, SyntheticData) and not linear:
            self.datamodule.ensemble = ensemble

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with the recorder, the guard, the progress bar and checkpoints; its logger comes with the run."""
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        chosen = config["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        self.recorder, guard = self.config_init[self.subcommand].record, self.config_init[self.subcommand].guard
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
        return Trainer(**{**config, "callbacks": chosen})

    def _remember(self, **kwargs: Any) -> None:
        self._arguments = kwargs

    fit = validate = test = predict = _remember  # what LightningCLI calls; `carry_out` does it, after `check`

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Set everything up in memory and refuse what cannot run; then, for a fit, claim the run directory.

        Raises:
            ValueError, OSError: What is wrong, in words.
        """
        trainer, model, datamodule = self.trainer, self.model, self.datamodule
        trainer.strategy.connect(model)
        model.trainer = trainer
        if datamodule is not None:
            datamodule.trainer, trainer.datamodule = trainer, datamodule
            if isinstance(datamodule, SyntheticData):
                datamodule.setup(self.subcommand)
        if isinstance(model, LinearNetwork):
            model.setup(self.subcommand)
        checkpoint = self._checkpoint()
        if self.subcommand != "fit":
            return
        self.recorder.prepare(trainer, model)
        for callback in trainer.callbacks:
            if isinstance(callback, Measurement):
                callback.prepare(trainer, model)
        self.figures = self.config_init.fit.figures
        for figure in self.figures:
            if [other.name for other in self.figures].count(figure.name) > 1:
                raise ValueError(f"figures: two are called {figure.name!r} and would overwrite each other; give a name")
            figure.check(self._recorded_variables(), self.recorder.ensemble.axes)
        if checkpoint is not None:
            self.directory = Path(os.path.normpath(Path(self._arguments["ckpt_path"]).parent / ".."))
        else:
            root = Path(self.config.fit.trainer.default_root_dir or "")
            self.directory = claim(root / _LOGS / self._name())
        try:
            self._hold()
            if checkpoint is not None:
                self._check_resume(checkpoint)
            self._tie(checkpoint)
        except BaseException:
            self._let_go.close()
            if checkpoint is None:
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _name(self) -> str:
        name = self.config.fit.name
        if name is None:
            files = self.config.fit.config or []
            name = Path(str(files[-1])).stem if files else type(self.model).__name__
        if not name or name != Path(name).name or name in (".", ".."):
            raise ValueError(f"name = {name!r}: must be the name of a folder, not a path")
        return name

    def _recorded_variables(self) -> set[str]:
        found = set(self.recorder.names)
        for callback in self.trainer.callbacks:
            if isinstance(callback, Measurement):
                found |= set(callback.names(self.model))
        return found

    def _checkpoint(self) -> dict[str, Any] | None:
        path = self._arguments.get("ckpt_path")
        if path is None:
            return None
        if not Path(path).is_file():
            raise CheckpointError(f"ckpt_path: no checkpoint at {path}")
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        for warning in heard:  # that the one before is used instead
            print(f"dlnlab {self.subcommand}: {warning.message}", file=sys.stderr)
        return checkpoint

    def _check_resume(self, checkpoint: dict[str, Any]) -> None:
        path, folder = self._arguments["ckpt_path"], self.directory / "results"
        if not (folder / HEADER).exists():
            raise CheckpointError(
                f"ckpt_path = {path}: a resumed fit goes on in its run directory, and {self.directory} is none"
            )
        records = checkpoint.get("callbacks", {}).get(self.recorder.state_key)
        if records is None or checkpoint.get("dlnlab_config") is None:
            raise CheckpointError(
                f"ckpt_path = {path}: this is no checkpoint of a whole run that `dlnlab fit` has made"
            )
        then, now = _what_must_agree(checkpoint["dlnlab_config"]), _what_must_agree(self.resolved)
        for key in dict.fromkeys((*then, *now)):
            if then.get(key) != now.get(key):
                raise CheckpointError(
                    f"{key} = {now.get(key)!r}: the checkpoint's run has {then.get(key)!r}; "
                    "a resume must not change it (start a new run instead)"
                )
        verify_segments(folder, records["segments"], records["chain"])

    def _hold(self) -> None:
        """Keep others from the run directory: two fits in one would tear each other's results."""
        try:
            self._let_go.callback(hold(self.directory))
        except BlockingIOError:
            raise CheckpointError(f"{self.directory} is in use: the fit that writes it has not ended") from None
        except FileNotFoundError:
            pass  # what is missing is said where it is needed

    def _tie(self, checkpoint: dict[str, Any] | None) -> None:
        """Point logger, checkpoints, records and config to the run directory."""
        if self.wants_logger:
            last = None if checkpoint is None else checkpoint["global_step"] + 1
            folder = self.directory
            logger = TensorBoardLogger(
                folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False, purge_step=last
            )
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
        versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics", "numpy", "scipy", "xarray")}
        versions |= {"dlnlab": dlnlab.__version__, "python": platform.python_version(), "machine": platform.machine()}
        config = yaml.safe_dump(self.resolved, sort_keys=False)
        write_atomic(self.directory / "config.yaml", config.encode())
        write_atomic(self.directory / "versions.json", json.dumps(versions, indent=1).encode())
        self.recorder.directory = self.directory
        self.recorder.config = self.resolved
        self.recorder.attributes |= {"config": config, "versions": json.dumps(versions)}

    # Carrying out -----------------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """Do what was asked for; a fit draws its figures and prints its run directory last.

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
        if self.figures:
            dataset = load_results(self.directory)
            saved = [file for figure in self.figures for file in figure.save(dataset, self.directory / "figures")]
            self.recorder.add_images({file.stem: file for file in saved if file.suffix == ".png"})
        if isinstance(self.model, LinearNetwork):
            print(f"members: {MemberGuard.summary(self.model)}")
        print(f"run: {self.directory}")

    def way_on(self) -> str:
        """How a fit that was cut short goes on, the end of a sentence."""
        last = self._last_checkpoint
        return f"; go on with --ckpt_path {last}" if last is not None and last.exists() else ""


def claim(parent: Path) -> Path:
    """Make the next free `version_N` of a folder; `mkdir` is atomic, so no two runs share one.

    Raises:
        OSError: If the folder cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        try:
            (parent / f"version_{number}").mkdir()
            return parent / f"version_{number}"
        except FileExistsError:
            number += 1


def _failure(error: Exception) -> str:
    """One line without the number that the system gives an error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _class_of(class_path: str) -> type:
    module, name = class_path.rsplit(".", 1)
    return getattr(import_module(module), name)


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
    resolved = yaml.safe_load(parser.dump(config, skip_none=False))[subcommand]
    resolved.pop("ckpt_path", None)
    for _, arguments in _init_args(resolved):
        for name in ensemble.axes:
            arguments.pop(name, None)
    return resolved


def _what_must_agree(resolved: dict[str, Any]) -> dict[str, Any]:
    """The parts of a config that a resumed run must share, flat: {"model.init_args.init_scale": 0.1, ...}."""
    parts = {section: resolved.get(section) for section in _FIXED}
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


def _load_yaml(text: str) -> Any:
    """Jsonargparse's loader, but a repeated key is an error instead of silently taking one of the two."""
    _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    return _default_loader(text)


_default_loader = jsonargparse.get_loader("yaml")


def _refuse_repeated_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.YAMLError(
                    f"the key {key.value!r} is repeated in line {key.start_mark.line + 1}: give it once"
                )
            seen.add(key.value)
            _refuse_repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
def _without_noise() -> Iterator[None]:
    """Leave out messages of Lightning that do not apply to chunks: loaders, workers, device advertisements."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", "Checkpoint directory .* exists", ".*dataloader.*length.*",
                            ".* is damaged: .*; using .*",  # was said before the fit
                            "Using ModelCheckpoint with manual optimization.*", ".*LeafSpec.* is deprecated"):  # fmt: skip
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
