"""A figure of your own: one number over training, a line for each step size."""

import numpy as np
import xarray as xr

from dlnlab.figures import Figure
from dlnlab.figures.base import Canvas, colours, panels


class CurvesFigure(Figure):
    """The median over all other axes of one variable against the optimizer step, a line for each step size.

    Args:
        variable: What to draw, one number per member.
        name: The files' name; None is `curves_figure`.
    """

    def __init__(self, variable: str = "distance", name: str | None = None) -> None:
        super().__init__(name)
        self.variable = variable

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Asked before a fit: say now what would be missing at its end."""
        if self.variable not in variables or "lr" not in axes:
            raise ValueError(f"CurvesFigure: needs an lr axis and {self.variable!r}, recorded: {sorted(variables)}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each lr and step."""
        values = dataset[self.variable]
        median = values.median([dim for dim in values.dims if dim not in ("lr", "step")]).dropna("step", how="all")
        frame = median.to_dataframe().reset_index()
        return {name: frame[name].to_numpy() for name in ("lr", "step", self.variable)}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """One panel."""
        table = self.table(dataset)
        figure, (panel,) = panels(1, height=2.2)
        for lr, colour in zip(dataset.lr.values, colours(dataset.sizes["lr"]), strict=True):
            line = table["lr"] == lr
            panel.plot(1 + table["step"][line], table[self.variable][line], color=colour, label=f"lr = {lr:.2g}")
        panel.set(xscale="log", xlabel="1 + optimizer step", ylabel=self.variable)
        panel.legend(frameon=False, fontsize=7)
        return figure
