"""Figure: what every figure promises, and the style they share.

A subclass writes `draw(dataset, **variants)`, recorded results -> a matplotlib figure, and `table(dataset,
**variants)`, the numbers it plots:

    class FinalLossFigure(Figure):
        def draw(self, dataset):
            figure, (panel,) = panels(1)
            panel.hist(np.log10(self.table(dataset)["train_loss"]), color=GREY)
            return figure

        def table(self, dataset):
            return {"train_loss": dataset.train_loss.isel(step=-1).values.ravel()}

It inherits `save`, which writes the figure for the screen and for a paper and its numbers beside it, and may override
`check`, which is asked before a fit starts whether the figure can be drawn from what will be recorded.

Everything is drawn with matplotlib's objects and explicit styles: no pyplot, no rcParams. Figures can be drawn in any
thread, need no display, and never change how a person's own plots look.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from dlnlab import checks
from dlnlab.figures.words import words
from dlnlab.files import write_atomic

COLUMN_WIDTH = 3.4
"""Inches of a column of a two-column paper."""
PAGE_WIDTH = 7.0
"""Inches of both."""
MOST_COLUMNS = 6
"""Panels side by side."""
FONT_SIZE = 8.0
SMALL_FONT_SIZE = 7.0
GREY = "#6e6e6e"

_DPI = 300
_INK = "#262626"
# Okabe and Ito's palette, told apart with every common colour blindness; its yellow is too faint for a line.
_PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Dates and versions are left out, so that the same results give the same bytes.
_METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}


class Canvas(MatplotlibFigure):
    """A matplotlib figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        return _render(self, "png", dpi=_DPI / 2)


class Figure:
    """Recorded results -> matplotlib figure.

    Args:
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: If the name is no plain file name.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = _snake_case(type(self).__name__) if name is None else name
        checks.file_name("figures: name", self.name)

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw what was recorded.

        Args:
            dataset: A run's results, as `load_results` gives them.
            **variants: Those of the run's variants.

        Returns:
            The figure, made by `panels`; nothing refers to it, so there is nothing to close.

        Raises:
            ValueError: If what it draws is missing.
        """
        raise NotImplementedError

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers.

        Args:
            dataset: A run's results.
            **variants: Those of the run's variants.

        Returns:
            Columns of equal length, each an array (rows,).
        """
        raise NotImplementedError

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError, before a fit starts, if the figure could not be drawn from it.

        Args:
            variables: What will be recorded.
            axes: The ensemble's axes and their values.
        """

    def save(self, dataset: xr.Dataset, directory: str | Path, **variants: xr.Dataset) -> list[Path]:
        """Write `<name>.png`, `<name>.pdf` and the plotted numbers, `<name>.csv`.

        All three are made before the first is written, and each is whole or absent. The same results give the same
        bytes.

        Args:
            dataset: A run's results.
            directory: Where to; it is made if need be.
            **variants: Results of the run's variants.

        Returns:
            The three paths.
        """
        figure = self.draw(dataset, **variants)
        # One layout for both files: it takes as long as drawing, and would be found anew, twice for each.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        contents = {f".{kind}": _render(figure, kind) for kind in _METADATA}
        contents[".csv"] = _csv(self.table(dataset, **variants))
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / (self.name + suffix) for suffix in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomic(path, content)
        return paths


# The style -----------------------------------------------------------------------------------------------------------


def panels(
    count: int, height: float = 1.7, header: float = 0.0, columns: int = 1, sharey: bool = False
) -> tuple[Canvas, list[Axes]]:
    """An empty figure of a column's width, or a page's if it has several columns: panels that share their x-axis.

    Args:
        count: How many rows of panels, one above the other.
        height: Inches of each, its part of the labels included.
        header: Further inches at the top, for a legend.
        columns: How many panels a row has.
        sharey: Whether the panels of a row share their y-axis.

    Returns:
        The figure, with a canvas of its own and its layout kept free of overlaps, and its panels from the top, row by
        row.
    """
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Canvas(figsize=(width, count * height + header + 0.3), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.02)
    grid = figure.subplots(count, columns, sharex=True, sharey="row" if sharey else False, squeeze=False)
    axes = list(grid.ravel())
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set(linewidth=0.6, color=_INK)
        panel.tick_params(which="both", width=0.6, color=_INK, labelsize=SMALL_FONT_SIZE, labelcolor=_INK, pad=2)
        panel.tick_params(which="major", length=3)
        panel.tick_params(which="minor", length=1.5)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set(fontsize=FONT_SIZE, color=_INK)
    return figure, axes


