"""ShallowTheory: does gradient descent on a^T b obey its exact laws, and how much flatter than the flow does it end?"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.callbacks.base import Measurement
from dlnlab.models import ShallowLinearNetwork
from dlnlab.models.base import CONVERGED, DIVERGED
from dlnlab.optim import GainSGD
from dlnlab.theory import shallow


class ShallowTheory(Measurement):
    r"""Holds a shallow linear network to its laws, and compares where it is with where gradient flow would end.

    .. math:: Q_i = R\,Q_i(0), \quad R = \prod_t (1 - \eta^2 \epsilon_t^2), \qquad
        \lambda_\infty = \sqrt{4 \Phi^2 + S_0^2 R^2} < \lambda_{GF} \iff |R| < 1

    Logged, one number per member. What exact arithmetic makes zero, `theory/...`: the error of each law of one step, which
    is taken from here in a and b, relative to the largest of the terms that cancel: `eps_law_error`,
    `norm_squared_law_error`, `imbalance_law_error`, `escape_law_error`; of the whole path so far,
    `norm_squared_error`, relative, of lambda = sqrt(4 (a^T b)^2 + S_0^2 R^2). `divergence_error` is 1 for a member that has
    diverged below the exact divergence line or converged above it, 0 where its end agrees, and NaN while it is above the
    line and runs.

    Where it is:

    - `imbalance_ratio`: |R|;
    - `sharpness`, `effective_sharpness` (times lr), and `sharpness_over_flow`, `sharpness_over_flattest`: over lambda_GF
      and over 2 |Phi|, the flattest minimum's;
    - `rate`: |1 - lr lambda|;
    - `steps_to_converge`: NaN unless it has converged;
    - `contraction_over_bound`, `contraction_over_leading`: -ln |R| over its lower bound under Theorem 1's condition, and
      over its first-order law.

    How its step size compares, the same at every step: `lr_over_theorem` (below 1, Theorem 1 speaks), `lr_over_initial`
    (2 eta |eps(0)|), `lr_over_norm` (eta sqrt(lambda(0)^2 + 4 Phi^2)/2), `lr_over_flow_edge` (eta lambda_GF/2),
    `lr_over_flattest_edge` (eta |Phi|, above 1 nothing converges), `escape` (v(0); above 4 all diverge).

    What is of a whole path at one step size (the last paragraph, the contractions and `divergence_error`) is NaN for
    members with a schedule; the rest is of the present one.

    Cost: a few passes over the parameters.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        beneventano2025 (the imbalance, Theorem 1's condition); the laws, the bound and the lines: derived here.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Raise ValueError where the laws say nothing."""
        if not isinstance(model, ShallowLinearNetwork):
            raise ValueError(f"ShallowTheory: the laws are of ShallowLinearNetwork, not {type(model).__name__}")
        optimizer = model._optimizer
        if not isinstance(optimizer, GainSGD):
            raise ValueError(f"ShallowTheory: the laws are of GainSGD's steps, not of {type(optimizer).__name__}'s")
        if bool((model.unscheduled("weight_decay") != 0).any()) or model._has_noise:
            raise ValueError("ShallowTheory: the laws are of gradient descent without weight_decay and label_noise")
        if model.no_target is not None:
            raise ValueError(f"ShallowTheory: {model.no_target}")

    def measure(self, model: ShallowLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """All of the above, (E,) each."""
        del batch
        optimizer, target = model._optimizer, model.target.double()
        p, m, lr = model.p.detach().double(), model.m.detach().double(), model.scheduled_lr.to(target.device)
        start = optimizer.state[model.p]
        p0, m0 = start["initial_plus"], start["initial_minus"]
        eps0, norm0 = _eps(p0, m0, target), _norm(p0, m0)
        eps, norm, spread0 = _eps(p, m, target), _norm(p, m), shallow.spread(p0, m0)
        log_ratio = optimizer.gain[:, 0]  # the same in every coordinate
        ratio = torch.exp(-log_ratio)
        flow, sharpness = shallow.norm_squared_at(target, spread0), shallow.sharpness(eps, norm, target)
        predicted, converged = shallow.norm_squared_at(eps + target, spread0, ratio), model.status == CONVERGED
        of_paths = {
            "divergence_error": _divergence_error(model.status, shallow.diverges(eps0, norm0, lr, target)),
            "contraction_over_bound": log_ratio / shallow.log_contraction_bound(eps0, norm0, lr, target),
            "contraction_over_leading": log_ratio / shallow.leading_log_contraction(p0, m0, lr, target),
            "lr_over_theorem": lr / shallow.theorem_lr(eps0, norm0, target),
            "lr_over_initial": 2 * lr * eps0.abs(),
            "lr_over_norm": lr * torch.hypot(norm0, 2 * target) / 2,
            "lr_over_flow_edge": lr * flow / 2,
            "lr_over_flattest_edge": lr * target.abs(),
            "escape": shallow.escape(eps0, norm0, lr, target),
        }
        if model.programme.changes("lr"):
            constant = (model.programme.rows < 0).to(lr.device)
            of_paths = {name: torch.where(constant, value, torch.nan) for name, value in of_paths.items()}
        return {
            **_law_errors(p, m, lr, target),
            "norm_squared_error": torch.where(norm.isfinite(), (predicted / norm - 1).abs(), torch.nan),
            **of_paths,
            "imbalance_ratio": ratio,
            "sharpness": sharpness,
            "effective_sharpness": lr * sharpness,
            "sharpness_over_flow": sharpness / flow,
            "sharpness_over_flattest": sharpness / (2 * target.abs()),
            "rate": shallow.rate(lr, norm),
            "steps_to_converge": torch.where(converged, model.stopped_at.double(), torch.nan),
        }


class LyapunovExponent(Measurement):
    """How fast two nearby paths part under gradient descent on a^T b: positive where it is chaotic, ln(rate) at a minimum.

    Logged: `lyapunov`, one number per member that has not diverged; it is followed for `num_steps` further steps of its
    own map. Cost: about 0.3 ms a step for a thousand members.

    Args:
        num_steps: Steps the mean is taken over.
        every_n_steps: A period in optimizer steps; without a schedule, the last step only.
        at: A list of steps.

    Raises:
        ValueError: If num_steps is not positive.

    Reference:
        Derived here (`theory.shallow.lyapunov_exponent`).
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    last_only = True

    def __init__(self, num_steps: int = 5000, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self.num_steps = checks.integer("num_steps", num_steps, at_least=1)

    def check(self, model: Any) -> None:
        """Raise ValueError for other networks."""
        if not isinstance(model, ShallowLinearNetwork):
            raise ValueError(f"LyapunovExponent: it is that of ShallowLinearNetwork, not of {type(model).__name__}")
        if model.no_target is not None:
            raise ValueError(f"LyapunovExponent: {model.no_target}")

    def names(self, model: Any) -> tuple[str, ...]:
        """Its one variable, without following anything."""
        return ("lyapunov",)

    def measure(self, model: ShallowLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The exponents (E,)."""
        del batch
        lr = model.scheduled_lr.to(model.device)
        found = shallow.lyapunov_exponent(model.p.detach(), model.m.detach(), lr, model.target, self.num_steps)
        return {"lyapunov": torch.where(model.status == DIVERGED, torch.nan, found)}


def _eps(p: Tensor, m: Tensor, target: Tensor) -> Tensor:
    return (p.square().sum(-1) - m.square().sum(-1)) / 2 - target


def _norm(p: Tensor, m: Tensor) -> Tensor:
    return p.square().sum(-1) + m.square().sum(-1)


def _law_errors(p: Tensor, m: Tensor, lr: Tensor, target: Tensor) -> dict[str, Tensor]:
    """One step in a and b from p, m, against what the laws say of it."""
    a, b = (p + m) * 0.5**0.5, (p - m) * 0.5**0.5
    eps, norm = (a * b).sum(-1) - target, (a.square() + b.square()).sum(-1)
    x = (lr * eps)[:, None]
    next_a, next_b = a - x * b, b - x * a
    next_eps, next_norm = (next_a * next_b).sum(-1) - target, (next_a.square() + next_b.square()).sum(-1)
    imbalance = (next_a - next_b) * (next_a + next_b)
    size = (1 + x[:, 0].abs()) ** 2 * (norm + 2 * target.abs())
    edge, next_edge = (shallow.escape(e, n, lr, target) for e, n in ((eps, norm), (next_eps, next_norm)))
    return {
        "eps_law_error": (shallow.next_eps(eps, norm, lr, target) - next_eps).abs() / size,
        "norm_squared_law_error": (shallow.next_norm_squared(eps, norm, lr, target) - next_norm).abs() / size,
        "imbalance_law_error": (
            ((a - b) * (a + b) * shallow.imbalance_factor(eps, lr)[:, None] - imbalance).abs().amax(-1) / size
        ),
        "escape_law_error": (
            ((edge - 4) * (1 + lr**2 * eps * (eps + target)) - (next_edge - 4)).abs()
            / (size * (lr + lr**2 * target.abs()) * (1 + x[:, 0].abs()) ** 2 + 4)
        ),
    }


def _divergence_error(status: Tensor, predicted: Tensor) -> Tensor:
    wrong = ((status == DIVERGED) & ~predicted) | ((status == CONVERGED) & predicted)
    undecided = predicted & (status != DIVERGED) & (status != CONVERGED)
    return torch.where(undecided, torch.nan, wrong.double())
