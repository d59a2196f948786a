import math
import re

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from dlnlab import Ensemble
from dlnlab.data import SparseRegression, SyntheticData
from dlnlab.data.base import Problems
from dlnlab.data.sparse_regression import DISTRIBUTIONS, SIGNALS
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.streams import Stream

ALARM = 1e-4  # false-alarm rate of every statistical test here, were its seed not fixed
SIZES = {"num_samples": 5, "dim": 3, "sparsity": 2, "num_test_samples": 4}


def drawn(ensemble=None, cls=SparseRegression, **arguments):
    """A data set that has drawn the problems of an ensemble."""
    data = cls(**arguments)
    data.ensemble = ensemble if ensemble is not None else Ensemble()
    data.setup("fit")
    return data


def large(**arguments):
    """One problem of many rows: x (4000, 6)."""
    return drawn(**{"num_samples": 4000, "dim": 6, "sparsity": 2, "num_test_samples": 0, **arguments}).problems


# Inputs ---------------------------------------------------------------------------------------------------------------

LAWS = {
    "gaussian": stats.norm(),
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "student_t": stats.t(3, scale=1 / math.sqrt(3)),
    "lognormal": stats.lognorm(
        1, -math.sqrt(math.e) / math.sqrt((math.e - 1) * math.e), 1 / math.sqrt((math.e - 1) * math.e)
    ),
    "correlated": stats.norm(),
}


@pytest.mark.parametrize("name", LAWS)
def test_inputs_follow_their_distribution_with_variance_one(name):
    x = large(input_distribution=name).x[0]
    assert LAWS[name].var() == pytest.approx(1)
    for column in x.T:  # the columns are dependent where they are correlated
        assert stats.kstest(column, LAWS[name].cdf).pvalue > ALARM


def test_the_distribution_can_be_an_axis_and_changes_nothing_else():
    data = drawn(Ensemble(input_distribution=["gaussian", "lognormal"], seed=2), **SIZES)
    assert data.data_index.tolist() == [0, 1, 2, 3]
    for i, name in ((0, "gaussian"), (2, "lognormal")):
        alone = drawn(Ensemble(seed=2), **SIZES, input_distribution=name).problems
        assert all(torch.equal(one[i : i + 2], other) for one, other in zip(data.problems[:5], alone[:5], strict=True))
    with pytest.raises(ValueError, match=r"^input_distribution = 'cauchy': must be one of gaussian"):
        drawn(Ensemble(input_distribution=["cauchy"], seed=2), **SIZES)


def test_rademacher_inputs_are_fair_signs():
    x = large(input_distribution="rademacher").x[0]
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((x > 0).sum()), x.numel(), 0.5).pvalue > ALARM


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_are_independent_and_so_are_features_unless_correlated(name):
    x = large(input_distribution=name).x[0].numpy()
    x = np.sign(x) if name in ("student_t", "lognormal") else x  # heavy tails: correlate the signs
    assert stats.pearsonr(x[:-1].ravel(), x[1:].ravel()).pvalue > ALARM
    if name != "correlated":
        assert stats.pearsonr(x[:, :-1].ravel(), x[:, 1:].ravel()).pvalue > ALARM


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_correlation_of_two_features_decays_with_their_distance(correlation):
    x = large(input_distribution="correlated", correlation=correlation).x[0].numpy()
    expected = correlation ** np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    error = np.abs(x.T @ x / len(x) - expected)
    # An entry's standard deviation is at most sqrt(2/4000); 5 of them have a false-alarm rate of 2e-5 over 36 entries.
    assert error.max() < 5 * math.sqrt(2 / len(x))


def test_the_mean_of_the_inputs_is_added_to_every_entry():
    plain, shifted = large(), large(input_mean=2.5)
    np.testing.assert_allclose(shifted.x, plain.x + 2.5)
    assert torch.equal(shifted.teacher, plain.teacher)


def test_the_scale_of_the_rows_goes_evenly_from_its_first_to_its_last():
    arguments = {**SIZES, "input_mean": 1.0}
    plain, scaled = drawn(**SIZES).problems, drawn(**arguments, row_scale=[0.5, 2.5]).problems
    np.testing.assert_allclose(scaled.x[0], np.array([0.5, 1, 1.5, 2, 2.5])[:, None] * plain.x[0].numpy() + 1)
    scales = np.linspace(0.5, 2.5, 4)[:, None]
    np.testing.assert_allclose(scaled.x_test[0], scales * plain.x_test[0].numpy() + 1)


