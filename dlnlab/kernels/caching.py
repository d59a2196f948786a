"""Compiled kernels on disk, reused by later processes until the source of any kernel changes.

numba's own cache compares one file, the one that holds the function; functions and constants which that file imports are
compiled into it and may change unnoticed. Here the name of a cached file covers the sources of the whole room.
"""

import hashlib
import inspect
import logging
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, NullCache
from numba.core.serialize import dumps

from dlnlab.files import DamagedFileError, read_verified, write_atomic


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `numba.njit` with `options`, the compiled code kept on disk.

    The folder is where numba's own cache would be: `NUMBA_CACHE_DIR` if set, else `__pycache__` beside the source, else
    the user's cache folder. Where none of them can be written, every process compiles the function, and a log line says so.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = numba.njit(**options)(function)
        try:
            compiled._cache = _Cache(function)
        except (RuntimeError, OSError):  # numba found no folder that can be written; a source inside an archive
            compiled._cache = _NoCache()
        return compiled

    return decorate


class _Cache(FunctionCache):
    """numba's cache of one function, with files of our own names; what cannot be written is not kept."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(Path(self.cache_path), function)

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError:
            _say_uncached()


class _NoCache(NullCache):
    """No cache."""

    def save_overload(self, sig: Any, data: Any) -> None:
        _say_uncached()


class _Files:
    """One file for each compiled signature of a function, named for everything its content depends on.

    numba numbers the files of a function and keeps an index; two processes that compile two signatures, or two versions of
    the source, at the same time can leave an index that points to the other's code. Here a name decides the content.

    Args:
        folder: Where the files lie.
        function: The function, whose other versions are removed when this one is saved.
    """

    def __init__(self, folder: Path, function: Callable[..., Any]) -> None:
        source = Path(inspect.getfile(function))
        self._folder = folder
        self._function = f"{source.stem}.{function.__qualname__}.{sys.implementation.cache_tag}."
        self._version = f"{self._function}{_digest(_room(), source.read_bytes())}."

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._version}{_digest(numba.__version__.encode(), repr(key).encode())}.nbc"

    def load(self, key: Any) -> Any:
        """The saved code, or None."""
        try:
            return pickle.loads(read_verified(self._path(key)))
        except (OSError, DamagedFileError):
            return None

    def save(self, key: Any, data: Any) -> None:
        """Keep compiled code, and remove that of other versions of the source."""
        write_atomic(self._path(key), dumps(data), checksum=True)
        for path in self._folder.glob(f"{self._function}*"):
            if not path.name.startswith(self._version):
                path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove what is kept of this version."""
        for path in self._folder.glob(f"{self._version}*"):
            path.unlink(missing_ok=True)


@cache
def _room() -> bytes:
    """All sources beside this file, as one digest."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes()))).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


@cache
def _say_uncached() -> None:
    logging.getLogger(__name__).warning(
        "dlnlab: no folder for compiled kernels can be written, so each process compiles them anew; "
        "set NUMBA_CACHE_DIR to a folder that can be written"
    )
