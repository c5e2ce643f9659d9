"""A loader's side of the stream to stats_svc: asks the shared kernel, and survives its absence.

Operations gather while a message is on its way and leave as one numbered batch. A batch is kept until it is committed
and each of its operations answered; after a lost connection what is not committed is sent again as it was, and what is
committed but unanswered is asked again under its old number, which the server answers from what it left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import grpc
import structlog

from loader_svc.memory import Meter
from modpressure.errors import NotNow, Unavailable
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub

if TYPE_CHECKING:
    # Not subscriptable at run time.
    Stream: TypeAlias = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]

log = structlog.get_logger(__name__)

MAX_BATCH_OPERATIONS = 1000
MAX_BATCHES_IN_FLIGHT = 1
"""Batches that may be on their way at once. While one is, operations gather for the next: what a message and a commit
cost is shared by all that they carry, and a lone caller waits no longer for it."""

FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
TELL_HELD_SECONDS = 0.25
PATIENCE_SECONDS = 3.0
"""How long stats_svc may be away before new requests are refused."""

IN_FLIGHT_PATIENCE_SECONDS = 30.0
"""How long it may be away before the callers of what is in flight are told so, if they set no deadline before that."""

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
)

PROCEED = pb.OperationResult.VERDICT_PROCEED
INVALID = pb.OperationResult.VERDICT_INVALID


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch that was sent and is not yet done with."""

    message: pb.OperationBatch
    unanswered: dict[int, pb.Operation]


@dataclass(slots=True, eq=False)
class _Asked:
    """An operation, who awaits its answer, and the batch that carries it once it has left."""

    operation: pb.Operation
    answer: asyncio.Future[pb.OperationResult]
    batch: _Batch | None = None


