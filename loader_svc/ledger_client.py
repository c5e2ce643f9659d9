"""A loader's side of the stream to stats_svc: asks the shared kernel, and survives its absence.

Operations gather while a message is on its way and leave as one numbered batch. A batch is kept until it is committed
and each of its operations answered; after a lost connection what is not committed is sent again as it was, and what is
committed but unanswered is asked again under its old number, which the server answers from what it left behind.

Where the lease of this process has ended, as after a long sleep, stats_svc accepts nothing more of it: what was in
flight is lost, nothing of it is counted, and it goes on as a new instance. Its live modules stay its own, as far as
stats_svc has them live. So it goes on, too, where that has another database.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc
import structlog

from loader_svc.memory import Meter
from loader_svc.outbox import ENVELOPE_BYTES, MAX_BATCH_BYTES, Outbox, size_of
from loader_svc.presence import Presence
from modpressure.client_errors import NoAnswer, ServerFailed, TimedOut, end_requests, error_of
from modpressure.errors import BadRequest, Forbidden, NotNow, OverLimit, Overloaded, Replaced, Unavailable
from modpressure.fair import FLOW, Flow
from modpressure.operations import STEPS
from modpressure.tls import BadCredentials, ClientTls, open_channel, read_token
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub

if TYPE_CHECKING:
    # Not subscriptable at run time.
    Stream: TypeAlias = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]

log = structlog.get_logger(__name__)

MAX_BATCHES_IN_FLIGHT = 1
"""Batches that may be on their way at once. While one is, operations gather for the next: what a message and a commit
cost is shared by all that they carry, and a lone caller waits no longer for it."""

FIRST_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
TELL_HELD_SECONDS = 0.25
HEARTBEATS_PER_LEASE = 4
MAX_FORMER_INSTANCES = 1000
"""Former ids that stats_svc is told of; who was fenced more often than that has forgotten its oldest modules."""

CLOSE_SECONDS = 2.0
"""How long the stream may take to end when the loader stops."""

CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
)

WELCOME_SECONDS = 5.0
"""How long one of several stats_svc may take to answer a hello."""

SILENCE_SHARE = 0.5
"""Of the lease: how long a stats_svc that sends heartbeats, four in each lease, may be silent."""

LEAST_SILENCE_SECONDS = 2.0
SILENCE_STEPS = 4

ENDS = frozenset({"finish_call", "remove_module"})
"""Operations that are recognised, when they are asked again, by the event that they have left."""

PROCEED = pb.OperationResult.VERDICT_PROCEED
INVALID = pb.OperationResult.VERDICT_INVALID
LOST = pb.OperationResult.VERDICT_LOST


def _has_claims(operations: list[pb.Operation]) -> bool:
    return any(operation.HasField("claim_request") for operation in operations)


async def _watch(heard: asyncio.Event, limit: asyncio.Timeout, welcome: pb.Welcome) -> None:
    """Bring on the end of ``limit`` once nothing was heard for longer than can be of a stats_svc that runs.

    In steps, for time in which this process did not run itself is no silence: what was said waits to be read.
    """
    step_seconds = max(SILENCE_SHARE * welcome.lease_seconds, LEAST_SILENCE_SECONDS) / SILENCE_STEPS
    silent_steps = 0
    while welcome.heartbeats and silent_steps < SILENCE_STEPS:
        await asyncio.sleep(step_seconds)
        silent_steps = 0 if heard.is_set() else silent_steps + 1
        heard.clear()
    if welcome.heartbeats:
        limit.reschedule(asyncio.get_running_loop().time())


@contextlib.asynccontextmanager
async def _heard_within(seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
    """Give the time within which something must be heard. Unavailable if nothing is; None is no limit."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield limit
    except TimeoutError as error:
        raise Unavailable("it has stopped to answer, though the connection stands") from error


async def _beat(stream: Stream, turn: asyncio.Lock, lease_seconds: float) -> None:
    """Say often that this loader is there, for as long as it is; a server that has no leases hears nothing."""
    while lease_seconds > 0:
        await asyncio.sleep(lease_seconds / HEARTBEATS_PER_LEASE)
        async with turn:
            await stream.write(pb.ConnectRequest(heartbeat=pb.Heartbeat()))


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
    flow: Flow
    batch: _Batch | None = None


