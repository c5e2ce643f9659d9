"""Events a second into stats_svc, durable, against a sink that only parses and adds up; and its memory meanwhile.

Both take the same bytes over the same stream, with the same number of batches in flight.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import grpc

from bench.services import Service, service, stats_service
from bench.table import Row
from modpressure import aio
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub

BATCH_EVENTS = 500
BATCHES_IN_FLIGHT = 8
ROUND_EVENTS = 50_000
ROUNDS = 5
MEMORY_EVENTS = 1_000_000
"""Events of the memory row; BENCH_EVENTS says otherwise."""

SEED = 20230405


def call(number: int, dice: random.Random) -> call_pb2.Call:
    """Return an event such as a storm makes: one in ten goes live, the rest are duplicates."""
    live = dice.random() < 0.1
    late = dice.random() < 0.3
    module = f"module_{dice.randrange(100)}"
    call = call_pb2.Call(
        call_id=number,
        worker=f"worker-{number % 100}",
        origin=call_pb2.ORIGIN_USERSPACE,
        requester="udev",
        module=module,
        file=f"kernel/drivers/{module}.ko",
        policy=call_pb2.POLICY_V6_4,
        syscall=call_pb2.SYSCALL_FINIT_MODULE,
        outcome=call_pb2.OUTCOME_LIVE if live else (call_pb2.OUTCOME_LOAD if late else call_pb2.OUTCOME_BECOMING),
        errno="" if live else "EEXIST",
        check="" if live else "duplicate",
        duplicate=not live,
        file_bytes=dice.randrange(10_000, 3_000_000),
        peak_held_bytes=dice.randrange(10_000, 6_000_000),
        duration_ns=dice.randrange(10_000_000),
    )
    call.image_bytes = call.file_bytes
    if live or late:
        call.mod_bytes = dice.randrange(10, 500) * 4096
        call.text_bytes = 4096
    call.start_time.FromNanoseconds(1_700_000_000_000_000_000 + number)
    return call


def batches(events: int) -> list[pb.RecordCalls]:
    """Return recorded calls, in batches."""
    dice = random.Random(SEED)
    numbers = range(1, events + 1, BATCH_EVENTS)
    return [pb.RecordCalls(calls=[call(n, dice) for n in range(first, first + BATCH_EVENTS)]) for first in numbers]


class Producer:
    """One stream to a ledger."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._stream = LedgerServiceStub(channel).Connect()
        self._name = name
        self._sequence = 0

    async def open(self) -> None:
        """Say hello, and open the system."""
        hello = pb.Hello(instance_id=self._name, loader=self._name)
        await self._stream.write(pb.ConnectRequest(hello=hello))
        await self._stream.read()
        await self._send(pb.Operation(call_id=1, system="default", open_system=pb.OpenSystem()))
        await self._stream.read()

    async def _send(self, operation: pb.Operation) -> None:
        self._sequence += 1
        batch = pb.OperationBatch(sequence=self._sequence, operations=[operation])
        await self._stream.write(pb.ConnectRequest(batch=batch))

    async def events_a_second(self, records: list[pb.RecordCalls]) -> float:
        """Send batches, so many in flight, until all are acknowledged; return events a second."""
        room = asyncio.Semaphore(BATCHES_IN_FLIGHT)

        async def read() -> None:
            answered = 0
            while answered < len(records):
                response: Any = await self._stream.read()
                for _ in response.results.results:
                    answered += 1
                    room.release()

        begun = time.perf_counter()
        reader = asyncio.ensure_future(read())
        for number, record in enumerate(records, 2):
            await room.acquire()
            await self._send(pb.Operation(call_id=number, system="default", record_calls=record))
        await reader
        return len(records) * BATCH_EVENTS / (time.perf_counter() - begun)

    def close(self) -> None:
        """End the stream."""
        self._stream.cancel()


async def _rates(stats: Service, sink: Service) -> Row:
    records = batches(ROUND_EVENTS)
    ratios: list[float] = []
    figures: list[tuple[float, float]] = []
    async with (
        grpc.aio.insecure_channel(stats.address) as stats_channel,
        grpc.aio.insecure_channel(sink.address) as sink_channel,
    ):
        durable, in_memory = Producer(stats_channel, "bench-durable"), Producer(sink_channel, "bench-sink")
        await durable.open()
        await in_memory.open()
        for number in range(ROUNDS + 1):
            sink_rate = await in_memory.events_a_second(records)
            rate = await durable.events_a_second(records)
            if number:  # the first round warms up
                ratios.append(rate / sink_rate)
                figures.append((rate, sink_rate))
        durable.close()
        in_memory.close()
    rate, sink_rate = sorted(figures)[len(figures) // 2]
    return Row(
        "events into SQLite, committed",
        ratios,
        0.4,
        "at least",
        f"a sink in memory, {sink_rate:.0f}/s",
        f"{rate:.0f} events a second in batches of {BATCH_EVENTS}",
    )


async def _memory(stats: Service) -> Row:
    """Measure the resident set after a tenth of the events, and after all of them."""
    events = int(os.environ.get("BENCH_EVENTS", MEMORY_EVENTS))
    records = batches(ROUND_EVENTS)
    rounds = max(10, events // ROUND_EVENTS)
    sizes: list[int] = []
    async with grpc.aio.insecure_channel(stats.address) as channel:
        producer = Producer(channel, "bench-memory")
        await producer.open()
        for _ in range(rounds):
            await producer.events_a_second(records)
            sizes.append(stats.resident_bytes())
        producer.close()
    early = sizes[rounds // 10]
    ratios = [size / early for size in sizes[-3:]]
    return Row(
        f"memory of stats_svc over {rounds * ROUND_EVENTS:,} events",
        ratios,
        1.1,
        "at most",
        f"itself after a tenth of them, {early / 2**20:.0f} MiB",
        f"{sizes[-1] / 2**20:.0f} MiB resident at the end",
    )


async def measure() -> list[Row]:
    """Measure both rows, each over a database of its own."""
    with stats_service() as stats, service("bench.peers", "sink") as sink:
        rates = await _rates(stats, sink)
    with stats_service() as stats:
        return [rates, await _memory(stats)]


def run() -> list[Row]:
    """Return the rows of this benchmark."""
    return aio.run(measure())
