"""Who may have how much: each RPC passes here before anything is done for it.

A client is the token that it shows, or without tokens the address that it comes from. Each has a rate of its own, and a
share of the RPCs that are carried out at once. What is too much is refused at once with RESOURCE_EXHAUSTED and
google.rpc.RetryInfo, before anything of it was done, so that trying it again is always safe; messages on a stream that
come too fast are read later instead, so that HTTP/2's flow control slows their sender down.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Any, Final, TypeAlias, TypeVar

import grpc
import structlog

from modpressure.deadlines import Deadlines
from modpressure.errors import BadRequest, Overloaded
from modpressure.fair import FLOW, Flow
from modpressure.grpc_errors import abort_with
from modpressure.handlers import REFUSAL
from modpressure.limits import Limits
from modpressure.log import about
from modpressure.shares import PERMIT, Permit, Rate, Shares

T = TypeVar("T")

_PROBE: Final = "/grpc.health.v1.Health/Check"
"""Never refused for want of places: who asks whether a service is well must hear it under load, too."""

TIME_HEADER: Final = "modpressure-time"
"""In the trailing metadata of its answer: seconds since the epoch by the service's clock, for modpressure doctor."""

_RETRY_SECONDS: Final = 1.0
"""When to come again for a place: nobody knows when one will be free."""

_LOGGED: Final = ("system", "request_id")
"""Fields of a request that each log line about it has."""

_MAX_LOGGED: Final = 128
_LOG_SECONDS: Final = 1.0
_FORGET_ABOVE: Final = 10_000

ClientOf: TypeAlias = Callable[[Iterable[tuple[str, Any]]], str]
"""Returns from an RPC's metadata for whom it was handed on, empty if that is nobody, or nobody to be believed."""

_log = structlog.get_logger(__name__)


