"""FlowSharpness: how sharp the minimum is that gradient flow would end at from here."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import DiagonalLinearNetwork, ShallowLinearNetwork
from dlnlab.optim.base import PairOptimizer
from dlnlab.theory import shallow


class FlowSharpness(Measurement):
    r"""The sharpness where gradient flow would end if it took over now ("gradient flow sharpness", GFS).

    .. math:: \lambda_{max}\big(X \,\mathrm{diag}(2\sqrt{b^2 + \alpha_k^4})\, X^T/n\big), \qquad
              b = \arg\min_{X b = y} D_{\psi_{\alpha_k}}(b, \beta_k)

    of a diagonal network; of a shallow one, a^T b against Phi, sqrt(4 Phi^2 + S^2) with S = |a + b| |a - b|.

    Gradient flow keeps it; what the steps of gradient descent do to it is what they do to the gain. At an interpolator it
    is the sharpness itself. NaN for members that have diverged.

    Logged: `curvature/flow_sharpness`. Cost: an interpolation problem per member, 0.5 to 5 ms at (N, D) = (20, 30); of a
    shallow network a pass over the parameters.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Raises:
        ValueError: If the network is of another kind, or its data have no interpolator.

    Reference:
        kreisler2023 (the quantity, for scalar networks); its closed forms here: derived here.
    """

    of_squared_loss: ClassVar[bool] = True
    of_product: ClassVar[bool] = True

    def check(self, model: Any) -> None:
        """Raise ValueError where the flow's limit is not known in closed form."""
        if isinstance(model, ShallowLinearNetwork):
            if model.no_target is not None:
                raise ValueError(f"FlowSharpness: {model.no_target}")
            return
        if not isinstance(model, DiagonalLinearNetwork):
            kind = type(model).__name__
            raise ValueError(f"FlowSharpness: known for DiagonalLinearNetwork and ShallowLinearNetwork, not for {kind}")
        if not isinstance(model._optimizer, PairOptimizer):
            kind = type(model._optimizer).__name__
            raise ValueError(f"FlowSharpness: {kind} states no effective initialisation; use GainSGD or a flow")
        try:
            theory.min_l2(model.problems.x, model.problems.y)
        except ValueError as error:
            raise ValueError(f"FlowSharpness: {error}") from None

    def names(self, model: Any) -> tuple[str, ...]:
        """See `Measurement.names`; without the work."""
        del model
        return ("flow_sharpness",)

    def measure(self, model: DiagonalLinearNetwork | ShallowLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """One number per member, (E,)."""
        del batch
        if isinstance(model, ShallowLinearNetwork):
            spread = shallow.spread(model.p.detach().double(), model.m.detach().double())
            found = shallow.norm_squared_at(model.target.double(), spread)
            return {"flow_sharpness": torch.where(found.isfinite(), found, torch.nan)}
        beta, log_alpha = model.predictor().detach().double(), model._optimizer.log_effective_init
        found = torch.full((model.num_members,), torch.nan, dtype=torch.float64, device=beta.device)
        usable = torch.nonzero((torch.isfinite(beta) & torch.isfinite(log_alpha)).all(-1)).squeeze(1)
        if len(usable):
            problem = model.problem_index[usable]
            x, y = model.problems.x[problem].double(), model.problems.y[problem].double()
            found[usable] = theory.flow_sharpness(x, y, beta[usable], log_effective_init=log_alpha[usable])[0]
        return {"flow_sharpness": found}
