import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from dlnlab import Ensemble
from dlnlab.callbacks import GainTracker, MemberGuard, PredictorNorm, Recorder
from dlnlab.data import SparseRegression
from dlnlab.models import DiagonalLinearNetwork

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
AXES = {"lr": [0.02, 0.2, 0.7], "batch_size": [1, 3, "full"], "sampling": ["replacement", "epochs"], "seed": 2}


class Generic(DiagonalLinearNetwork):
    def losses(self, batch):
        return super().losses(batch)


class Probe(Callback):
    every_n_steps = 70

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step % 70 == 0:
            self.seen.append((trainer.global_step, pl_module.w_plus.detach().clone()))


def fit(tmp_path, max_chunk, model=DiagonalLinearNetwork, steps=331, **arguments):
    network = model(ensemble=Ensemble(**AXES), max_chunk=max_chunk, **arguments)
    recorder = Recorder(at=[0, 1, 17, 50, 51, 200, 330], variables=["beta", "gain"])
    probe = Probe()
    checkpoints = ModelCheckpoint(tmp_path / str(max_chunk), "{step}", every_n_train_steps=110, save_top_k=-1)
    callbacks = [
        MemberGuard(every_n_steps=30),
        PredictorNorm(every_n_steps=41),
        GainTracker(at=[13, 99]),
        recorder,
        probe,
    ]
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks, checkpoints], **QUIET)
    trainer.fit(network, SparseRegression(6, 5, 2, num_test_samples=4))
    return trainer, network, recorder.dataset(), probe


@pytest.mark.parametrize(
    ("model", "arguments"),
    [(DiagonalLinearNetwork, {}), (DiagonalLinearNetwork, {"label_noise": 0.1}), (Generic, {})],
)
def test_no_result_depends_on_where_chunks_end(tmp_path, model, arguments):
    runs = [fit(tmp_path, max_chunk, model, **arguments) for max_chunk in (None, 7, 1)]
    trainer, network, dataset, probe = runs[0]
    assert trainer.global_step == 331
    assert [step for step, _ in probe.seen] == [70, 140, 210, 280]
    assert set(dataset.status.isel(step=-1).values.ravel()) == {"running", "diverged"}
    for other_trainer, other, other_dataset, other_probe in runs[1:]:
        assert other_trainer.global_step == 331
        assert torch.equal(network.w_plus, other.w_plus)
        assert torch.equal(network.w_minus, other.w_minus)
        assert torch.equal(network.stopped_at, other.stopped_at)
        assert torch.equal(network.configure_optimizers().gain, other.configure_optimizers().gain)
        assert dataset.identical(other_dataset)
        for (step, seen), (other_step, other_seen) in zip(probe.seen, other_probe.seen, strict=True):
            assert step == other_step
            np.testing.assert_array_equal(seen, other_seen)  # NaN, where a member is about to be taken back, is equal
    names = [sorted(path.name for path in (tmp_path / str(max_chunk)).iterdir()) for max_chunk in (None, 7, 1)]
    assert names == [["step=110.ckpt", "step=220.ckpt", "step=330.ckpt"]] * 3


def test_every_schedule_is_met_exactly_and_every_variable_has_the_first_and_the_last_step(tmp_path):
    _, _, dataset, _ = fit(tmp_path, None)
    recorded = {
        name: dataset.step.values[~np.isnan(dataset[name].isel(lr=0, batch_size=0, sampling=0, seed=0).values.reshape(
            len(dataset.step), -1)[:, 0])].tolist()
        for name in ("beta", "gain", "l1_norm", "effective_init", "time")
    }  # fmt: skip
    assert recorded["beta"] == recorded["time"] == [0, 1, 17, 50, 51, 200, 330, 331]
    assert recorded["l1_norm"] == [0, *range(41, 331, 41), 331]
    assert recorded["effective_init"] == [0, 13, 99, 331]
    assert recorded["gain"] == [0, 1, 13, 17, 50, 51, 99, 200, 330, 331]


def test_pairs_record_every_scheduled_step_and_the_one_after():
    network = DiagonalLinearNetwork(ensemble=Ensemble(lr=[0.1]))
    recorder = Recorder(every_n_steps=10, variables=["beta"], pairs=True)
    trainer = Trainer(max_steps=25, callbacks=[recorder], enable_checkpointing=False, **QUIET)
    trainer.fit(network, SparseRegression(6, 5, 2))
    assert recorder.dataset().step.values.tolist() == [0, 1, 10, 11, 20, 21, 25]


def test_self_log_of_a_users_callback_keeps_true_steps(tmp_path):
    class Logs(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("mine", float(trainer.global_step))

    from lightning.pytorch.loggers import CSVLogger

    network = DiagonalLinearNetwork(ensemble=Ensemble(lr=[0.1]))
    options = {**QUIET, "logger": CSVLogger(tmp_path, "run", flush_logs_every_n_steps=1)}
    trainer = Trainer(max_steps=100, callbacks=[Logs()], log_every_n_steps=40, enable_checkpointing=False, **options)
    trainer.fit(network, SparseRegression(6, 5, 2))
    rows = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows == ["epoch,mine,step", "0,40.0,39", "0,80.0,79"]  # Lightning's own x axis counts from zero
