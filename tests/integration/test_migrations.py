"""Databases of each earlier version, made by the scripts of that version, go on with all that they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from modpressure.client import Client
from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.requesters import Requester, Tally
from modpressure.kernel.system_memory import Amounts, Holding
from stats_svc import migrations, schema
from stats_svc.rows import HeldRow, InstanceRow, SystemRow
from stats_svc.store import SqlStore
from tests.services import Hand, Launch

OLD = range(1, schema.SCHEMA_VERSION)
FRESH_NS = 4 * 10**18


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return str(tmp_path / "stats.sqlite3")
    url: str = request.getfixturevalue("postgres_database")
    return url


@contextmanager
def connected(location: str) -> Iterator[sa.Connection]:
    """Give a connection in a transaction, to a file or a server."""
    engine = sa.create_engine(location if "://" in location else f"sqlite:///{location}")
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def insert(connection: sa.Connection, table: str, **values: Any) -> None:
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    connection.execute(sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), values)


OLD_COUNTERS = [name for name in COUNTER_NAMES if name != "abandoned_calls"]
"""Those that version 1 had."""

COUNTERS = Counters(**{name: 100 + number for number, name in enumerate(OLD_COUNTERS)})


def make(location: str, version: int) -> None:
    """Make a database as version ``version`` left it, with something in each table that it had."""
    with connected(location) as connection:
        migrations.upgrade(connection, 0, version)
        about = connection.execute(sa.text("SELECT schema_version FROM modpressure")).scalar_one()
        assert about == version
        counters = {name: getattr(COUNTERS, name) for name in OLD_COUNTERS}
        times = {"create_time_ns": 5, "reset_time_ns": 0, "update_time_ns": 7}
        named = {"name": "old"} if version >= 7 else {}
        numbers = {"policy": 2, "next_event_id": 1, "peak_held_bytes": 9}
        insert(connection, "systems", id="old", **named, **numbers, **times, **counters)
        entry = {"system": "old", "name": "xfs", "state": 3, "instance_id": "before", "call_id": 4, "loader": "l"}
        insert(connection, "modules", **entry, core_bytes=4096, position=1)
        failed = {"becoming_count": 1, "load_count": 2, "wasted_bytes": 3}
        insert(connection, "failed_modules", system="old", module="kvm", position=1, **failed)
        seen = {"applied_sequence": 8, "first_segment": 1, "last_seen_ns": FRESH_NS}
        insert(connection, "instances", instance_id="before", loader="l", **seen)
        if version >= 2:
            limits = {name: number for number, name in enumerate(_LIMITS, 1)}
            insert(connection, "memory_limits", system="old", **limits)
            held = {"instance_id": "before", "call_id": 4, "core_bytes": 4096, "core_areas": 1}
            none = dict.fromkeys(("file_bytes", "image_bytes", "init_bytes", "init_areas"), 0)
            insert(connection, "held_memory", system="old", **held, **none)
        if version >= 3:
            tally = {"calls": 3, "failures": 2, "wasted_bytes": 1}
            insert(connection, "requesters", system="old", origin=1, requester="udev", **tally)
        if version >= 4:
            insert(connection, "module_uses", system="old", used="libcrc32c", name="xfs")


_LIMITS = (
    "memory_bytes",
    "vmalloc_bytes",
    "module_area_bytes",
    "peak_memory_bytes",
    "peak_vmalloc_bytes",
    "peak_module_area_bytes",
)


@pytest.mark.parametrize("version", OLD)
def test_what_an_earlier_version_held_is_there_after_the_upgrade(location: str, version: int) -> None:
    make(location, version)
    limited = version >= 2
    expected = SystemRow("old", 2, 5, update_time_ns=7, peak_held_bytes=9, live_modules=1, counters=COUNTERS)
    if limited:
        expected.limits, expected.peak_taken = Amounts(1, 2, 3), Amounts(4, 5, 6)
    with closing(SqlStore(location)) as store:
        snapshot = store.load()
        found = store.stats("old")
        assert found is not None
        assert found == (expected, {Requester(1, "udev"): Tally(3, 2, 1)} if version >= 3 else {})
        assert [(row.name, row.call_id, row.core_bytes) for row in snapshot.modules] == [("xfs", 4, 4096)]
        assert snapshot.commit_time_ns == FRESH_NS
        assert snapshot.instances == [InstanceRow("before", "l", 8, FRESH_NS)]
        assert snapshot.held == (
            [HeldRow("old", "before", 4, Holding(core_bytes=4096, core_areas=1))] if limited else []
        )
        failed = store.failed_modules("old", before_position=None, limit=9)
        assert [row.module for row in failed] == [FailedModule("kvm", 1, 2, 3)]
        assert store.users("old", ["libcrc32c"]) == ({"libcrc32c": ["xfs"]} if version >= 4 else {})
    # As from now on.
    with closing(SqlStore(location)) as store:
        assert store.load().systems == snapshot.systems


@pytest.mark.parametrize("version", [0, *OLD])
def test_whatever_version_it_was_the_tables_are_those_of_this_one(location: str, version: int) -> None:
    if version:
        make(location, version)
    SqlStore(location).close()
    with connected(location) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_there_is_a_script_for_each_version_up_to_the_newest() -> None:
    assert migrations.newest() == schema.SCHEMA_VERSION


def test_an_upgrade_that_breaks_leaves_all_as_it_was(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(location, 1)
    last = migrations._scripts()[-1]

    def break_off() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(last, "upgrade", break_off)
        with pytest.raises(Exception, match="no space left on device"):
            SqlStore(location)
    with connected(location) as connection:
        assert connection.execute(sa.text("SELECT schema_version FROM modpressure")).scalar_one() == 1
        assert "requesters" not in sa.inspect(connection).get_table_names()
    with closing(SqlStore(location)) as store:
        assert [row.id for row in store.load().systems] == ["old"]


@pytest.mark.parametrize("version", OLD)
async def test_stats_svc_serves_and_counts_on_over_an_earlier_version(
    launch: Launch, location: str, version: int
) -> None:
    await asyncio.to_thread(make, location, version)
    process = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", location)
    hand = Hand(process.address, "after", "old")
    await hand.open()
    await hand.reserve(1, "nvme")
    await hand.give_up(1, "nvme")
    await hand.close()
    async with Client(stats=process.address) as client:
        stats = await client.stats("old")
        assert stats.calls == COUNTERS.calls + 1
        assert [event.call.module async for event in client.events("old")] == ["nvme"]
        assert [module.module async for module in client.loaded_modules("old")] == ["xfs"]
