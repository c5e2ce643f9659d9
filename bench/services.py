"""Services for benchmarks: each a process of its own on a free port, as a user would start it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Service:
    """A running process and the address that it serves."""

    address: str
    pid: int

    def resident_bytes(self) -> int:
        """Return its resident set; bytes."""
        statm = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(statm[1]) * os.sysconf("SC_PAGESIZE")

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used; seconds."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def service(*arguments: str) -> Iterator[Service]:
    """Start ``python -m`` with arguments; wait for the line that tells its address; stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            with contextlib.suppress(json.JSONDecodeError):
                address = json.loads(line).get("address")
                if address:
                    break
        else:
            raise SystemExit(f"{' '.join(arguments)} did not start, exit status {process.wait()}")
        # Nobody reads further lines: the pipe is drained so that it never fills.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield Service(address, process.pid)
    finally:
        process.terminate()
        process.wait()
    drain.wait()


@contextlib.contextmanager
def stats_service() -> Iterator[Service]:
    """Start stats_svc over a new SQLite file."""
    with (
        tempfile.TemporaryDirectory(prefix="modpressure-bench-") as directory,
        service(
            "stats_svc", "--listen", "127.0.0.1:0", "--database", f"{directory}/bench.sqlite3", "--log-format", "json"
        ) as stats,
    ):
        yield stats


@contextlib.contextmanager
def loader_service(stats: Service, tree: str) -> Iterator[Service]:
    """Start a loader of ``tree`` that counts on ``stats``."""
    with service(
        "loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, "--tree", tree, "--log-format", "json"
    ) as loader:
        yield loader
