"""Variants: one command line, the main run and others over the same config."""

import json
import os
import shutil
import signal

import numpy as np
import pandas
import pytest
import reliability
import yaml
from reliability import KILLED, LAST, RUN, Program, at_step

import dlnlab
from dlnlab.checkpoint import AtomicCheckpointIO
from dlnlab.cli import main
from dlnlab.export import export

CONFIG = {
    "name": "trial",
    "ensemble": {"lr": [0.05, 0.1], "batch_size": [2, "full"], "seed": 2},
    "model": {
        "class_path": "DiagonalLinearNetwork",
        "init_args": {
            "init_scale": 0.2,
            "optimizer": {"class_path": "GainSGD", "init_args": {"form": "squares", "weight_decay": 0.001}},
        },
    },
    "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 6, "dim": 5, "sparsity": 2}},
    "record": {"at": {"range": 101}, "variables": ["beta", "train_loss", "gain"]},
    "guard": {"every_n_steps": 10},
    "trainer": {"max_steps": 40},
}
VARIANTS = {
    "last": {"after": "slow", "ensemble": {"lr": [0.01, 0.02, 0.03, 0.04], "seed": 2}, "trainer": {"max_steps": 20}},
    "slow": {"after": "main", "ensemble": {"lr": [0.01, 0.02], "batch_size": [1, 3], "seed": 2}},
    "adam": {
        "ensemble": {"seed": 3},
        "model": {
            "init_args": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}, "batch_size": 2}
        },
        "record": {"variables": ["beta", "train_loss"]},
    },
}
STUDY = {**CONFIG, "variants": VARIANTS}
FOLDERS = {"main": RUN, **{name: RUN / "variants" / name for name in VARIANTS}}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="every trial is a fork")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(STUDY, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def reference(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    code, output = program(folder)
    assert code == 0, output
    (folder / "output").write_text(output)
    return folder


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys):
    """Run a config in an empty folder; returns the run directory, or the message of a refusal."""
    monkeypatch.chdir(tmp_path)

    def run(config, *arguments, code=0):
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        capsys.readouterr()
        assert main(["fit", "--config", "trial.yaml", *map(str, arguments)]) == code
        shown = capsys.readouterr()
        return shown.err if code else tmp_path / shown.out.splitlines()[-1].removeprefix("run: ")

    return run


def results(folder):
    return {name: dlnlab.load_results(folder / path) for name, path in FOLDERS.items()}


def merged(partial):
    """The config of one variant, written out by hand."""
    config = {**CONFIG, **{key: value for key, value in partial.items() if key in ("ensemble", "record", "trainer")}}
    if "record" in partial:
        config["record"] = {**CONFIG["record"], **partial["record"]}
    if "model" in partial:
        config["model"] = {**CONFIG["model"], "init_args": {"init_scale": 0.2, **partial["model"]["init_args"]}}
        adam = {"lr": 0.02, "weight_decay": 0.001}  # what both optimizers have stays
        config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.Adam", "init_args": adam}
    return config


def difference(folder, reference):
    """What differs between two studies; None if they are bitwise the same."""
    for (name, one), other in zip(results(folder).items(), results(reference).values(), strict=True):
        if not one.identical(other):
            return f"results of {name}"
    for name, path in FOLDERS.items():
        one, two = (
            AtomicCheckpointIO().load_checkpoint(each / path / "checkpoints" / "last.ckpt")
            for each in (folder, reference)
        )
        for key in ("global_step", "state_dict", "optimizer_states", "dlnlab_kept", "dlnlab_config"):
            if not reliability.same(one[key], two[key]):
                return f"checkpoint of {name}: {key}"
        cells = [sorted(cell.name for cell in (each / path / "cells").iterdir()) for each in (folder, reference)]
        if cells[0] != cells[1]:
            return f"TensorBoard of {name}"
    strays = [path.name for path in (folder / RUN).rglob(".*.tmp")]
    return f"left behind: {strays}" if strays else None


# What a study is ------------------------------------------------------------------------------------------------------


def test_every_variant_has_a_run_directory_of_its_own_and_says_how_it_ended(reference):
    assert (reference / "output").read_text().splitlines() == [
        "members: 8 running, 0 converged, 0 diverged",
        "last: members: 8 running, 0 converged, 0 diverged",
        "slow: members: 8 running, 0 converged, 0 diverged",
        "adam: members: 3 running, 0 converged, 0 diverged",
        f"run: {RUN}",
        "dlnlab fit: variant adam: generic (autograd): the optimizer is Adam",  # on standard error
    ]
    for path in FOLDERS.values():
        inside = {each.name for each in (reference / path).iterdir()}
        assert inside >= {"config.yaml", "versions.json", "results", "checkpoints", "cells"}
    assert {path.name for path in (reference / RUN / "variants").iterdir()} == set(VARIANTS)


def test_a_variant_is_the_run_that_its_merged_config_gives_alone(reference, fit):
    for name in ("main", "adam"):
        alone = dlnlab.load_results(fit(merged(VARIANTS.get(name, {}))))
        assert results(reference)[name].equals(alone), name


def test_a_variant_after_another_starts_where_that_one_has_ended(reference, fit, monkeypatch):
    found = results(reference)
    for name, source, step in (("slow", "main", 40), ("last", "slow", 40)):
        begin, end = found[name].isel(step=0), found[source].sel(step=step)
        np.testing.assert_array_equal(begin.beta.values.reshape(8, 5), end.beta.values.reshape(8, 5))
        np.testing.assert_array_equal(begin.gain, 0)
        started = f"{FOLDERS[source]}@{step}"
        assert yaml.safe_load((reference / FOLDERS[name] / "config.yaml").read_text())["init_from"] == started
        provenance = json.loads(found[name].attrs["init_from"])
        assert (provenance["run"], provenance["step"]) == (str(FOLDERS[source]), step)
        by_hand = fit(merged(VARIANTS[name]), "--init_from", f"{reference / FOLDERS[source]}@{step}")
        assert dlnlab.load_results(by_hand).equals(found[name])
        sha256 = json.loads(dlnlab.load_results(by_hand).attrs["init_from"])["config_sha256"]
        assert provenance["config_sha256"] == sha256


def test_a_run_is_the_same_with_variants_and_without(tmp_path, fit, monkeypatch):
    (tmp_path / "noisy_line.py").write_text(
        """
import torch
from lightning.pytorch import LightningModule

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return ((self.layer(batch[0])[:, 0] - batch[1] - torch.randn(1)) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"model": {"class_path": "noisy_line.Line"}, "data": CONFIG["data"], "trainer": {"max_steps": 5},
              "record": {"every_n_steps": 1}}  # fmt: skip
    alone = fit(config)
    study = fit({**config, "variants": {"again": {}, "other": {"seed": 1}}})
    found = [dlnlab.load_results(path) for path in (alone, study, study / "variants/again", study / "variants/other")]
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])
    assert not found[0].equals(found[3])


def test_values_on_the_command_line_reach_every_variant_but_for_axes_it_does_not_have(fit):
    flags = ["--trainer.max_steps=7", "--ensemble.seed", 1, "--ensemble", "{lr: [0.3], batch_size: [full], seed: 1}"]
    run = fit({**STUDY, "variants": {"adam": VARIANTS["adam"], "same": {"trainer": {"max_steps": 9}}}}, *flags)
    found = {name: dlnlab.load_results(run / "variants" / name) for name in ("adam", "same")}
    found["main"] = dlnlab.load_results(run)
    axes = {name: {axis: len(values) for axis, values in each.coords.items()} for name, each in found.items()}
    assert axes["adam"] == {"seed": 1, "step": 8}
    assert axes["same"] == axes["main"] == {"lr": 1, "batch_size": 1, "batch_size_number": 1, "seed": 1, "step": 8}
    again = fit(STUDY, "--config", run / "config.yaml", "--name", "again")  # what the flags have changed is in it
    assert dlnlab.load_results(again).equals(found["main"])
    for name in ("adam", "same"):
        assert dlnlab.load_results(again / "variants" / name).equals(found[name])


def test_axes_of_a_variant_take_the_place_of_scalars_of_the_config(fit):
    run = fit({**CONFIG, "variants": {"scales": {"ensemble": {"init_scale": [0.1, 0.3], "lr": 0.05}}}})
    again = fit({}, "--config", run / "config.yaml")
    for each in (run, again):
        assert dict(dlnlab.load_results(each / "variants" / "scales").gain.sizes)["init_scale"] == 2


def test_arguments_of_a_replaced_class_do_not_leak_into_the_new_one(reference):
    config = yaml.safe_load((reference / FOLDERS["adam"] / "config.yaml").read_text())
    assert "form" not in config["model"]["init_args"]["optimizer"]["init_args"]
    assert config["model"]["init_args"]["init_scale"] == 0.2
    assert config["record"]["at"] == {"range": 101}
    assert config["ensemble"] == {"seed": 3}


def test_figures_get_the_variants_and_a_variant_draws_only_its_own(fit):
    variants = {
        "decay": {"model": {"init_args": {"optimizer": {"init_args": {"weight_decay": 0.1}}}}},
        "drawn": {"figures": [{"class_path": "StepSizeFigure", "init_args": {"name": "mine"}}]},
    }
    run = fit({**CONFIG, "record": {}, "figures": [{"class_path": "StepSizeFigure"}], "variants": variants})
    lines = {str(line) for line in pandas.read_csv(run / "figures" / "step_size_figure.csv").line}
    assert {name for name in variants if any(name in line for line in lines)} == set(variants)
    assert not (run / "variants" / "decay" / "figures").exists()
    assert {path.stem for path in (run / "variants" / "drawn" / "figures").iterdir()} == {"mine"}


def test_a_variant_is_an_ordinary_run_that_is_resumed_started_from_and_exported_by_itself(reference, tmp_path, fit):
    shutil.copytree(reference / RUN, tmp_path / RUN)
    slow, whole = FOLDERS["slow"], results(reference)["slow"]
    resumed = fit({}, "--config", slow / "config.yaml", "--ckpt_path", slow / "checkpoints" / "step=20.ckpt")
    assert resumed == tmp_path / slow
    assert dlnlab.load_results(slow).equals(whole)
    again = fit({}, "--config", slow / "config.yaml")
    assert again == tmp_path / "lightning_logs" / "slow" / "version_0"
    assert dlnlab.load_results(again).equals(whole)
    started = dlnlab.load_results(fit(merged(VARIANTS["slow"]), "--init_from", slow))
    np.testing.assert_array_equal(started.beta.isel(step=0), whole.beta.isel(step=-1))
    assert export(slow, "csv")[-1].exists()


def test_other_commands_ignore_variants(reference, tmp_path, monkeypatch, capsys):
    shutil.copytree(reference / RUN, tmp_path / RUN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(STUDY))
    assert main(["validate", "--config", "trial.yaml", "--ckpt_path", str(LAST)]) == 0
    assert capsys.readouterr().out.count("loss/train/max") == 1


# What a study survives ------------------------------------------------------------------------------------------------


def in_run(program, name, step, act):
    """Act at a step of one of a study's runs, before its checkpoint is written."""
    return lambda _: at_step(step, act)(program.study.runs[name])


def in_order(program, name, act):
    """Act when a run of a study has been carried out."""

    def prepare(_):
        run = program.study.runs[name]
        run.carry_out = reliability._then(run.carry_out, act)

    return prepare


@needs_fork
@pytest.mark.parametrize(("name", "step"), [("main", 27), ("main", None), ("slow", 6), ("slow", 33), ("adam", None)])
def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(program, reference, tmp_path, name, step):
    die = in_order(program, name, reliability.die) if step is None else in_run(program, name, step, reliability.die)
    code, output = program(tmp_path, before=die)
    assert code == KILLED, output
    code, output = program(tmp_path, resume=True)
    assert code == 0, output
    assert output == (reference / "output").read_text()
    assert difference(tmp_path, reference) is None


@needs_fork
def test_a_finished_study_that_is_resumed_repeats_its_end(program, reference, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    code, output = program(tmp_path / RUN, resume="checkpoints/last.ckpt")
    assert code == 0, output
    assert difference(tmp_path, reference) is None


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_variant_ends_the_study_in_order_and_a_resume_goes_on(program, reference, tmp_path, number):
    stop = in_run(program, "slow", 15, lambda: os.kill(os.getpid(), number))
    code, output = program(tmp_path, before=stop)
    assert code == 128 + number
    out, _, err = output.splitlines()
    assert out == f"run: {RUN}"
    assert err.startswith("dlnlab fit: variant slow stopped at step ")
    assert err.endswith(f" by {number.name}; go on with --ckpt_path {LAST}")
    assert not (tmp_path / FOLDERS["last"]).exists()
    assert program(tmp_path, resume=True)[0] == 0
    assert difference(tmp_path, reference) is None


@needs_fork
def test_a_failure_in_a_variant_names_it_and_the_way_on(program, reference, tmp_path):
    def fail():
        raise OSError(28, "No space left on device", "here")

    code, output = program(tmp_path, before=in_run(program, "slow", 15, fail))
    assert code == 1
    assert output.splitlines()[-1] == (
        f"dlnlab fit: run {FOLDERS['slow']} failed after step 15: here: No space left on device; go on with --ckpt_path "
        f"{LAST}"
    )
    assert program(tmp_path, resume=True)[0] == 0
    assert difference(tmp_path, reference) is None


@needs_fork
def test_a_study_that_is_extended_is_the_longer_study(reference, tmp_path):
    longer = Program(STUDY, tmp_path / "config", "--trainer.max_steps", "60")
    shutil.copytree(reference / RUN, tmp_path / "short" / RUN)
    code, output = longer(tmp_path / "short", resume=True)
    assert code == 0, output
    for name in ("slow", "last"):  # what they had started from is not what they start from now
        assert f"dlnlab fit: {FOLDERS[name]} begins anew: it started from " in output
    assert longer(tmp_path / "straight")[0] == 0
    assert difference(tmp_path / "short", tmp_path / "straight") is None


@needs_fork
@pytest.mark.slow
def test_a_variant_does_not_go_on_from_what_its_source_was_before_the_study_was_extended(tmp_path):
    def study(steps):
        variants = {name: {**VARIANTS[name], "trainer": {"max_steps": 20}} for name in ("slow", "last")}
        config = {**CONFIG, "trainer": {"max_steps": steps}, "variants": variants}
        return Program(config, tmp_path / f"config-{steps}")

    assert study(40)(tmp_path / "short")[0] == 0
    longer = study(60)
    assert longer(tmp_path / "straight")[0] == 0
    killed = in_order(longer, "slow", reliability.die)  # `last` has a checkpoint, and both sources end at step 20
    assert longer(tmp_path / "short", resume=True, before=killed)[0] == KILLED
    assert longer(tmp_path / "short", resume=True)[0] == 0
    for path in (RUN, FOLDERS["slow"], FOLDERS["last"]):
        one, other = (dlnlab.load_results(tmp_path / folder / path) for folder in ("short", "straight"))
        assert one.identical(other), path


@needs_fork
@pytest.mark.slow
def test_a_resume_of_a_changed_study_is_refused_and_new_variants_run(program, reference, tmp_path, fit):
    shutil.copytree(reference / RUN, tmp_path / RUN)

    def resumed(variants, code):
        return fit({**STUDY, "variants": variants}, "--ckpt_path", LAST, code=code)

    slow = VARIANTS["slow"]
    message = resumed({"slow": {**slow, "ensemble": {**slow["ensemble"], "lr": [0.01, 0.03]}}}, 2)
    assert message.startswith("dlnlab fit: variants.slow.ensemble.lr = [0.01, 0.03]: the run of ckpt_path has")
    message = resumed({"slow": {key: value for key, value in slow.items() if key != "after"}}, 2)
    assert message.startswith(f"dlnlab fit: variants.slow.after = None: the run of {FOLDERS['slow']}/checkpoints")
    message = resumed({**VARIANTS, "last": {**VARIANTS["last"], "after": "main"}}, 2)
    assert f"has started from {FOLDERS['slow']}@40" in message
    resumed({**VARIANTS, "more": {"trainer": {"max_steps": 5}}}, 0)
    assert int(dlnlab.load_results(RUN / "variants" / "more").step[-1]) == 5
    assert results(tmp_path)["slow"].equals(results(reference)["slow"])


# In Python ------------------------------------------------------------------------------------------------------------


def test_run_all_gives_every_run_and_run_the_main_one(reference, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = dlnlab.run_all(STUDY)
    assert list(found) == ["main", "last", "slow", "adam"]
    for name, expected in results(reference).items():
        assert found[name].equals(expected), name
    assert dlnlab.run(STUDY).equals(found["main"])
    assert json.loads(found["last"].attrs["init_from"])["run"] == "slow"
    assert list(tmp_path.iterdir()) == []
    kept = dlnlab.run_all(STUDY, {"trainer.max_steps": 5}, directory=tmp_path, seed=1)
    assert {each.sizes["step"] for each in kept.values()} == {6}
    assert kept["slow"].encoding["source"] == str(tmp_path / FOLDERS["slow"])
    assert capfd.readouterr() == ("", "")


def test_keywords_are_axes_of_the_variants_that_have_them():
    found = dlnlab.run_all({**STUDY, "variants": {"adam": VARIANTS["adam"], "same": {}}}, lr=[0.2], init_scale=[0.1, 1])
    sizes = {name: {axis: len(values) for axis, values in each.coords.items()} for name, each in found.items()}
    assert sizes["main"] == sizes["same"]
    assert (sizes["main"]["lr"], sizes["main"]["init_scale"]) == (1, 2)
    assert sizes["adam"] == {"seed": 3, "step": 41}


# Wherever it lies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain():
    """A short study: two variants, one after the other."""
    own = {"ensemble": {"lr": [0.01, 0.02], "seed": 2}}
    after = {"slow": {"after": "main", **own}, "last": {"after": "slow", **own}}
    return {**CONFIG, "ensemble": {"lr": [0.05, 0.1], "seed": 2}, "variants": after}


def studies_equal(one, other):
    folders = (".", "variants/slow", "variants/last")
    return all(dlnlab.load_results(one / name).equals(dlnlab.load_results(other / name)) for name in folders)


def test_a_study_that_was_renamed_moved_or_copied_is_resumed_and_extended(chain, fit, tmp_path):
    whole = fit(chain, "--trainer.max_steps", 60)
    study = fit(chain)
    shutil.copytree(study, tmp_path / "elsewhere" / "version_7")
    study.rename(tmp_path / "slow")  # as one of its variants is called
    # From the config, and from the run's own record of it.
    for place, again in (("elsewhere/version_7", []), ("slow", ["--config", "slow/config.yaml"])):
        last = ["--ckpt_path", f"{place}/checkpoints/last.ckpt"]
        assert fit(chain, *again, *last, "--trainer.log_every_n_steps", 7, "--name", "other") == tmp_path / place
        assert (tmp_path / place / "variants/last/checkpoints/step=40.ckpt").exists()
        fit(chain, *again, *last, "--trainer.max_steps", 60)
        assert studies_equal(tmp_path / place, whole)


def test_a_source_that_is_another_run_now_is_noticed_whatever_it_is_called(chain, fit, tmp_path):
    study = fit(chain)
    other = fit({**chain, "ensemble": {"lr": [0.05, 0.11], "seed": 2}, "variants": {}})
    for folder in ("results", "checkpoints"):  # retrained with another step size, in the place of the first
        shutil.rmtree(study / folder)
        shutil.copytree(other / folder, study / folder)
    changed = {**chain, "ensemble": {"lr": [0.05, 0.11], "seed": 2}}
    message = fit(changed, "--ckpt_path", study.relative_to(tmp_path) / LAST.relative_to(RUN), code=2)
    assert "variants.slow.after = main: the run of" in message
    assert "which is not what main is now" in message


def test_checkpoints_from_before_there_were_identities_go_on_where_they_lay(chain, fit, tmp_path):
    study = fit(chain)
    whole = tmp_path / "whole"
    shutil.copytree(study, whole)
    for path in study.rglob("*.ckpt"):
        found = AtomicCheckpointIO().load_checkpoint(path)
        assert found.pop("dlnlab_origin") is not None
        AtomicCheckpointIO().save_checkpoint(found, path)
    for _ in range(2):  # the second time what a resume has written
        fit(chain, "--ckpt_path", study / "checkpoints" / "step=20.ckpt")
        assert studies_equal(study, whole)
    message = fit({**chain, "variants": {**chain["variants"], "last": {**chain["variants"]["last"], "after": "main"}}},
                  "--ckpt_path", study / LAST.relative_to(RUN), code=2)  # fmt: skip
    assert "variants.last.after = main: the run of" in message


def test_a_run_whose_source_was_moved_is_resumed_under_either_name(chain, fit, tmp_path):
    source = fit({**chain, "variants": {}})
    run = fit({**chain, "variants": {}}, "--init_from", source.relative_to(tmp_path), "--name", "second")
    source.rename(tmp_path / "moved")
    last = ["--ckpt_path", run / LAST.relative_to(RUN)]
    for given in (source.relative_to(tmp_path), f"{source.relative_to(tmp_path)}@40", "moved", "moved@40"):
        assert fit({**chain, "variants": {}}, "--init_from", given, *last) == run
    for given in ("moved@20", run):
        message = fit({**chain, "variants": {}}, "--init_from", given, *last, code=2)
        assert "a resume must not change it" in message
