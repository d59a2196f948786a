"""AxisFigure: what an axis of the ensemble does to several quantities."""

from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from dlnlab.figures.base import (
    SMALL_FONT_SIZE,
    Canvas,
    Figure,
    axis_label,
    colours,
    last,
    legend,
    log_axis,
    panels,
    quantiles,
    spread,
    value_label,
)
from dlnlab.figures.words import words, wrapped


class AxisFigure(Figure):
    """Final values of several quantities against one axis of the ensemble, a line each.

    The values of the axis stand in their own order, evenly spaced. A panel for each combination of the other axes, `seed`
    aside: the median over seeds, and a band from 10 % to 90 %. A number that is not defined counts as infinite, and what
    is infinite is left out.

    Args:
        axis: The axis.
        quantities: Variables with one number per member; None is the thresholds of `Thresholds` and their edges.
        unit: A variable that each quantity is divided by, member by member.
        name: The files' name without suffix; None is `axis_figure`.

    Raises:
        ValueError: If quantities is empty.
    """

    def __init__(
        self,
        axis: str = "batch_size",
        quantities: list[str] | None = None,
        unit: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("AxisFigure.quantities = []: must name at least one variable")
        self.axis, self.unit = axis, unit
        self.quantities = quantities or ["gamma_tilde_max", "gamma_max", "mean_square_edge"]

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if the axis or a variable is missing."""
        if self.axis not in axes:
            raise ValueError(f"AxisFigure.axis: no axis {self.axis!r}; the axes are {', '.join(axes) or 'none'}")
        for name in [*self.quantities, *([self.unit] if self.unit else [])]:
            if name not in variables:
                raise ValueError(f"AxisFigure: {name!r} is not recorded; recorded: {', '.join(sorted(variables))}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each panel, quantity and value of the axis.

        Args:
            dataset: A run's results.
            **variants: Not used.

        Returns:
            `panel` (its label), `quantity`, the axis, `median`, `p10`, `p90` and how many `members` are finite.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        unit = last(dataset[self.unit]) if self.unit else 1
        members = xr.Dataset({name: last(dataset[name]) / unit for name in self.quantities})
        if "seed" not in members.dims:
            members = members.expand_dims("seed")
        others = [axis for axis in members.dims if axis not in (self.axis, "seed")]
        rows = []
        for values in product(*(members[axis].values for axis in others)):
            cell = members.sel(dict(zip(others, values, strict=True)))
            label = ", ".join(value_label(axis, value, dataset) for axis, value in zip(others, values, strict=True))
            for name, value in product(self.quantities, cell[self.axis].values):
                numbers = cell[name].sel({self.axis: value}).values
                low, middle, high = quantiles(numbers, (0.1, 0.5, 0.9))
                rows.append((label, name, value, middle, low, high, np.isfinite(numbers).sum()))
        columns = ("panel", "quantity", self.axis, "median", "p10", "p90", "members")
        return {name: np.array(column) for name, column in zip(columns, zip(*rows, strict=True), strict=True)}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        labels = list(dict.fromkeys(table["panel"].tolist()))
        ticks = [str(value) for value in dict.fromkeys(table[self.axis].tolist())]
        colour = dict(zip(self.quantities, colours(len(self.quantities)), strict=True))
        figure, axes = panels(len(labels), header=0.14 * -(-(len(self.quantities) + 1) // 2))
        seen = np.concatenate([table[name] for name in ("median", "p10", "p90")])
        seen = seen[np.isfinite(seen) & (seen > 0)]
        for panel, label in zip(axes, labels, strict=True):
            log_axis(panel.yaxis, seen.min(initial=1.0), seen.max(initial=1.0))
            panel.set_ylabel(wrapped(self._y_label(dataset)))
            panel.set_xlim(-0.3, len(ticks) - 0.7)
            panel.set_title(label, fontsize=SMALL_FONT_SIZE, pad=2)
            for name in self.quantities:
                chosen = (table["panel"] == label) & (table["quantity"] == name)
                middle, low, high = (
                    np.where(np.isfinite(table[key][chosen]), table[key][chosen], np.nan)
                    for key in ("median", "p10", "p90")
                )
                at = np.arange(len(middle))
                panel.plot(
                    at,
                    middle,
                    color=colour[name],
                    linewidth=1.1,
                    marker="o",
                    markersize=2.5,
                    label=words(name, dataset),
                )
                panel.fill_between(at, low, high, color=colour[name], alpha=0.15, linewidth=0)
        axes[-1].set_xticks(range(len(ticks)), ticks)
        axes[-1].set_xlabel(axis_label(self.axis, dataset))
        handles: list[Any] = axes[0].get_legend_handles_labels()[0] + spread([dataset.sizes.get("seed", 1)])
        legend(figure, handles, 2)
        return figure

    def _y_label(self, data: xr.Dataset) -> str:
        """The quantity, or where there are several what they share."""
        if len(self.quantities) == 1:
            of = words(self.quantities[0], data)
            return f"{of} / ({words(self.unit)})" if self.unit else of
        return f"in units of {words(self.unit)}" if self.unit else ""
