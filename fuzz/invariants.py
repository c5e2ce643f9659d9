"""What must hold of the services whatever they were sent: they answer rightly, and what they count adds up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fuzz import system_files
from fuzz.calls import Way
from fuzz.targets import Where
from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.v1 import call_pb2, loader_service_pb2, stats_service_pb2
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub

_SYSTEM = "after-the-storm"
_SECONDS = 60


async def broken(ways: dict[Where, Way]) -> list[str]:
    """Return a sentence for each thing that does not hold."""
    stats = StatsServiceStub(ways["stats"].channel)
    return [
        *await _answers_wrongly(stats, LoaderServiceStub(ways["loader"].channel)),
        *[
            sentence
            async for system in _systems(stats)
            async for sentence in _miscounted(stats, system)
            if system != system_files.SYSTEM
        ],
    ]


async def _answers_wrongly(stats: Any, loader: Any) -> list[str]:
    """Do what users do, on a system of its own; return what came out otherwise than it must."""
    sentences: list[str] = []

    def expect(what: str, found: object, wanted: object) -> None:
        if found != wanted:
            sentences.append(f"{what} is {found!r} instead of {wanted!r}")

    await stats.CreateSystem(
        stats_service_pb2.CreateSystemRequest(system=stats_service_pb2.System(id=_SYSTEM)), timeout=_SECONDS
    )
    load = loader_service_pb2.LoadModuleRequest(system=_SYSTEM, module="minix")
    for errno in ("", "EEXIST"):
        expect("the errno of a load", (await loader.LoadModule(load, timeout=_SECONDS)).call.errno, errno)
    unload = loader_service_pb2.UnloadModuleRequest(system=_SYSTEM, module="minix")
    for errno in ("", "ENOENT"):
        expect("the errno of an unload", (await loader.UnloadModule(unload, timeout=_SECONDS)).unload.errno, errno)
    request = stats_service_pb2.GetStatsRequest(system=_SYSTEM)
    counted = (await stats.GetStats(request, timeout=_SECONDS)).stats
    expect("calls, duplicates, unloads", (counted.calls, counted.duplicates, counted.unloads), (2, 1, 1))
    return sentences


async def _systems(stats: Any) -> AsyncIterator[str]:
    request = stats_service_pb2.ListSystemsRequest()
    while True:
        page = await stats.ListSystems(request, timeout=_SECONDS)
        for system in page.systems:
            yield system.id
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


async def _events(stats: Any, system: str) -> AsyncIterator[call_pb2.Event]:
    request = stats_service_pb2.ListEventsRequest(system=system, page_size=10_000)
    while True:
        page = await stats.ListEvents(request, timeout=_SECONDS)
        for event in page.events:
            yield event
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


async def _miscounted(stats: Any, system: str) -> AsyncIterator[str]:
    """Count a system's events anew; yield where its counters say something else."""
    counters, last = Counters(), 0
    failed: dict[str, FailedModule] = {}
    async for event in _events(stats, system):
        if event.event_id != last + 1:
            yield f"system {system!r}: event {event.event_id} follows event {last}"
        last = event.event_id
        if event.call.outcome == call_pb2.OUTCOME_ABANDONED:
            counters.abandoned_calls += 1
        elif event.HasField("call"):
            counters.add_calls((event.call,), failed)
        else:
            counters.unloads += 1
    told = (await stats.GetStats(stats_service_pb2.GetStatsRequest(system=system), timeout=_SECONDS)).stats
    for name in COUNTER_NAMES:
        if getattr(told, name) != getattr(counters, name):
            yield f"system {system!r}: {name} is {getattr(told, name)}, its events say {getattr(counters, name)}"
    if told.events != last:
        yield f"system {system!r}: it has counted {told.events} events, and lists {last}"
    if (calls := sum(origin.calls for origin in told.origins)) != counters.calls:
        yield f"system {system!r}: its origins have made {calls} calls, its events {counters.calls}"
    for sentence in await _mislisted(stats, system, told.live_modules, failed):
        yield sentence


async def _mislisted(stats: Any, system: str, live: int, failed: dict[str, FailedModule]) -> list[str]:
    listed = [
        module async for module in _pages(stats.ListLoadedModules, stats_service_pb2.ListLoadedModulesRequest, system)
    ]
    found = sum(module.state == stats_service_pb2.LoadedModule.STATE_LIVE for module in listed)
    sentences = []
    if found != live:
        sentences.append(f"system {system!r}: {live} modules are live, {found} are listed so")
    names = {
        module.module: module.count
        async for module in _pages(stats.ListFailedModules, stats_service_pb2.ListFailedModulesRequest, system)
    }
    wanted = {name: entry.count for name, entry in failed.items()}
    if names != wanted:
        sentences.append(f"system {system!r}: the failed modules are {_first(names)}, its events say {_first(wanted)}")
    return sentences


def _first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items())[:5])


async def _pages(list_page: Any, request_type: Any, system: str) -> AsyncIterator[Any]:
    request = request_type(system=system, page_size=10_000)
    while True:
        page = await list_page(request, timeout=_SECONDS)
        for entry in page.modules:
            yield entry
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
