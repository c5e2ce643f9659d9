"""Real services for tests: each a process of its own on a free port, started as a user would start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.services import Hand, Launch, Process


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start ``python -m`` with arguments; at the end of the test all are stopped, and none may have crashed."""
    processes: list[Process] = []
    # What a developer has set must not change what is tested.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODPRESSURE_")}
    environment["XDG_STATE_HOME"] = str(tmp_path / "state")

    def start(*arguments: str) -> Process:
        popen = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--log-format", "json"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        process = Process(popen)
        processes.append(process)
        process.start()
        return process

    yield start
    statuses = [process.stop() for process in reversed(processes)]
    logged = "".join(line for process in processes for line in process.lines)
    assert set(statuses) <= {0, -signal.SIGKILL}, logged
    assert "Traceback" not in logged, logged


@pytest.fixture
def stats(launch: Launch, tmp_path: Path) -> Process:
    """A stats_svc over a new SQLite file."""
    return launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"))


@pytest.fixture
async def hand(stats: Process) -> AsyncIterator[Hand]:
    """A hand on the ledger of ``stats``."""
    hand = Hand(stats.address)
    await hand.open()
    yield hand
    await hand.close()