class LedgerClient:
    """Asks stats_svc on behalf of a loader's calls."""

    def __init__(
        self,
        target: str,
        *,
        instance_id: str,
        meter: Meter,
        on_released: Callable[[int], None],
        on_connected: Callable[[bool], None],
    ) -> None:
        """Prepare; nothing is sent before ``run``.

        ``on_released`` is called with the id of each call whose live module was removed, ``on_connected`` with whether
        the stream stands, each time that changes.
        """
        self.target = target
        self.instance_id = instance_id
        self.loader = ""
        """Name of the loader; set it before ``run``."""

        self._meter = meter
        self._peak = meter.begin_peak()
        self._on_released = on_released
        self._on_connected = on_connected
        self._last_call_id = 0
        self._last_sequence = 0
        self._said_held_bytes = 0
        self._outbox: list[pb.Operation] = []
        self._outbox_filled = asyncio.Event()
        self._room = asyncio.Event()
        self._applied_sequence = 0
        self._asked: dict[int, _Asked] = {}
        self._batches: dict[int, _Batch] = {}
        self._gates: dict[int, pb.HeldGate] = {}
        self._policies: dict[str, int] = {}
        self._connected = asyncio.Event()
        self._away = asyncio.Event()
        self._lost_at = 0.0
        self._patience: asyncio.TimerHandle | None = None

    # --- what calls use ---

    def new_call_id(self) -> int:
        """Return a number for a new call, from 1."""
        self._last_call_id += 1
        return self._last_call_id

    async def ask(self, operation: pb.Operation) -> pb.OperationResult:
        """Ask one operation of one call and return its answer, however long stats_svc is away.

        The call must have no other operation unanswered. NotNow if the server makes no sense of it, as of a call in a
        system that was deleted meanwhile.
        """
        answer: asyncio.Future[pb.OperationResult] = asyncio.get_running_loop().create_future()
        self._asked[operation.call_id] = _Asked(operation, answer)
        self._outbox.append(operation)
        self._outbox_filled.set()
        result = await answer
        if result.verdict == INVALID:
            raise NotNow(result.message)
        return result

    def interrupt(self, system: str, call_id: int) -> None:
        """End the wait of a call, if it has one: its operation is then answered interrupted."""
        if call_id in self._asked:
            self._outbox.append(pb.Operation(call_id=call_id, system=system, interrupt=pb.Interrupt()))
            self._outbox_filled.set()

    async def policy_of(self, system: str) -> int:
        """Return the number of a system's own policy, creating the system if there is none of that id."""
        policy = self._policies.get(system)
        if policy is None:
            operation = pb.Operation(call_id=self.new_call_id(), system=system, open_system=pb.OpenSystem())
            policy = self._policies[system] = (await self.ask(operation)).policy
        return policy

    async def require(self) -> None:
        """Return once the stream stands. Unavailable if it has been away for longer than a new request waits."""
        if self._connected.is_set():
            return
        away_seconds = asyncio.get_running_loop().time() - self._lost_at
        if away_seconds < PATIENCE_SECONDS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connected.wait(), PATIENCE_SECONDS - away_seconds)
        if not self._connected.is_set():
            raise self.unavailable()

    async def wait_away(self) -> None:
        """Return when the stream has been away for longer than callers of what is in flight wait."""
        await self._away.wait()

    async def wait_connected(self) -> None:
        """Return when the stream stands."""
        await self._connected.wait()

    def unavailable(self) -> Unavailable:
        """Return the error that says that stats_svc is away."""
        return Unavailable(f"stats_svc at {self.target} does not answer")

    # --- the stream ---

    async def run(self) -> None:
        """Keep the stream standing until cancelled."""
        backoff_seconds = FIRST_BACKOFF_SECONDS
        self._set_connected(False)
        async with grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS) as channel:
            while True:
                try:
                    await self._converse(channel)
                    reason = "it ended the stream"
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or error.code().name
                if self._connected.is_set():
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                    self._set_connected(False)
                    log.warning("lost stats_svc", target=self.target, reason=reason)
                else:
                    log.debug("no stats_svc yet", target=self.target, reason=reason)
                await asyncio.sleep(backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    def _set_connected(self, connected: bool) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if connected:
            self._connected.set()
            self._away.clear()
        else:
            self._connected.clear()
            loop = asyncio.get_running_loop()
            self._lost_at = loop.time()
            self._patience = loop.call_later(IN_FLIGHT_PATIENCE_SECONDS, self._away.set)
        self._on_connected(connected)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        """Open the stream, say hello, and write and read until it breaks."""
        stream: Stream = LedgerServiceStub(channel).Connect()
        writer: asyncio.Task[None] | None = None
        teller: asyncio.Task[None] | None = None
        try:
            hello = pb.Hello(instance_id=self.instance_id, loader=self.loader, gates=self._gates.values())
            await stream.write(pb.ConnectRequest(hello=hello))
            welcome = await stream.read()
            if not isinstance(welcome, pb.ConnectResponse):
                return
            applied_sequence = welcome.welcome.applied_sequence
            log.info("found stats_svc", target=self.target, applied_sequence=applied_sequence)
            self._policies.clear()
            # The writer takes what is unanswered before anything new can be asked, so old numbers go out first.
            again = list(self._say_again(applied_sequence))
            writer = asyncio.create_task(self._write(stream, again))
            teller = asyncio.create_task(self._tell_held())
            self._applied_sequence = self._last_sequence
            self._room.set()
            self._set_connected(True)
            while isinstance(response := await stream.read(), pb.ConnectResponse):
                self._take(response.results)
        finally:
            if teller is not None:
                teller.cancel()
            if writer is not None:
                writer.cancel()
                # Whatever broke the writer breaks the reader too, which says so.
                with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await writer
            stream.cancel()

    def _say_again(self, applied_sequence: int) -> list[pb.OperationBatch]:
        """Return what of the batches is unanswered, under their old numbers, and the interrupts that were not applied.

        What was answered is never sent again, even of a batch that the server has forgotten: the answer would be taken
        for that of the call's next operation. Only operations without a durable effect are answered and forgotten.
        """
        again = []
        for sequence, batch in list(self._batches.items()):
            operations = [
                operation
                for operation in batch.message.operations
                if operation.call_id in batch.unanswered
                or (operation.HasField("interrupt") and sequence > applied_sequence)
            ]
            if operations or sequence > applied_sequence:
                again.append(pb.OperationBatch(sequence=sequence, operations=operations))
            else:
                del self._batches[sequence]
        return again

    async def _write(self, stream: Stream, again: list[pb.OperationBatch]) -> None:
        for message in again:
            await stream.write(pb.ConnectRequest(batch=message))
        while True:
            await self._outbox_filled.wait()
            await self._room.wait()
            operations = self._outbox[:MAX_BATCH_OPERATIONS]
            del self._outbox[:MAX_BATCH_OPERATIONS]
            if not self._outbox:
                self._outbox_filled.clear()
            batch = self._batch(operations)
            if self._last_sequence - self._applied_sequence >= MAX_BATCHES_IN_FLIGHT:
                self._room.clear()
            await stream.write(pb.ConnectRequest(batch=batch))

    async def _tell_held(self) -> None:
        """Have a batch without operations sent where an idle loader holds something else than it last said."""
        while True:
            await asyncio.sleep(TELL_HELD_SECONDS)
            if self._meter.held_bytes != self._said_held_bytes:
                self._outbox_filled.set()

    def _batch(self, operations: list[pb.Operation]) -> pb.OperationBatch:
        self._last_sequence += 1
        self._said_held_bytes = self._meter.held_bytes
        message = pb.OperationBatch(
            sequence=self._last_sequence,
            operations=operations,
            held_bytes=self._said_held_bytes,
            peak_held_bytes=self._meter.take_peak(self._peak),
        )
        batch = self._batches[self._last_sequence] = _Batch(message, {})
        for operation in operations:
            asked = self._asked.get(operation.call_id)
            # Not so for an interrupt: the operation that it ends has another message's place.
            if asked is not None and asked.operation is operation:
                asked.batch = batch
                batch.unanswered[operation.call_id] = operation
        return message

    def _take(self, results: pb.ResultBatch) -> None:
        # Answers to calls that waited come with an older number.
        self._applied_sequence = max(self._applied_sequence, results.applied_sequence)
        if self._last_sequence - self._applied_sequence < MAX_BATCHES_IN_FLIGHT:
            self._room.set()
        for result in results.results:
            call_id = result.call_id
            asked = self._asked.pop(call_id, None)
            if asked is None:
                continue
            batch, operation = asked.batch, asked.operation
            if batch is not None:
                del batch.unanswered[call_id]
                if not batch.unanswered and batch.message.sequence <= results.applied_sequence:
                    self._batches.pop(batch.message.sequence, None)
            # Noted here, not by who asked: a hello that is said before the asker runs again must tell the truth.
            if operation.HasField("enter_gate"):
                if result.verdict == PROCEED:
                    inode = operation.enter_gate.inode
                    self._gates[call_id] = pb.HeldGate(system=operation.system, call_id=call_id, inode=inode)
            elif operation.HasField("finish_call"):
                self._gates.pop(call_id, None)
            if not asked.answer.done():
                asked.answer.set_result(result)
        if self._batches and not results.results:
            # A batch of interrupts alone, or of nothing, has no answers; it is done with once it is applied.
            for sequence in [s for s, b in self._batches.items() if s <= results.applied_sequence and not b.unanswered]:
                del self._batches[sequence]
        for call_id in results.released_call_ids:
            self._on_released(call_id)
        for system in results.deleted_systems:
            self._policies.pop(system, None)
