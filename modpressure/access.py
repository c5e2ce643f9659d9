"""Who may call what: tokens at a server's door."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message

from modpressure.errors import Forbidden, ModpressureError, Unauthenticated
from modpressure.fair import FLOW, Flow
from modpressure.grpc_errors import abort_with
from modpressure.handlers import REFUSAL, rebuilt
from modpressure.malformed import Malformed
from modpressure.tokens import ALL, Role, TokenFile, digest_of

AUTHORIZATION: Final = "authorization"
DEFAULT_SYSTEM: Final = "default"

_OPEN: Final = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Open to all: whether a service is well, and what it speaks."""

_ROLES: Final = {
    "/modpressure.v1.LedgerService/Connect": Role.LOAD,
    "/modpressure.v1.LoaderService/LoadModule": Role.LOAD,
    "/modpressure.v1.LoaderService/LoadModules": Role.LOAD,
    "/modpressure.v1.LoaderService/UnloadModule": Role.LOAD,
    "/modpressure.v1.LoaderService/RunStorm": Role.LOAD,
    "/modpressure.v1.LoaderService/RequestModule": Role.LOAD,
}
_READS: Final = ("Get", "List", "Watch")

_PARTED: Final = frozenset({"/modpressure.v1.LedgerService/Connect"})
"""Methods whose messages hold what many callers ask. Who carries them out looks at the systems of each part, with
``patterns``: a message that was refused for one of its parts would be sent again, or be lost to the others."""

_PASS: Final[ContextVar[_Pass]] = ContextVar("pass")
"""In the task of an RPC that is let in: the token that it shows."""


def patterns() -> tuple[str, ...]:
    """Return which systems the token of this task's RPC is for, all of them where none is asked for.

    That may change with each message of a stream of requests.
    """
    shown = _PASS.get(None)
    return (ALL,) if shown is None else shown.grant.systems


def role_of(method: str) -> Role:
    """Return the role that a method (``/package.Service/Method``) needs: admin for what is not known to need less."""
    name = method.rpartition("/")[2]
    return _ROLES.get(method) or (Role.READ if name.startswith(_READS) else Role.ADMIN)


def systems_of(message: Message) -> Collection[str]:
    """Return the systems that a request is about: each ``system`` in it, or the id of a ``System``.

    Where none is said it is the default, unless the message is within one that says for which system that is.
    """
    found: dict[str, None] = {}
    _find_systems(message, _places_of(message.DESCRIPTOR), found, is_within=False)
    return found


class _Places(NamedTuple):
    """Where messages of a type name systems. To ask descriptors for each message would take most of a batch's time."""

    is_system: bool
    has_system: bool
    repeated: tuple[tuple[str, _Places], ...]
    single: tuple[tuple[str, _Places], ...]
    """Names of fields within which there may be some, and where in these."""


@functools.cache
def _places_of(descriptor: Any) -> _Places:
    """Return where messages of a type, which does not contain itself, name systems."""
    if descriptor.name == "System":
        return _Places(True, False, (), ())
    repeated: list[tuple[str, _Places]] = []
    single: list[tuple[str, _Places]] = []
    has_system = False
    for field in descriptor.fields:
        if field.message_type is None:
            has_system |= field.name == "system"
        elif field.message_type.file.package == descriptor.file.package and any(_places_of(field.message_type)):
            # Not all versions of protobuf have ``is_repeated``.
            (repeated if field.default_value == [] else single).append((field.name, _places_of(field.message_type)))
    return _Places(False, has_system, tuple(repeated), tuple(single))


def _find_systems(message: Any, places: _Places, found: dict[str, None], *, is_within: bool) -> None:
    if places.is_system:
        found[message.id] = None
        return
    if places.has_system:
        system = message.system
        if system or not is_within:
            found[system or DEFAULT_SYSTEM] = None
        is_within = True
    for name, inner in places.repeated:
        for part in getattr(message, name):
            _find_systems(part, inner, found, is_within=is_within)
    for name, inner in places.single:
        if message.HasField(name):
            _find_systems(getattr(message, name), inner, found, is_within=is_within)


