import math
import warnings
from functools import partial

import numpy as np
import oracles
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch.nn import Parameter

from dlnlab import Ensemble, theory
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.models import DiagonalLinearNetwork, LinearNetwork
from dlnlab.models.base import INVARIANTS
from dlnlab.optim import GainSGD, GradientFlow

RUNNING, CONVERGED, DIVERGED = range(3)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
GRID = {"batch_size": [1, 3, "full"], "sampling": ["replacement", "subset", "epochs"]}


class Generic(DiagonalLinearNetwork):
    """The same network without its closed form."""

    def losses(self, batch):
        return super().losses(batch)


PATHS = (DiagonalLinearNetwork, Generic)


def problems(num_seeds=2, n=5, d=3, seed=0, noise=0.3):
    """Rows of length 1 and noisy labels: stable for lr below 1/2, and nothing to interpolate once n > d."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_seeds, n, d))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    teacher = np.zeros((num_seeds, d))
    teacher[:, : max(1, d // 2)] = 1.0
    y = (x @ teacher[..., None])[..., 0] + noise * rng.normal(size=(num_seeds, n))
    return x, y, teacher


def train(fit, cls, arrays, steps, axes=None, guard=None, device="cpu", root=0, **arguments):
    model = cls(ensemble=Ensemble(root=root, **(axes or {})), **arguments)
    callbacks = [] if guard is None else [MemberGuard(**guard)]
    trainer = fit(model, oracles.GivenData(*arrays), steps, callbacks, device=device)
    return model, trainer


def truth_of(model, arrays, member, steps, **defaults):
    """The oracle's path of one member of a model."""
    label = {**defaults, **model.ensemble.labels[member]}
    seed = label.get("seed", 0)
    return oracles.member_path(arrays[0][seed], arrays[1][seed], steps, root=model.ensemble.root, **label)


def assert_same_paths(a, b, atol, members=slice(None), others=slice(None)):
    for name in ("w_plus", "w_minus"):
        found, right = getattr(a, name).detach()[members], getattr(b, name).detach()[others]
        np.testing.assert_allclose(found, right, rtol=0, atol=atol)
    for name in ("gain", "gain_plus", "gain_minus", "effective_init"):
        found, right = (getattr(model._optimizer, name) for model in (a, b))
        np.testing.assert_allclose(found[members], right[others], rtol=0, atol=atol)


def assert_bitwise(a, b, members=slice(None)):
    for (name, one), (_, other) in zip(a.member_state().items(), b.member_state().items(), strict=True):
        assert torch.equal(one[members], other[members]), name


# The path -------------------------------------------------------------------------------------------------------------


def check_against_the_oracle(fit, cls, device, seed, n, d, alpha, lr, decay, noise, steps=60):
    arrays = problems(1, n, d, seed)
    axes = {
        "batch_size": [1, min(5, n), "full"] if n > 1 else [1, "full"],
        "sampling": ["replacement", "subset", "epochs"],
        "label_noise": [0.0, noise],
        "weight_decay": [decay, 0.0],
        "lr": [lr, lr / 2],
    }
    model, _ = train(fit, cls, arrays, steps, axes, device=device, root=seed, init_scale=alpha)
    model.cpu()
    optimizer = model._optimizer
    for member in range(model.num_members):
        truth = truth_of(model, arrays, member, steps, init_scale=alpha)
        for found, right in (
            (model.w_plus, truth.w_plus),
            (model.w_minus, truth.w_minus),
            (model.u, truth.u),
            (model.v, truth.v),
            (model.predictor(), truth.beta),
            (optimizer.gain, truth.gain),
            (optimizer.gain_plus, truth.gain_plus),
            (optimizer.gain_minus, truth.gain_minus),
            (optimizer.effective_init, truth.effective_init),
        ):
            # 60 stable steps of numbers of order one; the label noise agrees to the last bits only.
            np.testing.assert_allclose(found[member].detach().cpu(), right, rtol=1e-10, atol=1e-10)


# A fit of 72 members an example: few of them, and none spent on making a failure smaller.
FEW = {"max_examples": 5, "phases": [Phase.explicit, Phase.reuse, Phase.generate]}
SETTINGS = {
    "seed": st.integers(0, 2**32 - 1),
    "n": st.integers(1, 6),
    "d": st.integers(1, 7),
    "alpha": st.floats(0.01, 0.8),
    "lr": st.floats(0.01, 0.2),
    "decay": st.floats(1e-4, 0.1),
    "noise": st.floats(0.01, 1),
}


@settings(**FEW)
@given(**SETTINGS)
def test_the_closed_form_follows_a_plain_loop_in_u_and_v(fit, device, seed, n, d, alpha, lr, decay, noise):
    check_against_the_oracle(fit, DiagonalLinearNetwork, device, seed, n, d, alpha, lr, decay, noise)


@settings(**{**FEW, "max_examples": 3})
@given(**SETTINGS)
def test_the_generic_path_follows_a_plain_loop_in_u_and_v(fit, device, seed, n, d, alpha, lr, decay, noise):
    check_against_the_oracle(fit, Generic, device, seed, n, d, alpha, lr, decay, noise)


