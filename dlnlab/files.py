"""Files that are whole or absent: written beside their place, checksummed, renamed into it."""

import hashlib
import os
import tempfile
from pathlib import Path

_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64


class DamagedFileError(ValueError):
    """A file whose checksum does not match its contents."""


def write_atomic(path: Path, content: bytes, *, checksum: bool = False, keep_previous: bool = False) -> None:
    """Put `content` at `path` so that a reader, or a crash at any moment, finds the old file or the new one.

    Args:
        path: Where to; its folder must exist.
        content: The bytes.
        checksum: Append a sha256 trailer, which `read_verified` checks and takes off.
        keep_previous: Keep what is replaced as `path` with `.previous` added.

    Raises:
        OSError: If the disk is full or the folder cannot be written; nothing at `path` has changed then.
    """
    if checksum:
        content += _MARK + hashlib.sha256(content).hexdigest().encode()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if keep_previous and path.exists():
            previous = path.with_name(path.name + ".previous")
            previous.unlink(missing_ok=True)
            os.link(path, previous)  # so that a crash before the rename leaves both
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_verified(path: Path) -> bytes:
    """The contents of a file written with a checksum.

    Raises:
        DamagedFileError: If it is not as it was written.
        OSError: If it cannot be read.
    """
    content = path.read_bytes()
    body, trailer = content[:-_TRAILER], content[-_TRAILER:]
    if trailer != _MARK + hashlib.sha256(body).hexdigest().encode():
        raise DamagedFileError(
            f"{path} is damaged: its checksum does not match its {len(content)} bytes (or dlnlab has not written it)"
        )
    return body


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; some systems cannot sync a folder, and then there is nothing to do.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
