"""EdgeFigure: the loss and the curvature over training, beside the edge of stability."""

from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import GREY, Canvas, Figure, colours, legend, log_axis, panels, remark, value_label
from dlnlab.figures.words import words, wrapped

_DASHES = (0, (4, 3))
_EFFECTIVE = {
    "sharpness": "effective_sharpness",
    "preconditioned_sharpness": "effective_sharpness",
    "batch_sharpness": "effective_batch_sharpness",
    "critical_sharpness": "effective_critical_sharpness",
}


class EdgeFigure(Figure):
    """Training loss and curvature against the optimizer step, one line per variant, or per combination of axes but seed.

    One panel for the loss and one for each quantity: the median over the seeds that do not diverge; a combination of which
    half do is left out. The edge of stability
    is dashed in the line's colour: 2/lr for gradient descent, and for every optimizer whatever the effective quantity says
    it is (2 x quantity/effective); quantities that begin with `effective_` have theirs at 2.

    Args:
        quantities: Recorded variables with one number per member.
        log_steps: A logarithmic axis of 1 + step.
        labels: What the legend calls the run, `main`, and its variants; None is their names.
        name: The files' name without suffix; None is `edge_figure`.

    Raises:
        ValueError: If quantities is empty, or labels name no variant.

    Reference:
        cohen2021 (loss and sharpness with the line 2/lr).
    """

    def __init__(
        self,
        quantities: list[str] | None = None,
        log_steps: bool = False,
        labels: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if quantities is not None and not quantities:
            raise ValueError("EdgeFigure.quantities = []: must name at least one variable")
        self.quantities = ["sharpness"] if quantities is None else quantities
        self.log_steps = checks.flag("EdgeFigure.log_steps", log_steps)
        self.labels = labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError where a quantity is not recorded."""
        del axes
        for quantity in self.quantities:
            if quantity not in variables:
                recorded = ", ".join(sorted(variables)) or "nothing"
                raise ValueError(f"EdgeFigure.quantities: {quantity!r} is not recorded; recorded: {recorded}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each line and step.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (its label), `step`, `train_loss`, each quantity and its `<quantity>_edge`; NaN where one was not
            recorded.

        Raises:
            ValueError: If a quantity is missing, or a label is of no variant.
        """
        self.check({str(name) for name in dataset.data_vars}, {})
        for unknown in self.labels.keys() - {"main", *variants}:
            raise ValueError(f"EdgeFigure.labels: no variant is called {unknown!r}; there are {', '.join(variants)}")
        rows = []
        for name, _, cell in self._lines(dataset, variants):
            columns = {quantity: _median(cell, quantity) for quantity in ("train_loss", *self.quantities)}
            for quantity in self.quantities:
                columns[f"{quantity}_edge"] = self._edge(cell, quantity)
            rows += [{"line": name, "step": int(step), **{key: column[i] for key, column in columns.items()}}
                     for i, step in enumerate(cell.step.values)]  # fmt: skip
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def _lines(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> list[tuple[str, str, xr.Dataset]]:
        """The name in the table, the words of the legend and the members of each line."""
        found = []
        for variant, data in {"": dataset, **variants}.items():
            run = self.labels.get(variant or "main", variant)
            for *labels, cell in _cells(data):
                name, shown = (", ".join(filter(None, [run, label])) or "main" for label in labels)
                found.append((name, shown, cell))
        return found

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["line"].tolist()))
        lines = self._lines(dataset, variants)
        shown = {name: label for name, label, _ in lines}
        handles: list[Any] = []
        if len(names) > 1:
            handles = [Line2D([], [], color=colour, linewidth=0.9, label=shown[name])
                       for name, colour in zip(names, colours(len(names)), strict=True)]  # fmt: skip
        edges = any(np.isfinite(table[f"{quantity}_edge"]).any() for quantity in self.quantities)
        if edges or any(quantity.startswith("effective_") for quantity in self.quantities):
            handles.append(Line2D([], [], color=GREY, linewidth=0.7, linestyle=_DASHES, label="edge of stability"))
        seeds = {cell.sizes["seed"] for *_, cell in lines if "seed" in cell.dims}
        if max(seeds, default=1) > 1:
            handles.append(remark(f"medians of up to {max(seeds)} seeds"))
        figure, axes = panels(1 + len(self.quantities), header=0.14 * -(-len(handles) // 2))
        for name, colour in zip(names, colours(len(names)), strict=True):
            line = table["line"] == name
            step = table["step"][line] + self.log_steps
            for panel, quantity in zip(axes, ("train_loss", *self.quantities), strict=True):
                value = table[quantity][line]
                seen = np.isfinite(value)
                panel.plot(step[seen], value[seen], color=colour, linewidth=0.9)
                if quantity != "train_loss":
                    edge = table[f"{quantity}_edge"][line]
                    known = np.isfinite(edge)
                    panel.plot(step[known], edge[known], color=colour, linewidth=0.7, linestyle=_DASHES, alpha=0.8)
        losses = table["train_loss"][np.isfinite(table["train_loss"]) & (table["train_loss"] > 0)]
        log_axis(axes[0].yaxis, losses.min() if len(losses) else 0.1, losses.max() if len(losses) else 1.0)
        for panel, quantity in zip(axes, ("train_loss", *self.quantities), strict=True):
            panel.set_ylabel(wrapped(words(quantity, dataset)))
            if quantity.startswith("effective_"):
                panel.axhline(2, color=GREY, linewidth=0.7, linestyle=_DASHES)
        axes[-1].set_xlabel(("1 + " if self.log_steps else "") + words("step"))
        if self.log_steps:
            log_axis(axes[-1].xaxis, 1, 1 + table["step"].max())
        figure.align_ylabels(axes)
        legend(figure, handles, 2)
        return figure

    @staticmethod
    def _edge(cell: xr.Dataset, quantity: str) -> np.ndarray:
        effective = _EFFECTIVE.get(quantity)
        # Beside a preconditioned one, the effective sharpness is that one's.
        another = quantity == "sharpness" and "preconditioned_sharpness" in cell
        if effective not in cell or another:
            return np.full(cell.sizes["step"], np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            edges = 2 * cell[quantity] / cell[effective]
        return _median(edges.to_dataset(name="edge"), "edge")


def _cells(data: xr.Dataset) -> list[tuple[str, str, xr.Dataset]]:
    """Each combination of axes but seed of which fewer than half diverge, named for the table and for the legend.

    The members that diverge are left out.
    """
    axes = [str(axis) for axis in data.train_loss.dims if axis not in ("seed", "step")]
    found = []
    for values in product(*(data[axis].values for axis in axes)):
        chosen: dict[str, Any] = dict(zip(axes, values, strict=True))
        name = ", ".join(f"{axis.replace('_', ' ')} {value if isinstance(value, str) else format(value, '.3g')}"
                         for axis, value in chosen.items())  # fmt: skip
        shown = ", ".join(value_label(axis, value, data) for axis, value in chosen.items())
        cell = data.sel(chosen)
        if "status" in cell:
            ended = cell["status"].isel(step=-1) != "diverged"
            if 2 * int(ended.sum()) <= ended.size:
                continue
            cell = cell[[name for name in cell.data_vars if "step" in cell[name].dims and name != "status"]].where(
                ended
            )
        found.append((name, shown, cell))
    return found


def _median(cell: xr.Dataset, name: str) -> np.ndarray:
    values = cell[name]
    seeds = [dim for dim in values.dims if dim != "step"]
    return values.median(seeds).values if seeds else values.values
