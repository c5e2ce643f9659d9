"""Starting and stopping stats_svc."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import socket
from typing import Final

import structlog

from modpressure.garbage import spare_what_stays
from modpressure.grpc_server import GrpcServer
from modpressure.settings import StatsSettings
from modpressure.tls import client_tls, server_tls
from modpressure.tokens import TokenFile
from modpressure.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from modpressure.v1.stats_service_pb2_grpc import add_StatsServiceServicer_to_server
from stats_svc.ages import Ages
from stats_svc.forward import Forwarder, Vouching
from stats_svc.housekeeping import Housekeeping
from stats_svc.ledger import Ledger
from stats_svc.ledger_servicer import LedgerServicer
from stats_svc.servicer import StatsServicer
from stats_svc.store import SqlStore

STATS_SERVICE: Final = "modpressure.v1.StatsService"
LEDGER_SERVICE: Final = "modpressure.v1.LedgerService"

CLOSE_SECONDS: Final = 2.0
"""How long, after the grace, the database may take to let go."""

_log = structlog.get_logger(__name__)


async def serve(settings: StatsSettings) -> None:
    """Serve until SIGINT or SIGTERM. ModpressureError if it can't start."""
    store = await asyncio.to_thread(SqlStore, settings.database, lead_seconds=settings.lead_seconds)
    is_idle = True
    try:
        is_idle = await _serve(settings, store)
    finally:
        is_closed = is_idle and await _closes(store)
    _log.info("stats_svc stopped")
    if not is_closed:
        # The interpreter would wait for the threads that the database keeps waiting.
        os._exit(0)


async def _closes(store: SqlStore) -> bool:
    """Close the store; return whether it is closed, False if it does not come to that."""
    closing = asyncio.ensure_future(asyncio.to_thread(store.close))
    done, _ = await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    for closed in done:
        closed.result()
    return bool(done)


async def _serve(settings: StatsSettings, store: SqlStore) -> bool:
    """Serve until stopped; return whether nothing is left that uses the store."""
    vouching = Vouching(lambda: store.leader_id)
    server = GrpcServer(
        settings.listen,
        tls=server_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca),
        tokens=TokenFile(settings.tokens) if settings.tokens else None,
        reflection=settings.reflection,
        limits=settings.limits,
        client_of=vouching.client_of,
        grace_seconds=settings.grace_seconds,
    )
    changed = asyncio.Event()
    ages = Ages()
    ledger = Ledger(
        store,
        lease_seconds=settings.lease_seconds,
        system_limit=settings.system_limit,
        on_available=lambda _: changed.set(),
        ages=ages,
    )
    servicer = StatsServicer(store, ledger, server.stopping, import_limit_bytes=settings.import_limit_bytes)
    server.add(servicer, add_StatsServiceServicer_to_server, STATS_SERVICE)
    ledger_servicer = LedgerServicer(ledger, message_limit_bytes=settings.limits.message_bytes)
    server.add(ledger_servicer, add_LedgerServiceServicer_to_server, LEDGER_SERVICE)
    peer_tls = client_tls(
        settings.peer_ca,
        settings.tls_cert if settings.peer_ca else None,
        settings.tls_key if settings.peer_ca else None,
    )
    forwarder = Forwarder(lambda: ledger.leader_address, peer_tls, server.stopping, vouching)
    server.intercept(forwarder)
    # Streams of loaders have no end of their own, and loaders know how to come back.
    server.on_stop(functools.partial(ledger.stop, settings.grace_seconds))

    async def keep_health() -> None:
        while True:
            await changed.wait()
            changed.clear()
            for service in (STATS_SERVICE, LEDGER_SERVICE):
                # Who stands by hands on.
                await server.set_serving(service, ledger.available or bool(ledger.leader_address))

    await ledger.start()
    health = asyncio.create_task(keep_health())
    house = Housekeeping(
        store, ledger.in_writer, keep_events=settings.keep_events, keep_days=settings.keep_days, ages=ages
    )
    housekeeping = asyncio.create_task(house.run())
    try:
        address = await server.start()
        store.reached_at(settings.advertise or _reached_at(address))
        await ledger.be_heard()
        _log.info(f"stats_svc listening on {address}", address=address, database=store.name)
        spare_what_stays()
        await server.serve_until_stopped()
    finally:
        health.cancel()
        housekeeping.cancel()
        is_idle = await ledger.stop(CLOSE_SECONDS)
        await forwarder.close()
    return is_idle


def _reached_at(address: str) -> str:
    """Return where others reach what listens on ``address``: this host by its name, if on all of its addresses."""
    host, _, port = address.rpartition(":")
    try:
        is_everywhere = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        is_everywhere = False
    return f"{socket.gethostname()}:{port}" if is_everywhere else address
