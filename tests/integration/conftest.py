"""Real services for tests: each a process of its own on a free port, started as a user would start it."""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from loader_svc.trees.debian import DebianKernel, DebianUnavailable, fetch_debian, kernel_packages
from modpressure.v1.call_pb2 import Event
from stats_svc import events
from stats_svc.rows import StoredSegment
from tests.services import Hand, Launch, Process, launching


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start services that end with the test."""
    with launching(tmp_path / "state") as start:
        yield start


@pytest.fixture(scope="session")
def launch_for_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Start services that all tests share; each test has a system of its own on them."""
    with launching(tmp_path_factory.mktemp("state")) as start:
        yield start


@pytest.fixture(scope="session")
def stats(launch_for_all: Launch, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """A stats_svc over a new SQLite file, shared by all tests."""
    database = tmp_path_factory.mktemp("stats") / "stats.sqlite3"
    return launch_for_all("stats_svc", "--listen", "127.0.0.1:0", "--database", str(database))


@pytest.fixture(scope="session")
def loader(launch_for_all: Launch, stats: Process) -> Process:
    """A loader of the catalogue, shared by all tests."""
    return launch_for_all("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)


@pytest.fixture
def system() -> str:
    """A system that no other test uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def hand(stats: Process, system: str) -> AsyncIterator[Hand]:
    """A hand on the ledger of ``stats``, in the test's own system."""
    hand = Hand(stats.address, f"hand-{system}", system)
    await hand.open()
    yield hand
    await hand.close()


@pytest.fixture(scope="session")
def debian_kernel(tmp_path_factory: pytest.TempPathFactory) -> DebianKernel:
    """A Debian kernel, fetched by the real apt: one for clouds, which has the fewest modules."""
    try:
        kernel_packages()  # has apt make its lists where there are none
    except DebianUnavailable as error:
        pytest.skip(f"no Debian kernel to be had: {error}")
    found = subprocess.run(
        ["apt-cache", "search", "--names-only", r"^linux-image-[0-9.-]+-cloud-[a-z0-9]+-unsigned$"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    names = sorted(
        (line.split()[0] for line in found.splitlines()), key=lambda n: [int(x) for x in re.findall("[0-9]+", n)]
    )
    if not names:
        pytest.skip("apt knows no kernel for clouds")
    try:
        return fetch_debian(names[-1], tmp_path_factory.mktemp("debian"))
    except DebianUnavailable as error:
        pytest.skip(f"{names[-1]} can't be had: {error}")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the numbers of the segments of events that are read from now on, one more each time."""
    numbers: list[int] = []
    decode = events.decode

    def counting(system: str, segment: StoredSegment) -> list[Event]:
        numbers.append(segment.number)
        return decode(system, segment)

    monkeypatch.setattr(events, "decode", counting)
    return numbers
