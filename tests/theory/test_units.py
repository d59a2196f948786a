"""Every formula in other units of X and y: powers of the units come out, nothing else changes.

`LAWS` holds an entry for each public function of `dlnlab.theory`, so that a new one without its law fails.
"""

import inspect

import pytest
import torch

from dlnlab import theory
from dlnlab.theory import Interpolator, shallow

SCALES = ((-150, -150), (-150, 8), (-0.5, 0.2), (8, 8), (150, 140))
"""Powers of ten of the units of X and of y."""
ALPHAS = (1e-15, 1e-7, 1e4)
ONE, S, T = (0, 0), (1, 0), (0, 1)
BETA, ALPHA, LOSS, CURVATURE, LR, TIME = (-1, 1), (-0.5, 0.5), (0, 2), (2, 0), (-1, -1), (-1, -1)
"""Exponents of the units s of X and t of y."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = normal(4, 6)
TEACHER = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
Y = X @ TEACHER
WIDE, POSITIVE = normal(6, seed=1), normal(6, seed=2).abs() + 0.1
WEIGHTS = [normal(2, 4, 3, seed=3), normal(2, 4, 4, seed=4), normal(2, 3, 4, seed=5)]
GRADIENTS = [normal(2, 4, 3, seed=6), normal(2, 4, 4, seed=7), normal(2, 3, 4, seed=8)]
RATES = torch.tensor([0.02, 0.1], dtype=torch.float64)
PLACES = torch.tensor([[i, j] for i in range(4) for j in range(3) if (i, j) != (3, 2)])
VALUES = torch.outer(torch.tensor([1.0, 2.0, -1.0, 0.5]), torch.tensor([1.0, -0.5, 2.0])).double()[tuple(PLACES.T)]
EPS, NORM, TARGET = torch.tensor([0.7, -0.4]).double(), torch.tensor([3.0, 2.5]).double(), torch.tensor([0.5]).double()
P, M = normal(2, 3, seed=9), normal(2, 3, seed=10)
SHALLOW = {"eps": (EPS, S), "norm_squared": (NORM, S), "lr": (RATES, (-1, 0)), "target": (TARGET, S)}
"""The shallow network's unit s is that of a^T b."""
HALF = (0.5, 0)


def shallow_of(*names):
    return {name: SHALLOW[name] for name in names}


def interpolator(init):
    return {"x": (X, S), "beta": (TEACHER, BETA), "init": (init, ALPHA)}


def law(result, call=None, **arguments):
    """The result's units (one for each part), how it is called if not plainly, and arguments as (value, units)."""
    return result if isinstance(result, list) else [result], call, arguments


def edges(found):
    return found.sharpness, found.edge, found.mean_square_edge


def with_interpolator(function):
    return lambda x, beta, init, **rest: function(Interpolator(x, beta, init), **rest)