@pytest.mark.parametrize("cls", PATHS)
def test_an_initialisation_near_the_floor_of_floating_point_is_followed_in_relative_size(fit, cls):
    arrays, axes = problems(1), {"lr": [0.3], "batch_size": [1, "full"], "weight_decay": [0.0, 0.01]}
    model, _ = train(fit, cls, arrays, 100, axes, init_scale=1e-125)
    for member in range(4):
        truth = truth_of(model, arrays, member, 100, init_scale=1e-125)
        # A factor set from its product has the error of exp(ln 1e-125), 288 units in the last place.
        np.testing.assert_allclose(model.w_plus.detach()[member], truth.w_plus, rtol=1e-12)
        np.testing.assert_allclose(model.predictor().detach()[member], truth.beta, rtol=1e-11)  # w+^2 - w-^2 cancels
        np.testing.assert_allclose(model._optimizer.gain[member], truth.gain, rtol=0, atol=1e-13)  # 100 roundings


def test_the_two_paths_are_what_they_say(fit):
    closed, _ = train(fit, DiagonalLinearNetwork, problems(), 2)
    generic, _ = train(fit, Generic, problems(), 2)
    assert closed.path == "closed form"
    assert generic.path == "generic (autograd): Generic has its own losses"


def test_the_two_paths_agree_over_all_samplings(fit, device):
    arrays, axes = problems(), {"lr": [0.1, 0.3], **GRID, "seed": 2}
    closed, _ = train(fit, DiagonalLinearNetwork, arrays, 200, axes, device=device, init_scale=0.3)
    generic, _ = train(fit, Generic, arrays, 200, axes, device=device, init_scale=0.3)
    assert_same_paths(closed.cpu(), generic.cpu(), atol=1e-12)  # 200 stable steps, summed in another order


def test_every_seed_has_its_own_problem_and_its_own_batches(fit):
    arrays = problems(3)
    model, _ = train(fit, DiagonalLinearNetwork, arrays, 70, {"seed": [2, 0], "batch_size": [2]}, init_scale=0.2)
    for member in range(2):
        truth = truth_of(model, arrays, member, 70, lr=0.01, init_scale=0.2)
        np.testing.assert_allclose(model.predictor().detach()[member], truth.beta, atol=1e-13)  # 70 roundings


def test_an_initialisation_per_feature_is_followed(fit):
    arrays, scale = problems(1), [0.1, 0.5, 0.2]
    for cls in PATHS:
        model, _ = train(fit, cls, arrays, 100, {"lr": [0.2]}, init_scale=scale)
        truth = oracles.member_path(arrays[0][0], arrays[1][0], 100, lr=0.2, init_scale=np.array(scale))
        np.testing.assert_allclose(model.predictor().detach()[0], truth.beta, atol=1e-13)  # 100 roundings
        np.testing.assert_allclose(model._optimizer.effective_init[0], truth.effective_init, atol=1e-13)  # likewise


def test_an_axis_of_initialisations_is_followed(fit):
    arrays = problems(1)
    model, _ = train(fit, DiagonalLinearNetwork, arrays, 100, {"init_scale": [0.1, 0.7], "lr": [0.05, 0.1, 0.2]})
    for member in range(6):
        truth = truth_of(model, arrays, member, 100)
        np.testing.assert_allclose(model.predictor().detach()[member], truth.beta, atol=1e-13)  # 100 roundings


def test_a_step_size_counted_in_the_largest_row_is_scaled_by_it(fit):
    x, y, teacher = problems()
    x = x * np.array([2.0, 3.0])[:, None, None]
    unit = 1 / (x**2).sum(-1).max(-1)
    model, _ = train(fit, DiagonalLinearNetwork, (x, y, teacher), 50, {"lr": [0.2, 0.3], "seed": 2}, lr_unit="max_row")
    np.testing.assert_allclose(model.step_size, np.outer([0.2, 0.3], unit).ravel(), rtol=1e-14)  # a few roundings
    for member, label in enumerate(model.ensemble.labels):
        seed = label["seed"]
        truth = oracles.member_path(x[seed], y[seed], 50, lr=label["lr"] * unit[seed])
        np.testing.assert_allclose(model.predictor().detach()[member], truth.beta, atol=1e-13)  # 50 roundings


@pytest.mark.parametrize("cls", PATHS)
def test_float32_is_float64_up_to_its_rounding(fit, cls):
    arrays, axes = problems(), {"lr": [0.1, 0.3], "batch_size": [1, 3, "full"], "seed": 2}
    single, _ = train(fit, cls, arrays, 200, axes, dtype="float32", init_scale=0.3)
    double, _ = train(fit, cls, arrays, 200, axes, init_scale=0.3)
    assert single.w_plus.dtype == torch.float32
    assert single._optimizer.gain.dtype == torch.float64
    assert_same_paths(single, double, atol=200 * 1.2e-7)  # 200 roundings to 6e-8 of a stable run, at most added up


