"""Several stats_svc over one PostgreSQL database: one leads, any may be asked, and none that was deposed commits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import sqlalchemy as sa

from modpressure.client import Client
from modpressure.errors import AlreadyExists, BadRequest, Forbidden, NotFound, Unavailable
from modpressure.kernel.counters import Counters
from modpressure.tokens import Role, entry, new_token
from modpressure.v1 import call_pb2, ledger_service_pb2
from modpressure.v1.stats_service_pb2 import MemoryAmounts
from stats_svc.leadership import Leadership
from stats_svc.rows import Changes, Commit, StandingBy, StoreError, SystemDelta, SystemRow
from stats_svc.store import SqlStore
from tests import postgres
from tests.services import Hand, Launch, Process

WAIT_SECONDS = 60
LEAD_SECONDS = 1.0


# --- the store: who leads, and that nobody else commits ---


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stores(postgres_database: str) -> Iterator[Callable[[], tuple[SqlStore, Clock]]]:
    """Open the database once more, with a clock of its own."""
    with contextlib.ExitStack() as opened:

        def open_one() -> tuple[SqlStore, Clock]:
            store = opened.enter_context(contextlib.closing(SqlStore(postgres_database)))
            clock = Clock()
            store._database.leadership = Leadership(store.name, clock=clock)
            return store, clock

        yield open_one


@pytest.fixture
def server_side(postgres_database: str) -> Iterator[sa.Connection]:
    """A connection of somebody else, that commits each statement."""
    engine = sa.create_engine(postgres_database, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection


def created(name: str) -> Commit:
    return Commit(1, [Changes(create=SystemRow(name, 2, create_time_ns=5))], [])


def counted(name: str = "default") -> Commit:
    return Commit(1, [Changes(deltas={name: SystemDelta(counters=Counters(calls=1), events=1)})], [])


def calls(store: SqlStore, name: str = "default") -> int:
    row = store.system(name)
    assert row is not None
    return row.counters.calls


def disconnect_others(connection: sa.Connection) -> None:
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")


def test_the_second_stands_by_until_the_first_has_been_silent_for_long(stores: Any) -> None:
    (first, _), (second, clock) = stores(), stores()
    first.reached_at("here:1")
    first.load()
    first.commit(created("default"))
    with pytest.raises(StandingBy, match="written to by another stats_svc at here:1") as told:
        second.load()
    assert (told.value.address, told.value.is_alive) == ("here:1", False)
    clock.now = 2.9
    first.ping()
    with pytest.raises(StandingBy) as told:
        second.load()
    assert told.value.is_alive
    clock.now += 2.9
    with pytest.raises(StandingBy):
        second.load()
    clock.now += 0.2
    assert [row.id for row in second.load().systems] == ["default"]


def test_who_was_deposed_commits_nothing_and_who_ends_hands_over_at_once(stores: Any) -> None:
    (first, _), (second, clock) = stores(), stores()
    first.load()
    first.commit(created("default"))
    with pytest.raises(StandingBy):
        second.load()
    clock.now = 3.0
    second.load()
    for attempt in (lambda: first.commit(counted()), first.ping, first.load):
        with pytest.raises(StandingBy):
            attempt()
    second.commit(counted())
    assert calls(first) == calls(second) == 1
    # Its own end takes nothing from the other, whose end lets it back at once.
    second.close()
    first.load()
    first.commit(counted())
    assert calls(first) == 2


def test_a_leader_knows_for_how_long_it_can_be_sure(stores: Any) -> None:
    store, clock = stores()
    assert not store.leads_for_certain
    store.load()
    assert store.leads_for_certain
    clock.now = 3.0
    assert not store.leads_for_certain
    store.ping()
    assert store.leads_for_certain


def test_a_leader_of_an_older_program_stops_when_a_newer_one_has_changed_the_tables(
    stores: Any, server_side: sa.Connection
) -> None:
    store, _ = stores()
    store.load()
    server_side.exec_driver_sql("UPDATE modpressure SET schema_version = schema_version + 1")
    for attempt in (lambda: store.commit(created("default")), store.load):
        with pytest.raises(StoreError, match=r"has version .* of the tables; this program knows versions up to"):
            attempt()


def test_a_lost_connection_before_a_commit_is_not_noticed(stores: Any, server_side: sa.Connection) -> None:
    store, _ = stores()
    store.load()
    store.commit(created("default"))
    for number in range(1, 4):
        disconnect_others(server_side)
        store.commit(counted())
        assert calls(store) == number


def test_a_commit_whose_answer_got_lost_is_not_made_twice(
    stores: Any, server_side: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = stores()
    store.load()
    store.commit(created("default"))
    dialect = store._database.writer.dialect
    commit = dialect.do_commit
    lost = []

    def lose(connection: Any) -> None:
        """Commit, and have the connection die before the client learns of it."""
        commit(connection)
        if not lost:
            lost.append(True)
            disconnect_others(server_side)
            connection.execute("SELECT 1")

    monkeypatch.setattr(dialect, "do_commit", lose)
    store.commit(counted())
    assert lost and calls(store) == 1
    store.commit(counted())
    assert calls(store) == 2


def test_a_commit_whose_answer_got_lost_to_one_who_was_deposed_is_not_made_again(
    stores: Any, server_side: sa.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store, _), (other, clock) = stores(), stores()
    store.load()
    store.commit(created("default"))
    with pytest.raises(StandingBy):
        other.load()
    clock.now = 3.0
    dialect = store._database.writer.dialect

    def die(connection: Any) -> None:
        """Have the connection die before the commit, and somebody else lead meanwhile."""
        monkeypatch.undo()
        disconnect_others(server_side)
        with pytest.raises(StoreError, match="terminating connection"):
            other.load()
        other.load()
        connection.commit()

    monkeypatch.setattr(dialect, "do_commit", die)
    with pytest.raises(StandingBy):
        store.commit(counted())
    assert calls(other) == 0


def test_a_read_that_is_lost_without_a_word_is_one_sentence_and_no_traceback(
    stores: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As libpq leaves it when it closes the socket while psycopg waits: neither closed nor done."""
    store, _ = stores()
    store.load()
    dialect = store._database.writer.dialect

    def be_lost(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        monkeypatch.undo()
        cursor.connection.pgconn.send_query(b"SELECT 1")
        raise psycopg.OperationalError("connection socket closed")

    monkeypatch.setattr(dialect, "do_execute", be_lost)
    with pytest.raises(StoreError, match=r": connection socket closed$"):
        store.load()
    assert caplog.records == []
    store.load()


def test_a_deadlock_is_tried_again(stores: Any, postgres_database: str) -> None:
    store, _ = stores()
    store.load()
    store.commit(created("default"))
    engine = sa.create_engine(postgres_database, poolclass=sa.NullPool)
    failures: list[BaseException] = []

    def count() -> None:
        try:
            store.commit(counted())
        except BaseException as error:
            failures.append(error)

    with engine.connect() as other, engine.connect() as watcher:
        # The server looks for deadlocks after this time; whoever looks first is the victim, so let it be the store.
        other.exec_driver_sql("SET deadlock_timeout = '60s'")
        other.exec_driver_sql("UPDATE systems SET policy = policy")
        committing = threading.Thread(target=count)
        committing.start()
        blocked = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE systems%%'"
        )
        while watcher.exec_driver_sql(blocked).scalar_one() == 0:
            watcher.rollback()
        other.exec_driver_sql("UPDATE modpressure SET opened_time_ns = opened_time_ns")
        other.commit()
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        committing.join(WAIT_SECONDS)
        assert not committing.is_alive() and failures == []
        while not watcher.exec_driver_sql(deadlocks).scalar_one():
            # Statistics come a little later.
            watcher.rollback()
    assert calls(store) == 1


