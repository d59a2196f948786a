"""What a constructor argument must be, and the one-line error when it is not.

Plain `float` and `int` annotations let NaN, infinity and null through from a config, so constructors call these.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """Return `value` as a float if it is a finite number in range, else raise ValueError naming it."""
    bounds = {f"above {above:g}": above} if above is not None else {}
    if at_least is not None:
        bounds[f"at least {at_least:g}"] = at_least
    must = " and ".join(["a finite number", *bounds])
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be {must}")
    if (above is not None and value <= above) or (at_least is not None and value < at_least):
        raise ValueError(f"{name} = {value!r}: must be {must}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (0 < value < math.inf):
        raise ValueError(f"{name} = {value!r}: must be positive and finite")
    return float(value)


def integer(name: str, value: Any, *, at_least: int = 0, at_most: int | None = None) -> int:
    """A whole number in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} = {value!r}: must be a whole number")
    if value < at_least:
        raise ValueError(f"{name} = {value!r}: must be at least {at_least}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} = {value!r}: must be at most {at_most}")
    return int(value)


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of the named choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
    return value
