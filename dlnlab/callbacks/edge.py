"""Where an optimizer's edge of stability lies: which matrix decides it, and at which eigenvalue."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from dlnlab.optim import GainSGD


@dataclass(frozen=True)
class Edge:
    r"""Gradient descent in the geometry P is locally stable while P^{-1/2} (H + shift) P^{-1/2} stays below `threshold`.

    Args:
        threshold: The largest stable eigenvalue, a number or one per member (E,); NaN where it is not known.
        shift: Coupled weight decay, which adds to the Hessian; a number or (E,).
        preconditioner: P, one tensor for each parameter; None is 1. Empty where the optimizer has not taken a step yet.

    Reference:
        cohen2021 (2/lr, momentum); Cohen et al. 2022, arXiv 2207.14484 (preconditioned); the others: derived here.
    """

    threshold: float | Tensor
    shift: float | Tensor = 0.0
    preconditioner: list[Tensor] | None = None


def edge(optimizer: Optimizer, params: list[Tensor]) -> Edge:
    """The edge of an optimizer as it stands, for some of its parameters.

    SGD with momentum m: 2(1+m)/lr, with dampening tau divided by 1-tau, Nesterov's 2(1+m)/(lr(1+2m)); Adam
    2(1+b1)/((1-b1) lr) with P = (1-b1^t)(sqrt(v/(1-b2^t)) + eps), AdamW (2 - lr wd)(1+b1)/((1-b1) lr); RMSprop 2(1+m)/lr
    with P = sqrt(v) + eps; Adagrad 2/lr with P = sqrt(sum) + eps.

    Args:
        optimizer: A torch optimizer, or GainSGD.
        params: Parameters, in the order of a vector's entries.

    Returns:
        The edge; its threshold is NaN for other optimizers, and where groups of these parameters differ.
    """
    chosen = {id(param) for param in params}
    groups = [group for group in optimizer.param_groups if any(id(param) in chosen for param in group["params"])]
    found = [_of_group(optimizer, group) for group in groups]
    if not found or any(not _equal(one, found[0]) for one in found):
        return Edge(math.nan)
    threshold, shift = found[0]
    settings = {id(param): group for group in groups for param in group["params"]}
    scales = [_preconditioner(optimizer, settings.get(id(param)), param) for param in params]
    if all(scale is None for scale in scales):
        return Edge(threshold, shift)
    return Edge(threshold, shift, [] if any(scale is None or not scale.numel() for scale in scales) else scales)


def _equal(one: tuple, other: tuple) -> bool:
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))


def _of_group(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    """Threshold and shift of one parameter group."""
    lr = torch.as_tensor(group.get("lr", math.nan), dtype=torch.float64)  # 2/lr of a schedule's end at 0 is infinite
    decay = group.get("weight_decay", 0.0)
    if group.get("maximize", False):
        return math.nan, 0.0
    if isinstance(optimizer, GainSGD):
        return 2 / lr, 2 * decay  # its penalty is decay * |theta|^2
    if isinstance(optimizer, SGD):
        m = group["momentum"]
        if group["nesterov"]:
            return 2 * (1 + m) / (lr * (1 + 2 * m)), decay
        return 2 * (1 + m) / (lr * ((1 - group["dampening"]) if m else 1)), decay
    if isinstance(optimizer, Adam):
        ratio = (1 + group["betas"][0]) / ((1 - group["betas"][0]) * lr)
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        return (max(2 - lr * decay, 0.0) * ratio, 0.0) if decoupled else (2 * ratio, decay)
    if isinstance(optimizer, RMSprop):
        return 2 * (1 + group["momentum"]) / lr, decay
    if isinstance(optimizer, Adagrad):
        steps = max((float(optimizer.state[param].get("step", 0)) for param in group["params"]), default=0.0)
        return 2 * (1 + steps * group["lr_decay"]) / lr, decay
    return math.nan, 0.0


def _preconditioner(optimizer: Optimizer, group: dict[str, Any] | None, param: Tensor) -> Tensor | None:
    """P of one parameter: None where the optimizer has none, empty where it has none yet."""
    if group is None or not isinstance(optimizer, Adam | RMSprop | Adagrad):
        return None
    state = optimizer.state.get(param, {})
    step = float(state.get("step", 0))
    if step == 0:
        return param.new_empty(0)
    if isinstance(optimizer, Adam):
        first, second = group["betas"]
        moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        return (1 - first**step) * ((moment / (1 - second**step)).sqrt() + group["eps"])
    if isinstance(optimizer, RMSprop):
        centre = state["grad_avg"].square() if group["centered"] else 0.0
        return (state["square_avg"] - centre).clamp_min(0).sqrt() + group["eps"]
    return state["sum"].sqrt() + group["eps"]