def legend(figure: Canvas, handles: list[Any], columns: int) -> None:
    """A legend above the panels.

    Args:
        figure: The figure.
        handles: Its entries; with none, no legend is made.
        columns: How many entries stand side by side, where the figure is wide enough for that.
    """
    if not handles:
        return
    for number in range(columns, 0, -1):
        made = figure.legend(handles=handles, loc="outside upper center", ncols=number, frameon=False,
                             fontsize=SMALL_FONT_SIZE, handlelength=1.8, columnspacing=1.2, labelspacing=0.25,
                             borderaxespad=0.1)  # fmt: skip
        if number == 1 or made.get_window_extent(figure.canvas.get_renderer()).width <= figure.bbox.width:
            return
        made.remove()


def spread(sizes: Iterable[int], middle: str = "median", of: str = "seeds") -> list[Any]:
    """The legend's entry for lines that stand for several members, with a band from 10 % to 90 %.

    Args:
        sizes: How many members the lines stand for.
        middle: What the line is of them: `median` or `mean`.
        of: What the members are.

    Returns:
        One entry, or none where every line is a single member.
    """
    counts = sorted({int(size) for size in sizes})
    if counts[-1] < 2:
        return []
    label = f"{middle}, 10–90 % of {'–'.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} {of}"
    return [Patch(color=GREY, alpha=0.25, linewidth=0, label=label)]


def remark(text: str) -> Any:
    """A legend entry without a mark: what holds for all lines.

    Args:
        text: The words.

    Returns:
        The entry.
    """
    return Line2D([], [], alpha=0, label=text)


def draw_levels(panel: Axes, levels: dict[str, float]) -> None:
    """Draw horizontal lines, each with its name at the right, outside the panel, where it hides no data.

    Args:
        panel: The panel, whose limits are set.
        levels: Their names and values; those that are not finite are left out.
    """
    ordered = sorted((item for item in levels.items() if np.isfinite(item[1])), key=lambda item: -item[1])
    for place, (name, value) in enumerate(ordered):
        panel.axhline(value, color=GREY, linewidth=0.7, zorder=0.5)
        # The highest name stands on its line and the others hang below theirs, so that two never meet.
        alignment = "center" if len(ordered) == 1 else "top" if place else "bottom"
        panel.annotate(name, (1, value), xycoords=panel.get_yaxis_transform(), xytext=(3, 0), textcoords="offset points",
                       va=alignment, fontsize=SMALL_FONT_SIZE, color=GREY, annotation_clip=False)  # fmt: skip


