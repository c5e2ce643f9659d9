"""``modpressure events`` and ``watch``: what happens, as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

import typer
from rich.live import Live
from rich.table import Table

from modpressure.cli.counts import stats_rows
from modpressure.cli.output import (
    OUTCOMES,
    console,
    duration_text,
    plain,
    print_json,
    print_line,
    time_text,
    word_of,
)
from modpressure.cli.session import Session, command, duration_seconds, whole_number
from modpressure.client import Client
from modpressure.errors import BadRequest
from modpressure.units import format_bytes
from modpressure.v1.call_pb2 import Event, Outcome
from modpressure.v1.stats_service_pb2 import Stats

_FOLLOW_SECONDS: Final = 0.2
"""Shortest time between two looks for new events."""

_PAGE: Final = 1000


@command("stats", "system", "timeout_seconds")
async def events(
    session: Session,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events, until Ctrl-C.")] = False,
    module: Annotated[str, typer.Option(help="Only events of this module.", show_default="all")] = "",
    outcome: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTCOME",
            help=f"Only calls with this outcome: {', '.join(OUTCOMES)}. Repeat it, or give several with commas.",
            show_default="all events",
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit", "-n", parser=whole_number(0), metavar="N", help="Only the newest so many; 0 for all there are."
        ),
    ] = 50,
) -> None:
    """List loads and unloads, oldest first.

    With --json one event a line.

    Examples:
      modpressure events --limit 10
      modpressure events --module xfs --outcome becoming,load
      modpressure events --follow --json | jq .call.peak_held_bytes
    """
    outcomes = _outcomes(outcome or [])
    system = session.settings.system
    async with session.client() as client:
        last = (await client.stats(system)).events
        if limit:
            newest: list[Event] = []
            pages = client.events(
                system, module=module, outcomes=outcomes, descending=True, page_size=min(limit, _PAGE)
            )
            async for event in pages:
                newest.append(event)
                if len(newest) == limit:
                    break
            for event in reversed(newest):
                _show(session, event)
                last = max(last, event.event_id)
        else:
            async for event in client.events(system, module=module, outcomes=outcomes):
                _show(session, event)
                last = max(last, event.event_id)
        if not follow:
            return
        async for number in _growth(client, system):
            if number < last:  # the system was reset
                last = 0
            if number == last:
                continue
            async for event in client.events(system, module=module, outcomes=outcomes, after_event_id=last):
                _show(session, event)
                number = max(number, event.event_id)
            last = number


def _outcomes(texts: list[str]) -> list[Outcome.ValueType]:
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    for word in words:
        if word not in OUTCOMES:
            raise BadRequest(f"--outcome {word!r} is none of {', '.join(OUTCOMES)}")
    return [OUTCOMES[word] for word in words]


async def _growth(client: Client, system: str) -> AsyncIterator[int]:
    async for counters in client.watch(system, interval_seconds=_FOLLOW_SECONDS):
        yield counters.events


def _show(session: Session, event: Event) -> None:
    if session.json:
        print_json(plain(event))
    else:
        print_line(event_line(event))


def event_line(event: Event) -> str:
    """Return an event in one line: its number, time, loader and worker, module, what became of it."""
    head = f"{event.event_id:>8}  {time_text(event.commit_time)}"
    if event.HasField("unload"):
        unload = event.unload
        return (
            f"{head}  {_who(unload.loader, unload.worker)}  unload {unload.module}  {duration_text(unload.duration_ns)}"
        )
    call = event.call
    became = word_of(OUTCOMES, call.outcome) + (f" {call.errno}" if call.errno else "")
    check = "".join((f"  check {call.check}" if call.check else "", f" ({call.value})" if call.value else ""))
    return (
        f"{head}  {_who(call.loader, call.worker)}  load {call.module}  {became}{check}"
        f"  held {format_bytes(call.peak_held_bytes)}  {duration_text(call.duration_ns)}"
    )


def _who(loader: str, worker: str) -> str:
    return f"{loader}/{worker}" if worker else loader


@command("stats", "system")
async def watch(
    session: Session,
    interval: Annotated[
        float,
        typer.Option(
            parser=duration_seconds, metavar="SECONDS", help="Shortest time between two updates, 0.05 at least."
        ),
    ] = 1.0,
    count: Annotated[
        int, typer.Option(parser=whole_number(0), metavar="N", help="End after so many updates; 0 for never.")
    ] = 0,
) -> None:
    """Show the counters as they change, until Ctrl-C.

    A table on a terminal, elsewhere a line for each update; with --json one document a line.

    Examples:
      modpressure watch
      modpressure watch --interval 0.2 --json | jq -c '[.calls, .duplicates]'
    """
    seen = 0
    async with session.client() as client:
        updates = client.watch(session.settings.system, interval_seconds=interval)
        screen = console()
        if session.json or not screen.is_terminal:
            async for counters in updates:
                if session.json:
                    print_json(plain(counters))
                else:
                    print_line(stats_line(counters))
                seen += 1
                if seen == count:
                    return
            return
        with Live(console=screen, auto_refresh=False) as live:
            async for counters in updates:
                live.update(_stats_table(counters), refresh=True)
                seen += 1
                if seen == count:
                    return


def stats_line(counters: Stats) -> str:
    """Return the counters that matter most, in one line."""
    return (
        f"{time_text(counters.update_time) or 'nothing yet'}  {counters.calls} calls, {counters.modcount} loaded,"
        f" {counters.duplicates} duplicates, {counters.unloads} unloads,"
        f" {format_bytes(counters.virtual_mem_wasted_bytes)} wasted, {format_bytes(counters.held_bytes)} held,"
        f" {counters.loaders} loaders"
    )


def _stats_table(counters: Stats) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Counter")
    table.add_column("Value", justify="right")
    table.add_column("")
    for row in stats_rows(counters):
        table.add_row(*row)
    return table
