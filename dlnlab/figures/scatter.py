"""ScatterFigure: one quantity against others, member by member."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    GREY,
    SMALL_FONT_SIZE,
    Canvas,
    Figure,
    colours,
    last,
    legend,
    log_axis,
    panels,
    remark,
    value_label,
)
from dlnlab.figures.words import words, wrapped

_MOST_KEYS, _FEWEST = 6, 4


class ScatterFigure(Figure):
    """Final values of quantities against one, a dot for each member; both axes logarithmic.

    Left out are members that have diverged or, where train_loss is recorded, whose last one is not below `settled` times
    the first, and numbers that are not positive and finite. Above each panel: Spearman's rank correlation among the
    members of a seed and a colour, its median over seeds (instances differ more than what one does to them).

    Args:
        x: The variable along the horizontal axis, one number per member.
        y: Variables along the vertical axes, a panel each.
        colour: An axis of the ensemble whose values the colours tell.
        diagonal: Draw the line y = x.
        settled: As above.
        name: The files' name without suffix; None is `scatter_figure`.

    Raises:
        ValueError: If y is empty.
    """

    def __init__(
        self,
        x: str = "distance",
        y: list[str] = ["train_loss"],  # noqa: B006 - never changed
        colour: str | None = None,
        diagonal: bool = False,
        settled: float = 0.01,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not y:
            raise ValueError("ScatterFigure.y = []: must name at least one variable")
        self.x, self.y, self.colour, self.diagonal = x, y, colour, diagonal
        self.settled = checks.positive("ScatterFigure.settled", settled)

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError if a variable or the axis of the colours is missing."""
        for name in (self.x, *self.y):
            if name not in variables:
                raise ValueError(f"ScatterFigure: {name!r} is not recorded; recorded: {', '.join(sorted(variables))}")
        if self.colour is not None and self.colour not in axes:
            raise ValueError(f"ScatterFigure.colour: no axis {self.colour!r}; the axes are {', '.join(axes) or 'none'}")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """The plotted numbers, a row for each member that is left.

        Args:
            dataset: A run's results.
            **variants: Not used.

        Returns:
            The axes of the ensemble, x and every y; NaN where a y is not drawn.
        """
        self.check({str(name) for name in dataset.data_vars}, {str(axis): [] for axis in dataset.dims})
        members = xr.Dataset({name: last(dataset[name]) for name in (self.x, *self.y)})
        axes = [str(axis) for axis in members.dims]
        there = last(dataset["status"]) != "diverged"
        if "train_loss" in dataset:
            there &= last(dataset["train_loss"]) <= self.settled * dataset["train_loss"].isel(step=0, drop=True)
        members = members.where(there & np.isfinite(members) & (members > 0))
        if not axes:
            return {name: np.atleast_1d(members[name].values) for name in (self.x, *self.y)}
        flat = members.stack(member=axes).reset_index("member").reset_coords(axes)
        flat = flat.isel(member=np.flatnonzero(flat[self.x].notnull()))
        return {name: flat[name].values for name in (*axes, self.x, *self.y)}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        kinds = [""] if self.colour is None else dataset[self.colour].values.tolist()
        colour = dict(zip(kinds, colours(len(kinds)), strict=True))
        handles: list[Any] = []
        if self.colour is not None:
            places = np.unique(np.linspace(0, len(kinds) - 1, min(len(kinds), _MOST_KEYS)).round().astype(int))
            handles = [
                Line2D([], [], color=colour[kinds[i]], marker="o", markersize=3, linewidth=0,
                       label=value_label(self.colour, kinds[i], dataset))
                for i in places
            ]  # fmt: skip
        if self.diagonal:
            handles.append(Line2D([], [], color=GREY, linewidth=0.7, label="equal"))
        handles.append(remark("a dot for each member"))
        figure, axes = panels(len(self.y), header=0.14 * -(-len(handles) // 3))
        ends = table[self.x].min(initial=np.inf), table[self.x].max(initial=0)
        ends = ends if ends[1] > 0 else (0.1, 1.0)
        for panel, name in zip(axes, self.y, strict=True):
            y = table[name]
            drawn = np.isfinite(y)
            low, high = (y[drawn].min(), y[drawn].max()) if drawn.any() else (0.1, 1.0)
            log_axis(panel.yaxis, low, high)
            panel.set_ylabel(wrapped(words(name, dataset)))
            if self.diagonal:
                panel.axline((ends[0], ends[0]), (2 * ends[0], 2 * ends[0]), color=GREY, linewidth=0.7, zorder=1)
            of = np.full(len(y), "", dtype=object) if self.colour is None else table[self.colour]
            for kind in kinds:
                chosen = drawn & (of == kind)
                panel.plot(table[self.x][chosen], y[chosen], "o", color=colour[kind], markersize=2, alpha=0.6,
                           markeredgewidth=0)  # fmt: skip
            panel.set_title(self._correlations(table, name, kinds, dataset), fontsize=SMALL_FONT_SIZE, pad=2)
        log_axis(axes[-1].xaxis, *ends)
        axes[-1].set_xlabel(words(self.x, dataset))
        figure.align_ylabels(axes)
        legend(figure, handles, 3)
        return figure

    def _correlations(self, table: dict[str, np.ndarray], name: str, kinds: list[Any], data: xr.Dataset) -> str:
        """The text above a panel; empty where a seed has too few members, or colours are many."""
        if self.colour == "seed" or len(kinds) > _MOST_KEYS or "seed" not in table:
            return ""
        texts, counts = [], []
        for kind in kinds:
            found = []
            for seed in np.unique(table["seed"]):
                chosen = np.isfinite(table[name]) & (table["seed"] == seed)
                chosen &= True if self.colour is None else table[self.colour] == kind
                ranks = [table[key][chosen].argsort().argsort() for key in (self.x, name)]
                if chosen.sum() > _FEWEST:
                    found.append(np.corrcoef(ranks)[0, 1])
            if found:
                label = "" if self.colour is None else f"{value_label(self.colour, kind, data)}: "
                texts.append(f"{label}{np.median(found):.2f}")
                counts.append(len(found))
        if not texts:
            return ""
        seeds = "–".join(str(count) for count in sorted({min(counts), max(counts)}))
        return f"rank correlation within a seed, median of {seeds} seeds\n{'   '.join(texts)}"