class _Pass:
    """The token of one RPC. What it allows may change, and end, while the RPC goes on."""

    __slots__ = ("_hashed", "_method", "_tokens", "grant")

    def __init__(self, tokens: TokenFile, hashed: str, method: str) -> None:
        """Look what the token of a digest allows. Unauthenticated."""
        self._tokens = tokens
        self._hashed = hashed
        self._method = method
        self.grant = tokens.grant_of(hashed)
        """What it allowed when that was last looked at."""

    def look(self, request: Message | Malformed | None) -> None:
        """Return if it allows the method and a request now. Unauthenticated, Forbidden.

        Of a stream of requests, which are looked at one by one, there is none where answers are.
        """
        self.grant = self._tokens.grant_of(self._hashed)
        self.check_method()
        if request is not None:
            self.check(request)

    def check_method(self) -> None:
        """Return if it allows the method. Forbidden."""
        self.grant.check_role(role_of(self._method))
        if self._method.endswith("/ListSystems") and not self.grant.is_for_all_systems:
            # It names all of them.
            raise Forbidden(f"token {self.grant.name!r} is not for all systems", field="system")

    def check(self, request: Message | Malformed) -> None:
        """Return if a request is for systems that it is good for. Forbidden."""
        # What is no message is refused by the handler.
        if self._method not in _PARTED and not self.grant.is_for_all_systems and not isinstance(request, Malformed):
            self.grant.check_systems(systems_of(request))


class Door(grpc.aio.ServerInterceptor):
    """Lets in only whose token allows what they ask, and only for as long as it does.

    Who is not let in at all is told so by ``Admission``, before a request is read: see ``REFUSAL``.
    """

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._guarded: dict[str, tuple[Any, Any]] = {}
        """Of each method its own handler, and the one with the checks before it."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the method's handler, with the checks before it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        authorization = next(
            (value for key, value in handler_call_details.invocation_metadata or () if key == AUTHORIZATION), ""
        )
        try:
            shown = _Pass(self._tokens, digest_of(str(authorization)), method)
            FLOW.set(Flow(f"token {shown.grant.name}"))
            shown.check_method()
            _PASS.set(shown)
        except ModpressureError as error:
            REFUSAL.set(error)
        known, guarded = self._guarded.get(method, (None, None))
        if known is not handler:
            guarded = _guard(handler, method)
            self._guarded[method] = (handler, guarded)
        return guarded


@contextlib.asynccontextmanager
async def _refusals(context: Any, method: str, shown: _Pass) -> AsyncIterator[None]:
    """Abort what goes on for longer than the token is good, or asks for more."""
    grant = shown.grant
    try:
        if grant.expires is None:
            yield
            return
        deadline = asyncio.timeout(max(grant.expires.timestamp() - time.time(), 0))
        try:
            async with deadline:
                yield
        except TimeoutError:
            if deadline.expired():
                grant.check_time(grant.expires.timestamp())
            raise
    except (Unauthenticated, Forbidden) as error:
        await abort_with(context, method, error)


async def _checked(requests: AsyncIterator[Any], shown: _Pass) -> AsyncIterator[Any]:
    async for request in requests:
        shown.look(request)
        yield request


def _guard(handler: Any, method: str) -> Any:
    """Return a handler that looks at each request's systems, and ends when the RPC's token does.

    One for all RPCs of the method: what differs is in ``_PASS``.
    """
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    def begun(request: Any, context: Any, shown: _Pass) -> Any:
        if handler.request_streaming:
            return inner(_checked(request, shown), context)
        shown.grant.check_time(time.time())
        shown.check(request)
        return inner(request, context)

    async def awaited(request: Any, context: Any) -> Any:
        shown = _PASS.get()
        async with _refusals(context, method, shown):
            return await begun(request, context, shown)

    async def streamed(request: Any, context: Any) -> AsyncIterator[Any]:
        shown = _PASS.get()
        responses: Any = None
        try:
            while True:
                async with _refusals(context, method, shown):
                    responses = responses or begun(request, context, shown)
                    try:
                        response = await anext(responses)
                    except StopAsyncIteration:
                        return
                    shown.look(None if handler.request_streaming else request)
                yield response
        finally:
            if responses is not None:
                await responses.aclose()

    # A method with a stream of answers may also write them to its context by itself, and is a coroutine then.
    return rebuilt(handler, streamed if inspect.isasyncgenfunction(inner) else awaited)
