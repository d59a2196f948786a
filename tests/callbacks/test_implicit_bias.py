"""Where training ends, as the theorem says: runs of every optimizer against the certificate and independent solvers."""

from functools import partial

import numpy as np
import pytest
from scipy.optimize import linprog

import dlnlab
from dlnlab.callbacks import ImplicitBias
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork
from dlnlab.optim import GradientFlow, StochasticGradientFlow

COARSER = ("unperturbed", "mean_gain", "weighted_l1", "gradient_flow", "min_l1", "min_l2")


def problem(n=8, d=12, sparsity=2, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    teacher = np.zeros(d)
    teacher[:sparsity] = 1.0
    return x, x @ teacher, teacher


def solve(x, y, teacher, callback=None, optimizer=None, record=("train_loss", "beta"), **more):
    model = DiagonalLinearNetwork if optimizer is None else partial(DiagonalLinearNetwork, optimizer=optimizer)
    callback = callback or ImplicitBias()
    found = dlnlab.simulate(x, y, teacher=teacher, model=model, callbacks=[callback], record=list(record), **more)
    return found.isel(step=-1)


def test_the_theorem_tells_where_gd_and_sgd_end_at_any_step_size():
    x, y, teacher = problem()
    found = solve(
        x, y, teacher, lr=[0.02, 0.1, 0.45], batch_size=[1, "full"], seed=3, steps=40_000, init_scale=0.7,
        record=["train_loss"],
    )  # fmt: skip
    ended = found.train_loss < 1e-20
    assert ended.sum() >= 10 and ended.sel(batch_size="full").all() and ended.sel(batch_size="1", lr=0.1).all()
    error = found.bregman_error.where(ended)
    # The certificate's error is 0.5 to 8 times the square root of the loss (measured).
    assert error.max() < 1e-9
    assert found.bregman_residual.where(ended).max() < 1e-12
    for name in COARSER:
        assert (found[f"error_{name}"].where(ended) > 10 * error).sum() == ended.sum(), name
    # Each thing that is left out of the theory costs: at the largest step the gain itself most of all.
    large = found.sel(lr=0.45, batch_size="full")
    assert (large.error_gradient_flow > 2 * large.error_mean_gain.clip(max=0) + 1e-3).all()


def test_gradient_flow_ends_where_its_own_prediction_says_and_the_integral_of_its_loss_is_known():
    x, y, teacher = problem()
    flow = partial(GradientFlow, times={"log10": [-1, 12, 30]})
    found = solve(x, y, teacher, optimizer=flow, init_scale=[1e-6, 0.1, 2.0], record=["train_loss"])
    assert found.train_loss.max() < 1e-20
    assert found.bregman_error.max() < 1e-9
    np.testing.assert_allclose(found.error_gradient_flow, found.bregman_error, rtol=1e-6, atol=1e-13)
    # 1e-7: the integrator's local errors of 1e-12 over some thousand steps, near-cancelling at init_scale = 2
    assert found.loss_integral_error.max() < 1e-7


@pytest.mark.parametrize("scheme", ["exponential", "euler"])
@pytest.mark.parametrize("noise", ["mean_loss", "per_sample"])
def test_stochastic_gradient_flow_ends_where_the_theorem_says_with_its_own_gain(noise, scheme):
    x, y, teacher = problem()
    flow = partial(StochasticGradientFlow, noise=noise, scheme=scheme)
    found = solve(x, y, teacher, optimizer=flow, lr=0.05, seed=3, steps=6000, init_scale=0.7, record=["train_loss"])
    ended = found.train_loss < 1e-18
    assert ended.any()
    assert (found.bregman_error.where(ended).max() < 1e-7) and not found.bregman_error.isnull().all()
    formula = found.gain_formula_error
    assert (formula < 1e-12).all() if (noise, scheme) == ("mean_loss", "exponential") else (formula > 1e-4).all()


def test_the_coarser_predictions_are_what_they_say():
    x, y, teacher = problem()
    found = solve(x, y, teacher, lr=0.3, seed=1, steps=40_000, init_scale=0.2, record=["beta", "gain"])
    found = found.squeeze("seed")
    beta = found.beta.values

    def error(prediction):
        return np.linalg.norm(prediction - beta) / np.linalg.norm(beta)

    def weighted_l1(weights):
        cost = np.concatenate([weights, weights])
        both = linprog(cost, A_eq=np.hstack([x, -x]), b_eq=y).x
        return both[:12] - both[12:]

    def flow_limit(init):
        """Gradient flow from init, by the run itself."""
        make = partial(DiagonalLinearNetwork, optimizer=partial(GradientFlow, times=[1e6]))
        ends = dlnlab.simulate(
            x, y, model=lambda ensemble: make(ensemble=ensemble, init_scale=list(init)), record=["beta"]
        )
        return ends.beta.values[-1]

    gain = found.gain.values
    predictions = {
        "min_l2": np.linalg.pinv(x) @ y,
        "min_l1": weighted_l1(np.ones(12)),
        "weighted_l1": weighted_l1(np.log(1 / 0.2) + gain / 2),
        "gradient_flow": flow_limit(np.full(12, 0.2)),
        "unperturbed": flow_limit(0.2 * np.exp(-gain / 2)),
        "mean_gain": flow_limit(np.full(12, 0.2 * np.exp(-gain.mean() / 2))),
    }
    for name, prediction in predictions.items():
        # 1e-8: what the flow's integrator and the linear programme reach
        np.testing.assert_allclose(found[f"error_{name}"], error(prediction), rtol=0, atol=1e-8)
        distance = ((prediction - teacher) ** 2).sum()
        np.testing.assert_allclose(found[f"distance_{name}"], distance, rtol=0, atol=1e-7)
    assert found.min_l1_is_teacher == float(np.allclose(predictions["min_l1"], teacher))
    height = 2 * np.sqrt(predictions["gradient_flow"] ** 2 + 0.2**4)
    edge = 2 / np.linalg.eigvalsh((x * height) @ x.T / len(x)).max()
    assert np.isclose(found.flow_edge, edge, rtol=1e-7)


def test_min_l1_is_told_apart_from_the_teacher():
    x, y, teacher = problem(n=4, d=30, sparsity=3)  # too few rows to recover it
    assert solve(x, y, teacher, steps=2).min_l1_is_teacher == 0
    x, y, teacher = problem(n=20, d=30, sparsity=1)
    assert solve(x, y, teacher, steps=2).min_l1_is_teacher == 1


def test_members_that_do_not_interpolate_get_no_prediction_of_their_end_and_the_others_theirs():
    x, y, teacher = problem()
    axes = {"lr": [1e-4, 0.3, 5.0], "weight_decay": [0.0, 1e-3], "label_noise": [0.0, 0.1]}
    found = solve(x, y, teacher, steps=30_000, batch_size=4, record=["train_loss"], **axes)
    defined = found.bregman_error.notnull()
    assert defined.sel(lr=0.3, weight_decay=0, label_noise=0) and defined.sum() == 1
    assert (found.error_min_l2.notnull() == defined).all()
    assert found.distance_min_l2.notnull().all() and found.flow_edge.notnull().all()


def test_the_theorem_holds_after_label_noise_and_weight_decay_have_been_switched_off():
    config = {
        "model": {"class_path": "DiagonalLinearNetwork", "init_args": {"init_scale": 0.7}},
        "data": {"class_path": "SparseRegression", "init_args": {"num_samples": 8, "dim": 12, "sparsity": 2}},
        "ensemble": {"lr": [0.02], "batch_size": [1], "label_noise": [0.5], "weight_decay": [1e-3], "seed": 2},
        "trainer": {"max_steps": 2000},
        "variants": {
            "clean": {
                "after": "main",
                "ensemble": {"lr": [0.1], "batch_size": ["full"], "seed": 2},
                "trainer": {"max_steps": 60_000, "callbacks": [{"class_path": "ImplicitBias"}]},
            }
        },
    }
    found = dlnlab.run_all(config)["clean"].isel(step=-1)
    assert found.train_loss.max() < 1e-19 and found.bregman_error.max() < 1e-8


class Cubic(LinearNetwork):
    """Another network."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_decay": 0.1}, "with weight_decay or label_noise the theorem does not say"),
        ({"label_noise": 0.1}, "with weight_decay or label_noise the theorem does not say"),
    ],
)
def test_runs_of_which_the_theorem_says_nothing_are_refused(options, words):
    x, y, teacher = problem()
    with pytest.raises(ValueError, match=words):
        solve(x, y, teacher, steps=2, **options)


def test_data_without_an_interpolator_are_refused():
    x, y, teacher = problem(n=20, d=5)
    y[0] += 1
    with pytest.raises(ValueError, match="ImplicitBias: problem 0: no beta solves"):
        solve(x, y, teacher, steps=2)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "small"])
def test_a_bad_bound_on_the_loss_is_refused(value):
    with pytest.raises(ValueError, match="loss_below"):
        ImplicitBias(loss_below=value)
