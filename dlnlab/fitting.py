"""A command line -> a run that is checked in memory before anything is made on disk, then carried out."""

import argparse
import contextlib
import enum
import importlib.util
import inspect
import json
import logging
import os
import platform
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any, get_args

import jsonargparse
import lightning_utilities.core.rank_zero as rank_zero_module
import torch
import xarray as xr
import yaml
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    ModelCheckpoint,
    ProgressBar,
    Timer,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.utilities.model_helpers import is_overridden

import dlnlab
from dlnlab import checks, strict_yaml
from dlnlab import config as configs
from dlnlab.callbacks import Interruption, Measurement, MemberGuard, MemberProgress, Recorder, RunCheckpoint
from dlnlab.callbacks.base import refuse_twins
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.data import SyntheticData
from dlnlab.event_files import RunLogger
from dlnlab.figures import Figure
from dlnlab.files import hold, remove_leftovers, write_atomic
from dlnlab.messages import about, home, trainer_mistake
from dlnlab.models import LinearNetwork
from dlnlab.models.trainer import ONE_DEVICE, resume_from_nothing
from dlnlab.results import load_results, verify_segments
from dlnlab.run_directory import claim, empty, give_back
from dlnlab.start import Origin, Start, identity_of
from dlnlab.tables import TableWarning

_LOGS = "lightning_logs"
_CKPT_PATH = {
    "fit": "RUN/checkpoints/last.ckpt or any other: go on from there, in the run directory RUN and to the same end as if "
    "there had been no interruption; the run's variants go on from their own last checkpoints.",
    "evaluation": "The checkpoint whose parameters are taken.",
}


class Interrupted(KeyboardInterrupt):
    """A fit that a signal has ended in order; says at which step.

    Args:
        message: That.
        signal: The signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class _Asked(argparse.Action):
    """A flag that is handled before parsing and stays out of the config."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, *_: Any) -> None:
        """Keep nothing of it."""


