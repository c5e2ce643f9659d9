"""Requests that are no messages, or would be too much of one: answered as the caller's mistake.

By itself grpc.aio ends an RPC whose request can't be parsed with UNKNOWN and the text of a Python exception, and logs a
traceback. INVALID_ARGUMENT says what the client has to know. It parses whatever can be, how much memory that may take.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from modpressure.errors import BadRequest, ModpressureError, OverLimit
from modpressure.grpc_errors import abort_with, translate_errors
from modpressure.handlers import rebuilt
from modpressure.limits import PARSED_FACTOR
from modpressure.parsed_size import NotWire, shape_of


class Malformed:
    """What stands for a request that was not parsed: it is not the message that its method takes, or too much of it."""

    __slots__ = ("length_bytes", "parsed_limit_bytes")

    def __init__(self, length_bytes: int, parsed_limit_bytes: int = 0) -> None:
        """``parsed_limit_bytes`` is what it exceeds, 0 if it is no message."""
        self.length_bytes = length_bytes
        self.parsed_limit_bytes = parsed_limit_bytes

    def error(self, method: str) -> ModpressureError:
        """Return what the caller is told: OverLimit or BadRequest."""
        what = f"what was sent to {method}, {self.length_bytes} bytes,"
        if self.parsed_limit_bytes:
            return OverLimit(
                f"{what} has so many parts that it would take more than {self.parsed_limit_bytes} bytes of memory,"
                f" {PARSED_FACTOR} times the message_limit"
            )
        return BadRequest(f"{what} is not the message that it takes")


class ParsingServer:
    """A grpc.aio server, as ``add_..._to_server`` functions see it, whose methods refuse what can't be parsed.

    Their handlers are wrapped once, when they are added: an interceptor would be one more step of every call. Between
    the wrapped handler and grpc, where interceptors are, a request may be ``Malformed``.
    """

    def __init__(self, server: Any, parsed_limit_bytes: int) -> None:
        """Refuse, too, what would take more than ``parsed_limit_bytes`` of memory."""
        self._server = server
        self._parsed_limit_bytes = parsed_limit_bytes

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Add nothing: generated code brings the same handlers by ``add_registered_method_handlers``, with names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the handlers of one service, by the names of its methods."""
        short_name = service.rpartition(".")[2]
        refusing = {
            method: _refusing(handler, f"{short_name}/{method}", self._parsed_limit_bytes)
            for method, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, refusing),))
        self._server.add_registered_method_handlers(service, refusing)


def _parsing(deserialize: Callable[[bytes], Any], parsed_limit_bytes: int) -> Callable[[bytes], Any]:
    shape = shape_of(deserialize(b"").DESCRIPTOR)
    shortest_bytes = shape.shortest_with(parsed_limit_bytes)

    def parse(request: bytes) -> Any:
        try:
            # Most are far too short to be too much.
            if len(request) > shortest_bytes and shape.parsed_bytes(request, parsed_limit_bytes) > parsed_limit_bytes:
                return Malformed(len(request), parsed_limit_bytes)
            return deserialize(request)
        except (DecodeError, NotWire):
            return Malformed(len(request))

    return parse


def _refusing(handler: Any, name: str, parsed_limit_bytes: int) -> Any:
    """Return a handler like ``handler`` that refuses what can't be parsed, and what would take too much.

    grpc.aio tells coroutines and asynchronous generators apart, so the one stays the one and the other the other.
    """
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    generates = inspect.isasyncgenfunction(inner)

    async def parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if type(request) is Malformed:
                raise request.error(name)
            yield request

    async def one(request: Any, context: Any) -> Any:
        if type(request) is Malformed:
            await abort_with(context, name, request.error(name))
        return await inner(request, context)

    async def one_generating(request: Any, context: Any) -> AsyncIterator[Any]:
        if type(request) is Malformed:
            await abort_with(context, name, request.error(name))
        async with contextlib.aclosing(inner(request, context)) as responses:
            async for response in responses:
                yield response

    async def many(requests: AsyncIterator[Any], context: Any) -> Any:
        async with translate_errors(context, name):
            return await inner(parsed(requests), context)

    async def many_generating(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async with translate_errors(context, name), contextlib.aclosing(inner(parsed(requests), context)) as responses:
            async for response in responses:
                yield response

    behaviors = {(False, False): one, (False, True): one_generating, (True, False): many, (True, True): many_generating}
    behavior = behaviors[handler.request_streaming, generates]
    return rebuilt(handler, behavior, _parsing(handler.request_deserializer, parsed_limit_bytes))
