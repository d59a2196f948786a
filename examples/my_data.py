"""A data set of your own: sparse regression whose inputs share a common factor."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab.data import SyntheticData
from dlnlab.streams import Stream


class CommonFactor(SyntheticData):
    """x = noise + strength * (one number per row, the same for every feature); y is the sum of the first 3 features.

    Args:
        num_samples: Training rows.
        dim: Features.
        strength: Of the common factor. May be an axis.
        num_test_samples: Rows of the test set.
    """

    axes: ClassVar[tuple[str, ...]] = ("strength",)

    def __init__(
        self, num_samples: int = 20, dim: int = 30, strength: float = 1.0, num_test_samples: int = 100
    ) -> None:
        super().__init__(num_test_samples)
        self.num_samples, self.dim, self.strength = num_samples, dim, strength

    def sample(self, stream: Stream, values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """One seed's problem: training rows first, then test rows; every draw comes from the seed's streams."""
        rows = self.num_samples + self.num_test_samples
        common = stream.normals("inputs", (rows, 1), step=1)
        x = stream.normals("inputs", (rows, self.dim)) + values["strength"] * common
        teacher = torch.zeros(self.dim, dtype=torch.float64, device=stream.device)
        teacher[:3] = 1
        return x, x @ teacher, teacher