class LedgerClient:
    """Asks stats_svc on behalf of a loader's calls."""

    def __init__(
        self,
        target: str,
        *,
        tls: ClientTls | None = None,
        token_file: Path | None = None,
        instance_id: str,
        meter: Meter,
        on_released: Callable[[int], None],
        on_connected: Callable[[bool], None],
        new_instance_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        """Prepare; nothing is sent before ``run``.

        ``target`` is the address of stats_svc, or those of several over one database, with commas: after a lost
        connection the next is tried.
        ``on_released`` is called with the id of each call whose live module was removed, ``on_connected`` with whether
        the stream stands, each time that changes; ``new_instance_id`` for another id, where nothing more is accepted
        of this one.
        """
        self.target = target
        self._tls = tls
        self._token_file = token_file
        self.instance_id = instance_id
        self.loader = ""
        """Name of the loader; set it before ``run``."""

        self._meter = meter
        self._peak = meter.begin_peak()
        self._on_released = on_released
        self._on_connected = on_connected
        self._last_call_id = 0
        self._lost_call_id = 0
        """Calls up to here were lost together with the instance that they were made by."""

        self._lost_now = asyncio.Event()
        """Set when what is in flight now is lost; then there is another one."""

        self._former_instance_ids: list[str] = []
        self._closing = asyncio.Event()
        self._last_sequence = 0
        self._said_held_bytes = 0
        self._outbox = Outbox()
        self._outbox_filled = asyncio.Event()
        self._room = asyncio.Event()
        self._applied_sequence = 0
        self._ended_again: set[int] = set()
        """Calls whose end is asked again. What ended is sure to be kept only for the last batch that stats_svc applied,
        so until they are answered there is none after it."""

        self._asked: dict[int, _Asked] = {}
        self._batches: dict[int, _Batch] = {}
        self._calls: dict[int, pb.CallInFlight] = {}
        self._requests: dict[int, pb.HeldRequest] = {}
        self._live: set[int] = set()
        """Calls whose module is live."""

        self._durable_sequence = 0
        """Up to here, stats_svc has said that batches are committed."""

        self._welcomed = False
        """Whether this instance was."""

        self._took_any = False
        """Whether the last stream has brought anything after its welcome."""

        self._most_bytes = MAX_BATCH_BYTES
        """Longest batch that stats_svc takes, by ``size_of`` its operations."""

        self._lost_reason = "the loader has stopped"
        """Why what was in flight was lost."""

        self._new_instance_id = new_instance_id
        self._policies: dict[str, int] = {}
        self._limited: set[str] = set()
        """Systems whose memory is finite."""

        self._presence = Presence()
        self._refusal = ""
        """What a stats_svc that is there has said instead of a welcome."""

    # --- what calls use ---

    def new_call_id(self) -> int:
        """Return a number for a new call, from 1."""
        self._last_call_id += 1
        return self._last_call_id

    async def ask(self, operation: pb.Operation, *, interrupted: bool = False) -> pb.OperationResult:
        """Ask one operation of one call and return its answer, however long stats_svc is away.

        ``interrupted`` says that a signal is pending: if the operation would have to wait, it is interrupted at once.
        The call must have no other operation unanswered. NotNow if the server makes no sense of it, as of a call in a
        system that was deleted meanwhile; Forbidden if the loader's token is not for the system; OverLimit if it asks
        for more than a limit of the server allows, or is longer than that takes; Unavailable if the call is lost: then
        it is not counted.
        """
        if operation.call_id <= self._lost_call_id:
            raise self._lost()
        if size_of(operation) > self._most_bytes:
            raise OverLimit(
                f"what a call asks, {operation.ByteSize()} bytes, is too long for the message_limit of stats_svc at"
                f" {self.target}"
            )
        answer: asyncio.Future[pb.OperationResult] = asyncio.get_running_loop().create_future()
        flow = FLOW.get()
        self._asked[operation.call_id] = _Asked(operation, answer, flow)
        self._outbox.put(operation, flow)
        if interrupted:
            self.interrupt(operation.system, operation.call_id)
        self._outbox_filled.set()
        result = await answer
        if result.verdict == INVALID:
            refusal = Forbidden if result.forbidden else OverLimit if result.over_limit else NotNow
            raise refusal(result.message)
        if result.verdict == LOST:
            raise Unavailable(result.message)
        return result

    def _lost(self) -> Unavailable:
        return Unavailable(f"the call is lost, and not counted: {self._lost_reason}")

    def interrupt(self, system: str, call_id: int) -> None:
        """End the wait of a call, if it has one: its operation is then answered interrupted."""
        if (asked := self._asked.get(call_id)) is not None:
            # Behind the operation, whoever sends the signal.
            self._outbox.put(pb.Operation(call_id=call_id, system=system, interrupt=pb.Interrupt()), asked.flow)
            self._outbox_filled.set()

    async def policy_of(self, system: str) -> int:
        """Return the number of a system's own policy, creating the system if there is none of that id.

        OverLimit if there are as many systems as there may be.
        """
        policy = self._policies.get(system)
        if policy is None:
            operation = pb.Operation(call_id=self.new_call_id(), system=system, open_system=pb.OpenSystem())
            result = await self.ask(operation)
            policy = self._policies[system] = result.policy
            self._limited.discard(system)
            if result.has_limits:
                self._limited.add(system)
        return policy

    async def pass_time(self, seconds: float) -> None:
        """Return after a time. Unavailable as soon as what is in flight here is lost."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._lost_now.wait(), seconds)
            raise self._lost()

    def has_limits(self, system: str) -> bool:
        """Return whether a system's memory is finite, as ``policy_of`` has learned with its policy."""
        return system in self._limited

    async def require(self) -> None:
        """Return once the stream stands. Unavailable if it has been away for longer than a new request waits."""
        if not await self._presence.wait_briefly():
            raise self.unavailable()

    async def wait_away(self) -> None:
        """Return when the stream has been away for longer than callers of what is in flight wait."""
        await self._presence.wait_long_away()

    async def wait_connected(self) -> None:
        """Return when the stream stands."""
        await self._presence.wait_there()

    def unavailable(self) -> Unavailable:
        """Return the error that says that stats_svc is away, or why it does not serve this loader."""
        why = f" does not serve this loader: {self._refusal}" if self._refusal else " does not answer"
        return Unavailable(f"stats_svc at {self.target}{why}")

    # --- the stream ---

    async def run(self) -> None:
        """Keep the stream standing until ``close``; after it nothing can be asked any more.

        Replaced if another process has this loader's name.
        """
        try:
            await self._keep_stream()
        finally:
            self._lose_calls(self._lost_reason)
            # Whoever asks from now on would wait for ever, and hold up the end of the process.
            self._lost_call_id = sys.maxsize

    async def _keep_stream(self) -> None:
        backoff_seconds = FIRST_BACKOFF_SECONDS
        addresses = itertools.cycle(self.target.split(","))
        said = ""
        self._set_connected(False)
        while not self._closing.is_set():
            least_seconds, refusal = 0.0, ""
            try:
                # Anew each time: by then the files may hold other certificates, another token.
                token = read_token(self._token_file)
                async with open_channel(next(addresses), self._tls, CHANNEL_OPTIONS, token) as channel:
                    await self._converse(channel)
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
                told = error_of(error, "stats_svc", self.target)
                refusal = "" if isinstance(told, NoAnswer | TimedOut | ServerFailed) else told.sentence
                if isinstance(told, Overloaded):
                    least_seconds = told.retry_seconds
                elif isinstance(told, BadRequest | OverLimit) and (
                    self._presence.is_there or self._calls or self._requests
                ):
                    # Said again, it would be refused again.
                    self._begin_anew(reason)
                if error.code() is grpc.StatusCode.ABORTED:
                    self._set_connected(False)
                    raise Replaced(reason) from None
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    self._begin_anew(reason)
            except (BadCredentials, Unavailable) as error:
                reason = error.sentence
            self._refusal = refusal
            if self._presence.is_there:
                if self._took_any:
                    backoff_seconds = FIRST_BACKOFF_SECONDS
                self._set_connected(False)
                if not self._closing.is_set():
                    log.warning("lost stats_svc", target=self.target, reason=reason)
            elif reason != said:
                # Nobody there is soon told; that we are not let in stays so until somebody reads it.
                log.warning("no stats_svc", target=self.target, reason=reason)
            said = reason
            # Not all loaders of a system at once.
            delay_seconds = least_seconds + backoff_seconds * random.uniform(0.5, 1.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay_seconds)
            backoff_seconds = min(2 * backoff_seconds, MAX_BACKOFF_SECONDS)

    async def close(self) -> None:
        """End the stream, so that stats_svc knows that nothing more will come, and with it ``run``."""
        self._closing.set()
        loop = asyncio.get_running_loop()
        due = loop.time() + CLOSE_SECONDS
        while self._presence.is_there and loop.time() < due:
            await asyncio.sleep(CLOSE_SECONDS / 100)

    def _set_connected(self, connected: bool) -> None:
        self._presence.set(connected)
        self._on_connected(connected)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        """Open the stream, say hello, and write and read until it breaks."""
        stream: Stream = LedgerServiceStub(channel).Connect()
        self._took_any = False
        tasks: list[asyncio.Task[None]] = []
        try:
            hello = pb.Hello(
                instance_id=self.instance_id,
                loader=self.loader,
                calls=map(self._in_flight, self._calls.values()),
                live_call_ids=sorted(self._live),
                requests=self._requests.values(),
                former_instance_ids=self._former_instance_ids,
                heartbeats=True,
                welcomed=self._welcomed,
                committed_sequence=self._durable_sequence,
            )
            await stream.write(pb.ConnectRequest(hello=hello))
            # One that is stopped takes connections all the same; where there are others, one of them may lead by now.
            async with _heard_within(WELCOME_SECONDS if "," in self.target else None):
                welcome = await stream.read()
            if not isinstance(welcome, pb.ConnectResponse):
                return
            applied_sequence = welcome.welcome.applied_sequence
            self._welcomed = True
            limit_bytes = welcome.welcome.message_limit_bytes
            self._most_bytes = min(MAX_BATCH_BYTES, limit_bytes - ENVELOPE_BYTES) if limit_bytes else MAX_BATCH_BYTES
            log.info("found stats_svc", target=self.target, applied_sequence=applied_sequence)
            self._policies.clear()
            # The writer takes what is unanswered before anything new can be asked, so old numbers go out first.
            again = list(self._say_again(applied_sequence))
            turn = asyncio.Lock()
            tasks = [
                asyncio.create_task(self._write(stream, turn, again)),
                asyncio.create_task(self._tell_held()),
                asyncio.create_task(_beat(stream, turn, welcome.welcome.lease_seconds)),
                asyncio.create_task(self._hang_up(stream, turn)),
            ]
            self._applied_sequence = self._last_sequence
            self._ended_again = {o.call_id for batch in again for o in batch.operations if o.WhichOneof("kind") in ENDS}
            self._room.clear()
            self._make_room()
            self._set_connected(True)
            await self._listen(stream, welcome.welcome)
        finally:
            for task in tasks:
                task.cancel()
            # Whatever broke them breaks the reader too, which says so.
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(end, Exception) and not isinstance(
                    end, (grpc.aio.AioRpcError, asyncio.InvalidStateError)
                ):
                    raise end
            stream.cancel()

    async def _listen(self, stream: Stream, welcome: pb.Welcome) -> None:
        """Take what is answered until the stream ends. Unavailable if nothing is heard for longer than can be."""
        heard = asyncio.Event()
        async with _heard_within(None) as limit:
            watching = asyncio.create_task(_watch(heard, limit, welcome))
            try:
                while isinstance(response := await stream.read(), pb.ConnectResponse):
                    heard.set()
                    self._took_any = True
                    self._take(response.results)
            finally:
                watching.cancel()

    async def _hang_up(self, stream: Stream, turn: asyncio.Lock) -> None:
        """End the stream once that is wanted; the server answers what was asked and ends its side."""
        await self._closing.wait()
        async with turn:
            await end_requests(stream)
        await asyncio.sleep(CLOSE_SECONDS)
        stream.cancel()

    def _begin_anew(self, reason: str) -> None:
        """Go on as a new instance: nothing more is accepted of this one. The next hello is answered by what is live."""
        former, self.instance_id = self.instance_id, self._new_instance_id()
        self._former_instance_ids = [*self._former_instance_ids, former][-MAX_FORMER_INSTANCES:]
        self._last_sequence = self._applied_sequence = self._durable_sequence = 0
        self._welcomed = False
        self._lose_calls(reason)
        log.error(
            "begun anew", target=self.target, reason=reason, former_instance_id=former, instance_id=self.instance_id
        )

    def _lose_calls(self, reason: str) -> None:
        """End all that is in flight; nothing of it is told to stats_svc any more."""
        self._lost_reason = reason
        self._lost_call_id = self._last_call_id
        self._lost_now.set()
        self._lost_now = asyncio.Event()
        self._ended_again.clear()
        self._batches.clear()
        self._calls.clear()
        self._requests.clear()
        self._outbox.clear()
        self._outbox_filled.clear()
        self._policies.clear()
        asked, self._asked = self._asked, {}
        for one in asked.values():
            if not one.answer.done():
                one.answer.set_exception(self._lost())

    def _note(self, operation: pb.Operation, kind: str, verdict: int) -> None:
        """Note that a call is in flight, and what it has said and holds."""
        call = self._calls.get(operation.call_id)
        if call is None:
            call = pb.CallInFlight(system=operation.system, call_id=operation.call_id)
            self._calls[operation.call_id] = call
        match kind:
            case "enter_gate" if verdict == PROCEED:
                call.inode = operation.enter_gate.inode
            case "check_name":
                call.module = operation.check_name.module
            case "reserve_name":
                call.module = operation.reserve_name.module

    def _in_flight(self, call: pb.CallInFlight) -> pb.CallInFlight:
        """Return what is said of a call: it may have ended, and only stats_svc can know."""
        asked = self._asked.get(call.call_id)
        if asked is not None and asked.batch is not None and asked.operation.HasField("finish_call"):
            call.finish_sequence = asked.batch.message.sequence
        return call

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
                again.append(
                    pb.OperationBatch(sequence=sequence, operations=operations, has_claims=_has_claims(operations))
                )
            else:
                del self._batches[sequence]
        return again

    async def _write(self, stream: Stream, turn: asyncio.Lock, again: list[pb.OperationBatch]) -> None:
        for message in again:
            async with turn:
                await stream.write(pb.ConnectRequest(batch=message))
        while True:
            await self._outbox_filled.wait()
            await self._room.wait()
            operations = self._outbox.take(self._most_bytes)
            if not self._outbox:
                self._outbox_filled.clear()
            batch = self._batch(operations)
            if self._last_sequence - self._applied_sequence >= MAX_BATCHES_IN_FLIGHT:
                self._room.clear()
            async with turn:
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
            has_claims=_has_claims(operations),
            # There is no room for a new one before what is asked again is answered.
            answered_sequence=self._applied_sequence,
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

    def _make_room(self) -> None:
        """Let the next batch leave if it may."""
        if not self._ended_again and self._last_sequence - self._applied_sequence < MAX_BATCHES_IN_FLIGHT:
            self._room.set()

    def _take(self, results: pb.ResultBatch) -> None:
        # Answers to calls that waited come with an older number.
        self._applied_sequence = max(self._applied_sequence, results.applied_sequence)
        self._ended_again.difference_update(result.call_id for result in results.results)
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
            match operation.WhichOneof("kind"):
                case "finish_call":
                    self._calls.pop(call_id, None)
                    if result.verdict == PROCEED and operation.finish_call.call.outcome == call_pb2.OUTCOME_LIVE:
                        self._live.add(call_id)
                case kind if kind in STEPS and result.verdict not in (INVALID, LOST):
                    self._note(operation, kind, result.verdict)
                case "request_module" if result.verdict == PROCEED:
                    asked_for = operation.request_module
                    held = pb.HeldRequest(system=operation.system, call_id=call_id, request=asked_for)
                    self._requests[call_id] = held
                case "finish_request":
                    self._requests.pop(call_id, None)
            if batch is not None and result.event_id:
                # An event is stored with the place in the stream of the batch that carried it.
                self._durable_sequence = max(self._durable_sequence, batch.message.sequence)
            if not asked.answer.done():
                asked.answer.set_result(result)
        # After the answers: what they lead to at once leaves with what waits, in one batch.
        self._make_room()
        if self._batches and not results.results:
            # A batch of interrupts alone, or of nothing, has no answers; it is done with once it is applied.
            for sequence in [s for s, b in self._batches.items() if s <= results.applied_sequence and not b.unanswered]:
                del self._batches[sequence]
        for call_id in results.released_call_ids:
            self._live.discard(call_id)
            self._on_released(call_id)
        for system in results.deleted_systems:
            self._policies.pop(system, None)
