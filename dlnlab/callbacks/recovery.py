"""SupportRecovery: does the predictor have its teacher's support?"""

from typing import Any

from torch import Tensor

from dlnlab import checks
from dlnlab.callbacks.base import Measurement
from dlnlab.metrics import MemberF1
from dlnlab.models import LinearNetwork


class SupportRecovery(Measurement):
    """F1 score of the entries above a threshold against the teacher's support.

    Logged: `recovery/support_f1`, 1 where the entries above the threshold are exactly the teacher's, 0 where they share
    none. Cost: one pass over the predictor.

    Args:
        threshold: An entry counts when its magnitude exceeds this part of the teacher's smallest non-zero entry.
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Raises:
        ValueError: If the threshold is not positive.
    """

    def __init__(self, threshold: float = 0.5, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, at)
        self.threshold = checks.positive("SupportRecovery.threshold", threshold)

    def check(self, model: Any) -> None:
        """Raise ValueError where there is no teacher."""
        if not isinstance(model, LinearNetwork) or model.problems.teacher is None:
            raise ValueError("SupportRecovery: the data have no teacher whose support could be recovered")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """F1 (E,)."""
        del batch
        teacher = model.problems.teacher[model.problem_index].flatten(1)
        support = teacher != 0
        smallest = teacher.abs().masked_fill(~support, float("inf")).amin(-1, keepdim=True)
        f1 = MemberF1(model.num_members).to(teacher.device)
        f1.update(model.predictor().flatten(1).abs() > self.threshold * smallest, support)
        return {"support_f1": f1.compute()}
