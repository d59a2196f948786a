"""Ensemble: named axes -> members. Which experiments one fit runs, and how they are called."""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dlnlab import checks
from dlnlab.schedule import expand

MOST_MEMBERS = 1_000_000
"""Beyond this even the members' names do not fit into memory comfortably."""


def _check_lr(where: str, value: Any) -> Any:
    return checks.positive(where, value, "a step size")


def _check_seed(where: str, value: Any) -> Any:
    return checks.integer(where, value, at_most=2**62)


def _check_value(where: str, value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return checks.integer(where, value, at_least=-checks.LARGEST)
    try:
        return checks.number(where, value)
    except ValueError as error:
        raise ValueError(f"{error} or a text") from None


_CHECKS = {"lr": _check_lr, "seed": _check_seed}


class Ensemble:
    """The members one fit trains: the product of named axes, the last written axis varying fastest.

    Any axis can be read as an attribute with one entry per member: `ensemble.lr`, `ensemble.seed`,
    `ensemble.init_scale`; numbers come as tensors of shape (E,), texts as lists. Without a `seed` axis every member has
    seed 0.

    Args:
        root: The root of all random streams, in [0, 2^32).
        **axes: Each axis as `dlnlab.schedule.expand` reads it: a list, a scalar, `{log10: [lo, hi, n]}`,
            `{linear: [lo, hi, n]}`, `{range: n}`; for `seed` an integer n means range(n).

    Raises:
        ValueError: If an axis is empty, repeats a value or holds a value it cannot have.

    Example:
        >>> ensemble = Ensemble(lr=[0.1, 0.2], seed=3)
        >>> ensemble.num_members, ensemble.seed.tolist()
        (6, [0, 1, 2, 0, 1, 2])
    """

    def __init__(self, *, root: int = 0, **axes: Any) -> None:
        self.root = checks.integer("seed", root, at_most=2**32 - 1)
        self.axes: dict[str, list[Any]] = {}
        for name, spec in axes.items():
            if name == "seed" and isinstance(spec, int) and not isinstance(spec, bool):
                spec = {"range": checks.integer("ensemble.seed", spec, at_least=1, at_most=MOST_MEMBERS)}
            where = f"ensemble.{name}"
            check = _CHECKS.get(name, _check_value)
            values = [check(f"{where}[{i}]", value) for i, value in enumerate(expand(spec, where))]
            first: dict[Any, int] = {}
            for i, value in enumerate(values):
                if first.setdefault(value, i) != i:
                    raise ValueError(f"{where}[{i}] = {value!r} repeats {where}[{first[value]}]: give it once")
            self.axes[name] = values
        if self.num_members > MOST_MEMBERS:
            raise ValueError(
                f"ensemble: {self.num_members:,} members would need more than {self.num_members * 1024:,} bytes; "
                f"at most {MOST_MEMBERS:,} fit into one run"
            )
        self.data_axes: tuple[str, ...] = ()
        """The axes that change the data, set by the data in its setup."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis, in the order written."""
        return tuple(len(values) for values in self.axes.values())

    @property
    def num_members(self) -> int:
        """E, the number of members."""
        return math.prod(self.shape)

    def values(self, name: str) -> list[Any]:
        """The value of one axis for every member, a list of length E."""
        position = list(self.axes).index(name)
        return [combination[position] for combination in product(*self.axes.values())]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "axes":
            raise AttributeError(name)
        if name not in self.axes:
            if name == "seed":
                return torch.zeros(self.num_members, dtype=torch.int64)
            raise AttributeError(f"the ensemble has no axis {name!r}; its axes are {', '.join(self.axes) or 'none'}")
        values = self.values(name)
        return values if any(isinstance(value, str) for value in values) else torch.tensor(values, dtype=_dtype(values))

    @property
    def labels(self) -> list[dict[str, Any]]:
        """One dictionary {axis: value} per member."""
        return [dict(zip(self.axes, combination, strict=True)) for combination in product(*self.axes.values())]

    def label(self, member: int) -> str:
        """One member's name for messages, `lr=0.1, seed=3`."""
        return (
            ", ".join(
                f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in self.labels[member].items()
            )
            or "the only member"
        )

    def group(self, names: tuple[str, ...]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Number the distinct combinations of some axes.

        Args:
            names: Axis names; those the ensemble lacks are ignored.

        Returns:
            The combination of each member, int64 (E,), and the combinations in order of first appearance.
        """
        present = [name for name in self.axes if name in names]
        number: dict[tuple, int] = {}
        index = [number.setdefault(tuple(label[name] for name in present), len(number)) for label in self.labels]
        return torch.tensor(index), [dict(zip(present, combination, strict=True)) for combination in number]

    @property
    def data_index(self) -> Tensor:
        """The problem of each member, int64 (E,): members of one seed and equal data axes share one copy."""
        return self.group(("seed", *self.data_axes))[0]

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(f'{name}: {len(values)}' for name, values in self.axes.items())})"


def _dtype(values: list[Any]) -> torch.dtype:
    return torch.int64 if all(isinstance(value, int) for value in values) else torch.float64
