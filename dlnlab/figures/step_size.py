"""StepSizeFigure: where does training end, as a function of the step size?"""

from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from dlnlab import checks
from dlnlab.figures.base import (
    EDGES,
    GREY,
    Cell,
    Figure,
    cells,
    colours,
    columns_of,
    draw_levels,
    final,
    finite,
    last,
    legend,
    log_axis,
    lr_label,
    lr_symbol,
    panels,
    power_of_ten,
    quantiles,
    spread,
)
from dlnlab.figures.words import words, wrapped

DEFAULT_QUANTITIES = ("distance", "test_loss")
LEVELS = ("gradient_flow", "min_l2")
"""A variable `<quantity>_<level>` of the data set is drawn as a horizontal level."""

_EDGES = {"largest_converging_lr": "--", "smallest_diverging_lr": ":"}

Lines = dict[str, dict[str, np.ndarray]]
"""A line's label -> its rows of the table, by column."""


class StepSizeFigure(Figure):
    """Final values against the step size, one line per batch size, or per combination of all axes but lr and seed.

    One panel per quantity, on logarithmic axes: the median over seeds of the last recorded value, and a band from 10 %
    to 90 %. Diverged members count as infinitely bad, whatever finite value was kept of them: a line ends where half
    of its seeds have diverged, and a band that reaches infinity, or more than a decade above everything else, goes to
    the top of the panel. Numbers that are not positive are drawn below all others, which the axis says.

    Vertical lines in a line's colour: **dashed**, the largest step size at which at least half of the seeds converge,
    where the grid has a larger one, at which they do not; **dotted**, the smallest step size at which at least half of
    the seeds have diverged; where several belong at one place, they are drawn beside each other. A member converges if its
    status is `converged`, or if it is still `running` and its last train_loss is below `settled` times its first (small
    step sizes rarely reach the guard's tolerance in time, while members that oscillate at the edge of stability keep a
    loss of its first order). Without train_loss only the status counts. Between the two lines neither half of the seeds
    converges nor half has diverged.

    `over` measures step sizes by an edge of each member's own problem instead, so that one instance's edge is not smeared
    over another's safe zone: members are gathered in bins of step_size/edge as wide as the grid's median ratio, one of
    which ends at 1, where a thin line stands.

    Horizontal lines are levels to compare with: the medians of the variables `<quantity>_gradient_flow` and
    `<quantity>_min_l2`, where there are any, and of variants without an `lr` axis. Variants with one are further lines.

    Args:
        quantities: Variables with one number per member, a panel each; None is those of distance and test_loss that
            are recorded.
        settled: A running member converges if train_loss has fallen below this part of its value at step 0.
        over: A recorded variable, one number per member, that the step sizes are divided by: `flow_edge`. Positions at
            the ends that fewer than half of the seeds reach are left out.
        name: The files' name without suffix; None is `step_size_figure`.

    Raises:
        ValueError: If quantities is empty or settled is not positive.
    """

    def __init__(
        self,
        quantities: list[str] | None = None,
        settled: float = 0.01,
        over: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("StepSizeFigure.quantities = []: must name at least one variable")
        self.quantities = quantities
        self.settled = checks.positive("StepSizeFigure.settled", settled)
        self.over = over

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if there is no `lr` axis or a quantity is missing; of the default ones, if both are."""
        if "lr" not in axes:
            raise ValueError(f"StepSizeFigure: needs an ensemble.lr axis; the axes are {', '.join(axes) or 'none'}")
        recorded = ", ".join(sorted(variables)) or "nothing"
        if self.quantities is None and variables.isdisjoint(DEFAULT_QUANTITIES):
            needed = " or ".join(DEFAULT_QUANTITIES)
            raise ValueError(f"StepSizeFigure: needs {needed} (or give quantities); recorded: {recorded}")
        for quantity in self.quantities or ():
            if quantity not in variables:
                raise ValueError(f"StepSizeFigure.quantities: {quantity!r} is not recorded; recorded: {recorded}")
        if self.over is not None and self.over not in variables:
            raise ValueError(f"StepSizeFigure.over: {self.over!r} is not recorded; recorded: {recorded}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each line and step size (or bin of step sizes).

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (its label), its axes, `lr` (over an edge: `lr_over_<edge>`, the bin's middle); for each quantity
            the median `<quantity>`, `<quantity>_p10` and `<quantity>_p90`, infinite where they are lost to divergence;
            the number of `members` and how many are `converging` and `diverged`; the positions `largest_converging_lr`
            and `smallest_diverging_lr` of the vertical lines, NaN where there is none; and the horizontal levels,
            `<quantity>_<level>`.

        Raises:
            ValueError: If there is no `lr` axis or a quantity is missing or has no single number per member.
        """
        rows: list[dict[str, Any]] = []
        quantities = self._quantities(dataset)
        for cell in cells(dataset, {name: data for name, data in variants.items() if "lr" in data.dims}, apart=["lr"]):
            rows += self._rows(cell, [name for name in quantities if name in cell.data])
        for quantity in quantities:
            for level, value in _levels(quantity, dataset, variants).items():
                rows = [{**row, f"{quantity}_{level}": value} for row in rows]
        return columns_of(rows)

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table, quantities = self.table(dataset, **variants), self._quantities(dataset)
        names = list(dict.fromkeys(table["line"].tolist()))
        colour = dict(zip(names, colours(len(names)), strict=True))
        lines = {name: {key: column[table["line"] == name] for key, column in table.items()} for name in names}
        handles = _legend(lines, colour, quantities, "seeds" if self.over is None else "members", lr_symbol(dataset))
        figure, axes = panels(len(quantities), header=0.14 * -(-len(handles) // 2))
        for panel, quantity in zip(axes, quantities, strict=True):
            levels = {name: table[f"{quantity}_{name}"][0] for name in _levels(quantity, dataset, variants)}
            _draw_panel(panel, quantity, lines, colour, levels, self._x, words(quantity, dataset))
            if self.over is not None:
                panel.axvline(1, color=GREY, linewidth=0.7, zorder=0.5)
        log_axis(axes[-1].xaxis, table[self._x].min(), table[self._x].max())
        if self.over is None:
            axes[-1].set_xlabel(lr_label(dataset))
        else:
            axes[-1].set_xlabel(rf"step size ${lr_symbol(dataset)}$ / {EDGES.get(self.over, words(self.over))}")
        figure.align_ylabels(axes)
        legend(figure, handles, 2)
        return figure

    def _quantities(self, dataset: xr.Dataset) -> list[str]:
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        return self.quantities or [name for name in DEFAULT_QUANTITIES if name in dataset]

    @property
    def _x(self) -> str:
        return "lr" if self.over is None else f"lr_over_{self.over}"

    def _rows(self, cell: Cell, quantities: list[str]) -> list[dict[str, Any]]:
        data = cell.data
        status = last(data["status"])
        converging = status == "converged"
        if "train_loss" in data:
            settled = last(data["train_loss"]) <= self.settled * data["train_loss"].isel(step=0)
            converging |= (status == "running") & settled
        members = {name: final(data, name) for name in quantities}
        members |= {"converging": converging, "diverged": status == "diverged"}
        members = xr.Dataset(members).transpose("seed", "lr")
        lr, place = self._places(data, members)
        counts = {
            name: np.array([members[name].values[at].sum() for at in place]) for name in ("converging", "diverged")
        }
        size = np.array([at.sum() for at in place])
        converges, diverges = lr[2 * counts["converging"] >= size], lr[2 * counts["diverged"] >= size]
        columns: dict[str, Any] = {self._x: lr}
        for name in quantities:
            found = np.stack([quantiles(members[name].values[at], (0.1, 0.5, 0.9)) for at in place], -1)
            columns |= {name: found[1], f"{name}_p10": found[0], f"{name}_p90": found[2]}
        columns |= {"members": size, **counts}
        stops = converges[-1] if len(converges) and converges[-1] < lr[-1] else np.nan
        columns["largest_converging_lr"] = np.full(len(lr), stops)
        columns["smallest_diverging_lr"] = np.full(len(lr), diverges[0] if len(diverges) else np.nan)
        values = {axis: value for axis, value in cell.values.items() if axis != "variant"}
        return [
            {"line": cell.label(), **values, **{key: column[i] for key, column in columns.items()}}
            for i in range(len(lr))
        ]

    def _places(self, data: xr.Dataset, members: xr.Dataset) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ascending positions, and which members (seed, lr) belong to each."""
        shape = tuple(members.sizes[axis] for axis in ("seed", "lr"))
        values = members["lr"].values
        if self.over is None:
            positions = np.sort(values)
            return positions, [np.broadcast_to(values == lr, shape) for lr in positions]
        ratios = (data["step_size"] / last(data[self.over])).transpose("seed", "lr").values
        # A grid of one step size has no ratio; a third of a decade stands for it.
        width = np.median(np.diff(np.sort(np.log(values)))) if len(values) > 1 else np.log(10) / 3
        # Half a bin from 1, so that no bin holds members on both sides of the edge.
        bins = np.ceil(np.log(ratios) / width)
        numbers, counts = np.unique(bins, return_counts=True)
        # At the ends are only the seeds with the smallest or the largest edges: no median of all.
        full = np.flatnonzero(2 * counts >= counts.max())
        numbers = numbers[full[0] : full[-1] + 1]
        return np.exp((numbers - 0.5) * width), [bins == number for number in numbers]


# The numbers ---------------------------------------------------------------------------------------------------------


def _levels(quantity: str, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> dict[str, float]:
    found = {level: dataset[f"{quantity}_{level}"] for level in LEVELS if f"{quantity}_{level}" in dataset}
    ends = {name: data for name, data in variants.items() if "lr" not in data.dims and quantity in data}
    found |= {name: final(data, quantity) for name, data in ends.items()}
    medians = {level: float(quantiles(last(array).values.ravel(), (0.5,))[0]) for level, array in found.items()}
    return {level: median for level, median in medians.items() if np.isfinite(median)}


# The drawing ---------------------------------------------------------------------------------------------------------


def _draw_panel(
    panel: Axes, quantity: str, lines: Lines, colour: dict[str, Any], levels: dict[str, float], x: str, label: str
) -> None:
    drawn = [line[key] for line in lines.values() for key in (quantity, f"{quantity}_p10")]
    drawn = finite(np.concatenate([*drawn, np.array(list(levels.values()))]))
    tops = finite(np.concatenate([line[f"{quantity}_p90"] for line in lines.values()]))
    positive = np.concatenate([drawn, tops])[np.concatenate([drawn, tops]) > 0]
    smallest = positive.min() if len(positive) else 1.0
    floor = smallest
    if (drawn <= 0).any():
        floor = 10 ** np.floor(np.log10(smallest) - 1)
        label += f"\n(≤ 0 drawn at {power_of_ten(floor)})"
    highest = max(drawn.max(initial=0), floor)
    log_axis(panel.yaxis, floor, max(highest, min(tops.max(initial=0), 10 * highest)))
    panel.set_ylabel(wrapped(label))
    ceiling, shade = panel.get_ylim()[1], min(0.18, 0.6 / len(lines))
    for name, line in lines.items():
        low, high = (np.clip(line[f"{quantity}_{edge}"], floor, ceiling) for edge in ("p10", "p90"))
        exists = np.isfinite(line[f"{quantity}_p10"])
        if len(exists) > 1:
            panel.fill_between(line[x], low, high, where=exists, color=colour[name], alpha=shade, linewidth=0)
        else:
            panel.vlines(line[x][exists], low[exists], high[exists], color=colour[name], alpha=0.4, linewidth=2)
        median = np.where(np.isfinite(line[quantity]), np.maximum(line[quantity], floor), np.nan)
        panel.plot(line[x], median, color=colour[name], linewidth=1.1, marker="o", markersize=2, zorder=3)
    _draw_edges(panel, lines, colour)
    draw_levels(panel, {words(name): max(value, floor) for name, value in levels.items()})


def _draw_edges(panel: Axes, lines: Lines, colour: dict[str, Any]) -> None:
    """Vertical lines, those at one place beside each other."""
    at: dict[float, list[tuple[str, str]]] = {}
    for (name, line), (key, style) in product(lines.items(), _EDGES.items()):
        if np.isfinite(line[key][0]):
            at.setdefault(line[key][0], []).append((name, style))
    for place, found in at.items():
        for i, (name, style) in enumerate(found):
            drawn = panel.axvline(place, color=colour[name], linestyle=style, linewidth=0.9, zorder=1)
            inches = 1.6 / 72 * (i - (len(found) - 1) / 2)
            drawn.set_transform(drawn.get_transform() + ScaledTranslation(inches, 0, panel.figure.dpi_scale_trans))


def _legend(lines: Lines, colour: dict[str, Any], quantities: list[str], members: str, symbol: str) -> list[Any]:
    names, keys = [], []
    for name, line in lines.items():
        lost = all(np.isposinf(line[quantity]).all() for quantity in quantities)
        if label := " ".join(filter(None, [name, "(diverged)" if lost else ""])):
            names.append(Line2D([], [], color=colour[name], linewidth=1.1, marker="o", markersize=2, label=label))
    several = any(line["members"].max() > 1 for line in lines.values())
    ends = ("≥ half converge", "≥ half diverge") if several else ("it converges", "it diverges")
    for (key, style), extreme, end in zip(_EDGES.items(), ("largest", "smallest"), ends, strict=True):
        label = rf"{extreme} ${symbol}$ at which {end}"
        if any(np.isfinite(line[key][0]) for line in lines.values()):
            keys.append(Line2D([], [], color=GREY, linestyle=style, linewidth=0.9, label=label))
    keys += spread((line["members"].max() for line in lines.values()), of=members)
    # Two columns are filled one after the other: blanks keep the lines in the left one.
    blanks = [Line2D([], [], alpha=0, label=" ")] * (len(keys) - len(names) if names else 0)
    return names + blanks + keys