# --- services ---


async def ready(address: str) -> bool:
    """Return whether a stats_svc leads or knows who does."""
    async with Client(stats=address) as client:
        try:
            await client.create_system("default")
        except AlreadyExists:
            return True
        except Unavailable:
            return False
    raise AssertionError("each leader makes that system")


def leader_of(processes: list[Process], url: str) -> Process:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        address = connection.execute(sa.text("SELECT leader_address FROM modpressure")).scalar_one()
    return next(process for process in processes if process.address == address)


Replica = Callable[..., Process]


@pytest.fixture
def replica(postgres_database: str, launch: Launch) -> Replica:
    def start(*arguments: str, listen: str = "127.0.0.1:0") -> Process:
        lead = ("--lead-seconds", str(LEAD_SECONDS))
        return launch("stats_svc", "--listen", listen, "--database", postgres_database, *lead, *arguments)

    return start


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_any_replica_may_be_asked_for_anything(replica: Replica, launch: Launch) -> None:
    first, second = await asyncio.to_thread(replica), await asyncio.to_thread(replica)
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", second.address)
    async with Client([loader.address], second.address) as by_second, Client(stats=first.address) as by_first:
        await by_second.create_system("small", limits=MemoryAmounts(memory_bytes=64 << 20))
        with pytest.raises(AlreadyExists, match="there is a system 'small' already"):
            await by_second.create_system("small")
        with pytest.raises(BadRequest, match="'No!' is no system id"):
            await by_second.create_system("No!")
        with pytest.raises(NotFound, match="there is no system 'absent'"):
            await by_second.reset_system("absent")
        assert (await by_second.load("xfs", system="small")).call.event_id
        for client in (by_first, by_second):
            stats = await client.stats("small")
            assert (stats.loaders, stats.calls) == (1, stats.modcount)
            assert stats.held_bytes > 0
            assert [event.call.system async for event in client.events("small")] == ["small"] * stats.calls
            assert {module.module async for module in client.loaded_modules("small")} >= {"xfs"}
            taken = (await client.system("small")).taken
            assert taken.memory_bytes > 0
            assert [(system.id, system.taken) async for system in client.systems()] == [
                ("default", MemoryAmounts()),
                ("small", taken),
            ]
        assert await by_first.report("small") == await by_second.report("small")
        watched = by_second.watch("small", interval_seconds=0.05)
        assert (await anext(watched)).calls == stats.calls
        loaded = asyncio.create_task(by_second.load("ext4", system="small"))
        while (await anext(watched)).calls == stats.calls:
            # What loaders hold is told, too.
            pass
        await loaded
        await watched.aclose()  # type: ignore[attr-defined]
    # A loader that is stopped leaves nothing behind at once, through the other as well.
    assert loader.stop() == 0
    async with Client(stats=first.address) as client:
        await until(lambda: _has_loaders(client, 0))
    assert any(json.loads(line)["event"] == "loader disconnected" for line in first.lines)
    assert second.stop() == 0


