"""Systems on their way in: in steps that others come between, seen by nobody before they are whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
import zstandard

from modpressure.client import Client
from modpressure.errors import AlreadyExists, BadRequest, NotFound, NotNow, OverLimit, Overloaded
from modpressure.kernel.system_memory import Amounts
from modpressure.v1 import stats_service_pb2
from stats_svc import schema, servicer
from stats_svc.housekeeping import Housekeeping
from stats_svc.ledger import Ledger
from stats_svc.rows import StoreError, SystemRow
from stats_svc.servicer import StatsServicer
from stats_svc.store import SqlStore
from stats_svc.system_file import FileRows, Reader
from stats_svc.systems import IMPORTS
from tests.integration.test_ledger import Loader, fail, live, remove, reserve, settle
from tests.services import Launch

LIMIT_BYTES = 1 << 30


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "stats.sqlite3")
    url: str = request.getfixturevalue("postgres_database")
    return url


class World:
    """A ledger over either database."""

    def __init__(self, store: SqlStore) -> None:
        self.store = store
        self.ledger = Ledger(store)
        self.house = Housekeeping(store, self.ledger.in_writer, keep_events=0, keep_days=0)

    async def swept(self) -> dict[str, int]:
        """Let go of what nobody sees; return how many rows are left of each table that has systems."""
        while await self.ledger.in_writer(self.house.step):
            pass
        return rows_of(self.store)


def rows_of(store: SqlStore) -> dict[str, int]:
    with store._database.reader.connect() as connection:
        return {
            table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in schema.metadata.sorted_tables
            if table is schema.systems or "system" in table.c
        }


@pytest.fixture
async def world(location: str) -> AsyncIterator[World]:
    with closing(SqlStore(location)) as store:
        world = World(store)
        await world.ledger.start()
        yield world
        await world.ledger.stop()


class Bystander(Loader):
    """A loader of a world."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)  # type: ignore[arg-type]
        self.calls = 1000


async def filled(world: World, system: str = "default", calls: int = 30) -> Bystander:
    """Give a system something in each table that a file has; return the loader that did."""
    limited = system != "default"
    if limited:
        # No call there has asked for memory, so none goes live.
        await world.ledger.create_system(system, 2, Amounts(0, 0, 1 << 30))
    loader = Bystander(world, f"of-{system}")
    await loader.connect()
    for call_id in range(1, calls):
        operation = reserve(call_id, f"m{call_id}")
        operation.system = system
        await loader.ask(operation)
        is_live = call_id % 2 and not limited
        end = live(call_id, f"m{call_id}") if is_live else fail(call_id, reserved=True, module=f"m{call_id}")
        end.system = system
        await loader.ask(end)
    return loader


def file_of(store: SqlStore, system: str) -> bytes:
    return b"".join(store.export_system(system))


def steps_of(file: bytes) -> Iterator[list[FileRows]]:
    """Yield the rows of a file, one of a table at a time."""
    reader = Reader(LIMIT_BYTES)
    for table, rows in [*reader.feed(file), *reader.end()]:
        yield from ([(table, [row])] for row in rows)


class Sender:
    """Sends a file as far as it is told to."""

    def __init__(self, file: bytes) -> None:
        self._steps = steps_of(file)
        self._more = asyncio.Event()
        self.waits = asyncio.Event()
        self.error: Exception | None = None
        """What comes instead of the rest."""

    async def rows(self, before: int) -> AsyncIterator[list[FileRows]]:
        """Yield some steps, wait, and yield the rest."""
        for number, step in enumerate(self._steps):
            if number == before:
                self.waits.set()
                await self._more.wait()
                if self.error is not None:
                    raise self.error
            yield step

    async def wait(self, importing: asyncio.Task[SystemRow]) -> None:
        """Return when it waits, which it does before the import is over."""
        waiting = asyncio.create_task(self.waits.wait())
        await asyncio.wait({waiting, importing}, return_when=asyncio.FIRST_COMPLETED)
        assert waiting.done(), importing

    def go_on(self) -> None:
        self._more.set()


