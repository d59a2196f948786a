"""LassoDistance: how far the predictor is from the Lasso that label noise stands for."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import checks, theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork
from dlnlab.optim import GainSGD


class LassoDistance(Measurement):
    r"""The distance from the Lasso solution whose weights the label noise gives.

    Label noise of standard deviation delta makes every factor of a diagonal network shrink at the rate
    :math:`\gamma h_j \delta^2/(2b)`, h = diag(X^T X/n). What still stands must have a mean gradient of that size:

    .. math:: \beta^{lasso} = \arg\min L(\beta) + \sum_j \lambda_j |\beta_j|, \qquad
              \lambda_j = \frac{\gamma \delta^2}{2 b} h_j

    That gradient is linear in beta, so it is the mean iterate that the Lasso predicts: single ones fluctuate about it by
    sqrt(lambda). The mean is taken over the looks from `average_from` on; before, it is the predictor itself.

    In the results: `lasso_error`, |mean - beta_lasso|/|beta_lasso| (infinite where beta_lasso is 0; without label noise
    that of the least weighted l1 norm), and, with a teacher, `distance_mean` and `distance_lasso`, the squared distances
    of the two from it. A full batch has b = n.

    Cost: a Lasso for each problem and value of lambda, once; a pass over the predictor each time.

    Args:
        average_from: The step from which on looks enter the mean.
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Raises:
        ValueError: If average_from is negative.

    Reference:
        Derived here, to first order in gamma, for noise that dominates the residuals.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def __init__(self, average_from: int = 0, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self.average_from = checks.integer("LassoDistance.average_from", average_from)
        self._lasso: Tensor | None = None
        """beta_lasso, (E, D)."""
        self._sum, self._looks, self._looked_at = torch.zeros(()), 0, -1

    def check(self, model: Any) -> None:
        """Raise ValueError for another network, or an optimizer under whose steps factors shrink at another rate."""
        if not isinstance(model, LinearNetwork) or model.problems.y.ndim != 2:
            raise ValueError(f"LassoDistance: {type(model).__name__} is no linear network of one output")
        if not isinstance(model._optimizer, GainSGD):
            kind = type(model._optimizer).__name__
            raise ValueError(f"LassoDistance: its law is of GainSGD's steps, not of {kind}'s")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The error and, with a teacher, the two distances, (E,)."""
        del batch
        if self._lasso is None:
            self._lasso = self._solve(model)
        lasso, mean = self._lasso, self._mean(model)
        found = {
            "lasso_error": torch.linalg.vector_norm(mean - lasso, dim=-1) / torch.linalg.vector_norm(lasso, dim=-1)
        }
        if model.problems.teacher is not None:
            teacher = model.problems.teacher.double()[model.problem_index]
            found["distance_mean"] = (mean - teacher).square().sum(-1)
            found["distance_lasso"] = (lasso - teacher).square().sum(-1)
        return found

    def _mean(self, model: LinearNetwork) -> Tensor:
        beta, step = model.predictor().double(), model._optimizer.num_steps
        if step < self.average_from:
            return beta
        if step > self._looked_at:
            self._sum, self._looks, self._looked_at = self._sum + beta, self._looks + 1, step
        return self._sum / self._looks

    def state_dict(self) -> dict[str, Any]:
        """The mean so far."""
        return {**super().state_dict(), "sum": self._sum, "looks": self._looks, "looked_at": self._looked_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state_dict)
        self._sum, self._looks = state_dict["sum"], state_dict["looks"]
        self._looked_at = state_dict["looked_at"]

    def _solve(self, model: LinearNetwork) -> Tensor:
        x, y, problem = model.problems.x.double(), model.problems.y.double(), model.problem_index
        n = x.shape[1]
        lr = torch.as_tensor(model._optimizer.param_groups[0]["lr"], dtype=torch.float64, device=x.device)
        rows = torch.tensor([n if size == "full" else size for size in model.per_member("batch_size")], device=x.device)
        scale = lr * model.per_member_tensor("label_noise").double().square() / (2 * rows)
        beta, _ = theory.lasso(x[problem], y[problem], scale, x.square().mean(1)[problem])
        return beta
