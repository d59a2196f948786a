"""Many steps of the deep linear network on observed entries in one call, on a CUDA device.

It means the same as `dlnlab.kernels.cpu_deep`, for mini-batches of up to `MAX_BATCH` entries: numbers agree to rounding,
and a member's bits depend neither on the ensemble nor its order nor on where calls and launches begin and end. Checks are
batched products in torch, so a loss within rounding of a limit of the guard may fall on either side of it.

**Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.**
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlnlab.kernels import cuda
from dlnlab.kernels.deep import SMALLEST_SCALE, DeepGuard, EntryLoss
from dlnlab.kernels.diagonal import Batches
from dlnlab.kernels.guard import ABOVE_BOUND, NOT_FINITE
from dlnlab.kernels.rates import Rates

if TYPE_CHECKING:
    from dlnlab.kernels import cuda_deep_steps

MAX_BATCH = 32
"""Entries of a step are taken one after another: more are better taken in torch."""
MAX_WIDTH = 2048
"""Two vectors and a row of a wider layer do not fit into one program's registers."""
TILE = 2048
"""Numbers of a layer that a program takes at once, ..."""
WARPS = 4
"""... sixteen for each thread."""
ROOM = 256
"""Drawn entries of a member there is room for; more only where one batch needs more."""
_ENTRY_SECONDS = 1e-5
"""Of an entry and layer, by the latency of the chain of loads and sums; ..."""
_BYTES = 1e12
"""... and what all members together read and write in a second. Both cautiously."""


def refusal(device: torch.device | str, sizes: Sequence[int]) -> str | None:
    """Why the kernel cannot run, in a line, or None if it can.

    Args:
        device: Where the members are.
        sizes: D, H_1, ..., H_{L-1}, K.
    """
    reason = cuda.refusal(device)
    if reason is not None:
        return reason
    if max(sizes[1:-1]) > MAX_WIDTH:
        return f"the CUDA kernel has room for a width of {MAX_WIDTH}, the network has {max(sizes[1:-1])}"
    return None


