"""The shallow linear network's formulas against explicit steps in a and b, SciPy and dense Hessians."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from dlnlab.theory import shallow

numbers = st.floats(-3, 3, allow_subnormal=False)
vectors = st.integers(1, 4).flatmap(lambda d: st.tuples(*[st.lists(numbers, min_size=d, max_size=d)] * 2))


def tensor(value):
    return torch.as_tensor(value, dtype=torch.float64)


def rotated(a, b):
    return (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)


def summary(a, b, target):
    return a @ b - target, a @ a + b @ b


@settings(max_examples=100, deadline=None)
@given(vectors, st.floats(-2, 2), st.floats(0.001, 2))
def test_the_recursions_are_one_step_of_gradient_descent_at_any_step_size(factors, target, lr):
    a, b = map(tensor, factors)
    target, lr = tensor(target), tensor(lr)
    eps, norm = summary(a, b, target)
    new_a, new_b = a - lr * eps * b, b - lr * eps * a
    new_eps, new_norm = summary(new_a, new_b, target)
    # Terms as large as (1 + eta |eps|)^2 lambda cancel.
    size = float((1 + lr * eps.abs()) ** 2 * (norm + 2 * target.abs()))
    near = {"rtol": 1e-12, "atol": 1e-14 * (1 + size)}
    torch.testing.assert_close(shallow.next_eps(eps, norm, lr, target), new_eps, **near)
    torch.testing.assert_close(shallow.next_norm_squared(eps, norm, lr, target), new_norm, **near)
    factor = shallow.imbalance_factor(eps, lr)
    torch.testing.assert_close((a**2 - b**2) * factor, new_a**2 - new_b**2, **near)
    spread = shallow.spread(*rotated(a, b))
    torch.testing.assert_close(spread * factor.abs(), shallow.spread(*rotated(new_a, new_b)), **near)
    torch.testing.assert_close(shallow.norm_squared_at(a @ b, spread), norm, **near)
    edge, next_edge = (shallow.escape(e, n, lr, target) for e, n in ((eps, norm), (new_eps, new_norm)))
    near["atol"] *= 1 + float(lr) + float(lr**2 * target.abs()) + float((lr * eps) ** 2)
    torch.testing.assert_close(next_edge - 4, (edge - 4) * (1 + lr**2 * eps * (a @ b)), **near)


@pytest.mark.parametrize(("dim", "target"), [(1, 1.0), (1, -0.7), (3, 2.0), (3, 0.0), (3, -1.5)])
def test_gradient_flow_ends_where_its_closed_form_says(dim, target):
    rng = np.random.default_rng(dim)
    a, b = rng.normal(size=(2, dim))

    def flow(_, w):
        eps = w[:dim] @ w[dim:] - target
        return np.concatenate((-eps * w[dim:], -eps * w[:dim]))

    end = solve_ivp(flow, (0, 200), np.concatenate((a, b)), rtol=1e-11, atol=1e-13).y[:, -1]
    p, m = rotated(tensor(a), tensor(b))
    limit_p, limit_m = shallow.flow_limit(p, m, tensor(target))
    found = torch.cat(((limit_p + limit_m), (limit_p - limit_m))) / math.sqrt(2)
    torch.testing.assert_close(found, tensor(end), rtol=1e-8, atol=1e-8)  # the integrator's
    norm = shallow.norm_squared_at(tensor(target), shallow.spread(p, m))
    torch.testing.assert_close(norm, tensor(end @ end), rtol=1e-8, atol=1e-8)  # likewise


def test_the_flow_from_a_saddles_stable_manifold_ends_at_zero():
    vector, zero = tensor([1.0, 2.0]), tensor([0.0, 0.0])
    assert all((end == 0).all() for end in shallow.flow_limit(zero, vector, tensor(1.0)))
    assert all((end == 0).all() for end in shallow.flow_limit(vector, zero, tensor(-1.0)))


@settings(max_examples=50, deadline=None)
@given(vectors, st.floats(-2, 2))
def test_sharpness_is_the_hessians_largest_eigenvalue(factors, target):
    a, b = map(tensor, factors)

    def loss(w):
        return (w[: len(a)] @ w[len(a) :] - target) ** 2 / 2

    hessian = torch.autograd.functional.hessian(loss, torch.cat((a, b)))
    eps, norm = summary(a, b, tensor(target))
    exact = torch.linalg.eigvalsh(hessian)[-1]
    # The root of a difference loses half of the digits where the two eigenvalues meet.
    torch.testing.assert_close(shallow.sharpness(eps, norm, tensor(target)), exact, rtol=1e-9, atol=1e-7)


def descend(p, m, lr, target, num_steps):
    """eps at every step (T, E), and the last p, m, by explicit steps in the two numbers' vectors."""
    found = []
    for _ in range(num_steps):
        eps = (p.square().sum(-1) - m.square().sum(-1)) / 2 - target
        found.append(eps)
        p, m = p * (1 - lr * eps)[:, None], m * (1 + lr * eps)[:, None]
    return torch.stack(found), p, m


