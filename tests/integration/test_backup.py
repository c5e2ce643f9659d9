"""Copies of a database that is in use are whole, and a stats_svc goes on from them."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from modpressure.client import Client
from tests import postgres
from tests.services import Hand, Launch, Process


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("modpressure"))
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)


@asynccontextmanager
async def load(address: str) -> AsyncIterator[None]:
    """Have calls end all the time, one after another; at the end, count them."""
    hand = Hand(address, "hand")
    await hand.open()
    enough = asyncio.Event()

    async def work() -> int:
        call_id = 1
        while not enough.is_set():
            call_id += 1
            await hand.reserve(2 * call_id, "xfs")
            await hand.give_up(2 * call_id, "xfs")
        return call_id - 1

    working = asyncio.create_task(work())
    yield
    enough.set()
    count = await working
    await hand.close()
    async with Client(stats=address) as client:
        assert (await client.stats()).calls == count


async def more_calls(address: str) -> int:
    """Return how many calls there are, once there are more than at first."""
    async with Client(stats=address) as client:
        calls = (await client.stats()).calls
        while (found := (await client.stats()).calls) == calls:
            pass
    return found


async def check_restored(process: Process, at_least: int) -> None:
    async with Client(stats=process.address) as client:
        stats = await client.stats()
        events = [event.event_id async for event in client.events()]
        assert events == list(range(1, stats.calls + 1))
        assert stats.calls >= at_least
        hand = Hand(process.address, "after")
        await hand.open()
        await hand.reserve(2, "xfs")
        await hand.give_up(2, "xfs")
        await hand.close()
        assert (await client.stats()).calls == stats.calls + 1


async def test_a_file_is_copied_while_it_is_written_to(launch: Launch, tmp_path: Path) -> None:
    source, copy = tmp_path / "stats.sqlite3", tmp_path / "copies" / "copy.sqlite3"
    copy.parent.mkdir()
    process = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", str(source))
    async with load(process.address):
        at_least = await more_calls(process.address)
        done = await asyncio.to_thread(run, "backup", str(copy), "--database", str(source))
        assert done.returncode == 0, done.stderr
        again = await asyncio.to_thread(run, "backup", str(copy), "--database", str(source))
        assert again.returncode == 1 and "--force overwrites it" in again.stderr
        await more_calls(process.address)
    assert [entry.name for entry in copy.parent.iterdir()] == ["copy.sqlite3"]
    await check_restored(
        await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", str(copy)), at_least
    )


async def test_a_server_is_dumped_while_it_is_written_to(
    postgres_server: str, postgres_database: str, launch: Launch, tmp_path: Path
) -> None:
    found = postgres.programs()
    if found is None or not (found / "pg_dump").exists():
        pytest.skip("no pg_dump is installed here")
    process = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", postgres_database)
    url = sa.make_url(postgres_database).set(drivername="postgresql").render_as_string(hide_password=False)
    dump = tmp_path / "dump"
    async with load(process.address):
        at_least = await more_calls(process.address)
        command = [str(found / "pg_dump"), "--format=custom", f"--file={dump}", url]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
        await more_calls(process.address)
    assert await asyncio.to_thread(process.stop) == 0
    with postgres.new_database(postgres_server) as other:
        target = sa.make_url(other).set(drivername="postgresql").render_as_string(hide_password=False)
        command = [str(found / "pg_restore"), "--exit-on-error", f"--dbname={target}", str(dump)]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
        restored = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", other)
        await check_restored(restored, at_least)
        assert await asyncio.to_thread(restored.stop) == 0


def test_what_can_not_be_copied_is_told_in_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    text, other = tmp_path / "text", tmp_path / "other.sqlite3"
    text.write_text("milk, bread\n" * 100)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE shopping (what TEXT)")
    for database, sentence in (
        (str(tmp_path / "absent"), "there is no file"),
        (str(text), "file is not a database"),
        (str(other), "no such table: modpressure"),
        ("postgresql://somewhere/stats", "pg_dump"),
    ):
        done = run("backup", str(copy), "--database", database)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
        assert sentence in done.stderr
    done = run("backup", str(tmp_path / "no" / "copy"), "--database", str(other))
    assert done.returncode == 1 and "can't be copied" in done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.sqlite3", "text"]
