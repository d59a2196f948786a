import os
import pickle
import re
import warnings

import numpy as np
import oracles
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dlnlab import Ensemble
from dlnlab.callbacks import MemberGuard
from dlnlab.checkpoint import AtomicCheckpointIO, CheckpointError
from dlnlab.models import DiagonalLinearNetwork

STATE = {"global_step": 3, "state_dict": {"w": torch.arange(6.0).reshape(2, 3)}, "names": ["a"], "scale": 0.5}
IO = AtomicCheckpointIO()


def spoil(path, place=100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def saved(tmp_path, *steps):
    path = tmp_path / "folder" / "last.ckpt"
    for step in steps:
        IO.save_checkpoint({**STATE, "global_step": step}, path)
    return path


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path):
    path = saved(tmp_path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = IO.load_checkpoint(path)
    assert torch.equal(found.pop("state_dict")["w"], STATE["state_dict"]["w"])
    assert found == {name: value for name, value in STATE.items() if name != "state_dict"}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_damaged_checkpoint_falls_back_to_the_one_it_replaced_with_a_warning(tmp_path):
    path = saved(tmp_path, 1, 2)
    spoil(path)
    with pytest.warns(UserWarning, match=rf"{re.escape(str(path))} is damaged.*last\.ckpt\.previous, step 1, instead"):
        assert IO.load_checkpoint(path)["global_step"] == 1


def test_a_checkpoint_that_vanished_falls_back_likewise(tmp_path):
    path = saved(tmp_path, 1, 2)
    path.unlink()
    with pytest.warns(UserWarning, match="no checkpoint at .*using .*previous, step 1, instead"):
        assert IO.load_checkpoint(path)["global_step"] == 1


@pytest.mark.parametrize("place", [0, 10, 200, -1, -70])
def test_a_damaged_checkpoint_without_another_is_an_error_that_names_it(tmp_path, place):
    path = saved(tmp_path, 1)
    spoil(path, place)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged"):
        IO.load_checkpoint(path)


def test_where_both_are_damaged_the_error_names_the_older(tmp_path):
    path = saved(tmp_path, 1, 2)
    spoil(path)
    spoil(path.with_name("last.ckpt.previous"))
    with pytest.raises(CheckpointError, match=r"last\.ckpt\.previous is damaged"):
        IO.load_checkpoint(path)


def test_a_checkpoint_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^no checkpoint at {re.escape(str(tmp_path / 'x.ckpt'))}$"):
        IO.load_checkpoint(tmp_path / "x.ckpt")


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    path, trap = tmp_path / "x.ckpt", tmp_path / "sprung"
    IO.save_checkpoint({"global_step": 1, "trap": Trap(trap)}, path)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is no checkpoint of dlnlab: .+"):
        IO.load_checkpoint(path, weights_only=False)
    assert not trap.exists()


@pytest.mark.parametrize("content", [pickle.dumps({"global_step": 1}), b"", b"not a checkpoint"])
def test_a_file_that_dlnlab_did_not_write_is_refused(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        IO.load_checkpoint(path)


def test_a_checkpoint_of_torch_itself_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(STATE, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        IO.load_checkpoint(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = saved(tmp_path, 1, 2)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            IO.save_checkpoint({**STATE, "global_step": 3}, path)
    assert IO.load_checkpoint(path)["global_step"] == 2
    assert sorted(os.listdir(path.parent)) == ["last.ckpt", "last.ckpt.previous"]


def test_a_removed_checkpoint_takes_the_replaced_one_with_it(tmp_path):
    path = saved(tmp_path, 1, 2)
    IO.remove_checkpoint(path)
    assert os.listdir(path.parent) == []
    IO.remove_checkpoint(path)  # nothing there is nothing to do


# A run ----------------------------------------------------------------------------------------------------------------


class SaveAt(Callback):
    """Saves a checkpoint at one step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def next_event(self, step):
        return self.step if step < self.step else None

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Generic(DiagonalLinearNetwork):
    """The same network without its closed form."""

    def losses(self, batch):
        return super().losses(batch)


OPTIMIZERS = {
    "closed form": (DiagonalLinearNetwork, {}),
    "float32": (DiagonalLinearNetwork, {"dtype": "float32"}),
    "generic": (Generic, {}),
    "Adam": (
        DiagonalLinearNetwork,
        {"optimizer": lambda groups, **given: torch.optim.Adam(groups, lr=0.02, **given)},
    ),
}


@pytest.mark.parametrize(("name", "stop"), [("closed form", 64), *((name, 37) for name in OPTIMIZERS)])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(tmp_path, fit, name, stop):
    cls, arguments = OPTIMIZERS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y = x[..., 0] + 0.3 * rng.normal(size=(2, 5))
    y[0] *= 12  # where lr is large, its members diverge at step 25 (and go back to 0) or at step 50 (back to 25)
    axes = {"batch_size": [1, 3, "full"], "sampling": ["replacement", "subset", "epochs"], "seed": 2}
    if name != "Adam":
        axes |= {"lr": [0.02, 0.3], "weight_decay": [0.0, 0.01]}

    def run(callbacks=(), **options):
        model = cls(ensemble=Ensemble(**axes), label_noise=0.1, **arguments)
        guard = MemberGuard(every_n_steps=25, tol=0.0)
        io = AtomicCheckpointIO()
        trainer = fit(model, oracles.GivenData(x, y), 130, [guard, *callbacks], plugins=[io], **options)
        return model, trainer

    path = tmp_path / "x.ckpt"
    whole, one = run([SaveAt(stop, path)])
    resumed, other = run(ckpt_path=path)
    assert one.global_step == other.global_step == 130
    if name != "Adam":
        assert set(whole.stopped_at.tolist()) == {-1, 0, 25}
    states = zip(whole.member_state().items(), resumed.member_state().items(), strict=True)
    for (key, found), (_, right) in states:
        assert found.dtype == right.dtype
        assert torch.equal(found, right), key
    assert torch.equal(whole.status, resumed.status)
    assert torch.equal(whole.stopped_at, resumed.stopped_at)
