"""An optimizer of your own: the heavy ball, with a step size and a momentum for each member."""

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from dlnlab.optim import per_member


class HeavyBall(Optimizer):
    """Gradient descent with momentum: v <- momentum v + gradient, w <- w - lr v.

    Args:
        params: The parameters, each with the members as its first axis.
        lr: The step size. May be an axis.
        momentum: Between 0 and 1. May be an axis.
    """

    axes = ("lr", "momentum")

    def __init__(self, params: Iterable, lr: float = 0.01, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Take one step."""
        for group in self.param_groups:
            for w in group["params"]:
                lr, momentum = per_member(group["lr"], w), per_member(group["momentum"], w)
                self.state[w]["v"] = momentum * self.state[w].get("v", 0) + w.grad
                w -= lr * self.state[w]["v"]
