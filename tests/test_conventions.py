"""docs/conventions.md: the papers' update rules, transcribed in NumPy, against dlnlab at the converted settings."""

import re
from pathlib import Path

import numpy as np
import oracles
import torch

import dlnlab
from dlnlab import theory

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 8))
Y = X[:, :2].sum(1)
STEPS, ALPHA, GAMMA = 200, 0.3, 0.02


def rows(batch_size):
    """The rows of each step of dlnlab's member with seed 0."""
    key = oracles.stream_key(0, "sampling", 0)
    return [oracles.batch_rows("replacement", key, step, batch_size, len(Y)) for step in range(STEPS)]


def simulated(alpha, batch_size):
    found = dlnlab.simulate(
        X,
        Y,
        lr=GAMMA,
        init_scale=alpha,
        batch_size=batch_size,
        steps=STEPS,
        guard={"tol": 0},
        record=["beta"],
        seed=[0],
    )
    return found.beta.isel(step=-1).values.ravel()


def test_even2023_is_gradient_descent_on_u_and_v_from_root_two_alpha():
    u, v = np.full(8, np.sqrt(2) * ALPHA), np.zeros(8)
    for batch in rows(2):
        x, y = X[batch], Y[batch]
        g = x.T @ (x @ (u * v) - y) / len(batch)  # of 1/(2b) times the sum of squares
        u, v = u - GAMMA * g * v, v - GAMMA * g * u
    np.testing.assert_allclose(simulated(ALPHA, 2), u * v, rtol=0, atol=1e-12)  # 200 stable steps' rounding


def test_pesme2021_is_gradient_descent_on_squares_from_root_two_alpha():
    plus = minus = np.full(8, ALPHA)
    for batch in rows(1):
        x, y = X[batch[0]], Y[batch[0]]
        g = x * (x @ (plus**2 - minus**2) - y) / 2  # of 1/4 times the square, in beta
        plus, minus = plus - GAMMA * g * 2 * plus, minus + GAMMA * g * 2 * minus
    expected = plus**2 - minus**2
    np.testing.assert_allclose(simulated(np.sqrt(2) * ALPHA, 1), expected, rtol=0, atol=1e-12)  # 200 steps' rounding


def gain(drift, lr, chains=60, steps=6000):
    """The mean over chains and coordinates of the gain of the poster's flow with `drift` times -grad L_P; None is SGD."""
    rng = np.random.default_rng(1)
    n, d = X.shape
    plus, minus = np.full((chains, d), ALPHA), np.full((chains, d), ALPHA)
    for _ in range(steps):
        r = (plus**2 - minus**2) / 2 @ X.T - Y
        if drift is None:
            i = rng.integers(n, size=chains)
            x = lr * X[i] * r[np.arange(chains), i][:, None]
            plus, minus = plus * (1 - x), minus * (1 + x)
        else:
            loss = (r * r).sum(1) / (4 * n)
            noise = 2 * np.sqrt(lr * loss / n)[:, None] * np.sqrt(lr) * rng.normal(size=(chains, n)) @ X
            x = drift * lr * (r @ X) / (2 * n) + noise  # a time step of gamma, in the exact step of the factors
            decay = lr * 2 * loss[:, None] * (X * X).mean(0) * lr
            plus, minus = plus * np.exp(-x - decay), minus * np.exp(x - decay)
    return -np.log(np.abs(plus * minus) / ALPHA**2).mean()


def test_the_posters_drift_lacks_a_factor_of_two():
    sgd, literal, twice = gain(None, 0.01), gain(1, 0.01), gain(2, 0.01)
    end, _ = theory.min_hypentropy(X, Y, ALPHA)
    known = 0.01 * (X * X).mean() * theory.hypentropy(end, ALPHA).item()  # lr 2 diag(H) int L dt, to first order
    assert abs(twice / known - 1) < 0.1  # higher orders, and the noise of 60 chains
    assert 1.8 < literal / twice < 2.3  # likewise
    assert 0.7 < twice / sgd < 1.3  # the flow replaces each sample's squared residual by their mean


def test_woodworth2020s_potential_is_twice_the_hyperbolic_entropy_at_root_two_alpha():
    beta = RNG.normal(size=8)
    z = beta / ALPHA**2
    q = 2 - np.sqrt(4 + z**2) + z * np.arcsinh(z / 2)
    np.testing.assert_allclose(theory.hypentropy(beta, np.sqrt(2) * ALPHA), (ALPHA**2 * q).sum() / 2)


def test_beneventano2025_is_gradient_descent_on_a_and_b():
    a, b, eta, phi = RNG.normal(size=3), RNG.normal(size=3), 0.1, 0.7
    for _ in range(5):
        eps, norm, imbalance = a @ b - phi, a @ a + b @ b, a**2 - b**2
        state = [torch.tensor(value, dtype=torch.float64) for value in (eps, norm, eta, phi)]
        a, b = a - eta * eps * b, b - eta * eps * a
        np.testing.assert_allclose(theory.shallow.next_eps(*state), a @ b - phi)
        np.testing.assert_allclose(theory.shallow.next_norm_squared(*state), a @ a + b @ b)
        np.testing.assert_allclose(theory.shallow.imbalance_factor(state[0], eta).item() * imbalance, a**2 - b**2)


def test_wang2024_with_half_of_the_loss_is_half_of_the_step_with_twice_the_decay():
    weights = [RNG.normal(size=(3, 3)) / 2 for _ in range(3)]
    target, eta, decay = RNG.normal(size=(3, 3)), 0.05, 0.02
    w1, w2, w3 = weights
    r = w3 @ w2 @ w1 - target
    halves = [(w3 @ w2).T @ r / 9, w3.T @ r @ w1.T / 9, r @ (w2 @ w1).T / 9]  # of half of the mean square
    stepped = [w - eta * (g + 2 * decay * w) for w, g in zip(weights, halves, strict=True)]
    tensors = [[torch.from_numpy(value) for value in group] for group in (weights, [2 * g for g in halves], stepped)]
    lr, kappa = torch.tensor(eta / 2, dtype=torch.float64), torch.tensor(2 * decay, dtype=torch.float64)
    law = theory.next_layer_imbalance(tensors[0], tensors[1], lr, kappa)
    for found, expected in zip(law, theory.layer_imbalance(tensors[2]), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_test_the_page_names_is_here():
    page = (Path(__file__).parents[1] / "docs" / "conventions.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named and named <= set(globals())
