"""Health tells the truth: whether a service can do its work now, heard by a watcher as it changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.services import Launch

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def until(watch: Any, status: Any) -> None:
    """Read what a watcher is told until it is a status."""
    async with asyncio.timeout(60):
        while (await watch.read()).status != status:
            pass


async def test_a_loader_is_well_while_it_reaches_stats_svc(launch: Launch, tmp_path: Path) -> None:
    database = ("--database", str(tmp_path / "stats.sqlite3"))
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", *database)
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    async with grpc.aio.insecure_channel(loader.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        names = ("modpressure.v1.LoaderService", "")
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
        for watch in watches:
            await until(watch, SERVING)
        stats.kill()
        for watch in watches:
            await until(watch, NOT_SERVING)
        launch("stats_svc", "--listen", stats.address, *database)
        for watch in watches:
            await until(watch, SERVING)
