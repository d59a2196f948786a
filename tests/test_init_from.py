import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

import dlnlab
from dlnlab.checkpoint import AtomicCheckpointIO
from dlnlab.cli import main

CONFIG = """
name: first
ensemble: {lr: [0.05, 0.1], batch_size: [2, full], seed: 2}
model: {class_path: DiagonalLinearNetwork, init_args: {init_scale: 0.2}}
data: {class_path: SparseRegression, init_args: {num_samples: 6, dim: 5, sparsity: 2}}
record: {at: {range: 41}, variables: [beta, train_loss, gain, gain_plus, effective_init, imbalance]}
guard: {every_n_steps: 10}
trainer: {max_steps: 40, enable_progress_bar: false, logger: false}
"""
RUNS = "lightning_logs"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "config.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(folder / "config.yaml"), "--trainer.default_root_dir", str(folder)]) == 0
    return folder / RUNS / "first" / "version_0"


@pytest.fixture
def fit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["fit", "--config", "config.yaml", *map(str, arguments)]) == code
        shown = capsys.readouterr()
        if code:
            assert len(shown.err.splitlines()) == 1
            assert not (tmp_path / RUNS).exists()
            return shown.err
        assert shown.err == ""
        return tmp_path / shown.out.splitlines()[-1].removeprefix("run: ")

    return run


def member_values(run, name, step):
    return dlnlab.load_results(run)[name].sel(step=step).values


def test_a_run_starts_from_the_last_checkpoint_of_another_or_from_the_one_of_a_step(first, fit):
    for source, step in ((first, 40), (f"{first}@20", 20)):
        run = fit("--init_from", source)
        np.testing.assert_array_equal(member_values(run, "beta", 0), member_values(first, "beta", step))
        assert dlnlab.load_results(run).step.values.tolist() == list(range(41))


def test_its_gain_starts_at_zero_and_refers_to_the_new_start(first, fit):
    results = dlnlab.load_results(fit("--init_from", f"{first}@20"))
    start, end = results.isel(step=0), results.isel(step=-1)
    np.testing.assert_array_equal(start.gain, 0)
    np.testing.assert_array_equal(start.gain_plus, 0)
    np.testing.assert_allclose(start.effective_init, np.sqrt(np.abs(start.imbalance) / 2), rtol=1e-12)  # two roundings
    shrunk = -np.log(np.abs(end.imbalance / start.imbalance))
    np.testing.assert_allclose(end.gain, shrunk, rtol=1e-10, atol=1e-12)  # 40 steps of rounding


def test_gradient_descent_goes_on_as_if_it_had_not_been_interrupted(first, fit):
    before, after = (dlnlab.load_results(run).train_loss for run in (first, fit("--init_from", f"{first}@20")))
    expected = before.sel(batch_size="full", step=slice(20, 40)).values
    np.testing.assert_allclose(after.sel(batch_size="full", step=slice(0, 20)), expected, rtol=1e-12)  # rounding
    # Steps are counted from 0, so the mini-batches are those of the first steps again.
    assert not np.allclose(after.sel(batch_size="2", step=20), before.sel(batch_size="2", step=40))


def test_axes_may_differ_where_the_number_of_members_agrees(first, fit):
    run = fit("--init_from", first, "--ensemble", "{lr: [0.01, 0.02, 0.03, 0.04], seed: 2}")
    assert dict(dlnlab.load_results(run).sizes)["lr"] == 4


