"""torchmetrics with one state per member: what is reduced over batches or ranks and never over members."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MemberLoss(Metric):
    """Mean of 1/2 |error|^2 over all rows seen, for each member.

    Args:
        num_members: E.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_members, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros(num_members, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, rows: int) -> None:
        """Add a batch: its mean losses (E,) over `rows` rows."""
        self.total += losses.double() * rows
        self.rows += rows

    def compute(self) -> Tensor:
        """The loss of each member, (E,)."""
        return self.total / self.rows


class MemberF1(Metric):
    """F1 score of a selection of coordinates against the right one, for each member.

    Args:
        num_members: E.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_members: int) -> None:
        super().__init__()
        for name in ("true_positive", "selected", "relevant"):
            self.add_state(name, torch.zeros(num_members, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, selection: Tensor, support: Tensor) -> None:
        """Add selections and supports, boolean (E, D)."""
        self.true_positive += (selection & support).sum(-1)
        self.selected += selection.sum(-1)
        self.relevant += support.sum(-1)

    def compute(self) -> Tensor:
        """2 |both| / (|selected| + |support|), (E,); 1 where both are empty."""
        size = self.selected + self.relevant
        return torch.where(size == 0, 1.0, 2 * self.true_positive / size.clamp(min=1))
