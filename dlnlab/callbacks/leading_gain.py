"""LeadingGain: the gain that small step sizes are predicted to have."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.optim.base import PairOptimizer


class LeadingGain(Measurement):
    r"""The gain to leading order in the step size, from the integrals along gradient flow of the member's problem.

    .. math:: \mathrm{Gain}_i = \gamma [ w M_i + (1 - w) I_i ], \qquad
              M_i = \frac1n \sum_j x_{ji}^2 \int r_j^2\, dt, \quad I_i = \int g_i^2\, dt

    It does not change while the network trains. It is of members that start at beta = 0, without weight decay and label
    noise, on data that can be interpolated, and NaN for others.

    Recorded: `gain_law`, one entry per coordinate, and `gain_l1_law`, its sum. Cost: gradient flow of each problem, once.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, step 0 and the last.
        at: A list of steps.

    Reference:
        Derived here.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def __init__(self, every_n_steps: int | None = None, at: Any = None) -> None:
        super().__init__(every_n_steps, [0] if every_n_steps is None and at is None else at)
        self._found: tuple[Any, dict[str, Tensor]] | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError where the law is not defined."""
        if not isinstance(model, DiagonalLinearNetwork):
            raise ValueError(f"LeadingGain: {type(model).__name__} is no DiagonalLinearNetwork")
        if not isinstance(model._optimizer, PairOptimizer):
            kind = type(model._optimizer).__name__
            raise ValueError(f"LeadingGain: {kind} does not keep where the network has started; use GainSGD or a flow")

    def measure(self, model: DiagonalLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """The law (E, D) and its sum (E,)."""
        del batch
        if self._found is None or self._found[0] is not model.problems:
            self._found = model.problems, self._laws(model)
        return self._found[1]

    def _laws(self, model: DiagonalLinearNetwork) -> dict[str, Tensor]:
        x, y = model.problems.x.double(), model.problems.y.double()
        start = model._optimizer.state[model.w_plus]
        plus, minus = start["initial_plus"], start["initial_minus"]
        alpha = (plus * minus).abs().sqrt()
        # Members of one problem and one initialisation share the flow.
        kinds = [(p, tuple(a)) for p, a in zip(model.problem_index.tolist(), alpha.tolist(), strict=True)]
        distinct = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        problems = [p for p, _ in distinct]
        scales = torch.tensor([a for _, a in distinct], dtype=torch.float64)
        residual, gradient = theory.flow_integrals(x[problems], y[problems], scales)
        lr = model.step_size.double().to(x.device)
        law = torch.empty_like(alpha)
        batches = list(zip(model.per_member("batch_size"), model.per_member("sampling"), strict=True))
        for i, (kind, (size, sampling)) in enumerate(zip(kinds, batches, strict=True)):
            flow = distinct[kind]
            law[i] = theory.leading_gain(
                lr[i], x[kind[0]], residual[flow], gradient[flow], *model.drawn(size, sampling)
            )
        known = (plus.abs() == minus.abs()).all(-1) & ~(model.unscheduled("weight_decay") > 0)  # it may be NaN
        known &= model.per_member_tensor("label_noise") == 0
        law[~known] = torch.nan
        return {"gain_law": law, "gain_l1_law": law.sum(-1)}
