"""FinalValueFigure: where does training end, as a function of any hyperparameter?"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    FONT_SIZE,
    GREY,
    MOST_COLUMNS,
    SMALL_FONT_SIZE,
    Canvas,
    Cell,
    Figure,
    axis_label,
    cells,
    colours,
    columns_of,
    draw_levels,
    final,
    last,
    legend,
    log_axis,
    panels,
    quantiles,
    spread,
    value_label,
)
from dlnlab.figures.words import words, wrapped


class FinalValueFigure(Figure):
    """Final values against one axis of the ensemble, on logarithmic axes: the median over seeds, a band from 10 % to 90 %.

    One row of panels per variable, in it a panel per value of the axis `panels` (`variant` counts as one) or a single
    one, and in each a line per remaining cell. Diverged members count as infinitely large: a line ends where half of its
    seeds have diverged. Dashed in a line's colour: the median of a variable `<quantity>_law`, where one is recorded, what
    theory says. Grey, horizontal: variants without the axis x.

    Args:
        x: The axis of numbers along the figure.
        quantities: Variables with one number per member.
        panels: The axis whose values are panels side by side; None draws all lines in one.
        per: An axis that x is divided by; `batch_size`, to see whether lr/batch_size alone matters.
        over_x: Draw the values divided by x (and `per`): what is proportional to it becomes level.
        name: The files' name without suffix; None is `final_value_figure`.

    Raises:
        ValueError: If quantities is empty.
    """

    def __init__(
        self,
        x: str = "lr",
        quantities: list[str] | None = None,
        panels: str | None = None,
        per: str | None = None,
        over_x: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("FinalValueFigure.quantities = []: must name at least one variable")
        self.x, self.panels, self.per = x, panels, per
        self.over_x = checks.flag("FinalValueFigure.over_x", over_x)
        self.quantities = quantities if quantities is not None else ["distance"]

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if a quantity is not recorded or an axis is missing."""
        recorded, known = ", ".join(sorted(variables)) or "nothing", ", ".join(axes) or "none"
        for quantity in self.quantities:
            if quantity not in variables:
                raise ValueError(f"FinalValueFigure.quantities: {quantity!r} is not recorded; recorded: {recorded}")
        for key, axis in (("x", self.x), ("panels", self.panels), ("per", self.per)):
            if axis not in (None, *axes) and (key, axis) != ("panels", "variant"):
                raise ValueError(f"FinalValueFigure.{key}: no axis {axis!r}; the axes are {known}")
        if (count := len(axes.get(self.panels, []))) > MOST_COLUMNS:
            raise ValueError(f"FinalValueFigure.panels: {count} values of {self.panels}; at most {MOST_COLUMNS} panels")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each line and value of x.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (the cell's label), its axes, the axis x and, with `per`, `x` (their quotient); of each quantity the
            median `<quantity>`, `<quantity>_p10`, `<quantity>_p90`, infinite where they are lost to divergence, and the
            median `<quantity>_law` where there is one, all divided by x if `over_x`; the number of `members` and how
            many have `diverged`.

        Raises:
            ValueError: If an axis or a quantity is missing, or has no single number per member.
        """
        rows: list[dict[str, Any]] = []
        for cell in self._cells(dataset, variants):
            columns = self._columns(cell)
            rows += [
                {"line": cell.label(), **cell.values, **{key: column[i] for key, column in columns.items()}}
                for i in range(len(columns[self.x]))
            ]
        return columns_of(rows)

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        found = [(cell, self._columns(cell)) for cell in self._cells(dataset, variants)]
        titles = list(dict.fromkeys(self._title(cell) for cell, _ in found))
        names = list(dict.fromkeys(cell.label(self.panels) for cell, _ in found))
        colour = dict(zip(names, colours(len(names)), strict=True))
        handles = self._handles(found, colour)
        per_row = 2 if len(titles) == 1 else 5
        header = 0.14 * -(-len(handles) // per_row) + 0.1
        figure, axes = panels(len(self.quantities), header=header, columns=len(titles), sharey=True)
        for row, quantity in enumerate(self.quantities):
            beside = axes[row * len(titles) : (row + 1) * len(titles)]
            levels = {
                name: float(quantiles(final(data, quantity).values.ravel(), (0.5,))[0])
                for name, data in variants.items()
                if self.x not in data.dims and quantity in data
            }
            low, high = _range(quantity, [columns for _, columns in found], levels)
            log_axis(beside[0].yaxis, low, high)
            for panel, title in zip(beside, titles, strict=True):
                for cell, columns in found:
                    if self._title(cell) == title:
                        line = colour[cell.label(self.panels)]
                        _draw_line(panel, quantity, columns, self._position, line, low, beside[0].get_ylim()[1])
                if panel is beside[-1]:
                    draw_levels(panel, {words(name): value for name, value in levels.items()})
                else:
                    for value in levels.values():
                        panel.axhline(value, color=GREY, linewidth=0.7, zorder=0.5)
                if row == 0 and title:
                    panel.set_title(title, fontsize=SMALL_FONT_SIZE, pad=3)
            of = words(quantity, dataset)
            beside[0].set_ylabel(wrapped(f"{of} /\n({self._x_label(dataset)})" if self.over_x else of))
        positions = np.concatenate([columns[self._position] for _, columns in found])
        log_axis(axes[-1].xaxis, positions.min(), positions.max())
        figure.supxlabel(self._x_label(dataset), fontsize=FONT_SIZE)
        figure.align_ylabels(axes[:: len(titles)])
        legend(figure, handles, per_row)
        return figure

    # The numbers ------------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> str:
        return self.x if self.per is None else "x"

    def _cells(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> list[Cell]:
        self.check({str(name) for name in dataset.data_vars}, {str(dim): [] for dim in dataset.dims})
        return cells(dataset, {name: data for name, data in variants.items() if self.x in data.dims}, apart=[self.x])

    def _columns(self, cell: Cell) -> dict[str, np.ndarray]:
        data = cell.data.sortby(_number(self.x))
        x = data[_number(self.x)].values.astype(float)
        columns: dict[str, Any] = {self.x: x}
        if self.per is not None:
            columns["x"] = x / float(data[_number(self.per)])
        diverged = (last(data["status"]) == "diverged").transpose(self.x, "seed").values
        for quantity in self.quantities:
            values = final(data, quantity).transpose(self.x, "seed").values
            columns[f"{quantity}_p10"], columns[quantity], columns[f"{quantity}_p90"] = quantiles(
                values, (0.1, 0.5, 0.9)
            )
            if f"{quantity}_law" in data:
                columns[f"{quantity}_law"] = (
                    last(data[f"{quantity}_law"]).transpose(self.x, "seed").median("seed").values
                )
        if self.over_x:
            for quantity in [name for name in columns if name not in (self.x, "x")]:
                columns[quantity] = columns[quantity] / columns[self._position]
        columns["members"], columns["diverged"] = np.full(len(x), diverged.shape[1]), diverged.sum(1)
        return columns

    # The drawing ------------------------------------------------------------------------------------------------------

    def _title(self, cell: Cell) -> str:
        if self.panels is None or self.panels not in cell.values:
            return ""
        return value_label(self.panels, cell.values[self.panels], cell.data) or "main"

    def _x_label(self, dataset: xr.Dataset) -> str:
        of = axis_label(self.x, dataset)
        return of if self.per is None else f"{of} / {words(self.per)}"

    def _handles(self, found: list[tuple[Cell, dict[str, np.ndarray]]], colour: dict[str, Any]) -> list[Any]:
        handles: list[Any] = [
            Line2D([], [], color=colour[name], linewidth=1.1, marker="o", markersize=2, label=name)
            for name in colour
            if name
        ]
        if any(f"{quantity}_law" in columns for quantity in self.quantities for _, columns in found):
            handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=0.9, label="theory, leading order"))
        return handles + spread(columns["members"].max() for _, columns in found)


def _number(axis: str) -> str:
    return "batch_size_number" if axis == "batch_size" else axis


def _range(quantity: str, found: list[dict[str, np.ndarray]], levels: dict[str, float]) -> tuple[float, float]:
    """What must be seen: all medians, and of the bands no more than a decade beyond them."""
    medians = np.concatenate([np.array(list(levels.values())), *(columns[quantity] for columns in found)])
    edges = np.concatenate([columns[f"{quantity}_{edge}"] for columns in found for edge in ("p10", "p90")])
    medians, edges = (values[np.isfinite(values) & (values > 0)] for values in (medians, edges))
    if len(medians) == 0:
        return 0.1, 1.0
    low, high = medians.min(), medians.max()
    return max(edges.min(initial=low), low / 10), min(edges.max(initial=high), 10 * high)


def _draw_line(
    panel: Axes, quantity: str, columns: dict[str, np.ndarray], x: str, colour: Any, floor: float, ceiling: float
) -> None:
    low, high = (np.clip(columns[f"{quantity}_{edge}"], floor, ceiling) for edge in ("p10", "p90"))
    exists = np.isfinite(columns[f"{quantity}_p10"]) & (columns["members"] > 1)
    panel.fill_between(columns[x], low, high, where=exists, color=colour, alpha=0.15, linewidth=0)
    median = np.where(np.isfinite(columns[quantity]), np.maximum(columns[quantity], floor), np.nan)
    panel.plot(columns[x], median, color=colour, linewidth=1.1, marker="o", markersize=2, zorder=3)
    if f"{quantity}_law" in columns:
        panel.plot(columns[x], columns[f"{quantity}_law"], color=colour, linewidth=0.9, linestyle="--", zorder=2)