def test_the_rotation_leaves_the_spectrum_of_the_hessian_as_it_is(fit):
    x, y, _ = arrays = problems(1)
    model, _ = train(fit, DiagonalLinearNetwork, arrays, 20, {"lr": [0.3]})

    def loss(w_plus, w_minus):
        beta = (w_plus**2 - w_minus**2) / 2
        return (torch.tensor(x[0]) @ beta - torch.tensor(y[0])).square().mean() / 2

    found = oracles.dense_hessian(loss, model.w_plus.detach()[0], model.w_minus.detach()[0])
    expected = oracles.diagonal_hessian(x[0], y[0], model.u.detach().numpy()[0], model.v.detach().numpy()[0])
    np.testing.assert_allclose(torch.linalg.eigvalsh(found), np.linalg.eigvalsh(expected), atol=1e-14)  # 6 x 6 numbers


# Members and chunks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", PATHS)
def test_a_member_follows_the_same_path_alone_in_company_and_in_any_order(fit, cls):
    arrays, axes = problems(), {"lr": [0.1, 0.3], **GRID, "seed": 2}
    company, _ = train(fit, cls, arrays, 200, axes)
    backwards = {name: list(reversed(company.ensemble.axes[name])) for name in reversed(list(axes))}
    other, _ = train(fit, cls, arrays, 200, backwards)
    place = [
        other.ensemble.labels.index({name: label[name] for name in backwards}) for label in company.ensemble.labels
    ]
    assert place != sorted(place)
    assert_same_paths(company, other, 1e-12, others=place)  # 200 stable steps; products of other shapes round otherwise
    for member in (0, 7, 16, 35):
        alone, _ = train(fit, cls, arrays, 200, {k: [v] for k, v in company.ensemble.labels[member].items()})
        assert_same_paths(company, alone, 1e-12, members=[member])  # likewise


@pytest.mark.parametrize("scale", [0.1, 1e-125])  # the latter so near the floor that every renormalisation sets it
@pytest.mark.parametrize("cls", PATHS)
def test_no_result_depends_on_where_chunks_end(fit, cls, scale):
    arrays = problems()
    axes = {"lr": [0.1, 0.3], **GRID, "label_noise": [0.2], "weight_decay": [0.01], "seed": 2}
    runs = [train(fit, cls, arrays, 80, axes, max_chunk=chunk, init_scale=scale) for chunk in (80, 1, 7)]
    for model, trainer in runs:
        assert trainer.global_step == model._optimizer.num_steps == 80
        assert_bitwise(runs[0][0], model)


class Steps(Logger):
    """Keeps the steps at which something was logged."""

    name, version = "steps", 0

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        if "loss" in metrics:
            self.steps.append((step, metrics["loss"]))

    def log_hyperparams(self, *_):
        pass


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_what_a_model_logs_stands_at_the_same_steps_for_every_chunk(fit, chunk):
    class Logging(DiagonalLinearNetwork):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", self.full_losses()[0])

    arrays, logger = problems(1), Steps()
    model = Logging(ensemble=Ensemble(lr=[0.2]), max_chunk=chunk)
    fit(model, oracles.GivenData(*arrays), 100, logger=logger, log_every_n_steps=25)
    # Lightning counts steps from 0 where it logs: the 25th step is step 24.
    assert [step for step, _ in logger.steps] == [24, 49, 74, 99]
    for step, loss in logger.steps:
        truth = oracles.member_path(arrays[0][0], arrays[1][0], step + 1, lr=0.2)
        expected = np.square(arrays[0][0] @ truth.beta - arrays[1][0]).mean() / 2
        assert loss == pytest.approx(expected, rel=1e-6)  # lightning logs float32


def test_two_runs_of_one_seed_are_bitwise_the_same_and_of_another_root_are_not(fit):
    arrays, axes = problems(), {"batch_size": [1, 3], "seed": 2}
    first, again, other = (train(fit, DiagonalLinearNetwork, arrays, 100, axes, root=root)[0] for root in (1, 1, 2))
    assert_bitwise(first, again)
    assert not torch.equal(first.w_plus, other.w_plus)


def test_members_without_a_seed_axis_and_one_of_seed_zero_are_the_same_run(fit):
    one, _ = train(fit, DiagonalLinearNetwork, problems(), 50, {"batch_size": [2]})
    other, _ = train(fit, DiagonalLinearNetwork, problems(), 50, {"batch_size": [2], "seed": [0]})
    assert_bitwise(one, other)


# The guard ------------------------------------------------------------------------------------------------------------

GUARD = {"every_n_steps": 10, "tol": 0.0}


