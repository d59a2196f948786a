"""Lightning's loggers, callbacks, options and signal handlers, and a fit of ours: each works or is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pandas
import pytest
import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment

import dlnlab
from dlnlab.callbacks import GainTracker, Interruption, Measurement, MemberGuard, Recorder, RunCheckpoint, Sharpness
from dlnlab.callbacks.base import refuse_twins
from dlnlab.cli import main
from dlnlab.data import SparseRegression
from dlnlab.ensemble import Ensemble
from dlnlab.messages import explain, needs_no_traceback
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.models.trainer import refuse_what_chunks_cannot_honour
from dlnlab.recorder import TAGS, median

LAST = 60
CONFIG = {
    "name": "run",
    "ensemble": {"lr": [0.02, 0.05, 4.0], "seed": 2},  # the last diverges
    "model": {"class_path": "DiagonalLinearNetwork"},
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "record": {"every_n_steps": 15, "variables": ["train_loss", "distance"]},
    "guard": {"every_n_steps": 10},
    "trainer": {"max_steps": LAST, "enable_progress_bar": False},
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class Kept(Logger):
    """A logger such as a person writes: it keeps what it is given."""

    kept = []

    def __init__(self):
        self.rows, self.hyperparameters = [], None
        Kept.kept.append(self)

    name, version = "kept", 0

    def log_hyperparams(self, params, *args):
        self.hyperparameters = params

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Sees(Callback):
    """Keeps what a callback can read at multiples of 20 steps."""

    seen = {}

    def next_event(self, step):
        return step - step % 20 + 20

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step % 20 == 0:
            Sees.seen[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}


class Eats(Callback):
    """Asks for more memory than there is."""

    def on_train_batch_end(self, trainer, *_):
        torch.empty(10**15)


def chosen(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def fit(folder, *arguments, **trainer):
    """Run the command line in a folder; the exit code."""
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "default_root_dir": str(folder), **trainer}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(folder / "run.yaml"), *arguments])


# Loggers and metrics --------------------------------------------------------------------------------------------------


def all_at_once(folder):
    return {
        "logger": [chosen("CSVLogger", save_dir=str(folder / "csv")), chosen("test_lightning.Kept")],
        "callbacks": [
            chosen("ModelCheckpoint", monitor="distance", every_n_train_steps=20, save_top_k=2),
            chosen("GainTracker", every_n_steps=15),
            chosen("GainTracker", every_n_steps=25),
            chosen("test_lightning.Sees"),
            chosen("Timer", duration="00:01:00:00"),
            chosen("TQDMProgressBar", refresh_rate=7),
            chosen("ModelSummary"),
        ],
        "enable_progress_bar": True,
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One fit with all that Lightning's users name at once."""
    folder = tmp_path_factory.mktemp("served")
    Kept.kept.clear()
    code = fit(folder, **all_at_once(folder))
    assert code == 0
    run = folder / "lightning_logs" / "run" / "version_0"
    return folder, run, dlnlab.load_results(run)


def medians(results, name):
    """{step: median over the members that have not diverged}, by xarray."""
    values = results[name].dropna("step", how="all")
    values = values.where(results.status.sel(step=values.step) != "diverged")
    found = values.median([dim for dim in values.dims if dim != "step"])
    return dict(zip(found.step.values.tolist(), found.values.tolist(), strict=True))


