"""Handing on to the stats_svc that leads what only that one can do.

Any of several stats_svc over one database may be asked for anything. Reads of what is stored are answered by whoever is
asked. The streams of loaders, changes of systems, and what is known in the leader's memory alone go on to the leader,
message by message, with the client's token and deadline; its answers and errors come back as they are.

The leader has to know whose request it is, as each client has limits of its own there, too. So the name goes along
(``CLIENT``), proved by a key that only those know who can read the database: the id of the leader (``Vouching``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf.message import Message

from modpressure.access import AUTHORIZATION
from modpressure.client_errors import end_requests, error_of
from modpressure.errors import ModpressureError, Unavailable
from modpressure.fair import FLOW
from modpressure.grpc_errors import translate_errors
from modpressure.malformed import Malformed
from modpressure.tls import BadCredentials, ClientTls, Follower, check_readable_by_none, open_channel

_STREAM: Final = "/modpressure.v1.LedgerService/Connect"
_WATCH: Final = "/modpressure.v1.StatsService/WatchStats"
_CHANGES: Final = frozenset(
    f"/modpressure.v1.StatsService/{name}" for name in ("CreateSystem", "ResetSystem", "DeleteSystem")
)
_IMPORT: Final = "/modpressure.v1.StatsService/ImportSystem"
_LIVE_READS: Final = frozenset(
    f"/modpressure.v1.StatsService/{name}" for name in ("GetStats", "GetSystem", "ListSystems")
)
"""Their counters are stored; what is held, waits and is connected, the leader knows. While it is away that is nothing,
and what is taken of a system's memory is not said."""

_HANDED_ON: Final = frozenset((_STREAM, _WATCH, _IMPORT, *_CHANGES, *_LIVE_READS))

_ONCE: Final = "modpressure-forwarded"
"""Metadata of a request that was handed on: it is not handed on again."""

CLIENT: Final = "modpressure-client-bin"
"""Metadata of such a request: whose it is, and the proof, of ``_PROOF_BYTES``, before that."""

_PROOF_BYTES: Final = 32

_HOP_BY_HOP: Final = (":", "grpc-", "te", "content-type", "user-agent", _ONCE, CLIENT)
"""Beginnings of metadata that each connection has for itself."""

