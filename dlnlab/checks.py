"""What a constructor argument must be, and the one-line error when it is not.

Plain `float` and `int` annotations let NaN, infinity and null through from a config, so constructors call these.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

LARGEST = 2**53
"""No count, step or size is larger: up to here every whole number is exact in float64."""
_SHOWN = 80


def shown(value: Any) -> str:
    """A value as messages show it: as Python writes it, but not at any length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = f"a number of {value.bit_length():,} bits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]} ... {text[-10:]}"


def number(name: str, value: Any, *, above: float | None = None, at_least: float | None = None) -> float:
    """Return `value` as a float if it is a finite number in range, else raise ValueError naming it."""
    bounds = [] if above is None else [f"above {above:g}"]
    bounds += [] if at_least is None else [f"at least {at_least:g}"]
    found = _float(value)
    if found is None or (above is not None and found <= above) or (at_least is not None and found < at_least):
        raise ValueError(f"{name} = {shown(value)}: must be {' and '.join(['a finite number', *bounds])}")
    return found


def positive(name: str, value: Any, what: str = "") -> float:
    """A finite number above zero; `what` it is, for the message, as in `a step size`."""
    found = _float(value)
    if found is None or found <= 0:
        raise ValueError(f"{name} = {shown(value)}: {what}{' ' if what else ''}must be positive and finite")
    return found


def integer(name: str, value: Any, *, at_least: int = 0, at_most: int = LARGEST) -> int:
    """A whole number in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} = {shown(value)}: must be a whole number")
    if value < at_least:
        raise ValueError(f"{name} = {shown(value)}: must be at least {at_least}")
    if value > at_most:
        raise ValueError(f"{name} = {shown(value)}: must be at most {at_most}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {shown(value)}: must be true or false")
    return value


def one_of(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of the named choices."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} = {shown(value)}: must be one of {', '.join(choices)}")
    return value


def _float(value: Any) -> float | None:
    """The value as a finite float, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return found if math.isfinite(found) else None
