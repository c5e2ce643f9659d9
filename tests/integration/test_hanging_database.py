"""A database that keeps its connections and answers nothing: stats_svc says so, can be stopped, and goes on after."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modpressure.client import Client
from modpressure.errors import Unavailable
from modpressure.kernel.counters import Counters
from stats_svc import database
from stats_svc.rows import Changes, Commit, StoreError, SystemDelta, SystemRow
from stats_svc.server import CLOSE_SECONDS
from stats_svc.store import SqlStore
from tests import postgres
from tests.services import Launch, Process

WAIT_SECONDS = 60
GRACE_SECONDS = 1.0

END_SECONDS = GRACE_SECONDS + 2 * CLOSE_SECONDS + 5
"""Within which a process ends that is told to stop, on a busy machine."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def own_server() -> Iterator[postgres.PostgresServer]:
    """A server that nobody else waits for while it stands still."""
    if postgres.programs() is None:
        pytest.skip("no PostgreSQL is installed here")
    with postgres.running_server() as server:
        yield server


@pytest.fixture
def own_database(own_server: postgres.PostgresServer) -> Iterator[str]:
    with postgres.new_database(own_server.url) as url:
        yield url


def created(name: str) -> Commit:
    return Commit(1, [Changes(create=SystemRow(name, 2, create_time_ns=5))], [])


def counted(name: str = "default") -> Commit:
    return Commit(1, [Changes(deltas={name: SystemDelta(counters=Counters(calls=1), events=1)})], [])


@pytest.mark.parametrize("when", ["before", "in the commit"])
def test_a_commit_that_is_not_answered_fails_and_what_became_of_it_is_seen_by_a_load(
    own_server: postgres.PostgresServer, own_database: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(database, "SILENCE_SECONDS", 0.5)
    # As where the silence is the longer one.
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.0)
    with contextlib.closing(SqlStore(own_database)) as store, contextlib.ExitStack() as frozen:
        store.load()
        store.commit(created("default"))
        dialect = store._database.writer.dialect
        commit = dialect.do_commit

        def freeze(connection: Any) -> None:
            frozen.enter_context(own_server.frozen())
            commit(connection)

        if when == "before":
            frozen.enter_context(own_server.frozen())
        else:
            monkeypatch.setattr(dialect, "do_commit", freeze)
        with pytest.raises(StoreError, match=r": the server has said nothing for 0\.5 s$"):
            store.commit(counted())
        monkeypatch.setattr(dialect, "do_commit", commit)
        # A reader waits for nothing that the writer knows already.
        with pytest.raises(StoreError, match=r": the server does not answer$"):
            store.system("default")
        frozen.close()
        [loaded] = _loaded(store).systems
        # The server had been told to commit, and did when it went on.
        assert loaded.counters.calls == (0 if when == "before" else 1)
        store.commit(counted())
        read = store.system("default")
        assert read is not None and read.counters.calls == loaded.counters.calls + 1


def _loaded(store: SqlStore) -> Any:
    while True:
        # What is left of the connection that was given up may hold the leader's row for a moment.
        with contextlib.suppress(StoreError):
            return store.load()


def test_a_read_that_is_not_answered_fails(
    own_server: postgres.PostgresServer, own_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "SILENCE_SECONDS", 0.5)
    with contextlib.closing(SqlStore(own_database)) as store:
        store.load()
        store.commit(created("default"))
        dialect = store._database.reader.dialect
        execute = dialect.do_execute
        with contextlib.ExitStack() as frozen:

            def freeze(*arguments: Any) -> None:
                monkeypatch.setattr(dialect, "do_execute", execute)
                frozen.enter_context(own_server.frozen())
                execute(*arguments)

            monkeypatch.setattr(dialect, "do_execute", freeze)
            with pytest.raises(StoreError, match=r": the server has said nothing for 0\.5 s$"):
                store.system("default")
        assert store.system("default") is not None


async def watch(address: str, service: str = "") -> Any:
    """Watch a health until the channel is closed."""
    async with grpc.aio.insecure_channel(address) as channel:
        async for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service)):
            yield response.status


async def until(health: Any, status: Any) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while await anext(health) != status:
            pass


async def test_it_says_that_it_can_not_serve_and_serves_again_and_each_call_is_counted_once(
    own_server: postgres.PostgresServer, own_database: str, launch: Launch
) -> None:
    stats = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", own_database)
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    async with (
        contextlib.aclosing(watch(stats.address, "modpressure.v1.StatsService")) as stats_health,
        contextlib.aclosing(watch(loader.address)) as loader_health,
        Client([loader.address], stats.address) as client,
    ):
        for health in (stats_health, loader_health):
            await until(health, SERVING)
        await client.load("minix", request_id="before")
        with own_server.frozen():
            # Its commit is what is not answered.
            asked = asyncio.create_task(client.load("bfs", request_id="meanwhile"))
            for health in (stats_health, loader_health):
                await until(health, NOT_SERVING)
            for call in (client.stats(), client.create_system("other")):
                with pytest.raises(Unavailable, match="the database is away"):
                    await call
        for health in (stats_health, loader_health):
            await until(health, SERVING)
        with contextlib.suppress(Unavailable):
            await asked
        for request_id, module in (("before", "minix"), ("meanwhile", "bfs"), ("after", "crc16")):
            assert (await client.load(module, request_id=request_id)).call.errno == ""
        found = await client.stats()
        assert (found.modcount, found.calls, found.events, found.abandoned_calls) == (3, 3, 3, 0)
        assert [event.call.module async for event in client.events()] == ["minix", "bfs", "crc16"]


@contextlib.contextmanager
def hanging(where: str, own_server: postgres.PostgresServer) -> Iterator[None]:
    if where.startswith("postgresql"):
        with own_server.frozen():
            yield
    else:
        with contextlib.closing(sqlite3.connect(where, isolation_level=None)) as locked:
            locked.execute("BEGIN IMMEDIATE")
            yield


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_it_ends_when_it_is_told_to_though_the_database_hangs(
    request: pytest.FixtureRequest, launch: Launch, tmp_path: Path, kind: str, signals: int
) -> None:
    own_server = request.getfixturevalue("own_server") if kind == "postgresql" else None
    where = request.getfixturevalue("own_database") if kind == "postgresql" else str(tmp_path / "stats.sqlite3")
    # With two signals the grace does not matter.
    grace_seconds = GRACE_SECONDS if signals == 1 else 600
    options = ("--listen", "127.0.0.1:0", "--database", where, "--grace-seconds", str(grace_seconds))
    process = launch("stats_svc", *options)
    with hanging(where, own_server), grpc.insecure_channel(process.address) as channel:
        create = channel.unary_unary("/modpressure.v1.StatsService/CreateSystem")
        both = [create.future(b"\x0a\x07\x0a\x05small") for _ in range(2)]
        # As soon as one of two that are the same is refused, the other is a change whose commit is not answered.
        while not any(one.done() for one in both):
            time.sleep(0.01)
        asked = next(one for one in both if not one.done())
        _is_told_to_stop(process, signals)
        begun = time.monotonic()
        assert process.popen.wait(WAIT_SECONDS) == 0
        assert time.monotonic() - begun < END_SECONDS
        assert asked.exception(WAIT_SECONDS) is not None


def _is_told_to_stop(process: Process, signals: int) -> None:
    for number in range(signals):
        process.popen.send_signal(signal.SIGTERM)
        while sum('"signal": "SIGTERM"' in line for line in process.lines) <= number:
            # Two of a kind that are pending are one.
            time.sleep(0.01)
