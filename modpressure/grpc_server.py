"""Starting and stopping a gRPC server the same way in every service."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from modpressure.access import Door
from modpressure.admission import Admission, ClientOf
from modpressure.connections import LOOK_SECONDS, Connections
from modpressure.errors import BadRequest, ModpressureError, Unavailable
from modpressure.grpc_errors import IN_FLIGHT, InFlight, translate_errors
from modpressure.limits import DEFAULT_LIMITS, Limits
from modpressure.malformed import ParsingServer
from modpressure.tls import ServerTls
from modpressure.tokens import TokenFile

HEALTH_SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_CUT_OFF_SECONDS: Final = 0.5
"""Of the end of a grace, at most: how long RPCs have to tell their clients that they are cut off."""

_HEALTH_UPDATE_SECONDS: Final = 1.0
"""Longest wait for watchers of the health that do not read."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    # Without this a second server on the same port would silently take half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Who has no call in progress may ping, too, as often as the limits say.
    ("grpc.keepalive_permit_without_calls", 1),
)

_log = structlog.get_logger(__name__)


class CannotListen(ModpressureError):
    """The address can't be listened on."""


class _Health(health.aio.HealthServicer):
    """Health whose watchers do not hold up the stop: they would keep it waiting for the whole grace.

    With List, which the one that this is made from has not learnt yet.
    """

    def __init__(self, stopping: asyncio.Event) -> None:
        super().__init__()
        self._stopping = stopping

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802, RUF100
        """List the health of all services."""
        of = health_pb2.HealthCheckResponse
        statuses = {service: of(status=status) for service, status in self._server_status.items()}  # type: ignore[attr-defined]
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802, RUF100
        """Stream the health of a service until the client goes or the server stops."""
        async with translate_errors(context, "Health.Watch"):
            watch = asyncio.ensure_future(super().Watch(request, context))
            stop = asyncio.ensure_future(self._stopping.wait())
            try:
                await asyncio.wait({watch, stop}, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    await watch
            finally:
                for task in (watch, stop):
                    task.cancel()
                await asyncio.gather(watch, stop, return_exceptions=True)
            raise Unavailable("the server is stopping")


def split_address(listen: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[v6]:port``; BadRequest names an address that is neither."""
    host, colon, port_text = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise BadRequest(f"{listen!r} is not an address to listen on; give host:port or unix:/path", field="listen")
    if not port_text.isascii() or not port_text.isdigit() or int(port_text) > 65535:
        raise BadRequest(f"{port_text!r} in {listen!r} is not a port, 0 to 65535", field="listen")
    return (host[1:-1] if bracketed else host), int(port_text)


def _try_address(listen: str) -> None:
    """Bind ``listen`` and let go of it again, because the system's reason is clearer than grpc's."""
    try:
        if listen.startswith("unix:"):
            _try_socket_file(listen.removeprefix("unix:"))
            return
        host, port = split_address(listen)
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As grpc does: a port that only old connections linger on is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CannotListen(f"can't listen on {listen}: {reason}", field="listen") from error


def _try_socket_file(path: str) -> None:
    """Raise OSError if something answers on the socket at ``path``: grpc would take the file over without a word."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return
        raise OSError(98, "address already in use")


class GrpcServer:
    """A gRPC server with health and reflection, that stops gracefully.

    ``listen`` is ``host:port`` (port 0: any free one) or ``unix:/path``; ``grace_seconds`` is how long RPCs in flight
    may still take after a stop was asked for. Without ``tls`` nothing is encrypted,
    without ``tokens`` everybody may do everything, within the ``limits`` that each client has. ``client_of`` tells from
    metadata whose request somebody hands on; empty if it is the sender's own, or nobody to be believed.
    """

    def __init__(
        self,
        listen: str,
        *,
        tls: ServerTls | None = None,
        tokens: TokenFile | None = None,
        reflection: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        client_of: ClientOf | None = None,
        grace_seconds: float,
    ) -> None:
        self._listen = listen
        self._limits = limits
        self._interceptors: list[grpc.aio.ServerInterceptor] = [
            Admission(limits, client_of),
            *([Door(tokens)] if tokens else []),
        ]
        self._tls = tls
        self._reflection = reflection
        self._grace_seconds = grace_seconds
        self._server: Any = None
        self._servicers: list[tuple[Any, Callable[[Any, Any], None], str]] = []
        self._serving: dict[str, bool] = {}
        self._stop_steps: list[Callable[[], Awaitable[object]]] = []
        self._in_flight = InFlight()
        self.stopping = asyncio.Event()
        """Set when the stop begins. A stream without an end of its own watches this and ends."""
        self._health = _Health(self.stopping)
        self._looking: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def add(self, servicer: Any, add_to_server: Callable[[Any, Any], None], service: str) -> None:
        """Serve ``servicer``, by the generated ``add_..._to_server`` and the service's full name.

        Before ``start``. Its health begins as SERVING.
        """
        self._servicers.append((servicer, add_to_server, service))
        self._serving[service] = True

    def intercept(self, interceptor: grpc.aio.ServerInterceptor) -> None:
        """Have requests that were let in go through ``interceptor``. Before ``start``."""
        self._interceptors.append(interceptor)

    def on_stop(self, step: Callable[[], Awaitable[object]]) -> None:
        """Have ``step`` awaited during the stop, after the health says so; RPCs have what it leaves of the grace."""
        self._stop_steps.append(step)

    async def start(self) -> str:
        """Bind and serve; return the address with the actual port. From then on signals ask for a graceful stop.

        BadRequest if ``listen`` is not an address, CannotListen if it can't be had, BadCredentials of TLS.
        """
        credentials = self._tls.credentials() if self._tls else None
        _try_address(self._listen)
        self._server = grpc.aio.server(
            interceptors=self._interceptors, options=(*_OPTIONS, *self._limits.channel_arguments())
        )
        parsing: Any = ParsingServer(self._server, self._limits.parsed_bytes)
        for servicer, add_to_server, _ in self._servicers:
            add_to_server(servicer, parsing)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, parsing)
        if self._reflection:
            names = (*self._serving, HEALTH_SERVICE, reflection.SERVICE_NAME)
            # What enable_server_reflection does, which would take this for a server that is not asyncio's.
            servicer = reflection.aio.ReflectionServicer(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, parsing)  # type: ignore[no-untyped-call]
        try:
            if credentials is None:
                port = self._server.add_insecure_port(self._listen)
            else:
                port = self._server.add_secure_port(self._listen, credentials)
        except RuntimeError as error:
            raise CannotListen(f"can't listen on {self._listen}: it can't be bound", field="listen") from error
        for service in list(self._serving):
            await self.set_serving(service, self._serving[service])
        # Whatever handles an RPC is started from here, and has what is set here.
        token = IN_FLIGHT.set(self._in_flight)
        try:
            await self._server.start()
        finally:
            IN_FLIGHT.reset(token)
        # Whoever reads the address may send a signal before anything else has run here.
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number.name)
        if self._listen.startswith("unix:"):
            return self._listen
        self._looking = asyncio.create_task(self._look_for_crowds(Connections(port, self._limits.host_connections)))
        return f"{self._listen.rpartition(':')[0]}:{port}"

    async def _look_for_crowds(self, connections: Connections) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(connections.hang_up_on_crowds)

    async def set_serving(self, service: str, serving: bool) -> None:
        """Say whether ``service`` can do its work; the server as a whole is well if all of them are."""
        self._serving[service] = serving
        overall = all(self._serving.values())
        for name, well in ((service, serving), ("", overall)):
            status = health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_UPDATE_SECONDS):
                    await self._health.set(name, status)

    async def serve_until_stopped(self, drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until SIGINT, SIGTERM or ``stop``; return when all is down.

        A second signal cuts the grace short, and cancelling this gives none. ``drain`` ends what RPCs have begun and
        left; it gets what is left of the grace after them.
        """
        try:
            await _first(self._asked.wait(), self.stopping.wait())
            await _first(self._stop_and_drain(drain), self._stop_at_once())
            await self._server.wait_for_termination()
        except asyncio.CancelledError:
            await self._end(0)
            raise
        finally:
            self._let_go()

    async def _stop_and_drain(self, drain: Callable[[], Awaitable[None]] | None) -> None:
        due = asyncio.get_running_loop().time() + self._grace_seconds
        await self._stop(self._grace_seconds)
        if drain is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await drain()

    def _on_signal(self, name: str) -> None:
        (self._hurry if self._asked.is_set() else self._asked).set()
        _log.info("stopping at once" if self._hurry.is_set() else "stopping", signal=name)

    async def _stop_at_once(self) -> None:
        await self._hurry.wait()
        await self._end(0)

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Stop: health first, then the steps of ``on_stop``, then the RPCs in flight, given their grace."""
        await self._stop(self._grace_seconds if grace_seconds is None else grace_seconds)
        self._let_go()

    async def _stop(self, grace_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + grace_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_UPDATE_SECONDS):
                await self._health.enter_graceful_shutdown()
        self.stopping.set()
        for step in self._stop_steps:
            await step()
        await self._end(max(0, due - loop.time()))

    async def _end(self, grace_seconds: float) -> None:
        """Let RPCs end within a grace, cut off those that do not, and close all connections."""
        cut_off_seconds = min(_CUT_OFF_SECONDS, grace_seconds / 10)
        stop = asyncio.ensure_future(self._server.stop(max(grace_seconds, _CUT_OFF_SECONDS)))
        try:
            await asyncio.wait({stop}, timeout=grace_seconds - cut_off_seconds)
            self._in_flight.cut_off()
            await asyncio.shield(stop)
        except asyncio.CancelledError:
            stop.cancel()
            raise

    def _let_go(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


async def _first(*awaitables: Any) -> None:
    """Wait for the first to end, and cancel the others; what it raised is raised."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
