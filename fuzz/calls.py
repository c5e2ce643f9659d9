"""RPCs of a fuzzer, as bytes: over gRPC, or handed to a service where gRPC would hand them to it.

Most of the time of an RPC between two ends in one process is gRPC's own, on both of them. What is fuzzed is what comes
after: deserializers, interceptors, servicers, serializers. So most RPCs begin there (``Inside``), and the rest goes
the whole way (``OverGrpc``).
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import grpc
from grpc._cython import cygrpc

from modpressure.malformed import Malformed

EOF: Final = grpc.aio.EOF
_UNREAD: Final = 4
"""Answers that wait for their reader, before a servicer has to wait as it has to for HTTP/2's flow control."""


class Call(Protocol):
    """One RPC, as its client has it."""

    async def write(self, message: bytes) -> None:
        """Send a message. RpcEnded if the service has ended the RPC."""

    async def done_writing(self) -> None:
        """Half-close. RpcEnded if the service has ended the RPC."""

    async def read(self) -> Any:
        """Return the next answer, or EOF."""

    def done(self) -> bool:
        """Return whether it has ended."""

    async def cancel(self) -> None:
        """Leave it; return when the service has noticed, if that can be told."""

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Return how it ended, and the sentence, once it has."""

    @property
    def delivered(self) -> tuple[int, int]:
        """How many messages the service has read, and how many of them were of their type; 0 where nobody counts."""


class RpcEnded(Exception):
    """The service has ended the RPC: its status says why."""


class OverGrpc:
    """An RPC by a channel."""

    delivered = (0, 0)

    def __init__(self, way: Way, path: str) -> None:
        # On the wire all four kinds look the same.
        self._call: Any = way.channel.stream_stream(path)()

    async def write(self, message: bytes) -> None:
        """Send a message.

        ``call.write`` would hide the service's status behind an INTERNAL of its own (grpc/aio/_call.py, ``_write``).
        """
        await self._call.wait_for_connection()
        try:
            await self._call._cython_call.send_serialized_message(message)
        except (asyncio.InvalidStateError, cygrpc.InternalError) as error:
            raise RpcEnded from error

    async def done_writing(self) -> None:
        """Half-close."""
        try:
            await self._call.done_writing()
        except (asyncio.InvalidStateError, cygrpc.InternalError) as error:
            raise RpcEnded from error

    async def read(self) -> Any:
        """Return the next answer, or EOF."""
        try:
            return await self._call.read()
        except grpc.aio.AioRpcError:
            return EOF

    def done(self) -> bool:
        """Return whether it has ended."""
        return bool(self._call.done())

    async def cancel(self) -> None:
        """Leave it."""
        self._call.cancel()

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Return how it ended."""
        return await self._call.code(), str(await self._call.details())


class _CallDetails(NamedTuple):
    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class Service:
    """What a ``grpc.aio`` server has been given: handlers, and the interceptors before them."""

    def __init__(self, interceptors: Sequence[Any]) -> None:
        self._handlers: list[Any] = []
        self._find: Any = self._known
        for interceptor in reversed(interceptors):
            self._find = _before(interceptor, self._find)

    def add(self, handlers: Sequence[Any]) -> None:
        """Add generic handlers."""
        self._handlers += handlers

    async def handler(self, path: str) -> Any:
        """Return what carries out an RPC, None for one that is not known; each RPC asks for its own."""
        return await self._find(_CallDetails(path))

    async def _known(self, details: _CallDetails) -> Any:
        found = (handlers.service(details) for handlers in self._handlers)
        return next((handler for handler in found if handler is not None), None)


def _before(interceptor: Any, continuation: Any) -> Any:
    async def intercepted(details: _CallDetails) -> Any:
        return await interceptor.intercept_service(continuation, details)

    return intercepted


@dataclass(frozen=True, slots=True)
class Way:
    """The two ways to one service."""

    channel: grpc.aio.Channel
    service: Service


