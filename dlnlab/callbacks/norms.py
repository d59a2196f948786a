"""Norms of what the network computes."""

from typing import Any

from torch import Tensor

from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork


class PredictorNorm(Measurement):
    """The l1 norm of the predictor, what a small initialisation minimises.

    Logged: `predictor/l1_norm`. Cost: one pass over the predictor.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        woodworth2020 (minimum l1 norm as init_scale goes to 0).
    """

    def check(self, model: Any) -> None:
        """Raise ValueError for a module without a predictor."""
        if not isinstance(model, LinearNetwork):
            raise ValueError(f"PredictorNorm: {type(model).__name__} is no LinearNetwork and has no predictor")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """l1 norm (E,)."""
        del batch
        return {"l1_norm": model.predictor().flatten(1).abs().sum(-1)}
