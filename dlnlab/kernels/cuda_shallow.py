"""Many steps of the shallow linear network in one call, on a CUDA device.

It means the same as `dlnlab.kernels.shallow.advance_cpu`: numbers agree to rounding, and a member's bits depend neither on
the ensemble nor its order nor on where calls and launches begin and end.

**Checked in Triton's interpreter, and compiled for sm_90; it has not run on a GPU.**
"""

from bisect import bisect_right

import torch
from torch import Tensor

from dlnlab.kernels import cuda
from dlnlab.kernels.rates import Rates
from dlnlab.kernels.shallow import Course, Log, Multipliers, Rule

LANES = 32
"""Members of a program, one for each thread of its only warp."""
_STEP_SECONDS = 1e-7
"""Of a step of few members, by the latency of its chain of instructions; ..."""
_RATE = 2e11
"""... and member-steps per second of many, cautiously."""


def advance_cuda(
    state: Multipliers, course: Course, start: int, stop: int, status: Tensor, stopped_at: Tensor, rule: Rule | None,
    log: Log, num_threads: int = 1, rates: Rates | None = None,
) -> int:  # fmt: skip
    """Blocks of members in Triton, those that have stopped left out of the next launch; see `shallow_kernel`."""
    del num_threads
    from dlnlab.kernels import cuda_shallow_steps as steps  # triton takes seconds to import, and is optional

    courses, span = cuda.rate_tables(rates, stopped_at)
    home, device = steps.State(**vars(state)), status.device
    kept = home if rule is None else steps.State(**vars(rule.kept))
    tol, every = (0.0, 2**62) if rule is None else (rule.tol, rule.every_n_steps)
    bound, cause = (course.lr, status) if rule is None else (rule.bound, rule.cause)
    members = steps.Members(
        **{name: value for name, value in vars(course).items() if name != "width"}, status=status, stopped_at=stopped_at,
        bound=bound, cause=cause,
    )  # fmt: skip
    reals = torch.tensor((tol, course.width), dtype=torch.float64, device=device)
    due = torch.tensor(log.steps, dtype=torch.int64, device=device)
    records = steps.Records(due, steps.State(**vars(log.state)), log.status)
    length = max(1, int(cuda.LAUNCH_SECONDS / max(_STEP_SECONDS, len(status) / _RATE)))
    last = torch.full((), start, device=device)
    for begin in range(start, stop, length):
        end = min(begin + length, stop)
        first, beyond = bisect_right(log.steps, begin), bisect_right(log.steps, end)
        running, stopped = (torch.nonzero(chosen).squeeze(1) for chosen in (status == 0, status != 0))
        for rows, now in zip((*vars(log.state).values(), log.status), (*home, status), strict=True):
            rows[first:beyond, stopped] = now[stopped]
        if len(running) == 0:
            continue
        integers = torch.tensor((begin, end, every, first, beyond, len(status), len(running), *span), device=device)
        with torch.cuda.device_of(status):  # Triton launches on the current device
            steps.advance[(-(-len(running) // LANES),)](
                running, members, courses, home, kept, records, last, steps.Plan(integers, reals), LANES=LANES, num_warps=1,
                enable_fp_fusion=True,  # Triton's default is about to change
            )  # fmt: skip
    return int(last) - start
