"""DeepTheory: laws that hold in every run, and numbers that are known for weights that are."""

from functools import partial

import pytest
import torch

from dlnlab import Ensemble
from dlnlab.callbacks import DeepTheory, Recorder
from dlnlab.data import LowRankCompletion, SparseRegression
from dlnlab.models import DeepLinearNetwork, DiagonalLinearNetwork
from dlnlab.optim import GradientFlow

ERRORS = ("layer_imbalance_error", "square_norm_error", "representation_error")


@pytest.fixture
def measured(fit):
    """Train a network; what was recorded every 10 steps."""

    def run(ensemble, steps=40, **kwargs):
        recorder = Recorder(every_n_steps=10)
        data = LowRankCompletion(shape=(5, 6), rank=2, num_observed=20, noise_std=0.1)
        fit(DeepLinearNetwork(ensemble=ensemble, **kwargs), data, steps, [recorder, DeepTheory()])
        return recorder.dataset()

    return run


@pytest.mark.parametrize("options", [{}, {"depth": 2, "reduction": "sum", "half": True}, {"label_noise": 0.3}], ids=str)
def test_the_laws_hold_in_every_run_to_rounding(measured, options):
    found = measured(
        Ensemble(lr=[0.01, 0.05], weight_decay=[0.0, 0.02], batch_size=[1, 4, "full"], seed=2), width=4, **options
    )
    for name in ERRORS:
        assert float(found[name].max()) < 1e-14, name
    assert float(found["norm_over_least"].min()) >= 1 - 1e-14
    single = measured(Ensemble(seed=2), width=4, dtype="float32", **options)
    assert 0 < float(single["square_norm_error"].max()) < 1e-6  # eps is 1.2e-7


def test_dead_singular_values_cost_nothing(measured):
    found = measured(Ensemble(seed=2), init="spectral", init_rank=1).isel(step=0)
    assert float(found["representation_error"].max()) < 1e-14  # their rounding, 1e-16, to the power 2/3 is 2e-11
    torch.testing.assert_close(torch.from_numpy(found["norm_over_least"].values), torch.ones(2).double())


def test_a_wrong_law_is_seen(measured, monkeypatch):
    from dlnlab import theory

    law = theory.next_square_norm
    monkeypatch.setattr(theory, "next_square_norm", lambda *args: law(*args) * (1 + 1e-9))
    assert float(measured(Ensemble(seed=2))["square_norm_error"].max()) > 1e-10


def test_balanced_factors_have_the_least_norm_and_no_imbalance(measured):
    first = measured(Ensemble(seed=3), init="balanced", init_scale=1.5).isel(step=0)
    torch.testing.assert_close(torch.from_numpy(first["norm_over_least"].values), torch.ones(3).double())
    assert float(first["layer_imbalance"].max()) < 1e-13
    assert (first["norm_over_absorbing"] == 0).all()  # no weight decay, an infinite ball
    other = measured(Ensemble(seed=3), init="gaussian").isel(step=0)
    assert float(other["norm_over_least"].min()) > 1.1
    assert float(other["layer_imbalance"].min()) > 0.1


def test_the_absorbing_ball_is_measured_with_the_losss_scale(measured):
    ensemble = Ensemble(weight_decay=[0.01], batch_size=[4], seed=2)
    mean = measured(ensemble).isel(step=0)["norm_over_absorbing"]
    total = measured(ensemble, reduction="sum").isel(step=0)["norm_over_absorbing"]
    half = measured(ensemble, half=True).isel(step=0)["norm_over_absorbing"]
    torch.testing.assert_close(torch.from_numpy((mean / total).values), torch.full((1, 1, 2), 4.0).double())
    torch.testing.assert_close(torch.from_numpy((half / mean).values), torch.full((1, 1, 2), 2.0).double())


def test_networks_and_optimizers_with_other_laws_are_refused(fit):
    with pytest.raises(ValueError, match="DeepTheory: the laws are of DeepLinearNetwork, not DiagonalLinearNetwork"):
        fit(DiagonalLinearNetwork(), SparseRegression(), 1, [Recorder(at=[0]), DeepTheory()])
    flow = DeepLinearNetwork(optimizer=partial(GradientFlow, times=[1.0]))
    with pytest.raises(ValueError, match="DeepTheory: the laws are of GainSGD's steps, not of GradientFlow's"):
        fit(flow, LowRankCompletion(), 1, [Recorder(at=[0]), DeepTheory()])
