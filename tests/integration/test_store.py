"""What the ledger and the servicers rely on of a store, on every database that there is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.modules_list import State
from modpressure.kernel.requesters import Requester, Tally
from modpressure.kernel.system_memory import Holding
from modpressure.v1 import call_pb2, ledger_service_pb2, stats_service_pb2
from stats_svc import schema
from stats_svc.events import EventFilter, EventLog
from stats_svc.instance_rows import STEP_INSTANCES
from stats_svc.rows import (
    Changes,
    ClaimRow,
    Commit,
    InstanceRow,
    ModuleRow,
    Retention,
    Segment,
    SegmentKind,
    Snapshot,
    StoreError,
    SystemDelta,
    SystemRow,
)
from stats_svc.store import SqlStore


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of its own for each test."""
    if request.param == "sqlite":
        yield str(tmp_path / "stats.sqlite3")
        return
    yield request.getfixturevalue("postgres_database")


Open = Callable[[], SqlStore]


@pytest.fixture
def open_store(location: str) -> Iterator[Open]:
    """Open the test's database; what was opened before is closed first, as when its process ends."""
    opened: list[SqlStore] = []

    def open_it() -> SqlStore:
        for store in opened:
            store.close()
        store = SqlStore(location)
        opened.append(store)
        store.load()
        return store

    yield open_it
    for store in opened:
        store.close()


def created(*ids: str) -> Commit:
    return Commit(1, [Changes(create=SystemRow(id, 2, create_time_ns=5)) for id in ids], [])


def added(system: str, delta: SystemDelta, time_ns: int = 10) -> Commit:
    return Commit(time_ns, [Changes(deltas={system: delta})], [])


def entry(name: str, position: int, state: State = State.LIVE, system: str = "default") -> ModuleRow:
    return ModuleRow(system, name, int(state), "instance", position, "loader", 4096, position)


def recorded(first_event_id: int, *call_ids: int, module: str = "xfs") -> Segment:
    segment = Segment(SegmentKind.CALLS, first_event_id, len(call_ids), instance_id="bulk", loader="virtual")
    record = ledger_service_pb2.RecordCalls()
    for call_id in call_ids:
        record.calls.add(call_id=call_id, module=module, outcome=4)
    segment.records.append(record)
    return segment


def single(first_event_id: int, *call_ids: int, instance_id: str = "instance") -> Segment:
    segment = Segment(SegmentKind.EVENTS, first_event_id, len(call_ids))
    for call_id in call_ids:
        call = segment.events.events.add().call
        call.call_id, call.instance_id, call.module = call_id, instance_id, "kvm"
        call.outcome = call_pb2.OUTCOME_LIVE
    return segment


def test_an_empty_database_is_made_ready_and_found_as_it_was(open_store: Open) -> None:
    assert open_store().load() == Snapshot([], [], [])
    assert open_store().load() == Snapshot([], [], [])


