"""RankFigure: singular values and the rank they make, over time."""

from collections.abc import Collection
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.lines import Line2D

from dlnlab import checks
from dlnlab.figures.base import (
    Canvas,
    Figure,
    colours,
    legend,
    log_axis,
    panels,
    quantiles,
    remark,
    spread,
    value_label,
)
from dlnlab.figures.words import words, wrapped

_FLOOR = 1e-12
"""Of a singular value beside the largest: below there is only rounding."""


class RankFigure(Figure):
    """Singular values of every member, the mean rank and the median error over time, from `RankTracker`'s records.

    Each cell of the grid (all axes but `seed`) and each variant is a line; the singular values are drawn for each member
    by itself, relative to the largest: medians would blur jumps that come at different times. A member that diverged is
    left out from then on.

    Args:
        index: Which singular value is drawn, 2 is the second.
        errors: What is drawn below the rank, of `distance`, `test_loss`, `train_loss` and the like, where recorded.
        x: `step` or `time`.
        log_time: Draw it logarithmically.
        leave_out: Variants (or `main`) that are not drawn: what others start from.
        labels: Texts for variants (`main` is the run itself) and for values of axes that are names.
        name: The files' name without suffix; None is the class's in snake_case.

    Raises:
        ValueError: If the index is below 2; before a fit, if no ranks are recorded.
    """

    def __init__(
        self,
        index: int = 2,
        errors: list[str] | None = None,
        x: Literal["step", "time"] = "step",
        log_time: bool = False,
        leave_out: list[str] | None = None,
        labels: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.index = checks.integer("index", index, at_least=2)
        self.errors = ["distance"] if errors is None else errors
        self.x = checks.one_of("RankFigure.x", x, ("step", "time"))
        self.log_time = checks.flag("log_time", log_time)
        self.leave_out, self.labels = leave_out or [], labels or {}

    def check(self, variables: set[str], axes: dict[str, list]) -> None:
        """Raise ValueError unless `RankTracker` measures."""
        del axes
        if not {"rank", "singular_values"} <= variables:
            raise ValueError("RankFigure: needs rank and singular_values; add RankTracker to trainer.callbacks")

    def table(self, dataset: xr.Dataset, **variants: xr.Dataset) -> dict[str, np.ndarray]:
        """A row for each line, member and recorded step.

        Args:
            dataset: A run's results.
            **variants: Those of its variants.

        Returns:
            `line`, `member`, `step`, `time`, `singular_value` (relative to the largest, NaN where there is none), `rank`
            and the errors; NaN after a divergence.
        """
        columns: dict[str, list[Any]] = {}
        names = ["rank", *self.errors]
        for line in cells(dataset, variants, self.leave_out, self.labels):
            label, cell = line.name, line.members
            kept = cell.isel(step=np.flatnonzero(cell["rank"].notnull().any("seed").values))
            alive = (kept["status"] != "diverged").values
            values = kept["singular_values"].values
            second = values[..., self.index - 1] / values[..., 0] if values.shape[-1] >= self.index else np.nan
            found = {"singular_value": second * np.ones_like(kept["rank"].values)}
            found |= {name: kept[name].values if name in kept else np.full(alive.shape, np.nan) for name in names}
            seeds, at = np.indices(alive.shape)
            steps = kept.step.values[at.ravel()]
            found = {name: np.where(alive, value, np.nan) for name, value in found.items()}
            rows = {"line": np.full(alive.size, label), "member": seeds.ravel(), "step": steps}
            rows["time"] = kept["time"].broadcast_like(kept["rank"]).transpose("seed", "step").values
            for name, value in {**rows, **found}.items():
                columns.setdefault(name, []).append(np.ravel(value))
        return {name: np.concatenate(parts) for name, parts in columns.items()}

    def draw(self, dataset: xr.Dataset, **variants: xr.Dataset) -> Canvas:
        """Draw the table; see `Figure.draw`."""
        table = self.table(dataset, **variants)
        errors = [name for name in self.errors if np.isfinite(table[name]).any()]
        lines = list(dict.fromkeys(table["line"].tolist()))
        colour = dict(zip(lines, colours(len(lines)), strict=True))
        handles = self._legend(dataset, variants, colour, bool(errors))
        columns = 1 if max(len(handle.get_label()) for handle in handles) > 34 else 2
        figure, axes = panels(2 + len(errors), header=0.14 * -(-len(handles) // columns))
        top, middle, *below = axes
        log_axis(top.yaxis, _FLOOR, 1.0)
        for line in lines:
            own = {name: column[table["line"] == line] for name, column in table.items()}
            for member in np.unique(own["member"]):
                one = own["member"] == member
                height = np.maximum(own["singular_value"][one], _FLOOR)
                top.plot(own[self.x][one], height, color=colour[line], linewidth=0.5, alpha=0.6)
            steps = np.unique(own["step"])
            by_step = {name: own[name].reshape(-1, len(steps)) for name in (self.x, "rank", *errors)}
            at = np.median(by_step[self.x], axis=0)
            mean = np.ma.masked_invalid(by_step["rank"]).mean(0)
            middle.plot(at, mean.filled(np.nan), color=colour[line], linewidth=1.1)
            for name, panel in zip(errors, below, strict=True):
                low, centre, high = quantiles(by_step[name].T, (0.1, 0.5, 0.9))
                panel.fill_between(at, low, high, color=colour[line], alpha=0.15, linewidth=0)
                panel.plot(at, np.where(np.isfinite(centre), centre, np.nan), color=colour[line], linewidth=1.1)
        top.set_ylabel(rf"$s_{self.index}/s_1$ of each member")
        middle.set_ylabel("mean rank")
        for name, panel in zip(errors, below, strict=True):
            drawn = table[name][np.isfinite(table[name]) & (table[name] > 0)]
            log_axis(panel.yaxis, np.quantile(drawn, 0.01), np.quantile(drawn, 0.99))
            panel.set_ylabel(wrapped(words(name, dataset)))
        if self.log_time:
            positive = table[self.x][table[self.x] > 0]
            log_axis(axes[-1].xaxis, positive.min(), positive.max())
        axes[-1].set_xlabel(words(self.x))
        figure.align_ylabels(axes)
        legend(figure, handles, columns)
        return figure

    def _legend(
        self, dataset: xr.Dataset, variants: dict[str, xr.Dataset], colour: dict[str, Any], with_band: bool
    ) -> list[Any]:
        drawn = cells(dataset, variants, self.leave_out, self.labels)
        handles: list[Any] = []
        if len(drawn) > 1:
            handles = [Line2D([], [], color=colour[line.name], linewidth=1.1, label=line.words) for line in drawn]
        sizes = [line.members.sizes["seed"] for line in drawn]
        return handles + (spread(sizes) if with_band else [remark(f"{max(sizes)} members a line")] * (max(sizes) > 1))


class Line(NamedTuple):
    """A cell of the grid (all axes but `seed`) of a run or a variant."""

    name: str
    """What it is called in a table, `sgd, lr 0.1`."""
    words: str
    """What it is called in a legend."""
    members: xr.Dataset
    """Its results, `seed` and `step` the first dimensions."""


def cells(
    dataset: xr.Dataset, variants: dict[str, xr.Dataset], leave_out: Collection[str], labels: dict[str, str]
) -> list[Line]:
    """The cells of a run and of its variants.

    Args:
        dataset: A run's results.
        variants: Those of its variants.
        leave_out: Variants (or `main`) without cells.
        labels: Words for variants (`main` is the run itself) and for values of axes.

    Returns:
        The cells; an axis of one value is not worth words.
    """
    found = []
    for variant, data in {"main": dataset, **variants}.items():
        if variant in leave_out:
            continue
        data = data if "seed" in data.dims else data.expand_dims("seed")
        axes = [str(axis) for axis in data["status"].dims if axis not in ("seed", "step")]
        varied = [axis for axis in axes if data.sizes[axis] > 1]
        run = variant.replace("_", " ") if variants else ""
        for place in product(*(range(data.sizes[axis]) for axis in axes)):
            cell = data.isel(dict(zip(axes, place, strict=True))).transpose("seed", "step", ...)
            values = {axis: cell[axis].item() for axis in varied}
            named = [run, *(f"{axis.replace('_', ' ')} {_shown(value)}" for axis, value in values.items())]
            of_axes = (labels.get(value, value_label(axis, value, data)) for axis, value in values.items())
            said = [labels.get(variant, run), *of_axes]
            found.append(Line(*(", ".join(filter(None, parts)) or "all" for parts in (named, said)), cell))
    return found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")
