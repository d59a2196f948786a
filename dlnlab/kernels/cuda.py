"""Many steps of the diagonal linear network in one call, on a CUDA device.

    if refusal(x.device, dim) is None:                    # else the torch steps of `dlnlab.kernels.reference`
        kernel = DiagonalKernel(x, y)
        taken = kernel.advance(factors, lr, None, problem, batches, start=0, stop=10_000)

It means the same as `dlnlab.kernels.cpu`, and takes the same state, batches, guard and records, on the device: integers
are equal, numbers agree to rounding, and a member's bits depend neither on the ensemble nor its order nor on where calls
begin and end.

**Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.** Under TRITON_INTERPRET=1 the same
kernel runs on CPU tensors, slowly.
"""

import importlib.util
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dlnlab.kernels.diagonal import Batches, Guard, Kernel, Records
from dlnlab.kernels.factors import PERIOD, Factors, floors
from dlnlab.kernels.rates import Rates
from dlnlab.streams import SAMPLINGS

if TYPE_CHECKING:
    from dlnlab.kernels import cuda_steps

MAX_DIM = 4096
"""More coordinates do not fit into one program's registers."""
VALUES = 8
"""Coordinates a thread holds, of each of seven arrays: more take more registers than it has, fewer more exchanges between
threads and more reads of x."""
REGISTERS = 168
"""Of a thread, so that twelve warps share a multiprocessor; the loop over rows needs no more, the rest of a step spills a
little."""
LAUNCH_SECONDS = 0.2
"""What a launch aims at, so that the device stays free for others and a signal is answered."""
_RATE = 1e12
"""Multiply-adds per second for that estimate, cautiously; and the least time of one row of one step."""
_ROW_SECONDS = 1e-7


