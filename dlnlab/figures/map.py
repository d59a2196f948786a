"""MapFigure: where training ends, over two axes of the ensemble at once."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dlnlab.figures.base import (
    FONT_SIZE,
    SMALL_FONT_SIZE,
    Canvas,
    Figure,
    LogTicks,
    axis_label,
    colours,
    finite,
    last,
    legend,
    log_axis,
    log_format,
    members_only,
    panels,
    remark,
)
from dlnlab.figures.words import wrapped

_STATUS = {"running": "#9a9a9a", "diverged": "#e3e3e3"}
_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))
_DECADES = 12


class MapFigure(Figure):
    """Final values over two axes of the ensemble, a map for each quantity, with lines where theory puts a border.

    Colours are those of members that have converged, medians over seeds; what still runs is grey and what has diverged
    light, where that is what most seeds do. A quantity's colours are logarithmic, over at most 12 decades from the largest.

    Args:
        x: The axis along the figure, of positive numbers.
        y: The axis upwards, likewise.
        quantities: Variables with one number per member, a panel each.
        lines: Variables and the value, or the values, whose contours are drawn: `{lr_over_theorem: 1}`.
        labels: Texts for axes, quantities and lines.
        linear: Those of the quantities whose colours are linear.
        name: The files' name without suffix; None is `map_figure`.

    Raises:
        ValueError: If quantities is empty.
    """

    def __init__(
        self,
        x: str = "lr",
        y: str = "init_scale",
        quantities: list[str] = ["train_loss"],  # noqa: B006 - never changed
        lines: dict[str, float | list[float]] | None = None,
        labels: dict[str, str] | None = None,
        linear: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not quantities:
            raise ValueError("MapFigure.quantities = []: must name at least one variable")
        self.x, self.y, self.quantities = x, y, quantities
        self.lines = {name: list(np.atleast_1d(values)) for name, values in (lines or {}).items()}
        self.labels, self.linear = labels or {}, set(linear or ())

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if an axis or a variable is missing, or there are further axes."""
        for key, axis in (("x", self.x), ("y", self.y)):
            if axis not in axes:
                raise ValueError(f"MapFigure.{key}: no axis {axis!r}; the axes are {', '.join(axes) or 'none'}")
        for name in (*self.quantities, *self.lines):
            if name not in variables:
                raise ValueError(f"MapFigure: {name!r} is not recorded; recorded: {', '.join(sorted(variables))}")
        if others := [axis for axis in axes if axis not in (self.x, self.y, "seed") and len(axes[axis]) > 1]:
            raise ValueError(f"MapFigure: a map has two axes and seeds, there is also {', '.join(others)}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The numbers of the map, a row for each cell.

        Args:
            dataset: A run's results.
            **variants: Not used.

        Returns:
            x and y under their own names; `status`, that of most seeds; the quantities, medians over the seeds that have
            converged, NaN where there is none; and the lines' variables, medians over all seeds.
        """
        grid = self._grid(dataset)
        at = np.meshgrid(grid[self.x], grid[self.y])
        columns = {self.x: at[0], self.y: at[1], "status": grid["status"].values}
        return {name: values.ravel() for name, values in columns.items()} | {
            name: grid[name].values.ravel() for name in (*self.quantities, *self.lines)
        }

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the map; see `Figure.draw`."""
        grid = self._grid(dataset)
        handles, seen = self._handles(dataset), set(np.unique(grid["status"].values))
        handles += [Patch(color=of, label=self.labels.get(name, name)) for name, of in _STATUS.items() if name in seen]
        if (seeds := dataset.sizes.get("seed", 1)) > 1:
            handles.append(remark(f"medians of {seeds} seeds"))
        figure, axes = panels(len(self.quantities), height=2.3, header=0.14 * -(-len(handles) // 2))
        x, y = _edges(grid[self.x].values), _edges(grid[self.y].values)
        for panel, name in zip(axes, self.quantities, strict=True):
            for status, of in _STATUS.items():
                where = np.where(grid["status"].values == status, 1.0, np.nan)
                panel.pcolormesh(x, y, where, cmap=ListedColormap([of]), rasterized=True)
            values = grid[name].values
            mesh = panel.pcolormesh(x, y, values, cmap="viridis", norm=self._norm(name, values), rasterized=True)
            self._draw_lines(panel, grid)
            ticks: dict[str, Any] = {}
            if isinstance(mesh.norm, LogNorm):
                ticks = {"ticks": LogTicks(), "format": log_format(*np.log10([mesh.norm.vmin, mesh.norm.vmax]))}
            bar = figure.colorbar(mesh, ax=panel, pad=0.02, fraction=0.06, **ticks)
            bar.set_label(self._text(name, dataset), fontsize=FONT_SIZE)
            bar.ax.tick_params(labelsize=SMALL_FONT_SIZE, width=0.6, length=3)
            bar.outline.set_linewidth(0.6)
            panel.set_ylabel(wrapped(self._text(self.y, dataset)))
            _fit(panel.yaxis, y)
        _fit(axes[-1].xaxis, x)
        axes[-1].set_xlabel(self._text(self.x, dataset))
        figure.align_ylabels(axes)
        legend(figure, handles, columns=2)
        return figure

    def _grid(self, dataset: xr.Dataset) -> xr.Dataset:
        """Status, quantities and lines' variables over (y, x), ascending."""
        axes = {str(axis): list(dataset[axis].values) for axis in dataset["status"].dims if axis != "step"}
        self.check({str(name) for name in dataset.data_vars}, axes)
        data = dataset if "seed" in dataset.dims else dataset.expand_dims(seed=[0])
        status = last(data["status"])
        status = status.squeeze([axis for axis in status.dims if axis not in (self.x, self.y, "seed")])
        shares = xr.concat([(status == name).mean("seed") for name in ("converged", *_STATUS)], dim="of")
        found = {"status": xr.DataArray(np.array(["converged", *_STATUS])[shares.argmax("of")], shares[0].coords)}
        for name in (*self.quantities, *self.lines):
            members_only(data, name)
            values = last(data[name]).squeeze([axis for axis in data[name].dims if axis not in (*status.dims, "step")])
            if name in self.quantities:
                values = values.where(status == "converged")
            found[name] = values.median("seed")
        of = [self.y, self.x]
        grid = xr.Dataset({name: values.reset_coords(drop=True).transpose(*of) for name, values in found.items()})
        return grid.sortby(of)

    def _norm(self, name: str, values: np.ndarray) -> Normalize:
        values = finite(values)
        if name in self.linear:
            return Normalize(values.min(initial=0), values.max(initial=0) or 1)
        positive = values[values > 0]
        high = positive.max() if len(positive) else 1.0
        low = max(positive.min(), high * 10.0**-_DECADES) if len(positive) else 0.1
        return LogNorm(low, high if high > low else 10 * low, clip=True)

    def _borders(self) -> list[tuple[str, float, str, Any, float]]:
        """Variable, value, colour, style and width of every line."""
        found = [(name, value) for name, values in self.lines.items() for value in values]
        # Of two lines at the same place the wider one, drawn first, shows on both sides of the other.
        of, widths = colours(len(found) + 1), np.linspace(2.2, 0.8, len(found))
        return [(*line, of[i], _STYLES[i % len(_STYLES)], widths[i]) for i, line in enumerate(found)]

    def _draw_lines(self, panel: Axes, grid: xr.Dataset) -> None:
        for name, value, colour, style, width in self._borders():
            values = grid[name].values
            if np.nanmin(values) < value < np.nanmax(values):
                panel.contour(grid[self.x].values, grid[self.y].values, values, [value], colors=[colour],
                              linestyles=[style], linewidths=width)  # fmt: skip

    def _handles(self, data: xr.Dataset) -> list[Any]:
        several = {name for name, values in self.lines.items() if len(values) > 1}
        return [
            Line2D([], [], color=colour, linestyle=style, linewidth=width,
                   label=self._text(name, data) + (f" = {value:g}" if name in several or value != 1 else ""))
            for name, value, colour, style, width in self._borders()
        ]  # fmt: skip

    def _text(self, name: str, data: xr.Dataset) -> str:
        return self.labels.get(name, axis_label(name, data))


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around positive numbers, halfway in the logarithm."""
    logs = np.log10(centres)
    if len(logs) == 1:
        return 10.0 ** np.array([logs[0] - 0.5, logs[0] + 0.5])
    inner = (logs[1:] + logs[:-1]) / 2
    return 10.0 ** np.concatenate(([2 * logs[0] - inner[0]], inner, [2 * logs[-1] - inner[-1]]))


def _fit(axis: Axis, edges: np.ndarray) -> None:
    """A logarithmic axis without room around it."""
    log_axis(axis, edges[0], edges[-1])
    axis.axes.set(**{f"{axis.axis_name}lim": (edges[0], edges[-1])})
