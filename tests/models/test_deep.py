"""DeepLinearNetwork: initialisations, losses, and its two paths."""

from functools import partial

import numpy as np
import pytest
import torch

from dlnlab import Ensemble, theory
from dlnlab.callbacks import MemberGuard, Recorder
from dlnlab.data import LowRankCompletion, ObservedEntries, SparseRegression
from dlnlab.kernels.cpu_deep import DeepKernel
from dlnlab.models import Batch, DeepLinearNetwork
from dlnlab.optim import GainSGD, GradientFlow


class Generic(DeepLinearNetwork):
    """The same by autograd."""

    def predictor(self):
        return super().predictor()


def data(**kwargs):
    return LowRankCompletion(**{"shape": (5, 7), "rank": 2, "num_observed": 24, "noise_std": 0.1, **kwargs})


def everything():
    return Ensemble(
        lr=[0.02, 0.1], batch_size=[1, 3, "full"], sampling=["replacement", "epochs"], weight_decay=[0.0, 0.01], seed=2
    )


@pytest.fixture
def deep(fit):
    """Train a network; returns it and what was recorded."""

    def run(cls=DeepLinearNetwork, steps=0, ensemble=None, dataset=None, record=(0,), guard=True, **kwargs):
        recorder = Recorder(at=list(record))
        model = cls(ensemble=ensemble, **kwargs)
        fit(model, dataset or data(), max(steps, 1), [*([MemberGuard()] if guard else []), recorder])
        return model, recorder.dataset()

    return run


def balance_error(model):
    return max(
        (b.mT @ b - a @ a.mT).abs().max().item()
        for a, b in zip(list(model.weights)[:-1], list(model.weights)[1:], strict=True)
    )


# Paths ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "half": True, "depth": 2, "init_scale": 0.5}], ids=str)
def test_the_closed_form_takes_autograds_steps_on_the_same_entries(deep, options):
    record = (0, 10, 50, 100)
    (ours, recorded), (theirs, expected) = (
        deep(cls, 100, everything(), record=record, width=[6, 4][: options.get("depth", 3) - 1], **options)
        for cls in (DeepLinearNetwork, Generic)
    )
    assert ours.path == "closed form"
    assert theirs.path.startswith("generic")
    assert torch.equal(ours.status, theirs.status)
    # 100 steps, each rounded to 1e-16, of paths that for some step sizes have not settled yet.
    torch.testing.assert_close(ours.predictor(), theirs.predictor(), atol=1e-11, rtol=0)
    for name in ("train_loss", "test_loss", "distance"):
        a, b = (torch.from_numpy(found[name].values) for found in (recorded, expected))
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_the_torch_path_takes_the_compiled_steps_on_the_same_entries(deep, monkeypatch):
    ours, _ = deep(steps=60, ensemble=everything(), record=(0, 10, 60))
    monkeypatch.setattr("dlnlab.kernels.deep_kernel", lambda *args: "no compiler")
    theirs, _ = deep(steps=60, ensemble=everything(), record=(0, 10, 60))
    assert theirs.path == "closed form, in torch: no compiler"
    torch.testing.assert_close(ours.predictor(), theirs.predictor(), atol=1e-12, rtol=0)  # 60 roundings


def test_full_batches_that_a_kernel_refuses_are_torchs_while_they_last(deep, monkeypatch):
    schedules = {"growing": {"batch_size": lambda steps: np.where(steps % 50 < 20, 1, np.inf)}}
    options = {"steps": 60, "schedules": schedules, "schedule": "growing", "record": (0, 19, 33, 60)}
    ours, recorded = deep(**options, ensemble=Ensemble(lr=[0.02, 0.1], weight_decay=[0.01], seed=2))
    monkeypatch.setattr(DeepKernel, "refusal", lambda self, sizes: "all entries" if bool((sizes == 0).any()) else None)
    theirs, expected = deep(**options, ensemble=Ensemble(lr=[0.02, 0.1], weight_decay=[0.01], seed=2))
    assert theirs.path == "closed form"  # at the end, where batches are single entries again
    torch.testing.assert_close(ours.predictor(), theirs.predictor(), atol=1e-12, rtol=0)  # 60 roundings
    assert not torch.equal(ours.predictor(), theirs.predictor())
    np.testing.assert_allclose(recorded.train_loss, expected.train_loss, rtol=1e-11)
    everyone, _ = deep(steps=3, ensemble=everything())
    assert everyone.path == "closed form, in torch: all entries"


