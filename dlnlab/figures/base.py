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
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from dlnlab.files import write_atomic

COLUMN_WIDTH = 3.4
"""Inches of a column of a two-column paper."""
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
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"figures: name = {name!r}: must be a file name of letters, digits, '_', '-' and '.'")

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw what was recorded.

        Args:
            dataset: A run's results, as `load_results` gives them.
            **variants: Those of the run's variants.

        Returns:
            The figure, made by `panels`; nothing refers to it, so there is nothing to close.
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
        contents = {f".{kind}": _render(figure, kind) for kind in _METADATA}
        contents[".csv"] = _csv(self.table(dataset, **variants))
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / (self.name + suffix) for suffix in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomic(path, content)
        return paths


# The style -----------------------------------------------------------------------------------------------------------


def panels(count: int, height: float = 1.7, header: float = 0.0) -> tuple[Canvas, list[Axes]]:
    """An empty figure of a column's width: panels one above the other that share their x-axis.

    Args:
        count: How many panels.
        height: Inches of each, its part of the labels included.
        header: Further inches at the top, for a legend.

    Returns:
        The figure, with a canvas of its own and its layout kept free of overlaps, and its panels from the top.
    """
    figure = Canvas(figsize=(COLUMN_WIDTH, count * height + header + 0.3), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, hspace=0.02)
    axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set(linewidth=0.6, color=_INK)
        panel.tick_params(which="both", width=0.6, color=_INK, labelsize=SMALL_FONT_SIZE, labelcolor=_INK, pad=2)
        panel.tick_params(which="major", length=3)
        panel.tick_params(which="minor", length=1.5)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set(fontsize=FONT_SIZE, color=_INK)
    return figure, axes


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
    """Make an axis logarithmic, with a little room around [low, high] and at least one labelled tick.

    Args:
        axis: A panel's x- or y-axis.
        low: The smallest number that must be seen, > 0.
        high: The largest.
    """
    ends = np.log10([low, high])
    # The numbers 1, 2, 5, 10, ... are at most 0.4 decades apart, so half a decade always shows one.
    room = max(0.04 * (ends[1] - ends[0]), (0.5 - (ends[1] - ends[0])) / 2)
    first, last = ends[0] - room, ends[1] + room
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (10**first, 10**last)})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if last - first < 1.5 else (1,), numticks=7))
    axis.set_minor_locator(NullLocator() if last - first > 7 else LogLocator(subs=range(2, 10), numticks=99))
    plain = first > -3 and last < 3
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}" if plain else power_of_ten(number)))
    axis.set_minor_formatter(NullFormatter())


def power_of_ten(number: float) -> str:
    r"""A number, to one digit, with its power of ten.

    Args:
        number: The number, > 0.

    Returns:
        Text for matplotlib.

    Example:
        >>> print(power_of_ten(1e-6), power_of_ten(2e7))
        $10^{-6}$ $2\times10^{7}$
    """
    mantissa, exponent = f"{number:.0e}".split("e")
    factor = "" if mantissa == "1" else rf"{mantissa}\times"
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


# Numbers of a data set -----------------------------------------------------------------------------------------------


def last(array: xr.DataArray) -> xr.DataArray:
    """What was recorded last: at a step at which others were recorded and this was not, a number is NaN, a text empty.

    Args:
        array: A variable over (axes, step), or without steps.

    Returns:
        Over the axes.

    Raises:
        ValueError: If it is not one number per member.
    """
    if "step" not in array.dims:
        return array
    if trailing := array.dims[array.dims.index("step") + 1 :]:
        raise ValueError(f"figures: {array.name!r} must be one number per member, not one per {trailing}")
    recorded = array != "" if array.dtype.kind in "OU" else array.notnull()
    return array.isel(step=int(np.flatnonzero(recorded.any([dim for dim in array.dims if dim != "step"]))[-1]))


def final(data: xr.Dataset, quantity: str) -> xr.DataArray:
    """A quantity's last record, infinite for members that diverged.

    The guard takes them back to their last finite state, so that their values look harmless.

    Args:
        data: A run's results.
        quantity: A variable with one number per member.

    Returns:
        Over the axes.
    """
    return last(data[quantity]).where(last(data["status"]) != "diverged", np.inf)


def value_label(axis: str, value: Any) -> str:
    """What a legend says of a line at one value of an axis.

    Args:
        axis: Its name.
        value: The value.

    Returns:
        Text for matplotlib.

    Example:
        >>> value_label("batch_size", "full"), value_label("init_scale", 0.1)
        ('GD (full batch)', 'init scale 0.1')
    """
    if axis == "batch_size":
        return "GD (full batch)" if value == "full" else f"SGD, batch {value}"
    return f"{axis.replace('_', ' ')} {value}" if isinstance(value, str) else f"{axis.replace('_', ' ')} {value:g}"


def finite(values: np.ndarray) -> np.ndarray:
    """Those of some numbers that are finite.

    Args:
        values: Numbers of any shape.

    Returns:
        The finite ones (n,).
    """
    return values[np.isfinite(values)]


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
