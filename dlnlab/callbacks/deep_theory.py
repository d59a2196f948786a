"""DeepTheory: does a deep linear network obey its exact laws, and how far is it from balance and from the least norm?"""

from typing import Any

import torch
from torch import Tensor
from torch.linalg import matrix_norm

from dlnlab import theory
from dlnlab.callbacks.base import Measurement
from dlnlab.models import DeepLinearNetwork
from dlnlab.optim import GainSGD


class DeepTheory(Measurement):
    r"""Holds a deep linear network to the exact laws of one step, and compares its weights with the least that would do.

    .. math:: D_l' = (1 - 2 \eta\kappa)^2 D_l + \eta^2 (F_{l+1}^\top F_{l+1} - F_l F_l^\top)

    Logged, one number per member. What exact arithmetic makes zero: `theory/layer_imbalance_error` and
    `theory/square_norm_error`, the errors of the laws of D_l = W_{l+1}^T W_{l+1} - W_l W_l^T and of |theta|^2 over the next
    step, on the entries it will draw, relative to the largest of the terms that cancel; and
    `theory/representation_error`, by how much |theta|^2 is below L sum s_i^(2/L), relatively, which it never is.

    Where it is: `theory/layer_imbalance`, the largest |D_l|_F; `theory/norm_over_least`, |theta|^2 over L sum s_i^(2/L), at
    least 1 and 1 at a minimum with weight decay; `theory/norm_over_absorbing`, |theta|^2 over the square radius L c Y^2/(4
    kappa) from which on balls are absorbing at small step sizes (NaN with label noise, which has no largest |Y|).

    Cost: a gradient, three products of matrices a layer and a singular value decomposition.

    Args:
        every_n_steps: A period in optimizer steps; without a schedule, the recorder's.
        at: A list of steps.

    Raises:
        ValueError: Before a fit, for another network, or an optimizer whose steps have other laws.

    Reference:
        wang2024 (the representation cost, sets that are absorbing); the laws and the ball: derived here.
    """

    def check(self, model: Any) -> None:
        """Raise ValueError where the laws say nothing."""
        if not isinstance(model, DeepLinearNetwork):
            raise ValueError(f"DeepTheory: the laws are of DeepLinearNetwork, not {type(model).__name__}")
        if not isinstance(model._optimizer, GainSGD):
            raise ValueError(f"DeepTheory: the laws are of GainSGD's steps, not of {type(model._optimizer).__name__}'s")
        if (changed := model.changed_since(DeepLinearNetwork, ("predictor", "losses", "batches"))) is not None:
            raise ValueError(f"DeepTheory: the laws are of DeepLinearNetwork's own loss, but {changed}; leave it out")

    def measure(self, model: DeepLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """All of the above, (E,) each."""
        del batch
        weights = [w.detach() for w in model.weights]
        lr, kappa = (value.to(weights[0]) for value in (model.scheduled_lr, model.scheduled_weight_decay))
        gradients = self._gradients(model)
        keep, along = (1 - 2 * lr * kappa)[:, None, None], lr[:, None, None]
        after = [keep * w - along * f for w, f in zip(weights, gradients, strict=True)]

        now = theory.layer_imbalance(weights)
        law = theory.next_layer_imbalance(weights, gradients, lr, kappa)
        errors, sizes = [], []
        for found, expected, w in zip(theory.layer_imbalance(after), law, after[1:], strict=True):
            errors.append(matrix_norm(found - expected))
            sizes.append(matrix_norm(w.mT @ w))
        norm, norm_after = (sum(w.square().sum((-1, -2)) for w in each) for each in (weights, after))
        pull = (gradients[0] * weights[0]).sum((-1, -2))
        norm_law = theory.next_square_norm(weights, gradients, pull, lr, kappa)
        matrix = model.predictor().detach()
        least = theory.representation_cost(matrix if matrix.ndim == 3 else matrix[:, None], model.depth)
        return {
            "layer_imbalance_error": _ratio(torch.stack(errors).amax(0), torch.stack(sizes).amax(0)),
            "square_norm_error": _ratio((norm_after - norm_law).abs(), norm + norm_after),
            "representation_error": _ratio((least - norm).clamp(min=0), norm),
            "layer_imbalance": torch.stack([matrix_norm(d) for d in now]).amax(0),
            "norm_over_least": _ratio(norm, least),
            "norm_over_absorbing": _ratio(norm, self._absorbing(model, kappa)),
        }

    @staticmethod
    def _gradients(model: DeepLinearNetwork) -> list[Tensor]:
        """Of the data loss of each member on what it will draw next, in every layer."""
        with torch.enable_grad():
            losses = [model.losses(batch).sum() for batch in model.batches(model._optimizer.num_steps)]
            return list(torch.autograd.grad(sum(losses), list(model.weights)))

    @staticmethod
    def _absorbing(model: DeepLinearNetwork, kappa: Tensor) -> Tensor:
        """The square radius from which on balls are absorbing, (E,)."""
        if model._has_noise:
            return torch.full_like(kappa, torch.nan)
        largest = model.problems.y.abs().flatten(1).amax(1)[model.problem_index]
        scale = 0.5 if model.halved else 1.0
        if model.reduction == "sum":
            scale = scale * model.scheduled_batch_size.to(kappa)
        return theory.absorbing_norm(kappa, largest, model.depth, scale)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0/0 is 0: weights that are all zero obey every law."""
    return torch.where(above == 0, torch.zeros_like(above), above / below)
