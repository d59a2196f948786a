"""Thresholds against dense second-moment operators, enumeration, simulation and duality."""

import itertools

import pytest
import torch
from scipy.optimize import minimize

from dlnlab import theory
from dlnlab.theory import Interpolator


def some_interpolator(seed, *shape, init=0.3):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(*shape, generator=generator, dtype=torch.float64)
    beta = torch.randn(*shape[:-2], shape[-1], generator=generator, dtype=torch.float64)
    return X, beta, Interpolator(X, beta, init)


def test_sharpness_at_an_interpolator_is_the_hessians_largest_eigenvalue():
    X, beta, _ = some_interpolator(0, 4, 6)
    imbalance = 0.3**2  # u^2 - v^2 = 2 alpha^2
    s = torch.sqrt(beta**2 + imbalance**2)
    u = torch.sqrt(s + imbalance)
    v = beta / u

    def loss(w):
        return ((X @ (w[:6] * w[6:] - beta)) ** 2).sum() / 8

    hessian = torch.autograd.functional.hessian(loss, torch.cat((u, v)))
    found = theory.sharpness(X, theory.weight_square(beta, 0.3))
    torch.testing.assert_close(found, torch.linalg.eigvalsh(hessian)[-1])


def second_moment_radius(X, h, lr, batch_size, sampling):
    """Spectral radius of E[S_B (x) S_B], the residuals' second moment from one step to the next, over all batches."""
    n = X.shape[0]
    K = (X * h) @ X.T
    drawn = (
        itertools.product(range(n), repeat=batch_size)
        if sampling == "replacement"
        else itertools.combinations(range(n), batch_size)
    )
    steps = []
    for batch in drawn:
        counts = torch.bincount(torch.tensor(batch), minlength=n).double()
        steps.append(torch.eye(n, dtype=torch.float64) - lr / batch_size * K * counts)
    return torch.linalg.eigvals(torch.stack([torch.kron(S, S) for S in steps]).mean(0)).abs().max()