class DeepKernel:
    """Trajectories of deep linear networks on the observed entries of P matrices; see `dlnlab.kernels.cpu_deep`.

    Args:
        places: (row, column) of the observed entries, int64 (P, N, 2).
        y: Their values (P, N), float64 or float32.
        sizes: D, H_1, ..., H_{L-1}, K.
    """

    def __init__(self, places: Tensor, y: Tensor, sizes: Sequence[int]) -> None:
        from dlnlab.kernels import cuda_deep_steps  # triton takes seconds to import, and is optional

        self._steps, self.sizes = cuda_deep_steps, tuple(sizes)
        self.num_samples, self.y = y.shape[1], y
        self._flat = places[..., 0] * self.sizes[0] + places[..., 1]
        self._problems = cuda_deep_steps.Problems(*(places[..., i].contiguous() for i in range(2)), y.contiguous())
        self._width = max(16, 1 << (max(self.sizes[1:-1]) - 1).bit_length())
        self._rows = min(self._width, max(1, TILE // self._width))

    def refusal(self, batch_sizes: Tensor) -> str | None:
        """Why steps of these batch sizes, 0 for all entries (E,), are better taken in torch, or None if they are not.

        Where some members take full batches, and so a few batched products, those of all members cost little more.
        """
        if bool((batch_sizes == 0).any()) or int(batch_sizes.max()) > MAX_BATCH:
            return f"full batches and those of more than {MAX_BATCH} entries are batched products over all members"
        return None

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
        """Take the running members from step `start` to step `stop`, in place; see `dlnlab.kernels.cpu_deep`."""
        del num_threads
        assert all(tensor.is_contiguous() for tensor in (*weights, *lazy)), "changed in place"
        status = torch.zeros_like(problem, dtype=torch.int8) if status is None else status
        stopped_at = torch.full_like(problem, -1) if stopped_at is None else stopped_at
        decay = decay.double()
        members = self._members(lr.double(), decay, problem, batches, loss, start, rates)
        courses = cuda.rate_tables(rates, problem)
        largest, step = int(batches.size.max()), start
        self._take_up(weights, lazy, members.scale)
        length = self._launch_length(len(status), largest)
        while step < stop and len(running := torch.nonzero(status == 0).squeeze(1)):
            end = min(stop, step + length)
            if guard is not None:
                end = min(end, step - step % guard.every_n_steps + guard.every_n_steps)
            self._launch(running, members, courses, weights, lazy, largest, step, end)
            step = end
            if step == stop or (guard is not None and step % guard.every_n_steps == 0):
                c = members.scale[running, None, None]
                weights[0][running] = (c * lazy[0][running]).mT.to(weights[0].dtype)
                weights[-1][running] = (c * lazy[1][running]).to(weights[0].dtype)
            if guard is not None and step % guard.every_n_steps == 0:
                self._check(step, running, weights, problem, loss, guard, status, stopped_at)
        return step - start

    def _members(
        self, lr: Tensor, decay: Tensor, problem: Tensor, batches: Batches, loss: EntryLoss, start: int,
        rates: Rates | None,
    ) -> "cuda_deep_steps.Members":  # fmt: skip
        """What members do, with c as it is at the first step."""
        c = torch.ones_like(decay)
        for step in range(Rates.first_of(start), start):
            c *= decay if rates is None else torch.where(rates.schedule < 0, decay, rates.at(step, torch.float64)[1])
            c = torch.where(c < SMALLEST_SCALE, 1.0, c)
        slope = torch.full_like(lr, 2 * loss.scale) / (batches.size if loss.mean else 1)
        return self._steps.Members(
            lr.contiguous(), decay.contiguous(), slope, c, problem.contiguous(), batches.size.contiguous(),
            batches.sampling.contiguous(), batches.sampling_key.contiguous(), batches.noise_key.contiguous(),
            batches.noise_std.double().contiguous(),
        )  # fmt: skip

    def _take_up(self, weights: Sequence[Tensor], lazy: tuple[Tensor, Tensor], c: Tensor) -> None:
        """V as the last call has left it, or W/c where someone has changed W since."""
        c = c[:, None, None]
        for w, v in zip((weights[0].mT, weights[-1]), lazy, strict=True):
            v.copy_(torch.where((c * v).to(w.dtype) == w, v, (w / c).to(w.dtype)))

    def _launch_length(self, members: int, largest: int) -> int:
        """Steps of a launch; no result depends on it."""
        numbers = sum(a * b for a, b in zip(self.sizes[1:-2], self.sizes[2:-1], strict=True)) + sum(self.sizes)
        moved = (2 + largest) * self.y.itemsize * members * numbers / _BYTES
        return max(1, int(cuda.LAUNCH_SECONDS / max(moved, _ENTRY_SECONDS * largest * len(self.sizes))))

    def _launch(
        self, running: Tensor, members: "cuda_deep_steps.Members", courses: tuple[Any, tuple[int, int]],
        weights: Sequence[Tensor], lazy: tuple[Tensor, Tensor], largest: int, start: int, stop: int,
    ) -> None:  # fmt: skip
        """Take the running members from one step to another, all but the outer layers, which stay V."""
        steps, depth, programs, device = self._steps, len(weights), len(running), running.device
        room = max(largest, ROOM)
        vectors = programs, largest, depth - 1, self._width
        memory = steps.Memory(
            self.y.new_zeros(vectors), self.y.new_zeros(vectors),
            torch.empty(programs, largest, dtype=torch.float64, device=device),
            torch.empty(programs, room, dtype=torch.int32, device=device),
            torch.empty(programs, self.num_samples, dtype=torch.int32, device=device),
        )  # fmt: skip
        plan = steps.Plan(
            torch.tensor((start, stop, self.num_samples, largest, room, *courses[1]), device=device),
            torch.tensor(self.sizes, device=device),
        )
        with torch.cuda.device_of(running):  # Triton launches on the current device
            steps.advance[(programs,)](
                running, members, courses[0], self._problems, tuple(weights), *lazy, memory, plan, DEPTH=depth,
                WIDTH=self._width, ROWS=self._rows, num_warps=WARPS, enable_fp_fusion=True,  # the default changes
            )  # fmt: skip

    def _check(
        self, step: int, running: Tensor, weights: Sequence[Tensor], problem: Tensor, loss: EntryLoss, guard: DeepGuard,
        status: Tensor, stopped_at: Tensor,
    ) -> None:  # fmt: skip
        """`LinearNetwork.check_members` for the running members."""
        layers = [w[running] for w in weights]
        product = layers[0]
        for w in layers[1:]:
            product = w @ product
        errors = product.flatten(1).gather(1, self._flat[problem[running]]) - self.y[problem[running]]
        losses = loss.scale * errors.double().square().sum(1) / (self.num_samples if loss.mean else 1)
        finite = losses.isfinite()
        for w in layers:
            finite &= w.isfinite().flatten(1).all(1)
        fine = finite & (losses <= guard.bound[running])
        guard.cause[running[~fine]] = torch.where(finite, ABOVE_BOUND, NOT_FINITE)[~fine].to(torch.int8)
        gone, safe, done = running[~fine], running[fine], running[fine & (losses < guard.tol)]
        for w, kept in zip(weights, guard.kept, strict=True):
            kept[safe] = w[safe]
            w[gone] = kept[gone]
        status[gone], status[done] = 2, 1
        stopped_at[gone], stopped_at[done] = max(step - guard.every_n_steps, 0), step
