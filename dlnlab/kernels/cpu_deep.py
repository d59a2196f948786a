"""Many steps of the deep linear network on observed entries in one call, on the CPU.

A member's bits depend neither on the ensemble, its order, the number of threads nor on where calls begin and end. Results
agree with `dlnlab.kernels.deep.deep_step` to rounding.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dlnlab.kernels import cpu_deep_steps as steps
from dlnlab.kernels.deep import DeepGuard, EntryLoss
from dlnlab.kernels.diagonal import Batches
from dlnlab.kernels.rates import Rates, rate_arrays

_SLICES_PER_THREAD = 4


class DeepKernel:
    """Trajectories of deep linear networks on the observed entries of P matrices.

    Args:
        places: (row, column) of the observed entries, int64 (P, N, 2).
        y: Their values (P, N), float64 or float32.
        sizes: D, H_1, ..., H_{L-1}, K.
    """

    def __init__(self, places: Tensor, y: Tensor, sizes: Sequence[int]) -> None:
        rows, columns = (places[..., i].contiguous().numpy() for i in range(2))
        self._problems = steps.Problems(rows, columns, y.contiguous().numpy(), y.shape[1])
        self._network = steps.new_network(list(sizes))

    def refusal(self, batch_sizes: Tensor) -> None:
        """None: it takes steps of any batch size."""

    def advance(
        self,
        weights: Sequence[Tensor],
        lazy: tuple[Tensor, Tensor],
        lr: Tensor,
        decay: Tensor,
        problem: Tensor,
        batches: Batches,
        loss: EntryLoss,
        start: int,
        stop: int,
        status: Tensor | None = None,
        stopped_at: Tensor | None = None,
        guard: DeepGuard | None = None,
        num_threads: int = 1,
        rates: Rates | None = None,
    ) -> int:
        """Take the running members from step `start` to step `stop`, in place.

        Args:
            weights: W_1, ..., W_L, contiguous (E, H_l, H_{l-1}).
            lazy: Room (E, D, H_1) and (E, K, H_{L-1}) for what one call hands to the next.
            lr: Step sizes (E,).
            decay: 1 - 2 lr weight_decay, (E,), positive.
            problem: Which matrix each member has, int64 (E,).
            batches: What they see.
            loss: Its scale.
            start: The first step.
            stop: The step after the last.
            status: 0 running, 1 converged, 2 diverged, int8 (E,), changed by the guard; None if all run.
            stopped_at: Where members stopped, int64 (E,), likewise.
            guard: When members stop; None for never.
            num_threads: Threads that share the members.
            rates: Lr and weight decay of the members whose schedules change them; None if all are constant.

        Returns:
            The steps taken: stop - start, or fewer if the last running member stopped at a check before.
        """
        assert rates is None or rates.covers(start, stop), "factors are missing"
        status = torch.zeros_like(problem, dtype=torch.int8) if status is None else status
        stopped_at = torch.full_like(problem, -1) if stopped_at is None else stopped_at
        kept = [] if guard is None else guard.kept
        assert all(tensor.is_contiguous() for tensor in (*weights, *lazy, *kept, status, stopped_at)), (
            "changed in place"
        )
        members = steps.Members(
            _addresses(weights), *(tensor.reshape(-1).numpy() for tensor in lazy), lr.double().contiguous().numpy(),
            decay.double().contiguous().numpy(), problem.numpy(), batches.size.numpy(), batches.sampling.numpy(),
            batches.sampling_key.numpy(), batches.noise_key.numpy(), batches.noise_std.double().numpy(),
            status.numpy(), stopped_at.numpy(),
        )  # fmt: skip
        rule = steps.Guard(0.0, members.lr, 0, members.weights, members.status)  # never read
        if guard is not None:
            rule = steps.Guard(
                float(guard.tol), guard.bound.numpy(), guard.every_n_steps, _addresses(kept), guard.cause.numpy()
            )
        scale = steps.Loss(float(loss.scale), loss.mean)
        largest, dtype = int(batches.size.max()), self._problems.y.dtype
        running, numbers = np.flatnonzero(members.status == steps.RUNNING), rate_arrays(rates, len(problem))

        def run(chosen: np.ndarray) -> int:
            work = steps.new_work(self._network, self._problems.num_samples, largest, dtype)
            return steps.advance(
                chosen, members, self._problems, self._network, scale, rule, work, start, stop, numbers
            )

        if num_threads == 1 or len(running) < 2:
            return run(running) - start
        parts = np.array_split(running, min(len(running), num_threads * _SLICES_PER_THREAD))
        with ThreadPoolExecutor(num_threads) as pool:
            return max(pool.map(run, parts)) - start


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
