"""``modpressure up``: both services in one terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json as jsons
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modpressure.cli.children import Children
from modpressure.cli.output import POLICIES, PolicyWord, print_json, print_text, word_of
from modpressure.cli.session import Session, command, whole_number
from modpressure.cli.up_view import STATS_SERVICE, Running, announcement, line_printer
from modpressure.client import Client
from modpressure.client_errors import error_of
from modpressure.errors import AlreadyExists, BadRequest, ModpressureError, NotNow
from modpressure.loopback import from_here
from modpressure.settings import ClientSettings, LoaderSettings, StatsSettings, load_settings
from modpressure.settings_sources import BadSetting, Settings, variable
from modpressure.tls import ClientTls, open_channel

LOADER_SERVICE: Final = "modpressure.v1.LoaderService"

MAX_LOADERS: Final = 256
DEFAULT_SYSTEM: Final = "default"

STOP_MARGIN_SECONDS: Final = 5.0
"""What a service may take to stop beyond its grace."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started."""

    loaders: int
    host: str
    port: int
    tree: str | None
    database: str
    policy: PolicyWord | None
    config: Path | None
    insecure: bool
    memory_limit_bytes: int
    """Of each loader: they share what one alone would take, as they share the machine."""

    def listen(self, index: int) -> str:
        """Return the address for the process with this number, stats_svc being 0."""
        return f"{self.host}:{self.port + index if self.port else 0}"

    def stats_arguments(self) -> list[str]:
        """Return what follows ``python -m`` for stats_svc."""
        return ["stats_svc", "--listen", self.listen(0), "--database", self.database, *self._common()]

    def loader_arguments(self, index: int, stats: str) -> list[str]:
        """Return the same for loader number ``index``, from 1."""
        tree = ["--tree", self.tree] if self.tree else []
        own = ["--name", f"loader-{index}", "--memory-limit", str(self.memory_limit_bytes)]
        return ["loader_svc", "--listen", self.listen(index), "--stats", stats, *own, *tree, *self._common()]

    def _common(self) -> list[str]:
        insecure = ["--insecure"] if self.insecure else []
        return ["--log-format", "json", *insecure, *(["--config", str(self.config)] if self.config else [])]


