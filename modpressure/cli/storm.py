"""``modpressure storm``."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from modpressure.cli.output import (
    KMODS,
    MODES,
    POLICIES,
    KmodWord,
    ModeWord,
    PolicyWord,
    print_json,
    say,
)
from modpressure.cli.session import Session, command, duration_seconds, whole_number
from modpressure.cli.storm_view import StormView, document, print_summary
from modpressure.errors import BadRequest
from modpressure.storm import MAX_WORKERS, StormResult, StormRun
from modpressure.v1.call_pb2 import Policy
from modpressure.v1.loader_service_pb2 import Kmod, Storm

_VIRTUAL: Final = "In virtual time"


@command("loaders", "stats", "system")
async def storm(
    session: Session,
    module: Annotated[
        list[str], typer.Option("--module", "-m", help="Module to load; repeat it, or give several with commas.")
    ],
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            "-w",
            parser=whole_number(1, MAX_WORKERS),
            metavar="N",
            help=f"Workers on all loaders together, 1 to {MAX_WORKERS}, 10000 at most on one.",
        ),
    ] = 100,
    mode: Annotated[
        ModeWord,
        typer.Option(help="repeat: load and unload, as stress-ng --module does; once: load once, all together."),
    ] = "repeat",
    ops: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1),
            metavar="N",
            help="Times that each worker goes through the modules, mode repeat.",
            show_default="1, without --seconds",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            parser=duration_seconds,
            metavar="SECONDS",
            help="Time after which the workers stop.",
            show_default="none",
        ),
    ] = None,
    policy: Annotated[
        PolicyWord | None,
        typer.Option(help="What the kernel does about duplicates.", show_default="the system's"),
    ] = None,
    kmod: Annotated[
        KmodWord | None,
        typer.Option(help="How libkmod hands over a compressed file.", show_default="the loader's"),
    ] = None,
    separate_copies: Annotated[
        bool, typer.Option("--separate-copies", help="Give each worker a copy of the file, an inode of its own.")
    ] = False,
    no_deps: Annotated[
        bool,
        typer.Option("--no-deps", help="Do not load first what the modules depend on: stress-ng's bare loop."),
    ] = False,
    keep_loaded: Annotated[
        bool,
        typer.Option("--keep-loaded", help="Mode repeat: unload nothing after a success; needs --seconds."),
    ] = False,
    virtual: Annotated[
        bool,
        typer.Option(
            "--virtual", help="Simulate it in virtual time, without loaders or memory.", rich_help_panel=_VIRTUAL
        ),
    ] = False,
    cpus: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1, 65_536),
            metavar="N",
            help="CPUs of the machine.",
            show_default="8",
            rich_help_panel=_VIRTUAL,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(0, (1 << 63) - 1),
            metavar="N",
            help="The first seed of chance.",
            show_default="0",
            rich_help_panel=_VIRTUAL,
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            parser=whole_number(1, 10_000),
            metavar="N",
            help="Storms, one for each seed from the first on.",
            show_default="5",
            rich_help_panel=_VIRTUAL,
        ),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Tree of modules.", show_default="the bundled catalogue", rich_help_panel=_VIRTUAL
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What things take; modpressure calibrate makes one.",
            show_default="as bundled",
            rich_help_panel=_VIRTUAL,
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Have stats_svc count the calls of the first storm in --system.",
            rich_help_panel=_VIRTUAL,
        ),
    ] = False,
) -> int:
    """Have many workers load the same modules at the same time, and print what that cost.

    The workers are spread over all loaders and start together. What the modules depend on is loaded before. Ctrl-C
    stops them after the calls that they are in, and prints what was counted; once more leaves at once.

    In the summary, waste is what was allocated for calls that failed; the total's peak is the sum of the loaders' own.

    Examples:
      modpressure storm --workers 100 --module xfs
      modpressure storm -w 400 -m xfs,btrfs --mode once --policy v6.3
      modpressure storm -w 64 -m loop --seconds 10 --separate-copies
      modpressure storm -w 400 -m xfs --virtual --cpus 64 --repeat 20
    """
    modules = [name.strip() for text in module for name in text.split(",") if name.strip()]
    _check(modules, mode, ops, seconds, keep_loaded)
    given = {"cpus": cpus, "seed": seed, "repeat": repeat, "tree": tree, "costs": costs, "record": record or None}
    if virtual:
        from modpressure.cli.virtual_storm import run_virtual_storm

        return await run_virtual_storm(
            session,
            modules,
            given,
            workers=workers,
            once=mode == "once",
            operations=ops or (0 if seconds else 1),
            seconds=seconds,
            policy=policy,
            kmod=kmod,
            separate_copies=separate_copies,
            with_dependencies=not no_deps,
            keep_loaded=keep_loaded,
        )
    for name, value in given.items():
        if value is not None:
            raise BadRequest(f"--{name} is for storms in virtual time: it needs --virtual")
    spec = Storm(
        system=session.settings.system,
        modules=modules,
        workers=workers,
        mode=MODES[mode],
        operations=0 if mode == "once" else ops or (0 if seconds else 1),
        policy=POLICIES[policy] if policy else Policy.POLICY_UNSPECIFIED,
        kmod=KMODS[kmod] if kmod else Kmod.KMOD_UNSPECIFIED,
        separate_copies=separate_copies,
        with_dependencies=not no_deps,
        keep_loaded=keep_loaded,
    )
    if seconds:
        spec.duration.FromTimedelta(timedelta(seconds=seconds))
    view = StormView(spec)
    async with session.client() as client:
        run = StormRun(client, spec, on_ready=view.ready, on_progress=view.update)
        with view:
            result, stopped_by = await _run(run)
    if session.json:
        print_json(document(result))
    elif result.summaries:
        print_summary(result)
    return _end(result, stopped_by)


def _check(modules: Sequence[str], mode: str, ops: int | None, seconds: float | None, keep_loaded: bool) -> None:
    if not modules:
        raise BadRequest("--module names no module")
    if mode == "once" and ops is not None:
        raise BadRequest(f"--ops {ops} is for mode repeat: in mode once each worker loads each module once")
    if mode == "once" and keep_loaded:
        raise BadRequest("--keep-loaded is for mode repeat: mode once never unloads")
    if keep_loaded and not seconds:
        raise BadRequest(
            "--keep-loaded needs --seconds: a module that stays loaded can't be loaded again, so it never ends"
        )


async def _run(run: StormRun) -> tuple[StormResult, int]:
    """Run it; return the result and the number of the signal that stopped it, 0 for none."""
    loop = asyncio.get_running_loop()
    received: list[int] = []
    work = asyncio.ensure_future(run.run())

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        if len(received) == 1:
            say("stopping: the workers end the calls that they are in; Ctrl-C again leaves at once")
            run.stop()
        else:
            work.cancel()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    try:
        result = await work
    except asyncio.CancelledError:
        if not received:
            raise
        result = StormResult(interrupted=True)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    return result, received[0] if received else 0


def _end(result: StormResult, stopped_by: int) -> int:
    """Say what went wrong, and return the exit code."""
    for error in result.failures.values():
        say(f"modpressure storm: {error.sentence}")
    for summary in result.summaries.values():
        if summary.errors:
            say(
                f"modpressure storm: {summary.errors} requests could not be carried out by {summary.loader}, first:"
                f" {summary.first_error}"
            )
    if stopped_by:
        if not result.summaries:
            say("modpressure storm: stopped before anything was summed up")
        return 128 + stopped_by
    return int(bool(result.failures) or any(summary.errors for summary in result.summaries.values()))