def test_members_that_had_diverged_stay_so_with_the_step_and_those_that_had_converged_run_again(fit):
    stopped = fit("--ensemble.lr", "[0.05, 50]", "--guard.tol", 0.15, "--name", "stopped")
    before = dlnlab.load_results(stopped)
    assert set(before.status.isel(step=-1).values.ravel()) == {"converged", "diverged", "running"}
    measured = ["--trainer.callbacks+", "PredictorNorm", "--trainer.callbacks+", "Thresholds"]
    run = fit("--init_from", stopped, *measured, "--data.init_args.noise_std", 0)
    after = dlnlab.load_results(run)
    gone = before.status.isel(step=-1).values == "diverged"
    assert (after.status.values == "diverged").any(-1).tolist() == gone.tolist()
    assert (after.status.values[gone] == "diverged").all()
    assert (after.status.isel(step=0).values[~gone] == "running").all()
    np.testing.assert_array_equal(after.stopped_at.values[gone], before.stopped_at.values[gone])
    assert set(after.diverged_by.values[gone]) == {"source"}
    np.testing.assert_array_equal(after.beta.values[gone], before.beta.isel(step=[-1] * 41).values[gone])
    for name in ("l1_norm", "flow_edge"):
        assert (after[name].isel(step=-1).isnull().values == gone).all()
    assert after.source_lr.dims == ("lr",)
    assert after.source_lr.values.tolist() == [0.05, 50]
    assert "source_seed" not in after.coords  # that is the new run's own
    fit(
        "--init_from",
        stopped,
        *measured,
        "--data.init_args.noise_std",
        0,
        "--ckpt_path",
        run / "checkpoints" / "step=20.ckpt",
    )
    assert dlnlab.load_results(run).identical(after)


def test_chains_of_variants_carry_what_had_diverged_and_the_axes_of_every_run_before(tmp_path):
    config = yaml.safe_load(CONFIG)
    config["ensemble"] = {"lr": [0.05, 50.0], "seed": 3}
    config["variants"] = {
        "second": {"after": "main", "ensemble": {"batch_size": [1, "full"], "seed": 3}},
        "third": {"after": "second", "ensemble": {"seed": {"range": [5, 11]}}},
    }
    main_run, second, third = dlnlab.run_all(config, directory=tmp_path).values()
    gone = (main_run.status.isel(step=-1) == "diverged").values.ravel()
    assert gone.tolist() == [False] * 3 + [True] * 3
    for later in (second, third):
        assert ((later.status == "diverged").values.reshape(6, -1) == gone[:, None]).all()
        np.testing.assert_array_equal(later.stopped_at.values.ravel(), main_run.stopped_at.values.ravel())
    assert second.source_lr.dims == ("batch_size",)
    assert third.source_batch_size.values.tolist() == ["1"] * 3 + ["full"] * 3
    assert third.source_lr.values.tolist() == [0.05] * 3 + [50.0] * 3
    assert third.source_seed.values.tolist() == [0, 1, 2] * 2
    # TensorBoard's medians are those of the members that do take steps.
    cells = Path(third.encoding["source"]) / "cells"
    (file,) = cells.glob("*/events*")
    shown = {
        value.tag: float(make_ndarray(value.tensor))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if event.step == 40
    }
    assert (shown["members/diverged"], shown["members/running"]) == (3, 3)
    np.testing.assert_allclose(shown["loss/train"], np.median(third.train_loss[:3, -1]), rtol=1e-6)  # float32


def test_a_checkpoint_without_the_first_losses_is_one_error(first, fit, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    path = copy / "checkpoints" / "step=20.ckpt"
    state = torch.load(path, weights_only=True)
    del state["dlnlab_guard"]
    AtomicCheckpointIO().save_checkpoint(state, path)
    assert "written by an earlier version of dlnlab" in fit("--ckpt_path", path, code=2)


def test_what_it_started_from_is_recorded_and_the_run_can_be_run_again(first, fit):
    run = fit("--init_from", first)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["init_from"] == f"{first}@40"
    then = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)["dlnlab_config"]
    provenance = json.loads(dlnlab.load_results(run).attrs["init_from"])
    sha256 = hashlib.sha256(json.dumps(then, sort_keys=True).encode()).hexdigest()
    assert provenance == {"run": str(first), "step": 40, "config_sha256": sha256}
    again = fit("--config", run / "config.yaml")
    assert dlnlab.load_results(run).equals(dlnlab.load_results(again))
    assert json.loads(dlnlab.load_results(again).attrs["init_from"]) == provenance


