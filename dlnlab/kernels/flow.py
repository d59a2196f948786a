"""Members of the diagonal linear network under gradient flow: each follows its own path (`dlnlab.theory.dual_flow`)."""

import numpy as np
import torch
from torch import Tensor

from dlnlab.theory.dual_flow import DualPath


class DualFlow:
    """Members of the diagonal network under gradient flow of the full loss 1/(2n) |X beta - y|^2.

    A member's path is a function of its problem, its start, `end` and `tol` alone, whatever times are asked for.

    Args:
        x: Inputs (P, N, D).
        y: Targets (P, N).
        problem: The problem of each member, int64 (E,).
        w_plus: w+(0), (E, D).
        w_minus: w-(0), likewise.
        end: The last time that will be asked for.
        tol: See `DualPath`.
    """

    def __init__(
        self, x: Tensor, y: Tensor, problem: Tensor, w_plus: Tensor, w_minus: Tensor, end: float, tol: float
    ) -> None:
        x, y = (tensor.double().cpu().numpy() for tensor in (x, y))
        self._like, self._num_samples = w_plus, y.shape[-1]
        self._signs = torch.sign(w_plus).double(), torch.sign(w_minus).double()
        smallest = torch.finfo(torch.float64).tiny  # a factor that is 0 stays so: its sign is 0
        self._logs = tuple(w.abs().double().clamp(min=smallest).log() for w in (w_plus, w_minus))
        log_plus, log_minus = (logs.cpu().numpy() for logs in self._logs)
        self._members = [
            DualPath(x[p], y[p], log_plus[i], log_minus[i], end, tol) for i, p in enumerate(problem.tolist())
        ]

    def at(self, members: Tensor, time: float) -> tuple[Tensor, Tensor, Tensor]:
        """Where some members are at a time, not earlier than any asked for before.

        Args:
            members: Their numbers, int64 (G,).
            time: The time t.

        Returns:
            w+(t) and w-(t), (G, D), and the integral of the loss from 0 to t, (G,), all float64.

        Raises:
            RuntimeError: If the integrator gives up on a member.
        """
        found = [self._members[i].at(time) for i in members.tolist()]
        exponent, of_residual = (
            torch.from_numpy(np.stack(part)).to(self._like.device) for part in list(zip(*found, strict=True))[:2]
        )
        plus, minus = (
            sign[members] * torch.exp(log[members] + way * exponent)
            for way, sign, log in zip((1, -1), self._signs, self._logs, strict=True)
        )
        return plus, minus, of_residual.sum(-1) / (2 * self._num_samples)
