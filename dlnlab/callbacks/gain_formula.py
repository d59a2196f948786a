"""GainFormula: the gain against stochastic gradient flow's formula for it."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork
from dlnlab.optim import StochasticGradientFlow


class GainFormula(Measurement):
    r"""The gain of SGD with single rows, or of stochastic gradient flow, against the formula of the latter.

    .. math:: \mathrm{Gain} = 2 \gamma \, \mathrm{diag}(X^T X/n) \int L\, dt

    In the results: `integrated_loss`, the integral; `mean_effective_init` and `predicted_effective_init`, the geometric
    means over coordinates of alpha_k and of what the formula makes of it; and `gain_over_formula`, the l1 norm of the
    gain over that of the formula (1 for the flow with the noise of the mean loss).

    Stochastic gradient flow states its integral. For SGD it is the trapezoidal sum over the steps of this schedule: a
    close one makes it exact, and costs a pass over the data each time. The formula has no label noise and no weight decay
    in it. Cost: one pass over the data.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        pesme2021, Theorem 1 (for its stochastic gradient flow).
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def __init__(self, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self._seen: dict[str, Tensor] = {}
        """Time, loss and integral at the last look, (E,) each."""

    def check(self, model: Any) -> None:
        """Raise ValueError where no gain is defined."""
        reason = model.variables()["gain"] if isinstance(model, LinearNetwork) else "it is no LinearNetwork"
        if not callable(reason):
            raise ValueError(f"GainFormula: the gain of {type(model).__name__} is not defined: {reason}")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The four values, (E,)."""
        variables = model.variables()
        integral = self._integral(model, batch, variables)
        lr = torch.as_tensor(model._optimizer.param_groups[0]["lr"], dtype=torch.float64, device=model.device)
        h = model.problems.x.double().square().mean(1)[model.problem_index]
        formula = 2 * (lr * integral)[:, None] * h
        gain, alpha = variables["gain"](), variables["effective_init"]().double()
        log_alpha = alpha.log().mean(-1)
        return {
            "integrated_loss": integral,
            "mean_effective_init": log_alpha.exp(),
            "predicted_effective_init": (log_alpha + (gain - formula).mean(-1) / 2).exp(),
            "gain_over_formula": gain.abs().sum(-1) / formula.sum(-1),
        }

    def _integral(self, model: LinearNetwork, batch: Any, variables: dict[str, Any]) -> Tensor:
        if isinstance(model._optimizer, StochasticGradientFlow):
            return variables["loss_integral"]()
        time, loss = variables["time"](), model.losses(batch).double()
        before = self._seen
        if before and bool((time >= before["time"]).all()):
            integral = before["integral"] + (time - before["time"]) * (loss + before["loss"]) / 2
        else:  # the first look, or that of another fit
            integral = torch.zeros_like(loss)
        self._seen = {"time": time, "loss": loss, "integral": integral}
        return integral

    def state_dict(self) -> dict[str, Any]:
        """The last look."""
        return {**super().state_dict(), "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state_dict)
        self._seen = state_dict["seen"]
