"""Exported systems, damaged where a reader looks: behind the compression, to which noise is nothing but noise."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import grpc
import sqlalchemy as sa
import zstandard

from fuzz import wire
from fuzz.calls import Way
from fuzz.messages import Dice
from fuzz.tally import BAD_STATUSES
from fuzz.targets import Where
from modpressure.v1 import loader_service_pb2, stats_service_pb2
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from stats_svc.system_file import TABLES

Line: TypeAlias = dict[str, Any]

SYSTEM: Final = "imported"
"""What is exported, and imported in its place. What that says it has counted need not add up."""

_TABLES: Final = {table.name: table for table in TABLES}
_NUMBERS: Final = (0, 1, 2, 3, 5, 40, 1 << 31, 1 << 53, 1 << 62, (1 << 62) + 1, (1 << 63) - 1, 1 << 64, 10**40, -1)
_WORDS: Final = (
    *("", "x", "minix", "ext4", "default", "AAAA", "A", "====", "é" * 64, "x" * 129, "x" * 70_000),
    *("\0", "\ud800", "\x1b[31m"),
)
_ODD: Final[tuple[Any, ...]] = (
    *_NUMBERS,
    *_WORDS,
    *(None, True, 1.5, float("inf"), float("nan"), [], {}, [[[]]], {"a": 1}),
)
_TEXTS: Final = (b"", b"null", b"[]", b"{}", b'{"rows": 1}', b"[" * 5000, b'"', b"{" * 20_000, b"\xff", b'{"table": 1}')
_MOST_PIECES: Final = 12
_MODULES: Final = ("ext4", "crc_itu_t", "minix", "minix", "bfs")


def _load(number: int) -> loader_service_pb2.LoadModuleRequest:
    """Return one of the requests that were carried out in the system that is exported, or a new one."""
    module = _MODULES[number % len(_MODULES)]
    return loader_service_pb2.LoadModuleRequest(
        system=SYSTEM,
        module=module,
        request_id=f"request-{number}",
        requester="fuzz",
        with_dependencies=module == "ext4",
    )


async def exported(to: dict[Where, Way]) -> list[Line]:
    """Return the lines of the file of a system that has a row in each table."""
    loader, stats = LoaderServiceStub(to["loader"].channel), StatsServiceStub(to["stats"].channel)
    amounts = stats_service_pb2.MemoryAmounts(memory_bytes=256 << 20)
    system = stats_service_pb2.System(id=SYSTEM, limits=amounts)
    await stats.CreateSystem(stats_service_pb2.CreateSystemRequest(system=system))
    for number in range(len(_MODULES)):
        await loader.LoadModule(_load(number))
    await loader.UnloadModule(loader_service_pb2.UnloadModuleRequest(system=SYSTEM, module="bfs"))
    request = stats_service_pb2.ExportSystemRequest(system=SYSTEM)
    file = b"".join([answer.chunk async for answer in stats.ExportSystem(request)])
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(file).splitlines()
    return [json.loads(line) for line in lines]


async def use(to: dict[Where, Way], dice: Dice) -> list[str]:
    """Read what there is of the imported system, load and unload in it; return what ended as it must never.

    As the file has it, that may well be refused.
    """
    loader, stats = LoaderServiceStub(to["loader"].channel), StatsServiceStub(to["stats"].channel)
    asked: list[tuple[Any, Any]] = [
        (stats.GetStats, stats_service_pb2.GetStatsRequest(system=SYSTEM)),
        (stats.GetReport, stats_service_pb2.GetReportRequest(system=SYSTEM)),
        (stats.ListEvents, stats_service_pb2.ListEventsRequest(system=SYSTEM)),
        (stats.ListLoadedModules, stats_service_pb2.ListLoadedModulesRequest(system=SYSTEM)),
        (stats.ListFailedModules, stats_service_pb2.ListFailedModulesRequest(system=SYSTEM)),
        (stats.GetSystem, stats_service_pb2.GetSystemRequest(system=SYSTEM)),
        (loader.LoadModule, _load(dice.below(2 * len(_MODULES)))),
        (loader.UnloadModule, loader_service_pb2.UnloadModuleRequest(system=SYSTEM, module=dice.choice(_MODULES))),
    ]
    sentences = []
    for rpc, request in asked:
        try:
            await rpc(request)
        except grpc.aio.AioRpcError as error:
            if error.code().name in BAD_STATUSES:
                what = type(request).__name__
                sentences.append(f"{what} in the imported system ended with {error.code().name}: {error.details()}")
    return sentences


def damaged(lines: list[Line], dice: Dice) -> bytes:
    """Return a file like that of some lines, with up to three injuries."""
    lines = [line | {"row": {**line["row"]}} if "row" in line else {**line} for line in lines]
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        _injure(lines, dice)
    if lines and dice.random() < 0.9:
        lines[-1] = {"rows": len(lines) - 2}
    texts = [json.dumps(line, separators=(",", ":")).encode() for line in lines]
    if dice.random() < 0.1:
        texts.insert(dice.below(len(texts) + 1), dice.choice(_TEXTS))
    if texts and dice.random() < 0.1:
        at = dice.below(len(texts))
        texts[at] = wire.damaged(texts[at], texts[-1], dice)
    packed = bytearray(zstandard.compress(b"".join(text + b"\n" for text in texts), 1))
    match dice.below(30):
        case 0:
            packed[dice.below(len(packed))] ^= 1 << dice.below(8)
        case 1:
            del packed[dice.below(len(packed)) :]
        case 2:
            packed += dice.choice((b"\0", bytes(packed), dice.randbytes(40)))
    return bytes(packed)


def pieces(file: bytes, dice: Dice) -> Iterator[bytes]:
    """Yield a file in some pieces."""
    ends = sorted(dice.below(len(file) + 1) for _ in range(dice.below(_MOST_PIECES)))
    for begin, end in zip([0, *ends], [*ends, len(file)], strict=True):
        yield file[begin:end]


def _injure(lines: list[Line], dice: Dice) -> None:
    rows = [line for line in lines if str(line.get("table")) in _TABLES and isinstance(line.get("row"), dict)]
    if not rows:
        return
    # Most rows are of few tables; each table is as likely as another.
    table = dice.choice(sorted({line["table"] for line in rows}))
    rows = [line for line in rows if line["table"] == table]
    line = dice.choice(rows)
    row, at = line["row"], lines.index(line)
    name = dice.choice(sorted(row)) if row else "system"
    match dice.below(15):
        case 0:
            del lines[at]
        case 1:
            lines.insert(dice.below(len(lines) + 1), {**line})
        case 2:
            lines[at], other = lines[other_at := dice.below(len(lines))], line
            lines[other_at] = other
        case 3:
            row.pop(name, None)
        case 4:
            row[dice.choice(("name", "id", "x", "settled", ""))] = dice.choice(_ODD)
        case 5:
            lines[0][dice.choice(("format", "version", "schema_version", "system", "x"))] = dice.choice(_ODD)
        case 6:
            line["table"] = dice.choice((*_TABLES, *_ODD))
        case 7:
            line["row"] = dice.choice(_ODD)
        case 8:
            # What another row of the table has, which may contradict it.
            row[name] = dice.choice(rows)["row"].get(name)
        case 9 | 10 | 11 | 12 if blobs := _blobs(table, row):
            row[name := dice.choice(blobs)] = _damaged_blob(name, str(row[name]), dice)
        case _:
            likely = _NUMBERS if isinstance(row.get(name), int) else _WORDS
            row[name] = dice.choice(_ODD if dice.random() < 0.2 else likely)


def _blobs(table: str, row: dict[str, Any]) -> list[str]:
    """Return the columns of a row that hold bytes."""
    of_bytes = [column.name for column in _TABLES[table].columns if isinstance(column.type, sa.LargeBinary)]
    return [name for name in of_bytes if row.get(name)]


def _damaged_blob(name: str, text: str, dice: Dice) -> str:
    """Return bytes in base64, damaged; those that are compressed behind that."""
    try:
        blob = base64.b64decode(text)
        if name == "events":
            blob = zstandard.compress(wire.damaged(zstandard.decompress(blob), blob, dice), 1)
        else:
            blob = wire.damaged(blob, blob, dice)
    except (ValueError, zstandard.ZstdError):
        # It was damaged before.
        blob = dice.randbytes(40)
    return base64.b64encode(blob).decode()
