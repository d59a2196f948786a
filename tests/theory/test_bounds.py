"""Moments over batches against the enumeration of all batches, and against a run."""

import itertools

import pytest
import torch

from dlnlab import theory


def batches(n, b, sampling):
    """Every batch, once for each way of drawing it."""
    if sampling == "replacement":
        return list(itertools.product(range(n), repeat=b))
    return list(itertools.combinations(range(n), b))


def inputs(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sampling", ["replacement", "subset", "epochs"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_second_moments_are_the_means_over_all_batches(batch_size, sampling):
    X, r = inputs(0, 2, 5, 3), inputs(1, 2, 5)
    H = [X[:, B].mT @ X[:, B] / batch_size for B in map(list, batches(5, batch_size, sampling))]
    g = [(X[:, B].mT @ r[:, B, None])[..., 0] / batch_size for B in map(list, batches(5, batch_size, sampling))]
    mean_square = torch.stack([h @ h for h in H]).mean(0)
    torch.testing.assert_close(theory.hessian_second_moment(X, batch_size, sampling), mean_square)
    gradient = torch.stack([v * v for v in g]).mean(0)
    torch.testing.assert_close(theory.gradient_second_moment(X, r, batch_size, sampling), gradient)


@pytest.mark.parametrize("sampling", ["replacement", "subset"])
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 6, 3)])
def test_gain_bounds_are_the_generalised_eigenvalues_on_the_range(shape, sampling):
    X = inputs(2, *shape)
    X[:, 1] = X[:, 0]  # a repeated row lowers the rank
    low, high = theory.gain_bounds(X, 3, sampling)
    for k in range(2):
        H = X[k].T @ X[k] / shape[1]
        values, vectors = torch.linalg.eigh(H)
        basis = vectors[:, values > 1e-10] * values[values > 1e-10] ** -0.5
        relative = torch.linalg.eigvalsh(basis.T @ theory.hessian_second_moment(X[k], 3, sampling) @ basis)
        torch.testing.assert_close(low[k], relative[0], rtol=1e-9, atol=1e-9)  # the reference squares the condition
        torch.testing.assert_close(high[k], relative[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampling", ["replacement", "subset"])
def test_the_expected_gain_lies_between_its_bounds_over_many_runs(sampling):
    X, teacher, alpha, lr, b = inputs(3, 6, 8), inputs(4, 8), 0.3, 0.02, 2
    generator = torch.Generator().manual_seed(0)
    y = X @ teacher
    plus = minus = torch.full((400, 8), alpha, dtype=torch.float64)
    gain, loss_sum, largest = torch.zeros(400), torch.zeros(400), 0.0
    for _ in range(300):
        r = (plus**2 - minus**2) / 2 @ X.T - y
        loss_sum = loss_sum + (r * r).mean(-1) / 2
        rows = (
            torch.randint(0, 6, (400, b), generator=generator)
            if sampling == "replacement"
            else torch.rand(400, 6, generator=generator).argsort(-1)[:, :b]
        )
        x = lr * (X[rows] * r.gather(1, rows)[..., None]).mean(1)
        gain, largest = gain + theory.gain_increment(x).sum(-1), max(largest, x.abs().max().item())
        plus, minus = (1 - x) * plus, (1 + x) * minus
    assert largest < 0.8926
    lower, upper = theory.expected_gain_bounds(lr, loss_sum.mean(), X, b, sampling)
    spread = 4 * gain.std() / 20  # four standard errors of the mean of 400 runs
    assert lower - spread < gain.mean() < upper + spread
    assert lower > 0.05 * upper  # the two sides are near enough to mean something


def test_gradients_at_the_start_have_the_closed_second_moment():
    teacher, b, std = torch.tensor([1.0, -2.0, 0.0, 0.0], dtype=torch.float64), 3, 0.7
    X = std * inputs(5, 200_000, b, 4)
    g = (X.mT @ (X @ teacher)[..., None])[..., 0] / b
    squares = g * g
    error = 5 * squares.std(0) / 200_000**0.5  # five standard errors
    assert ((squares.mean(0) - theory.initial_gradient_second_moment(teacher, b, std)).abs() < error).all()


@pytest.mark.parametrize(("batch_size", "sampling"), [(1, "replacement"), (2, "subset"), (6, "subset")])
def test_the_leading_gain_is_that_of_a_run_with_small_steps(batch_size, sampling):
    X, teacher, alpha, lr = inputs(6, 6, 8), inputs(7, 8), 0.3, 1e-3
    y, runs, steps = X @ teacher, 40, 4000
    generator = torch.Generator().manual_seed(1)
    plus = minus = torch.full((runs, 8), alpha, dtype=torch.float64)
    flow_plus = flow_minus = torch.full((8,), alpha, dtype=torch.float64)
    gain, residuals, gradients = torch.zeros(8), torch.zeros(6), torch.zeros(8)
    for _ in range(steps):
        if sampling == "replacement":
            rows = torch.randint(0, 6, (runs, batch_size), generator=generator)
        else:
            rows = torch.rand(runs, 6, generator=generator).argsort(-1)[:, :batch_size]
        r = (plus**2 - minus**2) / 2 @ X.T - y
        x = lr * (X[rows] * r.gather(1, rows)[..., None]).mean(1)
        gain = gain + (x * x).mean(0)
        plus, minus = (1 - x) * plus, (1 + x) * minus
        e = X @ (flow_plus**2 - flow_minus**2) / 2 - y
        g = X.T @ e / 6
        residuals, gradients = residuals + lr * e * e, gradients + lr * g * g
        flow_plus, flow_minus = flow_plus * torch.exp(-lr * g), flow_minus * torch.exp(lr * g)
        if (e * e).sum() < 1e-8:
            break
    predicted = theory.leading_gain(lr, X, residuals, gradients, batch_size, sampling)
    torch.testing.assert_close(gain, predicted, rtol=0.05, atol=0)  # order lr, and the noise of 40 runs


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_batch_smoothness_is_the_largest_over_all_batches(batch_size):
    X = inputs(8, 2, 7, 4)
    every = [X[:, B].mT @ X[:, B] / batch_size for B in map(list, batches(7, batch_size, "subset"))]
    largest = torch.stack([torch.linalg.eigvalsh(H)[:, -1] for H in every]).amax(0)
    found, exact = theory.batch_smoothness(X, batch_size, "subset")
    assert exact
    torch.testing.assert_close(found, largest)
    with_replacement, exact = theory.batch_smoothness(X, batch_size, "replacement")
    torch.testing.assert_close(with_replacement, (X * X).sum(-1).amax(-1))
    assert exact and (with_replacement >= largest * (1 - 1e-12)).all()
    torch.testing.assert_close(
        theory.gamma_LB(0.1, X, batch_size, [2.0, 3.0], "subset"), 0.1 * largest * torch.tensor([2.0, 3.0])
    )


def test_batch_smoothness_is_bounded_where_batches_are_too_many():
    X = inputs(9, 40, 6)
    bound, exact = theory.batch_smoothness(X, 10, "subset")
    assert not exact
    drawn = [X[torch.randperm(40, generator=torch.Generator().manual_seed(k))[:10]] for k in range(200)]
    assert max(torch.linalg.matrix_norm(B, 2) ** 2 / 10 for B in drawn) <= bound <= (X * X).sum(-1).amax()


def test_a_batch_that_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="batch_size = 6: must be at most 5"):
        theory.batch_weight(6, 5, "subset")
    with pytest.raises(ValueError, match="sampling"):
        theory.batch_weight(2, 5, "bootstrap")
