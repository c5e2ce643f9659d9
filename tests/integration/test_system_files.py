"""A system as one file, from and to either database, whole or not at all."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from modpressure.client import Client
from modpressure.errors import AlreadyExists, BadRequest, NotFound, NotNow
from modpressure.v1 import ledger_service_pb2
from modpressure.v1.call_pb2 import Call, Event
from modpressure.v1.loader_service_pb2 import LoadModuleResponse
from modpressure.v1.stats_service_pb2 import ListEventsResponse, MemoryAmounts
from stats_svc import schema
from stats_svc.names import MAX_RECORD_BYTES
from tests.services import Hand, Launch, Process

Services = Callable[[str], Process]


@pytest.fixture
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Services:
    """Start a stats_svc over a database of a kind, the same each time."""
    # The database outlives its service.
    url = request.getfixturevalue("postgres_database")
    launch: Launch = request.getfixturevalue("launch")

    def start(kind: str) -> Process:
        location = url if kind == "postgresql" else str(tmp_path / "stats.sqlite3")
        return launch("stats_svc", "--listen", "127.0.0.1:0", "--database", location)

    return start


async def exported(client: Client, system: str) -> bytes:
    return b"".join([chunk async for chunk in client.export_system(system)])


async def told(client: Client, system: str) -> dict[str, Any]:
    """Return all that a service tells of a system, but for its id and what is connected."""
    stats = await client.stats(system)
    for name in ("system", "loaders", "held_bytes", "peak_held_bytes", "update_time"):
        stats.ClearField(name)  # type: ignore[arg-type]
    events = [event async for event in client.events(system)]
    for event in events:
        (event.call if event.HasField("call") else event.unload).system = ""
    found = await client.system(system)
    return {
        "stats": stats,
        "events": events,
        "report": await client.report(system),
        "duplicates": [module async for module in client.failed_modules(system)],
        "modules": [module async for module in client.loaded_modules(system)],
        "system": (found.policy, found.create_time, found.limits, found.peak_taken),
    }


async def load_some(launch: Launch, address: str, system: str) -> None:
    """Give a system live modules, duplicates, an unload, and limits."""
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", address)
    async with Client([loader.address], address) as client:
        await client.create_system(system, limits=MemoryAmounts(memory_bytes=256 << 20))
        for module in ("xfs", "ext4", "xfs", "kvm"):
            await client.load(module, system=system, requester="udev")
        await client.unload("ext4", system=system)


@pytest.mark.parametrize(("source", "target"), [("sqlite", "postgresql"), ("postgresql", "sqlite")])
async def test_a_system_moves_between_databases(
    service: Services, launch: Launch, source: str, target: str, system: str
) -> None:
    here, there = await asyncio.to_thread(service, source), await asyncio.to_thread(service, target)
    await load_some(launch, here.address, system)
    async with Client(stats=here.address) as client, Client(stats=there.address) as other:
        before = await told(client, system)
        # A call in flight is left behind.
        hand = Hand(here.address, "hand", system)
        await hand.open()
        await hand.reserve(2, "nvme")
        file = await exported(client, system)
        imported = await other.import_system(system, [file[:100], file[100:]])
        assert imported.id == system
        after = await told(other, system)
        assert after["events"] and after == before
        await hand.give_up(2, "nvme")
        await hand.close()
        # It goes on there: names that are live are taken, new ones are counted.
        loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", there.address)
        async with Client([loader.address]) as loading:
            assert (await loading.load("xfs", system=system, with_dependencies=False)).call.errno == "EEXIST"
            await loading.load("ext4", system=system, with_dependencies=False)
            await loading.unload("kvm", system=system)
        assert (await other.stats(system)).events == before["stats"].events + 3
        with pytest.raises(AlreadyExists, match=f"there is a system '{system}' already"):
            await other.import_system(system, [file])
        await other.import_system(system, [file], replace=True)
        assert await told(other, system) == before
        await other.import_system("copy", [file])
        assert await told(other, "copy") == before
    assert await asyncio.to_thread(there.stop) == 0
    there = await asyncio.to_thread(service, target)
    async with Client(stats=there.address) as other:
        assert await told(other, system) == before


async def test_requests_move_along_under_another_name(stats: Process, loader: Process, system: str) -> None:
    async with Client([loader.address], stats.address) as client:
        asks: list[Callable[[str], Any]] = [
            lambda system: client.load("crc16", system=system, with_dependencies=False, request_id="load"),
            lambda system: client.unload("crc16", system=system, request_id="unload"),
        ]
        answers = [await ask(system) for ask in asks]
        await client.import_system(f"{system}-b", [await exported(client, system)])
        for ask, before in zip(asks, answers, strict=True):
            after = await ask(f"{system}-b")
            ended = after.call if isinstance(after, LoadModuleResponse) else after.unload
            assert ended.event_id and ended.system == f"{system}-b"
            ended.system = system
            assert after == before
        assert (await client.stats(f"{system}-b")).events == 2
        with pytest.raises(NotNow, match="was used for another request"):
            await client.load("xfs", system=f"{system}-b", request_id="load")


async def test_an_export_is_one_point_in_time_while_loads_go_on(stats: Process, system: str) -> None:
    async with Client(stats=stats.address) as client:
        hand = Hand(stats.address, f"hand-{system}", system)
        await hand.open()
        enough = asyncio.Event()

        async def load() -> int:
            call_id = 0
            while not enough.is_set():
                call_id += 1
                await hand.reserve(2 * call_id, "xfs")
                await hand.give_up(2 * call_id, "xfs")
            return call_id

        loading = asyncio.create_task(load())
        files = []
        for _ in range(4):
            calls = (await client.stats(system)).calls
            while (await client.stats(system)).calls == calls:
                pass
            files.append(await exported(client, system))
        enough.set()
        count = await loading
        counts = []
        for number, file in enumerate(files):
            copy = f"{system}-{number}"
            await client.import_system(copy, [file])
            found = await client.stats(copy)
            assert found.calls == found.events == len([event async for event in client.events(copy)])
            counts.append(found.calls)
        assert counts == sorted(set(counts)) and counts[-1] <= count
        await hand.close()


async def test_what_is_in_use_is_not_replaced_and_what_is_not_there_not_exported(stats: Process, system: str) -> None:
    async with Client(stats=stats.address) as client:
        with pytest.raises(NotFound, match=f"there is no system '{system}'"):
            await exported(client, system)
        hand = Hand(stats.address, f"hand-{system}", system)
        await hand.open()
        file = await exported(client, system)
        await hand.reserve(2, "xfs")
        with pytest.raises(NotNow, match="can't be replaced while calls are in flight"):
            await client.import_system(system, [file], replace=True)
        await hand.give_up(2, "xfs")
        await client.import_system(system, [file], replace=True)
        assert (await client.stats(system)).calls == 0
        with pytest.raises(BadRequest, match="'No!' is no system id"):
            await client.import_system("No!", [file])
        await hand.close()


def packed(*lines: Any) -> bytes:
    return zstandard.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def header(**other: Any) -> dict[str, Any]:
    return {
        "format": "modpressure system", "version": 1, "schema_version": schema.SCHEMA_VERSION, "system": "s", **other
    }  # fmt: skip


def row(table: str = "systems", **other: Any) -> dict[str, Any]:
    names = [column.name for column in schema.systems.columns if column.name not in ("id", "name")]
    return {"table": table, "row": {"id": "s", **dict.fromkeys(names, 1), "policy": 2, **other}}


SEGMENT = {
    "system": "s", "last_event_id": 3, "first_event_id": 1, "number": 1, "commit_time_ns": 1, "kind": 1,
    "instance_id": "", "loader": "", "events": "AAAA",
}  # fmt: skip

MODULE = {
    "system": "s", "name": "xfs", "state": 3, "instance_id": "i", "call_id": 1, "loader": "", "core_bytes": 1,
    "position": 1,
}  # fmt: skip
HELD = {
    "system": "s", "instance_id": "i", "call_id": 1,
    **dict.fromkeys(("file_bytes", "image_bytes", "core_bytes", "core_areas", "init_bytes", "init_areas"), 0),
}  # fmt: skip
CLAIM = {
    "system": "s", "request_id": "r", "digest": "", "instance_id": "", "call_id": 0, "settled": 1, "record": "",
    "update_time_ns": 1,
}  # fmt: skip
LIMITS = {"system": "s", **dict.fromkeys((c.name for c in schema.memory_limits.columns if c.name != "system"), 0)}
EVENT = base64.b64encode(zstandard.compress(ListEventsResponse(events=[Event()]).SerializeToString())).decode()
NONSENSE = "////"
"""No message of any type, in base64."""


def with_rows(systems: dict[str, Any] | None = None, **rows: dict[str, Any]) -> bytes:
    """Pack a system with a row of each of some tables."""
    others = [{"table": table, "row": values} for table, values in rows.items()]
    return packed(header(), row(**systems or {}), *others, {"rows": 1 + len(others)})


def many_events(number: int) -> str:
    """Return so many events without content, two bytes each, packed."""
    return base64.b64encode(zstandard.compress(b"\x0a\x00" * number)).decode()


def long_event(size_bytes: int) -> str:
    events = [Event(call=Call(value="v" * size_bytes))]
    return base64.b64encode(zstandard.compress(ListEventsResponse(events=events).SerializeToString())).decode()


def told_record(size_bytes: int) -> str:
    return base64.b64encode(ledger_service_pb2.ClaimRecord(result=b"x" * size_bytes).SerializeToString()).decode()


EXPORTS = ledger_service_pb2.Exports(exports=[ledger_service_pb2.Export(symbol="crc32c")]).SerializeToString()
USE = ledger_service_pb2.Use(module="libcrc32c", position=1)


def module_row(name: str, **formation: Any) -> dict[str, Any]:
    """Return the line of a live module with links."""
    links = base64.b64encode(ledger_service_pb2.Formation(**formation).SerializeToString()).decode()
    return {"table": "modules", "row": {**MODULE, "name": name, "position": len(name), "formation": links}}


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it does not begin as an exported system does"),
    "text": (b"milk, bread\n", "it is not compressed with zstd, or damaged"),
    "other": (packed({"format": "tar"}), "it does not begin as an exported system does"),
    "newer": (packed(header(version=2)), "its version is 2; this program knows up to 1"),
    "newer-tables": (packed(header(schema_version=999)), "its schema_version is 999; this program knows up to"),
    "no-version": (packed(header(version="1")), "its version is"),
    "no-json": (zstandard.compress(b"{}}\n"), "line 1 is not JSON of an object"),
    "no-end": (packed(header(), row()), "it is cut short"),
    "no-rows": (packed(header(), {"rows": 0}), "it is cut short"),
    "too-few": (packed(header(), row(), {"rows": 2}), "it says that it has 2 rows, and has 1"),
    "more": (packed(header(), row(), {"rows": 1}, row()), "something follows its end"),
    "table": (packed(header(), row("pg_user"), {"rows": 1}), "is of no table that is known: 'pg_user'"),
    "column": (packed(header(), row(password="x"), {"rows": 1}), "a column 'password' that is not known"),
    "value": (packed(header(), row(calls=-1), {"rows": 1}), "calls of row 1 of systems can't be '-1'"),
    "number": (packed(header(), row(calls=1 << 63), {"rows": 1}), "calls of row 1 of systems can't be"),
    "true": (packed(header(), row(calls=True), {"rows": 1}), "calls of row 1 of systems can't be 'True'"),
    "policy": (packed(header(), row(policy=77), {"rows": 1}), "its policy is 77, which is not known"),
    "system": (packed(header(), row(id="t"), {"rows": 1}), "row 1 is of another system: 't'"),
    "twice": (packed(header(), row(), row(), {"rows": 2}), "row 2 is of another system: 's'"),
    "module": (packed(header(), row(), {"table": "modules", "row": {"system": "s"}}), "row 2 of modules lacks name"),
    "events": (
        packed(header(), row(), {"table": "event_segments", "row": SEGMENT}, {"rows": 2}),
        "the events of row 2 can't be read",
    ),
    "formation": (with_rows(modules={**MODULE, "formation": NONSENSE}), "its rows contradict each other"),
    "failed-name": (
        with_rows(
            failed_modules={
                "system": "s",
                "module": "x" * 10_000,
                "position": 1,
                "becoming_count": 1,
                "load_count": 1,
                "wasted_bytes": 1,
            }
        ),
        "module of row 2 of failed_modules can't be",
    ),
    "many-events": (
        with_rows(event_segments={**SEGMENT, "last_event_id": 1, "events": many_events(1_000_000)}),
        "the events of row 2 can't be read",
    ),
    "more-events-than-are-read": (
        with_rows(
            systems={"next_event_id": 1_000_001},
            event_segments={**SEGMENT, "last_event_id": 1_000_000, "events": many_events(1_000_000)},
        ),
        "the events of row 2 can't be read",
    ),
    "long-event": (
        with_rows(
            systems={"next_event_id": 2},
            event_segments={**SEGMENT, "last_event_id": 1, "events": long_event(20_000)},
        ),
        "the events of row 2 can't be read",
    ),
    "nested": (
        zstandard.compress(json.dumps(header()).encode() + b'\n{"table":[' + b"[]," * 1_000_000 + b"[]]}\n"),
        "line 2 is not JSON of an object",
    ),
    "wide": (
        zstandard.compress(json.dumps(header()).encode() + b'\n{"table":"\\ud83d\\ude00' + b"x" * 100_000 + b'"}\n'),
        "line 2 is not JSON of an object",
    ),
    "long-record": (
        with_rows(claims={**CLAIM, "record": told_record(2 * MAX_RECORD_BYTES)}),
        "record of row 2 of claims can't be read",
    ),
    "record": (with_rows(claims={**CLAIM, "record": NONSENSE}), "record of row 2 of claims can't be read"),
    "held-claim": (with_rows(claims={**CLAIM, "instance_id": "i"}), "row 2 is a claim that is not settled"),
    "open-claim": (with_rows(claims={**CLAIM, "settled": 0}), "row 2 is a claim that is not settled"),
    "held": (with_rows(held_memory=HELD), "its rows contradict each other"),
    "held-in-flight": (with_rows(memory_limits=LIMITS, held_memory=HELD), "its memory is held by nobody, or too much"),
    "next-event": (
        with_rows(event_segments={**SEGMENT, "last_event_id": 1, "events": EVENT}),
        "the events of row 2 have ids that others have, or will have",
    ),
    "no-events": (with_rows(event_segments={**SEGMENT, "last_event_id": 0}), "the events of row 2 can't be read"),
    "linked": (
        with_rows(
            modules={
                **MODULE,
                "formation": base64.b64encode(
                    ledger_service_pb2.Formation(percpu_bytes=-1).SerializeToString()
                ).decode(),
            }
        ),
        "percpu_bytes -1 is no size",
    ),
    "exported-twice": (
        packed(header(), row(), *(module_row(name, exports=EXPORTS) for name in ("xfs", "btrfs")), {"rows": 3}),
        "two modules export 'crc32c', one of them 'btrfs'",
    ),
    "used-twice": (
        packed(header(), row(), module_row("xfs", uses=[USE, USE]), {"rows": 2}),
        "what 'xfs' uses is not named once each",
    ),
    "full": (packed(header(), row(calls=(1 << 63) - 1), {"rows": 1}), "calls of row 1 of systems can't be"),
    "last": (with_rows(modules={**MODULE, "position": (1 << 63) - 1}), "position of row 2 of modules can't be"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_file_that_makes_no_sense_is_refused_and_nothing_is_left(
    stats: Process, system: str, name: str
) -> None:
    file, sentence = BAD[name]
    async with Client(stats=stats.address) as client:
        await client.create_system(system)
        for replace in (False, True):
            target = system if replace else f"{system}-new"
            with pytest.raises(BadRequest) as refused:
                await client.import_system(target, [file], replace=replace)
            assert refused.value.sentence.startswith("the file can't be imported: ")
            assert sentence in refused.value.sentence
        assert (await client.stats(system)).calls == 0
        with pytest.raises(NotFound):
            await client.stats(f"{system}-new")


async def test_a_file_that_is_cut_or_changed_anywhere_breaks_nothing(
    stats: Process, system: str, record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(1 << 32)
    record_property("seed", seed)
    sys.stderr.write(f"seed {seed}\n")
    chance = random.Random(seed)
    async with Client(stats=stats.address) as client:
        hand = Hand(stats.address, f"hand-{system}", system)
        await hand.open()
        for call_id in range(1, 20):
            await hand.reserve(2 * call_id, "xfs")
            await hand.give_up(2 * call_id, "xfs")
        await hand.close()
        file = await exported(client, system)
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(file)
        refused = 0
        for _ in range(60):
            broken = bytearray(lines)
            if chance.random() < 0.3:
                del broken[chance.randrange(1, len(broken)) :]
            for _ in range(chance.randrange(1, 4)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            try:
                await client.import_system(system, [zstandard.compress(bytes(broken))], replace=True)
            except BadRequest:
                refused += 1
            # Whatever was taken can be read back.
            await client.stats(system)
            async for _ in client.events(system):
                pass
        assert refused > 30


async def test_the_command_line_writes_and_reads_files(stats: Process, system: str, tmp_path: Path) -> None:
    def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        program = str(Path(sys.executable).with_name("modpressure"))
        command = [program, "systems", *arguments, "--stats", stats.address]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)

    async with Client(stats=stats.address) as client:
        await client.create_system(system)
        path = tmp_path / "s.mps"
        done = await asyncio.to_thread(run, "export", system, str(path))
        assert done.returncode == 0, done
        assert [entry.name for entry in tmp_path.iterdir()] == ["s.mps"]
        done = await asyncio.to_thread(run, "export", system, str(path))
        assert done.returncode == 1 and b"--force overwrites it" in done.stderr
        assert (await asyncio.to_thread(run, "export", system, str(path), "--force")).returncode == 0
        piped = await asyncio.to_thread(run, "export", system, "-")
        assert piped.returncode == 0
        done = await asyncio.to_thread(run, "import", "-", "--as", f"{system}-b", stdin=piped.stdout)
        assert done.returncode == 0, done.stderr
        done = await asyncio.to_thread(run, "import", str(path))
        assert done.returncode == 1 and b"already" in done.stderr
        assert (await asyncio.to_thread(run, "import", str(path), "--replace")).returncode == 0
        path.write_text("milk")
        done = await asyncio.to_thread(run, "import", str(path))
        assert done.returncode in (1, 2) and b"can't be imported" in done.stderr and b"Traceback" not in done.stderr
        done = await asyncio.to_thread(run, "export", "absent", str(tmp_path / "absent.mps"))
        assert done.returncode == 1 and b"there is no system 'absent'" in done.stderr
        assert not list(tmp_path.glob("absent*"))