def laws(alpha):
    init = (torch.full((6,), alpha, dtype=torch.float64), ALPHA)
    data = {"X": (X, S), "y": (Y, T)}
    batch = {"batch_size": (2, ONE), "sampling": ("subset", ONE)}
    lyapunov = {"num_steps": (40, ONE), "num_chains": (4, ONE)}
    completion = {"places": (PLACES, ONE), "values": (VALUES, S), "shape": ((4, 3), ONE)}
    gains = {"init": init, "gain_plus": (POSITIVE, ONE), "gain_minus": (WIDE, ONE)}
    return {
        "absorbing_lr": law(
            (2 / 3 - 2, 0),
            norm_squared=(20 * NORM, (2 / 3, 0)),
            weight_decay=(RATES, (2 - 2 / 3, 0)),
            largest=(EPS.abs(), S),
            depth=(3, ONE),
        ),
        "absorbing_norm": law((2 / 3, 0), weight_decay=(RATES, (2 - 2 / 3, 0)), largest=(EPS.abs(), S), depth=(3, ONE)),
        "almost_sure_edge": law(
            [LR, LR], with_interpolator(theory.almost_sure_edge), **interpolator(init[0]), **lyapunov
        ),
        "batch_smoothness": law([CURVATURE, ONE], X=(X, S), **batch),
        "batch_weight": law(ONE, batch_size=(2, ONE), num_samples=(5, ONE)),
        "critical_singular_value": law((0.5, -0.5), weight_decay=(0.1, S), residual=(0.7, T), depth=(4, ONE)),
        "effective_init": law(ALPHA, init=init, gain=(WIDE, ONE)),
        "effective_rank": law(ONE, singular_values=(POSITIVE, S)),
        "entry_gradients": law(
            [(3, 0), (2, 0), (2, 0), (2, 0)],
            lambda **of: (lambda a, g: (a, *g))(*theory.entry_gradients(**of)),
            weights=(WEIGHTS, S),
            row=(torch.tensor([0, 2]), ONE),
            column=(torch.tensor([1, 0]), ONE),
        ),
        "expected_gain_bounds": law([ONE, ONE], lr=(0.1, LR), loss_sum=(2.0, LOSS), X=(X, S), **batch),
        "flattest_interpolator": law([BETA, (1, 1), (1, 1)], return_bound=(True, ONE), **data),
        "flow_edge": law(LR, init=init, **data),
        "flow_integrals": law([BETA, (1, 1)], init=init, **data),
        "flow_sharpness": law([(1, 1), ONE], beta=(WIDE, BETA), effective_init=init, **data),
        "gain_bounds": law([CURVATURE, CURVATURE], X=(X, S), **batch),
        "gain_increment": law(ONE, x=(WIDE, ONE)),
        "gain_increment_bounds": law([ONE, ONE], x=(WIDE, ONE)),
        "gain_increment_minus": law(ONE, x=(WIDE, ONE)),
        "gain_increment_plus": law(ONE, x=(WIDE, ONE)),
        "gamma_LB": law(
            ONE, lr=(0.1, LR), X=(X, S), batch_size=(2, ONE), beta_max=(2.0, BETA), sampling=("subset", ONE)
        ),
        "gradient_second_moment": law((2, 2), X=(X, S), residual=(Y, T), **batch),
        "hessian_second_moment": law((4, 0), X=(X, S), **batch),
        "hypentropy": law(BETA, beta=(WIDE, BETA), init=init),
        "hypentropy_bregman": law(BETA, beta=(WIDE, BETA), reference=(TEACHER, BETA), init=init),
        "hypentropy_conjugate": law(BETA, z=(WIDE, ONE), init=init),
        "hypentropy_gradient": law(ONE, beta=(WIDE, BETA), init=init),
        "in_absorbing_set": law(
            ONE,
            weights=(WEIGHTS, S),
            rank=(3, ONE),
            alpha=(2.0, S),
            rank_slack=(0.3, ONE),
            balance=(300.0, (4, 0)),
            bound=(30.0, (2, 0)),
        ),
        "initial_gradient_second_moment": law((4, 2), teacher=(TEACHER, T), batch_size=(2, ONE), input_std=(1.5, S)),
        "lasso": law([BETA, ONE], penalty=(0.1, (1, 1)), **data),
        "layer_imbalance": law([(2, 0), (2, 0)], weights=(WEIGHTS, S)),
        "leading_gain": law(
            ONE,
            lr=(0.1, LR),
            X=(X, S),
            residual_integral=(Y.abs(), BETA),
            gradient_integral=(POSITIVE, (1, 1)),
            **batch,
        ),
        "log_effective_init": law(
            ONE, lambda init, gain: theory.log_effective_init(init, gain) - init.log(), init=init, gain=(WIDE, ONE)
        ),
        "loss_integral": law(BETA, beta_inf=(TEACHER, BETA), init=init, beta=(WIDE, BETA)),
        "lyapunov": law(
            [ONE, ONE],
            with_interpolator(theory.lyapunov),
            **interpolator(init[0]),
            lr=(torch.tensor([0.01, 0.2]).double(), LR),
            **lyapunov,
        ),
        "mean_square_edge": law(LR, init=init, **data, **batch),
        "min_bregman": law([BETA, ONE], effective_init=init, perturbation=(0.1 * WIDE, BETA), **data),
        "min_hypentropy": law([BETA, ONE], init=init, **data),
        "min_l1": law([BETA, ONE, (-1, 0)], return_dual=(True, ONE), **data),
        "min_l1_is_unique": law(ONE, **data),
        "min_l2": law([BETA, ONE], **data),
        "min_nuclear_norm": law([S, ONE], **completion),
        "mirror_shift": law(ONE, gain_plus=(POSITIVE, ONE), gain_minus=(WIDE, ONE)),
        "next_layer_imbalance": law(
            [(2, 0), (2, 0)],
            weights=(WEIGHTS, S),
            gradients=(GRADIENTS, T),
            lr=(RATES, (1, -1)),
            weight_decay=(RATES, (-1, 1)),
        ),
        "next_square_norm": law(
            (2, 0),
            weights=(WEIGHTS, S),
            gradients=(GRADIENTS, T),
            pull=(EPS, (1, 1)),
            lr=(RATES, (1, -1)),
            weight_decay=(RATES, (-1, 1)),
        ),
        "nuclear_norm_completion": law([S, ONE], penalty=(0.3, (1, 1)), scale=(0.1, (0, 1)), **completion),
        "perturbation": law(BETA, **gains),
        "rank_least_squares": law(
            [S, (2, 0)], rank=(1, ONE), **completion | {"values": (VALUES + 0.1 * normal(11), S)}
        ),
        "representation_cost": law((2 / 3, 0), matrix=(WEIGHTS[0], S), depth=(3, ONE)),
        "sharpness": law((1, 1), X=(X, S), weight_square=(POSITIVE, BETA)),
        "smooth_rank": law(ONE, singular_values=(POSITIVE, S), alpha=(1.0, S)),
        "stability": law(
            [(1, 1), LR, LR],
            with_interpolator(lambda *of, **batch: edges(theory.stability(*of, **batch))),
            **interpolator(init[0]),
            **batch,
        ),
        "stable_rank": law(ONE, singular_values=(POSITIVE.sort(descending=True).values, S)),
        "trace_flattest_interpolator": law([BETA, ONE], **data),
        "weight_square": law(BETA, beta=(WIDE, BETA), init=init),
        "shallow.diverges": law(ONE, **SHALLOW),
        "shallow.escape": law(ONE, **SHALLOW),
        "shallow.flow_limit": law([HALF, HALF], p=(P, HALF), m=(M, HALF), target=(TARGET, S)),
        "shallow.imbalance_factor": law(ONE, **shallow_of("eps", "lr")),
        "shallow.leading_log_contraction": law(ONE, p=(P, HALF), m=(M, HALF), lr=(RATES, (-1, 0)), target=(TARGET, S)),
        "shallow.log_contraction_bound": law(ONE, **SHALLOW),
        "shallow.lyapunov_exponent": law(
            ONE, p=(P, HALF), m=(M, HALF), lr=(RATES, (-1, 0)), target=(TARGET, S), num_steps=(40, ONE)
        ),
        "shallow.next_eps": law(S, **SHALLOW),
        "shallow.next_norm_squared": law(S, **SHALLOW),
        "shallow.next_on_edge": law(ONE, x=(EPS, ONE)),
        "shallow.norm_squared_at": law(S, product=(EPS, S), spread=(NORM, S), contraction=(0.5, ONE)),
        "shallow.rate": law(ONE, **shallow_of("lr", "norm_squared")),
        "shallow.sharpness": law(S, **shallow_of("eps", "norm_squared", "target")),
        "shallow.spread": law(S, p=(P, HALF), m=(M, HALF)),
        "shallow.theorem_lr": law((-1, 0), **shallow_of("eps", "norm_squared", "target")),
    }


