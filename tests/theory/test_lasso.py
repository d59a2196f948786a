import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dlnlab.theory import lasso, min_l1


def problem(seed, n, d, noise=0.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, x[:, : min(3, d)].sum(1) + noise * rng.normal(size=n), rng.uniform(0.5, 2, size=d)


def violation(x, y, beta, penalty, w):
    """Of the optimality conditions, written out."""
    slope = x.T @ (y - x @ beta) / len(x) / w
    return max(np.where(beta == 0, np.maximum(abs(slope) - penalty, 0), abs(slope - penalty * np.sign(beta))))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), d=st.integers(1, 20), exponent=st.floats(-6, 1))
def test_the_solution_fulfils_the_optimality_conditions(seed, n, d, exponent):
    x, y, w = problem(seed, n, d)
    beta, residual = lasso(x, y, 10**exponent, w)
    top = max(abs(x.T @ y) / n / w)
    # 1e-10: supports as large as n, whose equations may be ill-conditioned
    assert residual < 1e-10
    assert violation(x, y, beta.numpy(), 10**exponent, w) == pytest.approx(
        float(residual) * top, rel=0.1, abs=1e-13 * top
    )


def test_the_least_value_is_that_of_a_smooth_solver_in_the_positive_and_negative_parts():
    x, y, w = problem(0, 8, 12)

    def objective(parts):
        beta = parts[:12] - parts[12:]
        return ((x @ beta - y) ** 2).mean() / 2 + 0.2 * (w @ (parts[:12] + parts[12:]))

    found = minimize(objective, np.ones(24), bounds=[(0, None)] * 24, options={"maxfun": 10**6, "maxiter": 10**5,
                     "ftol": 1e-15, "gtol": 1e-10})  # fmt: skip
    beta = lasso(x, y, 0.2, w)[0].numpy()
    value = objective(np.concatenate([np.maximum(beta, 0), np.maximum(-beta, 0)]))
    assert value <= found.fun + 1e-12  # exact, and the solver stops at about 1e-9
    assert value == pytest.approx(found.fun, abs=1e-6)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_without_penalty_it_is_the_interpolator_of_least_l1_norm(noise):
    for seed in range(5):
        x, y, w = problem(seed, 10, 20, noise)
        torch.testing.assert_close(lasso(x, y, 0.0, w)[0], min_l1(x, y, w)[0], rtol=1e-8, atol=1e-9)  # two solvers


def test_a_large_penalty_gives_zero_and_none_gives_least_squares_where_rows_abound():
    x, y, w = problem(1, 12, 4)
    assert (lasso(x, y, 1.01 * max(abs(x.T @ y) / 12 / w), w)[0] == 0).all()
    np.testing.assert_allclose(lasso(x, y, 0.0, w)[0], np.linalg.lstsq(x, y, rcond=None)[0])


def test_stacks_of_problems_and_of_penalties_are_solved_one_by_one():
    (x, y, _), (other, z, _) = problem(2, 5, 7), problem(3, 5, 7)
    beta, residual = lasso(np.stack([x, other]), np.stack([y, z]), [0.1, 0.3])
    assert residual.shape == (2,)
    torch.testing.assert_close(beta, torch.stack([lasso(x, y, 0.1)[0], lasso(other, z, 0.3)[0]]))
    path = lasso(x, y, [0.1, 0.3])[0]
    torch.testing.assert_close(path, torch.stack([lasso(x, y, 0.1)[0], lasso(x, y, 0.3)[0]]))


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="penalty = -1"):
        lasso([[1.0]], [1.0], -1)
