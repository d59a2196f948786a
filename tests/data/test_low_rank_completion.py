"""LowRankCompletion: what is observed of what."""

import pytest
import torch

from dlnlab.data import LowRankCompletion
from dlnlab.ensemble import Ensemble


def problems(ensemble=None, **kwargs):
    data = LowRankCompletion(**kwargs)
    data.ensemble = ensemble
    data.setup()
    return data.problems


def observed(found):
    """How often each place is seen, (P, K, D)."""
    counts = torch.zeros(len(found.x), *found.matrix_shape)
    for p, places in enumerate(found.x):
        for i, j in places.tolist():
            counts[p, i, j] += 1
    return counts


@pytest.mark.parametrize("factors", ["signs", "gaussian"])
def test_every_entry_is_either_observed_or_a_test_entry_and_holds_the_matrix(factors):
    found = problems(Ensemble(seed=3), shape=(6, 9), rank=2, factors=factors, num_observed=30)
    assert found.x.shape == (3, 30, 2)
    assert found.x.dtype == torch.int64
    everything = torch.cat((found.x, found.x_test), dim=1)
    assert all(len(set(map(tuple, places.tolist()))) == 54 for places in everything)
    y = torch.cat((found.y, found.y_test), dim=1)
    for p in range(3):
        assert torch.equal(y[p], found.teacher[p][everything[p, :, 0], everything[p, :, 1]])
    assert torch.linalg.matrix_rank(found.teacher).tolist() == [2, 2, 2]


def test_a_sign_matrix_of_rank_one_has_the_singular_value_of_its_size():
    teacher = problems(shape=(10, 10)).teacher[0]
    assert torch.equal(teacher.abs(), torch.ones(10, 10, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.svdvals(teacher)[0], torch.tensor(10.0, dtype=torch.float64))


@pytest.mark.parametrize("factors", ["signs", "gaussian"])
def test_a_given_spectrum_is_the_matrixs(factors):
    teacher = problems(shape=(7, 5), rank=3, spectrum=[9.0, 4.0, 0.5], factors=factors).teacher[0]
    expected = torch.tensor([9.0, 4.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(teacher), expected, atol=1e-13, rtol=0)  # rounding of an SVD


def test_every_row_and_column_has_the_least_number_of_entries():
    counts = observed(problems(Ensemble(seed=40), shape=(8, 5), num_observed=26, min_observed=2))
    assert counts.max() == 1
    assert (counts.sum(2) >= 2).all()
    assert (counts.sum(1) >= 2).all()
    # Without the demand some of these 40 would miss it, so it is no accident.
    loose = observed(problems(Ensemble(seed=40), shape=(8, 5), num_observed=26, min_observed=0))
    assert (loose.sum(2) < 2).any()


def test_places_are_drawn_evenly():
    counts = observed(problems(Ensemble(seed=400), shape=(4, 4), num_observed=8, min_observed=1))
    # A share of 1/2 over 400 problems has a standard deviation of 0.025; 16 places.
    assert ((counts.mean(0) - 0.5).abs() < 0.1).all()


def test_noise_and_rank_leave_the_places_alone_and_noise_is_on_the_observed_only():
    found = problems(Ensemble(noise_std=[0.0, 0.3], rank=[1, 2]), shape=(30, 30))
    assert all(torch.equal(places, found.x[0]) for places in found.x)
    quiet, loud = 0, 2
    assert torch.equal(found.y_test[quiet], found.y_test[loud])
    # 540 draws of standard deviation 0.3: their own has an error of 3 %.
    torch.testing.assert_close(float((found.y[loud] - found.y[quiet]).std()), 0.3, atol=0.04, rtol=0)


def test_the_fullest_columns_alone_are_trained_on_with_the_noise_that_their_entries_have_anyway():
    kwargs = {"shape": (9, 7), "num_observed": 25, "noise_std": 0.3}
    whole, part = (problems(Ensemble(seed=20), fullest_columns=r, **kwargs) for r in (None, 2))
    assert part.x.shape == (20, 8, 2)  # two columns of seven hold 25 * 2/7 = 7.1 at the least
    counts = observed(whole).sum(1)
    for p in range(20):
        columns = part.x[p, :, 1].unique()
        assert len(columns) <= 2
        assert counts[p, columns].min() >= counts[p].sort(descending=True).values[1]
        value = {tuple(place): y for place, y in zip(whole.x[p].tolist(), whole.y[p].tolist(), strict=True)}
        assert [value[tuple(place)] for place in part.x[p].tolist()] == part.y[p].tolist()
        test = part.x_test[p]
        assert torch.equal(part.y_test[p], part.teacher[p][test[:, 0], test[:, 1]])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": (3,)}, r"shape = \(3,\): must be two numbers"),
        ({"observed_fraction": 1.5}, "observed_fraction = 1.5: must be at most 1"),
        ({"num_observed": 101}, "num_observed = 101: must be at most 100"),
        ({"num_observed": 30, "min_observed": 2}, "min_observed = 2: with 30 of 10 x 10 .* it must be at most 1"),
        ({"rank": 11}, "rank = 11: must be at most 10"),
        ({"rank": 2, "spectrum": [1.0]}, "spectrum has 1 values: must have rank = 2"),
        ({"noise_std": -0.1}, "noise_std = -0.1"),
        ({"fullest_columns": 11}, "fullest_columns = 11: must be at most 10"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LowRankCompletion(**kwargs)


def test_a_matrix_seen_whole_has_no_test_set():
    found = problems(observed_fraction=1.0, min_observed=3)
    assert found.x.shape[1] == 100
    assert found.x_test is None
