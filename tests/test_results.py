"""What `load_results` says of folders that are not as a fit has left them."""

import copy
import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
import xarray as xr

import dlnlab
from dlnlab import checkpoint, results
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError, read_checkpoint
from dlnlab.files import write_atomic
from dlnlab.results import ResultError, load_results

AXES = {"lr": [0.1, 0.2], "schedule": ["a", "b"], "seed": [0, 1, 2]}
COORDINATES = {
    "step_number": ("lr", [1, 2]),
    "source_weight_decay": ([], 0.5),
    "source_sampling": (["lr", "schedule"], [["subset", "epochs"], ["epochs", "subset"]]),
}
ATTRIBUTES = {"config": "name: x", "path": "closed form", "lr_unit": "one"}


def write_run(folder, axes=AXES, segments=4, shift=0.0):
    """A run of `segments` segments, each of two steps."""
    folder = folder / "results"
    folder.mkdir(parents=True)
    results.write_header(folder, axes, COORDINATES, ATTRIBUTES)
    members, before = int(np.prod([len(values) for values in axes.values()])), ""
    for number in range(segments):
        steps = [2 * number, 2 * number + 1]
        series = {
            "train_loss": (steps, shift + np.arange(2.0 * members).reshape(2, members)),
            "beta": (steps, np.ones((2, members, 5))),
            "spectrum": (steps[:1], np.ones((1, members, 3))),
            "status": (steps, np.zeros((2, members), dtype=np.int8)),
        }
        constants = {"stopped_at": np.full(members, -1), "diverged_by": np.full(members, "")}
        place = results.follows(axes, before)
        before = results.chain(
            before, results.write_segment(folder, number, series, constants, {"spectrum": ["index"]}, place)
        )
    return folder.parent


def part(run, number):
    return run / "results" / f"part-{number:06d}.npz"


def test_a_whole_run_is_read(tmp_path):
    found = load_results(write_run(tmp_path / "run"))
    assert dict(found.sizes) == {"lr": 2, "schedule": 2, "seed": 3, "step": 8, "coordinate": 5, "index": 3}
    assert found.spectrum.isel(step=1).isnull().all()
    assert set(found.status.values.ravel()) == {"running"}
    assert found.source_weight_decay.dims == () and found.source_weight_decay == 0.5
    assert found.source_sampling.sel(lr=0.2, schedule="a") == "epochs"


@pytest.mark.parametrize(
    ("removed", "missing"), [((0,), 0), ((0, 1), 0), ((1,), 1), ((2,), 2), ((1, 2), 1), ((0, 1, 2), 0)]
)
def test_missing_segments_are_named(tmp_path, removed, missing):
    run = write_run(tmp_path / "run")
    for number in removed:
        part(run, number).unlink()
    with pytest.raises(ResultError, match=rf"part-{missing:06d}\.npz is missing.*up to part-000003\.npz"):
        load_results(run)


def test_a_run_without_a_header_or_without_segments_says_which(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "results" / results.HEADER).unlink()
    with pytest.raises(ResultError, match=r"ensemble\.json is missing"):
        load_results(run)
    with pytest.raises(ResultError, match=r"has no segments.*recorded nothing yet"):
        load_results(write_run(tmp_path / "empty", segments=0))
    (tmp_path / "other" / "results").mkdir(parents=True)
    for folder in (tmp_path / "other", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="is no run directory"):
            load_results(folder)


def test_a_part_of_another_run_is_not_taken_for_one_of_this(tmp_path):
    run = write_run(tmp_path / "run")
    others = {
        0: write_run(tmp_path / "lr", {**AXES, "lr": [0.1, 0.3]}),  # the first segment, of as many members
        2: write_run(tmp_path / "shifted", shift=1.0),  # of the same ensemble, but other numbers before it
        3: write_run(tmp_path / "more", {**AXES, "seed": [0, 1]}),  # of other members
    }
    for number, other in others.items():
        mixed = tmp_path / f"mixed-{number}"
        shutil.copytree(run, mixed)
        shutil.copy(part(other, number), part(mixed, number))
        with pytest.raises(
            ResultError, match=rf"part-{number:06d}\.npz (belongs to another run|is no segment of these)"
        ):
            load_results(mixed)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"train_loss": np.zeros((2, 12)), "train_loss/steps": np.array([0.5, 1.5])},
            "train_loss/steps must be a list",
        ),
        ({"train_loss": np.zeros((3, 12)), "train_loss/steps": np.array([0, 1])}, r"shape \(3, 12\)"),
        ({"train_loss": np.zeros((2, 7)), "train_loss/steps": np.array([0, 1])}, "12 members"),
        ({"train_loss": np.full((2, 12), "x"), "train_loss/steps": np.array([0, 1])}, "must hold numbers"),
        ({"train_loss": np.zeros((2, 12)) * 1j, "train_loss/steps": np.array([0, 1])}, "must hold numbers"),
        ({"status": np.full((1, 12), 7), "status/steps": np.array([0])}, "status must be"),
        ({"stopped_at": np.zeros(3)}, r"shape \(3,\)"),
        ({"dims": np.array("[" * 100_000)}, "dims"),
        ({"dims": np.array('{"x": [1]}')}, "dims"),
        ({"train_loss/steps": np.array([0])}, "belongs to a variable"),
        ({"beta": np.zeros((1, 12, 4)), "beta/steps": np.array([8])}, "do not belong together"),
        ({"lr": np.zeros(12)}, "do not belong together"),
        ({"train_loss": np.array([{}]), "train_loss/steps": np.array([0])}, "no archive of plain arrays"),
    ],
)
def test_a_foreign_segment_with_a_right_checksum_is_refused(tmp_path, arrays, said):
    run = write_run(tmp_path / "run")
    with open(tmp_path / "part", "wb") as file:
        np.savez(file, **{"dims": np.array("{}"), **arrays})
    write_atomic(part(run, 4), (tmp_path / "part").read_bytes(), checksum=True)
    with pytest.raises(ResultError, match=said):
        load_results(run)


