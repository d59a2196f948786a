"""The theory's exact identities as checks of a run."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

import dlnlab
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.models.base import INVARIANTS


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6, 9))
    teacher = np.zeros(9)
    teacher[:2] = 1.0
    return x, x @ teacher


@settings(max_examples=8)
@given(st.integers(0, 1000), st.floats(0.01, 1.2), st.floats(0, 0.01), st.sampled_from(["float64", "float32"]))
def test_they_hold_to_rounding_in_every_run_the_edge_of_stability_included(seed, lr, kappa, dtype):
    x, y = problem(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        found = dlnlab.simulate(
            x, y, model=partial(DiagonalLinearNetwork, dtype=dtype), lr=[lr, lr / 3], batch_size=[1, 2, "full"],
            weight_decay=kappa, seed=2, steps=3000, guard={"tol": 0},
        )  # fmt: skip
    eps = np.finfo(dtype).eps
    for name in INVARIANTS:
        # A few roundings in each of 3000 steps, and 1/|1 - x| in the one where x is nearest to 1
        assert not (found[name] > 1e6 * eps).any(), name


class Tamper(Callback):
    """Changes a factor at step 200."""

    def next_event(self, step):
        return 200 if step < 200 else None

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 200:
            with torch.no_grad():
                module.w_minus[1] *= 1 + 1e-6


def test_a_violation_is_recorded_and_said_once_with_member_step_and_size():
    x, y = problem()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = dlnlab.simulate(
            x, y, lr=[0.01, 0.02], steps=400, guard={"tol": 0}, callbacks=[Tamper()],
            record={"every_n_steps": 50, "variables": ["gain"]},
        )  # fmt: skip
    said = [str(w.message) for w in heard if "identity" in str(w.message)]
    assert len(said) == 2  # imbalance and mirror form, each once
    assert all("member {'lr': 0.02} is 1e-06 at step 250" in text for text in said)
    error = found.imbalance_error
    assert (error.sel(lr=0.01) < 1e-12).all() and np.isclose(error.sel(lr=0.02, step=400), 1e-6, rtol=1e-3)


def test_they_can_be_left_out_and_are_not_asked_of_factors_in_which_they_cancel():
    x, y = problem()
    found = dlnlab.simulate(x, y, steps=20, record={"at": [0, 10], "invariants": False})
    assert not set(INVARIANTS) & set(found.data_vars)

    class Product(DiagonalLinearNetwork):
        def parameter_groups(self):
            return [{"params": [self.w_plus, self.w_minus], "form": "product"}]

        def predictor(self):
            return self.w_plus * self.w_minus

    found = dlnlab.simulate(x, y, model=Product, steps=20, record=["train_loss"])
    assert not set(INVARIANTS) & set(found.data_vars)


def test_the_sandwich_of_the_gain_is_not_claimed_beyond_its_range():
    # One coordinate, one row: x = lr g(0) = lr y at the first step.
    for lr, defined in ((0.89, True), (0.9, False)):
        found = dlnlab.simulate([[1.0]], [1.0], lr=lr, steps=3, record=["gain"], init_scale=1e-3)
        error = found.gain_sandwich_error.values
        assert error[0] == 0 and (error[-1] == 0) == defined and np.isnan(error[-1]) != defined


@pytest.mark.parametrize("x", [0.3, 0.8, 0.8926])
def test_a_step_within_its_range_obeys_the_sandwich(x):
    gain = dlnlab.theory.gain_increment(x).item()
    assert x**2 <= gain <= 2 * x**2
