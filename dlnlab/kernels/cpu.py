"""Many steps of the diagonal linear network in one call, on the CPU.

    kernel = DiagonalKernel(x, y)
    factors = Factors.start(w_plus, w_minus)
    taken = kernel.advance(factors, lr, None, problem, Batches.full(num_members), start=0, stop=10_000)
    factors.gain()

Members run one after another, or full batches of one problem sixteen at a time; a member's bits depend neither on that nor
on the ensemble, its order, the number of threads or where calls begin and end. Results agree with
`dlnlab.kernels.reference` to rounding: sums run in another order, and a product and a sum share one rounding.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from dlnlab.kernels import cpu_steps
from dlnlab.kernels.cpu_steps import LANES, PAD
from dlnlab.kernels.diagonal import Batches, Guard, Kernel, Records
from dlnlab.kernels.factors import Factors, floors
from dlnlab.kernels.rates import Rates, rate_arrays

FEWEST_LANES = 10
"""From so many full-batch members of one problem on, sixteen lanes take less time than one after another."""
_SLICES_PER_THREAD = 4


class DiagonalKernel(Kernel):
    """Trajectories of diagonal linear networks on P problems.

    Args:
        x: Inputs (P, N, D), float64 or float32, on the CPU.
        y: Targets (P, N).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        problems, n, d = x.shape
        rows, columns = -(-n // 8) * 8, -(-d // PAD) * PAD
        padded = cpu_steps.aligned_zeros(problems * rows * columns, x.numpy().dtype)
        padded.reshape(problems, rows, columns)[:, :n, :d] = x.numpy()
        targets = cpu_steps.aligned_zeros(problems * rows, padded.dtype)
        targets.reshape(problems, rows)[:, :n] = y.numpy()
        wide = x.double()
        self._problems = cpu_steps.Problems(
            padded, targets, wide.square().sum(-1).numpy(), wide.abs().amax(-1).numpy(), n, d, rows, columns
        )

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
        table = cpu_steps.Members(
            *(tensor.contiguous().numpy() for tensor in (
                lr, decay, problem, batches.size, batches.sampling, batches.sampling_key,
                batches.noise_key, batches.noise_std.double(), factors.initial_plus, factors.initial_minus,
                status, stopped_at,
            )),
            len(lr),
        )  # fmt: skip
        assert status.is_contiguous() and stopped_at.is_contiguous(), "they are changed in place"
        state = _arrays(factors)
        rule = (
            cpu_steps.Guard(0.0, state.square_sum, 0, state, status.numpy())  # never read
            if guard is None
            else cpu_steps.Guard(
                float(guard.tol), guard.bound.numpy(), guard.every_n_steps, _arrays(guard.kept), guard.cause.numpy()
            )
        )
        buffers, numbers = _record_arrays(records), rate_arrays(rates, len(lr))
        blocks = _blocks(table, with_stopped=buffers.num_steps > 0)

        def run(part: np.ndarray) -> int:
            memory = cpu_steps.new_memory(self._problems, int(batches.size.max()))
            return cpu_steps.advance(
                part, state, table, self._problems, rule, buffers, memory, *floors(lr.dtype), start, stop, numbers
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
        rest = len(group) % LANES
        count = len(group) if rest >= FEWEST_LANES else len(group) - rest
        alone.append(group[count:])
        if count:
            blocks.append(np.pad(group[:count], (0, -count % LANES), constant_values=-1).reshape(-1, LANES))
    single = np.concatenate(alone)
    blocks.append(np.full((len(single), LANES), -1))
    blocks[-1][:, 0] = single
    return np.concatenate(blocks)


def _arrays(factors: Factors) -> cpu_steps.State:
    """The state for the kernel."""
    tensors = [getattr(factors, name) for name in cpu_steps.State._fields]
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernel changes its tensors in place"
    return cpu_steps.State(*(tensor.numpy() for tensor in tensors))


def _record_arrays(records: Records) -> cpu_steps.Records:
    """Records for the kernel: a row for each step and member; fields not asked for are empty."""

    def rows(tensor: Tensor) -> np.ndarray:
        return tensor.flatten(0, 1).numpy()

    if records.factors is not None:
        state = _arrays(records.factors.map(lambda tensor: tensor.flatten(0, 1)))
    else:
        real, integer, sums = np.empty((0, 0)), np.empty((0, 0), np.int64), np.empty(0)
        state = cpu_steps.State(
            rows(records.w_plus), rows(records.w_minus), real, real, integer, integer, real, real, sums, sums
        )
    return cpu_steps.Records(
        records.steps.numpy(),
        len(records.steps),
        state,
        records.factors is not None,
        rows(records.train_loss),
        rows(records.status),
    )
