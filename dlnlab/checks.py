"""What a constructor argument must be, and the one-line error when it is not.

Plain `float` and `int` annotations let NaN, infinity and null through from a config, so constructors call these.
"""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

LARGEST = 2**53
"""No count, step or size is larger: up to here every whole number is exact in float64."""
LONGEST_NAME = 223
"""Bytes of a name: file systems take 255, less the suffixes and the marks of a temporary file that are added to it."""
_NOT_IN_NAMES = frozenset('/\\:*?"<>|')
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


def file_name(key: str, name: Any) -> str:
    """A name that a file or folder can have on every file system, so that nothing is ever written elsewhere.

    Args:
        key: Where it was given, for the message.
        name: The name.

    Raises:
        ValueError: If it is no such name.
    """
    if not isinstance(name, str) or not _can_name(name):
        raise ValueError(
            f"{key} = {shown(name)}: must be a file name, printable, without {' '.join(sorted(_NOT_IN_NAMES))} and not "
            "beginning with '.' or '-'"
        )
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(f"{key} = {shown(name)}: File name too long, {size} bytes; at most {LONGEST_NAME}")
    return name


def _can_name(text: str) -> bool:
    return (
        text.isprintable()
        and text == text.strip(" ")
        and text[:1] not in ("", ".", "-")
        and text[-1:] != "."
        and not _NOT_IN_NAMES & set(text)
    )


def different_names(key: str, names: Iterable[str]) -> None:
    """Refuse names of files in one folder that are the same, or that some file systems take for the same, as `a` and `A`.

    Raises:
        ValueError: That shows both.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.get(_folded(name))
        if other == name:
            raise ValueError(f"{key}: two are called {name!r} and would overwrite each other; give a name")
        if other is not None:
            raise ValueError(
                f"{key}: {other!r} and {name!r} are one file name where upper and lower case are the same, and would "
                "overwrite each other; give another name"
            )
        found[_folded(name)] = name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def names_from_values(texts: list[str], wholes: list[str]) -> list[str]:
    """Names of folders made of values, a different one for each.

    A text that can be a name stays as it is. One that cannot, is too long, or is also another's has its odd characters
    replaced, is shortened, and ends with a checksum of the whole values.

    Args:
        texts: What the names should be.
        wholes: The values themselves, all different.

    Example:
        >>> names_from_values(["lr=0.1", "path=../x", "a", "A"], ["1", "2", "3", "4"])
        ['lr=0.1', 'path=.._x~d4735e3a', 'a~4e074085', 'A~4b227777']
    """
    counts = Counter(map(_folded, texts))
    found = []
    for text, whole in zip(texts, wholes, strict=True):
        if counts[_folded(text)] > 1 or not _can_name(text) or len(text.encode()) > LONGEST_NAME:
            text = "".join(c if c.isprintable() and c not in _NOT_IN_NAMES else "_" for c in text).lstrip(" .-")
            mark = f"~{hashlib.sha256(whole.encode(errors='backslashreplace')).hexdigest()[:8]}"
            text = text.encode()[: LONGEST_NAME - len(mark)].decode(errors="ignore") + mark
        found.append(text)
    return found


def _float(value: Any) -> float | None:
    """The value as a finite float, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond all floats
        return None
    return found if math.isfinite(found) else None
