"""Perturbation: the point the solution is nearest to."""

from typing import Any

from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork
from dlnlab.optim import GainSGD


class Perturbation(Measurement):
    r"""beta~_0, which takes the place of the start in the implicit bias of large steps.

    .. math:: \tilde\beta_0 = \tfrac12 (\alpha_+^2 - \alpha_-^2), \qquad \alpha_\pm^2 = \alpha^2 e^{-\sum q_\pm}

    Recorded: `perturbation`, one entry per coordinate. Cost: two logarithms per coordinate and measurement.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        even2023, Theorem 1.
    """

    def check(self, model: Any) -> None:
        """Raise ValueError where it is not defined."""
        optimizer = getattr(model, "_optimizer", None)
        if not isinstance(model, LinearNetwork) or not isinstance(optimizer, GainSGD) or len(optimizer.pairs) != 1:
            raise ValueError("Perturbation: needs a network whose parameters are one pair of factors, and GainSGD")
        if not callable(reason := model.variables()["gain"]):
            raise ValueError(f"Perturbation: the gain of {type(model).__name__} is not defined: {reason}")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """beta~_0, (E, D)."""
        del batch
        optimizer = model._optimizer
        factors = optimizer.factors(optimizer.pairs[0])
        start = (factors.initial_plus * factors.initial_minus).abs().sqrt()
        return {"perturbation": theory.perturbation(start, factors.gain_plus(), factors.gain_minus())}
