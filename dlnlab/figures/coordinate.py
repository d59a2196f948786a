"""CoordinateFigure: every coordinate of one member over training."""

from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    GREY,
    SMALL_FONT_SIZE,
    Canvas,
    Figure,
    colours,
    legend,
    log_axis,
    panels,
    remark,
    value_label,
)
from dlnlab.figures.words import words, wrapped


class CoordinateFigure(Figure):
    """Every coordinate of one variable over training, a panel for each cell of the grid and each variant.

    Those that become largest have colours, the same in every panel; all others are grey.

    Args:
        variable: A variable with one number per coordinate.
        x: `step` or `time`, or `time_over_log_init`: the time over ln(1/init_scale), in which the jumps of a flow from a
            vanishing initialisation have fixed places; it needs an init_scale axis.
        seed: The number (from 0) of the seed that is drawn.
        highlight: How many coordinates have colours.
        log_x: Whether x has a logarithmic axis, on which 0 is left out.
        x_range: The ends of x; None shows all.
        labels: Texts for variants (`main` is the run itself), the variable and x.
        name: The files' name without suffix; None is `coordinate_figure`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        variable: str = "beta",
        x: str = "step",
        seed: int = 0,
        highlight: int = 5,
        log_x: bool = False,
        x_range: list[float] | None = None,
        labels: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.variable = variable
        self.x = checks.one_of("CoordinateFigure.x", x, ("step", "time", "time_over_log_init"))
        self.seed = checks.integer("CoordinateFigure.seed", seed)
        self.highlight = checks.integer("CoordinateFigure.highlight", highlight)
        self.log_x = checks.flag("CoordinateFigure.log_x", log_x)
        self.x_range = x_range
        if x_range is not None and (len(x_range) != 2 or not x_range[0] < x_range[1]):
            raise ValueError(f"CoordinateFigure.x_range = {x_range}: must be two numbers, the first the smaller")
        self.labels = labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if the variable, the time or the axis it needs is missing."""
        for needed in (self.variable, *(["time"] if self.x != "step" else [])):
            if needed not in variables:
                recorded = ", ".join(sorted(variables)) or "nothing"
                raise ValueError(f"CoordinateFigure: {needed!r} is not recorded; recorded: {recorded}")
        if self.x == "time_over_log_init" and "init_scale" not in axes:
            raise ValueError(f"CoordinateFigure.x = {self.x}: needs an ensemble.init_scale axis")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each panel, coordinate and step.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `panel` (its label), `coordinate`, x under its own name, and the variable.

        Raises:
            ValueError: If something is missing, or the variable has not one number per coordinate.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        parts: list[dict[str, np.ndarray]] = []
        for name, data in {"main": dataset, **variants}.items():
            if self.variable in data:
                parts += self._cells(name, data)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _cells(self, name: str, data: xr.Dataset) -> list[dict[str, np.ndarray]]:
        if "seed" in data.dims:
            data = data.isel(seed=min(self.seed, data.sizes["seed"] - 1))
        array = data[self.variable].dropna("step", how="all")
        if "coordinate" not in array.dims:
            raise ValueError(f"CoordinateFigure: {self.variable!r} has no coordinates")
        axes = [str(axis) for axis in array.dims if axis not in ("step", "coordinate")]
        parts = []
        for values in product(*(array[axis].values for axis in axes)):
            chosen = dict(zip(axes, values, strict=True))
            own = self.labels.get(name, "" if name == "main" else name.replace("_", " "))
            label = ", ".join(filter(None, [own, *(value_label(axis, value, data) for axis, value in chosen.items())]))
            cell = array.sel(chosen).transpose("coordinate", "step")
            x = cell.step.values.astype(float) if self.x == "step" else data.time.sel(chosen).sel(step=cell.step).values
            if self.x == "time_over_log_init":
                x = x / -np.log(chosen["init_scale"])
            count, steps = cell.shape
            parts.append({
                "panel": np.full(cell.size, label),
                "coordinate": np.repeat(np.arange(count), steps),
                self.x: np.tile(x, count),
                self.variable: cell.values.ravel(),
            })  # fmt: skip
        return parts

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["panel"].tolist()))
        figure, axes = panels(len(names), height=1.35, header=0.14)
        colour = self._colours(table)
        for axis, name in zip(axes, names, strict=True):
            part = {key: column[table["panel"] == name] for key, column in table.items()}
            for coordinate in np.unique(part["coordinate"]):
                line = part["coordinate"] == coordinate
                known = coordinate in colour
                axis.plot(part[self.x][line], part[self.variable][line], color=colour.get(coordinate, GREY),
                          linewidth=1.1 if known else 0.4, zorder=3 if known else 2)  # fmt: skip
            axis.set_ylabel(wrapped(self.labels.get(self.variable, words(self.variable, dataset))))
            axis.set_title(name, fontsize=SMALL_FONT_SIZE, loc="left", pad=2)
        x = table[self.x]
        if self.log_x:
            log_axis(axes[-1].xaxis, x[x > 0].min(), x.max())
        if self.x_range is not None:
            axes[-1].set_xlim(self.x_range)
        axes[-1].set_xlabel(self.labels.get(self.x, _X_LABELS[self.x]))
        figure.align_ylabels(axes)
        legend(figure, self._handles(table, colour, dataset), 2)
        return figure

    def _handles(self, table: dict[str, np.ndarray], colour: dict[int, Any], data: xr.Dataset) -> list[Any]:
        seeds = data["seed"].values if "seed" in data.dims else [0]
        several = len(colour) < table["coordinate"].max() + 1
        handles = [Line2D([], [], color=GREY, linewidth=0.6, label="all other coordinates")] if several else []
        return [remark(f"one member, seed {seeds[min(self.seed, len(seeds) - 1)]}"), *handles]

    def _colours(self, table: dict[str, np.ndarray]) -> dict[int, Any]:
        """Of the coordinates that become largest in any panel."""
        largest = np.zeros(table["coordinate"].max() + 1)
        np.fmax.at(largest, table["coordinate"], np.abs(table[self.variable]))
        chosen = np.argsort(-largest, kind="stable")[: self.highlight]
        return dict(zip(chosen.tolist(), colours(len(chosen)), strict=True))


_X_LABELS = {"step": "optimizer step", "time": "time", "time_over_log_init": r"time $t/\ln(1/\alpha)$"}
