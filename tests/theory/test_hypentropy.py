"""The hyperbolic entropy against high precision, at every scale."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlnlab import theory

betas = st.floats(-12, 3).map(lambda e: 10**e)
signs = st.sampled_from([-1.0, 1.0])
log_inits = st.floats(-1500, 12)


def psi(beta, log_init):
    a2 = mpmath.exp(2 * mpmath.mpf(log_init))
    beta = mpmath.mpf(beta)
    return (beta * mpmath.asinh(beta / a2) - mpmath.sqrt(beta**2 + a2**2) + a2) / 2


def grad(beta, log_init):
    return mpmath.asinh(mpmath.mpf(beta) / mpmath.exp(2 * mpmath.mpf(log_init))) / 2


@given(size=betas, sign=signs, log_init=log_inits)
def test_entropy_and_gradient_agree_with_high_precision(size, sign, log_init):
    with mpmath.workdps(2700):
        truth, slope = float(psi(sign * size, log_init)), float(grad(sign * size, log_init))
    assert theory.hypentropy([sign * size], log_init=log_init).item() == pytest.approx(truth, rel=1e-12, abs=1e-300)
    found = theory.hypentropy_gradient([sign * size], log_init=log_init).item()
    assert found == pytest.approx(slope, rel=1e-12, abs=1e-300)


@given(size=betas, ratio=st.floats(-3, 3), log_init=st.floats(-300, 12))
def test_the_divergence_agrees_with_high_precision(size, ratio, log_init):
    other = size * ratio
    with mpmath.workdps(1500):
        gap = psi(size, log_init) - psi(other, log_init)
        truth = float(gap - grad(other, log_init) * (mpmath.mpf(size) - mpmath.mpf(other)))
        scale = float(psi(size, log_init))
    found = theory.hypentropy_bregman([size], [other], log_init=log_init).item()
    assert found == pytest.approx(truth, rel=1e-9, abs=1e-13 * scale)  # far points: a difference of entropies


@pytest.mark.parametrize("log_init", [-200.0, -20.0, 0.0, 7.0])
def test_the_divergence_of_near_points_is_their_distance_in_the_hessian(log_init):
    step = 1e-7
    found = theory.hypentropy_bregman([1.0 + step], [1.0], log_init=log_init).item()
    step = 1.0 + step - 1.0  # as rounded
    expected = step**2 / (4 * math.hypot(1.0, math.exp(2 * log_init)))
    assert found == pytest.approx(expected, rel=1e-6)  # the next order is 1e-7


@given(size=betas, log_init=st.floats(-150, 12))
def test_fenchels_equality_holds_at_the_gradient(size, log_init):
    z = theory.hypentropy_gradient([size], log_init=log_init)
    total = theory.hypentropy([size], log_init=log_init) + theory.hypentropy_conjugate(z, log_init=log_init)
    torch.testing.assert_close(total, (z * size).sum(), rtol=1e-10, atol=0)  # exponents up to 600


def test_the_entropy_is_half_of_woodworths_and_zero_at_zero():
    beta, alpha = 0.7, 0.3  # theirs: beta = w+^2 - w-^2, w(0) = alpha/sqrt 2
    z = beta / (alpha**2 / 2)
    q = 2 - math.sqrt(4 + z * z) + z * math.asinh(z / 2)
    assert theory.hypentropy([beta], alpha).item() == pytest.approx(alpha**2 / 2 * q / 2)
    assert theory.hypentropy([0.0, 0.0], 1e-200) == 0


def test_a_bad_initialisation_is_refused():
    for init in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"init = .*: must be positive and finite"):
            theory.hypentropy([1.0], init)
    with pytest.raises(ValueError, match="exactly one"):
        theory.hypentropy([1.0], 0.1, log_init=0.0)