@pytest.mark.parametrize("chunk", [1, 7])
def test_no_result_depends_on_chunks(deep, chunk):
    ours, whole = deep(steps=70, ensemble=everything(), record=(0, 5, 33, 70))
    theirs, parts = deep(steps=70, ensemble=everything(), record=(0, 5, 33, 70), max_chunk=chunk)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, theirs.weights, strict=True))
    assert whole.equals(parts)


def test_a_resumed_fit_takes_the_same_steps_as_one_that_was_not_stopped(fit, tmp_path):
    whole, first, second = (DeepLinearNetwork(ensemble=everything()) for _ in range(3))
    fit(whole, data(), 90, [MemberGuard()])
    fit(first, data(), 45, [MemberGuard()]).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, data(), 90, [MemberGuard()], ckpt_path=str(tmp_path / "half.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, second.weights, strict=True))


def test_a_diverging_member_goes_back_and_moves_nobody(deep):
    company, _ = deep(steps=400, ensemble=Ensemble(lr=[0.05, 50.0], batch_size=[1], seed=2))
    alone, _ = deep(steps=400, ensemble=Ensemble(lr=[0.05], batch_size=[1], seed=2))
    assert company.status.tolist() == [0, 0, 2, 2]
    assert torch.equal(company.predictor()[:2], alone.predictor())
    assert company.predictor().isfinite().all()


def test_gradient_flow_and_inputs_take_the_generic_path(deep):
    model, _ = deep(steps=1, optimizer=partial(GradientFlow, times=[0.1]))
    assert model.path == "generic (autograd): the optimizer is GradientFlow"
    model, recorded = deep(steps=300, dataset=SparseRegression(20, 5, 2), ensemble=Ensemble(lr=[0.02]), init_scale=0.5)
    assert "the data are inputs" in model.path
    assert model.predictor().shape == (1, 5)
    assert recorded.train_loss.values[0, -1] < 0.1 * recorded.train_loss.values[0, 0]


def test_float32_trains_on_exact_places(deep):
    model, _ = deep(steps=50, ensemble=Ensemble(batch_size=[1, "full"]), dtype="float32")
    wide, _ = deep(steps=50, ensemble=Ensemble(batch_size=[1, "full"]))
    assert model.problems.x.dtype == torch.int64
    assert model.predictor().dtype == torch.float32
    torch.testing.assert_close(model.predictor().double(), wide.predictor(), atol=1e-5, rtol=0)  # 50 steps at 6e-8


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reduction", "half", "scale"), [("mean", False, 1 / 24), ("mean", True, 1 / 48),
                                                            ("sum", False, 1.0), ("sum", True, 0.5)])  # fmt: skip
def test_the_loss_is_what_reduction_and_half_say(deep, reduction, half, scale):
    model, _ = deep(reduction=reduction, half=half, ensemble=Ensemble(seed=2))
    for m in range(2):
        places, y = model.problems.x[m], model.problems.y[m]
        found = scale * (model.predictor()[m][places[:, 0], places[:, 1]] - y).square().sum()
        torch.testing.assert_close(model.full_losses()[m], found)
    assert {parameter.dtype for parameter in model.half().parameters()} == {torch.float16}


def test_distance_is_the_mean_square_over_the_entries_not_observed(deep):
    model, recorded = deep(steps=1, record=(0, 1), ensemble=Ensemble(seed=2))
    for m in range(2):
        unseen = torch.ones(5, 7, dtype=torch.bool)
        unseen[model.problems.x[m][:, 0], model.problems.x[m][:, 1]] = False
        error = (model.predictor()[m] - model.problems.teacher[m])[unseen].square().mean().item()
        assert recorded.distance.values[m, -1] == pytest.approx(error, rel=1e-12)
        # Its test loss is the same: all entries not observed, without noise, and no half.
        assert recorded.test_loss.values[m, -1] == pytest.approx(error, rel=1e-12)