@pytest.mark.parametrize("sampling", ["replacement", "subset"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_the_mean_square_edge_is_where_the_second_moment_stops_shrinking(batch_size, sampling):
    X, beta, interpolator = some_interpolator(1, 4, 6)
    h = theory.weight_square(beta, 0.3)
    edge = theory.stability(interpolator, batch_size, sampling).mean_square_edge
    torch.testing.assert_close(
        second_moment_radius(X, h, edge, batch_size, sampling), torch.ones((), dtype=torch.float64)
    )
    assert second_moment_radius(X, h, 0.999 * edge, batch_size, sampling) < 1
    assert second_moment_radius(X, h, 1.001 * edge, batch_size, sampling) > 1


def test_the_mean_square_edge_of_one_sample_is_one_over_the_radius_of_T():
    X, beta, interpolator = some_interpolator(2, 3, 5, 8)
    L, V = torch.linalg.eigh((X * theory.weight_square(beta, 0.3)[:, None]) @ X.mT)
    ratio = L[:, :, None] * L[:, None, :] / (L[:, :, None] + L[:, None, :])
    T = torch.einsum("pia,pib,pja,pjb,pab->pij", V, V, V, V, ratio)
    expected = 1 / torch.linalg.eigvalsh(T)[:, -1]
    torch.testing.assert_close(theory.stability(interpolator, 1).mean_square_edge, expected)


def test_the_full_batch_without_replacement_is_gradient_descent():
    found = theory.stability(some_interpolator(3, 2, 5, 8)[2], 5, "subset")
    torch.testing.assert_close(found.mean_square_edge, 2 / found.sharpness)
    torch.testing.assert_close(found.edge, 2 / found.sharpness)


def test_dependent_samples_have_a_mean_square_edge_too():
    X, beta, _ = some_interpolator(4, 4, 2)  # more samples than dimensions
    edge = theory.stability(Interpolator(X, beta, 0.1), 1).mean_square_edge
    # In the two dimensions of h^(1/2) beta the same operator has no null directions.
    rows = X * theory.weight_square(beta, 0.1) ** 0.5
    maps = [torch.eye(2, dtype=torch.float64) - edge * torch.outer(a, a) for a in rows]
    radius = torch.linalg.eigvalsh(torch.stack([torch.kron(A, A) for A in maps]).mean(0))[-1]
    torch.testing.assert_close(radius, torch.ones((), dtype=torch.float64))


def test_the_lyapunov_exponent_of_gradient_descent_is_the_slowest_rate():
    X, beta, interpolator = some_interpolator(5, 3, 5)
    values = torch.linalg.eigvalsh((X * theory.weight_square(beta, 0.3)) @ X.T / 3)
    lr = torch.tensor([0.5, 2.5], dtype=torch.float64) / values[-1]
    exponent, _ = theory.lyapunov(interpolator, lr, 3, "subset", num_steps=4000, num_chains=4)
    expected = torch.log((1 - lr[:, None] * values).abs().amax(-1))
    torch.testing.assert_close(exponent, expected, rtol=0, atol=1e-3)  # what the start still weighs after 400 steps


def test_the_lyapunov_exponent_of_one_direction_is_the_mean_logarithm():
    X = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    interpolator, lr = Interpolator(X, [1.0], 0.0), 0.3
    exponent, error = theory.lyapunov(interpolator, lr, num_steps=2000)
    expected = torch.log((1 - lr * 2 * X[:, 0] ** 2).abs()).mean()
    assert (exponent - expected).abs() < 5 * error  # five standard errors
    assert error < 0.01


def test_the_almost_sure_edge_is_where_the_exponent_of_one_direction_passes_zero():
    X = torch.tensor([[1.0], [0.8], [0.5]], dtype=torch.float64)
    found = theory.stability(Interpolator(X, [1.0], 0.0), 1)
    edge, error = found.almost_sure_edge(num_steps=4000)
    low, high = found.mean_square_edge.item(), 20.0
    for _ in range(60):
        middle = (low + high) / 2
        grows = torch.log((1 - middle * 2 * X[:, 0] ** 2).abs()).mean() > 0
        low, high = (low, middle) if grows else (middle, high)
    assert (edge - low).abs() < 5 * error < 0.3 * low  # five standard errors
    assert edge > found.mean_square_edge


def test_the_almost_sure_edge_lies_above_the_mean_square_edge():
    _, _, stack = some_interpolator(6, 2, 6, 9)
    found = theory.stability(stack, 1)
    edge, error = found.almost_sure_edge(num_steps=1000, num_chains=16)
    assert edge.shape == (2,)
    assert (edge > found.mean_square_edge - 3 * error).all() and (edge < found.edge).all()
    exponent, noise = found.lyapunov(torch.stack((0.9 * edge, 1.1 * edge), -1), num_steps=1000, num_chains=16)
    assert (exponent[:, 0] < -noise[:, 0]).all() and (exponent[:, 1] > noise[:, 1]).all()


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 5, 9), (2, 6, 4)])
def test_the_flattest_interpolator_meets_its_lower_bound(shape):
    X, teacher, _ = some_interpolator(7, *shape)
    y = (X @ teacher[..., None])[..., 0]
    beta, least, bound = theory.flattest_interpolator(X, y, return_bound=True)
    torch.testing.assert_close((X @ beta[..., None])[..., 0], y, rtol=0, atol=1e-10 * y.abs().max().item())
    torch.testing.assert_close(least, theory.sharpness(X, 2 * beta.abs()))
    assert ((least - bound).abs() < 1e-6 * least).all()  # the barrier stops at 1e-9, rounding leaves 1e-7
    if shape[1] < shape[2]:
        null = torch.linalg.svd(X)[2][:, shape[1] :]
        for seed in range(20):
            step = (
                torch.randn(shape[0], 1, null.shape[1], generator=torch.Generator().manual_seed(seed)).double() @ null
            )
            assert (theory.sharpness(X, 2 * (beta + 0.05 * step[:, 0]).abs()) >= least * (1 - 1e-6)).all()


def test_the_flattest_interpolator_agrees_with_a_direct_search():
    X, teacher, _ = some_interpolator(8, 2, 4)
    y = X @ teacher
    null = torch.linalg.svd(X)[2][2:]
    start = theory.min_l2(X, y)[0]

    def objective(k):
        return theory.sharpness(X, 2 * (start + torch.as_tensor(k) @ null).abs()).item()

    options = {"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    found = min(
        minimize(objective, corner, method="Nelder-Mead", options=options).fun
        for corner in itertools.product((-1.0, 0.0, 1.0), repeat=2)
    )
    assert theory.flattest_interpolator(X, y)[1].item() == pytest.approx(found, rel=1e-6)  # Nelder-Mead's accuracy


def test_the_flattest_interpolator_in_trace_has_the_least_trace():
    X, teacher, _ = some_interpolator(9, 3, 5, 9)
    y = (X @ teacher[..., None])[..., 0]
    beta, residual = theory.trace_flattest_interpolator(X, y)

    def trace(b):
        return ((X * (2 * b.abs())[:, None]) @ X.mT).diagonal(dim1=1, dim2=2).sum(-1)

    assert residual.max() < 1e-12
    for other in (theory.min_l1(X, y)[0], theory.min_l2(X, y)[0], theory.flattest_interpolator(X, y)[0]):
        assert (trace(beta) <= trace(other)).all()
