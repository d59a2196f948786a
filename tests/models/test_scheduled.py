"""Schedules of lr, weight decay and batch size, on every path, against loops that are told each step's own values."""

import math
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlnlab import Ensemble, models, streams
from dlnlab.callbacks import MemberGuard, Recorder, ShallowTheory, Sharpness, Thresholds
from dlnlab.data import LowRankCompletion, ScalarTarget, SparseRegression
from dlnlab.models import DeepLinearNetwork, DiagonalLinearNetwork, ShallowLinearNetwork
from dlnlab.optim import Cosine, GainSGD, GradientFlow, Piecewise, StepSchedule, StochasticGradientFlow

LR, KAPPA, STEPS = 0.05, 0.03, 75
SCHEDULES = {
    "annealed": {"lr": Cosine(90, final=0.1), "weight_decay": Piecewise([0, 20, 50], [1.0, 0.0, 3.0])},
    "periodic": {"lr": Piecewise([0, 7], [1.0, 0.3], period=12), "batch_size": Piecewise([0, 20, 41], [1, 3, "full"])},
}
NETWORKS = {DiagonalLinearNetwork: SparseRegression, DeepLinearNetwork: LowRankCompletion,
            ShallowLinearNetwork: ScalarTarget}  # fmt: skip


class Wiggle(StepSchedule):
    """A person's own."""

    def __call__(self, steps):
        return 1 + 0.5 * np.sin(steps)


def data(network):
    kwargs = {
        SparseRegression: {"num_samples": 6, "dim": 4, "sparsity": 2},
        LowRankCompletion: {"shape": (5, 4), "rank": 1},
    }
    return NETWORKS[network](**kwargs.get(NETWORKS[network], {}))


def of(network, generic=False, optimizer=None, schedules=SCHEDULES, **kwargs):
    """A network whose steps have weight decay, but for the shallow one's, which then has no closed form."""
    kappa = 0.0 if network is ShallowLinearNetwork else KAPPA
    optimizer = optimizer or partial(GainSGD, lr=LR, weight_decay=kappa)
    if generic:  # a network with losses of its own is differentiated
        network = type(f"Generic{network.__name__}", (network,), {"losses": partialmethod(network.losses)})
    return network(optimizer=optimizer, schedules=schedules, **kwargs)


def values_at(name, step, num_rows):
    """Lr, weight decay and batch size of one step, by hand."""
    if name == "annealed":
        lr = 0.1 + 0.9 * (1 + math.cos(math.pi * min(step / 90, 1))) / 2
        return LR * lr, KAPPA * (1.0 if step < 20 else 0.0 if step < 50 else 3.0), 2
    if name == "periodic":
        return LR * (1.0 if step % 12 < 7 else 0.3), KAPPA, 1 if step < 20 else 3 if step < 41 else num_rows
    return LR, KAPPA, 2


def own_loop(model, start, steps, member, name):
    """Gradient descent on a member's own loss, by autograd; the rows are those of its stream."""
    theta = [value[member].clone().requires_grad_() for value in start]
    key, rows = model._sampling_keys[member], model.problems.x.shape[1]
    x, y = (part[model.problem_index[member]] for part in (model.problems.x, model.problems.y))
    for step in range(steps):
        lr, kappa, size = values_at(name, step, rows)
        kappa = 0.0 if isinstance(model, ShallowLinearNetwork) else kappa
        drawn = (
            torch.arange(rows) if size >= rows else streams.sample("replacement", key, step, step + 1, size, rows)[0]
        )
        if isinstance(model, DeepLinearNetwork):
            product = theta[2] @ theta[1] @ theta[0]
            loss = (product[x[drawn, 0], x[drawn, 1]] - y[drawn]).square().mean()
        elif isinstance(model, DiagonalLinearNetwork):
            loss = (x[drawn] @ (theta[0] ** 2 - theta[1] ** 2) / 2 - y[drawn]).square().mean() / 2
        else:
            loss = ((theta[0] ** 2 - theta[1] ** 2).sum() / 2 - y[0]).square() / 2
        gradients = torch.autograd.grad(loss, theta)
        theta = [((1 - 2 * lr * kappa) * value - lr * g).detach().requires_grad_()
                 for value, g in zip(theta, gradients, strict=True)]  # fmt: skip
    return theta