def test_gradients_are_finite_differences_of_the_loss(deep):
    model, _ = deep(ensemble=Ensemble(seed=2), reduction="sum")
    batch = model.full_batch()
    model.zero_grad()
    with torch.enable_grad():
        model.losses(batch).sum().backward()
    for w in model.weights:
        for place in ((0, 0, 0), (1, w.shape[1] - 1, 2)):
            values = []
            for move in (1e-5, -1e-5):
                with torch.no_grad():
                    w[place] += move
                    values.append(model.losses(batch)[place[0]].item())
                    w[place] -= move
            difference = (values[0] - values[1]) / 2e-5
            # The central difference's own error: h^2 times a third derivative, and rounding over h.
            assert w.grad[place].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_the_tail_of_a_dead_singular_value_decays_by_the_decay_of_a_step(deep, fit):
    lr, kappa, steps = 0.05, 0.02, 2000
    task = data(rank=1, noise_std=0.0)
    model, _ = deep(steps=4000, init="spectral", init_rank=3, dataset=task, ensemble=Ensemble(batch_size=[1]),
                    optimizer=partial(GainSGD, lr=lr, weight_decay=kappa))  # fmt: skip
    before = torch.linalg.svdvals(model.weights[1][0].detach())
    fit(model, task, steps)
    after = torch.linalg.svdvals(model.weights[1][0].detach())
    assert after[0] > 0.5
    dead = (before < 1e-2 * before[0]) & (before > 1e-9)  # below there is only the rounding of what was zero
    assert dead.sum() == 2
    slope = (after[dead] / before[dead]).log() / steps
    expected = torch.log(torch.tensor(1 - 2 * lr * kappa, dtype=torch.float64))
    assert ((slope / expected - 1).abs() < 0.01).all()  # the data's pull on it is of second order in its size


# Initialisations -----------------------------------------------------------------------------------------------------


def test_orthogonal_factors_have_equal_singular_values(deep):
    model, _ = deep(init="orthogonal", width=[6, 4], ensemble=Ensemble(init_scale=[0.5, 2.0], lr=[1e-12]))
    for w in model.weights:
        for member, scale in enumerate((0.5, 2.0)):
            torch.testing.assert_close(torch.linalg.svdvals(w[member]), torch.full((min(w.shape[1:]),), scale).double(),
                                       atol=1e-10, rtol=0)  # a step of 1e-12 has been taken  # fmt: skip


@pytest.mark.parametrize("options", [{"init": "balanced"}, {"init": "spectral"}, {"init": "spectral", "init_rank": 2}])
def test_balanced_and_spectral_starts_are_balanced(deep, options):
    model, _ = deep(width=[6, 8], ensemble=Ensemble(lr=[1e-12], seed=2), **options)
    assert balance_error(model) < 1e-9  # a step of 1e-12 has been taken
    rank = options.get("init_rank", 5)
    values = torch.linalg.svdvals(model.predictor())
    assert (values[:, :rank] > 1e-3).all()
    assert (values[:, rank:] < 1e-9).all()


def test_the_spectral_start_is_the_observed_matrix_over_its_share(deep):
    model, _ = deep(init="spectral", ensemble=Ensemble(lr=[1e-13]))
    places, y = model.problems.x[0], model.problems.y[0]
    found = model.predictor()[0]
    torch.testing.assert_close(found[places[:, 0], places[:, 1]], y * 35 / 24, atol=1e-10, rtol=0)  # a step of 1e-13
    assert found.square().sum().item() == pytest.approx((y * 35 / 24).square().sum().item())


