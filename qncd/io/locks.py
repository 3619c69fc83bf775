"""A folder belongs to one running process at a time; a process that is dead holds nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from qncd.io import files

LOCK_FILE = "run.lock"
log = logging.getLogger("qncd")


class FolderLock:
    """The folder is this process's until `release`, the end of the process, however it ends, or of this object.

    The lock is the operating system's, on the file run.lock, which is gone when the folder is free again.

    Raises:
        ValueError: another run is at work in the folder, or the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        stream = _locked(self.path)
        files.register_unfinished(self.path)
        self.release = weakref.finalize(self, _release, self.path, stream)


def _locked(path: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        try:
            stream = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"{path.parent}: cannot be written ({error.strerror})") from None
        try:
            if fcntl is None:
                raise OSError("this system has no locks for files")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(stream, 200, 0).decode(errors="replace").strip()
            os.close(stream)
            raise ValueError(f"{path.parent}: another run is at work there ({owner or 'just started'})") from None
        except OSError as error:  # some network file systems
            log.warning("%s cannot be locked (%s): see to it that no second run writes there", path.parent, error)
        # The run before may have removed the file between our opening and our locking it: then this is no lock.
        if _is_still(stream, path):
            os.truncate(stream, 0)
            os.pwrite(stream, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
            return stream
        os.close(stream)


def _is_still(stream: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream), os.stat(path))
    return False


def _release(path: Path, stream: int) -> None:
    # The file goes while the lock is held, so that nobody can have locked it in between.
    path.unlink(missing_ok=True)
    os.close(stream)
    files.forget_unfinished(path)