def seal(run, header):
    """Write any content as a header with a right checksum."""
    path = run / "results" / results.HEADER
    body = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    path.write_text(json.dumps({**body, "sha256": digest}))


VALUES = [None, True, -1, 0, 10**30, 1e300, float("nan"), "", "x", "step", "lr", [], [[]], [[0.1], [0.2, 0.3]], [None],
          [0.1, 0.2], ["a", 1], [10**30, 1], [True, False], ["lr", [1, 2]], ["nowhere", [1, 2]], ["lr", [1]],
          [["lr", "seed"], [[1, 2, 3], [4, 5, 6]]], {}, {"x": 1}, {"train_loss": [1]}, {"step": [1]},
          {"a": {"b": [{}]}}, {"coordinate": ["coordinate", ["a", "b", "c", "d", "e"]]}]  # fmt: skip


def mutated(header, rng):
    """The header with one to three of its parts replaced, removed or renamed."""
    header = copy.deepcopy(header)
    for _ in range(rng.randint(1, 3)):
        part, key = header, rng.choice([*header, "more"])
        while isinstance(part.get(key), dict) and part[key] and rng.random() < 0.7:
            part, key = part[key], rng.choice([*part[key], "more"])
        act = rng.random()
        if act < 0.15:
            part.pop(key, None)
        elif act < 0.25 and key in part:
            part[rng.choice(["step", "x", "train_loss", "beta"])] = part.pop(key)
        else:
            part[key] = copy.deepcopy(rng.choice(VALUES))
    return header


def test_any_header_with_a_right_checksum_is_read_or_refused_in_words(tmp_path):
    run = write_run(tmp_path / "run", segments=2)
    header = json.loads((run / "results" / results.HEADER).read_bytes())
    del header["sha256"]
    rng, read = random.Random(0), 0
    for _ in range(400):
        changed = mutated(header, rng)
        seal(run, changed)
        try:
            assert isinstance(load_results(run), xr.Dataset)
            read += 1
        except ResultError as error:
            assert str(run) in str(error), changed
    assert 20 < read < 300


def test_any_damaged_header_is_refused_in_words(tmp_path):
    run = write_run(tmp_path / "run", segments=1)
    path = run / "results" / results.HEADER
    whole, rng = path.read_bytes(), random.Random(0)
    broken = [b"", b"3", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"sha256": 1}', whole[:-40]]
    broken += [b'{"format": ' + b"9" * 5000 + b"}"]
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        broken.append(bytes(damaged))
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ResultError, match=r"ensemble\.json"):
            load_results(run)


# Formats --------------------------------------------------------------------------------------------------------------


def test_results_carry_a_format_and_a_newer_one_is_refused_with_both_numbers(tmp_path):
    run = write_run(tmp_path / "run")
    header = json.loads((run / "results" / results.HEADER).read_bytes())
    assert header["format"] == results.FORMAT
    seal(run, {**header, "format": results.FORMAT + 1, "axes": "something else by then"})
    said = rf"format {results.FORMAT + 1}.*up to format {results.FORMAT}: upgrade dlnlab"
    with pytest.raises(ResultError, match=said):
        load_results(run)


def test_results_from_before_there_was_a_format_are_read(tmp_path):
    run = write_run(tmp_path / "run")
    whole = load_results(run)
    header = json.loads((run / "results" / results.HEADER).read_bytes())
    del header["format"]
    seal(run, header)
    for number in range(4):
        arrays = results.read_segment(part(run, number))
        del arrays["follows"]
        with open(tmp_path / "part", "wb") as file:
            np.savez(file, **arrays)
        write_atomic(part(run, number), (tmp_path / "part").read_bytes(), checksum=True)
    assert load_results(run).identical(whole)


def test_checkpoints_carry_a_format_and_a_newer_one_is_refused_with_both_numbers(tmp_path, monkeypatch):
    path, now = tmp_path / "x.ckpt", checkpoint.FORMAT
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)
    assert torch.load(path, weights_only=True)["dlnlab_format"] == now
    monkeypatch.setattr(checkpoint, "FORMAT", now + 1)
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=rf"format {now + 1}.*up to format {now}: upgrade dlnlab"):
        read_checkpoint(path)


def test_checkpoints_from_before_there_was_a_format_are_read(tmp_path):
    torch.save({"global_step": 3}, tmp_path / "bare")
    write_atomic(tmp_path / "x.ckpt", (tmp_path / "bare").read_bytes(), checksum=True)
    assert read_checkpoint(tmp_path / "x.ckpt") == {"global_step": 3}


def test_a_run_that_has_ended_without_a_record_is_an_empty_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "silent_net.py").write_text(
        "import torch\nfrom lightning.pytorch import LightningModule\n\n\nclass Silent(LightningModule):\n"
        "    def training_step(self, batch, batch_idx):\n        return None\n\n"
        "    def configure_optimizers(self):\n        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"model": {"class_path": "silent_net.Silent"}, "data": {"class_path": "SparseRegression"}}
    assert not dlnlab.run(config, {"trainer.max_epochs": 1, "trainer.max_steps": 3}, directory=tmp_path).data_vars
