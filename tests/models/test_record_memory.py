import numpy as np
from lightning.pytorch import Trainer

from dlnlab import Ensemble
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.data import SparseRegression
from dlnlab.models import DiagonalLinearNetwork, diagonal


def record_every_step(seeds):
    recorder = Recorder(every_n_steps=1, variables=["beta", "gain", "train_loss"])
    network = DiagonalLinearNetwork(ensemble=Ensemble(lr=[0.1], seed=seeds))
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_steps=57, callbacks=[MemberGuard(), recorder], **options).fit(network, SparseRegression(6, 5, 2))
    return recorder.dataset()


def test_records_are_the_same_however_little_the_kernel_may_hold_of_them(monkeypatch):
    whole = record_every_step(3)
    monkeypatch.setattr(diagonal, "_RECORD_BYTES", 4 * 10 * 8 * 3 * 5)  # four rows
    parts = record_every_step(3)
    assert np.array_equal(whole.step, np.arange(58))
    assert whole.equals(parts)
