"""What the kernels of the diagonal network take and change, and which kernel a device has."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlnlab.kernels.factors import Factors
from dlnlab.kernels.guard import Limits
from dlnlab.kernels.rates import Rates


def diagonal_kernel(x: Tensor, y: Tensor) -> "Kernel | str":
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


def num_threads() -> int:
    """Threads that share the members: what OMP_NUM_THREADS says, else every processor this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


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
class Guard(Limits):
    """When members stop, and the factors that diverged ones go back to; see `Limits`."""

    kept: Factors


@dataclass
class Records:
    """What is written while steps are taken, a row for each of T steps.

    Attributes:
        steps: Those steps, ascending, int64 (T,).
        w_plus: (T, E, D), as `w_minus`.
        w_minus: Likewise.
        train_loss: Full clean data loss (T, E).
        status: (T, E), int8.
        factors: All of the state with a leading T, sharing w+ and w-, or None. Its initial values are not filled.
    """

    steps: Tensor
    w_plus: Tensor
    w_minus: Tensor
    train_loss: Tensor
    status: Tensor
    factors: Factors | None = None

    @classmethod
    def allocate(cls, steps: Sequence[int], factors: Factors, everything: bool = False) -> "Records":
        """Room for the records of a state at some steps; `everything` asks for all of the state."""

        def room(like: Tensor) -> Tensor:
            return torch.empty(len(steps), *like.shape, dtype=like.dtype, device=like.device)

        whole = factors.map(room) if everything else None
        w_plus, w_minus = (
            (room(factors.w_plus), room(factors.w_minus)) if whole is None else (whole.w_plus, whole.w_minus)
        )
        loss = room(factors.square_sum).to(w_plus.dtype)
        at = torch.tensor(steps, dtype=torch.int64, device=loss.device)
        return cls(at, w_plus, w_minus, loss, loss.to(torch.int8), whole)


class Kernel(ABC):
    """Trajectories of diagonal linear networks on P problems, on one device."""

    def advance(
        self,
        factors: Factors,
        lr: Tensor,
        decay: Tensor | None,
        problem: Tensor,
        batches: Batches,
        start: int,
        stop: int,
        status: Tensor | None = None,
        stopped_at: Tensor | None = None,
        guard: Guard | None = None,
        records: Records | None = None,
        num_threads: int = 1,
        rates: Rates | None = None,
    ) -> int:
        """Take the running members from step `start` to step `stop`, in place.

        Args:
            factors: The members' state; contiguous tensors (E, D) on the kernel's device. A member's decay is the same in
                all coordinates.
            lr: Step sizes (E,).
            decay: 1 - 2 lr weight_decay (E,), or None without weight decay.
            problem: Which problem each member has, int64 (E,).
            batches: What they see.
            start: The first step.
            stop: The step after the last.
            status: 0 running, 1 converged, 2 diverged, int8 (E,), changed by the guard; None if all run.
            stopped_at: Where members stopped, int64 (E,), likewise.
            guard: When members stop; None for never.
            records: What to write at steps in (start, stop]; a stopped member's state is repeated. A step that has both
                a check and a record is checked first.
            num_threads: Threads of a CPU that share the members.
            rates: Lr and weight decay of the members whose schedules change them; None if all are constant.

        Returns:
            The steps taken: stop - start, or fewer if the last running member stopped at a check before.
        """
        assert rates is None or rates.covers(start, stop), "factors are missing"
        lr = lr.to(factors.w_plus.dtype)
        return self._advance(
            factors,
            lr,
            torch.ones_like(lr) if decay is None else decay.to(lr.dtype),
            problem,
            batches,
            start,
            stop,
            torch.zeros_like(problem, dtype=torch.int8) if status is None else status,
            torch.full_like(problem, -1) if stopped_at is None else stopped_at,
            guard,
            Records.allocate([], factors) if records is None else records,
            num_threads,
            rates,
        )

    @abstractmethod
    def _advance(
        self,
        factors: Factors,
        lr: Tensor,
        decay: Tensor,
        problem: Tensor,
        batches: Batches,
        start: int,
        stop: int,
        status: Tensor,
        stopped_at: Tensor,
        guard: Guard | None,
        records: Records,
        num_threads: int,
        rates: Rates | None,
    ) -> int:
        """`advance` on the device, nothing left out."""
