"""A measurement of your own: how many coordinates does the predictor use?"""

from typing import Any

from torch import Tensor

from dlnlab.callbacks import Measurement
from dlnlab.models import LinearNetwork


class Participation(Measurement):
    """The participation ratio |beta|_1^2/|beta|_2^2, between 1 and D.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.
    """

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """One value per member, (E,)."""
        beta = model.predictor().flatten(1)
        return {"participation": beta.abs().sum(-1).square() / beta.square().sum(-1)}