async def test_others_go_on_while_a_system_comes_in_that_nobody_sees_before_it_is_whole(world: World) -> None:
    bystander = await filled(world)
    file = file_of(world.store, "default")
    before = world.store.system("default")
    sender = Sender(file)
    importing = asyncio.create_task(world.ledger.import_system(sender.rows(10), "new", replace=False))
    await sender.wait(importing)
    assert [row.id for row in world.store.systems(after_id="", limit=9)] == ["default"]
    assert world.store.system("new") is None and world.store.segments("new", newest=True, limit=9) == []
    with pytest.raises(NotNow, match="system 'new' is being imported"):
        await world.ledger.create_system("new", 2)
    # It has no lock, and no transaction open.
    await bystander.ask(remove(bystander.new_call(), "m1"))
    await world.ledger.create_system("other", 2)
    await world.swept()
    sender.go_on()
    assert (await importing).id == "new"
    after = world.store.system("new")
    assert before is not None and after is not None
    assert (after.counters, after.live_modules) == (before.counters, before.live_modules)
    assert file_of(world.store, "default") != file


async def test_what_is_replaced_serves_until_its_successor_is_whole(world: World) -> None:
    bystander = await filled(world)
    file = file_of(world.store, "default")
    sender = Sender(file)
    importing = asyncio.create_task(world.ledger.import_system(sender.rows(10), "default", replace=True))
    await sender.wait(importing)
    await bystander.ask(remove(bystander.new_call(), "m1"))
    await bystander.ask(reserve(500, "new"))
    sender.go_on()
    with pytest.raises(NotNow, match="can't be replaced while calls are in flight"):
        await importing
    # Nothing is lost, and what had come in is taken away.
    row = world.store.system("default")
    assert row is not None and row.counters.unloads == 1
    await bystander.ask(fail(500, reserved=True, module="new"))
    alone = await world.swept()
    assert alone["systems"] == 1
    await world.ledger.import_system(Sender(file).rows(-1), "default", replace=True)
    row = world.store.system("default")
    assert row is not None and row.counters.unloads == 0
    assert (await world.swept())["systems"] == 1
    await settle(bystander)
    assert bystander.deleted_systems == ["default"]


@pytest.mark.parametrize("how", ["cancelled", "bad", "lost"])
async def test_of_what_ends_half_way_nothing_is_left(world: World, how: str) -> None:
    await filled(world, "limited")
    empty = rows_of(world.store)
    sender = Sender(file_of(world.store, "limited"))
    importing = asyncio.create_task(world.ledger.import_system(sender.rows(20), "new", replace=False))
    await sender.wait(importing)
    assert rows_of(world.store)["systems"] == empty["systems"] + 1
    if how == "cancelled":
        importing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await importing
    elif how == "bad":
        sender.error = BadRequest("the file can't be imported: it is cut short")
        sender.go_on()
        with pytest.raises(BadRequest):
            await importing
    else:
        # As when another process has led meanwhile.
        await world.ledger.in_writer(world.store.load)
        sender.go_on()
        with pytest.raises(Exception, match="was away while the system was imported"):
            await importing
    assert await world.swept() == empty
    await world.ledger.create_system("new", 2)


async def test_what_a_killed_process_left_is_seen_by_nobody_and_taken_away(location: str) -> None:
    with closing(SqlStore(location)) as store:
        store.load()
        world = World(store)
        await world.ledger.start()
        await filled(world)
        empty = rows_of(store)
        key = store.begin_import()
        for step in [*steps_of(file_of(store, "default"))][:-1]:
            await world.ledger.in_writer(lambda step=step: store.import_rows(key, step))  # type: ignore[misc]
        assert rows_of(store)["modules"] > empty["modules"]
        await world.ledger.stop()
    with closing(SqlStore(location)) as store:
        snapshot = store.load()
        assert [row.id for row in snapshot.systems] == ["default"]
        assert len(snapshot.modules) == empty["modules"]
        with pytest.raises(StoreError, match="was away while the system was imported"):
            store.show_imported(key, "new")
        while store.sweep():
            pass
        assert rows_of(store) == empty


async def test_what_was_reset_or_deleted_goes_at_once_and_is_taken_away_in_steps(world: World) -> None:
    await filled(world, "limited", 9)
    old = world.store.system("limited")
    assert old is not None
    row = await world.ledger.reset_system("limited")
    stored = world.store.system("limited")
    assert stored is not None
    assert (stored.policy, stored.create_time_ns, stored.limits) == (old.policy, old.create_time_ns, old.limits)
    assert (stored.counters.calls, stored.live_modules, stored.reset_time_ns) == (0, 0, row.reset_time_ns)
    assert world.store.oldest_event_id("limited") == 0 and rows_of(world.store)["event_segments"]
    assert await world.swept() == {
        **dict.fromkeys(rows_of(world.store), 0), "systems": 2, "memory_limits": 1
    }  # fmt: skip
    await world.ledger.delete_system("limited")
    assert world.store.system("limited") is None
    with pytest.raises(NotFound):
        await world.ledger.delete_system("limited")
    await world.ledger.create_system("limited", 3)
    assert (await world.swept())["systems"] == 2
    found = world.store.system("limited")
    assert found is not None and (found.policy, found.limits) == (3, None)


