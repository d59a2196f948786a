"""EndsFigure: where runs, their variants and other methods end, side by side."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab.figures.base import GREY, SMALL_FONT_SIZE, Canvas, Figure, colours, last, legend, log_axis, panels
from dlnlab.figures.words import words


class EndsFigure(Figure):
    """One quantity at the last step, a row for the run, each variant and each baseline, a dot for each member.

    Baselines are the variables `<quantity>_...` that were recorded (`CompletionBaselines`). A bar is the median. Members
    that diverged are left out, and their number is given.

    Args:
        quantity: One number per member, positive; `distance`.
        leave_out: Variants (or `main`) that are only a phase of others.
        axis: An axis of the ensemble, each of whose values has a row of its own.
        labels: Texts for rows, by their name in the table.
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: Before a fit, if the quantity is not recorded or there is no such axis.
    """

    def __init__(
        self,
        quantity: str = "distance",
        leave_out: list[str] | None = None,
        axis: str | None = None,
        labels: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.quantity, self.axis = quantity, axis
        self.leave_out, self.labels = leave_out or [], labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError unless the quantity is recorded and the axis there."""
        if self.axis is not None and self.axis not in axes:
            raise ValueError(f"EndsFigure.axis = {self.axis!r}: the axes are {', '.join(axes) or 'none'}")
        if self.quantity not in variables:
            raise ValueError(f"EndsFigure.quantity: {self.quantity!r} is not recorded; recorded: {sorted(variables)}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """A row for each dot.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (the run or variant, their value of the axis, or the baseline), `member` and the quantity, NaN for a
            member that diverged.
        """
        columns: dict[str, list[Any]] = {"line": [], "member": [], self.quantity: []}
        found: dict[str, np.ndarray] = {}
        for name, data in {"main": dataset, **variants}.items():
            if name not in self.leave_out and self.quantity in data:
                for line, rows in self._rows(name, data):
                    ends = last(rows[self.quantity]).values
                    found[line] = np.where(last(rows["status"]) == "diverged", np.nan, ends).ravel()
        for data in (dataset, *variants.values()):
            data = data.isel({self.axis: 0}) if self.axis in data.dims else data  # a baseline is of the problem
            for name in map(str, data.data_vars):
                if name.startswith(f"{self.quantity}_") and name not in found:
                    found[name.removeprefix(f"{self.quantity}_")] = last(data[name]).values.ravel()
        for name, ends in found.items():
            columns["line"] += [name] * len(ends)
            columns["member"] += range(len(ends))
            columns[self.quantity] += ends.tolist()
        return {name: np.array(column) for name, column in columns.items()}

    def _rows(self, run: str, data: xr.Dataset) -> list[tuple[str, xr.Dataset]]:
        """The lines of one run."""
        if self.axis not in data.dims:
            return [(run, data)]
        prefix = "" if run == "main" else f"{run}, "
        return [(f"{prefix}{value}", data.sel({self.axis: value})) for value in data[self.axis].values]

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["line"].tolist()))
        figure, (panel,) = panels(1, height=0.5 + 0.25 * len(names), header=0.14)
        everything = table[self.quantity]
        positive = everything[np.isfinite(everything) & (everything > 0)]
        low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
        log_axis(panel.xaxis, low, high)
        labels = []
        for row, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
            ends = table[self.quantity][table["line"] == name]
            there = ends[np.isfinite(ends)]
            height = row + 0.25 * (np.linspace(-1, 1, len(there)) if len(there) > 1 else np.zeros(len(there)))
            panel.plot(np.maximum(there, low), height, ".", color=colour, markersize=3, alpha=0.7)
            if len(there):
                panel.plot([max(np.median(there), low)] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=1.6)
            lost = len(ends) - len(there)
            labels.append(self.labels.get(name, words(name)) + (f" ({lost} diverged)" if lost else ""))
        panel.set_yticks(range(len(names)), labels, fontsize=SMALL_FONT_SIZE)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlabel(words(self.quantity, dataset))
        counts = sorted({int((table["line"] == name).sum()) for name in names})
        members = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        legend(figure, [Line2D([], [], color=GREY, marker=".", markersize=3, linewidth=0, label="a member"),
                        Line2D([], [], color=GREY, marker="|", markersize=8, markeredgewidth=1.6, linewidth=0,
                               label=f"median of {members} members")], 2)  # fmt: skip
        return figure
