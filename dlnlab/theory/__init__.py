"""The formulas of the papers as functions of tensors: float64, one problem or a stack, torch and scipy only.

Notation in arguments: `X` (N, D) inputs and `y` (N,) targets, or stacks (P, N, D) and (P, N); `init` is alpha, never
alpha^2; `log_init` its natural logarithm, for what is below floating point. The loss is |X beta - y|^2/(2N) everywhere.
"""

from dlnlab.theory.gain import (
    effective_init,
    gain_increment,
    gain_increment_bounds,
    gain_increment_minus,
    gain_increment_plus,
    log_effective_init,
    mirror_shift,
    perturbation,
)
from dlnlab.theory.hypentropy import hypentropy, hypentropy_bregman, hypentropy_conjugate, hypentropy_gradient
from dlnlab.theory.interpolation import min_bregman, min_hypentropy, min_l1, min_l1_is_unique, min_l2

__all__ = [
    "effective_init",
    "gain_increment",
    "gain_increment_bounds",
    "gain_increment_minus",
    "gain_increment_plus",
    "hypentropy",
    "hypentropy_bregman",
    "hypentropy_conjugate",
    "hypentropy_gradient",
    "log_effective_init",
    "min_bregman",
    "min_hypentropy",
    "min_l1",
    "min_l1_is_unique",
    "min_l2",
    "mirror_shift",
    "perturbation",
]
