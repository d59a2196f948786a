"""GridMapFigure: one quantity over two axes of the grid."""

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from dlnlab.figures.base import FONT_SIZE, GREY, SMALL_FONT_SIZE, Canvas, Figure, axis_label, last, legend, panels
from dlnlab.figures.words import words, wrapped


class GridMapFigure(Figure):
    """The mean over seeds of a quantity's last value, as colours over two axes of the ensemble.

    A cell where more than half of the members diverged is white with a cross.

    Args:
        quantity: One number per member, for example `jumps_down`.
        x: The axis drawn along x.
        y: The axis drawn along y.
        leave_out: Variants (or `main`) that are not drawn: what others start from.
        labels: Texts for variants (`main` is the run itself).
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: Before a fit, if the quantity or an axis is missing.
    """

    def __init__(
        self,
        quantity: str = "jumps_down",
        x: str = "lr",
        y: str = "weight_decay",
        leave_out: list[str] | None = None,
        labels: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.quantity = quantity
        self.x = x
        self.y = y
        self.leave_out = leave_out or []
        self.labels = labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError unless there are the quantity and both axes."""
        for axis in (self.x, self.y):
            if axis not in axes:
                raise ValueError(
                    f"GridMapFigure: needs an ensemble.{axis} axis; the axes are {', '.join(axes) or 'none'}"
                )
        if self.quantity not in variables:
            raise ValueError(
                f"GridMapFigure.quantity: {self.quantity!r} is not recorded; recorded: {sorted(variables)}"
            )

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """A row for each panel and cell.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `panel`, the two axes, the quantity's mean over the members that did not diverge, and the share `diverged`.
        """
        columns: dict[str, list] = {name: [] for name in ("panel", self.x, self.y, self.quantity, "diverged")}
        for name, data in {"main": dataset, **variants}.items():
            if name in self.leave_out or not {self.x, self.y} <= set(data.dims) or self.quantity not in data:
                continue
            now, lost = last(data[self.quantity]), last(data["status"]) == "diverged"
            rest = [dim for dim in lost.dims if dim not in (self.x, self.y)]
            mean = now.where(~lost).mean(rest).transpose(self.y, self.x).values
            share = lost.mean(rest).transpose(self.y, self.x).values
            ys, xs = np.meshgrid(data[self.y].values, data[self.x].values, indexing="ij")
            for key, value in {self.x: xs, self.y: ys, self.quantity: mean, "diverged": share}.items():
                columns[key] += value.ravel().tolist()
            columns["panel"] += [name] * xs.size
        return {name: np.array(column) for name, column in columns.items()}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["panel"].tolist()))
        seeds = dataset.sizes.get("seed", 1)
        mean, lost = f"mean of {seeds} seeds: " if seeds > 1 else "", (table["diverged"] > 0.5).any()
        figure, axes = panels(len(names), height=2.4, header=0.14 if lost else 0.0)
        shown = np.where(table["diverged"] > 0.5, np.nan, table[self.quantity])
        finite = shown[np.isfinite(shown)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        for panel, name in zip(axes, names, strict=True):
            here = table["panel"] == name
            x, y = np.unique(table[self.x][here]), np.unique(table[self.y][here])
            order = np.lexsort((table[self.x][here], table[self.y][here]))
            values = shown[here][order].reshape(len(y), len(x))
            # Cells of equal size, whatever the spacing of the axis: the ticks say where they are.
            image = panel.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
            rows, columns = np.nonzero(table["diverged"][here][order].reshape(len(y), len(x)) > 0.5)
            panel.plot(columns, rows, "x", color=GREY, markersize=3)
            for axis, grid in ((panel.xaxis, x), (panel.yaxis, y)):
                axis.set_major_formatter(FuncFormatter(_at(grid)))
                axis.set_minor_formatter(NullFormatter())
            panel.set_ylabel(wrapped(axis_label(self.y, dataset)))
            if len(names) > 1:
                panel.set_title(self.labels.get(name, name.replace("_", " ")), fontsize=FONT_SIZE)
            bar = figure.colorbar(image, ax=panel)
            bar.set_label(f"{mean}{words(self.quantity, dataset)}", fontsize=SMALL_FONT_SIZE)
            bar.ax.tick_params(labelsize=SMALL_FONT_SIZE)
        axes[-1].set_xlabel(axis_label(self.x, dataset))
        if lost:
            half = "more than half of the seeds diverged" if seeds > 1 else "diverged"
            legend(figure, [Line2D([], [], color=GREY, marker="x", markersize=3, linewidth=0, label=half)], 1)
        return figure


def _at(grid: np.ndarray):
    """The value of an axis at the middle of a cell."""
    return lambda place, _: f"{grid[int(place)]:.2g}" if place == int(place) and 0 <= place < len(grid) else ""
