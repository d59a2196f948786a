"""The theory of deep networks, against direct minimisation, explicit steps and each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from dlnlab import theory
from dlnlab.data import LowRankCompletion


def random_weights(sizes, members=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(members, b, a, generator=generator, dtype=torch.float64) / a**0.5 for a, b in pairwise(sizes)]


def entries(**kwargs):
    data = LowRankCompletion(**kwargs)
    data.setup()
    return data.problems.x[0], data.problems.y[0], data.matrix_shape, data.problems.teacher[0]


# Costs and laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3])
def test_the_representation_cost_is_the_least_sum_of_squares(depth):
    matrix = torch.tensor([[2.0, 0.3], [-0.5, 0.7]], dtype=torch.float64)

    def product(numbers):
        found = np.eye(2)
        for layer in numbers.reshape(depth, 2, 2):
            found = layer @ found
        return found

    constraint = {"type": "eq", "fun": lambda numbers: (product(numbers) - matrix.numpy()).ravel()}
    rng, best = np.random.default_rng(0), np.inf
    for _ in range(5):
        start = rng.normal(size=4 * depth)
        options = {"maxiter": 500, "ftol": 1e-14}
        found = minimize(
            lambda t: t @ t, start, jac=lambda t: 2 * t, constraints=constraint, method="SLSQP", options=options
        )
        if found.success:
            best = min(best, found.fun)
    assert float(theory.representation_cost(matrix, depth)) == pytest.approx(best, rel=1e-7)  # what SLSQP reaches


def test_entry_gradients_are_autograds():
    weights = [w.requires_grad_() for w in random_weights([5, 4, 6, 3])]
    row, column = torch.tensor([0, 2, 1]), torch.tensor([4, 0, 3])
    product = weights[2] @ weights[1] @ weights[0]
    entry = product[torch.arange(3), row, column]
    entry.sum().backward()
    found, gradients = theory.entry_gradients([w.detach() for w in weights], row, column)
    torch.testing.assert_close(found, entry.detach())
    for w, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(gradient, w.grad)


@given(seed=st.integers(0, 10**6), lr=st.floats(1e-4, 2.0), kappa=st.floats(0, 0.2), depth=st.integers(2, 5))
def test_imbalance_and_norm_obey_their_laws_at_any_step(seed, lr, kappa, depth):
    weights = random_weights([4, *[3] * (depth - 1), 5], seed=seed)
    row, column = torch.tensor([0, 4, 1]), torch.tensor([3, 0, 2])
    entry, gradients = theory.entry_gradients(weights, row, column)
    residual = entry - torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradients = [2 * residual[:, None, None] * g for g in gradients]
    lr, kappa = torch.full((3,), lr, dtype=torch.float64), torch.full((3,), kappa, dtype=torch.float64)
    keep = (1 - 2 * lr * kappa)[:, None, None]
    after = [keep * w - lr[:, None, None] * g for w, g in zip(weights, gradients, strict=True)]
    size = sum(w.square().sum() for w in after) + sum(w.square().sum() for w in weights)
    predicted = theory.next_layer_imbalance(weights, gradients, lr, kappa)
    for found, expected in zip(theory.layer_imbalance(after), predicted, strict=True):
        # Rounding of the weights' squares and of the steps' that cancel.
        torch.testing.assert_close(found, expected, atol=1e-14 * float(size), rtol=0)
    norm = theory.next_square_norm(weights, gradients, 2 * residual * entry, lr, kappa)
    direct = sum(w.square().sum((-1, -2)) for w in after)
    torch.testing.assert_close(norm, direct, atol=1e-14 * float(size), rtol=0)  # the same


@given(
    seed=st.integers(0, 2**31), depth=st.integers(2, 4), kappa=st.floats(0.01, 2), target=st.floats(-3, 3),
    excess=st.floats(1.001, 4), share=st.floats(0.01, 1),
)  # fmt: skip
def test_no_step_leaves_the_absorbing_ball(seed, depth, kappa, target, excess, share):
    kappa, largest = torch.tensor(kappa, dtype=torch.float64), torch.tensor(max(abs(target), 0.1), dtype=torch.float64)
    ball = excess * theory.absorbing_norm(kappa, largest, depth)
    lr = theory.absorbing_lr(ball, kappa, largest, depth)
    assert lr > 0
    weights = random_weights([3, *[2] * (depth - 1), 4], seed=seed)
    size = sum(w.square().sum((-1, -2)) for w in weights)
    weights = [w * (share * ball / size).sqrt()[:, None, None] for w in weights]
    entry, gradients = theory.entry_gradients(weights, torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1]))
    along = 2 * lr * (entry - target)[:, None, None]
    after = [(1 - 2 * lr * kappa) * w - along * g for w, g in zip(weights, gradients, strict=True)]
    assert (sum(w.square().sum((-1, -2)) for w in after) <= ball * (1 + 1e-12)).all()  # rounding of the boundary


# Ranks ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=6))
def test_ranks_lie_between_one_and_the_number_of_singular_values(values):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    stable, effective = float(theory.stable_rank(s)), float(theory.effective_rank(s))
    assert 1 - 1e-12 <= stable <= len(values) + 1e-12
    assert 1 - 1e-12 <= effective <= len(values) * (1 + 1e-12)
    assert float(theory.smooth_rank(s, 1e-3)) == pytest.approx(len(values))
    assert float(theory.smooth_rank(s, 1e9)) < 1e-6


def test_a_set_has_the_parameters_of_its_rank():
    u = torch.eye(4, dtype=torch.float64)
    weights = [torch.diag_embed(torch.tensor([[2.0, 0.0, 0, 0], [2.0, 2.0, 0, 0]], dtype=torch.float64)) @ u] * 3
    inside = [theory.in_absorbing_set(weights, r, 0.1, 0.5).tolist() for r in range(3)]
    assert inside == [[False, False], [True, False], [True, True]]
    assert theory.in_absorbing_set(weights, 2, 0.1, 0.5, bound=5.0).tolist() == [True, False]
    tilted = [weights[0], 1.5 * weights[1], weights[2]]
    assert theory.in_absorbing_set(tilted, 2, 0.1, 0.5, balance=1e3).tolist() == [True, True]
    assert theory.in_absorbing_set(tilted, 2, 0.1, 0.5, balance=30.0).tolist() == [True, False]  # 25 for each direction
    broken = [weights[0], torch.full_like(weights[1], torch.nan), weights[2]]
    assert theory.in_absorbing_set(broken, 4, 0.1, 0.5).tolist() == [False, False]


# Completion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.02, 0.3])
def test_two_layers_with_weight_decay_are_nuclear_norm_completion(penalty):
    places, values, shape, _ = entries(shape=(5, 6), rank=2, num_observed=20, noise_std=0.2)
    matrix, gap = theory.nuclear_norm_completion(places, values, shape, penalty)
    assert gap <= 1e-10
    rows, columns = places.T.numpy()

    def objective(numbers):  # the network's own loss and penalty, kappa = lambda/2, width 5
        w1, w2 = numbers[:30].reshape(5, 6), numbers[30:].reshape(5, 5)
        error = np.zeros(shape)
        error[rows, columns] = (w2 @ w1)[rows, columns] - values.numpy()
        slope = 2 / len(values) * error
        gradient = np.concatenate([(w2.T @ slope).ravel(), (slope @ w1.T).ravel()]) + penalty * numbers
        return np.square(error).sum() / len(values) + penalty / 2 * numbers @ numbers, gradient

    start = np.random.default_rng(0).normal(size=55)
    options = {"maxiter": 20_000, "maxfun": 100_000, "gtol": 1e-10, "ftol": 0.0}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    direct = float(
        (matrix[places[:, 0], places[:, 1]] - values).square().mean() + penalty * torch.linalg.svdvals(matrix).sum()
    )
    assert direct == pytest.approx(found.fun, rel=1e-7)  # what L-BFGS reaches
    product = torch.from_numpy(found.x[30:].reshape(5, 5) @ found.x[:30].reshape(5, 6))
    torch.testing.assert_close(product, matrix, atol=1e-3, rtol=0)  # the square root of the losses' agreement


def test_a_large_penalty_gives_zero_and_none_is_refused():
    places, values, shape, _ = entries(shape=(4, 4), num_observed=10)
    assert float(theory.nuclear_norm_completion(places, values, shape, 100.0)[0].abs().max()) == 0
    with pytest.raises(ValueError, match="penalty = 0: must be positive"):
        theory.nuclear_norm_completion(places, values, shape, 0)


def test_the_least_nuclear_norm_fills_a_hole_as_a_scan_over_it_does():
    known = np.array([[1.0, -0.4, 0.3], [0.2, 0.9, -0.7], [-0.5, 0.1, 0.0]])
    places = torch.tensor([(i, j) for i in range(3) for j in range(3) if (i, j) != (2, 2)])
    values = torch.from_numpy(known)[places[:, 0], places[:, 1]]

    def nuclear(hole):
        matrix = known.copy()
        matrix[2, 2] = hole
        return np.linalg.svd(matrix, compute_uv=False).sum()

    best = minimize_scalar(nuclear, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    matrix, gap = theory.min_nuclear_norm(places, values, (3, 3))
    assert gap < 1e-6
    assert float(torch.linalg.svdvals(matrix).sum()) == pytest.approx(best.fun, rel=1e-8)
    assert float(matrix[2, 2]) == pytest.approx(best.x, abs=1e-4)  # the square root of the norms' agreement
    assert torch.equal(matrix[places[:, 0], places[:, 1]], values)


def test_the_least_nuclear_norm_is_the_limit_of_small_penalties():
    places, values, shape, _ = entries(shape=(8, 8), rank=1, num_observed=40)
    limit, gap = theory.min_nuclear_norm(places, values, shape)
    assert gap < 1e-6
    near, _ = theory.nuclear_norm_completion(places, values, shape, 1e-4, tol=1e-9)
    torch.testing.assert_close(near, limit, atol=0.02, rtol=0)  # the penalty's bias, N penalty/2 on singular values


def test_least_squares_at_the_true_rank_recovers_a_matrix_without_noise():
    places, values, shape, teacher = entries(shape=(10, 9), rank=2, factors="gaussian", num_observed=65, min_observed=3)
    matrix, error = theory.rank_least_squares(places, values, shape, 2)
    assert error < 1e-12
    torch.testing.assert_close(
        matrix, teacher, atol=1e-4, rtol=0
    )  # the square root of the error, over the conditioning
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-8)) == 2


def test_the_critical_singular_value_needs_three_layers():
    assert theory.critical_singular_value(0.01, 1.0, 3) == 0.01
    assert theory.critical_singular_value(0.01, 1.0, 4) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="depth = 2: must be at least 3"):
        theory.critical_singular_value(0.01, 1.0, 2)
