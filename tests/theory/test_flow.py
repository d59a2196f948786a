"""Gradient flow's formulas against the flow, integrated."""

import numpy as np
import pytest
import torch
from scipy.integrate import simpson, solve_ivp

from dlnlab import theory

ALPHA = 0.2


@pytest.fixture(scope="module")
def flow():
    """(X, y, solution): state = (w+, w-, integral of the loss) at times up to 400."""
    rng = np.random.default_rng(0)
    X, teacher = rng.normal(size=(4, 6)), rng.normal(size=6)
    y = X @ teacher

    def velocity(_, state):
        plus, minus = state[:6], state[6:12]
        r = X @ (plus**2 - minus**2) / 2 - y
        g = X.T @ r / 4
        return np.concatenate((-g * plus, g * minus, [r @ r / 8]))

    start = np.concatenate((np.full(12, ALPHA), [0.0]))
    return X, y, solve_ivp(velocity, (0, 400), start, "DOP853", rtol=1e-12, atol=1e-14, dense_output=True).sol


def predictor(state):
    return torch.as_tensor((state[:6] ** 2 - state[6:12] ** 2) / 2)


def test_the_flow_ends_at_the_least_entropy_and_its_loss_adds_up_to_half_of_it(flow):
    X, y, solution = flow
    end, _ = theory.min_hypentropy(X, y, ALPHA)
    torch.testing.assert_close(predictor(solution(400)), end, rtol=0, atol=1e-8)  # the integrator's tolerance
    assert theory.loss_integral(end, ALPHA).item() == pytest.approx(solution(400)[12], rel=1e-8)  # likewise


def test_the_loss_up_to_any_time_follows_from_any_interpolator(flow):
    X, y, solution = flow
    for interpolator in (theory.min_l2(X, y)[0], theory.min_l1(X, y)[0]):
        for time in (0.1, 1.0, 5.0):
            found = theory.loss_integral(interpolator, ALPHA, beta=predictor(solution(time)))
            assert found.item() == pytest.approx(solution(time)[12], rel=1e-8)  # the integrator's tolerance


def test_the_flows_sharpness_is_the_same_from_every_point_of_it(flow):
    X, y, solution = flow
    end, _ = theory.min_hypentropy(X, y, ALPHA)
    expected = theory.sharpness(X, theory.weight_square(end, ALPHA))
    for time in (0.0, 0.5, 3.0):
        found, residual = theory.flow_sharpness(X, y, predictor(solution(time)), ALPHA)
        assert residual < 1e-12
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)  # the integrator's tolerance
    torch.testing.assert_close(theory.flow_edge(X, y, ALPHA), 2 / expected)
    torch.testing.assert_close(theory.mean_square_edge(X, y, ALPHA, 4, "subset"), 2 / expected)


def test_the_edges_of_a_stack_are_those_of_its_problems():
    X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = X.sum(-1)
    for edge in (theory.flow_edge, theory.mean_square_edge):
        together = edge(X, y, 0.1)
        assert together.shape == (3,)
        for k in range(3):
            torch.testing.assert_close(together[k], edge(X[k], y[k], 0.1), rtol=1e-9, atol=0)  # the solver's accuracy


def test_the_integrals_along_the_flow_are_those_of_its_integrated_residuals_and_gradients(flow):
    X, y, solution = flow
    # Simpson's rule in the logarithm of 1 + t.
    grid = np.linspace(0, np.log(401), 4001)
    times = np.expm1(grid)
    residuals = np.stack([X @ predictor(solution(t)).numpy() - y for t in times], 1)
    gradients = X.T @ residuals / 4
    expected = [simpson(values**2 * (1 + times), x=grid) for values in (residuals, gradients)]
    for found, right in zip(theory.flow_integrals(X, y, ALPHA), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6)  # the integrators' tolerances


def test_stacked_integrals_are_those_of_each_problem_and_add_up_to_the_loss_integral(flow):
    X, y, _ = flow
    problems = torch.as_tensor(np.stack([X, 2 * X])), torch.as_tensor(np.stack([y, y]))
    scale = torch.tensor([[0.1], [0.3]], dtype=torch.float64).expand(2, 6)
    residual, gradient = theory.flow_integrals(*problems, scale)
    for i in range(2):
        alone = theory.flow_integrals(problems[0][i], problems[1][i], scale[i])
        torch.testing.assert_close((residual[i], gradient[i]), alone)
    end, _ = theory.min_hypentropy(*problems, scale)
    torch.testing.assert_close(
        residual.sum(-1) / 8, theory.loss_integral(end, scale), rtol=1e-6, atol=0
    )  # its tolerance


def test_integrals_of_a_flow_that_never_interpolates_are_refused():
    with pytest.raises(ValueError, match="no beta solves X beta = y"):
        theory.flow_integrals([[1.0], [1.0]], [0.0, 1.0], 0.1)
    residual, gradient = theory.flow_integrals([[1.0, 2.0]], [0.0], 0.1)
    assert residual.tolist() == [0] and gradient.tolist() == [0, 0]
