"""The atomic, checksummed CheckpointIO."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from dlnlab import checks
from dlnlab.files import DamagedFileError, newer, read_verified, write_atomic

FORMAT = 1
"""The number of the layout of our own keys in a checkpoint (`dlnlab_...`, states of callbacks and models), which it
carries as `dlnlab_format`. It grows when older versions of dlnlab can no longer go on from one. Checkpoints without it,
from before there was one, count as 0."""
_FORMAT_KEY = "dlnlab_format"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that are whole: checksummed, renamed into place, the replaced one kept as `X.ckpt.previous`.

    Only tensors and plain containers are ever loaded (`weights_only=True`).
    """

    def __init__(self) -> None:
        self._ahead: dict[Path, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; a full disk or a crash leaves the one before untouched.

        Raises:
            OSError: If it cannot be written.
        """
        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({**checkpoint, _FORMAT_KEY: FORMAT}, buffer)
        # A damaged one must not take the place of the whole one it had replaced.
        write_atomic(path, buffer.getvalue(), checksum=True, keep_previous=_is_whole(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; where it is damaged, the one it replaced, with a warning.

        Raises:
            CheckpointError: If neither is whole.
        """
        del weights_only
        path = Path(path)
        if path in self._ahead:
            return self._ahead.pop(path)
        try:
            return read_checkpoint(path, map_location)
        except CheckpointError as error:
            previous = path.with_name(path.name + ".previous")
            if not previous.exists():
                raise
            checkpoint = read_checkpoint(previous, map_location)
            warnings.warn(f"{error}; using {previous}, step {checkpoint.get('global_step')}, instead", stacklevel=2)
            return checkpoint

    def read_ahead(self, path: str | Path) -> dict[str, Any]:
        """Read a checkpoint as `load_checkpoint` does, which then gives it, once, without reading it again.

        Raises:
            CheckpointError: As `load_checkpoint`.
        """
        self._ahead[Path(path)] = checkpoint = self.load_checkpoint(path)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and the one it replaced."""
        path = Path(path)
        for each in (path, path.with_name(path.name + ".previous")):
            each.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        read_verified(path)
    except (DamagedFileError, FileNotFoundError):
        return False
    return True


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint, and no other in its place.

    Args:
        path: The file.
        map_location: Where its tensors go, as for `torch.load`.

    Returns:
        The checkpoint as it was given to `save_checkpoint`: tensors and plain containers.

    Raises:
        CheckpointError: If it is missing, damaged, no checkpoint, or of a newer format.
    """
    try:
        checkpoint = torch.load(io.BytesIO(read_verified(path)), map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from None
    except Exception:  # what torch raises for contents it refuses differs from version to version
        # Its own message advises to load with weights_only=False, which would run whatever is in the file.
        raise CheckpointError(
            f"{path} is no checkpoint of dlnlab: it holds more than tensors and plain containers, which is never loaded"
        ) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is no checkpoint of dlnlab: it holds {checks.shown(type(checkpoint).__name__)}")
    number = checkpoint.pop(_FORMAT_KEY, 0)
    if type(number) is not int or number < 0:
        raise CheckpointError(f"{path} is no checkpoint of dlnlab: its {_FORMAT_KEY} is {checks.shown(number)}")
    if number > FORMAT:
        raise CheckpointError(f"{path}: {newer('a checkpoint', number, FORMAT)}")
    return checkpoint
