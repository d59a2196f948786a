"""Interpolators against high precision, SciPy and their own optimality conditions."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from dlnlab import theory
from dlnlab.kernels.factors import Factors
from dlnlab.theory.inputs import as_float64


def problem(seed, *shape, sparsity=None, kind="plain"):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "rank-deficient":
        rank = max(1, min(shape[-2:]) // 2)
        X = X[..., :rank] @ torch.randn(*shape[:-2], rank, shape[-1], generator=generator, dtype=torch.float64)
    if kind == "duplicate columns":
        X[..., -1] = X[..., 0]
    if kind == "duplicate rows":
        X[..., -1, :] = X[..., 0, :]
    teacher = torch.randn(*shape[:-2], shape[-1], generator=generator, dtype=torch.float64)
    if sparsity is not None:
        teacher[..., sparsity:] = 0
    return X, (X @ teacher[..., None])[..., 0], teacher


def exact_bregman(X, y, log_init, shift, start):
    """The dual equations X alpha^2 sinh(s + 2 X^T nu) = y by Newton in 60 digits, from a nu near the solution."""
    with mpmath.workdps(60):
        D = X.shape[1]
        rows, target = mpmath.matrix(X.tolist()), mpmath.matrix(y.tolist())
        scale = [mpmath.exp(2 * mpmath.mpf(v)) for v in log_init.tolist()]
        # Started from the nu that fits alpha^2 sinh, inverted, best where the given beta is not small.
        size = mpmath.diag([abs(mpmath.mpf(b)) for b in start.tolist()])
        z = mpmath.matrix(
            [mpmath.asinh(mpmath.mpf(b) / a) - s for b, a, s in zip(start.tolist(), scale, shift.tolist(), strict=True)]
        )
        nu = mpmath.lu_solve(rows * size * rows.T, rows * size * z) / 2
        for _ in range(60):
            z = 2 * rows.T * nu
            arguments = [z[i] + mpmath.mpf(float(shift[i])) for i in range(D)]
            beta = mpmath.matrix([scale[i] * mpmath.sinh(arguments[i]) for i in range(D)])
            weights = mpmath.diag([2 * scale[i] * mpmath.cosh(arguments[i]) for i in range(D)])
            step = mpmath.lu_solve(rows * weights * rows.T, target - rows * beta)
            nu += step
            if mpmath.norm(step) < mpmath.mpf(10) ** -40 * (1 + mpmath.norm(nu)):
                break
        else:
            raise AssertionError("the reference did not converge")
        return torch.tensor([float(b) for b in beta], dtype=torch.float64)


@pytest.mark.parametrize("log_init", [math.log(1e3), 0.0, -3.0, -30.0, -345.0, -5000.0])
def test_min_hypentropy_agrees_with_sixty_digits_at_every_scale(log_init):
    X, y, _ = problem(1, 3, 6)
    beta, residual = theory.min_hypentropy(X, y, log_init=log_init)
    truth = exact_bregman(X, y, torch.full((6,), log_init), torch.zeros(6), beta)
    torch.testing.assert_close(beta, truth, rtol=1e-11, atol=1e-14)  # z of order 1e4 is rounded to 1e-12
    assert residual < 1e-12


def test_min_bregman_agrees_with_sixty_digits_where_initialisations_and_shifts_differ():
    X, y, _ = problem(2, 3, 6)
    log_init = torch.tensor([-2.0, -200.0, -8.0, -90.0, -1.0, -4.0], dtype=torch.float64)
    shift = torch.tensor([1.0, -12.0, 5.0, 0.0, -2.0, 7.0], dtype=torch.float64)
    beta, residual = theory.min_bregman(X, y, log_effective_init=log_init, shift=shift)
    torch.testing.assert_close(beta, exact_bregman(X, y, log_init, shift, beta), rtol=1e-11, atol=1e-14)  # as above
    assert residual < 1e-12


def test_min_bregman_agrees_with_scipys_constrained_minimum():
    X, y, _ = problem(3, 2, 5)
    init = torch.tensor([0.3, 0.5, 1.0, 0.7, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.1, -0.2, 0.3, 0.0, 0.05], dtype=torch.float64)

    def objective(b):
        b = torch.as_tensor(b).requires_grad_()
        value = theory.hypentropy_bregman(b, reference, init)
        value.backward()
        return value.item(), b.grad.numpy()

    found = minimize(
        objective, torch.linalg.pinv(X) @ y, jac=True, method="SLSQP", options={"ftol": 1e-15},
        constraints={"type": "eq", "fun": lambda b: (X @ torch.as_tensor(b) - y).numpy(), "jac": lambda b: X.numpy()},
    )  # fmt: skip
    beta, residual = theory.min_bregman(X, y, init, reference)
    torch.testing.assert_close(beta, as_float64(found.x), rtol=0, atol=1e-6)  # SLSQP's accuracy
    assert residual < 1e-14


@given(
    seed=st.integers(0, 10**6),
    num_samples=st.integers(1, 12),
    dim=st.integers(1, 15),
    log10_init=st.floats(-15, 3),
    log10_scale=st.floats(-15, 3),
    spread=st.sampled_from([0.0, 3.0, 300.0]),
    kind=st.sampled_from(["plain", "rank-deficient", "duplicate columns", "duplicate rows"]),
    sparsity=st.sampled_from([None, 2]),
)
def test_every_entropic_interpolator_meets_its_optimality_conditions(
    seed, num_samples, dim, log10_init, log10_scale, spread, kind, sparsity
):
    X, y, _ = problem(seed, 3, num_samples, dim, kind=kind, sparsity=sparsity)
    y = y * 10**log10_scale
    generator = torch.Generator().manual_seed(seed)
    log_init = log10_init * math.log(10) - spread * torch.rand(3, dim, generator=generator, dtype=torch.float64)
    beta, residual = theory.min_bregman(X, y, log_effective_init=log_init)
    assert residual.max() < 1e-12
    missed = ((X @ beta[..., None])[..., 0] - y).norm(dim=-1)
    # A backward error: |beta| may be large beside y where X is nearly singular.
    assert (missed <= 1e-11 * (X.flatten(1).norm(dim=1) * beta.norm(dim=-1))).all()


@given(seed=st.integers(0, 10**6), log_init=st.floats(-12, -4), size=st.floats(0, 16))
def test_a_shift_below_the_solution_keeps_the_conditions(seed, log_init, size):
    X, y, _ = problem(seed, 3, 6, 9)
    shift = size * (2 * torch.rand(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)
    beta, residual = theory.min_bregman(X, y, log_effective_init=log_init - 8, shift=shift)
    assert residual.max() < 1e-12
    z = torch.asinh(beta / math.exp(2 * log_init - 16)) - shift
    outside = z - (torch.linalg.pinv(X) @ X @ z[..., None])[..., 0]
    # The mirror's coordinates lie in the span of the data, to what beta's own rounding leaves of them.
    assert (outside.norm(dim=-1) < 1e-6 * z.norm(dim=-1)).all()


@pytest.mark.parametrize(("lr_in_edges", "batch_size"), [(0.1, 4), (0.3, 1), (1.05, 4)])
def test_a_run_ends_at_the_interpolator_that_its_own_gain_predicts(lr_in_edges, batch_size):
    X, y, _ = problem(12, 4, 7)
    lr = lr_in_edges * theory.flow_edge(X, y, 0.1)
    generator = torch.Generator().manual_seed(0)
    factors = Factors.start(*(torch.full((7,), 0.1, dtype=torch.float64) for _ in range(2)))
    for step in range(40_000):
        r = X @ (factors.w_plus**2 - factors.w_minus**2) / 2 - y
        if r.norm() < 1e-13:
            break
        rows = torch.randperm(4, generator=generator)[:batch_size]
        factors.multiply(lr * (X[rows].T @ r[rows]) / batch_size, None)
        if step % 16 == 0:
            factors.renormalise()
    beta, residual = theory.min_bregman(
        X,
        y,
        log_effective_init=theory.log_effective_init(0.1, factors.gain()),
        shift=theory.mirror_shift(factors.gain_plus(), factors.gain_minus()),
    )
    assert residual < 1e-12
    # Rounding of 1e4 steps.
    torch.testing.assert_close((factors.w_plus**2 - factors.w_minus**2) / 2, beta, rtol=0, atol=1e-10)
    start, _ = theory.min_hypentropy(X, y, 0.1)
    assert (beta - start).norm() > 1e-4


def test_a_stack_solves_each_problem_as_it_is_solved_alone():
    X, y, _ = problem(5, 4, 5, 9, sparsity=2)
    log_init = torch.tensor([-1.0, -5.0, -50.0, -500.0], dtype=torch.float64)[:, None].expand(4, 9)
    for solve in (theory.min_l1, theory.min_l2, lambda X, y, i=None: theory.min_hypentropy(X, y, log_init=i)):
        entropic = solve not in (theory.min_l1, theory.min_l2)
        beta, residual = solve(X, y, log_init) if entropic else solve(X, y)
        assert residual.shape == (4,)
        for k in range(4):
            alone, error = solve(X[k], y[k], log_init[k]) if entropic else solve(X[k], y[k])
            assert error.shape == ()
            torch.testing.assert_close(beta[k], alone, rtol=1e-9, atol=1e-12)  # conditioning of problem x rounding


def test_one_matrix_is_shared_by_many_targets_and_initialisations():
    X, _, teacher = problem(6, 4, 5, 9)
    X = X[0]
    beta, residual = theory.min_hypentropy(X, teacher @ X.T, [[0.1] * 9, [0.2] * 9, [1.0] * 9, [1e-9] * 9])
    assert beta.shape == (4, 9) and residual.max() < 1e-12
    alone, _ = theory.min_hypentropy(X, X @ teacher[2], 1.0)
    torch.testing.assert_close(beta[2], alone)


def test_the_limits_are_the_least_l1_and_l2_norms():
    X, y, _ = problem(7, 5, 8, 12)
    l1, l2 = theory.min_l1(X, y)[0], theory.min_l2(X, y)[0]
    far = [(theory.min_hypentropy(X, y, a)[0] - l2).norm() for a in (10.0, 100.0)]
    assert 0.9e4 < far[0] / far[1] < 1.1e4  # the distance falls as alpha^-4
    near = theory.min_hypentropy(X, y, log_init=-1e5)[0]
    torch.testing.assert_close(near, l1, rtol=0, atol=1e-3)  # differs by 1/ln(1/alpha) where supports are close


def test_least_l1_norm_equals_its_dual_value_and_no_random_interpolator_is_smaller():
    X, y, _ = problem(8, 4, 6, 14)
    weights = torch.rand(4, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    beta, residual, nu = theory.min_l1(X, y, weights, return_dual=True)
    assert residual.max() < 1e-12
    torch.testing.assert_close((weights * beta.abs()).sum(-1), (nu * y).sum(-1), rtol=1e-12, atol=0)
    assert ((X.mT @ nu[..., None])[..., 0].abs() <= weights * (1 + 1e-12)).all()
    assert ((beta != 0).sum(-1) <= 6).all()
    null = torch.linalg.svd(X)[2][:, 6:]
    for seed in range(20):
        step = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ null
        assert ((weights * (beta + 0.1 * step[:, 0]).abs()).sum(-1) > (weights * beta.abs()).sum(-1)).all()


@given(
    seed=st.integers(0, 10**6), kind=st.sampled_from(["plain", "rank-deficient", "duplicate columns", "duplicate rows"])
)
def test_the_certificate_of_least_l1_norm_holds_for_degenerate_problems(seed, kind):
    X, y, _ = problem(seed, 2, 6, 9, kind=kind, sparsity=2)
    assert theory.min_l1(X, y * 1e-12)[1].max() < 1e-12
    assert theory.min_l1(X, 0 * y)[0].abs().max() == 0


def test_a_sparse_teacher_is_found_and_proved_the_only_minimum():
    X, y, teacher = problem(9, 3, 20, 30, sparsity=2)
    torch.testing.assert_close(theory.min_l1(X, y)[0], teacher, rtol=0, atol=1e-12)
    assert theory.min_l1_is_unique(X, y).all()
    X[:, :, 7] = X[:, :, 0]  # now the weight can be shared by two equal columns
    assert not theory.min_l1_is_unique(X, y).any()


def test_least_l2_norm_is_the_pseudo_inverse():
    for shape in ((3, 4, 9), (3, 9, 4), (3, 5, 5)):
        X, y, _ = problem(10, *shape, kind="rank-deficient")
        beta, residual = theory.min_l2(X, y)
        torch.testing.assert_close(beta, (torch.linalg.pinv(X) @ y[..., None])[..., 0], rtol=1e-9, atol=1e-12)
        assert residual.max() < 1e-13


def test_a_problem_without_interpolators_is_named():
    X, y, _ = problem(11, 3, 9, 4)
    y[1, 0] += 1
    for solve in (theory.min_l1, theory.min_l2, lambda X, y: theory.min_hypentropy(X, y, 0.1)):
        with pytest.raises(ValueError, match="problem 1: no beta solves X beta = y"):
            solve(X, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 3), (3,), 0.1), "must be"),
        (((2, 3), (2,), 0.0), "init = 0.0: must be positive and finite"),
        (((2, 3), (2,), math.nan), "must be positive and finite"),
        (((2, 3), (2,), [1.0, 2.0]), "D = 3"),
        (((2, 3), (4, 2), [[1.0] * 3] * 5), "stacks of different lengths"),
        (((2, 3), (2,), None), "exactly one of init and log_init"),
    ],
)
def test_what_is_not_a_problem_is_refused(arguments, message):
    x_shape, y_shape, init = arguments
    with pytest.raises(ValueError, match=message):
        theory.min_hypentropy(torch.ones(x_shape), torch.zeros(y_shape), init)