@lru_cache(_FORGET_ABOVE)
def host_of(peer: str) -> str:
    """Return the host of what gRPC calls a peer: ``ipv4:192.0.2.1:4711`` is ``192.0.2.1``, a socket ``unix``."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind or "unknown"
    return address.rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")


class _Client:
    """What is known of one client."""

    __slots__ = ("last_logged", "name", "rate", "refusals")

    def __init__(self, name: str, rate: Rate | None) -> None:
        self.name = name
        self.rate = rate
        self.refusals = 0
        self.last_logged = float("-inf")


class Admission(grpc.aio.ServerInterceptor):
    """Holds each client to its rate and to its share. The first of the interceptors."""

    def __init__(
        self, limits: Limits, client_of: ClientOf | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits
        self._client_of = client_of
        self._clock = clock
        self._places = Shares(limits.rpcs)
        self._clients: dict[str, _Client] = {}
        self._numbers = itertools.count(1)
        self._wrapped: dict[str, tuple[Any, Any]] = {}
        self._coming = Deadlines(limits.request_seconds)
        """RPCs whose first message has not come."""

        self._logged_fields: dict[type, tuple[str, ...]] = {}
        """Fields of each type of request that are logged."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the method's handler, with the limits before it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known, wrapped = self._wrapped.get(method, (None, None))
        if known is not handler:
            wrapped = self._limited(handler, method)
            self._wrapped[method] = (handler, wrapped)
        return wrapped

    # --- clients ---

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            now = self._clock()
            if len(self._clients) >= _FORGET_ABOVE:
                self._forget(now)
            rate = Rate(self._limits.rate, now) if self._limits.rate else None
            client = self._clients[name] = _Client(name, rate)
        return client

    def _forget(self, now_seconds: float) -> None:
        """Forget the clients of whom nothing has to be remembered."""
        for name, client in list(self._clients.items()):
            if not self._places.held(name) and (client.rate is None or client.rate.is_full(now_seconds)):
                del self._clients[name]

    def _admit(self, method: str, client: _Client) -> None:
        """Take a place for an RPC. Overloaded if its client may not have it now."""
        if client.rate is not None and (missing_seconds := client.rate.take(self._clock())):
            raise Overloaded(
                f"{client.name} may send {self._limits.rate:g} requests a second", retry_seconds=missing_seconds
            )
        if method != _PROBE and not self._places.try_take(client.name):
            raise Overloaded(
                f"{client.name} has {self._places.held(client.name)} RPCs in progress, and the {self._places.places} "
                "places leave no more for it now",
                retry_seconds=_RETRY_SECONDS,
            )

    def _note_refusal(self, client: _Client, method: str, error: Overloaded) -> None:
        """Log it, unless that was done a moment ago: refusing must cost little."""
        client.refusals += 1
        now = self._clock()
        if now - client.last_logged >= _LOG_SECONDS:
            _log.warning("client refused", rpc=method, sentence=error.sentence, refusals=client.refusals)
            client.last_logged, client.refusals = now, 0

    async def _enter(self, method: str, context: Any, *, streams: bool) -> tuple[_Client, Permit]:
        """Let an RPC in and return whose it is, or abort it. What is let in has to release its permit."""
        name = FLOW.get().client or self._named(context)
        FLOW.set(Flow(name, next(self._numbers) if streams else 0))
        about(rpc=method, client=name)
        client = self._client(name)
        try:
            self._admit(method, client)
        except Overloaded as error:
            self._note_refusal(client, method, error)
            await abort_with(context, method, error, logged=True)
        if method == _PROBE:
            context.set_trailing_metadata(((TIME_HEADER, f"{time.time():.3f}"),))
        permit = Permit(functools.partial(self._leave, method, client))
        if (refusal := REFUSAL.get()) is not None:
            permit.release()
            await abort_with(context, method, refusal)
        PERMIT.set(permit)
        return client, permit

    def _named(self, context: Any) -> str:
        """Return the client of an RPC without a token."""
        vouched = self._client_of(context.invocation_metadata() or ()) if self._client_of else ""
        return vouched or host_of(context.peer())

    def _leave(self, method: str, client: _Client) -> None:
        if method != _PROBE:
            self._places.give(client.name)

    # --- handlers ---

    async def _request(self, method: str, context: Any) -> Any:
        """Return the request of a unary RPC, once it is there; abort the RPC if it does not come."""
        try:
            request = await self._first(context.read())
            if request is grpc.aio.EOF:
                raise BadRequest("the RPC has no request")
        except BadRequest as error:
            await abort_with(context, method, error)
        if fields := self._logged(request):
            about(**fields)
        return request

    def _logged(self, request: Any) -> dict[str, str]:
        """Return what lines that are logged for a request say of it."""
        names = self._logged_fields.get(type(request))
        if names is None:
            names = tuple(name for name in _LOGGED if isinstance(getattr(request, name, None), str))
            self._logged_fields[type(request)] = names
        return {name: value[:_MAX_LOGGED] for name in names if (value := getattr(request, name))}

    async def _paced(self, requests: AsyncIterator[Any], client: _Client) -> AsyncIterator[Any]:
        """Read the messages of a stream no faster than the rate allows. BadRequest if the first does not come."""
        messages = aiter(requests)
        request = await self._first(anext(messages, None))
        while request is not None:
            if client.rate is not None and (seconds := client.rate.take_later(self._clock())):
                await asyncio.sleep(seconds)
            yield request
            request = await anext(messages, None)

    async def _first(self, message: Awaitable[T]) -> T:
        """Return the first message of an RPC, once it is there. BadRequest if it does not come."""
        try:
            return await self._coming.wait(message)
        except TimeoutError:
            raise BadRequest(f"no request came within {self._coming.seconds:g} s") from None

    def _limited(self, handler: Any, method: str) -> Any:
        """Return a handler that is like ``handler`` within the limits.

        To gRPC each is one that takes a stream: it is then called when the RPC begins, not when its request has come.
        """
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        streams = handler.request_streaming or handler.response_streaming

        async def answered(requests: AsyncIterator[Any], context: Any) -> Any:
            client, permit = await self._enter(method, context, streams=streams)
            try:
                if handler.request_streaming:
                    return await inner(self._paced(requests, client), context)
                return await inner(await self._request(method, context), context)
            finally:
                permit.release()

        async def streamed(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            client, permit = await self._enter(method, context, streams=streams)
            try:
                if handler.request_streaming:
                    responses = inner(self._paced(requests, client), context)
                else:
                    responses = inner(await self._request(method, context), context)
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        yield response
            finally:
                permit.release()

        behavior = streamed if inspect.isasyncgenfunction(inner) else answered
        make = grpc.stream_stream_rpc_method_handler
        if not handler.response_streaming:
            make = grpc.stream_unary_rpc_method_handler
        return make(behavior, handler.request_deserializer, handler.response_serializer)