def colours(count: int) -> list[Any]:
    """As many colours as there are lines, told apart with every common colour blindness.

    Args:
        count: How many; beyond seven they are an ordered scale instead of a palette.

    Returns:
        Colours as matplotlib takes them.
    """
    if count <= len(_PALETTE):
        return list(_PALETTE[:count])
    return [matplotlib.colormaps["viridis"](position) for position in np.linspace(0, 0.9, count)]


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Make an axis logarithmic, with a little room around [low, high] and at least two labelled ticks.

    Args:
        axis: A panel's x- or y-axis.
        low: The smallest number that must be seen, > 0.
        high: The largest.
    """
    ends = np.log10([low, high])
    room = max(0.04 * (ends[1] - ends[0]), (0.1 - (ends[1] - ends[0])) / 2)
    first, last = ends[0] - room, ends[1] + room
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (10**first, 10**last)})
    axis.set_major_locator(LogTicks())
    axis.set_minor_locator(NullLocator() if last - first > 7 else LogLocator(subs=range(2, 10), numticks=99))
    axis.set_major_formatter(log_format(first, last))
    axis.set_minor_formatter(NullFormatter())


def log_format(first: float, last: float) -> FuncFormatter:
    """Labels of a logarithmic axis: numbers, or where it goes far from 1 their powers of ten.

    Args:
        first: The logarithm to base 10 of its lower end.
        last: That of its upper end.

    Returns:
        The formatter.
    """
    plain = first > -3 and last < 3
    return FuncFormatter(lambda number, _: f"{number:g}" if plain else power_of_ten(number))


class LogTicks(Locator):
    """Ticks of a logarithmic axis: powers of ten, or numbers 1, 2, 5 of each decade, or round numbers; two at least.

    Example:
        >>> LogTicks().tick_values(1.2, 25).tolist()
        [2.0, 5.0, 10.0, 20.0]
    """

    def __call__(self) -> np.ndarray:
        """The ticks of the axis as it is."""
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        """The ticks within an interval.

        Args:
            vmin: Its lower end, > 0.
            vmax: Its upper end.

        Returns:
            The first of the three kinds of which two or more lie in it.
        """
        decades = LogLocator(numticks=7)
        kinds = (LogLocator(subs=(1, 2, 5), numticks=9), decades, MaxNLocator(5))
        for locator in kinds if vmax < 10**1.5 * vmin else (decades, *kinds):
            ticks = np.asarray(locator.tick_values(vmin, vmax))
            ticks = ticks[(ticks >= vmin) & (ticks <= vmax)]
            if len(ticks) > 1:
                break
        return ticks


def power_of_ten(number: float) -> str:
    r"""A number, to at most three digits, with its power of ten.

    Args:
        number: The number, > 0.

    Returns:
        Text for matplotlib.

    Example:
        >>> print(power_of_ten(1e-6), power_of_ten(2.5e7))
        $10^{-6}$ $2.5\times10^{7}$
    """
    mantissa, exponent = f"{number:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else rf"{float(mantissa):g}\times"
    return rf"${factor}10^{{{int(exponent)}}}$"


def quantiles(values: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Quantiles over the last axis, where NaN and infinity are infinitely large.

    A quantile that lies between a number and infinity is infinite: a median is finite where fewer than half of the
    values are infinite.

    Args:
        values: Numbers (..., n).
        levels: In [0, 1].

    Returns:
        Quantiles (levels, ...).

    Example:
        >>> quantiles(np.array([1.0, 2.0, 4.0, np.nan]), (0.5, 0.9)).tolist()
        [3.0, inf]
    """
    values = np.where(np.isnan(values), np.inf, values)
    with np.errstate(invalid="ignore"):
        found = np.quantile(values, levels, axis=-1)
    return np.where(np.isnan(found), np.quantile(values, levels, axis=-1, method="higher"), found)


# The numbers ---------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The members that differ in their seed alone."""

    words: dict[str, str]
    """What tells it from others, by axis; `variant` where it is one."""
    values: dict[str, Any]
    """Its value on each axis; `variant` ("" for the run itself) where there are variants."""
    data: xr.Dataset
    """Its results, with `seed` as the first dimension."""

    def label(self, without: str | None = None) -> str:
        """The words, for a legend, but for those of one axis (a panel's title says them)."""
        return ", ".join(words for axis, words in self.words.items() if axis != without and words)


def cells(dataset: xr.Dataset, variants: dict[str, xr.Dataset], apart: Collection[str] = ()) -> list[Cell]:
    """A run and its variants, divided into cells.

    Args:
        dataset: A run's results.
        variants: Those of its variants.
        apart: Axes that stay dimensions of the cells (`lr`).

    Returns:
        The cells, in the order of the axes; those of variants behind the run's. An axis of one value is not worth words,
        but for the batch size.
    """
    found = []
    for variant, data in {"": dataset, **variants}.items():
        kept = ("seed", "step", *(axis for axis in apart if axis in data.dims))
        data = data if "seed" in data.dims else data.expand_dims(seed=[0])
        axes = [axis for axis in data["status"].dims if axis not in kept]
        for combination in product(*(data[axis].values for axis in axes)):
            values = dict(zip(axes, combination, strict=True))
            said = {axis: value for axis, value in values.items() if data.sizes[axis] > 1 or axis == "batch_size"}
            words = {"variant": variant.replace("_", " ")} if variants else {}
            words |= {axis: value_label(axis, value, data) for axis, value in said.items()}
            found.append(
                Cell(
                    words,
                    {"variant": variant, **values} if variants else values,
                    data.sel(values).transpose("seed", ...),
                )
            )
    return found


