"""What the kernels of the diagonal network take and change, and which kernel a device has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlnlab.kernels.factors import Factors


def diagonal_kernel(x: Tensor, y: Tensor) -> Any:
    """The compiled kernel of the device that holds the problems.

    Args:
        x: Inputs (P, N, D).
        y: Targets (P, N).

    Returns:
        A `DiagonalKernel` of `dlnlab.kernels.cpu` or `dlnlab.kernels.cuda`, or a line saying why there is none.
    """
    if x.device.type == "cpu":
        from dlnlab.kernels import cpu  # brings numba, which only a fit needs

        return cpu.DiagonalKernel(x, y)
    from dlnlab.kernels import cuda

    refusal = cuda.refusal(x.device, x.shape[-1])
    return cuda.DiagonalKernel(x, y) if refusal is None else refusal


@dataclass
class DiagonalState:
    """All that a step of any member changes.

    Attributes:
        factors: w+, w- and what the gain is computed from, tensors (E, D).
        square_sum: Sum over steps of |x|^2, x = lr g/(1 - c) of the mini-batch gradient g: the argument of the gain. (E,),
            float64.
        largest_step: The largest |x_j| over steps and coordinates, (E,), float64.
    """

    factors: Factors
    square_sum: Tensor
    largest_step: Tensor

    @classmethod
    def start(cls, w_plus: Tensor, w_minus: Tensor) -> "DiagonalState":
        """The state before the first step."""
        return cls.of(Factors.start(w_plus, w_minus))

    @classmethod
    def of(cls, factors: Factors) -> "DiagonalState":
        """The state that lies in the given factors, sharing memory with them."""
        return cls(factors, factors.square_sum, factors.largest_step)

    def clone(self) -> "DiagonalState":
        """A copy that shares no memory."""
        return DiagonalState(self.factors.map(torch.clone), self.square_sum.clone(), self.largest_step.clone())

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Those of its tensors, by the names of `Factors` and its own."""
        tensors = {**vars(self.factors), "square_sum": self.square_sum, "largest_step": self.largest_step}
        return [tensors[name] for name in names]


@dataclass
class Batches:
    """What each member sees at a step; every tensor has one entry per member.

    Attributes:
        size: Rows per step, int64; 0 is the full batch.
        sampling: Index in `dlnlab.streams.SAMPLINGS`, int64.
        sampling_key: `streams.keys(root, "sampling", seed)`, (E, 2).
        noise_key: `streams.keys(root, "label_noise", seed)`, (E, 2).
        noise_std: Standard deviation of fresh noise on each drawn label.
    """

    size: Tensor
    sampling: Tensor
    sampling_key: Tensor
    noise_key: Tensor
    noise_std: Tensor

    @classmethod
    def full(cls, num_members: int, device: torch.device | str = "cpu") -> "Batches":
        """Full batches without noise."""
        zeros = torch.zeros(num_members, dtype=torch.int64, device=device)
        keys = torch.zeros(num_members, 2, dtype=torch.int64, device=device)
        return cls(zeros, zeros, keys, keys, zeros.double())


@dataclass
class Guard:
    """When members stop (`dlnlab.models.base.Guard`), and the state that diverged ones go back to.

    Attributes:
        tol: Converged below this full clean loss.
        bound: Diverged above this loss or size of a factor, or where one is not finite.
        every_n_steps: Members are checked at steps divisible by this.
        kept: Each member at its last check; a copy of the first state before the first step.
    """

    tol: float
    bound: float
    every_n_steps: int
    kept: DiagonalState


@dataclass
class Records:
    """What is written while steps are taken, a row for each of T steps.

    Attributes:
        steps: Those steps, ascending, int64 (T,).
        w_plus: (T, E, D), as `w_minus`.
        w_minus: Likewise.
        train_loss: Full clean data loss (T, E).
        status: (T, E), int8.
        state: The whole `DiagonalState` with a leading T, sharing w+ and w-, or None. Its initial values are not filled.
    """

    steps: Tensor
    w_plus: Tensor
    w_minus: Tensor
    train_loss: Tensor
    status: Tensor
    state: DiagonalState | None = None

    @classmethod
    def allocate(cls, steps: Sequence[int], state: DiagonalState, everything: bool = False) -> "Records":
        """Room for the records of a state at some steps; `everything` asks for all of the state."""

        def room(like: Tensor) -> Tensor:
            return torch.empty(len(steps), *like.shape, dtype=like.dtype, device=like.device)

        factors = state.factors.map(room if everything else lambda like: like.new_empty(0, *like.shape))
        factors.w_plus, factors.w_minus = room(state.factors.w_plus), room(state.factors.w_minus)
        whole = DiagonalState(factors, room(state.square_sum), room(state.largest_step)) if everything else None
        loss = room(state.square_sum).to(state.factors.w_plus.dtype)
        at = torch.tensor(steps, dtype=torch.int64, device=loss.device)
        return cls(at, factors.w_plus, factors.w_minus, loss, loss.to(torch.int8), whole)
