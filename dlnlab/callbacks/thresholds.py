"""Thresholds: up to which constant step size the iterates converge, and up to which they do not diverge."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dlnlab import checks, theory
from dlnlab.callbacks.base import Measurement
from dlnlab.callbacks.replay import Replay
from dlnlab.kernels import Records
from dlnlab.models import DiagonalLinearNetwork
from dlnlab.models.base import DIVERGED

_NAMES = ("gamma_max", "gamma_tilde_max")
_SUFFIXES = ("", "_first_failure", "_last_success", "_islands")

Trial = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(members (T,), step sizes (T,)) -> whether they converged, whether they diverged, boolean (T,)."""


class Thresholds(Measurement):
    r"""The largest step sizes at which the iterates converge, and do not diverge, beside those that theory names.

    For each member on its own (its problem, initialisation, batches and seed; its own step size plays no part), from where
    the fit started. `num_rates` step sizes in geometric progression, `lowest` to `highest` times the step size at which
    the end of gradient flow loses its mean-square stability, are run for `num_steps` steps; the interval in which the
    outcome first changes is divided likewise, until its ends are in ratio at most 1 + `tol`.

    Neither set of step sizes need be an interval: above the first that fails others may succeed, islands among those that
    fail. GD's divergence is so: its border is a fractal, and a single number to 1 % says less than it seems to. Recorded
    are therefore, among all step sizes tried, for convergence and for "does not diverge" alike: the largest success below
    the first failure, `gamma_max` and `gamma_tilde_max`; `<name>_first_failure`; `<name>_last_success`, the largest
    success anywhere; and `<name>_islands`, how many islands there are. Where there is none the threshold is bracketed,
    else it lies anywhere between the first failure and the last success. Islands narrower than the scan's steps pass
    unseen: more `num_rates` find more of them. A threshold is NaN where the smallest step size tried fails, and infinite
    where none fails; the last success is NaN where there is none, and infinite where the largest tried is one.

    Logged: `theory/gamma_max`; `theory/gamma_tilde_max`, the largest at which they do not diverge; of each
    `theory/<name>_first_failure`, `_last_success` and `_islands`; `theory/flow_edge`, 2/sharpness where gradient flow
    ends; `theory/flattest_edge`, 2/sharpness of the flattest interpolator; `theory/mean_square_edge`, up to which the
    member's batches are mean-square stable where the flow ends; on request `theory/almost_sure_edge`, where its top
    Lyapunov exponent passes 0; and `theory/gamma_max_over_<edge>`. Cost: about 3 num_rates num_steps steps a member.

    Args:
        num_steps: Steps each step size is given, None is those of the fit; none converges whose loss takes longer.
        settled: A step size converges if the full loss is below this part of its first value at the last four steps. Where
            gradient descent's period doubles, the oscillation's loss grows with the excess: 1e-3 lets 1.5 % pass, 1e-4 a
            tenth of that, and less asks for more steps.
        tol: How far apart the ends of the bracket of the first failure may be, as a ratio minus one.
        lowest: The scan's smallest step size, in units of the mean-square edge.
        highest: Its largest.
        num_rates: Step sizes tried at once.
        almost_sure: Also compute the almost sure edge, from random products (seconds per kind of batch).
        every_n_steps: A period in optimizer steps; without a schedule, the last step only.
        at: A list of steps.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        even2023, section 5 (the two thresholds); the edges: derived here, see `dlnlab.theory.stability`.
    """

    last_only: ClassVar[bool] = True
    of_constant_rates: ClassVar[bool] = True

    def __init__(
        self,
        num_steps: int | None = None,
        settled: float = 1e-4,
        tol: float = 0.01,
        lowest: float = 0.5,
        highest: float = 8.0,
        num_rates: int = 16,
        almost_sure: bool = False,
        every_n_steps: int | None = None,
        at: Any = None,
    ) -> None:
        super().__init__(every_n_steps, at)
        if num_steps is not None:
            checks.integer("Thresholds.num_steps", num_steps, at_least=1)
        self.num_steps = num_steps
        self.settled = checks.positive("Thresholds.settled", settled)
        self.tol = checks.positive("Thresholds.tol", tol)
        self.lowest = checks.positive("Thresholds.lowest", lowest)
        self.highest = checks.positive("Thresholds.highest", highest)
        if highest <= lowest:
            raise ValueError(f"Thresholds.highest = {highest:g}: must be above lowest, {lowest:g}")
        self.num_rates = checks.integer("Thresholds.num_rates", num_rates, at_least=2)
        self.almost_sure = checks.flag("Thresholds.almost_sure", almost_sure)
        self._found: dict[str, Tensor] | None = None

    def check(self, model: Any) -> None:
        """Raise ValueError where there are no such thresholds."""
        Replay.check("Thresholds", model)
        self._found = None

    def names(self, model: Any) -> tuple[str, ...]:
        """See `Measurement.names`; without the work."""
        edges = ("flow_edge", "flattest_edge", "mean_square_edge", *(("almost_sure_edge",) if self.almost_sure else ()))
        ratios = (f"gamma_max_over_{edge}" for edge in edges)
        return (*(f"{name}{suffix}" for name in _NAMES for suffix in _SUFFIXES), *edges, *ratios)

    def measure(self, model: DiagonalLinearNetwork, batch: Any) -> dict[str, Tensor]:
        """Thresholds and edges (E,); they do not depend on the step, and are found once."""
        del batch
        if self._found is None:
            replay = Replay(model)
            members, kind = replay.distinct()
            edges = edges_of(model, members, replay.start, self.almost_sure)
            num_steps = model.trainer.max_steps if self.num_steps is None else self.num_steps
            last = list(range(max(1, num_steps - 3), num_steps + 1))

            def trial(which: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
                factors = replay.begin(tried := members[which])
                wanted = self.settled * replay.losses(tried, factors)
                records = Records.allocate(last, factors)
                tol = 1e-6 * float(wanted.min())  # by chance a loss that oscillates may pass, but not so low
                status = replay.advance(tried, factors, lr, 0, num_steps, tol, records=records)
                settled = (records.train_loss.to(wanted) <= wanted).all(0)
                diverged = (status == DIVERGED).to(wanted.device)  # back at a state from before, with a loss of then
                return settled & ~diverged, diverged

            unit = edges["mean_square_edge"]
            found = thresholds(trial, self.lowest * unit, self.highest * unit, self.num_rates, self.tol)
            values = {name + suffix: of[i] for i, name in enumerate(_NAMES)
                      for suffix, of in zip(_SUFFIXES, found, strict=True)} | edges  # fmt: skip
            values |= {f"gamma_max_over_{name}": values["gamma_max"] / edge for name, edge in edges.items()}
            self._found = {name: value[kind] for name, value in values.items()}
        return self._found


def edges_of(
    model: DiagonalLinearNetwork, members: Tensor, start: tuple[Tensor, Tensor], almost_sure: bool = False
) -> dict[str, Tensor]:
    """Step sizes that theory names, of some members.

    Args:
        model: The network.
        members: Their numbers, (K,).
        start: w+ and w- of all members where gradient flow begins, (E, D).
        almost_sure: Also the almost sure edge.

    Returns:
        `flow_edge`, `flattest_edge`, `mean_square_edge` and, on request, `almost_sure_edge`, (K,).
    """
    x, y = model.problems.x.double(), model.problems.y.double()
    problem = model.problem_index[members]
    plus, minus = (w[members].double() for w in start)
    log_init = (plus.abs().log() + minus.abs().log()) / 2
    beta, _ = theory.min_bregman(x[problem], y[problem], None, (plus**2 - minus**2) / 2, log_effective_init=log_init)
    init = torch.exp(log_init)
    _, flattest = theory.flattest_interpolator(x, y)
    edges = {
        "flow_edge": 2 / theory.sharpness(x[problem], theory.weight_square(beta, init)),
        "flattest_edge": 2 / flattest[problem],
        "mean_square_edge": torch.empty_like(beta[:, 0]),
    }
    if almost_sure:
        edges["almost_sure_edge"] = torch.empty_like(beta[:, 0])
    sizes, samplings = model.per_member("batch_size"), model.per_member("sampling")
    batches = [(sizes[i], samplings[i]) for i in members.tolist()]
    for size, sampling in dict.fromkeys(batches):
        alike = torch.tensor([batch == (size, sampling) for batch in batches], device=x.device)
        found = theory.stability(
            theory.Interpolator(x[problem[alike]], beta[alike], init[alike]), *model.drawn(size, sampling)
        )
        edges["mean_square_edge"][alike] = found.mean_square_edge
        if almost_sure:
            edges["almost_sure_edge"][alike] = found.edge if size == "full" else found.almost_sure_edge()[0]
    return edges


class Found(NamedTuple):
    """The outcomes of step sizes in brief: (2, E) each, for convergence and for "does not diverge"."""

    below: Tensor
    """The largest success below the first failure; NaN if the smallest step size fails, infinite if none does."""
    above: Tensor
    """The first failure; infinite if there is none."""
    last: Tensor
    """The largest success; NaN if there is none, infinite if the largest step size is one."""
    islands: Tensor
    """The number of runs of successes above the first failure."""


def thresholds(trial: Trial, low: Tensor, high: Tensor, num_rates: int, tol: float) -> Found:
    """Scan step sizes for all members at once, then divide each member's own brackets of its first failures.

    Args:
        trial: Runs members at step sizes.
        low: The smallest step size, (E,).
        high: The largest, (E,).
        num_rates: Step sizes of the scan, and within a bracket each time it is divided.
        tol: The ratio of a bracket's ends that ends it, minus one.

    Returns:
        What was found among all step sizes tried.
    """
    parts = torch.linspace(0, 1, num_rates, dtype=low.dtype, device=low.device)
    members = torch.arange(len(low), device=low.device).repeat_interleave(num_rates)
    rates = (low[:, None] * (high / low)[:, None] ** parts).flatten()
    inner = torch.linspace(0, 1, num_rates + 2, dtype=low.dtype, device=low.device)[1:-1]
    good = _outcomes(trial, members, rates)
    while True:
        found = _in_brief(members, rates, good, len(low))
        bracket = found.below.isfinite() & found.above.isfinite() & (found.above > (1 + tol) * found.below)
        if not bool(bracket.any()):
            return found
        which = bracket.nonzero()[:, 1].repeat_interleave(num_rates)
        below, above = found.below[bracket], found.above[bracket]
        tried = (below[:, None] * (above / below)[:, None] ** inner).flatten()
        good = torch.cat((good, _outcomes(trial, which, tried)), 1)
        members, rates = torch.cat((members, which)), torch.cat((rates, tried))


def _outcomes(trial: Trial, members: Tensor, rates: Tensor) -> Tensor:
    """Whether members converge, and whether they do not diverge, (2, T)."""
    converged, diverged = trial(members, rates)
    return torch.stack((converged, ~diverged))


def _in_brief(members: Tensor, rates: Tensor, good: Tensor, num_members: int) -> Found:
    order = rates.argsort(stable=True)
    order = order[members[order].argsort(stable=True)]
    members, rates, good = members[order], rates[order].expand(2, -1), good[:, order]
    of = members.expand(2, -1)

    def extreme(values: Tensor, start: float, kind: str) -> Tensor:
        return values.new_full((2, num_members), start).scatter_reduce(1, of, values, kind)

    above = extreme(torch.where(good, torch.inf, rates), torch.inf, "amin")
    first = torch.where(good & (rates < above.gather(1, of)), rates, -torch.inf)
    below, last = (extreme(values, -torch.inf, "amax") for values in (first, torch.where(good, rates, -torch.inf)))
    highest = extreme(rates, -torch.inf, "amax")
    begins = good[:, 1:] & ~good[:, :-1] & (members[1:] == members[:-1])
    islands = rates.new_zeros(2, num_members).scatter_add(1, of[:, 1:], begins.to(rates.dtype))
    return Found(
        torch.where(above.isinf(), torch.inf, torch.where(below.isinf(), torch.nan, below)),
        above,
        torch.where(last.isinf(), torch.nan, torch.where(last == highest, torch.inf, last)),
        islands,
    )
