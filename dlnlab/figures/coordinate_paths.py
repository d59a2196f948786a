"""CoordinatePathsFigure: how does each coordinate of one member move?"""

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    GREY,
    MOST_COLUMNS,
    SMALL_FONT_SIZE,
    Canvas,
    Cell,
    Figure,
    cells,
    colours,
    last,
    legend,
    log_axis,
    panels,
    remark,
)
from dlnlab.figures.words import words, wrapped


class CoordinatePathsFigure(Figure):
    """Variables of one seed's members over training: a column of panels per cell, a row per variable.

    A variable with one number per coordinate is drawn as a line each, on the teacher's support in colour, off it in grey;
    one with a single number as one black line. Steps are on a logarithmic axis, without step 0.

    Args:
        quantities: Variables, a row of panels each.
        log: Those of them on a logarithmic scale, where numbers that are not positive are left out.
        seed: Whose members; None is the first.
        name: The files' name without suffix; None is `coordinate_paths_figure`.

    Raises:
        ValueError: If quantities is empty or `log` names others.
    """

    def __init__(
        self,
        quantities: list[str] | None = None,
        log: list[str] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("CoordinatePathsFigure.quantities = []: must name at least one variable")
        self.quantities = quantities if quantities is not None else ["beta"]
        self.log = log if log is not None else []
        if others := sorted(set(self.log) - set(self.quantities)):
            raise ValueError(f"CoordinatePathsFigure.log: {others[0]!r} is none of quantities = {self.quantities}")
        self.seed = seed if seed is None else checks.integer("CoordinatePathsFigure.seed", seed, at_least=0)

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if something is not recorded, the seed is none of the run's, or there are too many cells."""
        recorded = ", ".join(sorted(variables)) or "nothing"
        for needed in (*self.quantities, "teacher"):
            if needed not in variables:
                raise ValueError(f"CoordinatePathsFigure: needs {needed!r} in record.variables; recorded: {recorded}")
        seeds = axes.get("seed") or []
        if self.seed is not None and seeds and self.seed not in seeds:
            raise ValueError(f"CoordinatePathsFigure.seed = {self.seed}: must be one of the ensemble's seeds")
        count = int(np.prod([max(len(values), 1) for axis, values in axes.items() if axis != "seed"]))
        if count > MOST_COLUMNS:
            raise ValueError(
                f"CoordinatePathsFigure: {count} cells beside each other; at most {MOST_COLUMNS} are drawn"
            )

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each cell, coordinate and step.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (the cell's label), its axes, `seed`, `step`, `coordinate`, `teacher` (its entry), and the quantities,
            NaN where they were not recorded; one with a single number per member repeats it for every coordinate.
        """
        found: dict[str, list] = {}
        for cell, data in self._members(dataset, variants):
            teacher = last(data["teacher"])
            steps = data.step.values
            size = data.sizes["coordinate"]
            columns = {
                "line": [cell.label()] * len(steps) * size,
                **{axis: [value] * len(steps) * size for axis, value in cell.values.items()},
                "seed": [int(data.seed)] * len(steps) * size,
                "step": np.repeat(steps, size).tolist(),
                "coordinate": np.tile(np.arange(size), len(steps)).tolist(),
                "teacher": np.tile(teacher.values, len(steps)).tolist(),
            }
            for quantity in self.quantities:
                values = data[quantity].values
                columns[quantity] = (
                    (values if values.ndim == 2 else np.repeat(values[:, None], size, 1)).ravel().tolist()
                )
            for key, column in columns.items():
                found.setdefault(key, []).extend(column)
        return {key: np.array(column) for key, column in found.items()}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the member's paths; see `Figure.draw`."""
        members = self._members(dataset, variants)
        figure, axes = panels(len(self.quantities), height=1.4, header=0.3, columns=len(members), sharey=True)
        for column, (cell, data) in enumerate(members):
            teacher = last(data["teacher"]).values
            support = np.flatnonzero(teacher)[np.argsort(-np.abs(teacher[teacher != 0]), kind="stable")]
            later = data.isel(step=slice(1, None)) if int(data.step[0]) == 0 else data
            for row, quantity in enumerate(self.quantities):
                panel = axes[row * len(members) + column]
                values = later[quantity].transpose("step", ...).values
                recorded = np.isfinite(values.reshape(len(values), -1)).all(1)
                steps, values = later.step.values[recorded], values[recorded]
                if quantity in self.log:
                    values = np.where(values > 0, values, np.nan)
                if values.ndim == 1:
                    panel.plot(steps, values, color="black", linewidth=0.7)
                else:
                    panel.plot(steps, values[:, teacher == 0], color=GREY, linewidth=0.4, alpha=0.5)
                    for i, colour in zip(support, colours(len(support)), strict=True):
                        panel.plot(steps, values[:, i], color=colour, linewidth=0.8)
                if column == 0:
                    panel.set_ylabel(wrapped(words(quantity, dataset)))
            top = axes[column]
            end = str(last(data["status"]).values)
            top.set_title("\n".join([*cell.words.values(), end]), fontsize=SMALL_FONT_SIZE, pad=3)
            axes[(len(self.quantities) - 1) * len(members) + column].set_xlabel(words("step"))
        for row, quantity in enumerate(self.quantities):
            if quantity in self.log:
                ends = [axes[row * len(members) + column].dataLim for column in range(len(members))]
                low = min(limits.minposy for limits in ends)
                high = max(limits.ymax for limits in ends)
                if np.isfinite([low, high]).all() and 0 < low < high:
                    log_axis(axes[row * len(members)].yaxis, low, high)
        last_step = max(int(data.step[-1]) for _, data in members)
        log_axis(axes[-1].xaxis, 1, max(last_step, 2))
        figure.align_ylabels(axes[:: len(members)])
        handles = [
            Line2D([], [], color=colours(1)[0], linewidth=0.9, label="on the support"),
            Line2D([], [], color=GREY, linewidth=0.6, label="off the support"),
            remark(f"a member each, seed {int(members[0][1].seed)}"),
        ]
        legend(figure, handles, 3)
        return figure

    def _members(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> list[tuple[Cell, xr.Dataset]]:
        self.check({str(name) for name in dataset.data_vars}, {})
        needed = {*self.quantities, "teacher"}
        found = cells(dataset, {name: data for name, data in variants.items() if needed <= set(data.data_vars)})
        return [
            (cell, cell.data.isel(seed=0) if self.seed is None else cell.data.sel(seed=self.seed)) for cell in found
        ]
