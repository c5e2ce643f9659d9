"""An asynchronous client of both services.

    async with Client(loaders=["127.0.0.1:50051"], stats="127.0.0.1:50050") as client:
        answer = await client.load("xfs")
        print(await client.report())

Methods take Python values and return messages of ``modpressure.v1``. What a service refuses is raised as the class of
``modpressure.errors`` that it refused with, with its sentence; ``modpressure.client_errors`` has the rest.
A load that fails as the kernel would fail it is no error: its ``call.errno`` says so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from modpressure.client_errors import rpc_errors
from modpressure.errors import BadRequest
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
    UnloadModuleRequest,
    UnloadModuleResponse,
)
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2 import (
    CreateSystemRequest,
    DeleteSystemRequest,
    FailedModule,
    GetReportRequest,
    GetStatsRequest,
    GetSystemRequest,
    ListEventsRequest,
    ListFailedModulesRequest,
    ListLoadedModulesRequest,
    ListSystemsRequest,
    LoadedModule,
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

_READS: Final = {
    "modpressure.v1.LoaderService": ("ListModules", "GetModule"),
    "modpressure.v1.StatsService": (
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
"""What may be asked twice: a read. A load that was not answered may have been carried out."""

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

_OPTIONS: Final = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # How long an answer may be is the server's business.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


def open_channel(address: str) -> Any:
    """Return a channel to ``address`` (HOST:PORT, dns:///HOST:PORT, unix:PATH) that retries reads alone."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


class Client:
    """Both services, as an asynchronous context manager.

    ``loaders`` are addresses of loader_svc, which unary calls go to in turn; ``stats`` is the address of stats_svc;
    ``timeout_seconds`` is for each single request, streams have none. Channels open on first use.
    """

    def __init__(
        self,
        loaders: Sequence[str] = ("127.0.0.1:50051",),
        stats: str = "127.0.0.1:50050",
        *,
        timeout_seconds: float = 60,
    ) -> None:
        if not loaders:
            raise BadRequest("a client needs the address of at least one loader", field="loaders")
        self.loaders = tuple(loaders)
        self.stats_address = stats
        self.timeout_seconds = timeout_seconds
        self._next_loader = itertools.cycle(self.loaders)
        self._channels: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all channels; calls in flight are cancelled."""
        channels = list(self._channels.values())
        self._channels.clear()
        for channel in channels:
            await channel.close()

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = open_channel(address)
        return self._channels[address]

    def loader_stub(self, address: str) -> LoaderServiceAsyncStub:
        """Return the generated stub for the loader at ``address``."""
        stub: LoaderServiceAsyncStub = LoaderServiceStub(self._channel(address))
        return stub

    def stats_stub(self) -> StatsServiceAsyncStub:
        """Return the generated stub for stats_svc."""
        stub: StatsServiceAsyncStub = StatsServiceStub(self._channel(self.stats_address))
        return stub

    async def _ask_loader(self, method: str, request: Any, loader: str | None) -> Any:
        address = loader or next(self._next_loader)
        with rpc_errors(LOADER_SVC, address, self.timeout_seconds):
            return await getattr(self.loader_stub(address), method)(request, timeout=self.timeout_seconds)

    async def _ask_stats(self, method: str, request: Any) -> Any:
        with rpc_errors(STATS_SVC, self.stats_address, self.timeout_seconds):
            return await getattr(self.stats_stub(), method)(request, timeout=self.timeout_seconds)

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
        """Load one module, what it depends on first, through ``loader`` or the next in turn."""
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

        with rpc_errors(LOADER_SVC, address):
            async for message in self.loader_stub(address).LoadModules(messages()):
                for response in message.responses:
                    yield response

    async def unload(
        self, module: str, *, system: str = "", worker: str = "", loader: str | None = None
    ) -> UnloadModuleResponse:
        """Unload one module."""
        request = UnloadModuleRequest(system=system, module=module, worker=worker)
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
        """Iterate over the counters: at once, then after each change, not more often than ``interval_seconds``."""
        interval = None
        if interval_seconds is not None:
            interval = Duration()
            interval.FromTimedelta(timedelta(seconds=interval_seconds))
        with rpc_errors(STATS_SVC, self.stats_address):
            async for response in self.stats_stub().WatchStats(WatchStatsRequest(system=system, interval=interval)):
                yield response.stats

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

    async def create_system(self, system: str, *, policy: Policy.ValueType = Policy.POLICY_UNSPECIFIED) -> System:
        """Create a system; AlreadyExists if its id is taken."""
        request = CreateSystemRequest(system=System(id=system, policy=policy))
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

    async def _pages(self, method: str, request: Any) -> AsyncIterator[Any]:
        while True:
            response = await self._ask_stats(method, request)
            yield response
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token