@pytest.mark.parametrize("cls", PATHS)
def test_a_diverged_member_goes_back_to_the_last_finite_check(fit, cls):
    arrays, axes = problems(), {"lr": [0.1, 4.0, 0.3], "batch_size": [1], "seed": 2}
    model, trainer = train(fit, cls, arrays, 300, axes, GUARD, init_scale=0.1)
    assert 0 == model.stopped_at[2] < model.stopped_at[3]  # one goes back to its start, the other further
    assert trainer.global_step == 300
    assert model.status.tolist() == [RUNNING] * 2 + [DIVERGED] * 2 + [RUNNING] * 2
    assert model.stopped_at[[0, 1, 4, 5]].tolist() == [-1] * 4
    for member in (2, 3):
        stop = int(model.stopped_at[member])
        assert stop % 10 == 0
        at_stop, _ = train(fit, cls, arrays, max(stop, 1), axes, init_scale=0.1)
        if stop == 0:
            expected = torch.full((3,), 0.1, dtype=torch.float64)
            assert torch.equal(model.w_plus[member], expected)
        else:
            assert torch.equal(model.w_plus[member], at_stop.w_plus[member])
            assert torch.equal(model._optimizer.gain[member], at_stop._optimizer.gain[member])
        seed = member - 2
        with np.errstate(all="ignore"):
            later = truth_of(model, arrays, member, stop + 10, init_scale=0.1)
            loss = np.square(arrays[0][seed] @ later.beta - arrays[1][seed]).mean() / 2
            largest = max(np.abs(later.w_plus).max(), np.abs(later.w_minus).max())
        assert not (loss <= 1e10 and largest <= 1e10)


def test_the_two_paths_agree_on_who_stopped_and_when(fit):
    arrays = problems(2, noise=0)
    axes = {"lr": [0.05, 0.3, 0.9, 2.0, 6.0], "batch_size": [1, "full"], "seed": 2}
    guard = {"every_n_steps": 20, "tol": 1e-12}
    closed, one = train(fit, DiagonalLinearNetwork, arrays, 800, axes, guard, init_scale=0.3)
    generic, other = train(fit, Generic, arrays, 800, axes, guard, init_scale=0.3)
    assert set(closed.status.tolist()) == {RUNNING, CONVERGED, DIVERGED}
    assert closed.status.tolist() == generic.status.tolist()
    assert closed.stopped_at.tolist() == generic.stopped_at.tolist()
    assert one.global_step == other.global_step == 800
    calm = [i for i, label in enumerate(closed.ensemble.labels) if label["lr"] < 0.5]
    assert_same_paths(closed, generic, 1e-11, members=calm, others=calm)  # 800 stable steps


@pytest.mark.parametrize("cls", PATHS)
def test_a_member_that_diverges_changes_no_bit_of_the_others(fit, cls):
    # b = 1: no matrix product, whose rounding would depend on how many members still run.
    arrays, size = problems(), {"batch_size": [1], "seed": 2}
    spoilt, _ = train(fit, cls, arrays, 200, {"lr": [0.1, 50.0, 0.3], **size}, GUARD)
    calm, _ = train(fit, cls, arrays, 200, {"lr": [0.1, 0.2, 0.3], **size}, GUARD)
    assert spoilt.status.tolist() == [RUNNING] * 2 + [DIVERGED] * 2 + [RUNNING] * 2
    assert calm.status.tolist() == [RUNNING] * 6
    assert_bitwise(spoilt, calm, members=[0, 1, 4, 5])


@pytest.mark.parametrize("cls", PATHS)
def test_a_member_that_diverges_hardly_changes_the_rounding_of_the_others(fit, cls):
    arrays, size = problems(), {"batch_size": [3, "full"], "seed": 2}
    spoilt, _ = train(fit, cls, arrays, 200, {"lr": [0.1, 50.0, 0.3], **size}, GUARD)
    calm, _ = train(fit, cls, arrays, 200, {"lr": [0.1, 0.2, 0.3], **size}, GUARD)
    others = [i for i, label in enumerate(calm.ensemble.labels) if label["lr"] != 0.2]
    assert all(spoilt.status[[i for i in range(12) if i not in others]] == DIVERGED)
    assert_same_paths(spoilt, calm, 1e-12, members=others, others=others)  # 200 stable steps, products of other shapes


@pytest.mark.parametrize("cls", PATHS)
def test_a_converged_member_freezes_where_it_converged_and_the_fit_ends_with_the_last(fit, cls):
    arrays, axes = problems(2, noise=0), {"lr": [0.3, 0.2], "batch_size": ["full"], "seed": 2}
    model, trainer = train(fit, cls, arrays, 5000, axes, {"every_n_steps": 10, "tol": 1e-8}, init_scale=0.3)
    assert model.status.tolist() == [CONVERGED] * 4
    assert trainer.global_step == int(model.stopped_at.max()) < 5000
    assert len(set(model.stopped_at.tolist())) > 1
    for member, label in enumerate(model.ensemble.labels):
        x, y = (array[label["seed"]] for array in arrays[:2])
        for stop, below in ((int(model.stopped_at[member]), True), (int(model.stopped_at[member]) - 10, False)):
            truth = oracles.member_path(x, y, stop, lr=label["lr"], init_scale=0.3)
            assert (np.square(x @ truth.beta - y).mean() / 2 < 1e-8) == below
            if below:
                np.testing.assert_allclose(model.predictor().detach()[member], truth.beta, atol=1e-12)  # stable steps
                np.testing.assert_allclose(model._optimizer.gain[member], truth.gain, atol=1e-12)  # likewise


