"""A small file system of a database's own, that can be filled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sqlite3
import subprocess
from pathlib import Path
from typing import Final

_CLONE_NEWNS: Final = 0x00020000
_PIECE_BYTES: Final = (1 << 20, 4096)


def own_mounts() -> str:
    """Have what this process mounts from now on be seen by it and its children alone, and gone with the last of them.

    Return why that can't be, empty if it can.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno()).lower()}"
    made = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return made.stderr.strip()


class Disk:
    """A tmpfs."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Mount it at ``path``, which is made. RuntimeError says why that can't be."""
        self.path = path
        self._filler = path / "full"
        path.mkdir(parents=True)
        options = f"size={size_bytes},mode=0777"
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "chaos", str(path)], capture_output=True, text=True
        )
        if made.returncode:
            raise RuntimeError(made.stderr.strip())

    def fill(self) -> None:
        """Leave no room, not even what a database has set aside."""
        for file in self.path.glob("*.sqlite3"):
            # Its log has grown, and is written over from the start; now it has to grow again. A backup does the same.
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file, timeout=0.1)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        descriptor = os.open(self._filler, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
        try:
            end_bytes = os.fstat(descriptor).st_size
            for piece_bytes in _PIECE_BYTES:
                while True:
                    try:
                        os.posix_fallocate(descriptor, end_bytes, piece_bytes)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        break
                    end_bytes += piece_bytes
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it, whoever still uses it."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True, capture_output=True)