@cache
def _missing() -> str | None:
    """What Triton lacks here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton finds no C compiler (install gcc, or set CC)"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device | str, dim: int = 1) -> str | None:
    """Why a kernel cannot run, in a line, or None if it can.

    Args:
        device: Where the members are.
        dim: D, of the diagonal network.
    """
    device = torch.device(device)
    if device.type != ("cpu" if interpreted() else "cuda"):
        return f"CUDA kernels do not run on {device.type} tensors"
    if dim > MAX_DIM:
        return f"the CUDA kernel has room for {MAX_DIM} features, the data have {dim}"
    return _missing()


def layout(dim: int) -> tuple[int, int, int]:
    """How a block is laid out; a function of D alone, because it decides the order of sums.

    Returns:
        Columns (D padded), lanes (members of a block) and warps.
    """
    columns = max(4, 1 << (dim - 1).bit_length())
    lanes = max(1, 32 * VALUES // columns)
    return columns, lanes, max(1, columns * lanes // (32 * VALUES))


def registers(warps: int) -> int:
    """What a thread gets at most: all warps of a block share 65,536."""
    return min(REGISTERS, 2048 // warps)


def rate_tables(rates: Rates | None, members: Tensor) -> tuple["cuda_steps.Rates", tuple[int, int]]:
    """Rates for a kernel, and the step of their first column and how many they have; without any nobody has a schedule.

    Args:
        rates: Those of the members whose lr or weight decay changes.
        members: Any int64 tensor (E,) on the device.
    """
    from dlnlab.kernels import cuda_steps  # triton takes seconds to import, and is optional

    if rates is None:
        none = members.new_zeros(1, dtype=torch.float64)
        return cuda_steps.Rates(none, none, torch.full_like(members, -1), none, none), (0, 0)
    names = ("lr", "weight_decay", "schedule", "lr_factor", "weight_decay_factor")
    return cuda_steps.Rates(*(getattr(rates, name).contiguous() for name in names)), (
        rates.first, rates.lr_factor.shape[1],
    )  # fmt: skip


class DiagonalKernel(Kernel):
    """Trajectories of diagonal linear networks on P problems.

    Args:
        x: Inputs (P, N, D), float64 or float32, on the device.
        y: Targets (P, N).

    Raises:
        ValueError: If the kernel cannot run there (`refusal`).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        problems, self.num_samples, self.dim = x.shape
        reason = refusal(x.device, self.dim)
        if reason is not None:
            raise ValueError(reason)
        from dlnlab.kernels import cuda_steps  # triton takes seconds to import, and is optional

        self._steps = cuda_steps
        self.columns, self.lanes, self.warps = layout(self.dim)
        padded = x.new_zeros(problems, self.num_samples, self.columns)
        padded[..., : self.dim] = x
        self._problems = cuda_steps.Problems(padded, y.contiguous())

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
        """See `Kernel.advance`."""
        device, steps = lr.device, self._steps
        size = torch.where(batches.size == 0, self.num_samples, batches.size)
        members = steps.Members(
            (lr / decay / size).to(lr.dtype), decay, problem.contiguous(), size, batches.sampling.contiguous(),
            batches.sampling_key.contiguous(), batches.noise_key.contiguous(), batches.noise_std.double(),
            status, stopped_at, lr.double() if guard is None else guard.bound, status if guard is None else guard.cause,
        )  # fmt: skip
        courses, span = rate_tables(rates, problem)
        home = self._state(factors)
        kept = home if guard is None else self._state(guard.kept)
        tol, every = (0.0, 2**62) if guard is None else (guard.tol, guard.every_n_steps)
        floor, near = floors(lr.dtype)
        reals = torch.tensor((tol, floor, near, math.log(floor)), dtype=torch.float64, device=device)
        due = records.steps.tolist()
        room_to_write = self._records(records, home)
        everything = records.factors is not None
        lasts = []
        for kind, table, rows in self._blocks(status, problem, batches, courses.schedule, with_stopped=bool(due)):
            sampled, noisy, changing = kind
            blocks, room = len(table), max(rows, steps.ROWS.value)
            memory = steps.Memory(
                torch.empty(blocks * room * self.lanes if sampled else 1, dtype=torch.int32, device=device),
                torch.empty(blocks * self.num_samples * self.lanes if sampled else 1, dtype=torch.int32, device=device),
                torch.full((blocks,), start, device=device),
            )
            for begin, end in self._launches(start, stop, blocks, rows):
                integers = torch.tensor((
                    begin, end, every, bisect_right(due, begin), bisect_right(due, end), everything, self.num_samples,
                    self.dim, len(lr), room, *span,
                ))  # fmt: skip
                with torch.cuda.device_of(home.w_plus):  # Triton launches on the current device
                    steps.advance[(blocks,)](
                        table.to(device), members, courses, self._problems, home, kept, room_to_write, memory,
                        steps.Plan(integers.to(device), reals),
                        SAMPLED=sampled, NOISY=noisy, SCHEDULED=changing, COLUMNS=self.columns, LANES=self.lanes,
                        num_warps=self.warps, maxnreg=registers(self.warps), enable_fp_fusion=True,  # the default changes
                    )  # fmt: skip
            lasts.append(memory.last.max())
        return max([int(last) - start for last in lasts], default=0)

    def _state(self, factors: Factors) -> "cuda_steps.State":
        """The state for the kernel."""
        for name, tensor in vars(factors).items():  # aligned: there is another compiled kernel for what is not
            assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0, f"{name} is part of another tensor"
        return self._steps.State(**vars(factors))

    def _records(self, records: Records, home: "cuda_steps.State") -> "cuda_steps.Records":
        """Records for the kernel; what is not asked for is never written, and has any tensor of the right type."""
        if records.factors is None:
            state = home._replace(w_plus=records.w_plus, w_minus=records.w_minus)
        else:
            state = self._state(records.factors)
        return self._steps.Records(records.steps, state, records.train_loss, records.status)

    def _blocks(
        self, status: Tensor, problem: Tensor, batches: Batches, schedule: Tensor, with_stopped: bool
    ) -> Iterator[tuple[tuple[bool, bool, bool], Tensor, int]]:
        """Members that run together, as (blocks, lanes) with -1 for none, for each of the eight compiled kernels.

        What a member's kernel and block are like depends on the member alone, or its bits would depend on the others.

        Yields:
            Whether batches are drawn, labels noisy and rates scheduled; the blocks; the most rows of a step.
        """
        size, sampling, problem = (tensor.cpu().numpy() for tensor in (batches.size, batches.sampling, problem))
        chosen = np.arange(len(size)) if with_stopped else np.flatnonzero(status.cpu().numpy() == 0)
        noisy, scheduled = (batches.noise_std > 0).cpu().numpy(), (schedule >= 0).cpu().numpy()
        for drawn, noise, changing in product((False, True), repeat=3):
            alike = ((size > 0) == drawn) & (noisy == noise) & (scheduled == changing)
            kind = chosen[alike[chosen]]
            if len(kind) == 0:
                continue
            key = (size * len(SAMPLINGS) + sampling if drawn else np.zeros_like(size))[kind]
            order = np.lexsort((problem[kind], key))  # neighbours share a problem, and with it the cache
            kind, key = kind[order], key[order]
            groups = np.split(kind, np.flatnonzero(np.diff(key)) + 1)
            padded = [np.pad(group, (0, -len(group) % self.lanes), constant_values=-1) for group in groups]
            table = torch.from_numpy(np.concatenate(padded).reshape(-1, self.lanes))
            yield (drawn, noise, changing), table, int(size[kind].max()) if drawn else self.num_samples

    def _launches(self, start: int, stop: int, blocks: int, rows: int) -> Iterator[tuple[int, int]]:
        """The steps cut into launches of about `LAUNCH_SECONDS`; no result depends on where."""
        seconds = rows * max(_ROW_SECONDS, 2 * blocks * self.lanes * self.columns / _RATE)
        length = max(PERIOD, int(LAUNCH_SECONDS / seconds))
        for begin in range(start, stop, length):
            yield begin, min(begin + length, stop)