@pytest.mark.parametrize("cls", PATHS)
def test_label_noise_and_penalty_do_not_enter_the_loss_that_decides(fit, cls):
    arrays = problems(2, noise=0)
    axes = {"label_noise": [0.0, 0.3], "lr": [0.3]}
    model, _ = train(fit, cls, arrays, 2000, axes, {"every_n_steps": 10, "tol": 1e-3}, init_scale=0.3)
    assert model.status[0] == CONVERGED
    assert model.status[1] == CONVERGED  # its noisy loss is 0.045
    loss = model.full_losses()
    assert bool((loss < 1e-3).all())


def test_without_a_guard_no_member_ever_stops(fit):
    model, trainer = train(fit, DiagonalLinearNetwork, problems(), 100, {"lr": [0.1, 50.0]})
    assert trainer.global_step == 100
    assert model.status.tolist() == [RUNNING] * 2
    assert not torch.isfinite(model.w_plus[1]).all()
    assert torch.isfinite(model.w_plus[0]).all()


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_guards_grid_is_absolute_and_knows_no_chunks(fit, chunk):
    arrays, axes = problems(2, noise=0), {"lr": [0.1, 0.3, 6.0], "batch_size": [1, "full"], "seed": 2}
    guard = {"every_n_steps": 10, "tol": 1e-6}
    whole, one = train(fit, DiagonalLinearNetwork, arrays, 400, axes, guard, init_scale=0.3)
    parts, other = train(fit, DiagonalLinearNetwork, arrays, 400, axes, guard, init_scale=0.3, max_chunk=chunk)
    assert len(set(whole.status.tolist())) > 1
    assert torch.equal(whole.status, parts.status)
    assert torch.equal(whole.stopped_at, parts.stopped_at)
    assert one.global_step == other.global_step
    assert_bitwise(whole, parts)


