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
from grpc_reflection.v1alpha import reflection

from modpressure.errors import BadRequest, ModpressureError

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Longest message in either direction; clients that expect long answers set the same."""

HEALTH_SERVICE: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_HEALTH_UPDATE_SECONDS: Final = 1.0
"""Longest wait for watchers of the health that do not read."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    # Without this a second server on the same port would silently take half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as every 10 s, also while they have no call.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)

_log = structlog.get_logger(__name__)


class CannotListen(ModpressureError):
    """The address can't be listened on."""


class _Health(health.aio.HealthServicer):
    """Health whose watchers do not hold up the stop: they would keep it waiting for the whole grace."""

    def __init__(self, stopping: asyncio.Event) -> None:
        super().__init__()
        self._stopping = stopping

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802, RUF100
        """Stream the health of a service until the client goes or the server stops."""
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
        if not context.done():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")


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
    may still take after a stop was asked for.
    """

    def __init__(self, listen: str, *, reflection: bool = True, grace_seconds: float) -> None:
        self._listen = listen
        self._reflection = reflection
        self._grace_seconds = grace_seconds
        self._server: Any = None
        self._servicers: list[tuple[Any, Callable[[Any, Any], None], str]] = []
        self._serving: dict[str, bool] = {}
        self._stop_steps: list[Callable[[], Awaitable[None]]] = []
        self.stopping = asyncio.Event()
        """Set when the stop begins. A stream without an end of its own watches this and ends."""
        self._health = _Health(self.stopping)
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    def add(self, servicer: Any, add_to_server: Callable[[Any, Any], None], service: str) -> None:
        """Serve ``servicer``, by the generated ``add_..._to_server`` and the service's full name.

        Before ``start``. Its health begins as SERVING.
        """
        self._servicers.append((servicer, add_to_server, service))
        self._serving[service] = True

    def on_stop(self, step: Callable[[], Awaitable[None]]) -> None:
        """Have ``step`` awaited during the stop, after the health says so and before RPCs are cut off."""
        self._stop_steps.append(step)

    async def start(self) -> str:
        """Bind and serve; return the address with the actual port. From then on signals ask for a graceful stop.

        BadRequest if ``listen`` is not an address, CannotListen if it can't be had.
        """
        _try_address(self._listen)
        self._server = grpc.aio.server(options=_OPTIONS)
        for servicer, add_to_server, _ in self._servicers:
            add_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflection:
            names = (*self._serving, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise CannotListen(f"can't listen on {self._listen}: it can't be bound", field="listen") from error
        for service in list(self._serving):
            await self.set_serving(service, self._serving[service])
        await self._server.start()
        # Whoever reads the address may send a signal before anything else has run here.
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number.name)
        if self._listen.startswith("unix:"):
            return self._listen
        return f"{self._listen.rpartition(':')[0]}:{port}"

    async def set_serving(self, service: str, serving: bool) -> None:
        """Say whether ``service`` can do its work; the server as a whole is well if all of them are."""
        self._serving[service] = serving
        overall = all(self._serving.values())
        for name, well in ((service, serving), ("", overall)):
            status = health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_UPDATE_SECONDS):
                    await self._health.set(name, status)

    async def serve_until_stopped(self) -> None:
        """Serve until SIGINT, SIGTERM or ``stop``; return when all is down. A second signal cuts the grace short."""
        await _first(self._asked.wait(), self.stopping.wait())
        await _first(self.stop(), self._stop_at_once())
        await self._server.wait_for_termination()

    def _on_signal(self, name: str) -> None:
        (self._hurry if self._asked.is_set() else self._asked).set()
        _log.info("stopping at once" if self._hurry.is_set() else "stopping", signal=name)

    async def _stop_at_once(self) -> None:
        await self._hurry.wait()
        await self._server.stop(0)

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Stop: health first, then the steps of ``on_stop``, then the RPCs in flight, given their grace."""
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_UPDATE_SECONDS):
                await self._health.enter_graceful_shutdown()
        self.stopping.set()
        for step in self._stop_steps:
            await step()
        await self._server.stop(grace)
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
