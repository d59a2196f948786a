"""CompletionBaselines: errors of other methods, each recomputed here."""

import pytest
import torch

from dlnlab import Ensemble, theory
from dlnlab.callbacks import CompletionBaselines, Recorder
from dlnlab.data import LowRankCompletion, ObservedEntries, SparseRegression
from dlnlab.models import DeepLinearNetwork, DiagonalLinearNetwork


def test_the_baselines_of_a_run_are_those_of_its_problems(fit):
    data = LowRankCompletion(shape=(6, 5), rank=1, num_observed=20, min_observed=1, noise_std=0.1)
    recorder = Recorder(at=[0, 5])
    model = DeepLinearNetwork(ensemble=Ensemble(lr=[0.01, 0.02], seed=2))
    fit(model, data, 5, [recorder, CompletionBaselines(penalties=[0.5, 0.05])])
    found = recorder.dataset().isel(step=-1)
    for p in range(2):
        places, y, teacher = data.problems.x[p], data.problems.y[p], data.problems.teacher[p]
        unseen = torch.ones(6, 5, dtype=torch.bool)
        unseen[places[:, 0], places[:, 1]] = False
        oracle, _ = theory.rank_least_squares(places, y, (6, 5), 1)
        error = (oracle - teacher)[unseen].square().mean().item()
        assert found.distance_true_rank.values[:, p] == pytest.approx([error, error])
        observed = torch.zeros(6, 5, dtype=torch.float64)
        observed[places[:, 0], places[:, 1]] = y
        largest = 2 / 20 * torch.linalg.matrix_norm(observed, 2).item()
        both = [theory.nuclear_norm_completion(places, y, (6, 5), c * largest)[0] for c in (0.5, 0.05)]
        best = min((matrix - teacher)[unseen].square().mean().item() for matrix in both)
        assert found.distance_best_nuclear.values[0, p] == pytest.approx(best, rel=1e-2)  # the gap allowed is 1e-6


def test_without_a_known_matrix_there_is_nothing_to_compare(fit):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="there is no matrix whose entries"):
        fit(DeepLinearNetwork(), ObservedEntries(), 1, [CompletionBaselines()])
    with pytest.raises(ValueError, match="the data are inputs"):
        fit(DiagonalLinearNetwork(), SparseRegression(5, 3, 1), 1, [CompletionBaselines()])


def test_a_penalty_must_be_below_the_one_that_makes_the_solution_zero():
    with pytest.raises(ValueError, match=r"penalties\[1\] = 1: must be below 1"):
        CompletionBaselines(penalties=[0.5, 1.0])