def test_counters_are_added_and_the_peak_only_rises(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default", "other"))
    each = Counters(**{name: number for number, name in enumerate(COUNTER_NAMES, 1)})
    store.commit(added("default", SystemDelta(counters=each, events=3, peak_held_bytes=700), time_ns=20))
    store.commit(added("default", SystemDelta(counters=each, events=2, peak_held_bytes=500), time_ns=30))
    twice = Counters()
    twice.add(each)
    twice.add(each)
    expected = SystemRow(
        "default", 2, create_time_ns=5, update_time_ns=30, next_event_id=6, peak_held_bytes=700, counters=twice
    )
    assert open_store().system("default") == expected
    assert open_store().system("other") == SystemRow("other", 2, create_time_ns=5)
    assert open_store().system("absent") is None


def test_requesters_add_up_are_found_again_and_go_with_a_reset(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default", "other"))
    udev, kernel = Requester(1, "udev"), Requester(2, "")
    for tallies in ({udev: Tally(2, 1, 100)}, {udev: Tally(3, 3, 50), kernel: Tally(1)}):
        store.commit(added("default", SystemDelta(requesters=defaultdict(Tally, tallies))))
    store = open_store()
    found = store.stats("default")
    assert found is not None
    assert found[1] == {udev: Tally(5, 4, 150), kernel: Tally(1)}
    assert {key: set(known) for key, known in store.load().requesters.items()} == {"default": {udev, kernel}}
    store.commit(Commit(1, [Changes(reset=("default", 7)), Changes(delete="other")], []))
    found = store.stats("default")
    assert found is not None and found[1] == {}
    assert store.stats("other") is None


def parameters_of(store: SqlStore, work: Callable[[], object]) -> list[tuple[str, int]]:
    """Do some work; return its statements, each with how many parameters it had for a row."""
    statements: list[tuple[str, int]] = []

    def note(_: object, __: object, statement: str, parameters: Any, ___: object, many: bool) -> None:
        statements.append((statement, len(parameters[0] if many else parameters)))

    engines = (store._database.writer, store._database.reader)
    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", note)
    try:
        work()
    finally:
        for engine in engines:
            sa.event.remove(engine, "before_cursor_execute", note)
    return statements


def test_more_systems_take_neither_more_statements_nor_longer_ones(open_store: Open) -> None:
    store = open_store()

    def fill(*systems: str) -> None:
        store.commit(created(*systems))
        for system in systems:
            delta = SystemDelta(
                modules={"xfs": entry("xfs", 1, system=system)},
                held={("instance", 1): Holding(file_bytes=4096)},
                requesters=defaultdict(Tally, {Requester(1, "udev"): Tally(1)}),
                claims={"boot": ClaimRow(system, "boot", b"", "instance", 2, settled=False, record=b"")},
            )
            store.commit(Commit(10, [Changes(deltas={system: delta})], [InstanceRow(system, "loader", 1, 10)]))

    def keep_house() -> None:
        for work in (
            store.sweep,
            lambda: store.prune_claims(1),
            lambda: store.prune_instances(1),
            lambda: store.prune_events(Retention(1, 1, 1)),
        ):
            assert not work()

    fill("s0")
    few = parameters_of(store, store.load), parameters_of(store, keep_house)
    names = [f"s{number}" for number in range(60)]
    fill(*names[1:])
    assert (parameters_of(store, store.load), parameters_of(store, keep_house)) == few
    found = store.load()
    of = [[row.system for row in rows] for rows in (found.modules, found.held, found.claims)]
    assert [sorted(systems) for systems in (*of, found.requesters)] == [sorted(names)] * 4
    # What users don't see is not loaded.
    store.commit(Commit(20, [Changes(delete=name) for name in names[1:]], []))
    found = store.load()
    of = [[row.system for row in rows] for rows in (found.modules, found.held, found.claims)]
    assert [*of, [*found.requesters]] == [["s0"]] * 4


def test_numbers_are_exact_to_63_bits(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    store.commit(added("default", SystemDelta(counters=Counters(total_mod_size=2**62), peak_held_bytes=2**63 - 1)))
    store.commit(added("default", SystemDelta(counters=Counters(total_mod_size=2**62 - 1))))
    system = store.system("default")
    assert system is not None
    assert (system.counters.total_mod_size, system.peak_held_bytes) == (2**63 - 1, 2**63 - 1)


def test_a_commit_is_all_or_nothing(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    delta = SystemDelta(counters=Counters(calls=1), modules={"xfs": entry("xfs", 1)})
    with pytest.raises(StoreError, match="a system is gone"):
        store.commit(Commit(2, [Changes(deltas={"default": delta}), Changes(deltas={"absent": delta})], []))
    assert store.load() == Snapshot([SystemRow("default", 2, create_time_ns=5)], [], [], commit_time_ns=1)


def test_the_modules_list_is_kept_in_order(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default", "other"))
    rows = [entry("c", 1), entry("a", 2), entry("b", 3, State.UNFORMED)]
    store.commit(added("default", SystemDelta(modules={row.name: row for row in rows})))
    store.commit(added("other", SystemDelta(modules={"a": entry("a", 1, system="other")})))
    assert store.modules("default", before_position=None, limit=10) == rows[::-1]
    assert store.modules("default", before_position=3, limit=1) == [rows[1]]
    # Unloaded and inserted anew in one group: only what is there at the end counts.
    live = entry("b", 3)
    store.commit(added("default", SystemDelta(modules={"c": None, "b": live, "never": None})))
    assert [row.name for row in store.load().modules if row.system == "default"] == ["a", "b"]
    system = store.system("default")
    assert system is not None
    assert system.live_modules == 2


def test_failed_modules_keep_the_place_of_their_first_failure(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    first = {"xfs": FailedModule("xfs", 1, 0, 10), "kvm": FailedModule("kvm", 0, 1, 20)}
    store.commit(added("default", SystemDelta(events=2, first_event_id=1, failed=first)))
    second = {"nvme": FailedModule("nvme", 1, 0, 1), "xfs": FailedModule("xfs", 2, 3, 5)}
    store.commit(added("default", SystemDelta(events=2, first_event_id=3, failed=second)))
    found = store.report("default")
    assert found is not None
    assert [row.module for row in found[1]] == [
        FailedModule("nvme", 1, 0, 1),
        FailedModule("kvm", 0, 1, 20),
        FailedModule("xfs", 3, 3, 15),
    ]
    [newest] = store.failed_modules("default", before_position=None, limit=1)
    rest = store.failed_modules("default", before_position=newest.position, limit=10)
    assert [row.module.module for row in (newest, *rest)] == ["nvme", "kvm", "xfs"]
    assert store.report("absent") is None


def test_systems_are_listed_by_the_bytes_of_their_ids(open_store: Open) -> None:
    store = open_store()
    ids = ["a", "a-b", "a0", "aa", "ab", "b-1"]
    store.commit(created(*reversed(ids)))
    assert [row.id for row in store.systems(after_id="", limit=10)] == sorted(ids) == ids
    assert [row.id for row in store.systems(after_id="a-b", limit=2)] == ["a0", "aa"]


def test_instances_are_overwritten_and_those_that_are_over_forgotten(open_store: Open) -> None:
    store = open_store()
    old, new = 10**18, 4 * 10**18
    rows = [InstanceRow("idle", "x", 1, old), InstanceRow("new", "y", 1, new)]
    over = [InstanceRow(f"over-{n}", "z", 1, old, 1) for n in range(STEP_INSTANCES + 1)]
    over.append(InstanceRow("just", "z", 1, new, 2))
    store.commit(Commit(1, [Changes()], [*rows, *over]))
    store.commit(Commit(1, [Changes()], [InstanceRow("new", "z", 7, new)]))
    # What is over is not kept in memory.
    assert sorted(row.instance_id for row in store.load().instances) == ["idle", "new"]
    assert store.instance("new") == InstanceRow("new", "z", 7, new)
    assert store.instance("over-1") == over[1] and store.instance("absent") is None
    assert not store.prune_instances(old)
    assert store.prune_instances(old + 1)
    assert not store.prune_instances(old + 1)
    assert store.instance("over-1") is None and store.instance("just") is not None and store.instance("idle")


def test_reset_and_delete_come_in_the_order_in_which_they_were_asked(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default", "doomed"))
    before = SystemDelta(
        counters=Counters(calls=5), events=2, first_event_id=1, peak_held_bytes=9, modules={"xfs": entry("xfs", 1)},
        failed={"xfs": FailedModule("xfs", 1)}, segments=[single(1, 1, 2)],
    )  # fmt: skip
    after = SystemDelta(counters=Counters(calls=1), events=1, first_event_id=1, segments=[single(1, 3)])
    steps = [
        Changes(deltas={"default": before, "doomed": SystemDelta(segments=[single(1, 1)])}),
        Changes(reset=("default", 50), deltas={"default": after}),
        Changes(delete="doomed"),
    ]
    store.commit(Commit(60, steps, []))
    system = SystemRow(
        "default", 2, create_time_ns=5, reset_time_ns=50, update_time_ns=60, next_event_id=2, counters=Counters(calls=1)
    )
    assert store.load() == Snapshot([system], [], [], commit_time_ns=60)
    assert store.report("default") == (system, [])
    assert [segment.last_event_id for segment in store.segments("default", newest=False, limit=9)] == [1]
    assert store.segments("doomed", newest=False, limit=9) == []


def ids(events: EventLog, **options: int | bool) -> list[int]:
    page = events.page(
        "default",
        EventFilter(),
        limit=int(options.get("limit", 100)),
        newest=bool(options.get("newest", False)),
        after_event_id=int(options.get("after", 0)),
        before_event_id=int(options.get("before", 0)),
    )
    return [event.event_id for event in page.events]


def test_events_are_read_from_either_end(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    for number in range(10):
        first = 1 + 3 * number
        segment = recorded(first, 1, 2, 3) if number % 2 else single(first, 1, 2, 3)
        store.commit(added("default", SystemDelta(events=3, segments=[segment]), time_ns=100 + number))
    events = EventLog(store)
    every = list(range(1, 31))
    assert ids(events) == every
    assert ids(events, newest=True) == every[::-1]
    assert ids(events, after=4, limit=3) == [5, 6, 7]
    assert ids(events, newest=True, before=27, limit=4) == [26, 25, 24, 23]
    assert ids(events, newest=True, before=27, after=25) == [26]
    assert ids(events, after=30) == []
    page = events.page("default", EventFilter(), limit=30, newest=False, after_event_id=0, before_event_id=0)
    assert page.last_event_id == 30
    bulk = page.events[4].call
    assert (bulk.system, bulk.event_id, bulk.instance_id, bulk.loader) == ("default", 5, "bulk", "virtual")
    assert page.events[4].commit_time.ToNanoseconds() == 101
    some = EventFilter(module="kvm", outcomes=frozenset({1}))
    page = events.page("default", some, limit=4, newest=False, after_event_id=0, before_event_id=0)
    assert [event.event_id for event in page.events] == [1, 2, 3, 7]


def test_many_small_segments_are_read_whole(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    steps = [Changes(deltas={"default": SystemDelta(events=1, segments=[single(n, n)])}) for n in range(1, 701)]
    store.commit(Commit(1, steps, [InstanceRow("instance", "l", 0, 4 * 10**18)]))
    events = EventLog(store)
    assert ids(events, limit=1000) == list(range(1, 701))
    assert ids(events, limit=1000, newest=True) == list(range(700, 0, -1))


def moved(sequence: int, *segments: Segment, nothing_before: bool = True) -> Commit:
    """Return a commit in which the process ``mine`` comes to a place in its stream."""
    delta = SystemDelta(events=sum(segment.count for segment in segments), segments=list(segments))
    steps = [Changes(deltas={"default": delta})] if segments else [Changes()]
    return Commit(1, steps, [InstanceRow("mine", "l", sequence, 4 * 10**18, nothing_before=nothing_before)])


@pytest.mark.parametrize("newest", [False, True], ids=["oldest first", "newest first"])
def test_a_page_of_events_is_no_longer_than_clients_take(open_store: Open, newest: bool) -> None:
    store = open_store()
    store.commit(created("default"))
    # Longer ones than any of today, as an older program may have stored.
    lengths_bytes = [3_900_000, 3_900_000, 100, 2_000_000, 2_100_000, 100_000, 15_500_000, 100]
    segment = single(1, *range(1, len(lengths_bytes) + 1))
    for event, length_bytes in zip(segment.events.events, lengths_bytes, strict=True):
        event.call.value = "v" * length_bytes
    store.commit(added("default", SystemDelta(events=len(lengths_bytes), segments=[segment])))
    log, found, position = EventLog(store), list[list[int]](), 0
    while True:
        after, before = (0, position) if newest else (position, 0)
        page = log.page(
            "default", EventFilter(), limit=1000, newest=newest, after_event_id=after, before_event_id=before
        )
        found.append([event.event_id for event in page.events])
        response = stats_service_pb2.ListEventsResponse(events=page.events, next_page_token="x" * 100)
        assert response.ByteSize() <= 4 << 20 or len(page.events) == 1
        position = page.last_event_id
        if not position:
            break
    assert found == ([[8], [7], [6, 5], [4, 3], [2], [1]] if newest else [[1], [2, 3], [4, 5], [6], [7], [8]])


def test_the_ends_of_a_processes_calls_are_found_and_nobody_elses(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    store.commit(added("default", SystemDelta(events=1, segments=[single(1, 5, instance_id="mine")])))
    # What was committed before the process was first seen can't be its own.
    store.commit(moved(0))
    store.commit(moved(1, single(2, 6, 7, instance_id="mine")))
    store.commit(added("default", SystemDelta(events=1, segments=[single(4, 8, instance_id="other")])))
    store.commit(added("default", SystemDelta(events=1, segments=[recorded(5, 9)])))
    # A batch that was sent while the one before was not answered.
    store.commit(moved(2, single(6, 10, instance_id="mine"), nothing_before=False))
    assert EventLog(store).find("default", "mine", {5, 6, 7, 8, 9, 10}) == {6: 2, 7: 3, 10: 6}
    store = open_store()
    assert EventLog(store).find("default", "mine", {6, 7}) == {6: 2, 7: 3}
    store.commit(moved(3))
    assert EventLog(store).find("default", "mine", {6, 7, 10}) == {}


def test_what_a_process_did_before_its_last_batch_is_not_looked_through(open_store: Open, decoded: list[int]) -> None:
    store = open_store()
    store.commit(created("default"))
    store.commit(moved(0))
    for sequence in range(1, 400):
        store.commit(moved(sequence, single(sequence, sequence, instance_id="mine")))
    # One that has not ended; after that one which has.
    assert EventLog(store).find("default", "mine", {400}) == {}
    assert len(decoded) == 1
    assert EventLog(open_store()).find("default", "mine", {399, 400}) == {399: 399}
    assert len(decoded) == 2


def test_segments_that_a_reset_removed_do_not_confuse_who_was_seen_after_them(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    for first in range(1, 6):
        store.commit(added("default", SystemDelta(events=1, segments=[single(first, first)])))
    store.commit(Commit(1, [Changes()], [InstanceRow("mine", "l", 0, 4 * 10**18)]))
    store.commit(Commit(1, [Changes(reset=("default", 1))], []))
    store = open_store()
    store.commit(added("default", SystemDelta(events=1, segments=[single(1, 1, instance_id="mine")])))
    assert EventLog(store).find("default", "mine", {1}) == {1: 1}


def test_a_second_writer_is_refused(open_store: Open, location: str) -> None:
    store = open_store()
    with (
        pytest.raises(StoreError, match=r"(in use|written to) by another stats_svc"),
        contextlib.closing(SqlStore(location)) as other,
    ):
        other.load()
    store.ping()
    store.close()
    second = SqlStore(location)
    second.load()
    second.close()


def test_a_database_from_the_future_is_refused(open_store: Open, location: str) -> None:
    open_store().close()
    url = sa.make_url(location) if "://" in location else sa.URL.create("sqlite", database=location)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.update(schema.about).values(schema_version=99))
    engine.dispose()
    with pytest.raises(
        StoreError, match=f"has version 99 of the tables; this program knows versions up to {schema.SCHEMA_VERSION}"
    ):
        SqlStore(location)


def test_readers_see_whole_commits_while_the_writer_is_at_work(open_store: Open) -> None:
    store = open_store()
    store.commit(created("default"))
    torn: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found = store.report("default")
            assert found is not None
            counters, failed = found[0].counters, found[1]
            if counters.duplicates != sum(row.module.count for row in failed):
                torn.append(f"{counters.duplicates} {failed}")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        failed = {f"m{number % 7}": FailedModule(f"m{number % 7}", 1)}
        delta = SystemDelta(counters=Counters(duplicates=1), events=1, first_event_id=number + 1, failed=failed)
        store.commit(added("default", delta))
    done.set()
    reader.join()
    assert torn == []


# --- what can be wrong with a file ---


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread\n" * 100)
    with pytest.raises(StoreError, match=rf"{path}: file is not a database"):
        SqlStore(str(path))
    assert path.read_text() == "milk, bread\n" * 100


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"{path} holds tables of something else, such as 'bookmarks'"):
        SqlStore(str(path))
    assert path.read_bytes() == before


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{tmp_path}: is a directory"):
        SqlStore(str(tmp_path))


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("mysql://localhost/x", "neither a path nor the URL|not supported"),
        ("nonsense://localhost/x", "neither a path nor the URL of a database"),
        ("postgresql://nobody:secret@127.0.0.1:port/x", "postgresql://nobody:.*@127.0.0.1:port/x: 'port' is no port"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://nobody:secret@127.0.0.1:1/x", "connection"),
    ],
)
def test_a_location_that_makes_no_sense_is_refused(location: str, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence) as caught:
        SqlStore(location)
    assert "secret" not in caught.value.sentence
    assert "\n" not in caught.value.sentence


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "stats.sqlite3"
    store = SqlStore(str(path))
    store.load()
    store.commit(created("default"))
    path.rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="no such file"):
        store.commit(created("other"))
    path.write_bytes(b"")
    with pytest.raises(StoreError, match=f"{path} has been replaced by another file"):
        store.ping()
    path.unlink()
    (tmp_path / "moved").rename(path)
    store.commit(created("other"))
    assert [row.id for row in store.load().systems] == ["default", "other"]
    store.close()


READ_ONLY_PROGRAM = """
import sys
from stats_svc.rows import StoreError
from stats_svc.store import SqlStore
try:
    SqlStore(sys.argv[1]).load()
except StoreError as error:
    print(error)
else:
    print("opened")
"""


def as_ordinary_user(*command: str) -> list[str]:
    """Return a command that permissions bind, though the tests be run by root."""
    if os.geteuid() != 0:
        return list(command)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root may write everything, and there is no setpriv to give that up")
    return [setpriv, "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override", *command]


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_read_only_is_refused(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "data"
    path = directory / "stats.sqlite3"
    store = SqlStore(str(path))
    store.load()
    store.close()
    (path if what == "file" else directory).chmod(0o555)
    command = as_ordinary_user(sys.executable, "-c", READ_ONLY_PROGRAM, str(path))
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    directory.chmod(0o755)
    assert ended.stdout.startswith(f"{path}: ")
    assert any(words in ended.stdout for words in ("readonly database", "permission denied", "unable to open"))
    assert ended.stdout.count("\n") == 1


def test_who_is_refused_a_file_leaves_the_locks_of_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "stats.sqlite3"

    def locks() -> list[list[str]]:
        """Return kind, access and place of the locks on the file, but for their numbers (proc_locks(5))."""
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return sorted(line[1:] for line in lines if line[5].endswith(f":{path.stat().st_ino}"))

    with contextlib.closing(SqlStore(str(path))) as store:
        store.load()
        held = locks()
        assert {kind for kind, *_ in held} == {"OFDLCK", "POSIX"}
        for _ in range(2):
            with pytest.raises(StoreError, match="in use by another"):
                SqlStore(str(path))
        assert locks() == held
    assert locks() == []
