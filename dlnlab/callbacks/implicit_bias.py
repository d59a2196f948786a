"""ImplicitBias: which part of the theory explains where training has ended?"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import checks, theory
from dlnlab.callbacks.base import Measurement
from dlnlab.data.base import Problems
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.models.base import DIVERGED
from dlnlab.optim import GradientFlow, StochasticGradientFlow
from dlnlab.optim.base import PairOptimizer, log_start


class ImplicitBias(Measurement):
    r"""Solves the theorem's variational problem for every member that interpolates, and coarser ones beside it.

    .. math:: \beta_\infty = \arg\min_{X \beta = y} D_{\psi_{\alpha_\infty}}(\beta, \tilde\beta_0)

    with the run's own effective initialisation and perturbation. A prediction's error is its l2 distance to the network
    relative to the network's length; that of the theorem, `bregman_error`, is about the square root of the loss.

    Logged, `theory/...`, one number per member that interpolates (loss below `loss_below`, not diverged, no weight decay
    and no label noise), else NaN:

    - `bregman_error`, and `bregman_residual`, the solver's own;
    - `error_unperturbed`: the perturbation dropped, which is gradient flow restarted from alpha_inf;
    - `error_mean_gain`: that with the gain's mean in every coordinate, its scale without its shape;
    - `error_weighted_l1`: minimum l1 weighted by ln(1/alpha) + Gain/2, where these are positive;
    - `error_gradient_flow`, `error_min_l1`, `error_min_l2`: what the steps have done to the gain left out;
    - `loss_integral_error` (gradient flow): relative error of int L dt = (psi(b) - D_psi(b, beta_t))/2;
    - `gain_formula_error` (stochastic gradient flow): of Gain = 2 gamma diag(H) int L dt, relative to the largest gain.

    With a teacher also the squared distance of each prediction to it, `distance_unperturbed` and so on; with test rows
    their `test_loss_...`. `distance_gradient_flow`, `distance_min_l1`, `distance_min_l2`, `flow_edge` (2/sharpness where
    gradient flow ends) and `min_l1_is_teacher` (1 or 0) are those of the member's problem and stand for all members.

    Cost: 0.5 to 5 ms per member at (N, D) = (20, 30), 0.5 s at (200, 1000), mostly the linear programs.

    Args:
        loss_below: A member interpolates if its full clean loss is below this.
        every_n_steps: A period in optimizer steps; without a schedule, the last step only.
        at: A list of steps.

    Raises:
        ValueError: If loss_below is not positive.

    Reference:
        even2023, Theorem 1; pesme2021, Theorem 1 (stochastic gradient flow); woodworth2020 (gradient flow). The weighted
        l1 norm, the mean gain and the loss integral: derived here.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    last_only: ClassVar[bool] = True

    def __init__(self, loss_below: float = 1e-10, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self.loss_below = checks.positive("loss_below", loss_below)
        self._levels: tuple[Problems, dict[str, Tensor]] | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError where the theorem says nothing of any member."""
        kind = type(model).__name__
        if not isinstance(model, DiagonalLinearNetwork):
            raise ValueError(f"ImplicitBias: the theorem is about DiagonalLinearNetwork, not {kind}")
        if not isinstance(model._optimizer, PairOptimizer) or len(model._optimizer.pairs) != 1:
            optimizer = type(model._optimizer).__name__
            raise ValueError(f"ImplicitBias: {optimizer} states no effective initialisation; use GainSGD or a flow")
        if not self._applies(model).any():
            raise ValueError(
                "ImplicitBias: with weight_decay or label_noise the theorem does not say where training ends; measure a "
                "variant that goes on `after: main` without them"
            )
        try:
            self._of_problems(model)
        except ValueError as error:
            raise ValueError(f"ImplicitBias: {error}") from None

    @staticmethod
    def _applies(model: DiagonalLinearNetwork) -> Tensor:
        """The members without weight decay and label noise, boolean (E,)."""
        kappa = model.unscheduled("weight_decay")  # NaN where the optimizer has none
        return ~(kappa > 0) & (model.per_member_tensor("label_noise") == 0)

    def _of_problems(self, model: DiagonalLinearNetwork) -> dict[str, Tensor]:
        """Minimum l1 and l2 interpolators (P, D), and whether the first is the teacher (P,); once."""
        if self._levels is None or self._levels[0] is not model.problems:
            x, y, teacher = model.problems.x.double(), model.problems.y.double(), model.problems.teacher
            found = {"min_l1": theory.min_l1(x, y)[0], "min_l2": theory.min_l2(x, y)[0]}
            if teacher is not None:
                # 1e-6: a vertex is exact to rounding; any other interpolator is far away
                apart = (found["min_l1"] - teacher).norm(dim=-1) <= 1e-6 * teacher.norm(dim=-1)
                found["min_l1_is_teacher"] = apart.double()
            self._levels = model.problems, found
        return self._levels[1]

    def measure(self, model: DiagonalLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """All of the above, (E,) each."""
        del batch
        problem, beta = model.problem_index, model.predictor().detach().double()
        losses = model.full_losses()
        solved = torch.nonzero(
            self._applies(model) & (losses < self.loss_below) & (model.status != DIVERGED)
        ).squeeze(1)  # fmt: skip
        levels = self._of_problems(model)
        optimizer = model._optimizer
        log_alpha, shift = optimizer.log_effective_init, optimizer.mirror_shift
        log_start, start_shift = self._start(model)
        predictions = {name: levels[name][problem] for name in ("min_l1", "min_l2")}
        predictions["gradient_flow"] = self._nearest(model, problem, log_start, start_shift)[0]
        residual = torch.full_like(losses, torch.nan, dtype=torch.float64)
        own = {
            "bregman": (log_alpha, shift),
            "unperturbed": (log_alpha, start_shift),
            "mean_gain": (log_start + (log_alpha - log_start).mean(-1, keepdim=True), start_shift),
        }
        for name, (logs, shifts) in own.items():
            found = torch.full_like(beta, torch.nan)
            # A coordinate that was multiplied by zero has no logarithm, and no such prediction.
            usable = solved[torch.isfinite(logs[solved]).all(-1) & torch.isfinite(shifts[solved]).all(-1)]
            found[usable], rest = self._nearest(model, problem[usable], logs[usable], shifts[usable])
            if name == "bregman":
                residual[usable] = rest
            predictions[name] = found
        predictions["weighted_l1"] = self._weighted(model, solved, -log_alpha)
        values = {"bregman_residual": residual}
        alone = torch.zeros_like(losses, dtype=torch.bool)
        alone[solved] = True
        for name, prediction in predictions.items():
            error = (prediction - beta).norm(dim=-1) / beta.norm(dim=-1)
            values["bregman_error" if name == "bregman" else f"error_{name}"] = torch.where(alone, error, torch.nan)
            values |= self._recovery(model, name, prediction)
        scale = theory.weight_square(predictions["gradient_flow"], torch.exp(log_start))
        values["flow_edge"] = 2 / theory.sharpness(model.problems.x.double()[problem], scale)
        if "min_l1_is_teacher" in levels:
            values["min_l1_is_teacher"] = levels["min_l1_is_teacher"][problem]
        return {**values, **self._integrals(model, beta, predictions["gradient_flow"], log_start)}

    @staticmethod
    def _start(model: DiagonalLinearNetwork) -> tuple[Tensor, Tensor]:
        """Ln alpha and ln|w+(0)/w-(0)| of the start, (E, D)."""
        initial = model._optimizer.state[model.w_plus]
        return log_start(initial["initial_plus"], initial["initial_minus"])

    @staticmethod
    def _nearest(model: Any, problem: Tensor, log_init: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """`theory.min_bregman` (G, D), and its residual (G,), each different problem solved once."""
        if len(problem) == 0:
            return torch.empty_like(log_init), torch.empty_like(log_init[:, 0])
        rows = torch.cat([problem[:, None].double(), log_init, shift], dim=1)
        unique, of = torch.unique(rows, dim=0, return_inverse=True)
        first = torch.empty(len(unique), dtype=torch.int64, device=of.device).scatter_(
            0, of, torch.arange(len(of), device=of.device)
        )
        x, y = (tensor[problem[first]].double() for tensor in (model.problems.x, model.problems.y))
        beta, residual = theory.min_bregman(x, y, log_effective_init=log_init[first], shift=shift[first])
        return beta[of], residual[of]

    @staticmethod
    def _weighted(model: Any, members: Tensor, weights: Tensor) -> Tensor:
        """Minimum weighted l1 norm of some members, (E, D); NaN for the others and where a weight is not positive."""
        found = torch.full_like(weights, torch.nan)
        usable = members[(weights[members] > 0).all(-1) & torch.isfinite(weights[members]).all(-1)]
        if len(usable):
            problem = model.problem_index[usable]
            x, y = model.problems.x[problem].double(), model.problems.y[problem].double()
            found[usable] = theory.min_l1(x, y, weights=weights[usable])[0]
        return found

    @staticmethod
    def _recovery(model: Any, name: str, prediction: Tensor) -> dict[str, Tensor]:
        if name == "bregman":  # the network itself, to the error above
            return {}
        found, problems, problem = {}, model.problems, model.problem_index
        if problems.teacher is not None:
            found[f"distance_{name}"] = (prediction - problems.teacher[problem].double()).square().sum(-1)
        if problems.x_test is not None:
            x, y = problems.x_test.double()[problem], problems.y_test.double()[problem]
            found[f"test_loss_{name}"] = ((x @ prediction[..., None]).squeeze(-1) - y).square().mean(-1) / 2
        return found

    @staticmethod
    def _integrals(model: Any, beta: Tensor, limit: Tensor, log_start: Tensor) -> dict[str, Tensor]:
        optimizer = model._optimizer
        if isinstance(optimizer, GradientFlow):
            initial = optimizer.state[model.w_plus]
            began = (initial["initial_plus"].square() - initial["initial_minus"].square()) / 2
            until, before = (theory.loss_integral(limit, beta=b, log_init=log_start) for b in (beta, began))
            whole = (theory.loss_integral(limit, log_init=log_start) - before).abs()
            measured = optimizer.loss_integral.expand(len(beta))
            return {"loss_integral_error": (measured - (until - before)).abs() / whole}
        if isinstance(optimizer, StochasticGradientFlow):
            h = model.problems.x.double().square().mean(1)[model.problem_index]
            lr = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64, device=beta.device)
            formula = 2 * lr.expand(len(beta))[:, None] * h * optimizer.loss_integral[:, None]
            error = (optimizer.gain - formula).abs().amax(-1) / optimizer.gain.abs().amax(-1)
            return {"gain_formula_error": error}
        return {}
