"""``modpressure report``, ``stats`` and ``duplicates``: what was counted."""

from __future__ import annotations

from typing import Annotated

import typer

from modpressure.cli.output import (
    FORMATS,
    ORIGINS,
    FormatWord,
    plain,
    print_json,
    print_table,
    print_text,
    time_text,
    word_of,
)
from modpressure.cli.session import Session, command
from modpressure.errors import BadRequest
from modpressure.units import format_bytes
from modpressure.v1.stats_service_pb2 import OriginStats, RequesterStats, Stats

_BYTES = frozenset({"total_mod_size", "total_text_size"})


@command("stats", "system", "timeout_seconds")
async def report(
    session: Session,
    report_format: Annotated[
        FormatWord,
        typer.Option(
            "--format", help="rfc: the first patch series, as posted or as meant; mainline: Linux 6.4 and later."
        ),
    ] = "rfc",
    kernel_buffer: Annotated[
        bool, typer.Option("--kernel-buffer", help="Cut the mainline text where the kernel's buffer ends.")
    ] = False,
) -> None:
    """Print the report, byte for byte as /sys/kernel/debug/modules/stats would give it.

    Examples:
      modpressure report
      modpressure report --format mainline --kernel-buffer
    """
    if kernel_buffer and report_format != "mainline":
        raise BadRequest(f"--kernel-buffer is for --format mainline, not {report_format}")
    async with session.client() as client:
        text = await client.report(
            session.settings.system, report_format=FORMATS[report_format], kernel_buffer=kernel_buffer
        )
    if session.json:
        print_json({"system": session.settings.system, "format": report_format, "text": text})
    else:
        print_text(text)


@command("stats", "system", "timeout_seconds")
async def stats(session: Session) -> None:
    """Print the counters, under the kernel's own names.

    Examples:
      modpressure stats
      modpressure stats --json | jq .virtual_mem_wasted_bytes
    """
    async with session.client() as client:
        counters = await client.stats(session.settings.system)
    if session.json:
        print_json(plain(counters))
    else:
        print_table(("Counter", ">Value", ""), stats_rows(counters))
        if counters.origins:
            print_text("\n")
            print_table(("Origin", "Requester", ">Calls", ">Failures", ">Wasted"), requester_rows(counters))


def stats_rows(counters: Stats) -> list[tuple[str, str, str]]:
    """Return rows of name, value, and the value for people where it is bytes."""
    rows = []
    for field in counters.DESCRIPTOR.fields:
        if field.name == "origins":
            continue
        value = getattr(counters, field.name)
        if field.name == "update_time":
            rows.append((field.name, time_text(value), ""))
        elif field.name.endswith("_bytes") or field.name in _BYTES:
            rows.append((field.name, str(value), format_bytes(value)))
        else:
            rows.append((field.name, str(value), ""))
    return rows


def requester_rows(counters: Stats) -> list[tuple[str, ...]]:
    """Return rows of who asked: each origin as a whole, then its requesters."""
    rows: list[tuple[str, ...]] = []
    for origin in counters.origins:
        rows.append((word_of(ORIGINS, origin.origin), "", *_tally_cells(origin)))
        rows += [("", one.requester or "(no label)", *_tally_cells(one)) for one in origin.requesters]
    return rows


def _tally_cells(tally: OriginStats | RequesterStats) -> tuple[str, str, str]:
    return str(tally.calls), str(tally.failures), format_bytes(tally.wasted_bytes)


@command("stats", "system", "timeout_seconds")
async def duplicates(session: Session) -> None:
    """List the modules that failed as duplicates, newest name first.

    Examples:
      modpressure duplicates
      modpressure duplicates --json | jq '.modules[].module'
    """
    async with session.client() as client:
        modules = [module async for module in client.failed_modules(session.settings.system)]
    if session.json:
        print_json({"modules": [plain(module) for module in modules]})
        return
    print_table(
        ("Module", ">How often", ">Becoming", ">Load", "Reason", ">Wasted"),
        [
            (
                module.module,
                str(module.count),
                str(module.becoming_count),
                str(module.load_count),
                module.reason,
                format_bytes(module.wasted_bytes),
            )
            for module in modules
        ],
    )
