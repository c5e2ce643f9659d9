"""One machine under test: a database, a stats_svc over it, loaders, and links between all of them that can break.

clients ── link ──▶ loader ── link ──▶ stats_svc ── link ──▶ PostgreSQL, or else a file on a disk of its own
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from chaos import clock
from chaos.clock import Clock
from chaos.disk import Disk
from chaos.process import Supervised, logged_address
from chaos.proxy import Link
from tests import postgres

DatabaseKind = Literal["sqlite", "postgresql"]

LOADERS: Final = 2
STATS: Final[dict[DatabaseKind, int]] = {"sqlite": 1, "postgresql": 2}
"""How many stats_svc there are: only one can use a file."""

LEAD_SECONDS: Final = 1.0
"""How long the one of them that leads may be silent."""

LEASE_SECONDS: Final = 1.0
"""How long a loader that is gone keeps what it held: short, so that leases end within a round."""

DISK_BYTES: Final[dict[DatabaseKind, int]] = {"sqlite": 32 << 20, "postgresql": 160 << 20}


@dataclass
class Fleet:
    """All processes of one machine, and what can be done to them."""

    kind: DatabaseKind
    stats: list[Supervised]
    loaders: list[Supervised]
    clients_to_loader: list[Link]
    """For each loader."""

    loader_to_stats: list[Link]
    """For each loader and each stats_svc."""

    stats_to_stats: list[Link]
    """For each stats_svc, how others reach it; none where it is alone."""

    stats_to_database: list[Link]
    """For each stats_svc; none where the database is a file."""

    database: Supervised | None = None
    """The server, where there is one."""

    disk: Disk | None = None
    clocks: list[Clock] = field(default_factory=list)

    @property
    def processes(self) -> list[Supervised]:
        """All of them, those first on which others depend."""
        return [*([self.database] if self.database else []), *self.stats, *self.loaders]

    @property
    def links(self) -> list[Link]:
        """All of them."""
        return [*self.clients_to_loader, *self.loader_to_stats, *self.stats_to_stats, *self.stats_to_database]

    async def heal(self) -> None:
        """Undo every fault, and return once every process serves. RuntimeError if one does not."""
        if self.disk is not None:
            self.disk.free()
        for process in self.processes:
            process.thaw()
        for link in self.links:
            link.heal()
        for process in self.processes:
            await process.wait_serving()


@contextlib.asynccontextmanager
async def running_fleet(
    kind: DatabaseKind,
    directory: Path,
    *,
    with_disk: bool,
    preload: Path | None,
    stats_command: Sequence[str],
) -> AsyncIterator[Fleet]:
    """Start a fleet in ``directory``; at the end all of it is gone.

    ``preload`` is libfaketime, None to leave the clocks alone; ``stats_command`` is what starts stats_svc.
    """
    # What a developer has set must not change what is tested.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment["XDG_STATE_HOME"] = str(directory / "state")
    clocks: list[Clock] = []

    def environment_of(name: str) -> dict[str, str]:
        if preload is None:
            return environment
        clocks.append(Clock(directory / f"{name}.clock", preload))
        return environment | clocks[-1].environment

    def service(name: str, command: Sequence[str], links: Sequence[Link], *options: str) -> Supervised:
        def lead(address: str) -> None:
            for link in links:
                link.lead_to(address)

        return Supervised(
            f"{kind} {name}",
            [*command, "--listen", "127.0.0.1:0", *options, "--log-format", "json"],
            environment_of(name),
            address_in=logged_address,
            on_address=lead,
            after_end=clock.forget,
        )

    async with contextlib.AsyncExitStack() as stack:

        async def opened(name: str) -> Link:
            link = Link(name)
            await link.open()
            stack.push_async_callback(link.close)
            return link

        disk = None
        files = directory / "disk"
        if with_disk:
            disk = Disk(files, DISK_BYTES[kind])
            stack.callback(disk.close)
        else:
            files.mkdir(parents=True)
        count = STATS[kind]
        location = str(files / "stats.sqlite3")
        database, to_database = None, list[Link]()
        if kind == "postgresql":
            to_database = [await opened(f"stats_svc {n} to PostgreSQL") for n in range(count)]
            database = await asyncio.to_thread(_postgresql, files, to_database)
        to_peers = [await opened(f"stats_svc to stats_svc {n}") for n in range(count)] if count > 1 else []
        # Each loader has its own way to each stats_svc, so that one can lose it alone.
        to_stats = [[await opened(f"loader {m} to stats_svc {n}") for n in range(count)] for m in range(LOADERS)]
        to_loaders = [await opened(f"clients to loader {m}") for m in range(LOADERS)]
        stats = []
        for n in range(count):
            options = ["--lease-seconds", str(LEASE_SECONDS)]
            if database is not None:
                location = f"postgresql://postgres@{to_database[n].address}/postgres"
                options += ["--lead-seconds", str(LEAD_SECONDS), "--advertise", to_peers[n].address]
            links = [*(ways[n] for ways in to_stats), *to_peers[n : n + 1]]
            stats.append(service(f"stats_svc {n}", stats_command, links, "--database", location, *options))
        loaders = []
        for m in range(LOADERS):
            options = ["--stats", ",".join(link.address for link in to_stats[m]), "--name", f"loader-{m}"]
            loaders.append(service(f"loader {m}", [sys.executable, "-m", "loader_svc"], [to_loaders[m]], *options))
        ways = [link for links in to_stats for link in links]
        fleet = Fleet(kind, stats, loaders, to_loaders, ways, to_peers, to_database, database, disk, clocks)
        for process in fleet.processes:
            stack.push_async_callback(process.close)
        if database is not None:
            await database.start()
        await asyncio.gather(*(process.start() for process in (*stats, *loaders)))
        yield fleet


def _postgresql(directory: Path, links: Sequence[Link]) -> Supervised:
    """Make a cluster, and return a server of it that ``links`` lead to."""
    home = directory / "postgres"
    home.mkdir()
    # Short segments of the log: it is soon at the next one, for which there may be no room.
    postgres.initialise(str(home), "--wal-segsize=1")
    port = postgres.free_port()
    address = f"127.0.0.1:{port}"
    settings = {
        "min_wal_size": "2MB",
        "max_wal_size": "8MB",
        "shared_buffers": "16MB",
        # In its own directory: a server that is killed leaves it behind.
        "dynamic_shared_memory_type": "mmap",
    }
    command = postgres.server_command(str(home), port, **settings)

    def lead(address: str) -> None:
        for link in links:
            link.lead_to(address)

    return Supervised(
        "PostgreSQL",
        command,
        postgres.ENVIRONMENT,
        address_in=lambda line: address if "ready to accept connections" in line else "",
        on_address=lead,
        options={"cwd": str(home), **postgres.account()},
    )


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory that the server's user may enter."""
    directory = tempfile.TemporaryDirectory(prefix="modpressure-chaos-")
    Path(directory.name).chmod(0o755)  # nosec
    return directory
