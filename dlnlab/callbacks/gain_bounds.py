"""GainBounds: between what the gain lies."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.replay import Replay
from dlnlab.kernels import Records
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.models.base import DIVERGED, RUNNING
from dlnlab.theory.gain import QUADRATIC

_RECORD_BYTES = 32 * 2**20


class GainBounds(Measurement):
    r"""The bounds in expectation of the gain's l1 norm, and the step size in units of 1/(L B).

    .. math:: 2 \lambda_b \gamma^2 \sum_k L(\beta_k) \;\le\; |Gain|_1 \;\le\; 4 \Lambda_b \gamma^2 \sum_k L(\beta_k)

    holds for the means of all three over batches (for gradient descent itself), with the losses that the members did
    meet: compare means over seeds; a single member of SGD may lie outside. The losses of every step are found by running
    the members once more. The bounds are NaN where max\|lr g\| has passed 0.8926, which they need, and everything is NaN
    for members that have diverged.

    Logged: `theory/gain_lower_bound`, `theory/gain_upper_bound`; `theory/gamma_LB`, lr L B with L the largest curvature of
    a batch (where batches are too many to go through, an upper bound) and B the largest \|beta\|_inf of any step: a ratio,
    never a verdict, for the paper's constant is not known here. Cost: the fit's steps once more, with the full loss at
    each.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the last step only.
        at: A list of steps.

    Reference:
        even2023, section 3 (that such bounds hold; the condition gamma <= c/(L B)); their constants: derived here,
        `theory.expected_gain_bounds`.
    """

    last_only: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Raise ValueError where the gain has no such bounds."""
        Replay.check("GainBounds", model)

    def names(self, model: Any) -> tuple[str, ...]:
        """See `Measurement.names`; without the work."""
        return "gain_lower_bound", "gain_upper_bound", "gamma_LB"

    def measure(self, model: DiagonalLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """All of them, (E,)."""
        del batch
        replay, optimizer = Replay(model), model._optimizer
        lr = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64, device=model.device)
        lr = lr.expand(model.num_members)
        tol = 0.0 if model.guard is None else model.guard_tol
        loss_sum, beta_max = _along(replay, lr, optimizer.num_steps, tol)
        x = replay.problems.x.double()[replay.problem]
        values = {name: torch.empty_like(lr) for name in ("gain_lower_bound", "gain_upper_bound", "gamma_LB")}
        batches = list(zip(model.per_member("batch_size"), model.per_member("sampling"), strict=True))
        for size, sampling in dict.fromkeys(batches):
            at = torch.tensor([kind == (size, sampling) for kind in batches], device=lr.device)
            drawn = model.drawn(size, sampling)
            low, high = theory.expected_gain_bounds(lr[at], loss_sum[at], x[at], *drawn)
            values["gain_lower_bound"][at], values["gain_upper_bound"][at] = low, high
            values["gamma_LB"][at] = theory.gamma_LB(lr[at], x[at], drawn[0], beta_max[at], drawn[1])
        too_far = optimizer.factors(optimizer.pairs[0]).largest_step > QUADRATIC
        for name in ("gain_lower_bound", "gain_upper_bound"):
            values[name] = values[name].where(~too_far, torch.nan)
        lost = model.status == DIVERGED
        return {name: value.where(~lost, torch.nan) for name, value in values.items()}


def _along(replay: Replay, lr: Tensor, num_steps: int, tol: float) -> tuple[Tensor, Tensor]:
    """The full losses of steps 0, ..., num_steps - 1 added up, and the largest |beta|_inf of steps up to num_steps."""
    members = torch.arange(len(lr), device=lr.device)
    factors = replay.begin(members)
    total, largest, status = torch.zeros_like(lr), torch.zeros_like(lr), None
    now = replay.losses(members, factors)
    length = max(1, _RECORD_BYTES // (2 * factors.w_plus.numel() * factors.w_plus.itemsize))
    for first in range(0, num_steps, length):
        last = min(first + length, num_steps)
        records = Records.allocate(range(first + 1, last + 1), factors)
        status = replay.advance(members, factors, lr, first, last, tol, status=status, records=records)
        taken = records.train_loss.to(now)
        total += now + taken[:-1].sum(0)
        now = taken[-1]
        beta = (records.w_plus.square_() - records.w_minus.square_()) / 2
        largest = torch.maximum(largest, beta.abs().amax((0, 2)).to(largest))
        if bool((status != RUNNING).all()):  # what is left is below the tolerance
            break
    return total, largest
