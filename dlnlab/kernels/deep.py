"""Steps of the deep linear network on observed entries as batched tensor arithmetic, and which kernel a device has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlnlab.kernels.guard import Limits

SMALLEST_SCALE = 2.0**-10
"""Compiled kernels keep outer layers W as V = W/c, and c goes into V once it is below this: V would grow by as much."""


def deep_kernel(places: Tensor, y: Tensor, sizes: list[int]) -> Any:
    """The compiled kernel of the device that holds the entries.

    Args:
        places: (row, column) of the observed entries, int64 (P, N, 2).
        y: Their values (P, N).
        sizes: D, H_1, ..., H_{L-1}, K.

    Returns:
        A `DeepKernel` of `dlnlab.kernels.cpu_deep` or `dlnlab.kernels.cuda_deep`, or a line saying why there is none.
        Its `refusal` says why it does not take steps of some batch sizes.
    """
    if places.device.type == "cpu":
        from dlnlab.kernels import cpu_deep  # brings numba, which only a fit needs

        return cpu_deep.DeepKernel(places, y, sizes)
    from dlnlab.kernels import cuda_deep

    refusal = cuda_deep.refusal(places.device, sizes)
    return cuda_deep.DeepKernel(places, y, sizes) if refusal is None else refusal


@dataclass(frozen=True)
class EntryLoss:
    """Loss = scale (sum of squared errors), divided by their number if `mean`."""

    scale: float
    mean: bool


@dataclass
class DeepGuard(Limits):
    """When members stop, and the weights that diverged ones go back to, (E, ...) each; see `Limits`."""

    kept: list[Tensor]


def deep_step(
    weights: list[Tensor],
    places: Tensor,
    targets: Tensor,
    lr: Tensor,
    decay: Tensor,
    loss: EntryLoss,
    through_product: bool,
) -> list[Tensor]:
    """One step of G members: W_l <- decay W_l - lr (gradient).

    Args:
        weights: W_1, ..., W_L, each (G, H_l, H_{l-1}).
        places: (row, column) of the entries each sees, int64 (G, B, 2).
        targets: Their values (G, B).
        lr: Step sizes (G,).
        decay: 1 - 2 lr weight_decay, (G,).
        loss: Its scale.
        through_product: Through the products of the layers, O(L H^3 + B); else entry by entry, O(B L H^2).

    Returns:
        The weights after the step.
    """
    gradients = _of_product if through_product else _of_entries
    slope = 2 * loss.scale / (targets.shape[1] if loss.mean else 1)
    found = gradients(weights, places[..., 0], places[..., 1], targets, slope)
    lr, decay = lr[:, None, None], decay[:, None, None]
    return [decay * w - lr * g for w, g in zip(weights, found, strict=True)]


def _of_product(weights: list[Tensor], rows: Tensor, columns: Tensor, targets: Tensor, slope: float) -> list[Tensor]:
    products = [weights[0]]
    for w in weights[1:]:
        products.append(w @ products[-1])
    flat = products[-1].flatten(1)
    where = rows * weights[0].shape[-1] + columns
    error = torch.zeros_like(flat).scatter_add_(1, where, slope * (flat.gather(1, where) - targets))
    back, found = error.view_as(products[-1]), []
    for w, product in zip(weights[:0:-1], products[-2::-1], strict=True):
        found.append(back @ product.mT)
        back = w.mT @ back
    return [back, *found[::-1]]


def _of_entries(weights: list[Tensor], rows: Tensor, columns: Tensor, targets: Tensor, slope: float) -> list[Tensor]:
    member = torch.arange(len(rows), device=rows.device)[:, None]
    forward, backward = [weights[0].mT[member, columns]], [weights[-1][member, rows]]  # (G, B, H) each
    for w in weights[1:-1]:
        forward.append(forward[-1] @ w.mT)
    for w in weights[-2:0:-1]:
        backward.insert(0, backward[0] @ w)
    along = slope * ((forward[0] * backward[0]).sum(-1) - targets)[..., None]
    found = [torch.zeros_like(w) for w in weights]
    found[0].mT.index_put_((member, columns), along * backward[0], accumulate=True)
    found[-1].index_put_((member, rows), along * forward[-1], accumulate=True)
    for layer in range(1, len(weights) - 1):
        found[layer] = (along * backward[layer]).mT @ forward[layer - 1]
    return found