def test_every_logger_gets_the_medians_of_members_that_have_not_diverged_under_their_tags(served):
    folder, _, results = served
    (kept,) = Kept.kept
    assert (results.status == "diverged").any() and not (results.status == "diverged").all()
    for name in ("train_loss", "distance"):
        expected = medians(results, name)
        assert {step: row[TAGS[name]] for step, row in kept.rows if TAGS[name] in row} == pytest.approx(expected)
        assert set(expected) == {0, 15, 30, 45, 60}
    gains = {step for step, row in kept.rows if "gain/l1" in row}
    assert gains == {0, 15, 25, 30, 45, 50, 60}  # both schedules, step 0 and the last
    table = pandas.read_csv(folder / "csv/lightning_logs/version_0/metrics.csv").set_index("step")
    for step, row in kept.rows:
        assert table.loc[step][list(row)].to_dict() == pytest.approx(row)
    counts = (results.status.isel(step=-1) == "diverged").sum().item()
    assert kept.rows[-1][0] == LAST and dict(kept.rows)[LAST]["members/diverged"] == counts
    assert kept.hyperparameters["ensemble"] == CONFIG["ensemble"]
    assert (folder / "csv/lightning_logs/version_0/hparams.yaml").read_text() != "{}\n"


def test_a_monitored_checkpoint_keeps_the_best_measured_where_it_saves_beside_those_of_the_run(served):
    _, run, _ = served
    truth = {step: metrics["distance"] for step, metrics in Sees.seen.items() if step}
    truth[LAST] = medians(served[2], "distance")[LAST]
    files = {path.name for path in (run / "checkpoints").glob("*.ckpt")}
    best = sorted(truth, key=truth.get)[:2]
    assert files == {f"epoch=0-step={step}.ckpt" for step in best} | {"last.ckpt"} | {
        f"step={step}.ckpt" for step in range(10, LAST + 1, 10)
    }
    for step in (20, 40):  # no records, so they were measured for the checkpoint
        assert Sees.seen[step]["distance"] == Sees.seen[step]["recovery/distance"]
        assert step not in medians(served[2], "distance")


def test_a_run_with_callbacks_of_lightnings_is_resumed_from_its_own_checkpoint(served, tmp_path):
    folder, run, results = served
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = tmp_path / run.relative_to(folder)
    assert fit(tmp_path, "--ckpt_path", str(run / "checkpoints" / "step=30.ckpt"), **all_at_once(folder)) == 0
    again = dlnlab.load_results(run)
    assert again.drop_attrs().identical(results.drop_attrs())


def test_a_median_is_that_of_numpy_over_the_members_that_count():
    values = np.array([3.0, np.nan, 1.0, 8.0, np.inf, 2.0])
    assert float(median(torch.tensor(values))) == np.median(values[~np.isnan(values)])
    gone = np.array([0, 0, 0, 1, 1, 0], dtype=bool)
    assert float(median(torch.tensor(values), torch.tensor(gone))) == 2
    assert np.isnan(float(median(torch.tensor([1.0, np.nan]), torch.tensor([True, False]))))
    assert float(median(torch.tensor([np.inf, np.inf]))) == np.inf


@pytest.mark.parametrize("max_chunk", [1, 7, None])
def test_early_stopping_looks_at_every_record_whatever_the_chunks(max_chunk):
    stopping, bar = EarlyStopping("train_loss", min_delta=10, patience=3), TQDMProgressBar()
    model = DiagonalLinearNetwork(ensemble=Ensemble(lr=[0.01], seed=2), max_chunk=max_chunk)
    trainer = Trainer(max_steps=100, callbacks=[stopping, bar, MemberGuard(), Recorder(every_n_steps=9)],
                      **{**QUIET, "enable_progress_bar": True})  # fmt: skip
    trainer.fit(model, SparseRegression())
    assert trainer.global_step == 36  # the first record is the best, three more are not better by 10
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (36, 100)


# Each option and callback of Lightning's ------------------------------------------------------------------------------