LAWS = laws(1.0)
# What iterates stops at an error, and stops elsewhere where roundings differ; the rest is rounding times a condition.
ACCURACY = {"flow_integrals": 1e-7, "lyapunov": 1e-6, "almost_sure_edge": 1e-6, "nuclear_norm_completion": 1e-5,
            "min_nuclear_norm": 1e-6, "rank_least_squares": 1e-5, "flattest_interpolator": 1e-6}  # fmt: skip


def flat(found):
    found = found if isinstance(found, (tuple, list)) else [found]
    return [torch.as_tensor(value, dtype=torch.float64) for value in found]


def in_units(value, exponent):
    if exponent == 0:
        return value
    return [one * 10.0**exponent for one in value] if isinstance(value, list) else value * 10.0**exponent


def in_range(value, exponent):
    """Whether float64 holds all entries of a value with this power of ten, with room for their squares' roundings."""
    sizes = torch.cat(
        [torch.as_tensor(one).double().abs().flatten() for one in (value if isinstance(value, list) else [value])]
    )
    sizes = sizes[sizes > 0].log10() + exponent
    return not len(sizes) or (float(sizes.max()) < 290 and float(sizes.min()) > -290)


def functions():
    for name in theory.__all__:
        if inspect.isfunction(getattr(theory, name)):
            yield name
    yield from (f"shallow.{name}" for name, _ in inspect.getmembers(shallow, inspect.isfunction) if name[0] != "_")


