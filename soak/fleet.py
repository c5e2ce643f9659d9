"""One stats_svc over an SQLite file and many small loaders, each under a supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chaos.process import Supervised, logged_address

LOADERS: Final = 12
KEPT_EVENTS: Final = 4000
"""Events that stats_svc keeps, beside those of the last minute."""

_STARTED_AT_ONCE: Final = 3
_LOADER_OPTIONS: Final = ("--memory-limit", "16MiB", "--threads", "1")


@dataclass
class Fleet:
    """The processes, and the database's file."""

    stats: Supervised
    loaders: list[Supervised]
    database: Path

    def database_bytes(self) -> int:
        """Return how long the database is, with its log."""
        sizes = []
        for path in (self.database, Path(f"{self.database}-wal")):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return sum(sizes)


@contextlib.asynccontextmanager
async def running_fleet(directory: Path) -> AsyncIterator[Fleet]:
    """Start a fleet in ``directory``; at the end all of it is gone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment["XDG_STATE_HOME"] = str(directory / "state")
    database = directory / "soak.sqlite3"

    def service(name: str, program: str, *options: str) -> Supervised:
        command = [sys.executable, "-m", program, "--listen", "127.0.0.1:0", *options, "--log-format", "json"]
        return Supervised(name, [*command, "--log-level", "info"], environment, address_in=logged_address)

    stats = service("stats_svc", "stats_svc", "--database", str(database), "--keep-events", str(KEPT_EVENTS))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(stats.close)
        await stats.start()
        loaders = [
            service(
                f"loader {number}",
                "loader_svc",
                *("--stats", stats.address, "--name", f"loader-{number}", *_LOADER_OPTIONS),
            )
            for number in range(LOADERS)
        ]
        for loader in loaders:
            stack.push_async_callback(loader.close)
        # Not all at once, or on two cores none of them would be up for a long time.
        for first in range(0, LOADERS, _STARTED_AT_ONCE):
            await asyncio.gather(*(loader.start() for loader in loaders[first : first + _STARTED_AT_ONCE]))
        yield Fleet(stats, loaders, database)
