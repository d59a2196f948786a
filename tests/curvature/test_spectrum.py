"""Trace, spectral density and critical sharpness against matrices whose answers are known."""

import numpy as np
import pytest
import torch

from dlnlab.curvature import critical_sharpness, spectral_density, trace


def wigner(size, spike=0.0, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)  # not that of the probes
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = (matrix + matrix.T) / np.sqrt(8 * size)  # semicircle on [-1, 1]
    matrix[0, 0] += spike
    return matrix


def test_the_trace_lies_within_its_error():
    deviations = []
    for seed in range(40):
        matrix = wigner(150, spike=5.0, seed=seed)
        found = trace(matrix, num_products=45, seed=seed)
        deviations.append(float((found.value - matrix.trace()) / found.error))
        assert found.num_products == 45
    assert np.mean(np.abs(deviations) < 2) > 0.8  # 0.93 of a t distribution with 14 degrees of freedom
    assert 0.6 < np.std(deviations) < 1.6  # 1.08 of the same, from 40 draws


def test_the_trace_of_a_small_or_low_rank_operator_is_exact():
    small = wigner(20)
    found = trace(small, num_products=30)
    assert float(found.value) == pytest.approx(float(small.trace()), rel=1e-12)
    assert float(found.error) == 0
    vector = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = trace(vector @ vector.T, num_products=12)
    assert float(found.value) == pytest.approx(float(vector.square().sum()), rel=1e-12)
    assert float(found.error) < 1e-10
    assert float(trace(torch.zeros(100, 100)).value) == 0


def test_the_density_of_a_wigner_matrix_is_the_semicircle():
    found = spectral_density(wigner(1500), num_probes=6, num_steps=80, width=0.02)
    semicircle = 2 / np.pi * np.sqrt(np.clip(1 - found.grid.numpy() ** 2, 0, None))
    inside = np.abs(found.grid.numpy()) < 0.9
    assert np.abs(found.density.numpy() - semicircle)[inside].max() < 0.12  # 1500 eigenvalues and 6 probes: 0.06
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-3)  # the tails beyond 5 sigma
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(6, dtype=torch.float64))


def test_the_density_has_the_error_it_states():
    matrix = wigner(300, spike=3.0)
    found = spectral_density(matrix, num_probes=10, num_steps=100, width=0.03)
    spectrum = torch.linalg.eigvalsh(matrix)
    bells = torch.exp(-(((found.grid[:, None] - spectrum) / found.width) ** 2) / 2)
    exact = bells.mean(1) / (found.width * np.sqrt(2 * np.pi))
    relative = (found.density - exact).abs() / found.error.clamp_min(1e-6)
    assert 0.3 < float(relative[exact > 0.05].mean()) < 1.6  # 0.8 of a t distribution, but neighbours are correlated
    moments = (found.weights * found.nodes**2).sum(-1)
    assert float(moments.mean()) == pytest.approx(float((spectrum**2).mean()), rel=0.2)  # 10 probes of 300 numbers


def test_densities_and_traces_of_members_are_those_they_have_alone():
    matrices = torch.stack([wigner(60, spike=1.0), 3 * wigner(60, seed=1)])
    together, traces = spectral_density(matrices, num_steps=20), trace(matrices, num_products=30)
    for member, matrix in enumerate(matrices):
        alone = spectral_density(matrix, num_steps=20)
        torch.testing.assert_close(together.density[member], alone.density)
        torch.testing.assert_close(traces.value[member], trace(matrix, num_products=30).value)
    assert together.error.shape == (2, 500)


@pytest.mark.parametrize("level", [0.0, 2.0])
def test_the_density_of_a_multiple_of_the_identity_is_one_bell(level):
    found = spectral_density(level * torch.eye(50, dtype=torch.float64))
    assert float(found.grid[found.density.argmax()]) == pytest.approx(level, abs=0.01)
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1, abs=1e-3)  # the tails beyond 5 sigma


def test_critical_sharpness_of_a_quadratic_is_the_curvature_along_the_direction():
    matrix = wigner(30) + 2 * torch.eye(30, dtype=torch.float64)
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)
    gradient = matrix @ x
    expected = float(gradient @ matrix @ gradient / (gradient @ gradient))
    for start in (1e-6, 0.3, 1e5):
        found = critical_sharpness(lambda eta: (x - eta * gradient) @ matrix @ (x - eta * gradient), start, tol=0.001)
        assert float(found.value) == pytest.approx(expected, rel=0.001)
    near = critical_sharpness(lambda eta: (x - eta * gradient) @ matrix @ (x - eta * gradient), 2 / expected, tol=0.05)
    assert near.num_evaluations <= 10


def test_critical_sharpness_of_members_is_found_together():
    curvature = torch.tensor([1.0, 50.0, 0.02], dtype=torch.float64)
    found = critical_sharpness(lambda eta: (1 - curvature * eta) ** 2, torch.ones(3), tol=0.001)
    torch.testing.assert_close(found.value, curvature, rtol=0.001, atol=0)  # the tolerance asked for


def test_where_no_step_raises_the_loss_the_critical_sharpness_is_zero():
    found = critical_sharpness(lambda eta: -eta)
    assert (float(found.value), float(found.step)) == (0, float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_every_step_raises_the_loss_the_critical_sharpness_is_infinite(dtype):
    found = critical_sharpness(lambda eta: (0.3 + eta * torch.tensor([1.0, -1.0])).square().to(dtype), torch.ones(2))
    assert found.value[0] == torch.inf
    assert float(found.value[1]) == pytest.approx(2 / 0.6, rel=0.02)  # the search's own width


def test_too_few_probes_are_refused():
    with pytest.raises(ValueError, match="num_products = 5: must be at least 6"):
        trace(torch.eye(10), num_products=5)
    with pytest.raises(ValueError, match="num_probes = 1: must be at least 2"):
        spectral_density(torch.eye(10), num_probes=1)
