"""WaitingFigure: how long members stay at each rank."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D
from scipy.stats import CensoredData, ecdf

from dlnlab.figures.base import FONT_SIZE, Canvas, Figure, colours, legend, log_axis, panels
from dlnlab.figures.rank import cells


class WaitingFigure(Figure):
    """The share of members that still wait for their jump from rank r to r - 1, over the steps since they came to rank r.

    Kaplan and Meier's estimate: a member whose run ends, or that diverges, before it jumps counts as waiting for as long
    as it was seen. The median of the jumps that were seen would be too short, the more so the rarer they are. Drawn from
    the records of `RankTracker` and `RankJumps`: a panel for each cell of the grid (all axes but `seed`) and each variant,
    a line for each rank above 1.

    Args:
        leave_out: Variants (or `main`) that are not drawn: what others start from.
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: Before a fit, if no jumps are recorded.
    """

    def __init__(self, leave_out: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.leave_out = leave_out or []

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
            came to this rank, the `jumps` among them, and the `jumps_per_step` over all steps that any of them waited.
        """
        names = ("panel", "rank", "steps", "waiting", "members", "jumps", "jumps_per_step")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for variant, data in {"main": dataset, **variants}.items():
            if variant in self.leave_out:
                continue
            for label, cell in cells(variant if variants else "", data):
                for rank, (waits, cut) in _waits(cell).items():
                    share = ecdf(CensoredData(uncensored=waits, right=cut)).sf
                    steps = [0.0, *share.quantiles]
                    columns["steps"] += steps
                    columns["waiting"] += [1.0, *share.probabilities]
                    per_step = len(waits) / max(sum(waits) + sum(cut), 1)
                    for name, value in zip(
                        ("panel", "rank", "members", "jumps", "jumps_per_step"),
                        (label, rank, len(waits) + len(cut), len(waits), per_step),
                        strict=True,
                    ):
                        columns[name] += [value] * len(steps)
        return {name: np.array(column) for name, column in columns.items()}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names, ranks = list(dict.fromkeys(table["panel"].tolist())), sorted(set(table["rank"].tolist()), reverse=True)
        colour = dict(zip(ranks, colours(len(ranks)), strict=True))
        columns = 3
        figure, axes = panels(max(len(names), 1), header=0.14 * -(-len(ranks) // columns))
        later = table["steps"][table["steps"] > 0]
        log_axis(axes[-1].xaxis, *((later.min(), later.max()) if len(later) else (1.0, 10.0)))
        for panel, name in zip(axes, names, strict=False):
            for rank in ranks:
                own = (table["panel"] == name) & (table["rank"] == rank)
                panel.step(np.maximum(table["steps"][own], 1e-9), table["waiting"][own], where="post", color=colour[rank],
                           linewidth=1.1)  # fmt: skip
            panel.set_ylim(-0.03, 1.03)
            panel.set_ylabel("share waiting")
            if len(names) > 1:
                panel.set_title(name, fontsize=FONT_SIZE)
        axes[-1].set_xlabel("steps at this rank")
        legend(
            figure,
            [Line2D([], [], color=colour[r], linewidth=1.1, label=f"rank {r} to {r - 1}") for r in ranks],
            columns,
        )
        return figure


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
