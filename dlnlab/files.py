"""Files that are whole or absent: written beside their place, checksummed, renamed into it."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = ".tmp"
_MARK = b"\nsha256 "
_TRAILER = len(_MARK) + 64


class DamagedFileError(ValueError):
    """A file whose checksum does not match its contents."""


def newer(what: str, number: int, known: int) -> str:
    """Say that a file has a format which only a later version of dlnlab reads.

    Args:
        what: The file's content, as `results`.
        number: Its format.
        known: The newest format that can be read here.
    """
    return (
        f"{what} of format {number}, and this version of dlnlab reads up to format {known}: upgrade dlnlab "
        "(pip install --upgrade dlnlab)"
    )


def write_atomic(path: Path, content: bytes, *, checksum: bool = False, keep_previous: bool = False) -> None:
    """Put `content` at `path` so that a reader, or a crash at any moment, finds the old file or the new one.

    Args:
        path: Where to; its folder must exist.
        content: The bytes.
        checksum: Append a sha256 trailer, which `read_verified` checks and takes off.
        keep_previous: Keep what is replaced as `path` with `.previous` added.

    Raises:
        OSError: If the disk is full or the folder cannot be written; it names `path`, where nothing has changed then.
    """
    if checksum:
        content += _MARK + hashlib.sha256(content).hexdigest().encode()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
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
    except BaseException as error:
        if temporary is not None:
            # A folder that became read-only keeps it; the next resume clears it away.
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a write alone does not say where
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; nobody else may be writing here."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def hold(folder: Path) -> Callable[[], None]:
    """Make this process the only one that holds a folder, until it lets go or ends, however it ends.

    Args:
        folder: The folder; nothing in it changes.

    Returns:
        What lets go.

    Raises:
        BlockingIOError: If another process holds it.
    """
    if fcntl is None:
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # a file system without locks
    return lambda: os.close(handle)


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
