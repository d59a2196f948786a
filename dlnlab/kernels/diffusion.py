"""Stochastic gradient flow of pairs of factors, in steps of time h.

    dw± = ∓ w± (g dt + dxi),    dxi = X^T diag(s) dB,    Gain = integral of s_i^2 x_ij^2 summed over i,

with s_i^2 = 2 gamma L/n (the noise of the mean loss) or gamma r_i^2/n (of each row's own residual r_i). Within a step g
and s are held, and then the factors are integrated exactly: w± <- w± exp(∓ (g h + dxi) - increment of the gain/2), so
that |w+ w-| = alpha^2 exp(-Gain) at every h. Euler-Maruyama multiplies by 1 ∓ (g h + dxi) instead.

Reference: pesme2021 (the process, with the noise of the mean loss); the exponential step and the noise of each row's
residual: derived here.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NOISES = ("mean_loss", "per_sample")
SCHEMES = ("exponential", "euler")


@dataclass
class Diffusion:
    """The state of a pair of factors; tensors (..., D), or (...) where it says so. All but the factors are float64."""

    w_plus: Tensor
    w_minus: Tensor
    drift: Tensor  # sum of g h + dxi
    gain: Tensor
    loss_integral: Tensor  # sum of L h, (...)
    initial_plus: Tensor
    initial_minus: Tensor

    @classmethod
    def start(cls, w_plus: Tensor, w_minus: Tensor) -> "Diffusion":
        """The state before the first step."""
        zeros = torch.zeros(w_plus.shape, dtype=torch.float64, device=w_plus.device)
        initial = w_plus.double().clone(), w_minus.double().clone()
        return cls(w_plus, w_minus, zeros, zeros.clone(), zeros.sum(-1), *initial)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Diffusion":
        """Apply one function to every tensor (indexing, usually)."""
        return Diffusion(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def step(
        self, x: Tensor, residual: Tensor, normals: Tensor, lr: Tensor, h: Tensor, noise: str, scheme: str
    ) -> None:
        """One step of time, in place.

        Args:
            x: Inputs (..., N, D), one problem for the members along the state's last axis but one (M).
            residual: X beta - y, (..., M, N).
            normals: Standard normal numbers (..., M, N).
            lr: gamma, broadcastable with (..., M).
            h: The step of time, likewise.
            noise: One of `NOISES`.
            scheme: One of `SCHEMES`.
        """
        count = residual.shape[-1]
        squares = residual.square()
        loss = squares.mean(-1) / 2
        lr, h = lr.expand(loss.shape)[..., None], h.expand(loss.shape)[..., None]
        if noise == "mean_loss":
            variance = (2 * lr * h / count) * loss[..., None]
            quadratic = variance * x.square().sum(-2)[..., None, :]
            pushed = variance.sqrt() * normals
        else:
            variance = (lr * h / count) * squares
            quadratic = variance @ x.square()
            pushed = variance.sqrt() * normals
        move = (h * residual / count + pushed) @ x  # g h + dxi
        self.loss_integral += (loss * h[..., 0]).double()
        self.drift += move.double()
        if scheme == "exponential":
            self.gain += quadratic.double()
            for w, initial, way in ((self.w_plus, self.initial_plus, -1), (self.w_minus, self.initial_minus, 1)):
                w.copy_(initial * torch.exp(way * self.drift - self.gain / 2))
        else:
            self.gain -= torch.log((1 - move.double().square()).abs())
            self.w_plus.mul_(1 - move)
            self.w_minus.mul_(1 + move)
