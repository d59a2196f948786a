"""Fits from Python: `run` a config, `simulate` on arrays. Both return the labelled results and leave no trace."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pandas as pd
import torch
import xarray as xr
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment

import dlnlab
from dlnlab import checks
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.data.arrays import ArrayRegression
from dlnlab.ensemble import Ensemble
from dlnlab.fitting import quiet, without_noise
from dlnlab.messages import explain
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork
from dlnlab.models.trainer import own_process, resume_from_nothing
from dlnlab.study import Study
from dlnlab.tables import TableWarning

Config = str | Path | Mapping[str, Any]


def run(
    config: Config | Sequence[Config],
    changes: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    **axes: Any,
) -> xr.Dataset:
    """Train the ensemble of a config, as `dlnlab fit` does, and return what it recorded.

    Nothing is written or printed unless `directory` is given, nothing global is changed (random generators, threads,
    warnings, logging, the import path), and a mistake in the config raises the message that the command line prints.

    Args:
        config: A config file, the name of one in `configs/` (`quickstart`), a mapping with the same keys, or several of
            these, the later over the earlier. Classes in a mapping may be given as such.
        changes: Other keys, dotted as on the command line: `{"trainer.max_steps": 1000, "model.init_args.dim": 5}`.
        directory: Write the run to `directory/lightning_logs/NAME/version_N`, as `--trainer.default_root_dir` does, and
            draw its figures there; the data set's `encoding["source"]` says where it is. None keeps all in memory.
        **axes: Axes of the ensemble, in place of the config's own and of scalars it gives for them: `lr=[0.1, 0.2]`,
            `seed=20` (seeds 0 to 19), `batch_size=[1, "full"]`.

    Returns:
        The results, as `load_results` gives them; those of the main run where the config has variants (`run_all`).

    Raises:
        ValueError: If something in the config is wrong, before anything is made.
        OSError: If a file cannot be read or the directory not be written.

    Example:
        >>> config = {"model": {"class_path": "DiagonalLinearNetwork"}, "data": {"class_path": "SparseRegression"}}
        >>> results = run(config, {"trainer.max_steps": 100}, lr=[0.01, 0.1], seed=3)
        >>> dict(results.train_loss.sizes)["lr"], bool((results.train_loss[..., -1] < results.train_loss[..., 0]).all())
        (2, True)
    """
    return run_all(config, changes, directory, **axes)["main"]


def run_all(
    config: Config | Sequence[Config],
    changes: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    **axes: Any,
) -> dict[str, xr.Dataset]:
    """Do as `run`, and return also what the config's variants have recorded.

    Args:
        config: As for `run`.
        changes: As for `run`; they reach every variant.
        directory: As for `run`.
        **axes: As for `run`; they reach every variant but those whose own ensemble lacks the axis.

    Returns:
        The results by name: `main`, then the variants in the order written, ready for `figure.draw(results.pop("main"),
        **results)`.

    Raises:
        ValueError, OSError: As `run`.

    Example:
        >>> config = {"model": {"class_path": "DiagonalLinearNetwork"}, "data": {"class_path": "SparseRegression"}}
        >>> config |= {"ensemble": {"lr": [0.1]}, "variants": {"slow": {"ensemble": {"lr": [0.01]}}}}
        >>> results = run_all(config, {"trainer.max_steps": 100})
        >>> {name: dataset.lr.item() for name, dataset in results.items()}
        {'main': 0.1, 'slow': 0.01}
    """
    layers = [config] if isinstance(config, str | Path | Mapping) else list(config)
    flags = {**(changes or {}), **{f"ensemble.{name}": values for name, values in axes.items()}}
    if directory is not None:
        flags["trainer.default_root_dir"] = str(directory)
    argv = ["fit", *(f"--config={_layer(layer)}" for layer in layers)]
    argv += [f"--{key}={_text(value)}" for key, value in flags.items()]
    with _leaving_no_trace():
        try:
            with quiet():
                study = Study(argv, write=directory is not None, replaced=axes, silent=True)
                study.check()
        except Exception as error:  # whatever it is, nothing was made yet
            message = explain(error)
            if isinstance(error, ValueError | OSError) and str(error) == message:
                raise
            raise ValueError(message) from None  # the parser's own traceback is of no help
        with without_noise():
            study.carry_out()
        results = study.results()
    for guess in study.guesses():
        warnings.warn(guess, TableWarning, stacklevel=3)
    return results


def simulate(
    X: Any,
    y: Any,
    *,
    steps: int = 10_000,
    model: Callable[..., LinearNetwork] = DiagonalLinearNetwork,
    teacher: Any = None,
    X_test: Any = None,
    y_test: Any = None,
    record: Sequence[str] | Mapping[str, Any] | None = None,
    guard: Mapping[str, Any] | None = None,
    callbacks: Iterable[Callback] = (),
    **hyperparameters: Any,
) -> xr.Dataset:
    """Train a linear network on your own arrays and return what was recorded; nothing is written or printed.

    Args:
        X: Inputs (N, D): a NumPy array, tensor, pandas or xarray object, sparse matrix or nested list. Masked, missing
            and complex entries are refused. Labels are compared and rows are matched by position.
        y: Targets (N,) or (N, 1), or (N, K) for a model with K outputs.
        steps: Optimizer steps.
        model: A `LinearNetwork` subclass, or anything that makes a model from `ensemble=`: to give arguments that are
            no hyperparameters, `functools.partial(DiagonalLinearNetwork, dtype="float32")`.
        teacher: The truth behind the data (D,) or (K, D), if it is known: defines `distance`.
        X_test: Inputs of the test rows; with `y_test` they define `test_loss`.
        y_test: Their targets.
        record: Names of the variables to record, or what a config has under `record`, as
            `{"at": {"log10": [0, 4, 40]}, "variables": ["beta", "gain"]}`.
        guard: What a config has under `guard`, as `{"tol": 0}`.
        callbacks: Measurements and other callbacks.
        **hyperparameters: Of the model and its optimizer, whatever may be an axis: `lr`, `batch_size`, `init_scale`,
            `sampling`, `weight_decay`, `label_noise`, .... One value is for all members; several, in a list, an array or
            a form like `{"log10": [-2, 0, 9]}`, are an axis of the ensemble, the axes in the order written. `seed=20` is
            20 seeds, which differ in their mini-batches, label noise and random initialisations.

    Returns:
        The results, as `load_results` gives them; hyperparameters with one value are coordinates without a dimension.

    Raises:
        ValueError: If an argument is wrong, before the fit.

    Example:
        >>> X, teacher = torch.randn(20, 30), torch.zeros(30)
        >>> teacher[:3] = 1
        >>> results = simulate(X, X @ teacher, teacher=teacher, lr=[0.01, 0.1], batch_size=5, steps=100, seed=4)
        >>> results.distance.dims, results.batch_size.item()
        (('lr', 'seed', 'step'), '5')
    """
    axes = {name: _plain(value) for name, value in hyperparameters.items()}
    single = [name for name, value in axes.items() if name != "seed" and not isinstance(value, Mapping | list | tuple)]
    options = dict(record) if isinstance(record, Mapping) else {"variables": None if record is None else list(record)}
    recorder = Recorder(**options)
    trainer_options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                       "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "devices": 1,
                       "plugins": [LightningEnvironment()]}  # fmt: skip
    with _leaving_no_trace():
        with quiet():
            data = ArrayRegression(X, y, X_test, y_test, teacher)
            network = model(ensemble=Ensemble(**axes))
            trainer = Trainer(
                max_steps=checks.integer("steps", steps, at_least=1),
                callbacks=[MemberGuard(**(guard or {})), *callbacks, recorder],
                log_every_n_steps=0,
                **trainer_options,
            )
        recorder.attributes["versions"] = json.dumps({"dlnlab": dlnlab.__version__, "torch": torch.__version__})
        resume_from_nothing(trainer)
        with without_noise():
            trainer.fit(network, data)
        return recorder.dataset().squeeze(single)


def _layer(config: Config) -> str:
    """A config as `--config` takes it: a path, or the config itself as text."""
    if isinstance(config, Mapping):
        return json.dumps(config, default=_plain)
    shipped = Path(dlnlab.__file__).parents[1] / "configs" / f"{config}.yaml"
    return str(shipped if not Path(config).exists() and shipped.exists() else config)


def _text(value: Any) -> str:
    value = _plain(value)
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """A value as it would be read from a config."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor | pd.Series | pd.Index | xr.DataArray):
        return value.values.tolist() if isinstance(value, xr.DataArray) else value.tolist()
    if isinstance(value, range):
        return list(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return value


@contextlib.contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """Put back whatever of the process's state a fit changes, and let Ctrl-C be what it is in Python."""
    threads, dtype, environment, path = (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        dict(os.environ),
        [*sys.path],
    )
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002 - what Lightning seeds
    loader, on_interrupt = jsonargparse.get_loader("yaml"), signal.getsignal(signal.SIGINT)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    sys.path.insert(0, os.getcwd())  # a person's own classes are found by their class_path, as on the command line
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices), own_process():
            yield
    except SystemExit as end:
        # Lightning's answer to Ctrl-C, which in a notebook must not end the kernel.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        jsonargparse.set_loader("yaml", loader, (yaml.YAMLError,))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
