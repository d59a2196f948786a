"""GainForecast: the effective initialisation against what gradient flow forecasts for it."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import DiagonalLinearNetwork


class GainForecast(Measurement):
    r"""How far the effective initialisation has shrunk, against a forecast that needs no run.

    .. math:: \alpha_\infty/\alpha = \exp(-\mathrm{Gain}/2), \qquad
              \mathrm{Gain} \approx \gamma \, \mathrm{diag}(X^T X/n) \, \psi_\alpha(\beta_{flow})

    The formula of stochastic gradient flow with gradient flow's own loss integral, :math:`\psi_\alpha/2`. As psi grows like
    ln(1/alpha) |beta|_1, alpha_inf/alpha is a power of alpha. It is of members that start at beta = 0; NaN for others.

    In the results: `effective_init_ratio` and `forecast_effective_init_ratio`, geometric means over coordinates. Cost: a
    solution of gradient flow's limit for each problem and alpha, once.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        pesme2021, Theorem 1 (the formula); the loss integral of gradient flow and the power: derived here.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def __init__(self, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self._forecast: Tensor | None = None
        """(E,)."""

    def check(self, model: Any) -> None:
        """Raise ValueError where it is not defined."""
        reason = model.variables()["gain"] if isinstance(model, DiagonalLinearNetwork) else "it is not diagonal"
        if not callable(reason):
            raise ValueError(f"GainForecast: the gain of {type(model).__name__} is not defined: {reason}")

    def measure(self, model: DiagonalLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The ratio and its forecast, (E,)."""
        del batch
        if self._forecast is None:
            self._forecast = self._solve(model)
        gain = model.variables()["gain"]()
        return {
            "effective_init_ratio": (-gain.mean(-1) / 2).exp(),
            "forecast_effective_init_ratio": self._forecast,
        }

    def _solve(self, model: DiagonalLinearNetwork) -> Tensor:
        x, y, problem = model.problems.x.double(), model.problems.y.double(), model.problem_index
        start = model._optimizer.state[model.w_plus]
        plus, minus = start["initial_plus"], start["initial_minus"]
        init = (plus * minus).abs().sqrt()
        kinds, of = torch.unique(torch.cat((problem[:, None].double(), init), 1), dim=0, return_inverse=True)
        chosen, alpha = kinds[:, 0].long(), kinds[:, 1:]
        beta, _ = theory.min_hypentropy(x[chosen], y[chosen], alpha)
        integral = theory.loss_integral(beta, alpha)[of]
        lr = torch.as_tensor(model._optimizer.param_groups[0]["lr"], dtype=torch.float64, device=x.device)
        forecast = (-lr * integral * x.square().mean((1, 2))[problem]).exp()
        return torch.where((plus.abs() == minus.abs()).all(-1), forecast, torch.nan)
