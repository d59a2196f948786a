from functools import partial

import numpy as np
import pytest

import dlnlab
from dlnlab.callbacks import FlowSharpness, ShallowTheory, Sharpness
from dlnlab.models import DiagonalLinearNetwork, ShallowLinearNetwork
from dlnlab.optim import GradientFlow


def problem():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 8))
    return x, x[:, 0] - x[:, 1]


def test_it_is_kept_by_the_flow_and_is_the_sharpness_where_the_flow_ends():
    x, y = problem()
    flow = partial(DiagonalLinearNetwork, optimizer=partial(GradientFlow, times={"log10": [-1, 7, 8]}))
    found = dlnlab.simulate(
        x, y, model=flow, init_scale=[0.1, 1.0], record=["train_loss"], callbacks=[FlowSharpness(), Sharpness(tol=1e-9)]
    )
    end = found.sharpness.isel(step=-1)
    # 1e-7: the sharpness at a loss of 1e-20 instead of 0, and the eigen-solver's
    np.testing.assert_allclose(found.flow_sharpness, found.flow_sharpness * 0 + end, rtol=1e-7)


def test_gradient_descent_from_here_by_small_steps_ends_as_sharp_as_it_says():
    x, y = problem()
    found = dlnlab.simulate(
        x,
        y,
        lr=[0.002, 0.2],
        steps=200_000,
        init_scale=0.4,
        guard={"tol": 1e-24},
        callbacks=[FlowSharpness(at=[0, 10])],
    )
    first, last = found.flow_sharpness.sel(step=0), found.flow_sharpness.isel(step=-1)
    assert np.isclose(first[0], last[0], rtol=0.01)  # the gain is of order lr
    assert not np.isclose(first[1], last[1], rtol=0.01)


def test_it_is_refused_where_nothing_interpolates_and_for_other_networks():
    x, _ = problem()
    with pytest.raises(ValueError, match="FlowSharpness: problem 0: no beta solves"):
        dlnlab.simulate(x.T, x.T.sum(1) ** 2, steps=2, callbacks=[FlowSharpness()])
    with pytest.raises(
        ValueError, match="FlowSharpness: known for DiagonalLinearNetwork and ShallowLinearNetwork, not"
    ):
        FlowSharpness().check(object())
    with pytest.raises(ValueError, match="FlowSharpness: the data are not one row x = 1"):
        dlnlab.simulate(np.ones((2, 1)), np.ones(2), model=ShallowLinearNetwork, steps=2, callbacks=[FlowSharpness()])


def test_of_a_shallow_network_it_is_that_of_its_imbalance_and_where_a_long_flow_ends():
    target, start = 2.0, ShallowLinearNetwork
    shallow = partial(start, width=4, optimizer=partial(GradientFlow, times={"log10": [-2, 3, 6]}))
    found = dlnlab.simulate(
        np.ones((1, 1)), np.array([target]), model=shallow, init_scale=[0.3, 1.5], seed=3,
        record=["train_loss", "beta", "imbalance"], callbacks=[FlowSharpness(), Sharpness(tol=1e-9)],
    )  # fmt: skip
    # 1e-6: the flow's own tolerance, and a loss of 1e-20 instead of 0
    np.testing.assert_allclose(
        found.flow_sharpness, found.flow_sharpness * 0 + found.sharpness.isel(step=-1), rtol=1e-6
    )
    assert float(found.flow_sharpness.min()) > 2 * target  # the flattest minimum's


def test_gradient_descent_lowers_the_shallow_flows_sharpness_as_it_shrinks_the_imbalance():
    found = dlnlab.simulate(
        np.ones((1, 1)), np.array([1.5]), model=partial(ShallowLinearNetwork, width=3), lr=[0.05, 0.2], steps=60,
        init_scale=1.3, callbacks=[FlowSharpness(every_n_steps=1), ShallowTheory(every_n_steps=1)],
    )  # fmt: skip
    first = found.flow_sharpness.isel(step=0)
    spread = np.sqrt(first**2 - 4 * 1.5**2)
    expected = np.sqrt(4 * 1.5**2 + (spread * found.imbalance_ratio) ** 2)
    np.testing.assert_allclose(found.flow_sharpness, expected, rtol=1e-10)
    assert float(found.flow_sharpness.isel(step=-1)[1]) < 0.999 * float(first[1])
