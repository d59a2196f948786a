"""WaitingFigure: how long members stay at each rank."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D
from scipy.stats import CensoredData, chi2, ecdf

from dlnlab.figures.base import FONT_SIZE, Canvas, Figure, colours, legend, log_axis, panels
from dlnlab.figures.rank import cells

_RATES = ("members", "jumps", "jumps_per_step", "jumps_per_step_low", "jumps_per_step_high")
_COLUMNS = ("panel", "rank", "steps", "waiting", *_RATES)


class WaitingFigure(Figure):
    """The share of members that still wait for their jump from rank r to r - 1, over the steps since they came to rank r.

    Kaplan and Meier's estimate: a member whose run ends, or that diverges, before it jumps counts as waiting for as long
    as it was seen. The median of the jumps that were seen would be too short, the more so the rarer they are. Drawn from
    the records of `RankTracker` and `RankJumps`: a panel for each cell of the grid (all axes but `seed`) and each variant,
    a line for each rank above 1.

    Args:
        leave_out: Variants (or `main`) that are not drawn: what others start from.
        labels: Texts for variants (`main` is the run itself) and for values of axes that are names.
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: Before a fit, if no jumps are recorded.
    """

    def __init__(
        self, leave_out: list[str] | None = None, labels: dict[str, str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.leave_out, self.labels = leave_out or [], labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError unless `RankTracker` and `RankJumps` measure."""
        del axes
        if not {"rank", "jump_steps"} <= variables:
            raise ValueError(
                "WaitingFigure: needs rank and jump_steps; add RankTracker and RankJumps to trainer.callbacks"
            )

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """A row for each panel, rank and length of a wait that was seen, and one for 0.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `panel`, `rank`, `steps` since they came to this rank, the share `waiting` longer than that, the `members` that
            came to this rank, the `jumps` among them, the `jumps_per_step` over all steps that any of them waited, and
            its exact 95 % interval, `jumps_per_step_low` and `jumps_per_step_high`, if jumps come at one rate.
        """
        rows: list[tuple[Any, ...]] = []
        for line in cells(dataset, variants, self.leave_out, self.labels):
            for rank, (waits, cut) in _waits(line.members).items():
                share = ecdf(CensoredData(uncensored=waits, right=cut)).sf
                exposure = sum(waits) + sum(cut)
                rates = (
                    len(waits) + len(cut),
                    len(waits),
                    len(waits) / max(exposure, 1),
                    *rate_interval(len(waits), exposure),
                )
                for steps, waiting in [(0.0, 1.0), *zip(share.quantiles, share.probabilities, strict=True)]:
                    rows.append((line.name, rank, steps, waiting, *rates))
        return {name: np.array([row[i] for row in rows]) for i, name in enumerate(_COLUMNS)}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names, ranks = list(dict.fromkeys(table["panel"].tolist())), sorted(set(table["rank"].tolist()), reverse=True)
        colour = dict(zip(ranks, colours(len(ranks)), strict=True))
        lines = {line.name: line for line in cells(dataset, variants, self.leave_out, self.labels)}
        columns = 3
        figure, axes = panels(max(len(names), 1), height=1.85, header=0.14 * -(-len(ranks) // columns))
        later = table["steps"][table["steps"] > 0]
        log_axis(axes[-1].xaxis, *((later.min(), later.max()) if len(later) else (1.0, 10.0)))
        for panel, name in zip(axes, names, strict=False):
            for rank in ranks:
                own = (table["panel"] == name) & (table["rank"] == rank)
                panel.step(np.maximum(table["steps"][own], 1e-9), table["waiting"][own], where="post", color=colour[rank],
                           linewidth=1.1)  # fmt: skip
            panel.set_ylim(-0.03, 1.03)
            panel.set_ylabel("share still waiting")
            label = f"{lines[name].words}, " if len(names) > 1 else ""
            panel.set_title(f"{label}{lines[name].members.sizes['seed']} members", fontsize=FONT_SIZE, pad=3)
        axes[-1].set_xlabel("steps at this rank")
        legend(
            figure,
            [Line2D([], [], color=colour[r], linewidth=1.1, label=f"rank {r} to {r - 1}") for r in ranks],
            columns,
        )
        return figure


def rate_interval(events: int, exposure: float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of the rate of events that come at random, all at one rate (a Poisson process).

    Args:
        events: How many were seen.
        exposure: The time for which they could be seen, summed over all who waited.
        level: The least probability that the interval covers the rate.

    Returns:
        Its ends, per unit of time; those of a rate that nothing is known about where there was no exposure.

    Reference:
        Garwood (1936): quantiles of chi squared with twice the number of events as degrees of freedom.

    Example:
        >>> [round(float(end), 3) for end in rate_interval(0, 1.0)]
        [0.0, 3.689]
    """
    if exposure <= 0:
        return 0.0, np.inf
    tail = (1 - level) / 2
    low = chi2.ppf(tail, 2 * events) / 2 if events else 0.0
    return low / exposure, chi2.ppf(1 - tail, 2 * events + 2) / 2 / exposure


def _waits(cell: xr.Dataset) -> dict[int, tuple[list[float], list[float]]]:
    """For each rank above 1, descending: the waits that ended with a jump, and those that something else cut off."""
    last = int(np.flatnonzero(cell["rank"].notnull().any("seed"))[-1])
    cell = cell.isel(seed=(cell["status"].isel(step=0) != "diverged").values)  # the others take no step in this run
    began, jumps = cell["rank"].isel(step=0).values, cell["jump_steps"].isel(step=last).values
    lost = (cell["status"].isel(step=last) == "diverged").values
    ends = np.where(lost, cell["stopped_at"].values, float(cell["step"].values[last]))
    found: dict[int, tuple[list[float], list[float]]] = {}
    for rank in range(jumps.shape[1], 1, -1):
        waits, cut = [], []
        for first, steps, end in zip(began, jumps, ends, strict=True):
            came = 0.0 if first == rank else steps[rank] if rank < len(steps) and first > rank else np.nan
            left = steps[rank - 1]
            if np.isfinite(came):
                waits += [left - came] * bool(np.isfinite(left))
                cut += [end - came] * bool(np.isnan(left))
        if waits or cut:
            found[rank] = waits, cut
    return found
