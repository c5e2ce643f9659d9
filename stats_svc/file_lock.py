"""The lock of the one process that writes to an SQLite file.

It is on the file itself: it holds whatever name the file is opened by, and there is nothing to delete. It is on a byte
far behind those that SQLite locks (PENDING_BYTE and the 511 after it, os.h). SQLite's locks are the process's, and gone
as soon as it closes any descriptor of the file (sqlite.org/howtocorrupt.html, 2.2). So this one is of a kind that is
its descriptor's (F_OFD_SETLK, fcntl(2)), and that is opened before SQLite opens the file, and closed after.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import Final

_LOCKED_BYTE: Final = 1 << 62


class IsLockedError(Exception):
    """Another process, or another part of this one, has the lock."""


class FileLock:
    """The lock of a file, held until it is closed, or the process ends in whatever way."""

    def __init__(self, path: str) -> None:
        """Take it, making an empty file if there is none. IsLockedError if it is taken, OSError if that can't be."""
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _LOCKED_BYTE, 1, 0)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, whole)
        except BlockingIOError:
            # The descriptor stays open: SQLite may have locks on the file in this very process.
            raise IsLockedError from None
        stat = os.fstat(self._descriptor)
        self.identity = (stat.st_dev, stat.st_ino)
        """Which file it is, whatever that is called."""

        self.names = stat.st_nlink
        """How many names the file has."""

    def close(self) -> None:
        """Give it back, once SQLite has closed the file."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