_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Whom nobody asks for anything is not tried any more: gRPC would go on for as long as there is the channel.
    ("grpc.client_idle_timeout_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


_log = structlog.get_logger(__name__)


class Vouching:
    """Says for whom a stats_svc hands a request on, and believes it only of those who share the database."""

    def __init__(self, leader_id: Callable[[], str]) -> None:
        """``leader_id()`` is what the database says of who leads, empty if that is not known."""
        self._leader_id = leader_id

    def _proof(self, client: bytes) -> bytes:
        return hmac.digest(self._leader_id().encode(), client, "sha256")

    def metadata(self, client: str) -> tuple[tuple[str, bytes], ...]:
        """Return the metadata that vouches for a client."""
        name = client.encode()
        return ((CLIENT, self._proof(name) + name),) if name and self._leader_id() else ()

    def client_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """Return the client that another stats_svc has vouched for in a request's metadata; empty for none."""
        for key, value in metadata:
            if key == CLIENT and isinstance(value, bytes) and self._leader_id():
                proof, name = value[:_PROOF_BYTES], value[_PROOF_BYTES:]
                if hmac.compare_digest(proof, self._proof(name)):
                    return name.decode(errors="replace")
        return ""


class Forwarder(grpc.aio.ServerInterceptor):
    """Hands on, while another process leads."""

    def __init__(
        self, leader_address: Callable[[], str], tls: ClientTls | None, stopping: asyncio.Event, vouching: Vouching
    ) -> None:
        """Hand on to ``leader_address()``, to none while that is empty; streams end when ``stopping`` is set.

        BadCredentials if the files of ``tls`` are not in order. They may be replaced at any time.
        """
        self._leader_address = leader_address
        self._tls = tls
        self._follower = Follower(tls) if tls else None
        self._stopping = stopping
        self._vouching = vouching
        self._address = ""
        self._channel: Any = None
        self._unreached = ""
        """Why the leader can't be reached, as far as that was logged."""

        self._handing_on: dict[str, tuple[Any, Any]] = {}
        """Of each method its own handler, and the one that hands on."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the method's handler, or one that hands on."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in _HANDED_ON or not self._leader_address():
            return handler
        if any(key == _ONCE for key, _ in handler_call_details.invocation_metadata or ()):
            return handler
        known, handing_on = self._handing_on.get(method, (None, None))
        if known is not handler:
            handing_on = self._handler(handler, method)
            self._handing_on[method] = (handler, handing_on)
        return handing_on

    def _handler(self, handler: Any, method: str) -> Any:
        """Return a handler that hands on what ``handler`` would carry out."""

        def encoded(request: Message | Malformed) -> bytes:
            """Return a request as it is sent on. BadRequest if it is no message."""
            if isinstance(request, Malformed):
                raise request.error(method.rpartition(".")[2])
            return request.SerializeToString()

        @contextlib.asynccontextmanager
        async def asking(kind: str, context: Any) -> AsyncIterator[Callable[..., Any]]:
            """Give what begins the RPC at the leader; end the one of ``context`` as that ends, or says why it can't."""
            async with translate_errors(context, method):
                try:
                    yield self._asked(kind, method, context)
                except grpc.aio.AioRpcError as error:
                    if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
                        raise self._away(error) from error
                    await _pass_on(context, error)

        async def unary(request: Message | Malformed, context: Any) -> Any:
            async with asking("unary_unary", context) as ask:
                try:
                    response = await ask(encoded(request))
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or method not in _LIVE_READS:
                        raise
                    self._away(error)
                else:
                    self._is_there()
                    return response
            return handler.response_serializer(await handler.unary_unary(request, context))

        async def watch(request: Message | Malformed, context: Any) -> AsyncIterator[bytes]:
            async with asking("unary_stream", context) as ask, _left(ask(encoded(request))) as call:
                while (response := await self._next(call)) is not grpc.aio.EOF:
                    yield response

        async def stream(requests: AsyncIterator[Message | Malformed], context: Any) -> None:
            async with asking("stream_stream", context) as ask, _left(ask()) as call:
                await self._converse(call, (encoded(request) async for request in requests), context)

        async def gather(requests: AsyncIterator[Message | Malformed], context: Any) -> Any:
            async with asking("stream_unary", context) as ask, _left(ask()) as call:
                # If the leader has ended the call, its answer says why.
                with contextlib.suppress(asyncio.InvalidStateError):
                    async for request in requests:
                        await call.write(encoded(request))
                    await end_requests(call)
                return await call

        if method == _IMPORT:
            return grpc.stream_unary_rpc_method_handler(gather, handler.request_deserializer, None)
        if method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, None)
        if method == _WATCH:
            return grpc.unary_stream_rpc_method_handler(watch, handler.request_deserializer, None)
        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, None)

    def _asked(self, kind: str, method: str, context: Any) -> Callable[..., Any]:
        """Return what begins an RPC at the leader as the one of ``context`` is here. Unavailable if none can be begun.

        Nor is one begun if others could read the token on its way.
        """
        address = self._leader_address()
        if not address:
            raise Unavailable("which stats_svc leads is not known at the moment")
        passed = [pair for pair in context.invocation_metadata() or () if not pair[0].startswith(_HOP_BY_HOP)]
        try:
            if self._tls is None and any(key == AUTHORIZATION for key, _ in passed):
                check_readable_by_none(address)
            channel = self._channel_to(address)
        except BadCredentials as error:
            raise Unavailable(error.sentence) from error
        metadata = (*passed, (_ONCE, "1"), *self._vouching.metadata(FLOW.get().client))

        def ask(*request: bytes) -> Any:
            return getattr(channel, kind)(method)(*request, metadata=metadata, timeout=context.time_remaining())

        return ask

    def _away(self, error: grpc.aio.AioRpcError) -> ModpressureError:
        """Return what a request ends with as the leader can't be reached, and log it, unless that is known."""
        away = error_of(error, "the stats_svc that leads", self._address)
        if away.sentence != self._unreached:
            _log.warning("can't hand on", leader=self._address, reason=away.sentence)
            self._unreached = away.sentence
        return away

    def _is_there(self) -> None:
        """Note that the leader has answered."""
        if self._unreached:
            _log.info("handing on again", leader=self._address)
            self._unreached = ""

    def _channel_to(self, address: str) -> Any:
        """Return a channel to the leader, with the certificates that the files have now."""
        renewed = self._follower is not None and self._follower.changed() is not None
        if renewed or address != self._address:
            # The one before is closed with the last call that uses it.
            self._channel = open_channel(address, self._follower.current if self._follower else None, _OPTIONS)
            self._address = address
        return self._channel

    async def _converse(self, call: Any, requests: AsyncIterator[bytes], context: Any) -> None:
        """Hand on in both directions until either side ends."""

        async def ask() -> None:
            async for request in requests:
                await call.write(request)
            # Who was killed looks the same up to here; but to that one nothing can be written. An empty message is
            # nothing to a loader, and to the leader an end is graceful only if its loader is there to ask for it.
            await context.write(b"")
            await end_requests(call)

        asking = asyncio.create_task(ask())
        try:
            while (response := await self._next(call, asking)) is not grpc.aio.EOF:
                await context.write(response)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _next(self, call: Any, beside: asyncio.Task[None] | None = None) -> Any:
        """Return the leader's next message; what ``beside`` raises is raised. Unavailable if this process stops."""
        reading = asyncio.ensure_future(call.read())
        stopping = asyncio.ensure_future(self._stopping.wait())
        waits: set[asyncio.Future[Any]] = {reading, stopping}
        if beside is not None and not beside.done():
            waits.add(beside)
        try:
            while not reading.done():
                done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if beside in done and beside is not None and not reading.done():
                    error = beside.exception()
                    # If the leader has ended the call, that it says so is the better reason.
                    if error is not None and not isinstance(error, grpc.aio.AioRpcError | asyncio.InvalidStateError):
                        raise error
                if stopping.done() and not reading.done():
                    raise Unavailable("stats_svc is stopping")
            response = reading.result()
            self._is_there()
            return response
        finally:
            stopping.cancel()
            reading.cancel()
            # A read may fail at the moment at which it is left: nobody else looks at that, and asyncio would log it.
            await asyncio.gather(reading, stopping, return_exceptions=True)

    async def close(self) -> None:
        """Hang up."""
        if self._channel is not None:
            await self._channel.close()


@contextlib.asynccontextmanager
async def _left(call: Any) -> AsyncIterator[Any]:
    """Give a call at the leader, and leave it at the end."""
    try:
        yield call
    finally:
        call.cancel()


async def _pass_on(context: Any, error: grpc.aio.AioRpcError) -> NoReturn:
    await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
    raise AssertionError("abort raises")
