"""``modpressure systems``: the simulated machines."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final

import typer
import zstandard

from modpressure.cli.output import (
    POLICIES,
    PolicyWord,
    plain,
    print_json,
    print_table,
    print_text,
    say,
    time_text,
    word_of,
)
from modpressure.cli.session import Session, command, memory_option
from modpressure.errors import AlreadyExists, BadRequest
from modpressure.kernel.system_memory import Amounts, MemoryArea
from modpressure.units import format_bytes
from modpressure.v1.stats_service_pb2 import MemoryAmounts, System

_CHUNK_BYTES: Final = 1 << 18

app = typer.Typer(
    name="systems",
    help="Create, list, reset, move and delete simulated machines.\n\n"
    "Each has one modules list and one set of counters.",
    no_args_is_help=True,
)

SystemArgument = Annotated[
    str, typer.Argument(metavar="ID", help="The system: 1 to 63 of a-z, 0-9 and -, beginning with a letter.")
]
OptionalSystemArgument = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="The system.", show_default="the setting system")
]


@app.command()
@command("stats", "timeout_seconds")
async def create(
    session: Session,
    system: SystemArgument,
    policy: Annotated[PolicyWord, typer.Option(help="The policy of calls that say none.")] = "v6.4",
    memory: Annotated[int | None, memory_option("Memory for what loading allocates.")] = None,
    vmalloc: Annotated[int | None, memory_option("Size of the vmalloc area: copies and decompressed images.")] = None,
    module_area: Annotated[
        int | None,
        memory_option("Size of the module area: layouts; on x86-64 1520MiB, with KASLR 1008MiB."),
    ] = None,
) -> None:
    """Create a system.

    What an allocation finds no room for fails with ENOMEM, on whatever loader. Without limits there is always room.

    Examples:
      modpressure systems create new-kernel --policy v6.5
      modpressure systems create small --memory 64MiB --module-area 1008MiB
    """
    limits = MemoryAmounts(memory_bytes=memory or 0, vmalloc_bytes=vmalloc or 0, module_area_bytes=module_area or 0)
    async with session.client() as client:
        _show(session, await client.create_system(system, policy=POLICIES[policy], limits=limits))


@app.command("list")
@command("stats", "timeout_seconds")
async def list_systems(session: Session) -> None:
    """List the systems, by id.

    Example:
      modpressure systems list
    """
    async with session.client() as client:
        systems = [system async for system in client.systems()]
    if session.json:
        print_json({"systems": [plain(system) for system in systems]})
    else:
        _table(systems)


@app.command()
@command("stats", "system", "timeout_seconds")
async def show(session: Session, system_id: OptionalSystemArgument = None) -> None:
    """Show one system.

    Example:
      modpressure systems show new-kernel
    """
    async with session.client() as client:
        _show(session, await client.system(system_id or session.settings.system))


@app.command()
@command("stats", "system", "timeout_seconds")
async def reset(session: Session, system_id: OptionalSystemArgument = None) -> None:
    """Reset a system as a reboot would: counters 0, no modules, no events.

    Example:
      modpressure systems reset new-kernel
    """
    async with session.client() as client:
        _show(session, await client.reset_system(system_id or session.settings.system))


@app.command()
@command("stats", "timeout_seconds")
async def delete(session: Session, system: SystemArgument) -> None:
    """Delete a system and all that was counted for it.

    Example:
      modpressure systems delete new-kernel
    """
    async with session.client() as client:
        await client.delete_system(system)
    if session.json:
        print_json({})
    else:
        say(f"deleted {system}")


@app.command("export")
@command("stats")
async def export_system(
    session: Session,
    system: Annotated[str, typer.Argument(metavar="ID", help="The system.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; - is standard output.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a system as one file: counters, modules, duplicates, requesters, limits and events.

    It is as the system is at one point in time; loads may go on. What calls in flight hold is left out.

    Examples:
      modpressure systems export default default.mps
      modpressure systems export default - | ssh elsewhere modpressure systems import -
    """
    async with session.client() as client:
        if str(file) == "-":
            async for chunk in client.export_system(system):
                sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            return
        if file.exists() and not force:
            raise AlreadyExists(f"there is a file {str(file)!r} already; --force overwrites it")
        part = file.with_name(f"{file.name}.part")
        try:
            with part.open("wb") as opened:
                async for chunk in client.export_system(system):
                    opened.write(chunk)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
        except OSError as error:
            raise BadRequest(f"{part} can't be written: {(error.strerror or str(error)).lower()}") from error
        finally:
            part.unlink(missing_ok=True)
    size_bytes = file.stat().st_size
    if session.json:
        print_json({"system": system, "file": str(file), "size_bytes": size_bytes})
    else:
        say(f"exported {system} to {file}, {format_bytes(size_bytes)}")


@app.command("import")
@command("stats")
async def import_system(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What export wrote; - is standard input.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="ID", help="Id of the system.", show_default="as it was")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a system of that id.")] = False,
) -> None:
    """Make a system of a file that export wrote, all of it or nothing, on whatever database.

    While it is imported nothing else is committed.

    Examples:
      modpressure systems import default.mps --as before-the-fix
    """
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as opened:
            begin = opened.read(_CHUNK_BYTES)
            system = name or _system_in(begin)
            async with session.client() as client:
                chunks = itertools.chain([begin], iter(lambda: opened.read(_CHUNK_BYTES), b""))
                _show(session, await client.import_system(system, chunks, replace=replace))
    except OSError as error:
        raise BadRequest(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error


def _system_in(begin: bytes) -> str:
    """Return the id of the system that a file holds, which stands in its first line."""
    try:
        line = zstandard.ZstdDecompressor().decompressobj().decompress(begin[:_CHUNK_BYTES]).partition(b"\n")[0]
        return str(json.loads(line)["system"])
    except (zstandard.ZstdError, ValueError, KeyError, TypeError):
        raise BadRequest("the file can't be imported: it does not begin as an exported system does") from None


def _show(session: Session, system: System) -> None:
    if session.json:
        print_json(plain(system))
    else:
        _table([system])


def _table(systems: Iterable[System]) -> None:
    shown = list(systems)
    rows = [
        (system.id, word_of(POLICIES, system.policy), time_text(system.create_time), time_text(system.reset_time))
        for system in shown
    ]
    print_table(("System", "Policy", "Created", "Reset"), rows)
    limited = [system for system in shown if system.HasField("limits")]
    if limited:
        print_text("\n")
        print_table(("System", "Memory", ">Limit", ">Taken", ">Peak"), (row for s in limited for row in _amounts(s)))


def _amounts(system: System) -> Iterator[tuple[str, ...]]:
    """Yield a row for each kind of memory that a system has."""
    for name, area in zip(Amounts._fields, MemoryArea, strict=True):
        limit, taken, peak = (getattr(each, name) for each in (system.limits, system.taken, system.peak_taken))
        told = format_bytes(taken) if system.HasField("taken") else "unknown"
        yield system.id, area.value, format_bytes(limit) if limit else "none", told, format_bytes(peak)
