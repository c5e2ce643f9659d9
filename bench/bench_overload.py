"""Memory while producers are ten times too fast, and what a modest client gets beside a greedy one.

stats_svc is made slow by stopping it (SIGSTOP) for nine tenths of the time, while streams of loads are written to a
loader as fast as it reads them. For stats_svc itself producers write batches without waiting for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from bench.bench_events import BATCH_EVENTS, batches
from bench.services import Service, loader_service, stats_service
from bench.table import Row
from modpressure import aio
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

SECONDS = float(os.environ.get("BENCH_OVERLOAD_SECONDS", "30"))
STREAMS = 4
REQUESTS = 200
"""Of one message."""

PRODUCERS = 10
WORKERS = 2000

STOPPED_SECONDS, RUNNING_SECONDS = 0.45, 0.05


@contextlib.asynccontextmanager
async def _slow(service: Service) -> AsyncIterator[None]:
    """Let a service run for a tenth of the time."""

    async def hold() -> None:
        while True:
            os.kill(service.pid, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_SECONDS)
            os.kill(service.pid, signal.SIGCONT)
            await asyncio.sleep(RUNNING_SECONDS)

    task = asyncio.create_task(hold())
    try:
        yield
    finally:
        task.cancel()
        os.kill(service.pid, signal.SIGCONT)


async def _sizes(service: Service, seconds: float) -> list[int]:
    """Return the resident set, twice a second."""
    sizes = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sizes.append(service.resident_bytes())
        await asyncio.sleep(0.5)
    return sizes


def _flat(name: str, sizes: list[int], peer: str, done: str) -> Row:
    """Return the row of a memory that must not grow: its last third against its first."""
    third = len(sizes) // 3
    early = max(sizes[:third])
    return Row(
        name, [size / early for size in sizes[-third:]], 1.1, "at most", f"{peer}, {early / 2**20:.0f} MiB", done
    )


async def _loader(stats: Service, loader: Service) -> Row:
    """Measure a loader whose stats_svc is ten times too slow for what it is asked."""
    answered = 0
    message = pb.LoadModulesRequest(
        requests=[pb.ModuleRequest(tag=n, load=pb.LoadModuleRequest(module="minix")) for n in range(REQUESTS)]
    )

    async def flood() -> None:
        nonlocal answered
        async with grpc.aio.insecure_channel(loader.address, options=(("grpc.use_local_subchannel_pool", 1),)) as one:
            stream = LoaderServiceStub(one).LoadModules()

            async def write() -> None:
                while True:
                    await stream.write(message)

            writing = asyncio.create_task(write())
            try:
                while isinstance(response := await stream.read(), pb.LoadModulesResponse):
                    answered += len(response.responses)
            finally:
                writing.cancel()

    floods = [asyncio.create_task(flood()) for _ in range(STREAMS)]
    # At full speed first: all that it ever needs for these streams it has by then.
    await asyncio.sleep(SECONDS / 6)
    async with _slow(stats):
        sizes = await _sizes(loader, SECONDS)
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    return _flat(
        "loader, stats_svc ten times too slow", sizes, "itself in the first third", f"{answered} requests answered"
    )


async def _stats(stats: Service) -> Row:
    """Measure a stats_svc to which more is written than it can commit."""
    records = batches(BATCH_EVENTS)
    answered = 0

    async def flood(name: str) -> None:
        nonlocal answered
        async with grpc.aio.insecure_channel(stats.address, options=(("grpc.use_local_subchannel_pool", 1),)) as one:
            stream = LedgerServiceStub(one).Connect()
            await stream.write(ledger.ConnectRequest(hello=ledger.Hello(instance_id=name, loader=name)))
            await stream.read()

            async def write() -> None:
                sequence = 0
                while True:
                    sequence += 1
                    operation = ledger.Operation(call_id=sequence, system="default", record_calls=records[0])
                    batch = ledger.OperationBatch(sequence=sequence, operations=[operation])
                    await stream.write(ledger.ConnectRequest(batch=batch))

            writing = asyncio.create_task(write())
            try:
                while isinstance(response := await stream.read(), ledger.ConnectResponse):
                    answered += len(response.results.results)
            finally:
                writing.cancel()

    floods = [asyncio.create_task(flood(f"flood-{number}")) for number in range(PRODUCERS)]
    await asyncio.sleep(SECONDS / 6)
    sizes = await _sizes(stats, SECONDS)
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    return _flat(
        f"stats_svc, {PRODUCERS} producers that never wait",
        sizes,
        "itself in the first third",
        f"{answered * BATCH_EVENTS} events committed",
    )


async def _shares(loader: Service) -> Row:
    """Measure what one who makes one call at a time gets beside a storm, in a system of its own."""
    plan = pb.Storm(system="greedy", modules=["minix"], workers=WORKERS, mode=pb.Storm.MODE_REPEAT)
    plan.duration.FromSeconds(24 * 3600)
    storm_calls = modest_calls = 0
    ratios: list[float] = []

    async def be_greedy(stub: Any) -> None:
        nonlocal storm_calls
        async for response in stub.RunStorm(iter([pb.RunStormRequest(storm=plan)])):
            storm_calls = response.progress.calls

    async def be_modest(stub: Any) -> None:
        nonlocal modest_calls
        while True:
            await stub.LoadModule(pb.LoadModuleRequest(system="modest", module="minix"))
            modest_calls += 1

    async with grpc.aio.insecure_channel(loader.address) as one, grpc.aio.insecure_channel(loader.address) as other:
        asking = [asyncio.create_task(be_greedy(LoaderServiceStub(one)))]
        while not storm_calls:
            await asyncio.sleep(0.1)
        asking.append(asyncio.create_task(be_modest(LoaderServiceStub(other))))
        for number in range(6):
            before = storm_calls, modest_calls
            await asyncio.sleep(SECONDS / 6)
            if number:  # the first round warms up
                ratios.append((modest_calls - before[1]) * WORKERS / max(1, storm_calls - before[0]))
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    return Row(
        "calls of a client that makes one at a time",
        ratios,
        1.5,
        "at least",
        f"those of each worker of a storm of {WORKERS}",
        f"{modest_calls} calls beside {storm_calls}",
    )


async def measure() -> list[Row]:
    """Measure the rows, each with services of its own."""
    with stats_service() as stats, loader_service(stats, "catalogue") as loader:
        slow = await _loader(stats, loader)
    with stats_service() as stats:
        flooded = await _stats(stats)
    with stats_service() as stats, loader_service(stats, "catalogue") as loader:
        return [slow, flooded, await _shares(loader)]


def run() -> list[Row]:
    """Return the rows of this benchmark."""
    return aio.run(measure())