def test_a_given_matrix_is_factored(deep):
    matrix = [[float(i * j % 5) for j in range(7)] for i in range(5)]
    model, _ = deep(init="spectral", init_matrix=matrix, depth=4, ensemble=Ensemble(lr=[1e-13]))
    torch.testing.assert_close(model.predictor()[0], torch.tensor(matrix, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_rank_minimum_is_a_minimum_of_its_rank(deep):
    optimizer = partial(GainSGD, lr=0.05, weight_decay=0.004)
    model, _ = deep(init="rank_minimum", init_rank=2, optimizer=optimizer, ensemble=Ensemble(seed=2))
    values = torch.linalg.svdvals(model.predictor())
    assert (values[:, 1] > 0.1).all()
    assert (values[:, 2:] < 1e-12).all()
    model.zero_grad()
    with torch.enable_grad():
        model.losses(model.full_batch()).sum().backward()
    for w in model.weights:
        # L-BFGS ends where the gradient is small, 1e-6 of the loss's scale of order 1.
        assert (w.grad + 2 * 0.004 * w).abs().max() < 1e-5
    assert (
        balance_error(model) < 1e-3
    )  # at every critical point of the penalised loss factors are balanced: gradient/kappa


def test_a_members_start_is_the_same_in_any_company(deep):
    for init in ("gaussian", "orthogonal", "balanced", "spectral", "rank_minimum"):
        company, _ = deep(init=init, ensemble=Ensemble(seed=[0, 1, 2], lr=[0.01]))
        alone, _ = deep(init=init, ensemble=Ensemble(seed=[1], lr=[0.01]))
        for a, b in zip(company.weights, alone.weights, strict=True):
            torch.testing.assert_close(a[1], b[0], atol=1e-12, rtol=0)  # a batched SVD may round differently


# What does not fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 1}, "depth = 1: must be at least 2"),
        ({"width": [3]}, r"width = \[3\]: must be one number or 2"),
        ({"width": 0}, "width = 0: must be at least 1"),
        ({"init": "zero"}, "init = 'zero': must be one of gaussian"),
        ({"init_scale": 0.0}, "init_scale = 0.0"),
        ({"init_matrix": [[1.0], [2.0, 3.0]]}, "init_matrix: must be rows of numbers"),
        ({"reduction": "max"}, "reduction = 'max': must be one of mean, sum"),
        ({"half": 1}, "half = 1: must be true or false"),
        ({"init": "spectral", "shape": (2, 2)}, "init = spectral: starts from the data"),
    ],
)
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DeepLinearNetwork(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "dataset", "message"),
    [
        (
            {"shape": (4, 7)},
            None,
            r"the data are entries of a matrix \(5, 7\), the model's predictor has shape \(4, 7\)",
        ),
        ({"init": "spectral"}, SparseRegression(5, 3, 1), "no observed entries to start from"),
        ({"init": "spectral", "init_matrix": [[1.0, 2.0]]}, None, r"init_matrix has shape \(1, 2\): must be \(5, 7\)"),
        ({"lr_unit": "max_row"}, None, "lr_unit = max_row: not known for DeepLinearNetwork on these data; use one"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(deep, kwargs, dataset, message):
    with pytest.raises(ValueError, match=message):
        deep(dataset=dataset, **kwargs)


def test_a_matrix_seen_whole_has_no_distance(deep):
    model, recorded = deep(dataset=data(num_observed=None, observed_fraction=1.0))
    assert "distance" not in recorded
    assert model.variables()["distance"] == "every entry of the matrix is observed"


def test_users_entries_train(deep, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("r,c,v\n" + "\n".join(f"r{i},c{j},{(i - 3) * (j + 1)}" for i in range(8) for j in range(6)))
    _, recorded = deep(steps=3000, dataset=ObservedEntries(str(path)), record=(0, 3000), depth=2, init_scale=0.3,
                           ensemble=Ensemble(batch_size=[1], lr=[0.03]))  # fmt: skip
    assert recorded.test_loss.values.ravel()[-1] < 0.1 * recorded.test_loss.values.ravel()[0]


def test_a_batch_of_places_reads_the_predictor():
    matrix = torch.arange(12.0).view(1, 3, 4)
    batch = Batch(torch.tensor([[[0, 1], [2, 3]]]), torch.zeros(1, 2), torch.tensor([0]))
    assert batch.predictions(matrix).tolist() == [[1.0, 11.0]]
    assert batch.losses(matrix).item() == (1 + 121) / 4


def test_draws_from_one_column_make_the_rank_one_as_fast_as_weight_decay_does(deep):
    steps, lr, kappa = 5000, 0.1, 0.01
    model, _ = deep(
        steps=1, ensemble=Ensemble(seed=4), dataset=data(fullest_columns=1), init_scale=1.0, batch_size=1,
        optimizer=partial(GainSGD, lr=lr, weight_decay=kappa),
    )  # fmt: skip
    start = model.weights[0].detach().clone()
    model, _ = deep(
        steps=steps, ensemble=Ensemble(seed=4), dataset=data(fullest_columns=1), init_scale=1.0, batch_size=1,
        optimizer=partial(GainSGD, lr=lr, weight_decay=kappa),
    )  # fmt: skip
    for m in range(4):
        column = model.problems.x[model.problem_index[m], 0, 1]
        others = [j for j in range(7) if j != column]
        expected = start[m][:, others] * (1 - 2 * lr * kappa) ** (steps - 1)
        # 5,000 products, each rounded to 1e-16.
        torch.testing.assert_close(model.weights[0][m][:, others], expected, rtol=1e-12, atol=0)
    inside = theory.in_absorbing_set([w.detach() for w in model.weights], rank=1, alpha=0.1, rank_slack=0.1)
    assert inside.all()
