"""Starting and stopping a loader."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from pathlib import Path
from typing import Final, Literal

import structlog

from loader_svc.checks.exports import TreeExporters
from loader_svc.ledger_client import LedgerClient
from loader_svc.live import Machine
from loader_svc.loader import Loader
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.plan import Plans
from loader_svc.servicer import LoaderServicer
from loader_svc.trees import ModuleTree, TreeError, open_tree
from loader_svc.workers import FileWorkers
from modpressure.grpc_server import GrpcServer
from modpressure.identity_files import load_identity
from modpressure.settings import LoaderSettings
from modpressure.v1.loader_service_pb2_grpc import add_LoaderServiceServicer_to_server

SERVICE: Final = "modpressure.v1.LoaderService"
CATALOGUES: Final[dict[str, Literal["plain", "xz", "zst"]]] = {
    "catalogue": "plain",
    "catalogue-xz": "xz",
    "catalogue-zst": "zst",
}

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


async def serve(settings: LoaderSettings) -> None:
    """Serve until SIGINT or SIGTERM. ModpressureError if it can't start."""
    tree = await asyncio.to_thread(open_settings_tree, settings)
    identity = await asyncio.to_thread(load_identity, settings.identity)
    server = GrpcServer(settings.listen, reflection=settings.reflection, grace_seconds=settings.grace_seconds)
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

    machine: Machine
    ledger = LedgerClient(
        settings.stats,
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
        exporters=TreeExporters(tree.exporter),
    )
    loader = Loader(machine, tree, kmod=settings.kmod)
    server.add(LoaderServicer(loader), add_LoaderServiceServicer_to_server, SERVICE)
    address = await server.start()
    # Its default follows from the port, which is only known now; nothing has been said to stats_svc yet.
    machine.loader = ledger.loader = settings.name_at(address)
    await server.set_serving(SERVICE, False)
    tasks = [asyncio.ensure_future(work) for work in (keep_health(), ledger.run(), loader.tell_clients_when_away())]
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
    try:
        await server.serve_until_stopped()
        # Its clients are gone, but what was begun must be counted.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.grace_seconds):
                await loader.drain()
        if loader.in_flight:
            log.warning("stopped with calls in flight", calls=loader.in_flight)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        workers.shutdown()
    log.info("loader_svc stopped", loader=machine.loader)