class RecordedServer:
    """A ``grpc.aio`` server that tells which handlers it was given."""

    def __init__(self, server: Any, service: Service) -> None:
        self._server = server
        self._service = service

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Add handlers to both."""
        self._service.add(handlers)
        self._server.add_generic_rpc_handlers(handlers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


class Inside:
    """An RPC that begins where gRPC hands it to Python."""

    def __init__(self, way: Way, path: str) -> None:
        self._context = _Context()
        self._task = asyncio.ensure_future(_carry_out(way.service, path, self._context))
        self._task.add_done_callback(lambda _: self._context.end())

    async def write(self, message: bytes) -> None:
        """Send a message."""
        if self.done():
            raise RpcEnded
        self._context.requests.append(message)
        self._context.asked.set()

    async def done_writing(self) -> None:
        """Half-close."""
        self._context.half_closed = True
        self._context.asked.set()

    async def read(self) -> Any:
        """Return the next answer, or EOF."""
        context = self._context
        while not context.answers:
            if self.done():
                return EOF
            context.answered.clear()
            await context.answered.wait()
        answer = context.answers.popleft()
        context.taken.set()
        return answer

    def done(self) -> bool:
        """Return whether it has ended."""
        return self._task.done()

    async def cancel(self) -> None:
        """Leave it; return when the service has noticed."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Return how it ended."""
        if not self._task.done():
            await asyncio.wait({self._task})
        return self._context.status or (grpc.StatusCode.CANCELLED, "")

    @property
    def delivered(self) -> tuple[int, int]:
        """How many messages the service has read, and how many of these were messages."""
        return self._context.delivered, self._context.parsed


class _Context:
    """What a servicer has of an RPC, as ``grpc.aio.ServicerContext`` has it, as far as ours use it."""

    def __init__(self) -> None:
        self.requests: deque[bytes] = deque()
        self.asked = asyncio.Event()
        self.half_closed = False
        self.answers: deque[bytes] = deque()
        self.answered = asyncio.Event()
        self.taken = asyncio.Event()
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.delivered = self.parsed = 0
        self.handler: Any = None
        self._callbacks: list[Callable[[Any], None]] = []

    async def read(self) -> Any:
        """Return the next request, or EOF."""
        while not self.requests:
            if self.half_closed:
                return EOF
            self.asked.clear()
            await self.asked.wait()
        request = self.handler.request_deserializer(self.requests.popleft())
        self.delivered += 1
        self.parsed += not isinstance(request, Malformed)
        return request

    async def iterate(self) -> AsyncIterator[Any]:
        """Yield the requests."""
        while (request := await self.read()) is not EOF:
            yield request

    async def write(self, answer: Any) -> None:
        """Answer, once there is room."""
        serialize = self.handler.response_serializer
        while len(self.answers) >= _UNREAD:
            self.taken.clear()
            await self.taken.wait()
        self.answers.append(serialize(answer) if serialize else answer)
        self.answered.set()

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the RPC with a status."""
        if self.status is not None:
            raise grpc.aio.UsageError("RPC already finished.")
        self.status = (code, details)
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """End the RPC with a status."""
        await self.abort(status.code, status.details, status.trailing_metadata)

    def peer(self) -> str:
        """Return what gRPC calls the other end of a socket that is a file."""
        return "unix:"

    def invocation_metadata(self) -> tuple[()]:
        """Return none."""
        return ()

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Nobody looks at it."""

    def time_remaining(self) -> None:
        """There is no deadline."""

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Have it called when the RPC has ended."""
        self._callbacks.append(callback)

    def done(self) -> bool:
        """Return whether the RPC has a status."""
        return self.status is not None

    def end(self) -> None:
        """Tell all that it has ended."""
        for callback in self._callbacks:
            callback(self)
        self.answered.set()


async def _carry_out(service: Service, path: str, context: _Context) -> None:
    """Have a service carry out an RPC, as ``grpc.aio`` would (grpc/_cython/_cygrpc/aio/server.pyx.pxi)."""
    handler = context.handler = await service.handler(path)
    if handler is None:
        context.status = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    try:
        asked = context.iterate() if handler.request_streaming else await context.read()
        if handler.response_streaming and inspect.isasyncgenfunction(inner):
            async for answer in inner(asked, context):
                await context.write(answer)
        elif handler.response_streaming:
            await inner(asked, context)
        else:
            await context.write(await inner(asked, context))
    except grpc.aio.AbortError:
        return
    except Exception as error:
        context.status = (grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")
        return
    context.status = context.status or (grpc.StatusCode.OK, "")
