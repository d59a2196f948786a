"""Many steps of the diagonal linear network in one call, on the CPU.

    kernel = DiagonalKernel(x, y)
    state = DiagonalState.start(w_plus, w_minus)
    taken = kernel.advance(state, lr, None, problem, Batches.full(num_members), start=0, stop=10_000)
    state.factors.gain()

Members run one after another, or full batches of one problem sixteen at a time; a member's bits depend neither on that nor
on the ensemble, its order, the number of threads or where calls begin and end. Results agree with
`dlnlab.kernels.reference` to rounding: sums run in another order, and a product and a sum share one rounding.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dlnlab.kernels import cpu_steps
from dlnlab.kernels.cpu_steps import LANES, PAD
from dlnlab.kernels.diagonal import Batches, DiagonalState, Guard, Records
from dlnlab.kernels.factors import floors

FEWEST_LANES = 6
"""From so many full-batch members of one problem on, sixteen lanes take less time than one after another."""
_SLICES_PER_THREAD = 4


class DiagonalKernel:
    """Trajectories of diagonal linear networks on P problems.

    Args:
        x: Inputs (P, N, D), float64 or float32, on the CPU.
        y: Targets (P, N).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        problems, n, d = x.shape
        rows, columns = -(-n // 8) * 8, -(-d // PAD) * PAD
        padded = cpu_steps.aligned_zeros(problems * rows * columns, x.numpy().dtype)
        cube = padded.reshape(problems, rows, columns)
        cube[:, :n, :d] = x.numpy()
        transposed = cpu_steps.aligned_zeros(problems * rows * columns, padded.dtype)
        transposed.reshape(problems, columns, rows)[...] = cube.transpose(0, 2, 1)
        targets = cpu_steps.aligned_zeros(problems * rows, padded.dtype)
        targets.reshape(problems, rows)[:, :n] = y.numpy()
        wide = x.double()
        self._problems = cpu_steps.Problems(
            padded, transposed, targets, wide.square().sum(-1).numpy(), wide.abs().amax(-1).numpy(), n, d, rows, columns
        )

    def advance(
        self,
        state: DiagonalState,
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
    ) -> int:
        """Take the running members from step `start` to step `stop`, in place.

        Args:
            state: The members' state; contiguous tensors on the CPU. A member's decay is the same in all coordinates.
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
            num_threads: Threads that share the members.

        Returns:
            The steps taken: stop - start, or fewer if the last running member stopped at a check before.
        """
        members, kind = len(lr), state.factors.w_plus.dtype
        if status is None:
            status = torch.zeros(members, dtype=torch.int8)
        if stopped_at is None:
            stopped_at = torch.full((members,), -1, dtype=torch.int64)
        if decay is None:
            decay = torch.ones(members, dtype=kind)
        table = cpu_steps.Members(
            *(tensor.contiguous().numpy() for tensor in (
                lr.to(kind), decay.to(kind), problem, batches.size, batches.sampling, batches.sampling_key,
                batches.noise_key, batches.noise_std.double(), state.factors.initial_plus, state.factors.initial_minus,
                status, stopped_at,
            )),
            members,
        )  # fmt: skip
        assert status.is_contiguous() and stopped_at.is_contiguous(), "they are changed in place"
        arrays = _arrays(state)
        rule = (
            cpu_steps.Guard(0.0, 0.0, 0, arrays)
            if guard is None
            else cpu_steps.Guard(float(guard.tol), float(guard.bound), guard.every_n_steps, _arrays(guard.kept))
        )
        buffers = _record_arrays(records if records is not None else Records.allocate([], state))
        blocks = _blocks(table, with_stopped=buffers.num_steps > 0)

        def run(part: np.ndarray) -> int:
            memory = cpu_steps.new_memory(self._problems, int(batches.size.max()))
            return cpu_steps.advance(
                part, arrays, table, self._problems, rule, buffers, memory, *floors(kind), start, stop
            )

        if num_threads == 1 or len(blocks) < 2:
            return run(blocks) - start
        parts = np.array_split(blocks, min(len(blocks), num_threads * _SLICES_PER_THREAD))
        with ThreadPoolExecutor(num_threads) as pool:
            return max(pool.map(run, parts)) - start


def _blocks(members: cpu_steps.Members, with_stopped: bool) -> np.ndarray:
    """Members that run together, (B, LANES) with -1 for none; stopped ones too where there is something to record."""
    running = members.status == cpu_steps.RUNNING
    full = np.flatnonzero(running & (members.batch_size == 0))
    full = full[np.argsort(members.problem[full], kind="stable")]
    alone, blocks = [np.flatnonzero((with_stopped & ~running) | (running & (members.batch_size > 0)))], []
    for group in np.split(full, np.flatnonzero(np.diff(members.problem[full])) + 1):
        for first in range(0, len(group), LANES):
            block = group[first : first + LANES]
            if len(block) < FEWEST_LANES:
                alone.append(block)
            else:
                blocks.append(np.pad(block, (0, LANES - len(block)), constant_values=-1))
    single = np.concatenate(alone)
    table = np.full((len(blocks) + len(single), LANES), -1)
    for row, block in enumerate(blocks):
        table[row] = block
    table[len(blocks) :, 0] = single
    return table


def _arrays(state: DiagonalState) -> cpu_steps.State:
    tensors = state.tensors(cpu_steps.State._fields)
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernel changes its tensors in place"
    return cpu_steps.State(*(tensor.numpy() for tensor in tensors))


def _record_arrays(records: Records) -> cpu_steps.Records:
    """Records for the kernel: a row for each step and member; fields not asked for are empty."""

    def rows(tensor: Tensor) -> np.ndarray:
        return tensor.flatten(0, 1).numpy()

    if records.state is not None:
        state = cpu_steps.State(*(rows(tensor) for tensor in records.state.tensors(cpu_steps.State._fields)))
    else:
        real, integer, sums = np.empty((0, 0)), np.empty((0, 0), np.int64), np.empty(0)
        state = cpu_steps.State(
            rows(records.w_plus), rows(records.w_minus), real, real, integer, integer, real, real, sums, sums
        )
    return cpu_steps.Records(
        records.steps.numpy(),
        len(records.steps),
        state,
        records.state is not None,
        rows(records.train_loss),
        rows(records.status),
    )
