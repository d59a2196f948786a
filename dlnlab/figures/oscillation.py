"""OscillationFigure: when does gradient descent oscillate with period 2, and on which coordinates?"""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab.figures.base import (
    GREY,
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
    quantiles,
    spread,
    value_label,
)

PARTS = ("support", "rest")


class OscillationFigure(Figure):
    r"""Half-differences of consecutive steps over training, on the teacher's support and off it.

    .. math:: |\beta_{k+1} - \beta_k|/2

    is the amplitude of an oscillation of period 2; of it the root mean square over the coordinates on the support, and
    over the others. The median over the seeds that have not stopped by then, with a band from 10 % to 90 %: a member
    that has converged or diverged is still. A grid of panels, on logarithmic axes. `record.pairs` records the steps it
    needs.

    Args:
        rows: The axis whose values are rows of panels; None is a single row.
        columns: The axis whose values are columns; None is a single one.
        name: The files' name without suffix; None is `oscillation_figure`.
    """

    def __init__(self, rows: str | None = None, columns: str | None = None, name: str | None = None) -> None:
        super().__init__(name)
        self.rows, self.columns = rows, columns

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if beta or the teacher is not recorded, or an axis is neither the figure's nor `seed`."""
        recorded = ", ".join(sorted(variables)) or "nothing"
        for needed in ("beta", "teacher"):
            if needed not in variables:
                raise ValueError(f"OscillationFigure: needs {needed!r} in record.variables; recorded: {recorded}")
        known = ", ".join(axes) or "none"
        for key, axis in (("rows", self.rows), ("columns", self.columns)):
            if axis not in (None, *axes):
                raise ValueError(f"OscillationFigure.{key}: no axis {axis!r}; the axes are {known}")
        for axis, values in axes.items():
            if len(values) > 1 and axis not in (self.rows, self.columns, "seed"):
                raise ValueError(f"OscillationFigure: {axis} has {len(values)} values; make it rows or columns")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each cell and pair of steps.

        Args:
            dataset: A run's results.
            **variants: Those of its variants (not drawn).

        Returns:
            `line` (the cell's label), its axes, `step` (the pair's first), how many members are `running`, and the
            median `support`, `rest`, with `_p10` and `_p90`.

        Raises:
            ValueError: If no two consecutive steps were recorded.
        """
        del variants
        found: dict[str, list] = {}
        for cell in self._cells(dataset):
            columns = _amplitudes(cell)
            size = len(columns["step"])
            for key, column in {
                "line": [cell.label()] * size,
                **{axis: [value] * size for axis, value in cell.values.items()},
                **{key: column.tolist() for key, column in columns.items()},
            }.items():
                found.setdefault(key, []).extend(column)
        return {key: np.array(column) for key, column in found.items()}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        del variants
        found = [(cell, _amplitudes(cell)) for cell in self._cells(dataset)]
        across = list(dict.fromkeys(cell.values.get(self.columns) for cell, _ in found))
        down = list(dict.fromkeys(cell.values.get(self.rows) for cell, _ in found))
        figure, axes = panels(len(down), height=1.25, header=0.25, columns=len(across), sharey=True)
        shades = dict(zip(PARTS, (colours(1)[0], GREY), strict=True))
        drawn = np.concatenate([columns[part] for _, columns in found for part in PARTS])
        drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
        low, high = (max(drawn.min(), 1e-8 * drawn.max()), drawn.max()) if len(drawn) else (0.1, 1.0)
        for cell, columns in found:
            row, column = down.index(cell.values.get(self.rows)), across.index(cell.values.get(self.columns))
            panel = axes[row * len(across) + column]
            for part in PARTS:
                edges = [np.clip(columns[f"{part}_{edge}"], low / 10, 10 * high) for edge in ("p10", "p90")]
                panel.fill_between(columns["step"], *edges, color=shades[part], alpha=0.2, linewidth=0)
                panel.plot(columns["step"], columns[part], color=shades[part], linewidth=0.9)
            if row == 0 and self.columns is not None:
                title = value_label(self.columns, cell.values[self.columns], cell.data)
                panel.set_title(title, fontsize=SMALL_FONT_SIZE, pad=3)
            if column == 0:
                words = "" if self.rows is None else value_label(self.rows, cell.values[self.rows], cell.data) + "\n"
                panel.set_ylabel(words + r"$|\beta_{k+1}-\beta_k|/2$", fontsize=SMALL_FONT_SIZE)
                log_axis(panel.yaxis, low, high)
            if row == len(down) - 1:
                panel.set_xlabel("step $k$")
        log_axis(axes[-1].xaxis, 1, max(max(columns["step"].max() for _, columns in found), 2))
        figure.align_ylabels(axes[:: len(across)])
        handles: list[Any] = [
            Line2D([], [], color=shades["support"], linewidth=0.9, label="on the support"),
            Line2D([], [], color=shades["rest"], linewidth=0.9, label="off the support"),
        ]
        legend(figure, handles + spread([dataset.sizes.get("seed", 1)]), 3)
        return figure

    def _cells(self, dataset: xr.Dataset) -> list[Cell]:
        sizes = {str(dim): [] for dim in dataset.dims}
        self.check({str(name) for name in dataset.data_vars}, sizes)
        return cells(dataset, {})


def _amplitudes(cell: Cell) -> dict[str, np.ndarray]:
    data = cell.data
    recorded = np.flatnonzero(np.isfinite(data["beta"]).any(["seed", "coordinate"]).values)
    steps = data.step.values[recorded]
    first = np.flatnonzero(np.diff(steps) == 1)
    # Of a run of consecutive steps every pair counts; step 0 has no place on a logarithmic axis.
    first = first[steps[first] > 0]
    if len(first) == 0:
        raise ValueError("OscillationFigure: no two consecutive steps were recorded; set record.pairs: true")
    beta = data["beta"].transpose("step", "seed", "coordinate").values[recorded]
    running = data["status"].transpose("step", "seed").values[recorded][first + 1] == "running"
    with np.errstate(over="ignore"):  # a member that is about to be found diverged
        half = np.square((beta[first + 1] - beta[first]) / 2)  # (pairs, seed, coordinate)
    on = last(data["teacher"]).values != 0
    columns: dict[str, np.ndarray] = {"step": steps[first], "running": running.sum(1)}
    for part, chosen in zip(PARTS, (on, ~on), strict=True):
        size = np.sqrt(np.where(chosen, half, 0).sum(-1) / np.maximum(chosen.sum(-1), 1))
        rows = [
            quantiles(values[now], (0.1, 0.5, 0.9)) if now.any() else [np.nan] * 3
            for values, now in zip(size, running, strict=True)
        ]
        columns[f"{part}_p10"], columns[part], columns[f"{part}_p90"] = np.array(rows).T
    return columns