def parameters(model):
    return [value.detach().clone() for value in model.parameters()]


def started(network, fit, **kwargs):
    """The parameters a fit begins with."""
    model = of(network, **kwargs)
    recorded = []
    begin = model.begin
    model.begin = lambda step: (recorded.append(parameters(model)), begin(step))
    fit(model, data(network), 1, [MemberGuard(tol=0), Recorder(at=[0])])
    return recorded[0]


EVERYONE = {"schedule": ["constant", "annealed", "periodic"], "seed": 2}


@pytest.mark.parametrize("way", ["closed form", "in torch", "autograd"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_every_path_takes_the_steps_that_the_schedules_name(network, way, fit, monkeypatch):
    if way == "in torch":
        for name in ("diagonal_kernel", "deep_kernel"):
            monkeypatch.setattr(f"dlnlab.kernels.{name}", lambda *_: "not in this test")
        from dlnlab.kernels.shallow import advance_torch

        monkeypatch.setattr("dlnlab.kernels.shallow_kernel", lambda device: (advance_torch, "not in this test"))
    kwargs = {"ensemble": Ensemble(**EVERYONE), "generic": way == "autograd", **sizes_for(network),
              "schedules": own_schedules(network)}  # fmt: skip
    start, model = started(network, fit, **kwargs), of(network, **kwargs)
    fit(model, data(network), STEPS, [MemberGuard(tol=0)])
    assert model.path.startswith({"autograd": "generic"}.get(way, "closed form"))
    assert ("in torch" in model.path) == (way == "in torch")
    for member, label in enumerate(model.ensemble.labels):
        theirs = own_loop(model, start, STEPS, member, label["schedule"])
        for ours, other in zip(model.parameters(), theirs, strict=True):
            # 75 steps of sums of at most 20 terms of order 1, each rounded to 1e-16.
            torch.testing.assert_close(ours[member], other.detach(), atol=2e-13, rtol=0)


def fitted(fit, network, steps=STEPS, max_chunk=None, recorder=None, **kwargs):
    model = of(network, max_chunk=max_chunk, **kwargs)
    fit(model, data(network), steps, [MemberGuard(tol=0, every_n_steps=10), *([recorder] if recorder else [])])
    return model


def assert_same_bits(one, other, member=slice(None)):
    assert all(torch.equal(a[member], b[member]) for a, b in zip(parameters(one), parameters(other), strict=True))


def sizes_for(network):
    return {"batch_size": 1 if network is ShallowLinearNetwork else 2}


def own_schedules(network):
    """Those that the network's one row, or more, allows."""
    if network is not ShallowLinearNetwork:
        return SCHEDULES
    return {name: {k: v for k, v in each.items() if k != "batch_size"} for name, each in SCHEDULES.items()}


@pytest.mark.parametrize("generic", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_a_path_and_its_time_depend_on_no_chunk_and_on_no_company(network, generic, fit):
    kwargs = {"generic": generic, "schedules": own_schedules(network), **sizes_for(network)}
    recorders = [Recorder(at=[0, 13, 40, 64]), Recorder(at=[0, 13, 40, 64])]
    together = fitted(fit, network, ensemble=Ensemble(**EVERYONE), recorder=recorders[0], **kwargs)
    chunks = fitted(fit, network, 75, max_chunk=7, ensemble=Ensemble(**EVERYONE), recorder=recorders[1], **kwargs)
    assert_same_bits(together, chunks)
    whole, cut = (recorder.dataset() for recorder in recorders)
    assert whole.drop_vars(["path"], errors="ignore").equals(cut)
    for member in (1, 2, 5):
        label = together.ensemble.labels[member]
        alone = fitted(fit, network, ensemble=Ensemble(**{k: [v] for k, v in label.items()}), **kwargs)
        for a, b in zip(parameters(together), parameters(alone), strict=True):
            if generic:  # a batched product may round differently with the number of members
                torch.testing.assert_close(a[member], b[0], rtol=1e-12, atol=1e-13)
            else:
                assert torch.equal(a[member], b[0])


@pytest.mark.parametrize("network", [DiagonalLinearNetwork, DeepLinearNetwork], ids=lambda c: c.__name__)
def test_what_the_next_step_is_made_with_is_recorded(network, fit):
    steps, recorder = [0, 6, 7, 20, 41, 75], Recorder(at=[0, 6, 7, 20, 41, 75], variables=["train_loss"])
    model = fitted(fit, network, ensemble=Ensemble(**EVERYONE), recorder=recorder, **sizes_for(network))
    found, rows = recorder.dataset().isel(seed=0), model.problems.x.shape[1]
    for name in EVERYONE["schedule"]:
        own = found.sel(schedule=name)
        lr, kappa, size = zip(*(values_at(name, step, rows) for step in steps), strict=True)
        np.testing.assert_allclose(own.scheduled_lr, lr, rtol=1e-15)
        np.testing.assert_allclose(own.scheduled_weight_decay, kappa, rtol=1e-15)
        assert own.scheduled_batch_size.values.tolist() == list(size)
        times = [math.fsum(values_at(name, k, rows)[0] for k in range(step)) for step in steps]
        np.testing.assert_allclose(own.time, times, rtol=1e-14)  # a sum of 75 numbers, one after the other
        assert own.step_size.item() == LR
    assert found.scheduled_lr.attrs["units"] == "step size of the next step"
    assert torch.equal(model._optimizer.param_groups[0]["lr"], model.scheduled_lr)
    assert torch.equal(model._optimizer.param_groups[0]["initial_lr"], torch.tensor(LR, dtype=torch.float64))


def test_without_schedules_none_are_recorded(fit):
    recorder = Recorder(at=[0])
    model = fitted(fit, DiagonalLinearNetwork, 3, recorder=recorder)
    assert not any(name.startswith("scheduled") for name in recorder.dataset())
    assert model.variables()["scheduled_lr"] == "no member has a schedule"
    assert "initial_lr" not in model._optimizer.param_groups[0]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("generic", [False, True], ids=["closed form", "autograd"])
def test_a_resumed_fit_ends_as_if_there_had_been_no_interruption(network, generic, fit, tmp_path):
    kwargs = {"generic": generic, "schedules": own_schedules(network), **sizes_for(network),
              "ensemble": Ensemble(**EVERYONE)}  # fmt: skip
    whole = fitted(fit, network, **kwargs)
    first = of(network, **kwargs)
    trainer = fit(first, data(network), 30, [MemberGuard(tol=0, every_n_steps=10)])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second, guard = of(network, **kwargs), MemberGuard(tol=0, every_n_steps=10)
    fit(second, data(network), STEPS, [guard], ckpt_path=tmp_path / "x.ckpt")
    assert_same_bits(whole, second)
    assert torch.equal(whole._time(), second._time())
    assert torch.equal(whole.scheduled_lr, second.scheduled_lr)


@settings(max_examples=12)
@given(
    values=st.lists(st.floats(0.1, 2.0), min_size=2, max_size=4),
    period=st.integers(5, 70),
    growth=st.sampled_from([1.0, 1.5, 2.0]),
    sizes=st.lists(st.sampled_from([1, 2, 5, "full"]), min_size=2, max_size=3),
    cuts=st.lists(st.integers(1, 99), max_size=5, unique=True),
    network=st.sampled_from([DiagonalLinearNetwork, DeepLinearNetwork]),
)
def test_any_schedules_in_any_chunks_give_one_path(values, period, growth, sizes, cuts, network):
    begins = [i * period // len(values) for i in range(len(values))]
    own = {
        "lr": Piecewise(begins, values, period=period),
        "weight_decay": Cosine(period, 0.0, restarts=True, growth=growth),
        "batch_size": Piecewise([9 * i for i in range(len(sizes))], sizes),
    }  # fmt: skip
    ensemble, ends = Ensemble(schedule=["constant", "own"], seed=2), []
    for stops in ([100], [*sorted(cuts), 100]):
        model, task = of(network, ensemble=ensemble, schedules={"own": own}), data(network)
        prepare(model, task, 100)
        step = 0
        for stop in stops:
            while step < stop:
                step += model.advance(step, stop - step)
        ends.append((parameters(model), model._time()))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])


def prepare(model, task, steps):
    """Set a model up as a trainer would."""
    from lightning.pytorch import Trainer

    trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", devices=1)  # fmt: skip
    trainer.strategy.connect(model)
    model.trainer = task.trainer = trainer
    trainer.datamodule = task
    task.setup("fit")
    model.setup("fit")


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)], ids=["Adam", "SGD"])
def test_torchs_own_optimizers_take_a_schedule_that_all_members_share(optimizer, fit):
    shared = {"annealed": {"lr": Cosine(90, final=0.1), "weight_decay": Piecewise([0, 20, 50], [1.0, 0.0, 3.0])}}
    made = partial(optimizer, lr=LR, weight_decay=KAPPA)
    model = of(DiagonalLinearNetwork, optimizer=made, schedules=shared, schedule="annealed", ensemble=Ensemble(seed=2))
    fit(model, data(DiagonalLinearNetwork), STEPS, [MemberGuard(tol=0)])
    w = [torch.full((2, 4), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    opt, batch = made(w), model.full_batch()
    for step in range(STEPS):
        for group in opt.param_groups:
            group["lr"], group["weight_decay"], _ = values_at("annealed", step, 6)
        opt.zero_grad()
        batch.losses((w[0] ** 2 - w[1] ** 2) / 2).sum().backward()
        opt.step()
    for ours, theirs in zip(parameters(model), w, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-10, rtol=0)  # Adam divides by roots of small numbers


def test_gain_imbalance_and_mirror_stay_exact(fit):
    recorder = Recorder(at=[0, 30, 2000], variables=["gain", "effective_init"])
    fitted(fit, DiagonalLinearNetwork, 2000, ensemble=Ensemble(**EVERYONE), recorder=recorder, batch_size=2)
    found = recorder.dataset()
    for name in ("imbalance_error", "mirror_error"):
        assert float(found[name].max()) < 1e-11  # 2000 roundings of numbers of order 10


def test_the_laws_of_one_step_hold_at_the_present_lr_and_those_of_paths_are_silent(fit):
    schedules, recorder = {"own": {"lr": Wiggle()}}, Recorder(at=[0, 50])
    model = of(ShallowLinearNetwork, schedules=schedules, ensemble=Ensemble(schedule=["constant", "own"]))
    fit(model, data(ShallowLinearNetwork), 50, [MemberGuard(tol=0), recorder, ShallowTheory(at=[50])])
    last = recorder.dataset().sel(step=50)
    for name in ("eps_law_error", "norm_squared_law_error", "imbalance_law_error", "norm_squared_error"):
        assert (last[name] < 1e-12).all()
    assert last.escape.isnull().values.ravel().tolist() == [False, True]
    np.testing.assert_allclose(last.effective_sharpness, last.scheduled_lr * last.sharpness, rtol=1e-12)


def test_effective_sharpness_is_that_of_the_present_lr(fit):
    recorder = Recorder(at=[0, 30, 60])
    model = of(DiagonalLinearNetwork, schedules=SCHEDULES, schedule="annealed")
    fit(model, data(DiagonalLinearNetwork), 60, [MemberGuard(tol=0), recorder, Sharpness(at=[0, 30, 60])])
    found = recorder.dataset()
    # Weight decay kappa |theta|^2 adds 2 kappa to the Hessian.
    expected = found.scheduled_lr * (found.sharpness + 2 * found.scheduled_weight_decay)
    np.testing.assert_allclose(found.effective_sharpness, expected, rtol=1e-6)  # Lanczos' tolerance


def test_a_batch_that_grows_to_the_full_one_draws_what_its_size_draws(fit):
    grows = {"own": {"batch_size": Piecewise([0, 10], [2, "full"])}}
    for sampling in streams.SAMPLINGS:
        growing = fitted(fit, DeepLinearNetwork, 10, schedules=grows, schedule="own", sampling=sampling)
        fixed = fitted(fit, DeepLinearNetwork, 10, schedules=None, batch_size=2, sampling=sampling)
        assert_same_bits(growing, fixed)
        assert growing.batch_sizes == ["full"]


# What cannot be ------------------------------------------------------------------------------------------------------


class Ragged(StepSchedule):
    def __call__(self, steps):
        return np.ones(3)


def schedules_of(**quantities):
    return {"schedule": "own", "schedules": {"own": quantities}}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "own"}, "schedule = 'own': must be one of constant"),
        ({"schedules": [1]}, r"schedules = \[1\]: must be a mapping"),
        ({"schedules": {"constant": {"lr": Cosine()}}}, "schedules.constant: 'constant' is what a member without"),
        ({"schedules": {"own": Cosine()}}, "schedules.own = .*: must be a mapping of lr, weight_decay, batch_size"),
        (schedules_of(momentum=Cosine()), "schedules.own.momentum: there is no such key; there are lr, weight"),
        (schedules_of(lr=0.1), "schedules.own.lr = 0.1: must be a StepSchedule"),
        (schedules_of(lr=Cosine(50)), "schedules.own.lr = 0 at step 50: a factor of lr must be positive and finite"),
        (schedules_of(lr=Piecewise(values=["full"])), "schedules.own.lr = inf at step 0: a factor of lr must be positive"),
        (schedules_of(lr=Ragged()), r"schedules.own.lr: gave shape \(3,\) for 4096 steps"),
        (schedules_of(weight_decay=Piecewise(values=[-1.0])), "schedules.own.weight_decay = -1 at step 0: .* not negative"),
        (schedules_of(batch_size=Piecewise(values=[7])), "schedules.own.batch_size = 7 at step 0: .* from 1 to 6"),
        (schedules_of(batch_size=Cosine(final=0.5)), "schedules.own.batch_size = 0.99.* at step 1: must be a whole number"),
        (schedules_of(lr=Piecewise([0, 50], [1.0, 400.0])), r"schedules.own: 2 lr weight_decay comes to 1.2 .*below 1"),
        ({**schedules_of(lr=Cosine(200)), "optimizer": GradientFlow}, "schedule: GradientFlow has no steps whose size"),
        ({**schedules_of(lr=Cosine(200)), "optimizer": StochasticGradientFlow}, "StochasticGradientFlow has no steps"),
        ({**schedules_of(lr=Cosine(200)), "optimizer": partial(torch.optim.Adam, lr=0.1),
          "schedule": None, "ensemble": Ensemble(schedule=["constant", "own"])},
         "schedule: Adam takes one lr for all members, so all must share its schedule"),
        ({**schedules_of(weight_decay=Cosine(200)), "optimizer": partial(torch.optim.Rprop, lr=0.1)},
         "schedule: Rprop has no weight_decay that a schedule could change"),
        ({**schedules_of(batch_size=Piecewise(values=[2])), "lr_unit": "mean_square_edge"}, "lr_unit = mean_square_edge"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_before_the_fit(kwargs, message, fit):
    with pytest.raises(ValueError, match=message):
        fit(of(DiagonalLinearNetwork, **{"schedules": None, **kwargs}), data(DiagonalLinearNetwork), 100)


def test_what_is_of_a_constant_step_size_is_refused(fit):
    model = of(DiagonalLinearNetwork, schedule="annealed", optimizer=partial(GainSGD, lr=LR))
    with pytest.raises(ValueError, match=r"Thresholds: it is of a constant lr, .* which the schedules annealed change"):
        fit(model, data(DiagonalLinearNetwork), 50, [Recorder(at=[0]), Thresholds()])


def test_every_network_takes_schedules():
    assert {getattr(models, name) for name in models.__all__ if name.endswith("Network")} - {
        models.LinearNetwork
    } == set(NETWORKS)