async def test_no_more_come_in_at_once_than_may(world: World) -> None:
    file = file_of(world.store, "default")
    senders = [Sender(file) for _ in range(IMPORTS)]
    running = [
        asyncio.create_task(world.ledger.import_system(sender.rows(0), f"new-{n}", replace=False))
        for n, sender in enumerate(senders)
    ]
    for sender, importing in zip(senders, running, strict=True):
        await sender.wait(importing)
    with pytest.raises(NotNow, match="system 'new-0' is being imported"):
        await world.ledger.import_system(Sender(file).rows(-1), "new-0", replace=False)
    with pytest.raises(Overloaded, match=f"{IMPORTS} systems are being imported"):
        await world.ledger.import_system(Sender(file).rows(-1), "more", replace=False)
    for sender in senders:
        sender.go_on()
    await asyncio.gather(*running)
    await world.ledger.import_system(Sender(file).rows(-1), "more", replace=False)


# --- limits ---


def test_a_piece_of_a_bomb_is_refused_before_it_is_unpacked_whole() -> None:
    bomb = zstandard.compress(bytes(1 << 28), level=1)
    reader = Reader(1 << 20)
    with pytest.raises(OverLimit, match="it has more than 1048576 bytes unpacked, which is stats_svc's import_limit"):
        reader.feed(bomb)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_a_file_may_come_in_any_pieces(world_file: bytes, pieces: int) -> None:
    reader = Reader(LIMIT_BYTES)
    size = -(-len(world_file) // pieces)
    found = [
        rows for start in range(0, len(world_file), size) for rows in reader.feed(world_file[start : start + size])
    ]
    found += reader.end()
    whole = Reader(LIMIT_BYTES)
    assert found == [*whole.feed(world_file), *whole.end()]


@pytest.fixture
async def world_file(tmp_path: Path) -> bytes:
    with closing(SqlStore(str(tmp_path / "file.sqlite3"))) as store:
        world = World(store)
        await world.ledger.start()
        await filled(world)
        file = file_of(store, "default")
        await world.ledger.stop()
    return file


async def test_a_service_takes_no_longer_file_than_it_is_told(launch: Launch, tmp_path: Path) -> None:
    database = str(tmp_path / "s.sqlite3")
    process = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", database, "--import-limit", "4KiB")
    async with Client(stats=process.address) as client:
        file = b"".join([chunk async for chunk in client.export_system("default")])
        await client.import_system("small", [file])
        with pytest.raises(OverLimit, match="it has more than 4096 bytes, which is stats_svc's import_limit"):
            await client.import_system("long", [bytes(5000)])
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(file)
        with pytest.raises(OverLimit, match="it has more than 4096 bytes unpacked, which is"):
            await client.import_system("bomb", [zstandard.compress(lines + b" " * 100_000)])
        with pytest.raises(NotFound):
            await client.stats("bomb")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("import")] == []


async def test_whoever_sends_nothing_more_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "STALLED_SECONDS", 0.05)
    service = StatsServicer(world.store, world.ledger, asyncio.Event(), import_limit_bytes=LIMIT_BYTES)

    async def stalled() -> AsyncIterator[stats_service_pb2.ImportSystemRequest]:
        yield stats_service_pb2.ImportSystemRequest(chunk=file_of(world.store, "default")[:10])
        await asyncio.Event().wait()

    with pytest.raises(OverLimit, match=r"no more of the file came for 0\.05 s"):
        await world.ledger.import_system(service._rows_of(stalled()), "new", replace=False)
    await world.ledger.create_system("new", 2)


async def test_a_refusal_reaches_whoever_still_sends(launch: Launch, tmp_path: Path) -> None:
    process = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "s.sqlite3"))
    async with Client(stats=process.address) as client:
        for _ in range(30):
            with pytest.raises(AlreadyExists, match="there is a system 'default' already"):
                await client.import_system("default", [bytes(1000)] * 200)
            with pytest.raises(BadRequest, match="it is not compressed with zstd, or damaged"):
                await client.import_system("new", [bytes(1000)] * 200)