@command()
async def up(
    session: Session,
    loaders: Annotated[
        int,
        typer.Option("--loaders", "-n", parser=whole_number(1, MAX_LOADERS), metavar="N", help="Number of loaders."),
    ] = 1,
    tree: Annotated[
        str | None,
        typer.Option(
            help="Modules: a directory such as /lib/modules/RELEASE, or catalogue, catalogue-xz, catalogue-zst.",
            show_default="the loaders' setting, catalogue",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Where counts are kept: a path or an SQLAlchemy URL.", show_default="a temporary file"),
    ] = None,
    policy: Annotated[
        PolicyWord | None,
        typer.Option(help="The policy of the system default.", show_default="v6.4 where it is new"),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            parser=whole_number(0, 65535),
            metavar="PORT",
            help="Port of stats_svc; the loaders take the next ones. 0: any free ones.",
        ),
    ] = 50050,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on such a --host without TLS that other machines reach, too.")
    ] = False,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the addresses there, as JSON, once all are well; removed at the end.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no log lines of the services.")] = False,
) -> int:
    """Start stats_svc and loaders as separate processes, until Ctrl-C.

    Prints the addresses once all of them are well; their log lines follow, on standard error. If one of them ends, all
    are stopped, and the exit code is 1. With --json the addresses are one JSON document on standard output.

    The loaders share the memory limit that a single one would have. Other settings of the services are read from
    MODPRESSURE_STATS_* and MODPRESSURE_LOADER_* variables or from the settings file, those of TLS, too, such as
    MODPRESSURE_STATS_TLS_CERT. With --host 0.0.0.0 whoever is on this machine uses 127.0.0.1.

    Examples:
      modpressure up
      modpressure up --loaders 4 --tree /lib/modules/$(uname -r) --policy v6.5
      modpressure up --loaders 2 --port 0 --ready-file ready.json --quiet &
    """
    if port and port + loaders > 65535:
        raise BadRequest(f"--port {port} leaves no ports for {loaders} loaders")
    with contextlib.ExitStack() as stack:
        if database is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="modpressure-"))
            database = f"{directory}/modpressure.sqlite3"
        listening = {"listen": f"{host}:{port}", "insecure": insecure or None}
        loader_settings = load_settings(LoaderSettings, listening, session.config)
        stats_settings = load_settings(StatsSettings, listening, session.config)
        for settings in (loader_settings, stats_settings):
            settings.check()
        _check_tls(stats_settings, loader_settings, session.settings)
        limit_bytes = max(1, loader_settings.memory_limit_bytes // loaders)
        # A loader may take its grace twice: for its clients, and then for the calls that these have left behind.
        stop_seconds = max(2 * loader_settings.grace_seconds, stats_settings.grace_seconds) + STOP_MARGIN_SECONDS
        plan = Plan(loaders, host, port, tree, database, policy, session.config, insecure, limit_bytes)
        children = Children(line_printer(quiet), stop_seconds=stop_seconds)
        with _stop_signals(children) as stopped:
            try:
                return await _run(session, plan, children, stopped, ready_file)
            finally:
                await asyncio.shield(children.stop())
                if ready_file is not None:
                    ready_file.unlink(missing_ok=True)


def _check_tls(stats: StatsSettings, loader: LoaderSettings, client: ClientSettings) -> None:
    """Return if all talk TLS to each other, or none does; else they would wait for each other for ever. BadSetting."""
    asked: list[tuple[Settings, str]] = [
        *((stats, "tls_cert"), (stats, "tls_key"), (loader, "tls_cert"), (loader, "tls_key")),
        *((loader, "stats_ca"), (client, "ca")),
    ]
    there = [variable(type(settings), name) for settings, name in asked if getattr(settings, name)]
    missing = [variable(type(settings), name) for settings, name in asked if not getattr(settings, name)]
    if there and missing:
        raise BadSetting(
            f"{there[0]} asks for TLS, for which {', '.join(missing)} must be set, too (or be in the settings file)"
        )


@contextlib.contextmanager
def _stop_signals(children: Children) -> Iterator[asyncio.Future[int]]:
    """Give a future of the signal that asks for the stop; a second one has the children killed."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def on_signal(number: int) -> None:
        if stopped.done():
            children.hurry()
        else:
            stopped.set_result(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stopped
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _run(
    session: Session, plan: Plan, children: Children, stopped: asyncio.Future[int], ready_file: Path | None
) -> int:
    starting = asyncio.create_task(_start(session, plan, children))
    try:
        if (number := await _until(starting, children, stopped)) is not None:
            return 128 + number
        running = starting.result()
        _announce(session, running, ready_file)
        number = await _until(None, children, stopped)
        assert number is not None
        return 128 + number
    finally:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, ModpressureError):
            await starting


async def _until(task: asyncio.Task[Any] | None, children: Children, stopped: asyncio.Future[int]) -> int | None:
    """Wait for ``task`` (None is returned), a signal to stop (its number is), or a child's death (ChildDied)."""
    waiting: set[asyncio.Future[Any]] = {stopped, children.died}
    if task is not None:
        waiting.add(task)
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if stopped.done():
        return stopped.result()
    if children.died.done():
        raise children.died.result()
    if task is not None:
        task.result()
    return None


async def _start(session: Session, plan: Plan, children: Children) -> Running:
    """Start all and wait until they are well."""
    from stats_svc.location import Location

    tls = session.tls
    stats = await children.start("stats", plan.stats_arguments())
    stats_address = from_here(await stats.address)
    started = [
        await children.start(f"loader-{index}", plan.loader_arguments(index, stats_address))
        for index in range(1, plan.loaders + 1)
    ]
    addresses = [from_here(await loader.address) for loader in started]
    await asyncio.gather(
        _until_well("stats_svc", stats_address, STATS_SERVICE, tls),
        *(_until_well("loader_svc", address, LOADER_SERVICE, tls) for address in addresses),
    )
    if plan.policy:
        await _set_policy(session, stats_address, plan.policy)
    pids = {child.name: child.process.pid for child in (stats, *started)}
    # A URL may have a password.
    database = Location(plan.database).name if "://" in plan.database else plan.database
    return Running(stats_address, addresses, database, pids)


async def _until_well(what: str, address: str, service: str, tls: ClientTls | None) -> None:
    """Wait until the health service at ``address``, which listens, says that ``service`` can do its work."""
    async with open_channel(address, tls) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            async for response in stub.Watch(request):
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.aio.AioRpcError as error:
            raise error_of(error, what, address) from error


async def _set_policy(session: Session, stats: str, policy: PolicyWord) -> None:
    """Have the system default with that policy; NotNow if there is one with another that has counted something."""
    async with Client(stats=stats, tls=session.tls, token=session.token) as client:
        try:
            await client.create_system(DEFAULT_SYSTEM, policy=POLICIES[policy])
        except AlreadyExists:
            there = (await client.system(DEFAULT_SYSTEM)).policy
            if there == POLICIES[policy]:
                return
            if (await client.stats(DEFAULT_SYSTEM)).events:
                raise NotNow(
                    f"--policy {policy}: system {DEFAULT_SYSTEM!r} in this database has policy"
                    f" {word_of(POLICIES, there)} and has counted events under it; delete it, or take another database"
                ) from None
            await client.delete_system(DEFAULT_SYSTEM)
            await client.create_system(DEFAULT_SYSTEM, policy=POLICIES[policy])


def _announce(session: Session, running: Running, ready_file: Path | None) -> None:
    if ready_file is not None:
        try:
            temporary = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
            temporary.write_text(jsons.dumps(running.document()) + "\n")
            temporary.replace(ready_file)
        except OSError as error:
            raise ModpressureError(f"cannot write --ready-file {ready_file}: {error.strerror}") from error
    if session.json:
        print_json(running.document())
    else:
        print_text(announcement(running, session.tls))