def test_normalised_columns_have_mean_square_one_over_the_training_rows():
    plain, data = (
        drawn(**SIZES, input_mean=3.0).problems,
        drawn(**SIZES, input_mean=3.0, normalize_columns=True).problems,
    )
    np.testing.assert_allclose(data.x.square().mean(1), np.ones((1, 3)))
    scale = plain.x.square().mean(1, keepdim=True).sqrt()
    np.testing.assert_allclose(data.x_test, plain.x_test / scale)  # the training rows' scale: no look at the test set
    np.testing.assert_allclose(data.y[0], data.x[0] @ data.teacher[0])


# Teacher and noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_larger_support_contains_a_smaller_one_with_its_entries(signal):
    ensemble = Ensemble(sparsity=[1, 4, 2, 7], seed=6)
    data = drawn(ensemble, dim=7, num_samples=5, num_test_samples=0, signal=signal)
    for seed in range(6):
        teachers = {}
        for label, problem in zip(ensemble.labels, data.data_index.tolist(), strict=True):
            if label["seed"] == seed:
                teachers[label["sparsity"]] = data.problems.teacher[problem]
        assert {s: int((teacher != 0).sum()) for s, teacher in teachers.items()} == {1: 1, 2: 2, 4: 4, 7: 7}
        for small, big in ((1, 2), (2, 4), (4, 7)):
            inside = teachers[small] != 0
            assert torch.equal(teachers[big][inside], teachers[small][inside])


def test_the_support_is_anywhere_with_equal_chance():
    data = drawn(Ensemble(seed=400), dim=3, sparsity=1, num_samples=1, num_test_samples=0)
    counts = (data.problems.teacher != 0).sum(0)
    assert stats.chisquare(counts).pvalue > ALARM


def test_the_teachers_entries_are_what_their_signal_says():
    entries = {}
    for signal in SIGNALS:
        data = drawn(Ensemble(seed=60), dim=25, sparsity=25, num_samples=1, num_test_samples=0, signal=signal)
        entries[signal] = data.problems.teacher.flatten().numpy()
    assert set(entries["ones"]) == {1.0}
    assert set(entries["signs"]) == {-1.0, 1.0}
    assert stats.binomtest(int((entries["signs"] > 0).sum()), 1500, 0.5).pvalue > ALARM
    assert np.abs(entries["gaussian"]).min() >= 0.1
    assert stats.binomtest(int((entries["gaussian"] > 0).sum()), 1500, 0.5).pvalue > ALARM
    rest = stats.truncnorm(0.1, math.inf)  # the normal law of those that are not drawn again
    assert stats.kstest(np.abs(entries["gaussian"]), rest.cdf).pvalue > ALARM


def test_the_signals_scale_multiplies_the_teacher():
    one, three = drawn(**SIZES, signal="gaussian"), drawn(**SIZES, signal="gaussian", signal_scale=3.0)
    np.testing.assert_allclose(three.problems.teacher, 3 * one.problems.teacher)
    np.testing.assert_allclose(three.problems.y, 3 * one.problems.y)


def test_noise_free_targets_are_what_the_teacher_says():
    for problems in (drawn(**SIZES).problems, drawn(**SIZES, input_mean=1.0, signal="signs").problems):
        np.testing.assert_allclose(problems.y[0], problems.x[0] @ problems.teacher[0])


def test_the_noise_is_normal_and_is_not_on_the_test_rows():
    problems = large(noise_std=0.5, num_test_samples=10)
    noise = problems.y[0] - problems.x[0] @ problems.teacher[0]
    assert stats.kstest(noise / 0.5, stats.norm.cdf).pvalue > ALARM
    assert stats.pearsonr(noise, problems.x[0, :, 0]).pvalue > ALARM
    np.testing.assert_allclose(problems.y_test[0], problems.x_test[0] @ problems.teacher[0])


def test_amounts_of_noise_share_inputs_teacher_and_the_noise_itself():
    ensemble = Ensemble(noise_std=[0.0, 1.0, 0.25], seed=2)
    data = drawn(ensemble, **SIZES)
    problems = data.problems
    assert problems.x.shape == (6, 5, 3)
    for seed in range(2):
        none, one, quarter = (data.data_index[2 * i + seed] for i in range(3))
        for name in ("x", "teacher", "x_test", "y_test"):
            assert torch.equal(getattr(problems, name)[none], getattr(problems, name)[one])
        noise = problems.y[one] - problems.y[none]
        assert noise.abs().min() > 1e-3
        np.testing.assert_allclose(problems.y[quarter] - problems.y[none], noise / 4)


