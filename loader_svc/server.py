"""Starting and stopping a loader."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Final, Literal

import structlog

from loader_svc.init_results import InitResults, InitResultsError
from loader_svc.ledger_client import LedgerClient
from loader_svc.live import Machine
from loader_svc.loader import Loader
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.plan import Plans
from loader_svc.servicer import LoaderServicer
from loader_svc.trees import ModuleTree, TreeError, open_tree
from loader_svc.workers import FileWorkers
from modpressure.errors import BadRequest
from modpressure.garbage import spare_what_stays
from modpressure.grpc_server import GrpcServer
from modpressure.identity_files import load_identity
from modpressure.kernel.identity import KernelIdentity
from modpressure.log import about_process
from modpressure.settings import LoaderSettings
from modpressure.tls import client_tls, read_token, server_tls
from modpressure.tokens import TokenFile
from modpressure.v1.loader_service_pb2_grpc import add_LoaderServiceServicer_to_server

SERVICE: Final = "modpressure.v1.LoaderService"
CATALOGUE_IDENTITY: Final = "catalogue"
"""Not the default even for the catalogue: it has a module fail without what that depends on."""

CATALOGUES: Final[dict[str, Literal["plain", "xz", "zst"]]] = {
    "catalogue": "plain",
    "catalogue-xz": "xz",
    "catalogue-zst": "zst",
}

WAITING_SHARE: Final = 0.8
"""Of the grace of a stop: how much of it clients may wait for their answers."""

SETTLE_SHARE: Final = 0.08
"""Of the grace, after that: how long storms may wait for their last calls. RPCs are cut off a tenth before the end, or
later, and a summary has to be out by then."""

REPLACED_SECONDS: Final = 1.0
"""How long a loader that was replaced takes to tell its clients."""

log = structlog.get_logger(__name__)


def open_settings_tree(settings: LoaderSettings) -> ModuleTree:
    """Open the tree that the settings name: a directory, or the bundled catalogue. TreeError if that can't be.

    Slow where a tree is seen for the first time.
    """
    variant = CATALOGUES.get(settings.tree)
    if variant is None:
        root = Path(settings.tree)
    else:
        from loader_svc.catalogue import catalogue_tree

        root = catalogue_tree(variant, settings.cache_dir)
    tree = open_tree(root, modprobe_dirs=[Path(d) for d in settings.modprobe_dirs], cache_dir=settings.cache_dir)
    if not tree.names():
        raise TreeError(f"there are no modules in {settings.tree!r}")
    return tree


def read_init_results(path: Path | None) -> InitResults:
    """Read what init functions come to. BadRequest names what is wrong with the file; no path is an empty file."""
    if path is None:
        return InitResults()
    try:
        return InitResults.parse(path.read_text())
    except OSError as error:
        raise BadRequest(f"the init results {str(path)!r} can't be read: {error.strerror}", field="init") from None
    except UnicodeDecodeError:
        raise BadRequest(f"the init results {str(path)!r} are no text", field="init") from None
    except InitResultsError as error:
        raise BadRequest(f"{path}: {error}", field="init") from None


def open_settings_identity(settings: LoaderSettings) -> KernelIdentity:
    """Return the kernel that the settings name. NotFound or BadRequest if that can't be."""
    if settings.identity != CATALOGUE_IDENTITY:
        return load_identity(settings.identity)
    from loader_svc.catalogue import catalogue_identity

    return catalogue_identity()


async def serve(settings: LoaderSettings) -> None:
    """Serve until SIGINT or SIGTERM. ModpressureError if it can't start."""
    tree = await asyncio.to_thread(open_settings_tree, settings)
    identity = await asyncio.to_thread(open_settings_identity, settings)
    init_results = await asyncio.to_thread(read_init_results, settings.init)
    server = GrpcServer(
        settings.listen,
        tls=server_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca),
        tokens=TokenFile(settings.tokens) if settings.tokens else None,
        reflection=settings.reflection,
        limits=settings.limits,
        grace_seconds=settings.grace_seconds,
    )
    workers = FileWorkers(settings.threads)
    meter = Meter()
    connected = asyncio.Event()
    health_changed = asyncio.Event()

    def on_connected(now: bool) -> None:
        if now:
            connected.set()
        else:
            connected.clear()
        health_changed.set()

    async def keep_health() -> None:
        while True:
            await health_changed.wait()
            health_changed.clear()
            await server.set_serving(SERVICE, connected.is_set())

    stats_tls = client_tls(settings.stats_ca, settings.stats_cert, settings.stats_key)
    if stats_tls is not None:
        # Only to learn now whether the files are in order.
        stats_tls.read()
    read_token(settings.stats_token_file)
    machine: Machine
    ledger = LedgerClient(
        settings.stats,
        tls=stats_tls,
        token_file=settings.stats_token_file,
        instance_id=uuid.uuid4().hex,
        meter=meter,
        on_released=lambda call_id: machine.release(call_id),
        on_connected=on_connected,
    )
    machine = Machine(
        ledger=ledger,
        workers=workers,
        plans=Plans(settings.image_limit_bytes, identity),
        budget=MemoryBudget(settings.memory_limit_bytes),
        meter=meter,
        tree_exports=tree.exports,
        init_results=init_results,
        init_seed=settings.init_seed,
    )
    loader = Loader(machine, tree, kmod=settings.kmod)
    server.add(LoaderServicer(loader, settings.request_limit), add_LoaderServiceServicer_to_server, SERVICE)
    address = await server.start()
    # Its default follows from the port, which is only known now; nothing has been said to stats_svc yet.
    machine.loader = ledger.loader = settings.name_at(address)
    about_process(loader=machine.loader)
    await server.set_serving(SERVICE, False)
    stream = asyncio.ensure_future(ledger.run())
    works = (keep_health(), loader.tell_clients_when_away(), _end_grace(server, loader, settings.grace_seconds))
    tasks = [stream, *map(asyncio.ensure_future, works)]
    log.info(
        "loader_svc listening",
        address=address,
        loader=machine.loader,
        tree=str(tree.root),
        release=tree.release,
        modules=len(tree.names()),
        memory_limit_bytes=machine.budget.limit_bytes,
        stats=settings.stats,
    )
    spare_what_stays()
    try:
        await _serve_or_replaced(server, loader, stream)
        if loader.in_flight:
            log.warning("stopped with calls in flight", calls=loader.in_flight)
        await ledger.close()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers.shutdown()
    log.info("loader_svc stopped", loader=machine.loader)


async def _end_grace(server: GrpcServer, loader: Loader, grace_seconds: float) -> None:
    """Once the server stops, let clients wait for most of the grace; the rest is for their calls to be counted."""
    await server.stopping.wait()
    await asyncio.sleep(WAITING_SHARE * grace_seconds)
    loader.send_clients_away(SETTLE_SHARE * grace_seconds)


async def _serve_or_replaced(server: GrpcServer, loader: Loader, stream: asyncio.Future[None]) -> None:
    """Serve until stopped, and drain. Replaced if another loader has taken this one's place."""
    serving = asyncio.ensure_future(server.serve_until_stopped(loader.drain))
    try:
        await asyncio.wait({serving, stream}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            loader.send_clients_away(SETTLE_SHARE * REPLACED_SECONDS)
            await server.stop(REPLACED_SECONDS)
            await stream
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
