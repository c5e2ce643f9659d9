"""Threads for work with files, which would hold up an event loop."""

from __future__ import annotations

from modpressure.fair import FairThreads


class FileWorkers(FairThreads):
    """Runs work with files in threads; clients take turns."""

    def __init__(self, threads: int) -> None:
        """Have at most ``threads`` threads."""
        super().__init__(threads, "files")