def test_training_and_test_rows_are_drawn_apart():
    problems = drawn(num_samples=5, num_test_samples=5, dim=3).problems
    assert not torch.isin(problems.x, problems.x_test).any()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_more_rows_begin_with_the_fewer_and_the_test_rows_do_not_move(name):
    few = drawn(num_samples=5, dim=3, num_test_samples=4, input_distribution=name, noise_std=1.0).problems
    many = drawn(num_samples=8, dim=3, num_test_samples=4, input_distribution=name, noise_std=1.0).problems
    np.testing.assert_allclose(many.x[:, :5], few.x, rtol=1e-13)  # a product with more rows may round otherwise
    np.testing.assert_allclose(many.y[:, :5], few.y, rtol=1e-13)  # likewise
    assert torch.equal(many.x_test, few.x_test)
    assert torch.equal(many.teacher, few.teacher)


def test_the_inputs_and_signs_are_the_oracles_draws():
    problems = drawn(Ensemble(seed=[2**33], root=5), **SIZES, noise_std=2.0, input_distribution="gaussian").problems
    keys = {purpose: oracles.stream_key(5, purpose, 2**33) for purpose in ("inputs", "test", "noise", "teacher")}
    # Two mathematical libraries: a unit in the last place each.
    np.testing.assert_allclose(
        problems.x[0].flatten(), [oracles.normal(keys["inputs"], 0, j) for j in range(15)], 1e-13
    )
    np.testing.assert_allclose(
        problems.x_test[0].flatten(), [oracles.normal(keys["test"], 0, j) for j in range(12)], 1e-13
    )
    support = oracles.subset(keys["teacher"], 0, 3, 3)[:2]
    assert sorted(problems.teacher[0].nonzero().flatten().tolist()) == sorted(support)
    noise = [2 * oracles.normal(keys["noise"], 0, j) for j in range(5)]
    np.testing.assert_allclose(problems.y[0], problems.x[0] @ problems.teacher[0] + torch.tensor(noise))


# Members --------------------------------------------------------------------------------------------------------------


def test_members_that_differ_only_in_training_share_one_problem():
    ensemble = Ensemble(lr=[0.1, 0.2], seed=[4, 1, 2], batch_size=[1, "full"])
    data = drawn(ensemble, **SIZES)
    assert data.problems.x.shape == (3, 5, 3)
    assert data.problems.y_test.shape == (3, 4)
    for label, problem in zip(ensemble.labels, data.data_index.tolist(), strict=True):
        assert problem == [4, 1, 2].index(label["seed"])


def test_a_problem_is_the_same_whatever_else_is_in_the_ensemble():
    ensemble = Ensemble(noise_std=[0.5, 0.0], seed=[3, 7], sparsity=[2, 1], correlation=[0.3, 0.6])
    together = drawn(ensemble, **SIZES, input_distribution="correlated")
    assert len(together.problems.x) == 16
    for label, problem in zip(ensemble.labels, together.data_index.tolist(), strict=True):
        others = {name: value for name, value in label.items() if name != "seed"}
        alone = drawn(Ensemble(seed=[label["seed"]]), **{**SIZES, **others}, input_distribution="correlated")
        for one, many in zip(alone.problems[:5], together.problems[:5], strict=True):
            assert torch.equal(one[0], many[problem])


def test_seeds_and_roots_give_different_problems():
    one = drawn(Ensemble(seed=2), **SIZES).problems.x
    other = drawn(Ensemble(seed=2, root=1), **SIZES).problems.x
    assert len(torch.cat((one, other)).flatten(1).unique(dim=0)) == 4


def test_the_trainers_model_gives_the_ensemble_and_its_precision(fit):
    data = SparseRegression(**SIZES)
    model = DiagonalLinearNetwork(ensemble=Ensemble(seed=[7, 3], sparsity=[1, 2]), dtype="float32")
    fit(model, data, 3)
    assert data.problems.x.shape == (4, 5, 3)
    assert model.ensemble.data_axes == ("sparsity",)
    assert model.problems.x.dtype == torch.float32
    right = drawn(Ensemble(seed=[7, 3], sparsity=[1, 2]), **SIZES)
    assert torch.equal(data.problems.x, right.problems.x)


def test_the_problems_are_drawn_once():
    data = drawn(**SIZES)
    before = data.problems
    data.setup("test")
    assert data.problems is before


def test_without_test_rows_there_is_no_test_set():
    data = drawn(num_samples=5, dim=3, num_test_samples=0)
    assert data.problems.x_test is None
    assert data.problems.y_test is None
    (x, y), *rest = data.test_dataloader()
    assert not rest
    assert torch.equal(x, data.problems.x)
    assert torch.equal(y, data.problems.y)


