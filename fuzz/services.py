"""Both services in this process, as their commands would start them, on sockets in a directory."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fuzz.calls import RecordedServer, Service, Way
from fuzz.targets import Where
from loader_svc.server import SERVICE as LOADER_SERVICE
from loader_svc.server import serve as serve_loader
from modpressure.limits import DEFAULT_LIMITS
from modpressure.settings import LoaderSettings, StatsSettings
from stats_svc.server import STATS_SERVICE
from stats_svc.server import serve as serve_stats

START_SECONDS = 60
CLIENT_OPTIONS = (
    ("grpc.max_send_message_length", 2 * DEFAULT_LIMITS.message_bytes),
    ("grpc.max_receive_message_length", 2 * DEFAULT_LIMITS.message_bytes),
    ("grpc.enable_retries", 0),
)


@contextlib.asynccontextmanager
async def ways(directory: Path) -> AsyncIterator[dict[Where, Way]]:
    """Start both services; give the ways to each; stop them at the end."""
    stats_at, loader_at = (f"unix:{directory}/{name}.sock" for name in ("stats", "loader"))
    database = str(directory / "fuzz.sqlite3")
    # Without a limit of the rate: what is refused by that is not looked at.
    stats = StatsSettings(listen=stats_at, database=database, rate_limit=0)
    # A name that no message has: another loader of that name would take this one's place, which then ends.
    name = f"loader-{uuid.uuid4().hex}"
    loader = LoaderSettings(listen=loader_at, stats=stats_at, memory_limit="64MiB", name=name, threads=2, rate_limit=0)
    make_server = grpc.aio.server
    made: list[Service] = []

    def recorded(**options: Any) -> Any:
        made.append(Service(options["interceptors"]))
        return RecordedServer(make_server(**options), made[-1])

    running = []
    try:
        async with (
            grpc.aio.insecure_channel(stats_at, CLIENT_OPTIONS) as to_stats,
            grpc.aio.insecure_channel(loader_at, CLIENT_OPTIONS) as to_loader,
        ):
            with mock.patch("grpc.aio.server", recorded):
                running.append(asyncio.ensure_future(serve_stats(stats)))
                await _serving(to_stats, STATS_SERVICE)
                running.append(asyncio.ensure_future(serve_loader(loader)))
                await _serving(to_loader, LOADER_SERVICE)
            yield {"stats": Way(to_stats, made[0]), "loader": Way(to_loader, made[1])}
    finally:
        for service in running:
            service.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _serving(channel: grpc.aio.Channel, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    give_up = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True, timeout=5)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        if time.monotonic() > give_up:
            raise SystemExit(f"{service} does not serve after {START_SECONDS} s")
        await asyncio.sleep(0.05)
