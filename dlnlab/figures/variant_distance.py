"""VariantDistanceFigure: how far a run ends from where a variant of it ends, against the step size."""

from itertools import product

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    GREY,
    Canvas,
    Figure,
    colours,
    last,
    legend,
    log_axis,
    lr_label,
    lr_symbol,
    panels,
    quantiles,
    spread,
    value_label,
)
from dlnlab.figures.words import words, wrapped


class VariantDistanceFigure(Figure):
    """Relative l2 distance between a run's last predictor and a variant's, against the step size.

    One line for each combination of the axes but lr and seed: the median over seeds, and a band from 10 % to 90 %. A
    member enters only once its own train_loss is below `settled` times its first, for it is still about the root of that
    away from where it will end; where more than a tenth of the seeds do not, the step size is left out. The power of the
    step size that the legend states and grey lines show is the median over seeds of those that fit each seed's first half
    decade.

    Args:
        variant: The variant, whose axes are among the run's.
        settled: As above.
        name: The files' name without suffix; None is `variant_distance_figure`.

    Raises:
        ValueError: If settled is not positive.
    """

    def __init__(self, variant: str = "flow", settled: float = 1e-12, name: str | None = None) -> None:
        super().__init__(name)
        self.variant = variant
        self.settled = checks.positive("VariantDistanceFigure.settled", settled)

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError without an `lr` axis, or where beta or train_loss is not recorded."""
        if "lr" not in axes:
            raise ValueError(
                f"VariantDistanceFigure: needs an ensemble.lr axis; the axes are {', '.join(axes) or 'none'}"
            )
        for name in ("beta", "train_loss"):
            if name not in variables:
                recorded = ", ".join(sorted(variables)) or "nothing"
                raise ValueError(f"VariantDistanceFigure: needs {name} in record.variables; recorded: {recorded}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each line and step size.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (its label), `lr`, `median`, `p10` and `p90` of the distance, infinite where it is left out, how many
            `members` have converged, and the line's `slope` (NaN where no seed has three step sizes left).

        Raises:
            ValueError: If there is no such variant.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        if self.variant not in variants:
            found = ", ".join(variants) or "none"
            raise ValueError(f"VariantDistanceFigure.variant: no variant {self.variant!r}; there are {found}")
        beta, there = (data.beta.isel(step=-1, drop=True) for data in (dataset, variants[self.variant]))
        distance = np.sqrt(((beta - there) ** 2).sum("coordinate") / (there**2).sum("coordinate"))
        settled = last(dataset["train_loss"]) <= self.settled * dataset["train_loss"].isel(step=0)
        distance = distance.where(settled & (last(dataset["status"]) != "diverged")).sortby("lr")
        if "seed" not in distance.dims:
            distance = distance.expand_dims("seed")
        axes = [axis for axis in distance.dims if axis not in ("lr", "seed")]
        rows = []
        for values in product(*(distance[axis].values for axis in axes)):
            cell = distance.sel(dict(zip(axes, values, strict=True))).transpose("lr", "seed").values
            low, middle, high = quantiles(cell, (0.1, 0.5, 0.9))
            label = ", ".join(value_label(axis, value, dataset) for axis, value in zip(axes, values, strict=True))
            lr, count = distance.lr.values, np.isfinite(cell).sum(1)
            slopes = np.array([_slope(lr, seed) for seed in cell.T])
            slope = np.median(slopes[np.isfinite(slopes)]) if np.isfinite(slopes).any() else np.nan
            middle = np.where(np.isfinite(high), middle, np.inf)
            rows += [(label, *row, slope) for row in zip(lr, middle, low, high, count, strict=True)]
        columns = ("line", "lr", "median", "p10", "p90", "members", "slope")
        return {name: np.array(column) for name, column in zip(columns, zip(*rows, strict=True), strict=True)}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["line"].tolist()))
        figure, (panel,) = panels(1, height=2.3, header=0.14 * (len(names) + 2))
        seen = np.concatenate([table["median"], table["p10"][np.isfinite(table["median"])]])
        seen = seen[np.isfinite(seen) & (seen > 0)]
        low, high = (seen.min(), seen.max()) if len(seen) else (0.1, 1.0)
        log_axis(panel.yaxis, low, high)
        handles = []
        for name, colour in zip(names, colours(len(names)), strict=True):
            line = {key: column[table["line"] == name] for key, column in table.items()}
            middle = np.where(np.isfinite(line["median"]), line["median"], np.nan)
            panel.plot(line["lr"], middle, color=colour, linewidth=1.1, marker="o", markersize=2, zorder=3)
            exists = np.isfinite(line["median"])
            tops = np.minimum(line["p90"], panel.get_ylim()[1])
            panel.fill_between(line["lr"], np.where(exists, line["p10"], 0), tops, where=exists, color=colour, alpha=0.15,
                               linewidth=0)  # fmt: skip
            label = name
            if np.isfinite(slope := line["slope"][0]) and np.isfinite(line["median"]).any():
                label += rf": ${lr_symbol(dataset)}^{{{slope:.2f}}}$"
                first = np.flatnonzero(np.isfinite(line["median"]))[0]
                panel.plot(line["lr"], line["median"][first] * (line["lr"] / line["lr"][first]) ** slope, color=GREY,
                           linewidth=0.7, zorder=2)  # fmt: skip
            handles.append(Line2D([], [], color=colour, linewidth=1.1, marker="o", markersize=2, label=label))
        log_axis(panel.xaxis, table["lr"].min(), table["lr"].max())
        panel.set_xlabel(lr_label(dataset))
        panel.set_ylabel(wrapped(r"relative $\ell_2$ distance" + f"\nto the end of {words(self.variant)}"))
        if handles:
            handles.append(
                Line2D([], [], color=GREY, linewidth=0.7, label="power of the first half decade, median of seeds")
            )
        legend(figure, handles + spread([dataset.sizes.get("seed", 1)]), 1)
        return figure


def _slope(lr: np.ndarray, values: np.ndarray) -> float:
    """The power law through the first half decade of what is finite and positive."""
    exists = np.isfinite(values) & (values > 0)
    if exists.any():
        exists &= lr <= lr[exists][0] * 10**0.5
    return float(np.polyfit(np.log(lr[exists]), np.log(values[exists]), 1)[0]) if exists.sum() > 2 else np.nan
