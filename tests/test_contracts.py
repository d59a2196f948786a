"""Promises of everything in the rosters."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer

import dlnlab
from dlnlab import callbacks, data, figures, models, optim
from dlnlab.callbacks import CompletionBaselines, Measurement, RankTracker, Recorder
from dlnlab.data import LowRankCompletion, ScalarTarget, SparseRegression, SyntheticData
from dlnlab.figures import Figure
from dlnlab.models import LinearNetwork
from dlnlab.optim import StepSchedule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
OF_MATRICES = (RankTracker, CompletionBaselines, callbacks.DeepTheory)
BASES = (LinearNetwork, SyntheticData, Measurement, Figure, StepSchedule)


def roster(room, base=object):
    found = [getattr(room, name) for name in room.__all__]
    return [c for c in found if inspect.isclass(c) and issubclass(c, base) and c not in BASES]


NETWORKS = roster(models, LinearNetwork)
MEASUREMENTS = roster(callbacks, Measurement)
SCHEDULES = roster(optim, StepSchedule)
EVERYTHING = [c for room in (models, data, optim, callbacks, figures) for c in roster(room)]


PROBLEMS = {models.ShallowLinearNetwork: ScalarTarget}
"""What a network trains on here, where it is not sparse regression, ..."""
MOST_ROWS = {models.ShallowLinearNetwork: 1}
"""... the rows of a batch where it has fewer than two, ..."""
MEASURED = {
    callbacks.ShallowTheory: models.ShallowLinearNetwork,
    callbacks.LyapunovExponent: models.ShallowLinearNetwork,
}
"""... and the network of a measurement, where it is not the diagonal one."""


def fit(network, steps, *extra, dataset=None):
    trainer = Trainer(max_steps=steps, callbacks=list(extra), **QUIET)
    trainer.fit(network, dataset or PROBLEMS.get(type(network), lambda: SparseRegression(5, 3, 2))())
    return network


def assert_same_path(network, one, other):
    if network.path == "closed form":
        assert torch.equal(one, other)
    else:
        # Batched matrix products may round differently with the number of members: one rounding a step, 200 stable steps.
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("thing", EVERYTHING, ids=lambda c: c.__name__)
def test_everything_is_documented_with_all_its_arguments(thing):
    text = inspect.getdoc(thing)
    assert text
    for name, parameter in inspect.signature(thing.__init__).parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD and thing.__module__.startswith("dlnlab"):
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            assert f"{name}:" in text or thing in (models.Batch,), f"{thing.__name__} does not document {name}"


@pytest.mark.parametrize(
    "thing", [*NETWORKS, *roster(data), *MEASUREMENTS, *roster(figures), *SCHEDULES], ids=lambda c: c.__name__
)
def test_every_constructor_argument_has_a_default_that_works(thing):
    thing()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_a_member_in_company_follows_the_path_it_follows_alone(network):
    company = dlnlab.Ensemble(lr=[0.05, 0.1], batch_size=["full", MOST_ROWS.get(network, 2)], seed=3)
    together = fit(network(ensemble=company), 200)
    for member in (0, 4, 11):
        label = company.labels[member]
        alone = fit(network(ensemble=dlnlab.Ensemble(**{name: [value] for name, value in label.items()})), 200)
        assert_same_path(together, alone.predictor()[0], together.predictor()[member])


@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_the_order_of_members_does_not_matter(network):
    forward = fit(network(ensemble=dlnlab.Ensemble(lr=[0.05, 0.1], seed=[0, 1, 2])), 200)
    backward = fit(network(ensemble=dlnlab.Ensemble(lr=[0.1, 0.05], seed=[2, 1, 0])), 200)
    assert_same_path(forward, forward.predictor().flip(0), backward.predictor())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_no_member_feels_another_members_loss(network):
    model = fit(network(ensemble=dlnlab.Ensemble(lr=[0.1], seed=3)), 3)
    model.zero_grad()  # a generic step leaves its own
    model.losses(model.full_batch())[1].backward()
    for parameter in model.parameters():
        assert parameter.grad[1].abs().sum() > 0
        assert parameter.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("network", NETWORKS, ids=lambda c: c.__name__)
def test_the_same_seed_gives_the_same_run_and_another_root_another(network):
    paths = [
        fit(network(ensemble=dlnlab.Ensemble(lr=[0.02], batch_size=[1], seed=2, root=root)), 10).predictor()
        for root in (0, 0, 1)
    ]
    assert torch.equal(paths[0], paths[1])
    assert not torch.isclose(paths[0], paths[2]).all(1).any()


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda c: c.__name__)
def test_a_measurement_states_one_value_per_member_and_changes_nothing(measurement):
    ensemble = {"lr": [0.05, 0.1], "seed": 2}
    recorder = Recorder(at=[0, 7], variables=["beta"])
    network, dataset = MEASURED.get(measurement, models.DiagonalLinearNetwork), None
    if issubclass(measurement, OF_MATRICES):
        network, dataset = models.DeepLinearNetwork, LowRankCompletion((4, 3))
    measured = fit(network(ensemble=dlnlab.Ensemble(**ensemble)), 20, recorder, measurement(at=[3, 7]), dataset=dataset)
    bare = fit(network(ensemble=dlnlab.Ensemble(**ensemble)), 20, dataset=dataset)
    assert torch.equal(measured.predictor(), bare.predictor())
    results = recorder.dataset()
    found = []
    for name in measurement(at=[0]).names(measured):
        assert results[name].dims[:3] == ("lr", "seed", "step")
        found.append(results[name].dropna("step", how="all").step.values.tolist())
        # A ratio of gains is not defined at step 0, nor a theorem about an end before it has come.
        assert found[-1] in ([0, 3, 7, 20], [3, 7, 20], [])
    assert [0, 3, 7, 20] in found or [3, 7, 20] in found


OF_A_LAW = [measurement for measurement in MEASUREMENTS if measurement.of_squared_loss or measurement.of_product]
OTHERS = {"losses": lambda network, batch: 3 * super(type(network), network).losses(batch).cosh(),
          "predictor": lambda network: 2 * super(type(network), network).predictor()}  # fmt: skip


@pytest.mark.parametrize("own", OTHERS)
@pytest.mark.parametrize("measurement", OF_A_LAW, ids=lambda c: c.__name__)
def test_a_formula_of_one_loss_or_network_is_refused_to_another_unless_that_says_it_is_the_same(measurement, own):
    network = MEASURED.get(measurement, models.DiagonalLinearNetwork)
    problems = PROBLEMS.get(network, lambda: SparseRegression(5, 3, 2))
    other = type("Other", (network,), {own: OTHERS[own]})
    about = "of_squared_loss" if own == "losses" else "of_product"
    if getattr(measurement, about):
        with pytest.raises(ValueError, match=f"Other has its own {own}"):
            fit(other(ensemble=dlnlab.Ensemble(lr=[0.05])), 3, measurement(at=[0]), dataset=problems())
    says = {"squared_loss_refusal": lambda network: None, "product_refusal": lambda network: None}
    same = type("Same", (network,), {own: OTHERS[own], **says})
    fit(same(ensemble=dlnlab.Ensemble(lr=[0.05])), 1, measurement(at=[0]), dataset=problems())


@pytest.mark.parametrize(
    "thing",
    [*NETWORKS, *roster(data, SyntheticData), *MEASUREMENTS, *roster(figures, Figure)],
    ids=lambda c: c.__name__,
)
def test_no_argument_takes_a_methods_place(thing):
    made = thing()
    hidden = [name for name in vars(made) if callable(getattr(type(made), name, None))]
    assert hidden == []


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda c: c.__name__)
def test_a_schedule_says_of_a_step_what_it_says_of_it_alone(schedule):
    steps = np.array([0, 1, 7, 999, 1000, 1001, 10**9])
    together = schedule()(steps)
    assert together.dtype == np.float64
    np.testing.assert_allclose(together, np.concatenate([schedule()(steps[i : i + 1]) for i in range(len(steps))]))


@pytest.mark.parametrize("optimizer", roster(optim, Optimizer), ids=lambda c: c.__name__)
def test_an_optimizer_saved_and_loaded_takes_the_same_next_step(optimizer):
    assert issubclass(optimizer, Optimizer)

    def start():
        u, v = torch.tensor([[1.0, 0.5], [0.3, 2.0]]), torch.tensor([[0.2, 0.1], [0.4, 0.7]])
        pair = [torch.nn.Parameter(u), torch.nn.Parameter(v)]
        return pair, optimizer([tuple(pair)], lr=torch.tensor([0.1, 0.02]))

    def step(pair, opt):
        def rows_and_residuals():
            return torch.eye(2), (pair[0] * pair[1] - 1).detach()

        def losses():
            opt.zero_grad()
            found = ((pair[0] * pair[1] - 1) ** 2).sum(-1)
            found.sum().backward()
            return found.detach()

        opt.step(rows_and_residuals if optimizer is optim.StochasticGradientFlow else losses)

    (one, first), (two, second) = start(), start()
    for _ in range(29):
        step(one, first)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for source, target in zip(one, two, strict=True):
            target.copy_(source)
    for _ in range(31):
        step(one, first)
        step(two, second)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(first.imbalance, second.imbalance)


def test_the_packages_rooms_import_downwards_only():
    order = (
        "checks strict_yaml curvature streams theory files run_directory schedule ensemble config kernels event_files "
        "optim arrays delimited tables data metrics models results export checkpoint start recorder callbacks figures "
        "messages fitting study interactive cli"
    ).split()
    package = Path(dlnlab.__file__).parent
    for file in package.rglob("*.py"):
        room = file.relative_to(package).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        assert room in order, f"{room} has no place in the order of rooms"
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("dlnlab"):
                names = [words[1].split(".")[1]] if "." in words[1] else [w.strip(",()") for w in words[3:]]
                for name in names:
                    if name in order and name != room:
                        assert order.index(name) < order.index(room), (
                            f"{file.name} imports {name}, which stands above it"
                        )
