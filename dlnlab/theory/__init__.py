"""The formulas of the papers as functions of tensors: float64, one problem or a stack, torch and scipy only.

Notation in arguments: `X` (N, D) inputs and `y` (N,) targets, or stacks (P, N, D) and (P, N); `init` is alpha, never
alpha^2; `log_init` its natural logarithm, for what is below floating point. The loss is |X beta - y|^2/(2N) everywhere.
The formulas know no units: scaling X, y and alpha by powers of ten scales the results, to rounding or a solver's accuracy,
wherever float64 holds them; beyond, they are 0 or infinite as any product of floats is.
`shallow` holds the formulas of the shallow linear network, in words of its own.
"""

from dlnlab.theory import shallow
from dlnlab.theory.bounds import (
    batch_smoothness,
    batch_weight,
    expected_gain_bounds,
    gain_bounds,
    gamma_LB,
    gradient_second_moment,
    hessian_second_moment,
    initial_gradient_second_moment,
    leading_gain,
)
from dlnlab.theory.deep import (
    absorbing_lr,
    absorbing_norm,
    critical_singular_value,
    effective_rank,
    entry_gradients,
    in_absorbing_set,
    layer_imbalance,
    min_nuclear_norm,
    next_layer_imbalance,
    next_square_norm,
    nuclear_norm_completion,
    rank_least_squares,
    representation_cost,
    smooth_rank,
    stable_rank,
)
from dlnlab.theory.flow import flow_edge, flow_integrals, flow_sharpness, loss_integral
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
from dlnlab.theory.lasso import lasso
from dlnlab.theory.stability import (
    Interpolator,
    Stability,
    almost_sure_edge,
    flattest_interpolator,
    lyapunov,
    mean_square_edge,
    sharpness,
    stability,
    trace_flattest_interpolator,
    weight_square,
)

__all__ = [
    "Interpolator",
    "Stability",
    "absorbing_lr",
    "absorbing_norm",
    "almost_sure_edge",
    "batch_smoothness",
    "batch_weight",
    "critical_singular_value",
    "effective_init",
    "effective_rank",
    "entry_gradients",
    "expected_gain_bounds",
    "flattest_interpolator",
    "flow_edge",
    "flow_integrals",
    "flow_sharpness",
    "gain_bounds",
    "gain_increment",
    "gain_increment_bounds",
    "gain_increment_minus",
    "gain_increment_plus",
    "gamma_LB",
    "gradient_second_moment",
    "hessian_second_moment",
    "hypentropy",
    "hypentropy_bregman",
    "hypentropy_conjugate",
    "hypentropy_gradient",
    "in_absorbing_set",
    "initial_gradient_second_moment",
    "lasso",
    "layer_imbalance",
    "leading_gain",
    "log_effective_init",
    "loss_integral",
    "lyapunov",
    "mean_square_edge",
    "min_bregman",
    "min_hypentropy",
    "min_l1",
    "min_l1_is_unique",
    "min_l2",
    "min_nuclear_norm",
    "mirror_shift",
    "next_layer_imbalance",
    "next_square_norm",
    "nuclear_norm_completion",
    "perturbation",
    "rank_least_squares",
    "representation_cost",
    "shallow",
    "sharpness",
    "smooth_rank",
    "stability",
    "stable_rank",
    "trace_flattest_interpolator",
    "weight_square",
]
