"""StochasticGradientFlow: the continuous-time model of single-sample SGD on pairs of factors."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from dlnlab import checks, streams
from dlnlab.kernels.diffusion import NOISES, SCHEMES, Diffusion
from dlnlab.optim.base import PairOptimizer, check_numbers, log_start, per_member, rotate

_DRAWN_STEPS = 64


class StochasticGradientFlow(PairOptimizer):
    r"""Stochastic gradient flow: gradient flow with the noise of SGD at step size gamma.

    .. math:: dw_\pm = \mp w_\pm (\nabla L \, dt + \sqrt{2 \gamma L / n} \, X^T dB), \qquad
              \mathrm{Gain} = 2 \gamma \, \mathrm{diag}(X^T X/n) \int L \, dt

    Step k is time k * dt * lr. Each step is exact for the gradient and the loss at its beginning, so the gain's formula,
    and the theorem on where the path ends, hold at every dt and not just as dt goes to 0.

    It models mini-batches of one row drawn with replacement, and needs the full set: `batch_size: full`.

    Args:
        pairs: Pairs of factors, as `GainSGD` takes them; every parameter must be in one.
        lr: gamma, the step size of the SGD that is modelled: a number, or a tensor (E,). Positive and finite.
        dt: The time step in units of lr.
        noise: `mean_loss`, every row's squared residual replaced by their mean, 2L (as in the paper); or `per_sample`,
            each row's own.
        scheme: `exponential`, or `euler` (Euler-Maruyama), whose gain is that of its own multiplications.
        form: What a pair stands for: `product` u*v, or `squares` (u^2 - v^2)/2.

    Raises:
        ValueError: If a number is out of range, or a parameter belongs to no pair.

    Reference:
        pesme2021 (the process and its Theorem 1, in its normalisation L_P = L/2); the exponential step: derived here.

    Example:
        >>> x, y = torch.eye(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        >>> w = [torch.full((1, 3), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        >>> opt = StochasticGradientFlow([w], lr=0.5, dt=0.1, form="squares")
        >>> for _ in range(2000):
        ...     opt.step(lambda: (x, (w[0] ** 2 - w[1] ** 2).detach() / 2 @ x.T - y))
        >>> formula = 2 * 0.5 * (x**2).mean(0) * opt.loss_integral[:, None]  # 2 gamma diag(H) int L
        >>> torch.allclose(opt.gain, formula, rtol=1e-12)
        True
    """

    axes = ("lr",)
    carried = (*PairOptimizer.carried, "dt", "noise", "scheme", "keys")

    def __init__(
        self,
        pairs: Iterable,
        lr: float = 0.01,
        dt: float = 1.0,
        noise: Literal["mean_loss", "per_sample"] = "mean_loss",
        scheme: Literal["exponential", "euler"] = "exponential",
        form: Literal["product", "squares"] = "product",
    ) -> None:
        self.dt = checks.positive("dt", dt)
        self.noise = checks.one_of("noise", noise, NOISES)
        self.scheme = checks.one_of("scheme", scheme, SCHEMES)
        self.keys: Tensor | None = None
        """Stream keys (E, 2) of the members' noise; None gives leading index i the seed i of root 0."""
        self._drawn: tuple[Any, Tensor] | None = None
        super().__init__(pairs, {"lr": lr}, form)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group; see `pairs` of the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["form"] is None:
            raise ValueError("StochasticGradientFlow: every parameter must belong to a pair of factors")
        check_numbers("lr", group["lr"], 0.0, positive=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = None

    def start(self, w_plus: Tensor, w_minus: Tensor) -> dict[str, Tensor]:
        """No time has passed."""
        return {name: value for name, value in vars(Diffusion.start(w_plus, w_minus)).items() if name not in _FACTORS}

    def diffusion(self, group: dict[str, Any]) -> Diffusion:
        """One pair's state; in the form `squares` it shares memory with the parameters."""
        return Diffusion(*self.rotated(group), **self.state[group["params"][0]])

    def normals(self, step: int, count: int) -> Tensor:
        """The standard normal numbers of one step, float64 (E, count)."""
        if self.keys is None:
            first = self.param_groups[0]["params"][0]
            self.keys = streams.keys(0, "flow", torch.arange(len(first), device=first.device))
        block = step // _DRAWN_STEPS, count
        if self._drawn is None or self._drawn[0] != block:
            steps = torch.arange(block[0] * _DRAWN_STEPS, (block[0] + 1) * _DRAWN_STEPS, device=self.keys.device)
            self._drawn = block, streams.normals(self.keys, steps, count)
        return self._drawn[1][:, step % _DRAWN_STEPS]

    @torch.no_grad()
    def step(self, closure: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """One step of time.

        Args:
            closure: Gives the inputs, (N, D) or (E, N, D), and the residuals X beta - y, (E, N), at the present
                parameters (E, D).
        """
        x, residual = closure()
        for group in self.pairs:
            whole = self.diffusion(group)
            lr = per_member(group["lr"], residual)
            normals = self.normals(self.num_steps, residual.shape[-1]).to(residual.dtype)
            state = whole.map(lambda tensor: tensor.unsqueeze(1))  # (E, 1, D): a problem for each member
            state.step(
                x.expand(len(residual), *x.shape[-2:]), residual[:, None], normals[:, None], lr, self.dt * lr,
                self.noise, self.scheme,
            )  # fmt: skip
            if group["form"] == "product":
                for parameter, value in zip(group["params"], rotate(whole.w_plus, whole.w_minus), strict=True):
                    parameter.copy_(value)
        self.num_steps += 1

    @property
    def gain(self) -> Any:
        """2 gamma diag(X^T X/n) int L (mean_loss), float64 (E, D); a list where there are several pairs."""
        return self.of_pairs(lambda group: self.diffusion(group).gain, "gain")

    @property
    def effective_init(self) -> Any:
        """alpha_t = alpha exp(-Gain/2), likewise."""
        return self.of_pairs(lambda group: torch.exp(self.mirror(group)[0]), "effective_init")

    def mirror(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A pair's `log_effective_init` and `mirror_shift`; the exponential scheme moves the mirror's origin nowhere."""
        state = self.diffusion(group)
        log_alpha, start = log_start(state.initial_plus, state.initial_minus)
        if self.scheme == "euler":
            start = log_start(state.w_plus.double(), state.w_minus.double())[1] + 2 * state.drift
        return log_alpha - state.gain / 2, start

    @property
    def loss_integral(self) -> Any:
        """Integral of the loss over time, summed over every step, float64 (E,); a list where there are several pairs."""
        return self.of_pairs(lambda group: self.diffusion(group).loss_integral, "loss_integral")

    @property
    def time(self) -> Any:
        """Steps times dt times lr, a number or a tensor (E,)."""
        return self.num_steps * self.dt * self.param_groups[0]["lr"]


_FACTORS = ("w_plus", "w_minus")
