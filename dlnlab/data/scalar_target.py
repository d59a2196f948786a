"""One number to be fitted by the product of two factors."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.data.base import SyntheticData
from dlnlab.streams import Stream


class ScalarTarget(SyntheticData):
    r"""One row x = 1 with the label Phi, so that a network w has the loss `(w - Phi)^2 / 2`.

    Members of all seeds share it; `distance` is eps^2.

    Args:
        target: Phi. May be an axis.

    Raises:
        ValueError: If the target is not finite.

    Reference:
        beneventano2025, section 2.
    """

    axes: ClassVar[tuple[str, ...]] = ("target",)
    depends_on_seed: ClassVar[bool] = False

    def __init__(self, target: float = 1.0) -> None:
        super().__init__()
        self.target = target
        self.check({"target": target})

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError where the target is not finite."""
        checks.number("target", values["target"])

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The one problem; see the class."""
        target = torch.tensor([float(values["target"])], dtype=torch.float64, device=stream.device)
        return torch.ones_like(target)[:, None], target, target.clone()