def value_label(axis: str, value: Any, data: xr.Dataset | None = None) -> str:
    """An axis's value in words, `SGD, batch 1` or `init scale 0.1`; the symbol and the unit of lr are the data's."""
    if axis == "variant":
        return str(value).replace("_", " ")
    if axis == "batch_size":
        return "GD (full batch)" if value == "full" else f"SGD, batch {value}"
    if axis == "lr":
        unit = {"one": "", "max_row": r"$/\max_i |x_i|^2$"}.get(
            "one" if data is None else data.attrs.get("lr_unit", "one"), " edge"
        )
        return rf"${lr_symbol(data)}$ = {value:.3g}{unit}"
    return value.replace("_", " ") if isinstance(value, str) else f"{words(axis)} {value:g}"


def lr_symbol(data: xr.Dataset | None) -> str:
    """What the step size is called in figures of these results, TeX without dollar signs."""
    return r"\gamma" if data is None else data.attrs.get("lr_symbol", r"\gamma")


def last(array: xr.DataArray) -> xr.DataArray:
    """What was recorded last of a variable.

    At a step at which only others were recorded, a number is NaN and a text empty.
    """
    if "step" not in array.dims:
        return array
    recorded = array != "" if array.dtype.kind in "OU" else array.notnull()
    steps = np.flatnonzero(recorded.any([dim for dim in array.dims if dim != "step"]))
    return array.isel(step=int(steps[-1]) if len(steps) else -1)  # -1: it was defined for no member at any step


def final(data: xr.Dataset, quantity: str) -> xr.DataArray:
    """What was recorded last of a variable, infinite for diverged members.

    The guard takes them back to their last finite state, so what was kept of them looks harmless.
    """
    members_only(data, quantity)
    return last(data[quantity]).where(last(data["status"]) != "diverged", np.inf)


def members_only(data: xr.Dataset, quantity: str) -> None:
    """Raise ValueError if a variable has more than one number per member."""
    if trailing := [str(dim) for dim in data[quantity].dims if dim not in data["status"].dims]:
        raise ValueError(f"figures: {quantity!r} must be one number per member, not one per {', '.join(trailing)}")


def lr_label(dataset: xr.Dataset) -> str:
    """The step size with its unit, for an axis."""
    unit = _UNITS.get(dataset.attrs.get("lr_unit", "one"), dataset.attrs.get("lr_unit"))
    return rf"step size ${lr_symbol(dataset)}$ {unit}".rstrip()


EDGES = {
    "flow_edge": "(2/sharpness at the flow's end)",
    "mean_square_edge": "own edge (GD: 2/sharpness)",
}
"""Step sizes that others are measured by, in words."""
_UNITS = {"one": "", "max_row": r"$\times\,\max_i |x_i|^2$"} | {name: f"/ {words}" for name, words in EDGES.items()}


def axis_label(name: str, dataset: xr.Dataset) -> str:
    """The words for an axis of the ensemble or for a variable, beside a figure's axis."""
    return lr_label(dataset) if name == "lr" else words(name, dataset)


def finite(values: np.ndarray) -> np.ndarray:
    """Those of some numbers that are finite.

    Args:
        values: Numbers of any shape.

    Returns:
        The finite ones (n,).
    """
    return values[np.isfinite(values)]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of a table as its columns, NaN where a row has no such entry.

    Args:
        rows: One mapping for each row.

    Returns:
        name -> (rows,), in the order in which the names come.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


# Files ---------------------------------------------------------------------------------------------------------------


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _render(figure: Canvas, kind: str, dpi: float = _DPI) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=_METADATA[kind], dpi=dpi)
    return buffer.getvalue()


def _csv(table: dict[str, np.ndarray]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    return text.getvalue().encode()
