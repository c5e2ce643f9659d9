"""An asynchronous client of both services.

    async with Client(loaders=["127.0.0.1:50051"], stats="127.0.0.1:50050") as client:
        answer = await client.load("xfs")
        print(await client.report())

Methods take Python values and return messages of ``modpressure.v1``. What a service refuses is raised as the class of
``modpressure.errors`` that it refused with, with its sentence; ``modpressure.client_errors`` has the rest.
A load that fails as the kernel would fail it is no error: its ``call.errno`` says so.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from google.protobuf.duration_pb2 import Duration

from modpressure.client_errors import TimedOut, rpc_errors
from modpressure.errors import BadRequest, Overloaded, Unavailable
from modpressure.tls import ClientTls, Follower, open_channel
from modpressure.v1.call_pb2 import Event, Origin, Outcome, Policy
from modpressure.v1.loader_service_pb2 import (
    GetModuleRequest,
    Kmod,
    ListModulesRequest,
    ListModulesResponse,
    LoadModuleRequest,
    LoadModuleResponse,
    LoadModulesRequest,
    Module,
    ModuleRequest,
    ModuleResponse,
    ModuleSummary,
    RequestModuleRequest,
    RequestModuleResponse,
    UnloadModuleRequest,
    UnloadModuleResponse,
)
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2 import (
    CreateSystemRequest,
    DeleteSystemRequest,
    ExportSystemRequest,
    FailedModule,
    GetReportRequest,
    GetStatsRequest,
    GetSystemRequest,
    ImportHeader,
    ImportSystemRequest,
    ListEventsRequest,
    ListFailedModulesRequest,
    ListLoadedModulesRequest,
    ListSystemsRequest,
    LoadedModule,
    MemoryAmounts,
    ReportFormat,
    ResetSystemRequest,
    Stats,
    System,
    WatchStatsRequest,
)
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub

if TYPE_CHECKING:
    # These exist in the stubs' .pyi alone.
    from modpressure.v1.loader_service_pb2_grpc import LoaderServiceAsyncStub
    from modpressure.v1.stats_service_pb2_grpc import StatsServiceAsyncStub

LOADER_SVC: Final = "loader_svc"
STATS_SVC: Final = "stats_svc"

CONNECT_SECONDS: Final = 2.0
"""How long a connection to one of several stats_svc may take to come about."""

SILENT_SECONDS: Final = 5.0
"""How long one of several stats_svc may take to answer a read before the next is asked."""

_STATS_SERVICE: Final = "modpressure.v1.StatsService"

_READS: Final = {
    "modpressure.v1.LoaderService": ("ListModules", "GetModule"),
    _STATS_SERVICE: (
        "GetReport",
        "GetStats",
        "WatchStats",
        "ListFailedModules",
        "ListLoadedModules",
        "ListEvents",
        "GetSystem",
        "ListSystems",
    ),
}
"""What gRPC may ask twice: a read. A load that was not answered may have been carried out."""

_SERVICE_CONFIG: Final = {
    # A name may stand for many replicas; each call goes to the next.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, methods in _READS.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_FIRST_RETRY_SECONDS: Final = 0.1
_MAX_RETRY_SECONDS: Final = 1.0

_OPTIONS: Final = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # How long an answer may be is the server's business.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class Client:
    """Both services, as an asynchronous context manager.

    ``loaders`` are addresses of loader_svc, which unary calls go to in turn; ``stats`` is the address of stats_svc,
    or those of several over one database, with commas: while one does not answer, the next is asked;
    ``timeout_seconds`` is for each single request, streams have none. Without ``tls`` nothing is encrypted;
    ``token`` is shown to both services.
    Channels open on first use; BadCredentials if the files of ``tls`` are not in order. These may be replaced at any
    time: calls that begin after that show the new certificate, those in flight go on.
    """

    def __init__(
        self,
        loaders: Sequence[str] = ("127.0.0.1:50051",),
        stats: str = "127.0.0.1:50050",
        *,
        timeout_seconds: float = 60,
        tls: ClientTls | None = None,
        token: str = "",
    ) -> None:
        if not loaders:
            raise BadRequest("a client needs the address of at least one loader", field="loaders")
        self.loaders = tuple(loaders)
        self._stats_addresses = stats.split(",")
        self.timeout_seconds = timeout_seconds
        self._tls = tls
        self._follower: Follower[Any] | None = None
        self._token = token
        self._next_loader = itertools.cycle(self.loaders)
        self._channels: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all channels; calls in flight are cancelled, but for those from before certificates were replaced."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()

    def _channel(self, address: str) -> Any:
        """Return a channel to ``address`` with the certificates that the files have now, for calls that begin now."""
        if self._tls is not None and self._follower is None:
            # Whoever uses a client has not asked it for log lines.
            self._follower = Follower(self._tls, is_logged=False)
        if self._follower is not None and self._follower.changed() is not None:
            # Each is closed with the last call that uses it.
            self._channels.clear()
        if address not in self._channels:
            credentials = self._follower.current if self._follower else None
            # Addresses are HOST:PORT, dns:///HOST:PORT or unix:PATH; reads alone are tried again.
            self._channels[address] = open_channel(address, credentials, _OPTIONS, self._token)
        return self._channels[address]

    def loader_stub(self, address: str) -> LoaderServiceAsyncStub:
        """Return the generated stub for the loader at ``address``, for calls that begin now."""
        stub: LoaderServiceAsyncStub = LoaderServiceStub(self._channel(address))
        return stub

    def stats_stub(self) -> StatsServiceAsyncStub:
        """Return the generated stub for stats_svc, for calls that begin now."""
        stub: StatsServiceAsyncStub = StatsServiceStub(self._channel(self.stats_address))
        return stub

    @property
    def stats_address(self) -> str:
        """Address of the stats_svc that is asked at present."""
        return self._stats_addresses[0]

    def _turn_to_next_stats(self) -> None:
        self._stats_addresses.append(self._stats_addresses.pop(0))

    async def _ask_loader(self, method: str, request: Any, loader: str | None) -> Any:
        """Ask ``loader`` or the next in turn; again and again until the time is up if the request has an id."""
        now = asyncio.get_running_loop().time
        due = now() + self.timeout_seconds
        delay_seconds = _FIRST_RETRY_SECONDS
        while True:
            address = loader or next(self._next_loader)
            try:
                return await self._ask(LOADER_SVC, address, method, request, due)
            except TimedOut:
                raise
            except Unavailable:
                if not getattr(request, "request_id", "") or now() + delay_seconds >= due:
                    raise
            await asyncio.sleep(delay_seconds * random.uniform(0.5, 1.0))
            delay_seconds = min(2 * delay_seconds, _MAX_RETRY_SECONDS)

    async def _ask_stats(self, method: str, request: Any) -> Any:
        is_read = method in _READS[_STATS_SERVICE]
        now = asyncio.get_running_loop().time
        due = now() + self.timeout_seconds
        for left in reversed(range(len(self._stats_addresses))):
            # What may be done once only goes to one that is there; if that one is lost, nobody else is asked.
            if left and not is_read and not await self._is_there(self.stats_address):
                self._turn_to_next_stats()
                continue
            may_turn = left > 0 and is_read
            # One that is frozen takes what is asked, and says nothing.
            until = min(due, now() + SILENT_SECONDS) if may_turn else due
            try:
                return await self._ask(STATS_SVC, self.stats_address, method, request, until)
            except TimedOut:
                if not may_turn or until >= due:
                    raise
                self._turn_to_next_stats()
            except Unavailable:
                self._turn_to_next_stats()
                if not may_turn:
                    raise
        raise AssertionError("the last is asked")

    async def _is_there(self, address: str) -> bool:
        try:
            await asyncio.wait_for(self._channel(address).channel_ready(), CONNECT_SECONDS)
        except TimeoutError:
            return False
        return True

    async def _ask(self, service: str, address: str, method: str, request: Any, due: float) -> Any:
        """Ask, and again when a server has said that it was too much and when to come back, while there is time.

        ``due`` is when that is up, by the loop's clock.
        """
        loop = asyncio.get_running_loop()
        stub_class: Any = LoaderServiceStub if service == LOADER_SVC else StatsServiceStub
        while True:
            # Anew each time: by then there may be another channel.
            stub = stub_class(self._channel(address))
            try:
                with rpc_errors(service, address, self.timeout_seconds):
                    return await getattr(stub, method)(request, timeout=max(0.0, due - loop.time()))
            except Overloaded as error:
                # Not all at the same time, or most of them would be too much again.
                pause_seconds = error.retry_seconds * random.uniform(1, 2)
                if loop.time() + pause_seconds >= due:
                    raise
                await asyncio.sleep(pause_seconds)

    async def load(
        self,
        module: str,
        *,
        system: str = "",
        parameters: str = "",
        with_dependencies: bool = True,
        policy: Policy.ValueType = Policy.POLICY_UNSPECIFIED,
        kmod: Kmod.ValueType = Kmod.KMOD_UNSPECIFIED,
        flags: int = 0,
        copy: int = 0,
        origin: Origin.ValueType = Origin.ORIGIN_UNSPECIFIED,
        requester: str = "",
        worker: str = "",
        request_id: str = "",
        refuse_when_full: bool = False,
        loader: str | None = None,
    ) -> LoadModuleResponse:
        """Load one module, what it depends on first, through ``loader`` or the next in turn.

        With a ``request_id`` it is carried out once, and asked again while a loader or stats_svc is away.
        """
        request = LoadModuleRequest(
            system=system,
            module=module,
            parameters=parameters,
            with_dependencies=with_dependencies,
            policy=policy,
            kmod=kmod,
            flags=flags,
            copy=copy,
            origin=origin,
            requester=requester,
            worker=worker,
            request_id=request_id,
            refuse_when_full=refuse_when_full,
        )
        response: LoadModuleResponse = await self._ask_loader("LoadModule", request, loader)
        return response

    async def request_module(
        self,
        name: str,
        *,
        system: str = "",
        requester: str = "",
        worker: str = "",
        request_id: str = "",
        policy: Policy.ValueType = Policy.POLICY_UNSPECIFIED,
        kmod: Kmod.ValueType = Kmod.KMOD_UNSPECIFIED,
        loader: str | None = None,
    ) -> RequestModuleResponse:
        """Ask for a module by name or alias as the kernel itself does, through ``loader`` or the next in turn.

        With a ``request_id`` as ``load``.
        """
        request = RequestModuleRequest(
            system=system,
            name=name,
            requester=requester,
            worker=worker,
            request_id=request_id,
            policy=policy,
            kmod=kmod,
        )
        response: RequestModuleResponse = await self._ask_loader("RequestModule", request, loader)
        return response

    async def load_many(
        self,
        batches: AsyncIterable[Sequence[ModuleRequest]] | Iterable[Sequence[ModuleRequest]],
        *,
        loader: str | None = None,
    ) -> AsyncIterator[ModuleResponse]:
        """Load and unload over one stream; each batch is begun together, answers come as calls end, by their tags."""
        address = loader or next(self._next_loader)

        async def messages() -> AsyncIterator[LoadModulesRequest]:
            if isinstance(batches, AsyncIterable):
                async for batch in batches:
                    yield LoadModulesRequest(requests=batch)
            else:
                for batch in batches:
                    yield LoadModulesRequest(requests=batch)

        async def all_of(first: LoadModulesRequest) -> AsyncIterator[LoadModulesRequest]:
            yield first
            async for message in rest:
                yield message

        # The stream begins with it: one whose first message is long in coming is refused.
        rest = messages()
        if (first := await anext(rest, None)) is None:
            return
        with rpc_errors(LOADER_SVC, address):
            async for message in self.loader_stub(address).LoadModules(all_of(first)):
                for response in message.responses:
                    yield response

    async def unload(
        self,
        module: str,
        *,
        system: str = "",
        worker: str = "",
        forced: bool = False,
        request_id: str = "",
        loader: str | None = None,
    ) -> UnloadModuleResponse:
        """Unload one module; ``forced`` is delete_module's O_TRUNC. With a ``request_id`` as ``load``."""
        request = UnloadModuleRequest(system=system, module=module, worker=worker, forced=forced, request_id=request_id)
        response: UnloadModuleResponse = await self._ask_loader("UnloadModule", request, loader)
        return response

    async def module(self, name: str, *, loader: str | None = None) -> Module:
        """Describe one module of a loader's tree, by name or alias."""
        response = await self._ask_loader("GetModule", GetModuleRequest(module=name), loader)
        module: Module = response.module
        return module

    async def modules_page(
        self, pattern: str = "", *, page_size: int = 0, page_token: str = "", loader: str | None = None
    ) -> ListModulesResponse:
        """Return one page of a loader's tree."""
        request = ListModulesRequest(page_size=page_size, page_token=page_token, filter=pattern)
        response: ListModulesResponse = await self._ask_loader("ListModules", request, loader)
        return response

    async def modules(self, pattern: str = "", *, loader: str | None = None) -> AsyncIterator[ModuleSummary]:
        """Iterate over the modules of one loader's tree, by name; ``pattern`` is a shell pattern."""
        address = loader or self.loaders[0]
        token = ""
        while True:
            page = await self.modules_page(pattern, page_token=token, loader=address)
            for module in page.modules:
                yield module
            if not (token := page.next_page_token):
                return

    async def report(
        self,
        system: str = "",
        *,
        report_format: ReportFormat.ValueType = ReportFormat.REPORT_FORMAT_UNSPECIFIED,
        kernel_buffer: bool = False,
    ) -> str:
        """Return the debugfs-format report."""
        request = GetReportRequest(system=system, format=report_format, kernel_buffer=kernel_buffer)
        text: str = (await self._ask_stats("GetReport", request)).text
        return text

    async def stats(self, system: str = "") -> Stats:
        """Return the counters."""
        stats: Stats = (await self._ask_stats("GetStats", GetStatsRequest(system=system))).stats
        return stats

    async def watch(self, system: str = "", *, interval_seconds: float | None = None) -> AsyncIterator[Stats]:
        """Iterate over the counters: at once, then after each change, not more often than ``interval_seconds``.

        It goes on after a lost connection or a restart of stats_svc. Unavailable if none is there at the beginning, or
        comes back within ``timeout_seconds``.
        """
        interval = None
        if interval_seconds is not None:
            interval = Duration()
            interval.FromTimedelta(timedelta(seconds=interval_seconds))
        request = WatchStatsRequest(system=system, interval=interval)
        now = asyncio.get_running_loop().time
        told: Stats | None = None
        # At first every address is tried once; who has been told something waits for what comes next.
        left = len(self._stats_addresses)
        due: float | None = None
        delay_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                with rpc_errors(STATS_SVC, self.stats_address):
                    async for response in self.stats_stub().WatchStats(request):
                        due, delay_seconds = None, _FIRST_RETRY_SECONDS
                        # After a cut it begins with how things are, which may be as they were.
                        if response.stats != told:
                            told = response.stats
                            yield told
                return
            except (Overloaded, Unavailable) as error:
                if isinstance(error, Unavailable):
                    self._turn_to_next_stats()
                    left -= 1
                    if told is None and left:
                        continue
                    if told is None:
                        raise
                due = due or now() + self.timeout_seconds
                pause_seconds = max(delay_seconds, error.retry_seconds if isinstance(error, Overloaded) else 0.0)
                if now() + pause_seconds >= due:
                    raise
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))
            delay_seconds = min(2 * delay_seconds, _MAX_RETRY_SECONDS)

    async def failed_modules(self, system: str = "") -> AsyncIterator[FailedModule]:
        """Iterate over the modules that failed as duplicates, newest name first."""
        async for response in self._pages("ListFailedModules", ListFailedModulesRequest(system=system)):
            for module in response.modules:
                yield module

    async def loaded_modules(self, system: str = "") -> AsyncIterator[LoadedModule]:
        """Iterate over the modules list, newest first."""
        async for response in self._pages("ListLoadedModules", ListLoadedModulesRequest(system=system)):
            for module in response.modules:
                yield module

    async def events(
        self,
        system: str = "",
        *,
        module: str = "",
        outcomes: Iterable[Outcome.ValueType] = (),
        after_event_id: int = 0,
        descending: bool = False,
        page_size: int = 0,
    ) -> AsyncIterator[Event]:
        """Iterate over events, oldest first, or newest first if ``descending``."""
        request = ListEventsRequest(
            system=system,
            module=module,
            outcomes=outcomes,
            after_event_id=after_event_id,
            descending=descending,
            page_size=page_size,
        )
        async for response in self._pages("ListEvents", request):
            for event in response.events:
                yield event

    async def create_system(
        self,
        system: str,
        *,
        policy: Policy.ValueType = Policy.POLICY_UNSPECIFIED,
        limits: MemoryAmounts | None = None,
    ) -> System:
        """Create a system, ``limits`` of memory where it has any; AlreadyExists if its id is taken."""
        request = CreateSystemRequest(system=System(id=system, policy=policy, limits=limits))
        created: System = (await self._ask_stats("CreateSystem", request)).system
        return created

    async def system(self, system: str = "") -> System:
        """Return one system."""
        found: System = (await self._ask_stats("GetSystem", GetSystemRequest(system=system))).system
        return found

    async def systems(self) -> AsyncIterator[System]:
        """Iterate over the systems, by id."""
        async for response in self._pages("ListSystems", ListSystemsRequest()):
            for system in response.systems:
                yield system

    async def reset_system(self, system: str = "") -> System:
        """Reset a system as a reboot would; NotNow while calls are in flight."""
        reset: System = (await self._ask_stats("ResetSystem", ResetSystemRequest(system=system))).system
        return reset

    async def delete_system(self, system: str) -> None:
        """Delete a system and all that was counted for it; NotNow while calls are in flight."""
        await self._ask_stats("DeleteSystem", DeleteSystemRequest(system=system))

    async def export_system(self, system: str = "") -> AsyncIterator[bytes]:
        """Iterate over the parts of a system's file, as it is at one point in time."""
        with rpc_errors(STATS_SVC, self.stats_address):
            async for response in self.stats_stub().ExportSystem(ExportSystemRequest(system=system)):
                yield response.chunk

    async def import_system(
        self, system: str, chunks: AsyncIterable[bytes] | Iterable[bytes], *, replace: bool = False
    ) -> System:
        """Make a system of the parts of such a file, in place of one of that id if ``replace``; it takes its time."""

        async def messages() -> AsyncIterator[ImportSystemRequest]:
            yield ImportSystemRequest(header=ImportHeader(system=system, replace=replace))
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    yield ImportSystemRequest(chunk=chunk)
            else:
                for chunk in chunks:
                    yield ImportSystemRequest(chunk=chunk)

        with rpc_errors(STATS_SVC, self.stats_address):
            imported: System = (await self.stats_stub().ImportSystem(messages())).system
        return imported

    async def _pages(self, method: str, request: Any) -> AsyncIterator[Any]:
        while True:
            response = await self._ask_stats(method, request)
            yield response
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token