class Run(LightningCLI):
    """One command line: parsed and built by the constructor, then checked, then carried out; without its variants.

    Args:
        argv: The command and its arguments.
        write: Make a run directory; without it a fit leaves nothing on disk and its results in the recorder.
        replaced: Axes that take the place of scalars the config gives, where it would be an error to have both.
        silent: Show no progress bar, whatever the config says.
    """

    def __init__(self, argv: list[str], write: bool = True, replaced: Iterable[str] = (), silent: bool = False) -> None:
        self.directory: Path | None = None
        self.checkpoint: dict[str, Any] | None = None
        """What a resumed run goes on from, until it does."""
        self.checkpoint_io = AtomicCheckpointIO()
        self._last_checkpoint: Path | None = None
        self._let_go = contextlib.ExitStack()
        self.origin = Origin()
        """What the run has started from."""
        self.write, self.silent = write, silent
        self.replaced = tuple(replaced)
        self.command = argv[0]
        patient = {"exit_on_error": False, "allow_abbrev": False, "print_config": None}
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

    guesses: Sequence[str] = ()
    """What was guessed about the tables that were read."""

    # Parsing ----------------------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:
        """The one that is called (each builds a parser).

        Without `weights_only`, because checkpoints are always loaded so; `ckpt_path` is our own key.
        """
        return {self.command: LightningCLI.subcommands()[self.command] | {"weights_only", "ckpt_path"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys."""
        parser.add_argument(
            "--print_config", action=_Asked, help="Print what the run's config.yaml would hold, and exit."
        )
        parser.add_argument("--name", type=str | None, default=None, help="The run is lightning_logs/NAME/version_N; "
                            "the last config file's stem unless given.")  # fmt: skip
        parser.add_argument("--seed", type=int, default=0, help="The root of all random streams.")
        parser.add_argument("--init_from", type=str | None, default=None, help="RUN or RUN@STEP: a fit starts, at step "
                            "0, from the parameters of another run's last checkpoint, or the one of STEP. Members "
                            "that had diverged there stay diverged.")  # fmt: skip
        parser.add_argument("--ensemble", type=dict[str, Any], default={}, help="Named axes, whose product is the "
                            "members: {lr: {log10: [-2, 0, 9]}, batch_size: [1, full], seed: 20}.")  # fmt: skip
        about_checkpoint = _CKPT_PATH["fit" if self.command == "fit" else "evaluation"]
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=about_checkpoint)
        parser.add_class_arguments(Recorder, "record")
        parser.add_class_arguments(MemberGuard, "guard")
        parser.add_argument("--figures", type=list[Figure], default=[], help="Drawn from the results after the fit.")
        parser.add_argument("--variants", type=dict, default={}, help="Further runs after the main one, by "
                            "name: what of the config differs, and `after: NAME`, the run from whose end one starts: "
                            "{slow: {ensemble: {lr: 0.01}, after: main}}.")  # fmt: skip

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
        config_files, flags = configs.configs_and_flags(args[1:])
        args = [args[0], *config_files, *flags]
        strict_yaml.check_arguments(args)
        configs.refuse_parts_of_variants(flags)
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)
        for _, arguments in configs.init_args(self.given[self.given.subcommand]):
            for name in self.replaced:
                arguments.pop(name, None)
        _spell_out(self.config)

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
        if not isinstance(config.figures, list):
            raise ValueError(
                f"figures = {checks.shown(config.figures)}: must be a list, [{{class_path: StepSizeFigure}}]"
            )
        self.ensemble = ensemble = configs.ensemble_of(config)
        configs.refuse_scalars_of_axes(ensemble.axes, given)
        self.resolved = configs.resolve(self.parser, self.config, self.subcommand, ensemble)
        linear = issubclass(configs.class_of(config.model.class_path), LinearNetwork)
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
        _refuse_remote("trainer.default_root_dir", config["default_root_dir"])
        _check_devices(config["devices"])
        chosen = _listed(config["callbacks"])
        for callback in chosen:
            if isinstance(callback, Recorder | MemberGuard):
                section = home(type(callback))
                raise ValueError(f"trainer.callbacks: {type(callback).__name__} is always on; set it in `{section}:`")
        refuse_twins(chosen)
        section = self.config_init[self.subcommand]
        self.recorder, guard = section.record, section.guard
        linear = issubclass(configs.class_of(self.config[self.subcommand].model.class_path), LinearNetwork)
        if not self.write:
            config |= {"logger": False, "enable_checkpointing": False}
            chosen = [callback for callback in chosen if not isinstance(callback, Checkpoint)]
        if self.silent:
            config["enable_progress_bar"] = False
            chosen = [callback for callback in chosen if not isinstance(callback, ProgressBar)]
        self.wants_logger = config["logger"] in (None, True)
        if self.wants_logger:
            config["logger"] = False
        if self.subcommand == "fit":
            self.interruption = Interruption()
            chosen = [guard, *chosen, self.recorder, self.interruption]
            if config["enable_checkpointing"] is not False and not any(isinstance(c, RunCheckpoint) for c in chosen):
                chosen.append(RunCheckpoint())
            if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in chosen):
                chosen.append(MemberProgress())
            if linear and config["limit_val_batches"] is None and not config["num_sanity_val_steps"]:
                config["limit_val_batches"] = 0  # Lightning would validate where a fit ends early, and log it
        plugins = _listed(config["plugins"])
        for plugin in plugins:
            if isinstance(plugin, ClusterEnvironment):
                raise ValueError(f"trainer.plugins: {type(plugin).__name__}: a fit is one process; leave it out")
        # Whatever scheduler has started the process: Lightning would count its tasks as devices, and requeue its job.
        config["plugins"] = [*plugins, LightningEnvironment(), self.checkpoint_io]
        try:
            trainer = Trainer(**{**config, "callbacks": chosen})
        except Exception as error:
            given = self.given[self.subcommand].get("trainer") or {}
            raise trainer_mistake(error, dict(given.items(branches=False))) from error
        for key, number in (("num_nodes", trainer.num_nodes), ("devices", trainer.world_size)):
            if number != 1:
                raise ValueError(f"trainer.{key}: {ONE_DEVICE}")
        return trainer

    def _remember(self, **kwargs: Any) -> None:
        self._arguments = kwargs
        self.ckpt_path: str | None = self.config[self.subcommand].ckpt_path
        self._keep_random_state()

    fit = validate = test = predict = _remember  # what LightningCLI calls; `carry_out` does it, after `check`

    def _keep_random_state(self) -> None:
        """Of the generators plain modules draw from: what else is built or run in between does not change the run."""
        self._random = _collect_rng_states(torch.cuda.is_initialized())

    # Checking ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Set everything up in memory and refuse what cannot run.

        Raises:
            ValueError, OSError: What is wrong, in words.
        """
        _set_rng_states(self._random)
        trainer, model, datamodule = self.trainer, self.model, self.datamodule
        trainer.strategy.connect(model)
        model.trainer = trainer
        if datamodule is not None:
            datamodule.trainer, trainer.datamodule = trainer, datamodule
            if isinstance(datamodule, SyntheticData):
                with (
                    about("data", type(datamodule), self.ensemble.axes, ("path", datamodule.source)),
                    warnings.catch_warnings(record=True) as heard,
                ):
                    warnings.simplefilter("always", TableWarning)
                    datamodule.setup(self.subcommand)
                self.guesses = [str(warning.message) for warning in heard]
        if isinstance(model, LinearNetwork):
            with about("model", type(model), self.ensemble.axes):
                model.setup(self.subcommand)
        elif self.subcommand == "fit":
            _refuse_what_cannot_be_fitted(model, datamodule)
        self.checkpoint = self._read_checkpoint()
        if self.checkpoint is not None:
            with about("ckpt_path"):
                self._compare(self.checkpoint)
        if self.subcommand == "fit":
            self._check_fit()
        self._keep_random_state()

    def _check_fit(self) -> None:
        trainer, model = self.trainer, self.model
        given = self.config.fit.init_from
        if self.checkpoint is not None:
            self._start_as(self.checkpoint, given)
        else:
            start = None if given is None else Start.read(given)
            if start is not None:
                start.check(model, f"init_from = {start.source}")
            self.start_from(start)
        with about("record", Recorder):
            self.recorder.prepare(trainer, model)
        measured: dict[str, Measurement] = {}
        for callback in trainer.callbacks:
            if isinstance(callback, Measurement):
                with about("trainer.callbacks", type(callback)):
                    callback.prepare(trainer, model)
                    for name in callback.names(model):
                        measured.setdefault(name, callback).refuse_to_share(name, callback)
        variables = {*self.recorder.names, *measured}
        if isinstance(model, LinearNetwork):
            self.recorder.check_metrics(trainer, {name: callback.schedule for name, callback in measured.items()})
        for callback in trainer.callbacks:
            self._check_callback(callback)
        self.name = self._name()
        self.figures = self.config_init.fit.figures
        checks.different_names("figures", [figure.name for figure in self.figures])
        for figure in self.figures:
            with about("figures", type(figure)):
                figure.check(variables, self.recorder.ensemble.axes)

    def _check_callback(self, callback: Callback) -> None:
        """Refuse what Lightning's callbacks could not do in a run of ours, before it is made."""
        kind, trainer = f"trainer.callbacks: {type(callback).__name__}", self.trainer
        if isinstance(callback, ModelCheckpoint):
            name = PurePath(callback.filename or "")
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(
                    f"{kind}.filename = {str(name)!r}: must be a name in the folder of checkpoints; give another folder as "
                    "dirpath"
                )
            _refuse_remote(f"{kind}.dirpath", callback.dirpath)
            if callback.dirpath is None and not isinstance(callback, RunCheckpoint):
                if callback.save_last and callback.save_weights_only:
                    raise ValueError(
                        f"{kind}.save_last: last.ckpt must hold the whole state; give a dirpath of its own"
                    )
                if callback.filename == "{step}" and callback.save_top_k != -1:
                    raise ValueError(
                        f"{kind}.filename = '{{step}}': the run's own checkpoints are called so, and would be removed; "
                        "give another, '{step}-best', or a dirpath of its own"
                    )
        if isinstance(callback, DeviceStatsMonitor):
            if not (trainer.loggers or self.wants_logger):
                raise ValueError(f"{kind} needs a logger; trainer.logger is false")
            if not trainer.log_every_n_steps:
                raise ValueError(f"{kind} needs trainer.log_every_n_steps, how often it logs")
            if trainer.strategy.root_device.type == "cpu" and importlib.util.find_spec("psutil") is None:
                raise ValueError(f"{kind} needs psutil, which is not installed: pip install psutil")

    def _name(self) -> str:
        name = self.config.fit.name
        if name is None:
            files = [file for file in self.config.fit.config or [] if file is not None]  # None: given as text
            name = Path(str(files[-1])).stem if files else type(self.model).__name__
        return checks.file_name("name", name)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if self.ckpt_path is None:
            return None
        path = Path(self.ckpt_path)
        if not path.is_file():
            raise CheckpointError(f"ckpt_path = {path}: there is no such file")
        with about("ckpt_path"), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            checkpoint = self.checkpoint_io.read_ahead(path)
        for warning in heard:  # that the one before is used instead
            print(f"dlnlab {self.subcommand}: {warning.message}", file=sys.stderr)
        return checkpoint

    def directory_of_checkpoint(self) -> Path:
        """The run directory that the checkpoint of a resumed run lies in."""
        return Path(os.path.normpath(Path(self.ckpt_path).parent / ".."))  # its name alone may be given

    def start_from(self, start: Start | None) -> None:
        """Let a fit that begins at step 0 start from another run's parameters, or from its own."""
        self.resolved["init_from"] = None if start is None else start.source
        self.origin = Origin() if start is None else Origin(start.identity, start.step)
        self._describe(None if start is None else start.provenance)
        self.recorder.source_axes = {} if start is None else start.axes
        if start is not None:
            start.apply(self.model)

    def _start_as(self, checkpoint: dict[str, Any], given: str | None) -> None:
        """Remember what a resumed fit has started from when it began."""
        recorded = checkpoint["dlnlab_config"].get("init_from")
        self.origin = Origin.of_checkpoint(checkpoint)
        if given is not None and not self._is_recorded(given, recorded):
            raise CheckpointError(
                f"init_from = {given}: the checkpoint's run started from {recorded}; a resume must not change it "
                "(start a new run instead)"
            )
        self.resolved["init_from"] = recorded
        self._describe(checkpoint.get("dlnlab_init_from"))
        self.recorder.source_axes = checkpoint.get("dlnlab_source_axes") or {}

    def _is_recorded(self, given: str, recorded: str | None) -> bool:
        """Whether a source is the one that a run has started from, under this name or, moved, under another."""
        if recorded is None:
            return False
        if given in (recorded, recorded.rpartition("@")[0]):
            return True
        try:
            start = Start.read(given)
        except CheckpointError:
            return False
        return self.origin.recorded is None and self.origin.is_at(start)

    @property
    def identity(self) -> str:
        """What tells the run from others, wherever it lies (`dlnlab.start.identity_of`)."""
        return identity_of(self.resolved, self.origin)

    def _compare(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another config, before anything of it is used."""
        path = Path(self.ckpt_path)
        recorded = checkpoint.get("dlnlab_config") if isinstance(checkpoint, dict) else None
        if (
            not isinstance(recorded, dict)
            or not {"state_dict", "optimizer_states", "loops", "callbacks"} <= checkpoint.keys()
        ):
            raise CheckpointError(f"ckpt_path = {path}: is no checkpoint of a fit of dlnlab")
        fitting = self.subcommand == "fit"
        directory = self.directory_of_checkpoint()
        if fitting and not (directory / "results").is_dir():
            raise CheckpointError(
                f"ckpt_path = {path}: a resumed fit goes on in its run directory, and {directory} is none"
            )
        then, now = configs.what_must_agree(recorded, fitting), configs.what_must_agree(self.resolved, fitting)
        for key in dict.fromkeys((*then, *now)):
            if then.get(key) != now.get(key):
                raise CheckpointError(
                    f"{key} = {checks.shown(now.get(key))}: the run of ckpt_path has {checks.shown(then.get(key))}"
                    + ("; a resume must not change it (start a new run instead)" if fitting else "")
                )
        if isinstance(self.model, LinearNetwork):
            if fitting:
                self.model.refuse_old_checkpoint(checkpoint)
            try:
                self.model.load_state_dict(checkpoint["state_dict"])
            except RuntimeError as error:
                reason = str(error).partition("\n")[2]  # the first line names the class
                raise CheckpointError(f"ckpt_path = {path}: does not fit the model: {reason}") from error

    def _describe(self, provenance: str | None) -> None:
        """Tell the recorder what its results shall say about the run, and what it has started from."""
        versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics", "numpy", "scipy", "xarray")}
        versions |= {"dlnlab": dlnlab.__version__, "python": platform.python_version(), "machine": platform.machine()}
        self.recorder.config, self.recorder.origin = self.resolved, self.origin.for_checkpoint()
        self.recorder.attributes |= {"config": self.record, "versions": json.dumps(versions, indent=1)}
        if provenance is not None:
            self.recorder.attributes["init_from"] = provenance

    # The run directory ------------------------------------------------------------------------------------------------

    def claim(self, directory: Path | None = None) -> None:
        """Keep others from a fit's run directory: two fits in one would tear each other's results.

        Args:
            directory: That of a variant; None is the checkpoint's, or the next free `version_N`.

        Raises:
            ValueError, OSError: If it cannot be made, is in use, or does not hold what the checkpoint needs.
        """
        if directory is not None:
            self.directory = directory
            directory.mkdir(parents=True, exist_ok=True)
        elif self.checkpoint is not None:
            self.directory = self.directory_of_checkpoint()
        else:
            root = Path(self.config.fit.trainer.default_root_dir or "")
            self.directory = claim(root / _LOGS / self.name)
        with about("ckpt_path"):
            self._hold()
            if self.checkpoint is not None:
                self._verify_records(self.checkpoint)

    def give_back(self) -> None:
        """Let go of the run directory of a fit that has not begun, and remove it if it is new."""
        self.let_go()
        if self.directory is not None and self.checkpoint is None:
            give_back(self.directory)

    def let_go(self) -> None:
        """Let others have the run directory."""
        self._let_go.close()

    def begin_anew(self) -> None:
        """Forget the checkpoint, and remove what an earlier fit has left in the run directory."""
        self.ckpt_path = self.checkpoint = None
        if self.directory is not None:
            empty(self.directory)

    def _verify_records(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on after segments that are not there as they were."""
        records = checkpoint["callbacks"].get(self.recorder.state_key)
        if records is None:
            raise CheckpointError(f"ckpt_path = {self.ckpt_path}: says nothing about the run's records")
        verify_segments(self.directory / "results", records["segments"], records["chain"])

    def _hold(self) -> None:
        try:
            self._let_go.callback(hold(self.directory))
        except BlockingIOError:
            raise CheckpointError(f"{self.directory} is in use: the fit that writes it has not ended") from None

    def tie(self) -> None:
        """Point logger, checkpoints, records and config to the run directory."""
        checkpoint = self.checkpoint
        if self.wants_logger:
            last = None if checkpoint is None else checkpoint["global_step"] + 1
            logger = RunLogger(self.directory, purge_step=last)
            self.trainer.loggers = [*self.trainer.loggers, logger]
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.directory / "checkpoints")
        self._last_checkpoint = self.directory / "checkpoints" / "last.ckpt"
        if checkpoint is not None:
            for folder in (self.directory, self.directory / "results", self.directory / "checkpoints"):
                remove_leftovers(folder)
        write_atomic(self.directory / "config.yaml", self.recorder.attributes["config"].encode())
        write_atomic(self.directory / "versions.json", self.recorder.attributes["versions"].encode())
        self.recorder.directory = self.directory

    # Carrying out -----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> str:
        """The run's config.yaml."""
        return yaml.safe_dump(self.resolved, sort_keys=False)

    def where(self) -> str:
        """Which run has failed and how far it has come, the beginning of a message; its records until then are kept."""
        if self.subcommand != "fit":
            return "failed"
        return f"run {self.directory} failed after step {self.trainer.global_step}"

    def carry_out(self) -> None:
        """Do what was asked for.

        Raises:
            Interrupted: If a signal has ended a fit.
        """
        self.checkpoint = None  # the trainer has it
        _set_rng_states(self._random)
        if self.ckpt_path is None:
            resume_from_nothing(self.trainer)
        if self.subcommand != "fit":
            getattr(self.trainer, self.subcommand)(**self._arguments, ckpt_path=self.ckpt_path)
            return
        with self.interruption:
            self.trainer.fit(**self._arguments, ckpt_path=self.ckpt_path)
        number = self.interruption.signal
        if number is not None:
            raise Interrupted(f"stopped at step {self.trainer.global_step} by {signal.Signals(number).name}", number)

    def results(self) -> xr.Dataset:
        """What a fit has recorded."""
        return load_results(self.directory) if self.write else self.recorder.dataset()

    def draw(self, variants: Mapping[str, "Run"] | None = None) -> None:
        """Draw the figures of a fit that writes.

        Args:
            variants: Its variants.
        """
        if self.write and self.figures:
            dataset, folder = self.results(), self.directory / "figures"
            others = {name: run.results() for name, run in (variants or {}).items()}
            saved = [file for figure in self.figures for file in figure.save(dataset, folder, **others)]
            pictures = {file.stem: file for file in saved if file.suffix == ".png"}
            self.recorder.add_images(pictures, self.trainer.global_step)

    @property
    def end(self) -> str | None:
        """How a fit's members have ended, and what has ended a fit while some were running."""
        if not isinstance(self.model, LinearNetwork):
            return None
        step, last = self.trainer.global_step, self.trainer.max_steps
        early = (
            "" if step >= last or not len(self.model.running) else f"; ended at step {step} of {last}{self._by_whom()}"
        )
        causes = MemberGuard.causes(self.model)
        return f"members: {MemberGuard.summary(self.model)}" + (f" ({causes})" if causes else "") + early

    def _by_whom(self) -> str:
        for callback in self.trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                return (
                    f" by EarlyStopping: {callback.stopping_reason_message.removesuffix(' Signaling Trainer to stop.')}"
                )
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
                return f" by Timer: {callback.time_elapsed():.0f} s are over"
        return " by a callback"

    @property
    def slow(self) -> str | None:
        """Why a fit does not take the quickest way, if it does not."""
        linear = self.subcommand == "fit" and isinstance(self.model, LinearNetwork)
        return self.model.path if linear and self.model.path != "closed form" else None

    def way_on(self) -> str:
        """How a fit that was cut short goes on, the end of a sentence."""
        last = self._last_checkpoint
        return f"; go on with --ckpt_path {last}" if last is not None and last.exists() else ""


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _refuse_remote(key: str, folder: Any) -> None:
    """Raise ValueError for an address of a remote file system, of which Python would make a local folder."""
    if folder is not None and re.match(r"[\w+.-]{2,}:", str(folder)) and re.search(r":/|::", str(folder)):
        raise ValueError(f"{key} = {checks.shown(str(folder))}: must be a local folder; copy the run when it has ended")


def _spell_out(config: Any) -> Any:
    """Put the words of enumerations in their place, in a config as it was parsed: a file holds words."""
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, list):
        return [_spell_out(item) for item in config]
    if isinstance(config, jsonargparse.Namespace):
        for name, value in list(vars(config).items()):
            setattr(config, name, _spell_out(value))
    return config


def _check_devices(given: Any) -> None:
    """Refuse what Lightning would stumble over in its search for devices."""
    numbers = given if isinstance(given, list) else str(given).rstrip(",").split(",")
    few = isinstance(given, str | int | list) and not isinstance(given, bool) and bool(numbers)
    if given == "auto" or (few and all(re.fullmatch(r"-?[0-9]{1,6}", str(number).strip()) for number in numbers)):
        return
    raise ValueError(
        f"trainer.devices = {checks.shown(given)}: must be how many devices to train on, a list of their numbers, or auto"
    )


def _refuse_what_cannot_be_fitted(model: LightningModule, datamodule: LightningDataModule | None) -> None:
    """What Lightning would say of a plain module only once the run directory is there."""
    for name in ("training_step", "configure_optimizers"):
        if not is_overridden(name, model):
            raise ValueError(f"model: {type(model).__name__} does not define `{name}`")
    if not any(is_overridden("train_dataloader", each) for each in (model, datamodule) if each is not None):
        raise ValueError(f"data: neither they nor {type(model).__name__} define `train_dataloader`")


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


_SPEAKING = ("callbacks", "profilers")
"""Parts of Lightning that say something only because a config names them."""


def _is_from_a_speaking_part(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or not {*Path(record.pathname).parts}.isdisjoint(_SPEAKING)


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Leave out messages of Lightning that do not apply to chunks: loaders, workers, device advertisements.

    What callbacks and profilers say, which a config has named, is shown.
    """
    levels = {"lightning.pytorch": logging.WARNING, rank_zero_module.log.name: logging.INFO}
    levels |= {f"lightning.pytorch.{part}": logging.INFO for part in _SPEAKING}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {logger: logger.level for logger in loggers}
    if before[logging.getLogger("lightning.pytorch")] > logging.WARNING:  # somebody wants silence
        loggers = {}
    rank_zero_module.log.addFilter(_is_from_a_speaking_part)
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", "Checkpoint directory .* exists", ".*dataloader.*length.*",
                            "Using ModelCheckpoint with manual optimization.*", ".*LeafSpec.* is deprecated"):  # fmt: skip
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        rank_zero_module.log.removeFilter(_is_from_a_speaking_part)
        for logger, level in before.items():
            logger.setLevel(level)