MAKERS = {
    "BackboneFinetuning": lambda: callbacks.BackboneFinetuning(),
    "BatchSizeFinder": lambda: callbacks.BatchSizeFinder(),
    "EMAWeightAveraging": lambda: callbacks.EMAWeightAveraging(),
    "GradientAccumulationScheduler": lambda: callbacks.GradientAccumulationScheduler({0: 2}),
    "LearningRateFinder": lambda: callbacks.LearningRateFinder(),
    "LearningRateMonitor": lambda: callbacks.LearningRateMonitor(),
    "ModelPruning": lambda: callbacks.ModelPruning("l1_unstructured", amount=0.5),
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("."),
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0.1),
    "ThroughputMonitor": lambda: callbacks.ThroughputMonitor(len),
    "Timer.interval": lambda: Timer("00:01:00:00", interval="epoch"),
    "ModelCheckpoint needs": lambda: ModelCheckpoint(),
    "ModelCheckpoint.train_time_interval": lambda: ModelCheckpoint(
        train_time_interval=__import__("datetime").timedelta(1)
    ),
    "ModelCheckpoint.save_on_exception": lambda: ModelCheckpoint(every_n_train_steps=1, save_on_exception=True),
    "ModelCheckpoint.save_on_train_epoch_end": lambda: ModelCheckpoint(
        every_n_train_steps=1, save_on_train_epoch_end=True
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_callback_that_chunks_cannot_honour_is_refused(name):
    trainer = Trainer(max_steps=4, callbacks=[MAKERS[name]()], **{**QUIET, "enable_checkpointing": True})
    with pytest.raises(ValueError, match=f"trainer.callbacks: {name}"):
        refuse_what_chunks_cannot_honour(trainer)


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_clip_val": 1},
        {"gradient_clip_algorithm": "norm"},
        {"accumulate_grad_batches": 2},
        {"precision": "64-true"},
        {"sync_batchnorm": True},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 2},
        {"limit_val_batches": 2},
        {"max_epochs": 3},
        {"min_epochs": 1},
        {"min_steps": 2},
        {"val_check_interval": 2, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"detect_anomaly": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_chunks_cannot_honour_is_refused(option):
    trainer = Trainer(**{"max_steps": 4, **QUIET, **option})
    with pytest.raises(ValueError, match=f"trainer.{next(iter(option))}: "):
        refuse_what_chunks_cannot_honour(trainer)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"callbacks": [chosen("EarlyStopping", monitor="nothing")]}, "reads the metric 'nothing': there is no such"),
        ({"callbacks": [chosen("EarlyStopping", monitor="beta")]}, "reads the metric 'beta': there is no such variable"),
        ({"callbacks": [chosen("GainTracker", at=[7]),
                        chosen("ModelCheckpoint", monitor="gain_l1", every_n_train_steps=5)]},
         "reads the metric 'gain_l1' at multiples of 5 steps"),
        ({"callbacks": [chosen("ModelCheckpoint", every_n_train_steps=5, dirpath="memory://x")]}, "a local folder"),
        ({"callbacks": [chosen("ModelCheckpoint", every_n_train_steps=5, save_last=True, save_weights_only=True)]},
         "ModelCheckpoint.save_last"),
        ({"callbacks": [chosen("ModelCheckpoint", every_n_train_steps=5, filename="{step}")]}, "ModelCheckpoint.filename"),
        ({"callbacks": [chosen("DeviceStatsMonitor")]}, "needs trainer.log_every_n_steps"),
        ({"callbacks": [chosen("TQDMProgressBar")]}, "trainer.enable_progress_bar = False"),
        ({"callbacks": [chosen("Sharpness", every_n_steps=5)] * 2}, "2 of Sharpness"),
        ({"callbacks": [chosen("Sharpness", every_n_steps=5), chosen("Sharpness", every_n_steps=7, tol=1e-5)]},
         "sharpness is recorded already, by Sharpness"),
        ({"callbacks": [chosen("RunCheckpoint", every_n_train_steps=0)]}, "RunCheckpoint.every_n_train_steps = 0"),
        ({"default_root_dir": "s3://bucket/runs"}, "trainer.default_root_dir = 's3://bucket/runs': must be a local"),
        ({"default_root_dir": "gs:/bucket"}, "trainer.default_root_dir = 'gs:/bucket': must be a local"),
        ({"plugins": chosen("SLURMEnvironment")}, "trainer.plugins: SLURMEnvironment: a fit is one process"),
        ({"devices": 2}, "trainer.devices: one device"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_said_in_one_line_before_it_is_made(trainer, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit(tmp_path, **trainer) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_limit_of_time_and_a_profiler_do_what_they_promise(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": 3600.0)
    assert (
        fit(tmp_path, max_time="00:00:30:00", profiler=chosen("SimpleProfiler", dirpath=str(tmp_path), filename="p"))
        == 0
    )
    assert f"ended at step 0 of {LAST} by Timer: 3600 s are over" in capsys.readouterr().out
    assert "FIT Profiler Report" in (tmp_path / "fit-p.txt").read_text()


# Measurements of one class --------------------------------------------------------------------------------------------


class Power(Measurement):
    """A person's own, which names what it measures by its argument."""

    def __init__(self, power=1, every_n_steps=None, at=None):
        super().__init__(every_n_steps, at)
        self.power = power

    def measure(self, model, batch):
        return {f"power_{self.power}": model.predictor().abs().pow(self.power).sum(-1)}


def test_measurements_are_told_apart_by_their_arguments():
    several = [Power(), Power(2), Power(2, every_n_steps=3), Power(2, at=[1, 3]), GainTracker(), GainTracker(5),
               Sharpness(5), Sharpness(5, tol=1e-5), Sharpness(5, quantity="trace")]  # fmt: skip
    assert len({one.state_key for one in several}) == len(several)
    refuse_twins(several)
    assert Power().state_key == Power(power=1).state_key == "Power"
    assert pickle.loads(pickle.dumps(several[3])).state_key == several[3].state_key
    with pytest.raises(ValueError, match="2 of Power"):
        refuse_twins([Power(2, every_n_steps=3), Power(2, every_n_steps=3)])
    with pytest.raises(ValueError, match="x is recorded already, by Power"):
        Power().refuse_to_share("x", Power(2))
    Power(2).refuse_to_share("x", Power(2, at=[1]))


def test_a_checkpoint_keeps_the_state_of_every_measurement(served):
    _, run, _ = served
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert {key: state["last_step"] for key, state in states.items() if key.startswith("GainTracker")} == {
        'GainTracker{"every_n_steps": 15}': 60,
        'GainTracker{"every_n_steps": 25}': 50,
    }


# Schedulers and signals -----------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0",
         "SLURM_JOB_NAME": "train", "SLURM_JOB_NODELIST": "n1"}  # fmt: skip
JOBS = {
    "srun with four tasks": SLURM,
    "srun with one task": {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "torchrun": {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"},
    "jsrun": {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "none", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_SIZE": "2",
              "JSM_NAMESPACE_RANK": "1"},
}  # fmt: skip


class Signals(Callback):
    """Sends its own process a signal at step 30."""

    number = signal.SIGTERM

    def next_event(self, step):
        return 30 if step < 30 else None

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 30:
            os.kill(os.getpid(), Signals.number)


@pytest.mark.parametrize("job", JOBS)
def test_a_fit_takes_no_part_in_a_schedulers_requeueing(job, served, tmp_path, monkeypatch, capsys):
    for name, value in JOBS[job].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # what Lightning makes of them when it is imported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((served[1] / "checkpoints" / "last.ckpt").read_bytes())
    monkeypatch.setattr(Signals, "number", signal.SIGUSR1)
    before, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    capsys.readouterr()
    code = fit(tmp_path, logger=chosen("CSVLogger", save_dir="csv"), callbacks=[chosen("test_lightning.Signals")])
    assert code == 128 + signal.SIGUSR1
    assert "dlnlab fit: stopped at step 30 by SIGUSR1; go on with --ckpt_path " in capsys.readouterr().err
    assert (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)]) == (before, handlers)
    run = tmp_path / "lightning_logs" / "run" / "version_0"
    cut, whole = dlnlab.load_results(run), served[2]
    assert cut.step.values.tolist() == [0, 15, 30]
    np.testing.assert_array_equal(cut.train_loss, whole.train_loss.sel(step=cut.step))
    assert len(pandas.read_csv("csv/lightning_logs/version_0/metrics.csv")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csv", "hpc_ckpt_1.ckpt", "lightning_logs", "run.yaml"]
    assert rank_zero_only.rank == 3


def test_in_python_too(served, tmp_path, monkeypatch):
    for name, value in JOBS["srun with one task"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((served[1] / "checkpoints" / "last.ckpt").read_bytes())
    x, y = np.random.default_rng(0).normal(size=(4, 3)), np.ones(4)
    assert dlnlab.simulate(x, y, steps=3).step.values.tolist() == [0, 1, 2, 3]
    trainer = Trainer(max_steps=3, default_root_dir=tmp_path, **QUIET)
    environment = trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    with pytest.raises(ValueError, match=r"hpc_ckpt_1\.ckpt: Lightning takes this file by itself"):
        trainer.fit(DiagonalLinearNetwork(), SparseRegression())
    assert not environment.auto_requeue


@contextmanager
def handler(number, function):
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_taken_for_the_time_of_a_fit_alone(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Interruption() as interruption:
        signal.raise_signal(number)
        assert interruption.signal == number
    assert signal.getsignal(number) == before
    called = []
    with handler(number, lambda *_: called.append(len(called))):  # the program's own, once the fit has ended
        with Interruption():
            signal.raise_signal(number)
            assert called == []
        assert called == [0]
    with handler(number, signal.SIG_IGN), Interruption() as interruption:  # nohup, or in the background
        signal.signal(number, lambda *_: called.append("lightning"))  # as its trainer does with SIGTERM
        interruption.on_train_start(None, None)
        signal.raise_signal(number)
        assert interruption.signal is None and called == [0]
    threads = []

    def elsewhere():
        with Interruption():
            threads.append(signal.getsignal(number))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert threads == [before]


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                      "8000 bytes. Error code 12 (Cannot allocate memory)"), "8,000 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "20.00 MiB"),
        (np._core._exceptions._ArrayMemoryError((10**6,), np.dtype(float)), "7.63 MiB"),
        (MemoryError(), "more"),
        (OSError(12, "Cannot allocate memory"), "more"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_one_line_whatever_it_was_raised_through(error, size):
    try:
        try:
            raise error
        except Exception as cause:
            raise KeyError("afterwards") from cause
    except KeyError as found:
        assert explain(found).startswith(f"out of memory: {size} could not be had (test_lightning.py, line ")
        assert needs_no_traceback(found)
    assert not needs_no_traceback(RuntimeError("memory of an elephant"))


def test_a_fit_without_memory_ends_in_one_line_and_keeps_its_records(tmp_path, capsys):
    capsys.readouterr()
    assert fit(tmp_path, callbacks=[chosen("test_lightning.Eats")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "failed after step 10: out of memory: 4,000,000,000,000,000 bytes could not be had (test_lightning.py" in err
    assert dlnlab.load_results(tmp_path / "lightning_logs" / "run" / "version_0").step.values.tolist() == [0]


def test_what_nobody_reads_changes_no_exit_code_and_a_full_disk_does(tmp_path):
    command = [sys.executable, "-m", "dlnlab", "--help"]
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (closed.returncode, closed.stderr) == (0, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (failed.returncode, failed.stderr) == (1, "dlnlab: standard output: No space left on device\n")


def test_the_period_of_a_runs_checkpoints_can_be_chosen(tmp_path):
    assert fit(tmp_path, callbacks=[chosen("RunCheckpoint", every_n_train_steps=40)]) == 0
    folder = tmp_path / "lightning_logs" / "run" / "version_0" / "checkpoints"
    assert {path.name for path in folder.glob("*.ckpt")} == {"step=40.ckpt", f"step={LAST}.ckpt", "last.ckpt"}
    assert json.dumps(RunCheckpoint().state_dict()) == "{}"
