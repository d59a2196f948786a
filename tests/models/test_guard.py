"""When members stop: no unit decides it, and no end of a fit, whatever way a model is advanced."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import dlnlab
from dlnlab import Ensemble
from dlnlab.callbacks import Measurement, MemberGuard, PredictorNorm, Recorder, RunCheckpoint
from dlnlab.checkpoint import AtomicCheckpointIO
from dlnlab.data import LowRankCompletion, ScalarTarget
from dlnlab.models import DeepLinearNetwork, DiagonalLinearNetwork, ShallowLinearNetwork
from dlnlab.models.base import CAUSES, STATUSES

RUNNING, CONVERGED, DIVERGED = range(3)
LR = [0.05, 0.4, 1.2, 4.0, 30.0]
RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(1, 6, 4)) / 2, RNG.normal(size=(1, 6))


class Generic(DiagonalLinearNetwork):
    """The same network without its closed form."""

    def losses(self, batch):
        return super().losses(batch)


class Own(DiagonalLinearNetwork):
    """A loss of its own, as the fourth power of the errors."""

    def losses(self, batch):
        return (batch.predictions(self.predictor()[batch.members]) - batch.targets).square().square().mean(-1)


@dataclass
class Way:
    """One way members are advanced, in units of y: `model(s, axes)` and `data(s)` on targets s times as large."""

    model: Any
    data: Any = lambda s: oracles.GivenData(X, s * Y)
    power: float = 1.0
    """Of s that step sizes are divided by."""

    def train(self, fit, steps, s=1.0, guard=None, callbacks=(), **options):
        axes = {"lr": [lr / s**self.power for lr in LR]}
        model, recorder = self.model(s, axes), Recorder(at=[0, 17, 40, 50, 55, 90, 100])
        guard = MemberGuard(**{"every_n_steps": 25, "tol": 0.0, **(guard or {})})
        options = {"plugins": [AtomicCheckpointIO()], **options}
        trainer = fit(model, self.data(s), steps, [guard, *callbacks, recorder], **options)
        return model, recorder.dataset(), trainer


def of_matrices(s):
    return LowRankCompletion(shape=(3, 4), spectrum=[2.0 * s], factors="gaussian")


def product(cls, **arguments):
    """A network whose predictor is a product of two factors of scale sqrt(s)."""
    return lambda s, axes: cls(ensemble=Ensemble(**axes), init_scale=0.5 * s**0.5, **arguments)


WAYS = {
    "closed form": Way(product(DiagonalLinearNetwork)),
    "one row": Way(product(DiagonalLinearNetwork, batch_size=1)),
    "float32": Way(product(DiagonalLinearNetwork, dtype="float32")),
    "generic": Way(product(Generic)),
    "own loss": Way(product(Own), power=3.0),
    "shallow": Way(product(ShallowLinearNetwork, width=3, init="orthogonal"), lambda s: ScalarTarget(target=float(s))),
    "entries": Way(product(DeepLinearNetwork, depth=2, batch_size=1), of_matrices),
    "matrix of inputs": Way(product(DeepLinearNetwork, depth=2)),
}
NUM_WAYS = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@NUM_WAYS
def test_no_unit_of_the_targets_decides_who_has_diverged(fit, way):
    model, _, _ = way.train(fit, 60)
    assert set(model.status.tolist()) == {RUNNING, DIVERGED}
    for s in (2.0**-16, 2.0**20):  # powers of four, so that sqrt(s) is exact
        other, _, _ = way.train(fit, 60, s)
        assert torch.equal(other.status, model.status)
        assert torch.equal(other.stopped_at, model.stopped_at)
        assert torch.equal(other.diverged_by, model.diverged_by)
        assert torch.equal(other.predictor(), s * model.predictor())
        assert (
            other.reference_loss.tolist()
            == (s ** (4 if way is WAYS["own loss"] else 2) * model.reference_loss).tolist()
        )


def test_targets_in_any_unit_are_learnt_alike_from_python():
    for s in (1e-8, 3e5, 1e12):
        found = dlnlab.simulate(
            X[0], s * Y[0], lr=np.array(LR) / s, init_scale=0.5 * s**0.5, steps=150, guard={"tol": 0}
        )
        last = found.isel(step=-1)
        assert last.status.values.tolist() == ["running"] * 3 + ["diverged"] * 2
        assert last.stopped_at.values.tolist() == [-1, -1, -1, 0, 0]


@pytest.mark.parametrize("larger", ["zero predictor", "first"])
def test_a_loss_is_bounded_by_the_larger_of_the_first_one_and_the_zero_predictors(fit, larger):
    bound, lr, (x, y) = 1.5, np.array(LR)[:, None], (X[0], Y[0])
    start = np.linalg.lstsq(x, y, rcond=None)[0] * (0.5 if larger == "zero predictor" else -0.5)
    plus, minus = np.sqrt(9 + 2 * start), np.full(4, 3.0)
    model = DiagonalLinearNetwork(dim=4, init_scale=3.0, ensemble=Ensemble(lr=LR))
    model.w_plus.data.copy_(torch.from_numpy(plus))

    def loss(beta):
        return np.square(beta @ x.T - y).mean(-1) / 2

    reference = max(loss(start), loss(0 * start))
    assert reference == loss(start if larger == "first" else 0 * start)
    moved = lr * (x.T @ (x @ start - y) / len(x))  # a step multiplies the factors by 1 -+ this
    above = loss(((plus * (1 - moved)) ** 2 - (minus * (1 + moved)) ** 2) / 2) > bound * reference
    assert set(above) == {True, False}
    fit(model, oracles.GivenData(X, Y), 1, [MemberGuard(bound=bound, tol=0.0)])
    np.testing.assert_allclose(model.reference_loss, reference, rtol=1e-12)  # beta cancels in squares of 3
    assert [CAUSES[code] for code in model.diverged_by.tolist()] == ["loss" if each else "" for each in above]


@pytest.mark.parametrize("cls", [DiagonalLinearNetwork, Generic])
def test_where_both_losses_are_zero_only_what_is_not_finite_has_diverged(fit, cls):
    model = cls(ensemble=Ensemble(lr=[0.1, 1e150]), label_noise=1.0)
    fit(model, oracles.GivenData(X, 0 * Y), 60, [MemberGuard(tol=0.0)])
    assert model.reference_loss.tolist() == [0, 0]
    assert model.full_losses()[0] > 0
    assert model.status.tolist() == [RUNNING, DIVERGED]
    assert CAUSES[int(model.diverged_by[1])] == "not finite"


def test_a_member_that_begins_beyond_all_numbers_has_diverged_at_once(fit):
    model = DiagonalLinearNetwork(dim=4, ensemble=Ensemble(lr=[0.1, 0.2]))
    model.w_plus.data[0] = 1e200
    fit(model, oracles.GivenData(X, Y), 10, [MemberGuard()])
    assert model.status.tolist() == [DIVERGED, RUNNING]
    assert CAUSES[int(model.diverged_by[0])] == "not finite"


# The end of a fit -----------------------------------------------------------------------------------------------------


def state_of(model):
    kept = {name: getattr(model, name) for name in ("status", "stopped_at", "diverged_by", "reference_loss")}
    return {**model.member_state(), **kept}


@NUM_WAYS
def test_the_last_step_is_a_check_and_a_fit_that_goes_on_is_the_one_that_was_never_cut(fit, tmp_path, way):
    def train(steps, **options):
        checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=40, save_top_k=-1)
        callbacks = [PredictorNorm(every_n_steps=17), checkpoints]
        return way.train(fit, steps, guard={"tol": 3e-2}, callbacks=callbacks, enable_checkpointing=True, **options)

    whole, records, _ = train(110)
    for cut in (10, 40, 55):
        model, before, trainer = train(cut)
        last = before.isel(step=-1)
        assert last.step == cut
        assert np.isfinite(last.train_loss).all()
        assert np.isfinite(last.l1_norm).all()
        assert (last.status != "running").any()
        assert [STATUSES[code] for code in model.status.tolist()] == last.status.values.ravel().tolist()
        stopped = model.stopped_at[model.status == DIVERGED]
        assert (stopped == cut // 25 * 25).all() or (stopped % 25 == 0).all()
        trainer.save_checkpoint(end := tmp_path / "end.ckpt")
        sources = [end, tmp_path / "step=40.ckpt"] if cut == 40 else [end]  # written at the end, and on the way
        for source in sources:
            saved = torch.load(source, weights_only=True)["state_dict"]
            assert torch.equal(saved["status"], model.status)
            assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
            longer, after, _ = train(110, ckpt_path=source)
            for (name, one), (_, other) in zip(state_of(whole).items(), state_of(longer).items(), strict=True):
                assert torch.equal(one, other), name
            later = [step for step in after.step.values if step > cut]
            assert records.sel(step=later).drop_vars("step").equals(after.sel(step=later).drop_vars("step"))
        again, repeated, _ = train(cut, ckpt_path=end)
        assert all(
            torch.equal(one, other)
            for one, other in zip(*(state_of(each).values() for each in (model, again)), strict=True)
        )
        names = list(repeated)  # in memory it has what was recorded at the end alone
        assert (
            repeated[names]
            .isel(step=-1, missing_dims="ignore")
            .equals(last[names].drop_vars([] if "step" in repeated else "step"))
        )


class Looks(Measurement):
    """How often it was asked."""

    count = 0

    def measure(self, model, batch):
        self.count += 1
        return {"looks": torch.full((model.num_members,), float(self.count))}

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.count = state["count"]


def test_a_measurement_at_the_end_alone_leaves_no_trace_in_a_fit_that_goes_on(fit, tmp_path):
    def train(steps, **options):
        checkpoint = RunCheckpoint()
        checkpoint.dirpath = str(tmp_path)
        callbacks = [Looks(every_n_steps=20), checkpoint]
        _, records, _ = WAYS["closed form"].train(fit, steps, callbacks=callbacks, enable_checkpointing=True, **options)
        return records.looks.isel(lr=0, step=-1).item()

    assert train(30) == 3  # at 0, 20 and 30
    assert train(60, ckpt_path=tmp_path / "last.ckpt") == train(60)


def test_a_short_fit_from_python_says_who_has_diverged():
    for steps in (1, 50, 99, 100, 150):
        last = dlnlab.simulate(X[0], Y[0], lr=[0.1, 30.0], steps=steps).isel(step=-1)
        assert np.isfinite(last.train_loss).all()
        if steps > 1:
            assert last.status.values.tolist() == ["running", "diverged"]
            assert last.stopped_at.values.tolist() == [-1, 0]