def test_under_theorem_1s_condition_gd_converges_monotonically_to_a_flatter_minimum_than_the_flow():
    generator = torch.Generator().manual_seed(0)
    count = 2000
    scale = 10 ** (2.4 * torch.rand(2, count, 1, generator=generator, dtype=torch.float64) - 1.2)
    a, b = torch.randn(2, count, 3, generator=generator, dtype=torch.float64) * scale
    target = 10 ** (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
    p, m = rotated(a, b)
    eps, norm = (a * b).sum(-1) - target, (a**2 + b**2).sum(-1)
    lr = shallow.theorem_lr(eps, norm, target) * (
        0.02 + 0.93 * torch.rand(count, generator=generator, dtype=torch.float64)
    )
    path, end_p, end_m = descend(p, m, lr, target, 3000)
    falling = path.abs() > 1e-9 * target  # above rounding
    assert ((path[1:].abs() < path[:-1].abs()) | ~falling[:-1]).all()
    done = path[-1].abs() < 1e-6 * target
    assert done.double().mean() > 0.95  # the slowest need more steps
    log_ratio = -torch.log((1 - (lr * path) ** 2).prod(0))
    assert (log_ratio[done] >= shallow.log_contraction_bound(eps, norm, lr, target)[done]).all()
    end = (end_p**2 + end_m**2).sum(-1)
    flow = shallow.norm_squared_at(target, shallow.spread(p, m))
    assert (end[done] <= flow[done] * (1 + 1e-6)).all()  # as far as eps is from zero
    limit = shallow.norm_squared_at(target, shallow.spread(p, m), torch.exp(-log_ratio))
    torch.testing.assert_close(end[done], limit[done], rtol=1e-5, atol=0)  # likewise


def test_the_first_order_law_is_the_limit_of_small_steps():
    p, m, target = tensor([[1.2, -0.4]]), tensor([[0.3, 0.8]]), tensor([1.0])
    errors = []
    for lr in (1e-2, 1e-3):
        path, _, _ = descend(p, m, tensor([lr]), target, int(20 / lr))
        exact = -torch.log((1 - (lr * path) ** 2).prod(0))
        errors.append(float((exact / shallow.leading_log_contraction(p, m, tensor([lr]), target) - 1).abs()))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 8  # first order: a tenth


def test_eps_shrinks_at_the_rate_of_its_minimum_in_the_end():
    p, m, target = tensor([[1.2, -0.4]]), tensor([[0.3, 0.8]]), tensor([1.0])
    for lr in (0.1, 0.3, 0.7):
        path, end_p, end_m = descend(p, m, tensor([lr]), target, 2000)
        last = int((path.abs() > 1e-8).nonzero()[-1, 0])
        norm = (end_p**2 + end_m**2).sum(-1)
        ratio = (path[last] / path[last - 1]).abs()
        # The rate is that of the limit, from which the path is eps away.
        torch.testing.assert_close(ratio, shallow.rate(tensor([lr]), norm), rtol=1e-4, atol=1e-7)


def test_members_diverge_exactly_above_the_divergence_line():
    generator = torch.Generator().manual_seed(1)
    count = 20_000
    p, m = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    target = torch.full((count,), 0.8, dtype=torch.float64)
    lr = 10 ** (1.5 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
    eps, norm = ((p**2 - m**2) / 2).sum(-1) - target, (p**2 + m**2).sum(-1)
    predicted = shallow.diverges(eps, norm, lr, target)
    assert 0.1 < predicted.double().mean() < 0.9
    path, _, _ = descend(p, m, lr, target, 2000)
    found = ~(path[-1].abs() < 1e10)
    # Next to the line, where a member needs more than these steps to leave.
    far = (shallow.escape(eps, norm, lr, target) - 4).abs() > 1e-3
    assert torch.equal(found[far], predicted[far])


def test_on_the_divergence_line_a_step_is_the_cubic_chebyshev_polynomial():
    lr, target = tensor([0.7]), tensor([1.0])
    # a = 0 but for its first coordinate; b chosen so that v = 4: |m|^2 solves a linear equation for given |p|^2.
    p_squared = tensor([0.9])
    m_squared = (4 - lr * p_squared + lr**2 * target * (p_squared / 2 - target)) / (lr + lr**2 * target / 2)
    p, m = p_squared.sqrt()[:, None], m_squared.sqrt()[:, None]
    eps, norm = (p_squared - m_squared) / 2 - target, p_squared + m_squared
    torch.testing.assert_close(shallow.escape(eps, norm, lr, target), tensor([4.0]))
    path, _, _ = descend(p, m, lr, target, 8)
    x = lr * eps
    for found in path[1:]:
        x = shallow.next_on_edge(x)
        torch.testing.assert_close(lr * found, x, rtol=0, atol=1e-10)  # rounding grows by 3 a step, and off the line


def test_the_lyapunov_exponent_on_the_divergence_line_is_ln_3():
    # With a = b and eta Phi = 2 the whole line is v = 4.
    p = torch.linspace(0.3, 1.7, 50, dtype=torch.float64)[:, None]
    target = torch.full((50,), 1.0, dtype=torch.float64)
    found = shallow.lyapunov_exponent(p, torch.zeros_like(p), 2 / target, target, 4000)
    assert abs(float(found.mean()) - math.log(3)) < 0.01  # the mean over 50 orbits of 4000 steps


def test_the_lyapunov_exponent_where_gd_converges_is_the_logarithm_of_its_rate():
    p, lr, target = tensor([[1.0]]), tensor([0.6]), tensor([1.0])
    found = shallow.lyapunov_exponent(p, torch.zeros_like(p), lr, target, 4000)
    # a = b ends at lambda = 2 Phi; the way there counts for one part in thousands.
    torch.testing.assert_close(found, torch.log(shallow.rate(lr, 2 * target)), rtol=0.01, atol=0)
