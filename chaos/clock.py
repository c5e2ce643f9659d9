"""Clocks that step, for single processes: libfaketime answers them, the machine's clock stays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_LIBRARIES: Final = ("/usr/lib", "/usr/local/lib", "/lib")
CACHE_SECONDS: Final = 1
"""How long a step may take to be seen."""


def library() -> Path | None:
    """Return libfaketime, None if it is not installed."""
    found = [path for root in _LIBRARIES for path in Path(root).glob("**/faketime/libfaketime.so.1")]
    return found[0] if found else None


class Clock:
    """The wall clock of one process, and of those that take its place."""

    def __init__(self, path: Path, preload: Path) -> None:
        """``path`` is a file that the process reads it from."""
        self._path = path
        self.step_to(0)
        self.environment: dict[str, str] = {
            "LD_PRELOAD": str(preload),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_CACHE_DURATION": str(CACHE_SECONDS),
            # The monotonic clock does not step when the time of day does.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Else timed waits of gRPC end at once, over and over.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def step_to(self, offset_seconds: int) -> None:
        """Have it differ from the machine's by so many seconds."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{offset_seconds:+d}\n")
        os.replace(new, self._path)


def forget(pid: int) -> None:
    """Remove what libfaketime leaves behind of a process that was killed."""
    for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
        Path("/dev/shm", name).unlink(missing_ok=True)
