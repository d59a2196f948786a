"""CoordinatesFigure: what does each coordinate end with, on the teacher's support and off it?"""

from typing import Any, Literal

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
    cells,
    colours,
    columns_of,
    last,
    legend,
    log_axis,
    panels,
    spread,
    value_label,
)
from dlnlab.figures.words import words, wrapped


class CoordinatesFigure(Figure):
    """Variables with one number per coordinate, the coordinates sorted by the teacher's magnitude, support first.

    One row of panels per variable, in it a panel per value of the axis `panels` (`variant` counts as one) or a single
    one, and in each a line per remaining cell: the mean (or median) over the seeds that have not diverged, and a band
    from their 10 % to their 90 % quantile. Each seed's coordinates are sorted by its own teacher; equal entries keep
    their order, so a coordinate off the support is a place in the order and nothing more. The support is shaded.

    Dashed: a variable `<quantity>_law`, where one is recorded, what theory says. Black: the teacher, if asked for.

    Args:
        quantities: Variables with one number per coordinate.
        panels: The axis whose values are panels side by side; None draws all cells in one.
        log: Those of them on a logarithmic scale, where numbers that are not positive are left out; None is all.
        at: The optimizer step to look at; None is the last that was recorded of a variable.
        average: `mean` or `median`, which a single seed far off does not move.
        with_teacher: Draw the teacher into the first row.
        name: The files' name without suffix; None is `coordinates_figure`.

    Raises:
        ValueError: If quantities is empty or `log` names others, or average is none of the two.
    """

    def __init__(
        self,
        quantities: list[str] | None = None,
        panels: str | None = None,
        log: list[str] | None = None,
        at: int | None = None,
        average: Literal["mean", "median"] = "mean",
        with_teacher: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("CoordinatesFigure.quantities = []: must name at least one variable")
        self.quantities = quantities if quantities is not None else ["gain"]
        self.panels = panels
        self.log = log if log is not None else self.quantities
        if others := sorted(set(self.log) - set(self.quantities)):
            raise ValueError(f"CoordinatesFigure.log: {others[0]!r} is none of quantities = {self.quantities}")
        self.at = at if at is None else checks.integer("CoordinatesFigure.at", at, at_least=0)
        self.average = checks.one_of("CoordinatesFigure.average", average, ("mean", "median"))
        self.with_teacher = checks.flag("CoordinatesFigure.with_teacher", with_teacher)

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if a quantity or the teacher is not recorded, or there is no such axis to make panels of."""
        recorded = ", ".join(sorted(variables)) or "nothing"
        for needed in (*self.quantities, "teacher"):
            if needed not in variables:
                raise ValueError(f"CoordinatesFigure: needs {needed!r} in record.variables; recorded: {recorded}")
        if self.panels not in (None, "variant") and self.panels not in axes:
            known = ", ".join(["variant", *axes])
            raise ValueError(f"CoordinatesFigure.panels: no axis {self.panels!r}; the axes are {known}")
        if (count := len(axes.get(self.panels, []))) > MOST_COLUMNS:
            raise ValueError(
                f"CoordinatesFigure.panels: {count} values of {self.panels}; at most {MOST_COLUMNS} panels"
            )

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each cell and place in the order.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (the cell's label), its axes, `place` (1 is the teacher's largest entry), `teacher` (the mean of its
            sorted entries) and `on_support` (the share of seeds with a place on it); of each quantity the average
            `<quantity>`, `<quantity>_p10`, `<quantity>_p90` and, where there is one, `<quantity>_law`; the cell's
            `members` and how many have `diverged` and are left out.
        """
        rows: list[dict[str, Any]] = []
        for cell in self._cells(dataset, variants):
            columns = self._columns(cell)
            size = len(columns["place"])
            rows += [
                {"line": cell.label(), **cell.values, **{key: column[i] for key, column in columns.items()}}
                for i in range(size)
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
        header = 0.14 * -(-len(handles) // per_row)
        figure, axes = panels(len(self.quantities), header=header + 0.1, columns=len(titles), sharey=True)
        for row, quantity in enumerate(self.quantities):
            beside = axes[row * len(titles) : (row + 1) * len(titles)]
            for panel, title in zip(beside, titles, strict=True):
                mine = [(cell, columns) for cell, columns in found if self._title(cell) == title]
                teacher = self.with_teacher and row == 0
                for cell, columns in mine:
                    self._draw_line(panel, quantity, columns, colour[cell.label(self.panels)])
                _draw_support(panel, mine[0][1], teacher)
                if row == 0 and title:
                    panel.set_title(title, fontsize=SMALL_FONT_SIZE, pad=3)
            self._scale_row(beside[0], quantity, [columns for _, columns in found])
        figure.supxlabel("coordinate, sorted by |teacher|", fontsize=FONT_SIZE)
        figure.align_ylabels(axes[:: len(titles)])
        legend(figure, handles, per_row)
        return figure

    # The numbers ------------------------------------------------------------------------------------------------------

    def _cells(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> list[Cell]:
        self.check({str(name) for name in dataset.data_vars}, {str(dim): [] for dim in dataset.dims})
        needed = {*self.quantities, "teacher"}
        return cells(dataset, {name: data for name, data in variants.items() if needed <= set(data.data_vars)})

    def _columns(self, cell: Cell) -> dict[str, np.ndarray]:
        data = cell.data
        teacher = _of_coordinates(last(data["teacher"]))
        order = np.argsort(-np.abs(teacher), axis=1, kind="stable")
        kept = (last(data["status"]) != "diverged").values
        place = np.arange(1, teacher.shape[1] + 1)
        columns: dict[str, Any] = {
            "place": place,
            "teacher": np.take_along_axis(teacher, order, 1).mean(0),
            "on_support": np.take_along_axis(teacher != 0, order, 1).mean(0),
        }
        for quantity in self.quantities:
            for name in (quantity, f"{quantity}_law"):
                if name not in data:
                    continue
                array = (
                    last(data[name])
                    if self.at is None or "step" not in data[name].dims
                    else data[name].sel(step=self.at)
                )
                values = np.take_along_axis(_of_coordinates(array), order, 1)[kept]
                if len(values) == 0:
                    values = np.full((1, len(place)), np.nan)
                columns[name] = np.median(values, axis=0) if self.average == "median" else values.mean(0)
                if name == quantity:
                    columns[f"{name}_p10"], columns[f"{name}_p90"] = np.quantile(values, (0.1, 0.9), axis=0)
        columns["members"] = np.full(len(place), len(kept))
        columns["diverged"] = np.full(len(place), int((~kept).sum()))
        return columns

    # The drawing ------------------------------------------------------------------------------------------------------

    def _title(self, cell: Cell) -> str:
        if self.panels is None or self.panels not in cell.values:
            return ""
        return value_label(self.panels, cell.values[self.panels], cell.data) or "main"

    def _draw_line(self, panel: Axes, quantity: str, columns: dict[str, np.ndarray], colour: Any) -> None:
        x, seeds = columns["place"], columns["members"][0] - columns["diverged"][0]
        if seeds > 1:
            low, high = columns[f"{quantity}_p10"], columns[f"{quantity}_p90"]
            panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(x, columns[quantity], color=colour, linewidth=1, marker="o", markersize=1.8, zorder=3)
        if f"{quantity}_law" in columns:
            panel.plot(x, columns[f"{quantity}_law"], color="black", linewidth=0.8, linestyle="--", zorder=4)

    def _scale_row(self, panel: Axes, quantity: str, found: list[dict[str, np.ndarray]]) -> None:
        panel.set_ylabel(wrapped(words(quantity)))
        names = (quantity, f"{quantity}_p10", f"{quantity}_p90", f"{quantity}_law")
        values = np.concatenate([columns[name] for columns in found for name in names if name in columns])
        means = np.concatenate([columns[quantity] for columns in found])
        values, means = values[np.isfinite(values)], means[np.isfinite(means) & (means > 0)]
        if quantity in self.log and len(means):
            low = max(values[values > 0].min(), means.min() / 10)  # a band's lowest edge must not flatten the lines
            log_axis(panel.yaxis, low, values.max())

    def _handles(self, found: list[tuple[Cell, dict[str, np.ndarray]]], colour: dict[str, Any]) -> list[Any]:
        lost: dict[str, list[int]] = {}
        for cell, columns in found:
            counts = lost.setdefault(cell.label(self.panels), [0, 0])
            counts[0] += int(columns["diverged"][0])
            counts[1] += int(columns["members"][0])
        handles: list[Any] = []
        for name, (gone, count) in lost.items():
            text = name + (f" ({gone} of {count} diverged)" if gone else "")
            if text:
                handles.append(Line2D([], [], color=colour[name], linewidth=1, marker="o", markersize=1.8, label=text))
        if any(f"{quantity}_law" in columns for quantity in self.quantities for _, columns in found):
            handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.8, label="theory"))
        if self.with_teacher:
            handles.append(Line2D([], [], color="black", marker="_", linestyle="", markersize=5, label="teacher"))
        return handles + spread((columns["members"][0] for _, columns in found), self.average)


def _of_coordinates(array: xr.DataArray) -> np.ndarray:
    if array.dims != ("seed", "coordinate"):
        raise ValueError(f"CoordinatesFigure: {array.name!r} must have one number per coordinate, has {array.dims[1:]}")
    return array.values


def _draw_support(panel: Axes, columns: dict[str, np.ndarray], teacher: bool) -> None:
    end = float((columns["on_support"] > 0).sum())
    panel.axvspan(0.5, end + 0.5, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    panel.set_xlim(0.5, len(columns["place"]) + 0.5)
    if teacher:
        panel.plot(
            columns["place"], columns["teacher"], color="black", marker="_", linestyle="", markersize=5, zorder=5
        )
