"""PlaneFigure: the paths of members, or where they wander, in the plane of two quantities."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import GREY, Canvas, Figure, axis_label, colours, finite, legend, panels, value_label
from dlnlab.figures.words import words, wrapped

_MOST_KEYS = 8


class PlaneFigure(Figure):
    """Every recorded moment of every member as a point of a plane, on linear axes.

    Joined in time the points are paths, each with a dot where it begins; else they are a cloud, as in a bifurcation
    diagram. What a diverged member was recorded with after its divergence was seen is left out.

    Args:
        x: A variable with one number per member (or one coordinate), or an axis of numbers.
        y: Variables, a panel each.
        since: The first step that is drawn.
        join: Draw paths instead of points.
        colour: An axis whose values the colours tell; variants have one each.
        product: Draw the hyperbola x y = this.
        levels: Horizontal lines: for a variable of y, its value.
        labels: Texts for x, y and variants (`main` is the run itself).
        limits: For a variable, the ends of its axis.
        name: The files' name without suffix; None is `plane_figure`.

    Raises:
        ValueError: If y is empty or a number is out of range.
    """

    def __init__(
        self,
        x: str = "train_loss",
        y: list[str] = ["distance"],  # noqa: B006 - never changed
        since: int = 0,
        join: bool = False,
        colour: str | None = None,
        product: float | None = None,
        levels: dict[str, float] | None = None,
        labels: dict[str, str] | None = None,
        limits: dict[str, list[float]] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not y:
            raise ValueError("PlaneFigure.y = []: must name at least one variable")
        self.x, self.y, self.colour, self.labels = x, y, colour, labels or {}
        self.since = checks.integer("PlaneFigure.since", since)
        self.join = checks.flag("PlaneFigure.join", join)
        self.product = None if product is None else checks.number("PlaneFigure.product", product)
        self.levels, self.limits = levels or {}, limits or {}
        for variable, ends in self.limits.items():
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise ValueError(f"PlaneFigure.limits.{variable} = {ends}: must be two ascending numbers")

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if a variable or an axis is missing."""
        for name in self.y:
            if name not in variables:
                raise ValueError(f"PlaneFigure.y: {name!r} is not recorded; recorded: {', '.join(sorted(variables))}")
        if self.x not in variables and self.x not in axes:
            raise ValueError(f"PlaneFigure.x: {self.x!r} is neither recorded nor an axis")
        if self.colour is not None and self.colour not in axes:
            raise ValueError(f"PlaneFigure.colour: no axis {self.colour!r}; the axes are {', '.join(axes) or 'none'}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The points, a row for each member and recorded step.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `variant` (empty for the run itself), `member`, its axes, `step`, x and every y; NaN where a y was not
            recorded.

        Raises:
            ValueError: If a variable is missing or has more than one coordinate.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        parts = [self._rows(name, data) for name, data in {"": dataset, **variants}.items() if self._has(data)]
        columns = dict.fromkeys(key for part in parts for key in part)
        return {
            key: np.concatenate([part.get(key, np.full(len(part["step"]), np.nan)) for part in parts])
            for key in columns
        }

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the points or paths; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        of = self._kinds(table, dataset)
        kinds = list(dict.fromkeys(of))
        colour = dict(zip(kinds, colours(len(kinds)), strict=True))
        handles = [] if len(kinds) < 2 else [
            Line2D([], [], color=colour[kind], linewidth=1.1, label=kind) for kind in kinds[:: -(-len(kinds) // _MOST_KEYS)]
        ]  # fmt: skip
        if self.product is not None:
            handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"product {self.product:g}"))
        for name, value in self.levels.items():
            label = f"{self._text(name, dataset)} = {value:.4g}"
            handles.append(Line2D([], [], color=GREY, linewidth=0.7, label=label))
        figure, axes = panels(len(self.y), height=2.4, header=0.14 * -(-len(handles) // 2))
        for panel, name in zip(axes, self.y, strict=True):
            for kind in kinds:
                chosen = (of == kind) & np.isfinite(table[name]) & np.isfinite(table[self.x])
                self._draw_kind(panel, {key: column[chosen] for key, column in table.items()}, name, colour[kind])
            panel.set_ylabel(wrapped(self._text(name, dataset)))
            if name in self.levels:
                panel.axhline(self.levels[name], color=GREY, linewidth=0.7, zorder=0.5)
            if name in self.limits:
                panel.set_ylim(*self.limits[name])
            if self.x in self.limits:
                panel.set_xlim(*self.limits[self.x])
            self._draw_product(panel, finite(table[self.x]))
        axes[-1].set_xlabel(self._text(self.x, dataset))
        figure.align_ylabels(axes)
        legend(figure, handles, columns=2)
        return figure

    def _has(self, data: xr.Dataset) -> bool:
        return (self.x in data or self.x in data.dims) and all(name in data for name in self.y)

    def _rows(self, variant: str, data: xr.Dataset) -> dict[str, np.ndarray]:
        over = data["status"].dims
        axes = [axis for axis in over if axis != "step"]
        lost = (data["status"] == "diverged").cumsum("step") > 0
        found = {}
        for name in dict.fromkeys((self.x, *self.y)):
            array = data[name]
            if name in axes:
                array = array.broadcast_like(data["status"])
            trailing = [dim for dim in array.dims if dim not in over]
            if any(array.sizes[dim] > 1 for dim in trailing):
                raise ValueError(
                    f"figures: {name!r} must be one number per member, not one per {', '.join(map(str, trailing))}"
                )
            found[name] = array.squeeze(trailing, drop=True).where(~lost).transpose(*over)
        steps = np.flatnonzero(data["step"].values >= self.since)
        there = np.stack([~np.isnan(found[name].values[..., steps]) for name in self.y]).any(0).reshape(-1)
        shape = found[self.x].isel(step=steps).shape
        places = np.indices(shape).reshape(len(shape), -1)
        columns = {"variant": np.full(places.shape[1], variant, dtype=object)}
        columns["member"] = np.ravel_multi_index(places[:-1], shape[:-1]) if axes else np.zeros(places.shape[1], int)
        columns |= {axis: data[axis].values[places[i]] for i, axis in enumerate(axes)}
        columns["step"] = data["step"].values[steps][places[-1]]
        columns |= {name: values.values[..., steps].reshape(-1) for name, values in found.items()}
        return {key: column[there] for key, column in columns.items()}

    def _draw_kind(self, panel: Axes, rows: dict[str, np.ndarray], name: str, colour: Any) -> None:
        if not self.join:
            size = 0.4 if len(rows["step"]) > 5000 else 1.5
            panel.plot(rows[self.x], rows[name], ".", color=colour, markersize=size, markeredgewidth=0, rasterized=True)
            return
        for member in np.unique(rows["member"]):
            for variant in dict.fromkeys(rows["variant"].tolist()):
                mine = (rows["member"] == member) & (rows["variant"] == variant)
                x, y = rows[self.x][mine], rows[name][mine]
                panel.plot(x, y, color=colour, linewidth=0.8, marker=".", markersize=2.5, markeredgewidth=0)
                panel.plot(x[:1], y[:1], "o", color=colour, markersize=3.5)

    def _draw_product(self, panel: Axes, x: np.ndarray) -> None:
        if self.product is None or not len(x):
            return
        limits = panel.get_xlim(), panel.get_ylim()
        for side in (-1, 1):
            ends = [end for end in limits[0] if side * end > 0]
            if ends:
                at = side * np.geomspace(1e-3 * max(map(abs, ends)), max(map(abs, ends)), 400)
                panel.plot(at, self.product / at, color=GREY, linewidth=0.8, zorder=0.5)
        panel.set(xlim=limits[0], ylim=limits[1])

    def _kinds(self, table: dict[str, np.ndarray], data: xr.Dataset) -> np.ndarray:
        """Of every row what its colour tells: the variant, or within the run itself the value of the axis."""
        found = np.array([self.labels.get(name or "main", words(name or "main")) for name in table["variant"]])
        if self.colour is None:
            return found
        values = [value_label(self.colour, value, data) for value in table[self.colour]]
        return np.where(table["variant"] == "", values, found)

    def _text(self, name: str, data: xr.Dataset) -> str:
        return self.labels.get(name, axis_label(name, data))