def test_the_test_loader_has_the_test_rows_of_every_problem():
    data = drawn(Ensemble(seed=2), **SIZES)
    (x, y), *rest = data.test_dataloader()
    assert not rest
    assert torch.equal(x, data.problems.x_test)
    assert torch.equal(y, data.problems.y_test)


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples = 0: must be at least 1"),
        ({"num_samples": 2.5}, "num_samples = 2.5: must be a whole number"),
        ({"dim": 0}, "dim = 0: must be at least 1"),
        ({"sparsity": 0}, "sparsity = 0: must be at least 1"),
        ({"sparsity": 31}, "sparsity = 31: must be at most dim = 30"),
        ({"noise_std": -0.5}, "noise_std = -0.5: must be a finite number and at least 0"),
        ({"noise_std": math.nan}, "noise_std = nan: must be a finite number"),
        ({"input_distribution": "cauchy"}, "input_distribution = 'cauchy': must be one of gaussian, rademacher"),
        ({"correlation": 1.0}, "correlation = 1.0: must be at least 0 and below 1"),
        ({"correlation": -0.1}, "correlation = -0.1: must be at least 0 and below 1"),
        ({"input_mean": math.inf}, "input_mean = inf: must be a finite number"),
        ({"row_scale": [1.0]}, "row_scale = [1.0]: must be two numbers"),
        ({"row_scale": [1.0, 0.0]}, "row_scale = 0.0: must be positive and finite"),
        ({"signal": "sines"}, "signal = 'sines': must be one of ones, signs, gaussian"),
        ({"signal_scale": 0}, "signal_scale = 0: must be positive and finite"),
        ({"num_test_samples": -1}, "num_test_samples = -1: must be at least 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_and_named(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SparseRegression(**arguments)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"sparsity": [1, 4]}, "sparsity = 4: must be at most dim = 3"),
        ({"sparsity": [1.5]}, "sparsity = 1.5: must be a whole number"),
        ({"noise_std": [0, -1]}, "noise_std = -1: must be a finite number and at least 0"),
        ({"correlation": [0.5, 1]}, "correlation = 1: must be at least 0 and below 1"),
    ],
)
def test_a_value_of_an_axis_out_of_range_is_refused_before_anything_is_drawn(axes, message):
    class NeverDrawn(SparseRegression):
        def sample(self, stream, values):
            raise AssertionError("drawn")

    with pytest.raises(ValueError, match=re.escape(message)):
        drawn(Ensemble(**axes), cls=NeverDrawn, **SIZES)


def test_problems_that_would_not_fit_in_memory_are_refused_with_their_size():
    with pytest.raises(ValueError, match=r"the data need [\d,]+ bytes \(3 problems of [\d,]+.* use fewer seeds"):
        drawn(Ensemble(seed=3), num_samples=10**9, dim=10**4)


def given_sample(returned):
    class Given(SyntheticData):
        def sample(self, stream, values):
            return returned(stream)

    return Given


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda s: (torch.ones(5), torch.ones(5), None), r"Given\.sample must return x of shape \(N, D\)"),
        (lambda s: (torch.ones(5, 3), torch.ones(4), None), r"got \(5, 3\) and \(4,\)"),
        (
            lambda s: (torch.ones(2, 3), torch.ones(2), None),
            r"returned 2 rows, of which num_test_samples = 2 are the test",
        ),
        (lambda s: (torch.ones(5, 3), torch.tensor([1, 2, math.nan, 4, 5]), None), r"y has .* not finite in row 2$"),
        (
            lambda s: (torch.ones(3 + int(s.seed), 3), torch.ones(3 + int(s.seed)), None),
            r"problems of different shapes",
        ),
    ],
)
def test_a_persons_own_sample_is_checked(sample, message):
    with pytest.raises(ValueError, match=message):
        drawn(Ensemble(seed=2), cls=given_sample(sample), num_test_samples=2)


def test_a_persons_own_data_set_has_axes_and_shares_draws_over_them():
    class Line(SyntheticData):
        axes = ("slope",)

        def __init__(self, slope=1.0, **kwargs):
            super().__init__(**kwargs)
            self.slope = slope

        def sample(self, stream, values):
            x = stream.normals("inputs", (5 + self.num_test_samples, 3))
            return x, values["slope"] * x[:, 0], None

    data = drawn(Ensemble(slope=[1.0, 3.0], seed=2), cls=Line, num_test_samples=4)
    assert isinstance(data.problems, Problems)
    assert data.problems.teacher is None
    assert data.problems.x.shape == (4, 5, 3)
    assert torch.equal(data.problems.y[2], 3 * data.problems.y[0])
    assert torch.equal(data.problems.x_test[3], Stream(0, 1).normals("inputs", (9, 3))[5:])
