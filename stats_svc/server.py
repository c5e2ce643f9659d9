"""Starting and stopping stats_svc."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from modpressure.grpc_server import GrpcServer
from modpressure.settings import StatsSettings
from modpressure.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from modpressure.v1.stats_service_pb2_grpc import add_StatsServiceServicer_to_server
from stats_svc.ledger import Ledger
from stats_svc.ledger_servicer import LedgerServicer
from stats_svc.servicer import StatsServicer
from stats_svc.store import SqlStore

STATS_SERVICE: Final = "modpressure.v1.StatsService"
LEDGER_SERVICE: Final = "modpressure.v1.LedgerService"

_log = structlog.get_logger(__name__)


async def serve(settings: StatsSettings) -> None:
    """Serve until SIGINT or SIGTERM. ModpressureError if it can't start."""
    store = await asyncio.to_thread(SqlStore, settings.database)
    try:
        await _serve(settings, store)
    finally:
        await asyncio.to_thread(store.close)
    _log.info("stats_svc stopped")


async def _serve(settings: StatsSettings, store: SqlStore) -> None:
    server = GrpcServer(settings.listen, reflection=settings.reflection, grace_seconds=settings.grace_seconds)
    changed = asyncio.Event()
    ledger = Ledger(store, lease_seconds=settings.lease_seconds, on_available=lambda _: changed.set())
    server.add(StatsServicer(store, ledger, server.stopping), add_StatsServiceServicer_to_server, STATS_SERVICE)
    server.add(LedgerServicer(ledger), add_LedgerServiceServicer_to_server, LEDGER_SERVICE)
    # Streams of loaders have no end of their own, and loaders know how to come back.
    server.on_stop(ledger.stop)

    async def keep_health() -> None:
        while True:
            await changed.wait()
            changed.clear()
            for service in (STATS_SERVICE, LEDGER_SERVICE):
                await server.set_serving(service, ledger.available)

    await ledger.start()
    health = asyncio.create_task(keep_health())
    try:
        address = await server.start()
        _log.info(f"stats_svc listening on {address}", address=address, database=store.name)
        await server.serve_until_stopped()
    finally:
        health.cancel()
        await ledger.stop()
