"""RankTracker and RankJumps on networks whose singular values are prescribed."""

import pytest
import torch
from lightning.pytorch import LightningModule

from dlnlab import Ensemble
from dlnlab.callbacks import RankJumps, RankTracker, Recorder
from dlnlab.data import LowRankCompletion
from dlnlab.models import DeepLinearNetwork


class Plain(LightningModule):
    """Somebody's own network with a bias and a layer that belongs to no product."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        self.head = torch.nn.Linear(7, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.body(x.float()).sum(1) - y.float()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Diagonal(LightningModule):
    """One diagonal matrix."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))


def feed(callback, paths):
    """Show a callback diagonal matrices, one after another, at steps 0, 10, 20, ...; returns all it said."""
    model, found = Diagonal(), []
    for i, values in enumerate(paths):
        model.weight.data = torch.diag(torch.tensor(values, dtype=torch.float64))
        callback._step = 10 * i
        found.append(callback.measure(model, None))
    return found


PATH = [(1.0, 0.5, 0.1), (1.0, 0.5, 0.01), (1.0, 0.5, 0.03), (1.0, 0.5, 5e-5), (1.0, 0.5, 0.01), (1.0, 5e-5, 5e-5),
        (1.0, 0.03, 5e-5)]  # fmt: skip


def test_the_rank_has_hysteresis():
    ranks = [int(found["rank"]) for found in feed(RankTracker(at=[0]), PATH)]
    assert ranks == [3, 3, 3, 2, 2, 1, 2]  # a plain threshold of 0.02 says 3, 2, 3, 2, 2, 1, 2
    assert [int(found["rank"]) for found in feed(RankTracker(alive=0.02, dead=0.02, at=[0]), PATH)] == [
        3,
        2,
        3,
        2,
        2,
        1,
        2,
    ]


def test_what_shrinks_to_nothing_has_rank_zero_whatever_its_proportions():
    ranks = [int(found["rank"]) for found in feed(RankTracker(at=[0]), [(1.0, 0.5, 0.0), (1e-7, 1e-7, 1e-7)])]
    assert ranks == [2, 0]


def test_jumps_are_counted_with_their_steps():
    found = feed(RankJumps(at=[0]), PATH)
    assert [float(each["jumps_down"]) for each in found] == [0, 0, 0, 1, 1, 2, 2]
    assert [float(each["jumps_up"]) for each in found] == [0, 0, 0, 0, 0, 0, 1]
    steps, waits = found[-1]["jump_steps"][0], found[-1]["waiting_times"][0]
    assert steps.tolist()[1:] == [50.0, 30.0]
    assert waits.tolist()[1:] == [20.0, 30.0]
    assert steps[0].isnan()


def test_exits_from_a_set_are_counted():
    found = feed(RankJumps(set_rank=2, alpha=0.02, rank_slack=0.2, at=[0]), PATH)
    assert [float(each["in_set"]) for each in found] == [0, 0, 0, 1, 0, 1, 1]
    assert [float(each["set_exits"]) for each in found] == [0, 0, 0, 0, 1, 1, 1]


def test_a_matrix_that_is_not_finite_has_no_singular_values_and_keeps_its_rank():
    tracker = RankTracker(at=[0])
    found = feed(tracker, [(1.0, 0.5, 0.1), (float("nan"), 1.0, 1.0)])
    assert found[1]["singular_values"].isnan().all()
    assert int(found[1]["rank"]) == 3


def test_a_network_is_measured_as_numpy_measures_it(fit):
    recorder, ensemble = Recorder(at=[0, 20]), Ensemble(lr=[0.01, 0.05], seed=2)
    model = DeepLinearNetwork(width=[4, 6], ensemble=ensemble)
    fit(model, LowRankCompletion(shape=(5, 7)), 20, [recorder, RankTracker(), RankJumps(set_rank=1)])
    found = recorder.dataset()
    product = model.predictor().detach()
    expected = torch.linalg.svdvals(product)
    torch.testing.assert_close(torch.from_numpy(found.singular_values.values[:, :, -1].reshape(4, 5)), expected)
    assert found.singular_values.dims == ("lr", "seed", "step", "index")
    assert found.singular_values_weights_1.shape == (2, 2, 2, 4)
    assert (found["rank"].values[..., -1] == 4).all()
    stable = product.square().sum((1, 2)) / torch.linalg.matrix_norm(product, 2) ** 2
    torch.testing.assert_close(torch.from_numpy(found.stable_rank.values[..., -1].ravel()), stable)


def test_somebodys_own_module_is_measured_by_name(fit):
    recorder = Recorder(every_n_steps=1)
    model = Plain()
    fit(model, _rows(), 3, [recorder, RankTracker(pattern="body.*", every_n_steps=1)])
    found = recorder.dataset()
    product = (model.body[1].weight @ model.body[0].weight).detach()
    last = found.singular_values.dropna("step", how="all").isel(step=-1).values.ravel()
    torch.testing.assert_close(torch.from_numpy(last).float(), torch.linalg.svdvals(product))
    assert "singular_values_body_0_weight" in found
    assert "singular_values_head_weight" not in found


def _rows():
    from dlnlab.data import SparseRegression

    return SparseRegression(5, 4, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "nothing*"}, "no weight matrix of Plain is called 'nothing\\*'"),
        ({}, r"matrices of shapes \(3, 4\), \(2, 3\), \(1, 7\) have no product; give a pattern"),
    ],
)
def test_what_cannot_be_measured_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RankTracker(**kwargs, at=[0]).check(Plain())


def test_thresholds_must_be_in_order():
    with pytest.raises(ValueError, match=r"dead = 0.5: must be at most alive = 0.02"):
        RankTracker(dead=0.5)


def test_a_resume_goes_on_counting():
    first, second = RankJumps(at=[0]), RankJumps(at=[0])
    whole = feed(RankJumps(at=[0]), PATH)
    feed(first, PATH[:4])
    second.load_state_dict(first.state_dict())
    model = Diagonal()
    for i, values in enumerate(PATH[4:], 4):
        model.weight.data = torch.diag(torch.tensor(values, dtype=torch.float64))
        second._step = 10 * i
        found = second.measure(model, None)
    for name, value in whole[-1].items():
        torch.testing.assert_close(found[name], value, equal_nan=True)