def test_a_resumed_run_needs_its_source_no_more_and_remembers_it(first, fit, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    whole, cut = (fit("--init_from", copy) for _ in range(2))
    shutil.rmtree(copy)
    for flags in ((), ("--init_from", copy), ("--init_from", f"{copy}@40")):
        fit("--ckpt_path", cut / "checkpoints" / "step=20.ckpt", *flags)
        one, other = dlnlab.load_results(whole), dlnlab.load_results(cut)
        assert one.equals(other)
        assert one.attrs["init_from"] == other.attrs["init_from"]
        assert yaml.safe_load((cut / "config.yaml").read_text())["init_from"] == f"{copy}@40"
    # The run that was copied is the same one; the copy at another step, or another run, is not.
    resume = ["fit", "--config", "config.yaml", "--ckpt_path", str(cut / "checkpoints" / "step=20.ckpt"), "--init_from"]
    assert main([*resume, str(first)]) == 0
    for other in (f"{first}@20", str(whole)):
        assert main([*resume, other]) == 2


def test_a_run_from_python_starts_from_another_too(first):
    config = yaml.safe_load(CONFIG)
    results = dlnlab.run(config, {"init_from": f"{first}@20"})
    np.testing.assert_array_equal(results.beta.sel(step=0), member_values(first, "beta", 20))
    assert json.loads(results.attrs["init_from"])["step"] == 20


def test_a_plain_lightning_module_starts_from_another_ones_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain_line.py").write_text(
        """
import torch
from lightning.pytorch import LightningModule

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return ((self.layer(batch[0])[:, 0] - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = ["--data", "SparseRegression", "--data.dim", "5", "--trainer.logger", "false", "--record.every_n_steps", "1"]
    fit = ["fit", "--model", "plain_line.Line", *data, "--trainer.max_steps"]
    assert main([*fit, "20", "--name", "whole"]) == 0
    assert main([*fit, "10", "--name", "half"]) == 0
    assert main([*fit, "10", "--init_from", f"{RUNS}/half/version_0", "--name", "rest"]) == 0
    whole, rest = (dlnlab.load_results(tmp_path / RUNS / name / "version_0") for name in ("whole", "rest"))
    np.testing.assert_array_equal(rest.train_loss, whole.train_loss.isel(step=slice(10, 20)))


def test_a_model_decides_how_it_takes_over_anothers_parameters(first, fit, tmp_path):
    (tmp_path / "halved.py").write_text(
        """
from dlnlab.models import DiagonalLinearNetwork

class Halved(DiagonalLinearNetwork):
    def start_from(self, parameters):
        super().start_from({name: value / 2 for name, value in parameters.items()})
"""
    )
    run = fit("--model", "halved.Halved", "--init_from", first)
    np.testing.assert_array_equal(member_values(run, "beta", 0), member_values(first, "beta", 40) / 4)
    np.testing.assert_array_equal(member_values(run, "gain", 0), 0)


def test_a_source_that_is_not_there_is_one_error(first, fit):
    assert "no checkpoint at nowhere/checkpoints/last.ckpt" in fit("--init_from", "nowhere", code=2)
    assert "it has those of steps 10, 20, 30, 40" in fit("--init_from", f"{first}@25", code=2)
    for step in ("²", "-1", "4.0", ""):
        assert f"no checkpoint at {first}@{step}/" in (said := fit("--init_from", f"{first}@{step}", code=2))
        assert "a step is a whole number, RUN@2000" in said


def test_the_end_of_a_fit_that_lies_in_its_last_checkpoint_alone_is_found_by_its_step(first, fit, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    (copy / "checkpoints" / "step=40.ckpt").unlink()
    run = fit("--init_from", f"{copy}@40")
    np.testing.assert_array_equal(member_values(run, "beta", 0), member_values(first, "beta", 40))


def test_a_damaged_source_is_one_error_and_no_earlier_checkpoint_takes_its_place(first, fit, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    last = copy / "checkpoints" / "last.ckpt"
    assert last.with_name("last.ckpt.previous").exists()
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert "last.ckpt is damaged" in fit("--init_from", copy, code=2)


def test_a_source_with_other_members_shapes_or_parameters_is_one_error_that_names_them(first, fit, tmp_path):
    assert "its ensemble has 8 members and this one 12" in fit("--init_from", first, "--ensemble.seed", 3, code=2)
    assert "its parameter w_plus has shape (8, 5) and this model's (8, 7)" in fit(
        "--init_from", first, "--data.init_args.dim", 7, code=2
    )
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    state = {"a": torch.zeros(8, 5), "status": torch.zeros(8), "stopped_at": torch.zeros(8)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "global_step": 3}, other / "last.ckpt")
    message = "its parameters are a and this model's w_minus, w_plus"
    assert message in fit("--init_from", tmp_path / "other", code=2)
