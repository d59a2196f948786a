"""GradientStatistics: how large a mini-batch's gradient is on each coordinate."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import LinearNetwork


class GradientStatistics(Measurement):
    r"""The mean over all batches of the squared gradient, coordinate by coordinate, and its closed form at beta = 0.

    .. math:: \mathbb{E}_B (\nabla L_B(\beta))_j^2, \qquad
              w (|\beta^*|^2 + 2 \beta_j^{*2}) + (1 - w) (\beta_j^{*2} + (|\beta^*|^2 + \beta_j^{*2})/n)

    The first is exact for the member's own data, batch size and sampling. The second, `gradient_square_law`, is its mean
    over data with inputs N(0, I), y = <beta*, x> and beta = 0, w the weight of single samples (1 for one sample, 0 for
    the full set). The gain's first steps are these squares times lr^2: on the support for gradient descent, over all
    coordinates for SGD.

    Recorded: `gradient_square`, `gradient_square_law`, one entry per coordinate. Cost: two passes over the data per batch
    size and sampling.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Reference:
        even2023, Propositions 3 and 4 (subject); the closed form is derived here.
    """

    of_squared_loss: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Raise ValueError for a module that predicts no single number, or data without a teacher."""
        if not isinstance(model, LinearNetwork):
            raise ValueError(f"GradientStatistics: {type(model).__name__} is no LinearNetwork")
        if model.problems.y.ndim != 2 or model.problems.teacher is None:
            raise ValueError("GradientStatistics: the data need targets y of one column, and a teacher")

    def measure(self, model: LinearNetwork, batch: Any) -> dict[str, Tensor]:
        """Both, (E, D)."""
        del batch
        x, y = (part[model.problem_index].double() for part in (model.problems.x, model.problems.y))
        teacher = model.problems.teacher[model.problem_index].double()
        n = x.shape[1]
        residual = (x @ model.predictor().double()[..., None])[..., 0] - y
        single, full = (theory.initial_gradient_second_moment(teacher, size) for size in (1, n))
        measured, law = torch.empty_like(teacher), torch.empty_like(teacher)
        kinds = list(zip(model.batch_sizes, model.per_member("sampling"), strict=True))
        for size, sampling in dict.fromkeys(kinds):
            members = [i for i, kind in enumerate(kinds) if kind == (size, sampling)]
            drawn = model.drawn(size, sampling)
            w = theory.batch_weight(drawn[0], n, drawn[1])
            measured[members] = theory.gradient_second_moment(x[members], residual[members], *drawn)
            law[members] = w * single[members] + (1 - w) * full[members]
        return {"gradient_square": measured, "gradient_square_law": law}
