"""CurveFigure: medians and bands over seeds, against the step, the time, or any axis."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from dlnlab.figures.base import (
    GREY,
    Canvas,
    Figure,
    axis_label,
    colours,
    columns_of,
    draw_levels,
    final,
    finite,
    legend,
    log_axis,
    members_only,
    panels,
    quantiles,
    remark,
    spread,
    value_label,
)
from dlnlab.figures.words import wrapped

SHARES = ("converged", "diverged")
"""Quantities that are the share of seeds with this status."""
_MOST_DECADES = 25
_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), "-.")
_LAW_STYLE = (0, (6, 1.5, 1, 1.5, 1, 1.5))  # none of the quantities'

Row = dict[str, Any]


class CurveFigure(Figure):
    """Quantities against the step, the time or an axis: the median over seeds, and a band from 10 % to 90 %.

    One panel for each quantity, or for several that are compared; one line for each cell of the grid and each variant.
    Diverged members count as infinitely bad: a line ends where half of its seeds have diverged. On a logarithmic axis
    numbers that are not positive are left out.

    Args:
        quantities: Variables with one number per member, a panel each; a list among them shares a panel. `converged` and
            `diverged` are the share of seeds with this status.
        x: `step`; a variable that is followed along the steps, such as `time` (its median over seeds, interpolated
            between its records); or an axis, against
            which the last records stand.
        labels: Texts for variants (`main` is the run itself), quantities, axes' names and x; a panel of several quantities
            is called by their names, `converged, diverged`, and without a text of its own by theirs, a line each.
        runs: Which are drawn, `main` and variants; None is all.
        levels: Variants whose last median is a horizontal line. Against an axis, variants without it always are.
        laws: For a quantity, `[exponent, x]`: a grey line of this power of x through the first line's median there.
        linear: Those of the quantities and x that have linear axes; shares always do.
        means: Those of the quantities of which the mean over seeds is drawn, without a band: counts, and what is 0 or 1.
        name: The files' name without suffix; None is `curve_figure`.

    Raises:
        ValueError: If there is no quantity, or a law is no two numbers.
    """

    def __init__(
        self,
        quantities: list[str | list[str]] = ["distance"],  # noqa: B006 - never changed
        x: str = "step",
        labels: dict[str, str] | None = None,
        runs: list[str] | None = None,
        levels: list[str] | None = None,
        laws: dict[str, list[float]] | None = None,
        linear: list[str] | None = None,
        means: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.panels = [[entry] if isinstance(entry, str) else list(entry) for entry in quantities]
        self.quantities = [quantity for panel in self.panels for quantity in panel]
        if not self.panels or not all(self.panels):
            raise ValueError(f"CurveFigure.quantities = {quantities}: every panel must name at least one variable")
        self.x, self.labels, self.runs, self.levels = x, labels or {}, runs, levels or []
        self.laws, self.linear = laws or {}, set(linear or ())
        self.means = {*SHARES, *(means or ())}
        for quantity, law in self.laws.items():
            if len(law) != 2 or law[1] <= 0:
                raise ValueError(f"CurveFigure.laws.{quantity} = {law}: must be [exponent, x], with x > 0")

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if a quantity or x is missing."""
        for quantity in self.quantities:
            if quantity not in variables and quantity not in SHARES:
                recorded = ", ".join(sorted(variables)) or "nothing"
                raise ValueError(f"CurveFigure.quantities: {quantity!r} is not recorded; recorded: {recorded}")
        if self.x != "step" and self.x not in axes and self.x not in variables:
            raise ValueError(
                f"CurveFigure.x = {self.x!r}: must be step, an axis ({', '.join(axes) or 'none'}) or what is recorded "
                f"({', '.join(sorted(variables))})"
            )

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each line and x.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line` (its label), its axes, x under its own name; for each quantity the median `<quantity>`,
            `<quantity>_p10` and `<quantity>_p90`, infinite where they are lost to divergence, NaN where a variant has no
            such variable (of `means` the mean alone); the number of `members`; and the levels, `<quantity>_<variant>`.

        Raises:
            ValueError: If x or a quantity is missing or has no single number per member.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        rows = [row for name, data in self._lines(dataset, variants) for row in self._rows(name, data)]
        for name, data in self._level_runs(dataset, variants).items():
            for quantity in set(self.quantities) & set(map(str, data.data_vars)):
                level = float(quantiles(final(data, quantity).values.ravel(), (0.5,))[0])
                rows = [{**row, f"{quantity}_{name}": level} for row in rows]
        return columns_of(rows)

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        names = list(dict.fromkeys(table["line"].tolist()))
        colour = dict(zip(names, colours(len(names)), strict=True))
        lines = {name: {key: column[table["line"] == name] for key, column in table.items()} for name in names}
        handles = self._legend(table, colour, dataset)
        columns = 1 if max((len(handle.get_label()) for handle in handles), default=0) > 34 else 2
        figure, axes = panels(len(self.panels), header=0.14 * -(-len(handles) // columns))
        for panel, quantities in zip(axes, self.panels, strict=True):
            levels = {name: float(table[f"{quantities[0]}_{name}"][0])
                      for name in self._level_runs(dataset, variants) if f"{quantities[0]}_{name}" in table}  # fmt: skip
            self._draw_panel(panel, quantities, lines, colour, levels, dataset)
        if self.x not in self.linear:
            log_axis(axes[-1].xaxis, *_ends(table[self.x][table[self.x] > 0]))
        axes[-1].set_xlabel(self._text(self.x, dataset))
        figure.align_ylabels(axes)
        legend(figure, handles, columns)
        return figure

    # The numbers ------------------------------------------------------------------------------------------------------

    def _along_steps(self, data: xr.Dataset) -> bool:
        return self.x == "step" or self.x not in data.dims

    def _lines(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> Iterator[tuple[str, xr.Dataset]]:
        levels = self._level_runs(dataset, variants)
        drawn = {name: data for name, data in {"main": dataset, **variants}.items() if self._draws(name)}
        return ((name, data) for name, data in drawn.items() if name not in levels)

    def _draws(self, name: str) -> bool:
        return self.runs is None or name in self.runs

    def _level_runs(self, dataset: xr.Dataset, variants: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        without = {name for name, data in variants.items() if self.x in dataset.dims and self.x not in data.dims}
        return {name: data for name, data in variants.items() if name in {*self.levels, *without} and self._draws(name)}

    def _rows(self, name: str, data: xr.Dataset) -> list[Row]:
        known = [quantity for quantity in self.quantities if quantity in data or quantity in SHARES]
        along_steps = self._along_steps(data)
        members = _followed(data, known, self.x) if along_steps else _ended(data, known).sortby(self.x)
        along = "step" if along_steps else self.x
        if "seed" not in members.dims:
            members = members.expand_dims("seed")
        axes = [axis for axis in members[known[0]].dims if axis not in (along, "seed")] if known else []
        rows = []
        for values in product(*(members[axis].values for axis in axes)):
            cell = members.sel(dict(zip(axes, values, strict=True))).transpose(along, "seed")
            named = dict(zip(axes, values, strict=True))
            columns: Row = {along: cell[along].values}
            if self.x not in columns:
                with np.errstate(invalid="ignore"):
                    columns[self.x] = np.median(cell[self.x].values, axis=1)
            for quantity in known:
                array = cell[quantity].values
                if quantity in self.means:
                    columns[quantity] = array.mean(1)
                else:
                    low, columns[quantity], high = quantiles(array, (0.1, 0.5, 0.9))
                    columns |= {f"{quantity}_p10": low, f"{quantity}_p90": high}
                # A step at which only others were recorded.
                absent = np.isnan(array).all(1)
                for key in [key for key in columns if key in (quantity, f"{quantity}_p10", f"{quantity}_p90")]:
                    columns[key] = np.where(absent, np.nan, columns[key])
            several = {axis: value for axis, value in named.items() if members.sizes[axis] > 1}
            label = self._line_label(name, several, data)
            head = {"line": label, **named, "members": cell.sizes["seed"]}
            rows += [
                {**head, **{key: column[i] for key, column in columns.items()}}
                for i in range(len(columns[along]))
                if not all(np.isnan(columns[quantity][i]) for quantity in known)
            ]
        return rows

    def _line_label(self, name: str, values: Row, data: xr.Dataset) -> str:
        own = self.labels.get(name, "" if name == "main" else name.replace("_", " "))
        parts = (
            value_label(axis, value, data) if axis not in self.labels else _with_value(self.labels[axis], value)
            for axis, value in values.items()
        )
        return ", ".join(filter(None, [own, *parts]))

    # The drawing ------------------------------------------------------------------------------------------------------

    def _text(self, name: str, data: xr.Dataset) -> str:
        return self.labels.get(name, axis_label(name, data))

    def _draw_panel(
        self,
        panel: Axes,
        quantities: list[str],
        lines: dict[str, Row],
        colour: Row,
        levels: dict[str, float],
        data: xr.Dataset,
    ) -> None:
        shares = all(quantity in SHARES for quantity in quantities)
        linear = shares or bool(self.linear.intersection(quantities))
        keys = [key for quantity in quantities for key in (quantity, f"{quantity}_p10")]
        drawn = [line[key] for line in lines.values() for key in keys if key in line]
        drawn = finite(np.concatenate([*drawn, np.array(list(levels.values()))]))
        tops = [line[f"{key}_p90"] for line in lines.values() for key in quantities if f"{key}_p90" in line]
        tops = finite(np.concatenate([drawn, *tops]))
        if linear:
            ceiling = tops.max(initial=0)
        else:
            low, high = _ends(drawn[drawn > 0])
            high = max(high, min(tops.max(initial=0), 10 * high))
            log_axis(panel.yaxis, max(low, high * 10.0**-_MOST_DECADES), high)
            ceiling = panel.get_ylim()[1]
        each = "\n".join(self._text(quantity, data) for quantity in quantities)
        panel.set_ylabel(wrapped(self.labels.get(", ".join(quantities), each)))
        shade = min(0.18, 0.5 / (len(lines) * len(quantities)))
        for (name, line), (quantity, style) in product(lines.items(), zip(quantities, _STYLES, strict=False)):
            if quantity not in line or np.isnan(line[quantity]).all():
                continue
            there = ~np.isnan(line[quantity]) & ~np.isnan(line[self.x])
            there &= (line[self.x] > 0) | (self.x in self.linear)
            there &= (line[quantity] > 0) | linear
            x, y = line[self.x][there], line[quantity][there]
            if f"{quantity}_p10" in line:
                low, high = (np.minimum(line[f"{quantity}_{end}"][there], ceiling) for end in ("p10", "p90"))
                panel.fill_between(
                    x,
                    low,
                    high,
                    where=np.isfinite(line[f"{quantity}_p10"][there]),
                    color=colour[name],
                    alpha=shade,
                    linewidth=0,
                )
            marker = "" if len(x) > 40 else "o"
            panel.plot(x, np.where(np.isfinite(y), y, np.nan), color=colour[name], linestyle=style, linewidth=1.1,
                       marker=marker, markersize=2, zorder=3)  # fmt: skip
        if shares:
            panel.set_ylim(-0.03, 1.03)
        draw_levels(panel, {self._text(name, data): value for name, value in levels.items()})
        for quantity in quantities:
            if quantity in self.laws:
                self._draw_law(panel, quantity, next(iter(lines.values())))

    def _draw_law(self, panel: Axes, quantity: str, line: Row) -> None:
        exponent, at = self.laws[quantity]
        there = np.isfinite(line[quantity]) & (line[quantity] > 0) & (line[self.x] > 0)
        if there.sum() < 2:
            return
        x, y = np.log(line[self.x][there]), np.log(line[quantity][there])
        order = np.argsort(x)
        through = np.interp(np.log(at), x[order], y[order])
        ends = x.min(), x.max()
        limits = panel.get_ylim()
        panel.plot(np.exp(ends), [np.exp(through + exponent * (end - np.log(at))) for end in ends], color=GREY,
                   linestyle=_LAW_STYLE, linewidth=0.8, zorder=2)  # fmt: skip
        panel.set_ylim(limits)

    def _legend(self, table: dict[str, np.ndarray], colour: Row, data: xr.Dataset) -> list[Any]:
        handles: list[Any] = [
            Line2D([], [], color=of, linewidth=1.1, label=name) for name, of in colour.items() if name
        ]
        for quantities in self.panels:
            if len(quantities) > 1:
                handles += [Line2D([], [], color=GREY, linestyle=style, linewidth=1.1, label=self._text(quantity, data))
                            for quantity, style in zip(quantities, _STYLES, strict=False)]  # fmt: skip
        for quantity, (exponent, _) in self.laws.items():
            of = f" of {self._text(quantity, data)}" if len(self.laws) > 1 else ""
            handles.append(Line2D([], [], color=GREY, linestyle=_LAW_STYLE, linewidth=0.8,
                                  label=f"slope {exponent:g}{of}"))  # fmt: skip
        averaged = self.means.intersection(self.quantities)
        if len(averaged) < len(self.quantities):
            handles += spread(table["members"])
        if averaged and (size := table["members"].max()) > 1:
            handles.append(remark(f"{'shares' if averaged <= set(SHARES) else 'means'} of {size:g} seeds"))
        return handles


def _with_value(text: str, value: Any) -> str:
    return f"{text} {value}" if isinstance(value, str) else f"{text} {value:.3g}"


def _ended(data: xr.Dataset, quantities: list[str]) -> xr.Dataset:
    """The last records of some quantities."""
    status = data["status"].isel(step=-1)
    return xr.Dataset({q: (status == q).astype(float) if q in SHARES else final(data, q) for q in quantities})


def _followed(data: xr.Dataset, quantities: list[str], x: str) -> xr.Dataset:
    """Some quantities along the steps, infinite from where a member's divergence was seen."""
    lost = (data["status"] == "diverged").cumsum("step") > 0
    found = {}
    for quantity in quantities:
        if quantity in SHARES:
            found[quantity] = (data["status"] == quantity).astype(float)
            continue
        members_only(data, quantity)
        array = data[quantity]
        found[quantity] = array.where(~lost | array.isnull(), np.inf)
    return xr.Dataset(found if x == "step" or x in found else {**found, x: data[x].interpolate_na("step")})


def _ends(positive: np.ndarray) -> tuple[float, float]:
    return (float(positive.min()), float(positive.max())) if len(positive) else (1.0, 10.0)
