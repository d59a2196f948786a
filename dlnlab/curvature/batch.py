"""Batch sharpness: the curvature that mini-batch gradient descent meets along its own gradients."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from dlnlab.curvature.products import LossOperator


@dataclass(frozen=True)
class BatchSharpness:
    """An estimated batch sharpness.

    Args:
        value: The mean over batches, () or (E,).
        half_width: Of its 95 % confidence interval, Student's; NaN from a single batch.
        samples: Each batch's value, (num_batches,) or (num_batches, E).
    """

    value: Tensor
    half_width: Tensor
    samples: Tensor


def batch_sharpness(hessians: Iterable[LossOperator]) -> BatchSharpness:
    r"""The mean over mini-batches of g^T H g/|g|^2, with each batch's own gradient g and Hessian H.

    For mini-batch SGD with step size eta it is this number that rises to 2/eta, while the sharpness of the full loss stays
    below. A batch without a gradient counts as 0.

    Args:
        hessians: One Hessian a mini-batch, drawn as training draws them; made one at a time, they are held so.

    Returns:
        The mean, its confidence interval and the samples.

    Raises:
        ValueError: If there is none.

    Example:
        >>> from dlnlab.curvature import hessian
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> found = batch_sharpness(hessian(lambda x: (x @ w) ** 2 / 2, [w], [row]) for row in rows)
        >>> found.samples.tolist(), float(found.value)
        ([1.0, 4.0], 2.5)

    Reference:
        Andreyev and Beneventano, arXiv 2412.20553.
    """
    samples = []
    for operator in hessians:
        g = operator.gradient
        square = g.square().sum(-1)
        curved = (g * operator.matvec(g)).sum(-1)
        samples.append(torch.where(square > 0, curved / square.clamp_min(torch.finfo(g.dtype).tiny), 0))
        del operator  # its graph, before the next is built
    if not samples:
        raise ValueError("hessians: there is none")
    found, count = torch.stack(samples), len(samples)
    if count == 1:
        return BatchSharpness(found[0], torch.full_like(found[0], torch.nan), found)
    factor = float(stdtrit(count - 1, 0.975)) / math.sqrt(count)
    return BatchSharpness(found.mean(0), factor * found.std(0), found)
