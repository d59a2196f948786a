"""The directory of a run: claimed by one process, emptied, given back."""

import contextlib
import shutil
from pathlib import Path

from dlnlab import checks


def claim(parent: Path) -> Path:
    """Make the next free `version_N` of a folder; `mkdir` is atomic, so no two runs share one.

    Raises:
        ValueError: If it cannot be made; no folder on the way to it is left then.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdecimal()]
        number = max(taken, default=-1) + 1
        while True:
            try:
                (parent / f"version_{number}").mkdir()
                return parent / f"version_{number}"
            except FileExistsError:
                number += 1
    except (OSError, ValueError) as error:
        _remove_empty(parent)
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"trainer.default_root_dir = {str(parent.parent.parent)!r}: {checks.shown(str(parent))} cannot be made: "
            f"{reason}"
        ) from error


def give_back(directory: Path) -> None:
    """Remove a claimed directory, and the folders above it that are empty now."""
    shutil.rmtree(directory, ignore_errors=True)
    _remove_empty(directory.parent)


def empty(directory: Path) -> None:
    """Remove all that lies in a directory, which stays."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove_empty(parent: Path) -> None:
    for folder in (parent, parent.parent):  # lightning_logs/NAME
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()
