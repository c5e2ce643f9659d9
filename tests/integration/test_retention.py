"""Old events go, in small steps; counters stay, and so does what loaders may still ask for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from modpressure.client import Client
from modpressure.kernel.counters import Counters
from modpressure.v1 import call_pb2, ledger_service_pb2
from modpressure.v1.stats_service_pb2 import ListEventsRequest
from stats_svc.ages import Ages
from stats_svc.database import STEP_PAGES
from stats_svc.event_rows import STEP_SEGMENTS, STEP_SYSTEMS
from stats_svc.events import EventLog
from stats_svc.housekeeping import Housekeeping
from stats_svc.ledger import Ledger
from stats_svc.rows import (
    Changes,
    ClaimRow,
    Commit,
    InstanceRow,
    Retention,
    Segment,
    SegmentKind,
    SystemDelta,
    SystemRow,
)
from stats_svc.session import Fence
from stats_svc.store import SqlStore
from tests.services import Hand, Launch

FRESH_NS = 4 * 10**18
LATER_NS = FRESH_NS * 2
MINUTE_NS = 60 * 10**9
HOUR_NS = 60 * MINUTE_NS
DAY_NS = 24 * HOUR_NS
ALL_GO = Retention(1, 0, LATER_NS)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    location = (
        str(tmp_path / "s.sqlite3") if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    )
    with closing(SqlStore(location)) as store:
        store.load()
        store.commit(Commit(1, [Changes(create=SystemRow("default", 2, create_time_ns=5))], []))
        yield store


def add(store: SqlStore, first: int, count: int, *, time_ns: int, instance: str = "", system: str = "default") -> None:
    """Commit events of which each has a call, as the last word of a loader process if one is named."""
    segment = Segment(SegmentKind.EVENTS, first, count)
    for number in range(first, first + count):
        segment.events.events.add().call.CopyFrom(
            call_pb2.Call(call_id=number, instance_id=instance or "somebody", module="xfs")
        )
    delta = SystemDelta(counters=Counters(calls=count), events=count, first_event_id=first, segments=[segment])
    instances = [InstanceRow(instance, "l", 1, time_ns)] if instance else []
    store.commit(Commit(time_ns, [Changes(deltas={system: delta})], instances))


def spans(store: SqlStore, system: str = "default") -> list[tuple[int, int]]:
    found = store.segments(system, newest=False, limit=1000)
    return [(segment.first_event_id, segment.last_event_id) for segment in found]


def test_the_newest_are_kept_by_number(store: SqlStore) -> None:
    for first in range(1, 100, 10):
        add(store, first, 10, time_ns=FRESH_NS + first)
    assert not store.prune_events(Retention(35, 0, LATER_NS))
    # A segment goes when all of it may.
    assert spans(store) == [(61, 70), (71, 80), (81, 90), (91, 100)]
    assert store.oldest_event_id("default") == 61
    row = store.system("default")
    assert row is not None and row.counters.calls == 100 and row.next_event_id == 101


def test_the_young_are_kept_by_age(store: SqlStore) -> None:
    for first in range(1, 100, 10):
        add(store, first, 10, time_ns=FRESH_NS + first)
    store.prune_events(Retention(0, FRESH_NS + 41, LATER_NS))
    assert spans(store)[0] == (41, 50)
    # Whatever the number, what may not be settled yet stays.
    store.prune_events(Retention(1, LATER_NS, FRESH_NS + 71))
    assert spans(store)[0] == (71, 80)
    store.prune_events(Retention(0, 0, LATER_NS))
    assert len(spans(store)) == 3


class Clocks:
    """A wall clock and a steady one."""

    def __init__(self) -> None:
        self.wall_ns, self.steady_ns = FRESH_NS, 0

    def run(self, ns: int) -> None:
        self.wall_ns += ns
        self.steady_ns += ns


@contextlib.asynccontextmanager
async def a_process(store: SqlStore, clocks: Clocks) -> AsyncIterator[tuple[Ledger, Housekeeping]]:
    """Give what a stats_svc has that starts over a store; it stores nothing at its end."""
    ages = Ages(lambda: clocks.wall_ns, lambda: clocks.steady_ns)
    ledger = Ledger(store, wall_clock_ns=lambda: clocks.wall_ns, ages=ages)
    await ledger.start()
    yield ledger, Housekeeping(store, ledger.in_writer, keep_events=0, keep_days=1, ages=ages)
    await ledger.stop()


async def test_a_clock_that_was_put_forward_makes_nothing_older_after_a_restart(store: SqlStore) -> None:
    clocks = Clocks()
    async with a_process(store, clocks):
        add(store, 1, 10, time_ns=clocks.wall_ns)
    async with a_process(store, clocks) as (ledger, _):
        clocks.wall_ns += 40 * DAY_NS
        await ledger.create_system("another", 2)
        clocks.run(2 * MINUTE_NS)
        add(store, 11, 10, time_ns=clocks.wall_ns)
    async with a_process(store, clocks) as (_, house):
        house.step()
        assert spans(store) == [(1, 10), (11, 20)]
    async with a_process(store, clocks) as (_, house):
        clocks.run(DAY_NS - MINUTE_NS)
        house.step()
        assert spans(store) == [(11, 20)]


@pytest.mark.parametrize("hours", [25, 20])
@pytest.mark.parametrize("when", ["in a process", "between two"])
async def test_what_a_clock_was_put_forward_by_is_stored_with_what_comes_after(
    store: SqlStore, when: str, hours: int
) -> None:
    clocks = Clocks()
    claims = {"pay-1": ClaimRow("default", "pay-1", b"", "", 0, settled=True, record=b"")}
    fenced = InstanceRow("over", "l", 1, clocks.wall_ns, Fence.LEASE_ENDED)
    store.commit(Commit(clocks.wall_ns, [Changes(deltas={"default": SystemDelta(claims=claims)})], [fenced]))
    # As from a file of a machine whose clock is far ahead.
    imported = SystemRow("imported", 2, create_time_ns=5, update_time_ns=clocks.wall_ns + 3650 * DAY_NS)
    store.commit(Commit(clocks.wall_ns, [Changes(create=imported)], []))
    for number in range(16):
        # Each is killed before it has looked for what is old.
        if when == "between two":
            clocks.wall_ns += hours * HOUR_NS
        async with a_process(store, clocks) as (ledger, _):
            if when == "in a process":
                clocks.wall_ns += hours * HOUR_NS
            await ledger.create_system(f"s{number}", 2)
    async with a_process(store, clocks) as (_, house):
        house.step()
        assert store.find_claims([("default", "pay-1")]) and store.instance("over")
        clocks.run(DAY_NS + MINUTE_NS)
        house.step()
        assert not store.find_claims([("default", "pay-1")]) and store.instance("over")
        clocks.run(6 * DAY_NS)
        house.step()
        assert store.instance("over") is None


def test_what_a_loader_did_last_is_found_however_old_it_is(store: SqlStore) -> None:
    add(store, 1, 10, time_ns=FRESH_NS, instance="mine")
    add(store, 11, 10, time_ns=FRESH_NS + 1, instance="mine")
    for first in range(21, 21 + 10 * STEP_SEGMENTS, 10):
        add(store, first, 10, time_ns=FRESH_NS + first)
    while store.prune_events(ALL_GO):
        pass
    last = 20 + 10 * STEP_SEGMENTS
    # The last segment has the newest event, which is one of those to be kept.
    assert spans(store) == [(11, 20), (last - 9, last)]
    assert EventLog(store).find("default", "mine", {5, 15}) == {15: 15}


def test_nothing_is_kept_for_a_process_that_cannot_come_back(store: SqlStore) -> None:
    add(store, 1, 10, time_ns=FRESH_NS, instance="gone")
    store.commit(Commit(FRESH_NS, [], [InstanceRow("gone", "l", 1, FRESH_NS, Fence.LEASE_ENDED)]))
    add(store, 11, 10, time_ns=FRESH_NS + 1, instance="mine")
    add(store, 21, 10, time_ns=FRESH_NS + 2)
    while store.prune_events(ALL_GO):
        pass
    assert spans(store) == [(11, 20), (21, 30)]


@pytest.mark.parametrize("retention", [ALL_GO, Retention(0, LATER_NS, LATER_NS)], ids=["number", "age"])
def test_systems_all_of_which_is_kept_hold_up_no_other(store: SqlStore, retention: Retention) -> None:
    """A step takes something of a few systems, so it must pass those by of which nothing goes."""
    needed = [f"a{number}" for number in range(2 * STEP_SYSTEMS)]
    others = [f"b{number}" for number in range(2 * STEP_SYSTEMS)]
    store.commit(Commit(1, [Changes(create=SystemRow(name, 2, create_time_ns=5)) for name in needed + others], []))
    for number, name in enumerate(needed):
        add(store, 1, 1, time_ns=FRESH_NS + number, instance=name, system=name)
        add(store, 2, 1, time_ns=LATER_NS, system=name)
    for name in others:
        for first in (1, 2):
            add(store, first, 1, time_ns=FRESH_NS + first + len(needed), system=name)
    while store.prune_events(retention):
        pass
    assert [spans(store, name) for name in needed] == [[(1, 1), (2, 2)]] * len(needed)
    assert [len(spans(store, name)) for name in others] == [retention.events] * len(others)


def test_each_step_takes_some_and_says_whether_there_is_more(store: SqlStore) -> None:
    for first in range(1, 2 * STEP_SEGMENTS + 11):
        add(store, first, 1, time_ns=FRESH_NS + first)
    assert store.prune_events(ALL_GO)
    assert len(spans(store)) == STEP_SEGMENTS + 10
    assert store.prune_events(ALL_GO)
    assert not store.prune_events(ALL_GO)
    assert spans(store) == [(2 * STEP_SEGMENTS + 10,) * 2]


def test_a_file_grows_no_more_once_as_much_goes_as_comes(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    with closing(SqlStore(str(path))) as store:
        store.load()
        store.commit(Commit(1, [Changes(create=SystemRow("default", 2, create_time_ns=5))], []))
        kept, sizes = 2000, []
        for number, first in enumerate(range(1, 40_001, 200)):
            segment = Segment(SegmentKind.EVENTS, first, 200)
            for call_id in range(first, first + 200):
                # What can't be compressed.
                call = call_pb2.Call(call_id=call_id, module="xfs", worker=os.urandom(32).hex())
                segment.events.events.add().call.CopyFrom(call)
            delta = SystemDelta(events=200, first_event_id=first, segments=[segment])
            store.commit(Commit(FRESH_NS + first, [Changes(deltas={"default": delta})], []))
            store.prune_events(Retention(kept, 0, LATER_NS))
            if number % 10 == 0:
                sizes.append(path.stat().st_size + Path(f"{path}-wal").stat().st_size)
    # Some pages more or less are in the log at the moment of a look.
    assert max(sizes[10:]) < 1.02 * max(sizes[5:10])


def test_a_file_that_is_mostly_free_is_given_back_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    with closing(SqlStore(str(path))) as store:
        store.load()
        store.commit(Commit(1, [Changes(create=SystemRow("default", 2, create_time_ns=5))], []))
        for first in range(1, 400):
            call = call_pb2.Call(call_id=first, module="xfs", worker=os.urandom(8000).hex())
            segment = Segment(SegmentKind.EVENTS, first, 1)
            segment.events.events.add().call.CopyFrom(call)
            delta = SystemDelta(events=1, first_event_id=first, segments=[segment])
            store.commit(Commit(FRESH_NS + first, [Changes(deltas={"default": delta})], []))
        assert not store.shrink()
        pages = pages_of(path)
        while store.prune_events(ALL_GO):
            pass
        assert pages_of(path) == pages
        steps = 0
        while store.shrink():
            steps += 1
            # Now and then a page that points to others goes with them.
            assert 0 <= pages - steps * STEP_PAGES - pages_of(path) <= steps
        assert steps and pages_of(path) < pages / 2
        assert spans(store) == [(399, 399)]


def pages_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA page_count").fetchone()[0])


async def test_pages_go_on_with_what_is_left(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite3"
    process = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(path))
    hand = Hand(process.address, "hand")
    await hand.open()
    for call_id in range(2, 12):
        await hand.reserve(2 * call_id, f"m{call_id}")
        await hand.give_up(2 * call_id, f"m{call_id}")
    await hand.close()
    async with Client(stats=process.address) as client:
        stub = client.stats_stub()
        first = await stub.ListEvents(ListEventsRequest(page_size=3))
        newest = await stub.ListEvents(ListEventsRequest(page_size=3, descending=True))
        assert [event.event_id for event in first.events] == [1, 2, 3]
        assert first.oldest_event_id == 1
        assert await asyncio.to_thread(process.stop) == 0
        # As if all this had been long ago.
        with closing(SqlStore(str(path))) as store:
            store.load()
            store.prune_events(Retention(4, 0, LATER_NS))
        process = await asyncio.to_thread(launch, "stats_svc", "--listen", process.address, "--database", str(path))
        rest = await stub.ListEvents(
            ListEventsRequest(page_size=3, page_token=first.next_page_token), wait_for_ready=True
        )
        assert [event.event_id for event in rest.events] == [7, 8, 9]
        assert rest.oldest_event_id == 7
        after = await stub.ListEvents(ListEventsRequest(after_event_id=2))
        assert [event.event_id for event in after.events] == [7, 8, 9, 10]
        older = await stub.ListEvents(
            ListEventsRequest(page_size=9, descending=True, page_token=newest.next_page_token)
        )
        assert [event.event_id for event in older.events] == [7]
        stats = await client.stats()
        assert (stats.calls, stats.events) == (10, 10)


async def test_a_service_keeps_as_many_as_it_is_told(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events settle within a minute; the test's process sees a minute pass at once."""
    from stats_svc import housekeeping

    monkeypatch.setattr(housekeeping, "SETTLE_SECONDS", -3600)
    with closing(SqlStore(str(tmp_path / "s.sqlite3"))) as store:
        ledger = Ledger(store)
        await ledger.start()
        house = housekeeping.Housekeeping(store, ledger.in_writer, keep_events=5, keep_days=0, idle_seconds=0.01)
        running = asyncio.create_task(house.run())
        session, _ = await ledger.connect(ledger_service_pb2.Hello(instance_id="one", loader="one"))
        for number in itertools.count(1):
            call = call_pb2.Call(module="xfs", outcome=call_pb2.OUTCOME_KREAD, errno="EIO")
            finish = ledger_service_pb2.FinishCall(call=call)
            operation = ledger_service_pb2.Operation(call_id=number, system="default", finish_call=finish)
            await ledger.submit(session, ledger_service_pb2.OperationBatch(sequence=number, operations=[operation]))
            while not (await session.next_results()).results:
                pass
            if number >= 50 and len(spans(store)) <= 6:
                break
        row = store.system("default")
        assert row is not None and row.counters.calls == number
        assert spans(store)[-1][1] == number
        running.cancel()
        await ledger.stop()
