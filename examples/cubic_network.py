"""A network of your own: beta = u^3 - v^3, a diagonal linear network three layers deep."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from dlnlab.models import LinearNetwork


class CubicNetwork(LinearNetwork):
    """The network beta = u^3 - v^3, u(0) = v(0) = init_scale.

    Its factors are no pairs u*v, so the gain is not defined and not recorded.

    Args:
        init_scale: A positive number. May be an axis.
        **kwargs: Those of `LinearNetwork`.
    """

    axes: ClassVar[tuple[str, ...]] = (*LinearNetwork.axes, "init_scale")

    def __init__(self, init_scale: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_scale = init_scale

    def build(self, num_features: int, num_outputs: int | None) -> None:
        """Make the parameters, each with the members as its first axis: (E, D)."""
        start = self.per_member_tensor("init_scale")[:, None] * torch.ones(num_features)
        self.u, self.v = Parameter(start.clone()), Parameter(start.clone())

    def predictor(self) -> Tensor:
        """What the network computes, (E, D)."""
        return self.u**3 - self.v**3