# What is asked of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "arguments", "message"),
    [
        ({"batch_size": [1, 6]}, {}, r"^batch_size = 6: must be at most the number of training samples, 5$"),
        ({}, {"batch_size": 7}, r"^batch_size = 7: must be at most the number of training samples, 5$"),
        ({"batch_size": [0]}, {}, r"^batch_size = 0: must be at least 1$"),
        ({"batch_size": ["half"]}, {}, r"^batch_size = 'half': must be a whole number$"),
        ({"sampling": ["often"]}, {}, r"^sampling = 'often': must be one of replacement, subset, epochs$"),
        ({"label_noise": [-1]}, {}, r"^label_noise = -1: must be a finite number and at least 0$"),
        ({"init_scale": [0.1, 0]}, {}, r"^init_scale = 0: must be positive and finite$"),
        ({}, {"init_scale": math.nan}, r"^init_scale = nan: must be positive and finite$"),
        ({}, {"init_scale": [0.1, 0.2]}, r"^init_scale has 2 entries: must be one number or 3, one per feature$"),
        ({}, {"dim": 4}, r"^the model's predictor has 4 features and the data have 3$"),
        (
            {"momentum": [0.1]},
            {},
            r"^ensemble\.momentum: no such axis; the axes here are batch_size, init_on_support, init_scale, ",
        ),
        ({"sparsity": [1, 2]}, {}, r"^ensemble\.sparsity: no such axis"),
        ({"lr": [0.1, 1.0], "weight_decay": [0.1, 0.5]}, {}, r"2 lr weight_decay must be below 1"),
        ({}, {"dtype": "float16"}, r"^dtype = 'float16': must be one of float64, float32$"),
        ({}, {"max_chunk": 0}, r"^max_chunk = 0: must be at least 1$"),
        ({}, {"lr_unit": "two"}, r"^lr_unit = 'two': must be one of one, max_row"),
    ],
)
def test_a_mistake_is_named_before_the_first_step(fit, axes, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(fit, DiagonalLinearNetwork, problems(), 10, axes, **arguments)


def test_sizes_may_be_given_where_they_agree_with_the_data(fit):
    given_size, _ = train(fit, DiagonalLinearNetwork, problems(), 10, dim=3)
    taken, _ = train(fit, DiagonalLinearNetwork, problems(), 10)
    assert_bitwise(given_size, taken)


# Other optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_element_wise_torch_optimizer_steps_each_member_as_if_alone(fit, name):
    cls, options = OPTIMIZERS[name]
    arrays = problems()
    model, _ = train(
        fit, DiagonalLinearNetwork, arrays, 40, {"batch_size": [2, "full"], "seed": 2},
        optimizer=lambda groups, **given: cls(groups, **{**options, **given}),
    )  # fmt: skip
    assert model.path == f"generic (autograd): the optimizer is {name}"
    for member, label in enumerate(model.ensemble.labels):
        w_plus, w_minus = (torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = cls([w_plus, w_minus], **options)
        seed = label["seed"]
        sampling = {"batch_size": label["batch_size"], "seed": seed}
        for rows, targets in oracles.member_batches(arrays[0][seed], arrays[1][seed], 40, **sampling):
            optimizer.zero_grad()
            beta = (w_plus**2 - w_minus**2) / 2
            ((torch.tensor(rows) @ beta - torch.tensor(targets)).square().mean() / 2).backward()
            optimizer.step()
        # 40 steps; Adam and RMSprop divide by small second moments, which amplifies roundings.
        np.testing.assert_allclose(model.w_plus.detach()[member], w_plus.detach(), atol=1e-10)
        np.testing.assert_allclose(model.w_minus.detach()[member], w_minus.detach(), atol=1e-10)  # likewise


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axis", ["lr", "weight_decay"])
def test_an_axis_that_an_optimizer_cannot_vary_over_members_is_refused(fit, name, axis):
    with pytest.raises(ValueError, match=rf"^ensemble\.{axis}: .*one {axis} for all members"):
        train(fit, DiagonalLinearNetwork, problems(), 10, {axis: [0.01, 0.02]}, optimizer=OPTIMIZERS[name][0])


def test_an_axis_of_one_value_is_a_number_that_any_optimizer_takes(fit):
    model, _ = train(fit, DiagonalLinearNetwork, problems(), 10, {"lr": [0.03], "seed": 2}, optimizer=torch.optim.Adam)
    assert model._optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_guard_takes_back_a_member_with_any_optimizer(fit, name):
    cls, options = OPTIMIZERS[name]
    arrays = [array.copy() for array in problems(2)]
    arrays[0][1] *= 1e100  # however small its steps, the first one leads beyond the bound
    model, _ = train(
        fit, DiagonalLinearNetwork, arrays, 30, {"seed": 2}, GUARD,
        optimizer=lambda groups, **given: cls(groups, **{**options, **given}),
    )  # fmt: skip
    assert model.status.tolist() == [RUNNING, DIVERGED]
    assert model.stopped_at.tolist() == [-1, 0]
    assert torch.equal(model.w_plus[1], torch.full((3,), 0.1, dtype=torch.float64))
    assert not torch.equal(model.w_plus[0], torch.full((3,), 0.1, dtype=torch.float64))


# A person's own networks ----------------------------------------------------------------------------------------------


class Cubic(LinearNetwork):
    """beta = u^3 - v^3, its size from the data."""

    def build(self, num_features, num_outputs):
        self.u = Parameter(torch.full((self.num_members, num_features), 0.5))
        self.v = Parameter(torch.full((self.num_members, num_features), 0.5))

    def predictor(self):
        return self.u**3 - self.v**3


class Product(LinearNetwork):
    """beta = a*b from a start of its own, its size known beforehand, its factors a pair."""

    axes = (*LinearNetwork.axes, "start")

    def __init__(self, start=0.5, dim=3, **kwargs):
        super().__init__(**kwargs)
        self.start = start
        scale = self.per_member_tensor("start")[:, None]
        self.a = Parameter(scale.expand(-1, dim).clone())
        self.b = Parameter(torch.zeros_like(self.a))

    def predictor(self):
        return self.a * self.b

    def parameter_groups(self):
        return [{"params": [self.a, self.b], "form": "product"}]


def test_a_network_with_build_is_trained_on_its_own_law(fit):
    arrays = problems()
    model, trainer = train(fit, Cubic, arrays, 30, {"lr": [0.1, 0.3], "batch_size": [2], "seed": 2})
    assert trainer.global_step == 30
    assert model.path == "generic (autograd): Cubic has no closed form"
    assert model.u.dtype == torch.float64
    for member, label in enumerate(model.ensemble.labels):
        u, v, seed = np.full(3, 0.5), np.full(3, 0.5), label["seed"]
        for rows, targets in oracles.member_batches(arrays[0][seed], arrays[1][seed], 30, batch_size=2, seed=seed):
            g = rows.T @ (rows @ (u**3 - v**3) - targets) / len(rows)
            u, v = u - label["lr"] * 3 * u**2 * g, v + label["lr"] * 3 * v**2 * g
        np.testing.assert_allclose(model.u.detach()[member], u, atol=1e-13)  # 30 roundings
        np.testing.assert_allclose(model.v.detach()[member], v, atol=1e-13)  # likewise


def test_a_network_with_parameters_from_its_constructor_has_axes_and_a_gain_of_its_own(fit):
    arrays = problems()
    model, _ = train(fit, Product, arrays, 50, {"start": [0.3, 0.6, 0.9], "lr": [0.2]})
    assert isinstance(model._optimizer, GainSGD)
    for member, start in enumerate((0.3, 0.6, 0.9)):
        truth = oracles.member_path(arrays[0][0], arrays[1][0], 50, lr=0.2, init_scale=start / math.sqrt(2))
        np.testing.assert_allclose(model.a.detach()[member], truth.u, atol=1e-13)  # 50 roundings
        np.testing.assert_allclose(model._optimizer.gain[member], truth.gain, atol=1e-13)  # likewise


def test_a_subclass_with_a_law_of_its_own_leaves_the_closed_form(fit):
    class Doubled(DiagonalLinearNetwork):
        def predictor(self):
            return 2 * super().predictor()

    arrays = problems()
    model, _ = train(fit, Doubled, arrays, 30, {"lr": [0.05]})
    plain, _ = train(fit, DiagonalLinearNetwork, (2 * arrays[0], arrays[1], None), 30, {"lr": [0.05]})
    assert model.path == "generic (autograd): Doubled has its own predictor"
    np.testing.assert_allclose(model.w_plus.detach(), plain.w_plus.detach(), atol=1e-13)  # 2 <beta, x> = <beta, 2 x>


class Penalised(DiagonalLinearNetwork):
    """A fourth power of w+ beside the loss, from some step on."""

    axes = (*DiagonalLinearNetwork.axes, "strength")

    def __init__(self, strength=0.1, since=0, **kwargs):
        super().__init__(**kwargs)
        self.strength, self.since = strength, since

    def losses(self, batch):
        on = self._optimizer.num_steps >= self.since
        penalty = self.per_member_tensor("strength")[batch.members] * self.w_plus[batch.members].pow(4).sum(-1)
        return super().losses(batch) + on * penalty


def test_members_whose_loss_is_no_function_of_the_product_descend_without_a_gain(fit):
    arrays, strengths = problems(noise=0.0), (0.0, 1e-3, 0.1)
    recorder = Recorder(every_n_steps=20, variables=["gain", "effective_init", "imbalance"])
    with pytest.warns(UserWarning, match=r"leading indices 1, 2\) are not of the form"), warnings.catch_warnings():
        model = Penalised(ensemble=Ensemble(lr=[0.2], strength=strengths))
        trainer = Trainer(max_steps=60, callbacks=[recorder], **QUIET)
        trainer.fit(model, oracles.GivenData(*arrays))
    for member, strength in enumerate(strengths):
        x, y = (torch.as_tensor(part[0]) for part in arrays[:2])
        pair = [Parameter(torch.full((3,), 0.1, dtype=torch.float64)) for _ in range(2)]
        sgd = torch.optim.SGD(pair, lr=0.2)
        for _ in range(60):
            sgd.zero_grad()
            beta = (pair[0] ** 2 - pair[1] ** 2) / 2
            ((x @ beta - y).square().mean() / 2 + strength * pair[0].pow(4).sum()).backward()
            sgd.step()
        for found, right in zip((model.w_plus, model.w_minus), pair, strict=True):
            np.testing.assert_allclose(found.detach()[member], right.detach(), rtol=1e-12)  # 60 roundings
    results = recorder.dataset().isel(lr=0)
    for name in ("gain", "effective_init", "imbalance_error", "mirror_error", "gain_sandwich_error"):
        assert results[name].sel(strength=0.0).notnull().all() and results[name][1:].isnull().all(), name
    assert results.imbalance.notnull().all()


def test_a_loss_that_leaves_the_product_on_the_way_leaves_no_gain_behind(fit):
    recorder = Recorder(every_n_steps=10, variables=["gain"])
    with pytest.warns(UserWarning, match="no function of the pair's product"):
        Trainer(max_steps=40, callbacks=[recorder], **QUIET).fit(Penalised(since=20), oracles.GivenData(*problems()))
    assert recorder.dataset().gain.isnull().all("coordinate").values.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("optimizer", [GainSGD, partial(GradientFlow, times=[1.0])])
def test_what_no_member_has_is_refused_before_a_fit_and_looking_changes_nothing(fit, optimizer):
    def build(variables):
        return Penalised(optimizer=optimizer), [Recorder(every_n_steps=1, variables=variables)]

    model, callbacks = build(["effective_init"])
    message = "effective_init is not defined here: the loss of Penalised is no function of the product of its factors"
    with pytest.raises(ValueError, match=message):
        fit(model, oracles.GivenData(*problems()), 5, callbacks)
    assert torch.equal(model.w_plus.detach(), torch.full((1, 3), 0.1, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in model.parameters())
    model, callbacks = build(["imbalance"])
    fit(model, oracles.GivenData(*problems()), 5, callbacks)
    assert not set(INVARIANTS) & set(callbacks[0].dataset())


def test_a_flow_states_its_effective_initialisation_under_weight_decay_too(fit):
    model, _ = train(
        fit, DiagonalLinearNetwork, problems(), 2, optimizer=partial(GradientFlow, times=[1, 3], weight_decay=0.1)
    )
    product = (model.w_plus * model.w_minus).detach()
    np.testing.assert_allclose(model._optimizer.effective_init**2, product, rtol=1e-10)  # the flow's tolerance
    np.testing.assert_allclose(product, 0.01 * np.exp(-4 * 0.1 * 3), rtol=1e-10)  # likewise


@pytest.mark.parametrize("unit", ["flow_edge", "mean_square_edge"])
@pytest.mark.parametrize("own", [{"losses": Generic.losses}, {"predictor": lambda model: model.w_plus**3}])
def test_the_unit_of_one_loss_is_refused_to_another(fit, own, unit):
    with pytest.raises(
        ValueError, match=f"lr_unit = {unit}: .*Other has its own {next(iter(own))}; use one or max_row"
    ):
        train(fit, type("Other", (DiagonalLinearNetwork,), own), problems(), 1, lr_unit=unit)


def test_a_subclass_with_variables_of_its_own_says_that_it_leaves_the_kernel(fit):
    class Measured(DiagonalLinearNetwork):
        def variables(self):
            return {**super().variables(), "largest": lambda: self.predictor().abs().amax(-1)}

    model, _ = train(fit, Measured, problems(), 30, {"lr": [0.05]})
    plain, _ = train(fit, DiagonalLinearNetwork, problems(), 30, {"lr": [0.05]})
    reason = "Measured has its own variables, which the kernel does not record"
    assert model.path == f"closed form, in torch: {reason}"
    np.testing.assert_allclose(model.w_plus.detach(), plain.w_plus.detach(), atol=1e-14)  # 30 roundings


def test_a_subclass_that_only_starts_elsewhere_keeps_the_closed_form(fit):
    class Elsewhere(DiagonalLinearNetwork):
        def build(self, num_features, num_outputs):
            super().build(num_features, num_outputs)
            self.w_plus.data *= 2

    arrays = problems()
    model, _ = train(fit, Elsewhere, arrays, 20, {"lr": [0.2]}, init_scale=0.2)
    assert model.path == "closed form"
    w_plus, w_minus = np.full(3, 0.4), np.full(3, 0.2)
    for _ in range(20):
        beta = (w_plus**2 - w_minus**2) / 2
        z = 0.2 * arrays[0][0].T @ (arrays[0][0] @ beta - arrays[1][0]) / 5
        w_plus, w_minus = (1 - z) * w_plus, (1 + z) * w_minus
    np.testing.assert_allclose(model.w_plus.detach()[0], w_plus, atol=1e-14)  # 20 roundings
    np.testing.assert_allclose(model.w_minus.detach()[0], w_minus, atol=1e-14)  # likewise


def test_a_parameter_without_the_members_axis_is_refused(fit):
    class Shared(LinearNetwork):
        def build(self, num_features, num_outputs):
            self.beta = Parameter(torch.zeros(1, num_features))

        def predictor(self):
            return self.beta.expand(self.num_members, -1)

    with pytest.raises(ValueError, match=r"parameter beta has shape \(1, 3\): its first axis must be the 4 members"):
        train(fit, Shared, problems(), 10, {"lr": [0.1, 0.2], "seed": 2})


# Initialisation on the support ----------------------------------------------------------------------------------------


def test_the_initialisation_can_be_scaled_on_the_support_of_each_members_teacher(fit):
    arrays = problems(n=5, d=4)
    arrays = (*arrays[:2], np.array([[1.0, 0, 0, 2], [0, -3, 0, 0]]))
    axes = {"lr": [0.01], "init_on_support": [0.5, 1.0, 3.0], "seed": 2}
    model, _ = train(fit, DiagonalLinearNetwork, arrays, 40, axes, init_scale=0.2)
    for member, label in enumerate(model.ensemble.labels):
        scale = np.where(arrays[2][label["seed"]] != 0, 0.2 * label["init_on_support"], 0.2)
        alone = [part[label["seed"]][None] for part in arrays]
        expected, _ = train(fit, DiagonalLinearNetwork, alone, 40, {"lr": [0.01]}, init_scale=scale.tolist())
        torch.testing.assert_close(model.w_plus[member], expected.w_plus[0])


def test_units_of_the_edge_know_the_initialisation_on_the_support(fit):
    arrays = problems(n=3, d=5, noise=0.0)
    axes = {"lr": [0.5], "init_on_support": [0.1, 1.0, 4.0], "seed": 2}
    model, _ = train(fit, DiagonalLinearNetwork, arrays, 1, axes, init_scale=0.3, lr_unit="flow_edge")
    for member, label in enumerate(model.ensemble.labels):
        x, y, teacher = (torch.as_tensor(part[label["seed"]]) for part in arrays)
        scale = torch.where(teacher != 0, 0.3 * label["init_on_support"], 0.3).double()
        torch.testing.assert_close(model.step_size[member], 0.5 * theory.flow_edge(x, y, scale))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_on_support": 0}, r"^init_on_support = 0: must be positive and finite$"),
        ({"init_on_support": 2.0, "dim": 3}, r"^init_on_support: the support is the data's; leave dim to them$"),
    ],
)
def test_an_initialisation_on_a_support_that_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiagonalLinearNetwork(**arguments)


def test_without_a_teacher_there_is_no_support(fit):
    x, y, _ = problems()
    with pytest.raises(ValueError, match=r"^init_on_support: the data have no teacher; it must be 1$"):
        train(fit, DiagonalLinearNetwork, (x, y, None), 1, {"seed": 2}, init_on_support=2.0)
