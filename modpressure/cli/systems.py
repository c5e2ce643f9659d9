"""``modpressure systems``: the simulated machines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from modpressure.cli.output import POLICIES, PolicyWord, plain, print_json, print_table, say, time_text, word_of
from modpressure.cli.session import Session, command
from modpressure.v1.stats_service_pb2 import System

app = typer.Typer(
    name="systems",
    help="Create, list, reset and delete simulated machines.\n\nEach has one modules list and one set of counters.",
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
) -> None:
    """Create a system.

    Example:
      modpressure systems create new-kernel --policy v6.5
    """
    async with session.client() as client:
        _show(session, await client.create_system(system, policy=POLICIES[policy]))


@app.command("list")
@command("stats", "timeout_seconds")
async def list_systems(session: Session) -> None:
    """List the systems, by id."""
    async with session.client() as client:
        systems = [system async for system in client.systems()]
    if session.json:
        print_json({"systems": [plain(system) for system in systems]})
    else:
        _table(systems)


@app.command()
@command("stats", "system", "timeout_seconds")
async def show(session: Session, system_id: OptionalSystemArgument = None) -> None:
    """Show one system."""
    async with session.client() as client:
        _show(session, await client.system(system_id or session.settings.system))


@app.command()
@command("stats", "system", "timeout_seconds")
async def reset(session: Session, system_id: OptionalSystemArgument = None) -> None:
    """Reset a system as a reboot would: counters 0, no modules, no events."""
    async with session.client() as client:
        _show(session, await client.reset_system(system_id or session.settings.system))


@app.command()
@command("stats", "timeout_seconds")
async def delete(session: Session, system: SystemArgument) -> None:
    """Delete a system and all that was counted for it."""
    async with session.client() as client:
        await client.delete_system(system)
    if session.json:
        print_json({})
    else:
        say(f"deleted {system}")


def _show(session: Session, system: System) -> None:
    if session.json:
        print_json(plain(system))
    else:
        _table([system])


def _table(systems: Iterable[System]) -> None:
    rows = [
        (system.id, word_of(POLICIES, system.policy), time_text(system.create_time), time_text(system.reset_time))
        for system in systems
    ]
    print_table(("System", "Policy", "Created", "Reset"), rows)
