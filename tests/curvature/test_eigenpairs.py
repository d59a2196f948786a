"""Extreme eigenpairs against spectra that are prescribed, and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlnlab.curvature import Eigenpairs, Matrix, Operator, Preconditioned, eigenpairs

TIGHT = 1e-9


def symmetric(spectrum, seed=0):
    """A dense matrix with a given spectrum in a random basis."""
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    return basis @ torch.diag(spectrum) @ basis.T


def assert_pairs(found, matrix, expected, tol=TIGHT):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert bool(found.converged)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=tol * max(norm, 1e-300))
    errors = torch.linalg.vector_norm(found.vectors @ matrix - found.values[:, None] * found.vectors, dim=-1)
    assert bool((errors <= found.bounds + 1e-13 * norm).all())  # rounding of this product
    assert bool((found.residuals <= tol).all())


SPECTRA = {
    "a most negative eigenvalue of larger magnitude": [-10.0, 3, 2, 1, *np.linspace(-1, 1, 80)],
    "pairs of opposite sign": [*np.linspace(1, 9, 30), *-np.linspace(1, 9, 30)],
    "a cluster": [1, 1 - 1e-4, 1 - 2e-4, *np.linspace(0, 0.9, 90)],
    "an eigenvalue three times": [2.0, 2, 2, *np.linspace(-1, 1, 60)],
    "only negative ones": -np.linspace(1, 5, 50),
    "rank one": [7.0] + [0.0] * 60,
    "the identity": [1.0] * 50,
    "a space smaller than the basis": [3.0, -4, 1],
    "one number": [-2.5],
}


@pytest.mark.parametrize("which", ["largest", "smallest", "both"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_ends_of_every_spectrum_are_found(spectrum, which):
    matrix, k = symmetric(spectrum), min(2, len(spectrum))
    ordered = np.sort(spectrum)[::-1].copy()
    expected = {"largest": ordered[:k], "smallest": ordered[::-1][:k].copy(),
                "both": np.concatenate([ordered[:k], ordered[-k:]])}[which]  # fmt: skip
    assert_pairs(eigenpairs(matrix, k=k, which=which, tol=TIGHT), matrix, expected)


def test_vectors_are_orthonormal_rows():
    found = eigenpairs(symmetric(np.linspace(-3, 5, 120)), k=4, which="both", tol=1e-6)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_zero_operator_is_done_at_once():
    found = eigenpairs(torch.zeros(1000, 1000))
    assert found.values.tolist() == [0.0]
    assert found.residuals.tolist() == [0.0]
    assert bool(found.converged)
    assert found.num_products == 1


@given(st.integers(1, 12), st.integers(0, 10**6), st.data())
def test_small_matrices_are_solved_exactly(size, seed, data):
    k = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    found = eigenpairs(matrix, k=k, which="both", tol=1e-10)
    ordered = scipy.linalg.eigvalsh(matrix.numpy())[::-1]
    np.testing.assert_allclose(found.values, np.concatenate([ordered[:k], ordered[-k:]]), atol=1e-9)


class Counting(Operator):
    def __init__(self, matrix):
        super().__init__(len(matrix))
        self.matrix, self.calls = matrix, 0

    def matvec(self, vectors):
        self.calls += 1
        return vectors @ self.matrix


def test_every_product_is_counted_and_a_warm_start_saves_most_of_them():
    matrix = symmetric([4.0, 3.9, 3.5, *np.linspace(-1, 3, 500)])
    cold = Counting(matrix)
    first = eigenpairs(cold, tol=1e-4)
    assert cold.calls == first.num_products
    warm = Counting(matrix + 1e-5 * symmetric(np.linspace(-1, 1, 503), seed=1))
    again = eigenpairs(warm, tol=1e-4, start=first)
    assert warm.calls == again.num_products == 5
    assert bool(again.converged)
    assert eigenpairs(matrix, tol=1e-4, start=first.vectors[0]).num_products < first.num_products


def test_a_restarted_space_finds_what_a_large_one_finds():
    spectrum = [1.0, 0.999, 0.998, *np.linspace(-1, 0.99, 300)]
    matrix = symmetric(spectrum)
    small, large = (eigenpairs(matrix, k=2, tol=1e-7, basis_size=size) for size in (12, 200))
    for found in (small, large):
        assert_pairs(found, matrix, [1.0, 0.999], tol=1e-7)
    assert small.num_products > large.num_products


def test_a_solve_that_runs_out_of_products_says_so():
    found = eigenpairs(symmetric([1, 1 - 1e-6, *np.linspace(0, 0.999, 300)]), tol=1e-10, max_products=12)
    assert not bool(found.converged)
    assert found.num_products == 12
    assert float(found.residuals) > 1e-10


@pytest.mark.parametrize("rank_of_the_rising_one", [1, 3])
def test_where_two_eigenvalues_cross_the_warm_solve_follows_the_larger(rank_of_the_rising_one):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        spectrum = (0.8 * torch.rand(300, generator=generator, dtype=torch.float64)).sort(descending=True).values
        risen, found = spectrum[rank_of_the_rising_one].clone(), None
        for step in range(20):
            spectrum[0], spectrum[rank_of_the_rising_one] = 1 - 0.01 * step, risen + 0.05 * step
            found = eigenpairs(torch.diag(spectrum), start=found, seed=step)  # eigenvectors never mix
            assert float(found.values) == pytest.approx(float(spectrum.max()), rel=1e-3)


def test_members_are_solved_apart_and_as_they_would_be_alone():
    matrices = torch.stack([symmetric(np.linspace(-1, top, 60), seed=top) for top in (2, 5, 9)])
    matrices[1] *= 1e-6
    together = eigenpairs(matrices, k=2, tol=1e-6)
    assert together.values.shape == (3, 2)
    assert together.vectors.shape == (3, 2, 60)
    assert together.converged.tolist() == [True, True, True]
    for member, matrix in enumerate(matrices):
        alone = eigenpairs(matrix, k=2, tol=1e-6)
        torch.testing.assert_close(together.values[member], alone.values, rtol=1e-6, atol=0)  # the tolerance asked for
    again = eigenpairs(matrices, k=2, tol=1e-6, start=together)
    assert again.num_products < together.num_products


def test_a_member_without_finite_curvature_is_given_up_and_spoils_no_other():
    matrices = torch.stack([symmetric(np.linspace(-1, 3, 40)), torch.full((40, 40), torch.nan, dtype=torch.float64)])
    found = eigenpairs(matrices)
    assert found.converged.tolist() == [True, False]
    assert float(found.values[0]) == pytest.approx(3, rel=1e-4)
    assert bool(found.values[1].isnan())


def test_float32_is_enough_for_a_residual_of_a_thousandth():
    found = eigenpairs(symmetric(np.linspace(-2, 3, 200)).float())
    assert found.values.dtype == torch.float32
    assert bool(found.converged)
    assert float(found.values) == pytest.approx(3, rel=1e-3)


def test_the_same_seed_gives_the_same_bits_and_no_other_generator_is_touched():
    matrix = symmetric(np.linspace(-2, 3, 100))
    before = torch.get_rng_state()
    one, other = eigenpairs(matrix, seed=3), eigenpairs(matrix, seed=3)
    assert torch.equal(one.vectors, other.vectors)
    assert torch.equal(before, torch.get_rng_state())


def test_a_preconditioned_operator_has_the_spectrum_of_the_pencil():
    matrix, diagonal = symmetric(np.linspace(-1, 4, 30)), torch.linspace(0.5, 3, 30, dtype=torch.float64)
    operator = Preconditioned(Matrix(matrix), diagonal.rsqrt(), shift=0.7)
    # (A + 0.7) x = lambda P x
    pencil = scipy.linalg.eigvalsh(matrix.numpy() + 0.7 * np.eye(30), np.diag(diagonal.numpy()))
    np.testing.assert_allclose(eigenpairs(operator, k=2, tol=1e-8).values, pencil[::-1][:2], rtol=1e-10)
    np.testing.assert_allclose(operator.dense(), operator.dense().T, atol=1e-14)


def test_gradient_descent_on_a_quadratic_diverges_just_above_two_over_the_largest_eigenvalue():
    matrix = symmetric(np.linspace(0.1, 4, 50))
    edge = 2 / float(eigenpairs(matrix, tol=1e-8).values)

    def final(lr):
        x = torch.ones(50, dtype=torch.float64)
        for _ in range(4000):
            x = x - lr * matrix @ x
        return float(x.norm())

    assert final(0.995 * edge) < 1e-3
    assert final(1.005 * edge) > 1e3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "LA"}, "which = 'LA': must be one of largest"),
        ({"k": 0}, "k = 0: must be between 1 and the operator's size, 4"),
        ({"k": 5}, "k = 5: must be between"),
        ({"tol": 0.0}, "tol = 0.0: must be positive"),
        ({"start": torch.ones(2, 7)}, "start"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        eigenpairs(torch.eye(4), **options)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"entries of shape \(3, 4\)"):
        Matrix(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"scale of shape \(3,\): must be \(4,\)"):
        Preconditioned(Matrix(torch.eye(4)), torch.ones(3))


def test_a_scipy_like_operator_is_enough():
    class Plain:
        shape = (20, 20)

        def matvec(self, vector):
            return vector * torch.arange(20, dtype=torch.float64)

    found = eigenpairs(Plain(), tol=1e-8)
    assert isinstance(found, Eigenpairs)
    assert float(found.values) == pytest.approx(19)


def test_an_operator_that_is_not_symmetric_is_noticed():
    matrix = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(UserWarning, match="the operator is not symmetric"):
        eigenpairs(matrix, max_products=20)
