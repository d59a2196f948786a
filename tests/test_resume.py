"""What a fit survives: a run that was cut short and resumed is the run that was not. The studies are the benchmark's."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import reliability as study
from reliability import GENERIC, LAST, RUN, SHALLOW, SMALL, Program, at_step, difference

from dlnlab import load_results, run_directory
from dlnlab.results import ResultError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="every trial is a fork")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(SMALL, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def reference(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    assert program(folder)[0] == 0
    return folder


@pytest.fixture
def finished(reference, tmp_path):
    return shutil.copytree(reference, tmp_path / "run")


def none_failed(outcome, trials):
    if outcome is None:
        pytest.skip("no file system can be mounted here")
    assert outcome.trials >= trials
    assert outcome.failures == []


def test_the_reference_has_what_the_studies_compare(reference):
    dataset = load_results(reference / RUN)
    assert dataset.step.values.tolist() == [0, 1, 13, 17, 41, 50, 51, 82, 99, 100, 123, 129, 130]
    assert set(dataset.status.isel(step=-1).values.ravel()) == {"running", "diverged"}
    series = study.events(reference)
    assert [step for step, _ in series["lr=0.05,batch_size=2,sampling=replacement/loss/train"]] == [
        0, 1, 17, 50, 51, 100, 129, 130]  # fmt: skip
    for values in series.values():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps))


def test_runs_that_differ_are_told_apart(program, reference, tmp_path):
    def nudge(run):
        at_step(125, lambda: run.model.w_plus.data.mul_(1 + 1e-15))(run)

    assert program(tmp_path, before=nudge)[0] == 0
    assert difference(tmp_path, reference) == "results"
    shutil.rmtree(tmp_path / RUN / "results")
    shutil.copytree(reference / RUN / "results", tmp_path / RUN / "results")
    assert difference(tmp_path, reference) == "checkpoint: state_dict"
    shutil.rmtree(tmp_path / RUN / "checkpoints")
    shutil.copytree(reference / RUN / "checkpoints", tmp_path / RUN / "checkpoints")
    assert difference(tmp_path, reference) == "TensorBoard"


def test_a_run_that_was_killed_at_an_exact_step_goes_on_as_if_it_had_not_been(tmp_path):
    none_failed(study.killed_at_steps(tmp_path, steps=[20, 51]), 4)


def test_autograd_with_adam_goes_on_as_if_it_had_not_been_killed(tmp_path):
    none_failed(study.killed_at_steps(tmp_path, GENERIC, [77]), 2)


def test_the_shallow_networks_kernel_goes_on_as_if_it_had_not_been_killed(tmp_path):
    none_failed(study.killed_at_steps(tmp_path, SHALLOW, [77]), 2)
    ends = load_results(tmp_path / "reference" / RUN).status.isel(step=-1)
    assert set(np.unique(ends)) == {"running", "converged", "diverged"}


def test_a_run_that_was_killed_while_it_wrote_goes_on_as_if_it_had_not_been(tmp_path):
    none_failed(study.killed_while_writing(tmp_path, stride=79), 4)


@pytest.mark.slow
def test_every_checkpoint_of_a_run_leads_to_the_same_end(tmp_path):
    none_failed(study.resumed_from_every_checkpoint(tmp_path), 14)


def test_a_program_that_was_killed_goes_on_as_if_it_had_not_been(program, tmp_path):
    slow = Program(study.long(SMALL, 8000), tmp_path / "config")
    command = [sys.executable, "-m", "dlnlab", "fit", "--config", str(tmp_path / "config" / "trial.yaml")]
    process = subprocess.Popen(command, cwd=tmp_path, env=study._environment(), stderr=subprocess.DEVNULL)
    while not (tmp_path / LAST).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert slow(tmp_path, resume=True)[0] == 0
    assert slow(tmp_path / "reference")[0] == 0
    assert difference(tmp_path, tmp_path / "reference") is None


def test_a_run_that_is_extended_is_the_longer_run(reference, finished, tmp_path):
    longer = Program({**SMALL, "trainer": {**SMALL["trainer"], "max_steps": 200}}, tmp_path)
    assert longer(tmp_path / "straight")[0] == 0
    assert longer(finished, resume=True)[0] == 0
    assert difference(finished, tmp_path / "straight") is None
    gain = load_results(finished / RUN).gain
    assert gain.sel(step=190).notnull().all()
    assert 130 not in gain.step  # the shorter run's end


def test_a_finished_run_that_is_resumed_repeats_its_end(program, reference, finished):
    before = {path.name: path.read_bytes() for path in (finished / RUN / "results").iterdir()}
    code, output = program(finished, resume=True)
    assert code == 0
    causes = "1 by a loss above 1e+10 times the larger of its first value and the zero predictor's; 2 not finite"
    assert output.splitlines() == [f"members: 9 running, 0 converged, 3 diverged ({causes})", f"run: {RUN}"]
    assert difference(finished, reference) is None
    assert {path.name: path.read_bytes() for path in (finished / RUN / "results").iterdir()} == before


def test_a_checkpoint_may_be_named_from_inside_its_run_directory(program, reference, finished):
    for inside, name in ((finished / RUN, "checkpoints/step=60.ckpt"), (finished / LAST.parent, "step=60.ckpt")):
        code, output = program(inside, resume=name)
        assert code == 0, output
        assert difference(finished, reference) is None


def test_leftovers_of_a_killed_writer_are_cleared_away_by_the_next_resume(program, reference, finished):
    for folder in ("", "results", "checkpoints"):
        (finished / RUN / folder / ".part-000003.npz.abc.tmp").write_bytes(b"torn")
    assert program(finished, resume=True)[0] == 0
    assert difference(finished, reference) is None  # nothing is left behind


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_with_a_warning(program, reference, finished):
    with open(finished / LAST, "r+b") as file:
        file.truncate(1000)
    code, output = program(finished, resume=True)
    assert code == 0
    said = [line for line in output.splitlines() if "damaged" in line]
    assert len(said) == 1
    assert said[0].startswith(f"dlnlab fit: {LAST} is damaged")
    assert said[0].endswith(f"using {LAST}.previous, step 120, instead")
    assert difference(finished, reference) is None


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    path, saved = tmp_path / "last.ckpt", study.AtomicCheckpointIO()
    saved.save_checkpoint({"global_step": 1}, path)
    saved.save_checkpoint({"global_step": 2}, path)
    path.write_bytes(b"torn")
    saved.save_checkpoint({"global_step": 3}, path)
    assert saved.load_checkpoint(tmp_path / "last.ckpt.previous") == {"global_step": 1}


def test_a_resume_reads_its_checkpoint_once(program, reference, finished):
    def count(_):
        read = study.AtomicCheckpointIO.load_checkpoint.__globals__
        whole = read["read_checkpoint"]
        read["read_checkpoint"] = lambda *given: print("read", given[0].name) or whole(*given)

    code, output = program(finished, resume=True, before=count)
    assert code == 0
    assert output.count("read last.ckpt") == 1


def test_a_checkpoint_of_parameters_alone_is_no_place_to_go_on_from(program, finished):
    saved = study.AtomicCheckpointIO()
    whole = saved.load_checkpoint(finished / LAST)
    saved.save_checkpoint({"global_step": 130, "state_dict": whole["state_dict"]}, finished / LAST)
    code, output = program(finished, resume=True)
    assert code == 2
    assert output == f"dlnlab fit: ckpt_path = {LAST}: is no checkpoint of a fit of dlnlab\n"


@pytest.mark.parametrize("spoil", ["unlink", "truncate", "flip"])
def test_a_checkpoint_without_its_segments_is_refused_before_anything_changes(program, finished, spoil):
    path = finished / RUN / "results" / "part-000002.npz"
    content = bytearray(path.read_bytes())
    path.unlink()
    if spoil == "truncate":
        path.write_bytes(content[:-1])
    elif spoil == "flip":
        content[20] ^= 4
        path.write_bytes(content)
    before = contents(finished)
    code, output = program(finished, resume=True)
    assert code == 2
    assert len(output.splitlines()) == 1
    assert str(RUN / "results" / path.name) in output
    assert contents(finished) == before


def test_a_checkpoint_of_another_continuation_is_refused(program, reference, finished):
    shutil.rmtree(finished / RUN / "checkpoints")
    shutil.copytree(reference / RUN / "checkpoints", finished / RUN / "checkpoints")
    part = finished / RUN / "results" / "part-000002.npz"
    shutil.copy(finished / RUN / "results" / "part-000003.npz", part)  # whole, but not the one that was there
    code, output = program(finished, resume=True)
    assert code == 2
    assert "since resumed from an earlier checkpoint" in output


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_is_being_written_is_not_resumed_by_another(program, reference, tmp_path):
    def resume_it():
        code, output = program(tmp_path, resume=True)
        (tmp_path / "seen").write_text(f"{code} {output}")

    assert program(tmp_path, before=at_step(50, resume_it))[0] == 0
    assert (tmp_path / "seen").read_text() == (
        f"2 dlnlab fit: ckpt_path: {RUN} is in use: the fit that writes it has not ended\n")  # fmt: skip
    assert difference(tmp_path, reference) is None


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 60])
def test_a_signal_ends_a_fit_in_order_and_a_resume_goes_on(program, reference, tmp_path, number, step):
    code, output = program(tmp_path, before=at_step(step, lambda: os.kill(os.getpid(), number)))
    assert study._ended_in_order(program, tmp_path, reference, code, output, number) is None


def test_a_signal_before_training_ends_the_fit_at_its_first_boundary(program, reference, tmp_path):
    def prepare(run):
        run.trainer.callbacks[0].on_fit_start = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    code, output = program(tmp_path, before=prepare)
    assert study._ended_in_order(program, tmp_path, reference, code, output, signal.SIGTERM) is None


def test_a_second_ctrl_c_ends_the_process_at_once(program, reference, tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(71)  # not reached

    code, output = program(tmp_path, before=at_step(50, twice))
    assert (code, output) == (130, "")
    assert study.same_as_before(program, tmp_path, reference) is None


def test_a_signal_saves_a_checkpoint_beside_those_a_config_asks_for(tmp_path):
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1000}}
    trainer = {**SMALL["trainer"], "callbacks": [*SMALL["trainer"]["callbacks"], own]}
    program = Program({**SMALL, "trainer": trainer}, tmp_path)
    program(tmp_path / "reference")
    code, output = program(tmp_path, before=at_step(37, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert code == 143
    assert f"by SIGTERM; go on with --ckpt_path {LAST}\n" in output
    assert program(tmp_path, resume=True)[0] == 0
    assert load_results(tmp_path / RUN).identical(load_results(tmp_path / "reference" / RUN))


def test_a_fit_without_checkpoints_promises_no_resume(tmp_path):
    program = Program({**SMALL, "trainer": {**SMALL["trainer"], "enable_checkpointing": False}}, tmp_path)
    code, output = program(tmp_path, before=at_step(37, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert code == 143
    assert "--ckpt_path" not in output
    assert not (tmp_path / LAST).exists()


def test_the_handlers_of_the_caller_come_back(program, tmp_path):
    def handlers(run):
        carry_out = run.carry_out

        def then_look():
            carry_out()
            print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

        run.carry_out = then_look

    before = f"{signal.default_int_handler} {signal.SIG_DFL}"
    assert program(tmp_path, before=handlers)[1].splitlines()[0] == before


# Disks ----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_room_mends_it(tmp_path):
    none_failed(study.full_disk(tmp_path, [96, 320]), 2)


def test_a_disk_that_is_read_only_or_a_run_that_is_removed_is_one_line(tmp_path):
    none_failed(study.no_disk(tmp_path, (0, 35)), 3)


def test_an_error_of_the_disk_at_any_moment_is_one_line_and_a_resume_mends_it(tmp_path):
    none_failed(study.disk_error_at_every_moment(tmp_path, stride=101), 3)


def test_damage_is_always_detected(tmp_path):
    none_failed(study.damaged(tmp_path, trials=100), 100)


def test_damage_of_the_header_is_detected_and_mended_by_a_resume(program, reference, finished):
    path = finished / RUN / "results" / "ensemble.json"
    content = path.read_text()
    for spoilt in (content.replace("0.05", "0.04", 1), content[:-10], "[]", "", None):
        path.write_text(spoilt) if spoilt is not None else path.unlink()
        with pytest.raises(
            ResultError, match=r"ensemble\.json is (damaged|missing); a resume of the run writes it anew"
        ):
            load_results(finished / RUN)
    assert program(finished, resume=True)[0] == 0
    assert difference(finished, reference) is None


def test_no_two_of_sixteen_processes_claim_one_directory(tmp_path):
    def claim():
        for _ in range(8):
            run_directory.claim(tmp_path / "runs").joinpath("mine").touch(exist_ok=False)
        return 0

    ready, go = os.pipe()
    children = []
    for _ in range(16):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(ready, 1)  # until all have been started
            try:
                os._exit(claim())
            finally:
                os._exit(70)
        children.append(child)
    os.close(ready)
    os.close(go)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16
    found = sorted(int(path.parent.name[8:]) for path in (tmp_path / "runs").glob("*/mine"))
    assert found == list(range(128))


# Members --------------------------------------------------------------------------------------------------------------


def test_a_member_that_diverges_at_any_step_leaves_the_others_bitwise_as_they_were(tmp_path):
    none_failed(study.isolation(tmp_path, [1, 9, 10, 34, 60]), 10)


def test_a_poisoned_member_is_seen_by_the_comparison():
    axes = {"lr": [0.05, 0.1, 0.15], "batch_size": [1, 4, "full"], "seed": 2}
    tame = study._ensemble_with(study.Generic, axes, None, 0)
    wild = study._ensemble_with(study.Generic, axes, 9, 5)
    assert not np.array_equal(tame["parameter.w_plus"][5], wild["parameter.w_plus"][5])


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", study.STUDIES)
def test_the_study_finds_no_failure(tmp_path, name):
    none_failed(study.STUDIES[name](tmp_path), 1)