@pytest.mark.parametrize("name", sorted({*functions(), *LAWS}))
def test_units_of_the_data_come_out_as_powers_and_change_nothing_else(name):
    room, function = (shallow, name[8:]) if name.startswith("shallow.") else (theory, name)
    tried = 0
    for alpha in ALPHAS if any(u == ALPHA for _, u in LAWS[name][2].values()) else [1.0]:
        units, call, arguments = laws(alpha)[name]
        call = call or getattr(room, function)
        plain = flat(call(**{key: value for key, (value, _) in arguments.items()}))
        assert all(value.isfinite().all() for value in plain)
        for s, t in SCALES:
            exponents = {key: u[0] * s + u[1] * t for key, (_, u) in arguments.items()}
            expected = [u[0] * s + u[1] * t for u in units]
            if not all(in_range(value, exponents[key]) for key, (value, _) in arguments.items() if exponents[key]):
                continue
            if not all(map(in_range, plain, expected)) or ("init" in arguments and not in_range(alpha**2, t - s)):
                continue
            found = flat(call(**{key: in_units(value, exponents[key]) for key, (value, _) in arguments.items()}))
            for value, one, exponent in zip(plain, found, expected, strict=True):
                tol = ACCURACY.get(name, 1e-9)
                size = float(value.abs().max())
                off = float((one * 10.0**-exponent - value).abs().max())
                assert off <= tol * max(size, 1e-3), (s, t, alpha)
            tried += 1
    assert tried >= 2


# Problems at the edges: zero inputs, zero targets, one row, repeated rows, a row or column of zeros, one huge column.
INPUTS = normal(3, 4, seed=11)
DEGENERATE = {
    "zero": torch.zeros(3, 4).double(),
    "one row": INPUTS[:1],
    "repeated rows": INPUTS[[0, 0, 1, 2]],
    "rank one": torch.outer(INPUTS[:, 0], INPUTS[0]),
    "zero column": INPUTS * torch.tensor([0.0, 1.0, 1.0, 1.0]),
    "zero row": INPUTS * torch.tensor([[0.0], [1.0], [1.0]]),
    "huge column": INPUTS * torch.tensor([1e8, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_problems_have_finite_answers_and_infinite_edges_where_nothing_curves(kind, target):
    X = DEGENERATE[kind]
    y = target * X @ normal(4, seed=12)
    flat_loss = not X.any()
    for alpha in (1e-6, 1.0):
        beta, residual = theory.min_hypentropy(X, y, alpha)
        assert beta.isfinite().all() and residual < 1e-9
        found = theory.stability(Interpolator(X, beta, alpha), 1)
        almost_sure, error = theory.almost_sure_edge(Interpolator(X, beta, alpha), 1, num_steps=50)
        least = theory.flattest_interpolator(X, y)[1]
        assert least >= 0 and least.isfinite() and error.isfinite()
        for edge in (found.edge, found.mean_square_edge, almost_sure, theory.flow_edge(X, y, alpha)):
            assert edge > 0 and edge.isinf() == flat_loss
    integrals = theory.flow_integrals(X, y, 1.0)
    assert all(value.isfinite().all() for value in integrals)
    known = 2 * len(y) * theory.loss_integral(theory.min_hypentropy(X, y, 1.0)[0], 1.0)
    torch.testing.assert_close(integrals[0].sum(), known, rtol=1e-6, atol=0)  # what is accepted of its integrator


def test_the_flows_integrals_add_up_to_the_loss_from_the_rich_to_the_kernel_regime():
    X = normal(5, 9)
    y = X[:, :2] @ torch.tensor([1.0, -2.0]).double()
    for alpha in (1e-15, 1e-3, 30.0, 1e4):
        known = 10 * theory.loss_integral(theory.min_hypentropy(X, y, alpha)[0], alpha)
        residual, gradient = theory.flow_integrals(X, y, alpha)
        torch.testing.assert_close(residual.sum(), known, rtol=1e-8, atol=0)  # the integrator's tolerance
        if alpha == 1e4:  # there r' = -K r with K = 2 alpha^2 X X^T/N, whose integrals are closed
            L, V = torch.linalg.eigh(2e8 * X @ X.T / 5)
            c = V.T @ y
            P = V @ (torch.outer(c, c) / (L[:, None] + L)) @ V.T
            torch.testing.assert_close(residual, P.diagonal(), rtol=1e-7, atol=0)  # the loss is a square to 1e-8
            torch.testing.assert_close(gradient, (X.T @ P @ X).diagonal() / 25, rtol=1e-7, atol=0)  # likewise
