"""GainTracker: how large the gain is, and where."""

from typing import Any

import torch
from torch import Tensor

from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork


class GainTracker(Measurement):
    """The gain of a network whose parameters are pairs of factors, its scale and its shape.

    Logged: `gain/l1`, the l1 norm of the gain; `gain/support_ratio`, the mean gain on the teacher's support over the mean
    gain off it (data with a teacher only; 1 is homogeneous). In the results also `gain` and `effective_init`, one entry
    per coordinate. Cost: one logarithm per coordinate and measurement.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        even2023, Theorem 1 and section 4.
    """

    def check(self, model: Any) -> None:
        """Raise ValueError where no gain is defined."""
        reason = model.variables()["gain"] if isinstance(model, LinearNetwork) else "it is no LinearNetwork"
        if not callable(reason):
            raise ValueError(f"GainTracker: the gain of {type(model).__name__} is not defined: {reason}")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """Gain, effective initialisation (E, D), l1 scale and support ratio (E,)."""
        del batch
        variables = model.variables()
        gain = variables["gain"]()
        values = {"gain": gain, "effective_init": variables["effective_init"](), "gain_l1": gain.abs().sum(-1)}
        if model.problems.teacher is not None:
            support = (model.problems.teacher[model.problem_index] != 0).to(gain.dtype)
            on = (gain * support).sum(-1) / support.sum(-1)
            off = (gain * (1 - support)).sum(-1) / (1 - support).sum(-1)
            values["gain_support_ratio"] = torch.where(off == 0, torch.nan, on / off)
        return values
