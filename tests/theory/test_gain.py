"""The gain's formulas against high precision and against the steps they summarise."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlnlab import theory
from dlnlab.kernels.factors import Factors

finite = st.floats(-50, 50).filter(lambda x: abs(abs(x) - 1) > 1e-6)


@given(finite)
def test_increments_agree_with_high_precision(x):
    with mpmath.workdps(700):
        exact = mpmath.mpf(x)
        q = -mpmath.log(abs(1 - exact**2))
        plus, minus = -2 * exact - 2 * mpmath.log(abs(1 - exact)), 2 * exact - 2 * mpmath.log(abs(1 + exact))
    # q near its zero at sqrt 2, and q± near theirs, are differences of logarithms: 1e-14 of those is left.
    floor = 1e-14 * (1 + abs(x)) if abs(x) > 0.005 else 1e-300
    for found, truth in (
        (theory.gain_increment(x), q),
        (theory.gain_increment_plus(x), plus),
        (theory.gain_increment_minus(x), minus),
    ):
        assert abs(found.item() - float(truth)) <= 1e-11 * abs(float(truth)) + floor  # the series ends at x^9


def test_increments_keep_their_digits_where_the_step_is_tiny():
    x = torch.tensor([1e-150, 1e-9, -1e-5], dtype=torch.float64)
    torch.testing.assert_close(theory.gain_increment(x), x * x, rtol=1e-9, atol=0)  # x^4/2 beside x^2
    torch.testing.assert_close(theory.gain_increment_plus(x), x * x * (1 + 2 * x / 3), rtol=1e-9, atol=0)


def test_the_gain_is_infinite_where_a_factor_vanishes_and_negative_beyond_the_root_of_two():
    assert theory.gain_increment([1.0, -1.0]).tolist() == [math.inf, math.inf]
    assert theory.gain_increment_plus(1.0) == math.inf and theory.gain_increment_minus(-1.0) == math.inf
    assert theory.gain_increment(1.4142) > 0 > theory.gain_increment(1.4143)


@given(st.floats(-1.0, 1.0))
def test_the_increment_lies_between_its_bounds(x):
    lower, upper = theory.gain_increment_bounds(x)
    q = theory.gain_increment(x)
    assert lower * (1 - 1e-15) <= q <= upper * (1 + 1e-15)


def test_the_upper_bound_ends_where_it_fails():
    assert theory.gain_increment(0.8926) <= 2 * 0.8926**2 < 2 * 0.8927**2 < theory.gain_increment(0.8927)


def test_the_increments_sum_to_what_the_kernels_accumulate():
    x = 0.7 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = Factors.start(torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 0.1, dtype=torch.float64))
    for row in x:
        factors.multiply(row, None)
    sums = [f(x).sum(0) for f in (theory.gain_increment, theory.gain_increment_plus, theory.gain_increment_minus)]
    for found, truth in zip(sums, (factors.gain(), factors.gain_plus(), factors.gain_minus()), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)  # logarithms of products near 0
    torch.testing.assert_close(theory.effective_init(0.1, sums[0]), factors.effective_init())
    # The mirror form of the path: beta_k = alpha_k^2 sinh(shift - 2 sum x).
    beta = (factors.w_plus**2 - factors.w_minus**2) / 2
    shift = theory.mirror_shift(sums[1], sums[2])
    mirrored = theory.effective_init(0.1, sums[0]) ** 2 * torch.sinh(shift - 2 * x.sum(0))
    torch.testing.assert_close(beta, mirrored, rtol=1e-9, atol=1e-15)  # exponents of order 10


@given(plus=st.floats(-5, 400), minus=st.floats(-5, 400))
def test_the_perturbation_is_the_mirrors_image_of_the_shift(plus, minus):
    with mpmath.workdps(50):
        truth = (mpmath.exp(-mpmath.mpf(plus)) - mpmath.exp(-mpmath.mpf(minus))) / 2 * mpmath.mpf(0.3) ** 2
    assert theory.perturbation(0.3, plus, minus).item() == pytest.approx(float(truth), rel=1e-13)


def test_the_logarithm_goes_on_where_the_effective_initialisation_underflows():
    gain = torch.tensor([0.0, 1.0, 1e6])
    torch.testing.assert_close(theory.log_effective_init(0.1, gain), math.log(0.1) - gain.double() / 2)
