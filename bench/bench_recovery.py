"""How soon stats_svc is back over a file with many events, and how soon what a loader that is gone held is free again.

The peers are limits: 2 s from the start of the process to the first committed answer; the lease, from the last sign of
life to the answer of who waited.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.bench_events import SEED, call
from bench.services import Service, service
from bench.table import Row
from modpressure import aio
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub
from modpressure.v1.stats_service_pb2 import ListEventsResponse
from stats_svc.rows import Changes, Commit, InstanceRow, Segment, SegmentKind, SystemDelta, SystemRow
from stats_svc.store import SqlStore

EVENTS = 10_000_000
"""Events in the file; BENCH_RECOVERY_EVENTS says otherwise."""

START_SECONDS = 2.0
LEASE_SECONDS = 3.0
ROUNDS = 5
SEGMENT_EVENTS = 2000
VETERAN = "veteran"
"""The loader that has made all the calls in the file."""


def _fill(path: Path, events: int) -> None:
    """Write the file as the ledger does, segment by segment."""
    dice = random.Random(SEED)
    calls = [call(number, dice) for number in range(1, SEGMENT_EVENTS + 1)]
    for each in calls:
        each.instance_id = each.loader = VETERAN
    made = ListEventsResponse(events=[call_pb2.Event(call=each) for each in calls])
    store = SqlStore(str(path))
    store.load()
    store.commit(Commit(1, [Changes(create=SystemRow("default", 2, create_time_ns=1))], []))
    for sequence, first in enumerate(range(1, events + 1, 10 * SEGMENT_EVENTS)):
        delta = SystemDelta(first_event_id=first)
        for begin in range(first, min(first + 10 * SEGMENT_EVENTS, events + 1), SEGMENT_EVENTS):
            counters, failed = Counters(), dict[str, FailedModule]()
            counters.add_calls(calls, failed)
            delta.add(counters, failed)
            delta.events += SEGMENT_EVENTS
            delta.segments.append(Segment(SegmentKind.EVENTS, begin, SEGMENT_EVENTS, events=made))
        now_ns = time.time_ns()
        veteran = InstanceRow(VETERAN, VETERAN, sequence, now_ns, nothing_before=True)
        store.commit(Commit(now_ns, [Changes(deltas={"default": delta})], [veteran]))
    store.close()


class Hand:
    """A loader's side of a stream, of single operations."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._stream = LedgerServiceStub(channel).Connect(wait_for_ready=True)
        self._name = name
        self._sequence = 0

    async def open(self) -> None:
        """Say hello, and promise heartbeats."""
        hello = pb.Hello(instance_id=self._name, loader=self._name, heartbeats=True)
        await self._stream.write(pb.ConnectRequest(hello=hello))
        await self._stream.read()

    async def tell(self, operation: pb.Operation) -> None:
        """Send an operation."""
        self._sequence += 1
        operation.system = "default"
        await self._stream.write(
            pb.ConnectRequest(batch=pb.OperationBatch(sequence=self._sequence, operations=[operation]))
        )

    async def answer(self) -> pb.OperationResult:
        """Return the next answer."""
        while True:
            response = await self._stream.read()
            if not isinstance(response, pb.ConnectResponse):
                raise SystemExit(f"the stream ended: {await self._stream.details()}")
            for result in response.results.results:
                return result

    async def beat(self) -> None:
        """Say again and again that it is there."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            await self._stream.write(pb.ConnectRequest(heartbeat=pb.Heartbeat()))

    def close(self) -> None:
        """Hang up."""
        self._stream.cancel()


def _stats(path: Path, listen: str) -> tuple[str, ...]:
    lease = ("--lease-seconds", str(LEASE_SECONDS), "--log-format", "json")
    return ("stats_svc", "--listen", listen, "--database", str(path), *lease)


async def first_answer(address: str, name: str) -> None:
    """Return when a call has ended and that is committed."""
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        hand = Hand(channel, name)
        await hand.open()
        ended = call_pb2.Call(module="xfs", outcome=call_pb2.OUTCOME_KREAD, errno="EIO")
        await hand.tell(pb.Operation(call_id=1, finish_call=pb.FinishCall(call=ended)))
        result = await hand.answer()
        if not result.event_id:
            raise SystemExit(f"the first call was not counted: {result}")
        hand.close()


async def _answer_again(address: str) -> float:
    """Ask what the loader with all the calls has asked before, for a call on its way; return how long that took."""
    begun = time.perf_counter()
    async with grpc.aio.insecure_channel(address) as channel:
        hand = Hand(channel, VETERAN)
        await hand.open()
        await hand.tell(pb.Operation(call_id=SEGMENT_EVENTS + 1, check_name=pb.CheckName(module="xfs")))
        result = await hand.answer()
        if result.verdict != pb.OperationResult.VERDICT_PROCEED:
            raise SystemExit(f"what was asked again was answered: {result}")
        hand.close()
    return time.perf_counter() - begun


@dataclass
class _Database:
    """A file, and how long its stats_svc took to come back over it."""

    path: Path
    has_veteran: bool = False
    address: str = "127.0.0.1:0"
    starts: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    again_seconds: list[float] = field(default_factory=list)

    async def start(self) -> None:
        """Start stats_svc, wait until a call is committed, and kill it."""
        begun = time.perf_counter()
        with service(*_stats(self.path, self.address)) as stats:
            await first_answer(stats.address, f"starter-{self.starts}")
            if self.starts:  # the first one only finds a port, and leaves something to recover
                self.seconds.append(time.perf_counter() - begun)
                self.cpu_seconds.append(stats.cpu_seconds())
            if self.has_veteran:
                self.again_seconds.append(await _answer_again(stats.address))
            self.starts += 1
            self.address = stats.address
            os.kill(stats.pid, signal.SIGKILL)


async def _starts(path: Path, events: int) -> list[Row]:
    full, empty = _Database(path, has_veteran=True), _Database(path.with_name("empty.sqlite3"))
    for _ in range(ROUNDS + 1):
        for database in (full, empty):
            await database.start()
    name = f"stats_svc killed, back over {events / 1e6:g} M events"
    size_bytes = path.stat().st_size
    return [
        Row(
            name,
            [each / START_SECONDS for each in full.seconds],
            1.0,
            "at most",
            f"{START_SECONDS:g} s to the first committed answer",
            f"{listed(full.seconds)}; of that CPU {listed(full.cpu_seconds)}; file of {size_bytes >> 20} MiB",
        ),
        Row(
            "the same",
            [each / other for each, other in zip(full.seconds, empty.seconds, strict=True)],
            1.25,
            "at most",
            "an empty file",
            f"empty: {listed(empty.seconds)}; CPU {listed(empty.cpu_seconds)}",
        ),
        Row(
            f"what a loader with {events / 1e6:g} M calls of its own asks again",
            [each / START_SECONDS for each in full.again_seconds],
            1.0,
            "at most",
            f"{START_SECONDS:g} s to the answer",
            listed(full.again_seconds),
        ),
    ]


async def _takeover(stats: Service, *, silent: bool) -> Row:
    """Have a loader hold a name and fall silent, or hang up, and another one wait for that name."""
    seconds: list[float] = []
    async with grpc.aio.insecure_channel(stats.address) as channel:
        for number in range(ROUNDS):
            name = f"{'silent' if silent else 'gone'}-{number}"
            holder, waiter = Hand(channel, name), Hand(channel, f"{name}-waiter")
            await holder.open()
            await waiter.open()
            beats = [asyncio.ensure_future(each.beat()) for each in (holder, waiter)]
            reserve = pb.ReserveName(module=name)
            await holder.tell(pb.Operation(call_id=1, reserve_name=reserve))
            await holder.answer()
            await waiter.tell(pb.Operation(call_id=1, reserve_name=reserve))
            begun = time.perf_counter()
            beats[0].cancel()
            if not silent:
                holder.close()
            result = await waiter.answer()
            if result.errno != "EBUSY":
                raise SystemExit(f"the waiter was told {result}")
            seconds.append(time.perf_counter() - begun)
            beats[1].cancel()
            for each in (holder, waiter):
                each.close()
    return Row(
        f"a name whose loader {'falls silent' if silent else 'is gone'}, free again",
        [each / LEASE_SECONDS for each in seconds],
        1.02,
        "at most",
        f"the lease, {LEASE_SECONDS:g} s",
        listed(seconds),
    )


def listed(seconds: list[float]) -> str:
    """Return some times as text."""
    return f"{', '.join(f'{each:.2f}' for each in seconds)} s"


async def _measure() -> list[Row]:
    events = int(os.environ.get("BENCH_RECOVERY_EVENTS", EVENTS))
    with tempfile.TemporaryDirectory(prefix="modpressure-bench-") as directory:
        path = Path(directory) / "bench.sqlite3"
        await asyncio.to_thread(_fill, path, events)
        subprocess.run(["sync", str(path)], check=True)
        rows = await _starts(path, events)
        with service(*_stats(path, "127.0.0.1:0")) as stats:
            rows += [await _takeover(stats, silent=silent) for silent in (False, True)]
    return rows


def run() -> list[Row]:
    """Measure."""
    return aio.run(_measure())