@pytest.mark.parametrize("rpc", ["CreateSystem", "DeleteSystem", "GetStats", "WatchStats", "ImportSystem", "Connect"])
async def test_what_is_no_message_is_refused_by_who_stands_by(replica: Replica, rpc: str) -> None:
    await asyncio.to_thread(replica)
    second = await asyncio.to_thread(replica)
    service = "LedgerService" if rpc == "Connect" else "StatsService"
    async with grpc.aio.insecure_channel(second.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.stream_stream(f"/modpressure.v1.{service}/{rpc}")(iter([b"\xff"])).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{service}/{rpc}, 1 bytes, is not the message that it takes" in (refused.value.details() or "")
    assert not any("Traceback" in line for line in second.lines)


async def test_what_only_the_leader_knows_is_not_said_to_be_nothing_while_that_is_away(
    postgres_database: str, launch: Launch
) -> None:
    """Who leads is stopped, and may be silent for an hour: nobody follows meanwhile."""
    long = ("--database", postgres_database, "--lead-seconds", "3600")
    first = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", *long)
    second = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", *long)
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", first.address)
    async with Client([loader.address], second.address) as client:
        await client.create_system("small", limits=MemoryAmounts(memory_bytes=64 << 20))
        await client.load("xfs", system="small")
        before = await client.system("small")
        assert 0 < before.taken.memory_bytes < before.peak_taken.memory_bytes
        first.kill()
        for system in (await client.system("small"), [system async for system in client.systems()][-1]):
            assert not system.HasField("taken")
            assert (system.id, system.limits, system.peak_taken) == ("small", before.limits, before.peak_taken)
        executable = Path(sysconfig.get_path("scripts")) / "modpressure"
        told = subprocess.run(
            [executable, "systems", "show", "small", "--stats", second.address],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (told.returncode, told.stderr) == (0, "")
        assert "unknown" in told.stdout


async def _has_loaders(client: Client, number: int) -> bool:
    return (await client.stats()).loaders == number


async def test_tokens_are_asked_for_by_both(replica: Replica, tmp_path: Path) -> None:
    file, admin, read = tmp_path / "tokens.toml", new_token(), new_token()
    file.write_text(entry(admin, "all", [Role.ADMIN], ["*"], None) + entry(read, "some", [Role.READ], ["mine"], None))
    await asyncio.to_thread(replica, "--tokens", str(file))
    second = await asyncio.to_thread(replica, "--tokens", str(file))
    async with Client(stats=second.address, token=admin) as client:
        await client.create_system("mine")
    async with Client(stats=second.address, token=read) as client:
        assert (await client.stats("mine")).calls == 0
        with pytest.raises(Forbidden, match="token 'some' may not admin"):
            await client.create_system("other")
        with pytest.raises(Forbidden, match="system 'default'"):
            await client.stats()


async def test_a_killed_leader_is_followed_and_nothing_is_lost_or_doubled(
    replica: Replica, launch: Launch, postgres_database: str
) -> None:
    stats_svcs = [await asyncio.to_thread(replica) for _ in range(2)]
    both = ",".join(process.address for process in stats_svcs)
    loaders = [
        await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", both) for _ in range(2)
    ]
    diary: list[call_pb2.Call] = []
    asked = 0
    stop = asyncio.Event()

    async def work(client: Client, loader: Process, module: str) -> None:
        nonlocal asked
        while not stop.is_set():
            asked += 1
            with contextlib.suppress(Unavailable):
                loaded = await client.load(module, loader=loader.address, with_dependencies=False)
                diary.append(loaded.call)

    async with Client([loader.address for loader in loaders], both) as client:
        tasks = [asyncio.create_task(work(client, loader, "xfs")) for loader in loaders for _ in range(2)]
        for _ in range(2):
            answered = len(diary)
            await until(lambda answered=answered: _is(len(diary) > answered + 20))
            leader = leader_of(stats_svcs, postgres_database)
            leader.kill()
            other = next(process for process in stats_svcs if process is not leader)
            answered = len(diary)
            await until(lambda answered=answered: _is(len(diary) > answered + 20))
            assert leader_of([other], postgres_database) is other
            stats_svcs = [other, await asyncio.to_thread(replica, listen=leader.address)]
        stop.set()
        await asyncio.gather(*tasks)
        found = await client.stats()
        events = [event async for event in client.events(page_size=10_000)]
    told = {(call.instance_id, call.call_id): call.event_id for call in diary}
    logged = {(event.call.instance_id, event.call.call_id): event.event_id for event in events}
    assert len(told) == len(diary)
    assert told.items() <= logged.items()
    assert len(logged) == len(events) == found.calls == found.events <= asked


async def _is(value: bool) -> bool:
    return value


async def test_loaders_leave_a_leader_that_is_frozen_for_the_one_that_follows(
    replica: Replica, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stand, and take what is sent: only silence tells, long before gRPC's keepalive would."""
    monkeypatch.setattr("modpressure.client.SILENT_SECONDS", 1.0)
    lease = ("--lease-seconds", "4")
    first, second = await asyncio.to_thread(replica, *lease), await asyncio.to_thread(replica, *lease)
    both = f"{first.address},{second.address}"
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", both)
    async with Client([loader.address], second.address) as client, Client(stats=both) as reader:
        assert (await client.load("minix", request_id="before")).call.errno == ""
        assert (await reader.stats()).modcount == 1
        first.popen.send_signal(signal.SIGSTOP)
        try:
            # It is asked of the one that is frozen, which may even have it in its socket when it wakes.
            assert (await client.load("bfs", request_id="meanwhile")).call.errno == ""
            lost = [line for line in loader.lines if json.loads(line)["event"] == "lost stats_svc"]
            assert "it has stopped to answer, though the connection stands" in lost[0]
            # Who reads asks the next one, too.
            assert (await reader.stats()).modcount == 2
        finally:
            first.popen.send_signal(signal.SIGCONT)
        assert (await client.load("crc16", request_id="after")).call.errno == ""
        assert (await client.load("bfs", request_id="meanwhile")).call.errno == ""
        stats = await client.stats()
        assert (stats.modcount, stats.calls, stats.abandoned_calls, stats.loaders) == (3, 3, 0, 1)


async def test_a_paused_leader_is_deposed_and_commits_nothing_when_it_goes_on(
    replica: Replica, postgres_database: str
) -> None:
    first, second = await asyncio.to_thread(replica), await asyncio.to_thread(replica)
    old = Hand(first.address, "one")
    await old.open()
    first.popen.send_signal(signal.SIGSTOP)
    try:
        # While it does not run it is asked for a name; what it is asked for waits in its socket.
        await old.tell(ledger_service_pb2.Operation(call_id=2, reserve_name={"module": "xfs"}))
        await until(lambda: ready(second.address))
        new = Hand(second.address, "two")
        await new.open()
        reserved = await new.reserve(2, "xfs")
        assert reserved.verdict == ledger_service_pb2.OperationResult.VERDICT_PROCEED
    finally:
        first.popen.send_signal(signal.SIGCONT)
    with pytest.raises((AssertionError, grpc.aio.AioRpcError), match="written to by another stats_svc"):
        await old.answer()
    async with Client(stats=first.address) as client:
        [module] = [module async for module in client.loaded_modules()]
        assert (module.module, module.loader) == ("xfs", "two")
    await new.give_up(2, "xfs")
    await new.close()
    await old.close()


async def test_a_stop_hands_the_lead_over_at_once(postgres_database: str, launch: Launch) -> None:
    # A lead that, were it not given up, would outlast the test.
    long = ("--database", postgres_database, "--lead-seconds", "3600")
    first = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", *long)
    second = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", *long)
    assert await asyncio.to_thread(first.stop) == 0
    await until(lambda: ready(second.address))
    assert leader_of([second], postgres_database) is second


async def test_postgresql_restarts_under_load_and_nothing_is_lost(launch: Launch) -> None:
    if postgres.programs() is None:
        pytest.skip("no PostgreSQL is installed here")
    diary: list[call_pb2.Call] = []
    asked = 0
    stop = asyncio.Event()
    with postgres.running_server() as server, postgres.new_database(server.url) as url:
        stats = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", url)
        loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)

        async def work(client: Client) -> None:
            nonlocal asked
            while not stop.is_set():
                asked += 1
                with contextlib.suppress(Unavailable):
                    diary.append((await client.load("xfs", with_dependencies=False)).call)

        async with Client([loader.address], stats.address) as client:
            tasks = [asyncio.create_task(work(client)) for _ in range(3)]
            for _ in range(2):
                answered = len(diary)
                await until(lambda answered=answered: _is(len(diary) > answered + 20))
                await asyncio.to_thread(server.restart)
                answered = len(diary)
                await until(lambda answered=answered: _is(len(diary) > answered + 20))
            stop.set()
            await asyncio.gather(*tasks)
            found = await client.stats()
            logged = {(e.call.instance_id, e.call.call_id): e.event_id async for e in client.events(page_size=10_000)}
        told = {(call.instance_id, call.call_id): call.event_id for call in diary}
        assert len(told) == len(diary) and told.items() <= logged.items()
        assert len(logged) == found.calls == found.events <= asked
        assert await asyncio.to_thread(loader.stop) == 0
        assert await asyncio.to_thread(stats.stop) == 0
