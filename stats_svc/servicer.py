"""StatsService: reading what was counted, and the life of systems. Converts, asks, maps errors; no rules here.

What is read is what is committed: it comes from the store, not from the ledger's state, which may be ahead of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final, TypeVar

from modpressure.errors import BadRequest, ModpressureError, NotFound, OverLimit, Unavailable
from modpressure.fair import FairThreads
from modpressure.grpc_errors import translate_errors
from modpressure.kernel.report import report
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.stats_service_pb2_grpc import StatsServiceServicer
from stats_svc import convert
from stats_svc.events import EventFilter, EventLog
from stats_svc.exports import STALLED_SECONDS, Exports
from stats_svc.ledger import Ledger
from stats_svc.names import check_system_id
from stats_svc.paging import number_position, page_size, page_token, token_position
from stats_svc.rows import StoreError, SystemRow
from stats_svc.store import SqlStore
from stats_svc.system_file import FileRows, Reader
from stats_svc.systems import DEFAULT_SYSTEM

T = TypeVar("T")

DEFAULT_WATCH_SECONDS: Final = 1.0
MIN_WATCH_SECONDS: Final = 0.05
MAX_WATCH_SECONDS: Final = 24 * 3600.0

CHUNK_BYTES: Final = 1 << 18
"""Bytes of a file in one message."""

_READERS: Final = 4


class StatsServicer(StatsServiceServicer):
    """Serves ``modpressure.v1.StatsService``."""

    def __init__(self, store: SqlStore, ledger: Ledger, stopping: asyncio.Event, *, import_limit_bytes: int) -> None:
        """Serve from ``store`` and ``ledger``; streams end when ``stopping`` is set.

        ``import_limit_bytes`` is the length of the longest file that is made a system.
        """
        self._import_limit_bytes = import_limit_bytes
        self._store = store
        self._events = EventLog(store)
        self._ledger = ledger
        self._stopping = stopping
        self._readers = FairThreads(_READERS, "reader")
        self._exports = Exports(self._read)

    async def _read(self, query: Callable[[], T]) -> T:
        try:
            return await self._readers.run(query)
        except StoreError as error:
            raise Unavailable(f"the database is away: {error.sentence}") from error

    async def _system(self, system: str) -> SystemRow:
        row = await self._read(lambda: self._store.system(system))
        if row is None:
            raise NotFound(f"there is no system {system!r}", field="system")
        return row

    def _system_message(self, row: SystemRow) -> pb.System:
        return convert.system_to_proto(row, self._ledger.memory_taken(row.id))

    async def _stats(self, system: str) -> pb.Stats:
        found = await self._read(lambda: self._store.stats(system))
        if found is None:
            raise NotFound(f"there is no system {system!r}", field="system")
        row, requesters = found
        ledger = self._ledger
        return convert.stats_to_proto(
            row,
            requesters,
            held_bytes=ledger.held_bytes,
            peak_held_bytes=ledger.peak_held_bytes(system),
            loaders=ledger.loaders,
            waiting_calls=ledger.waiting_calls(system),
            module_requests=ledger.module_requests(system),
        )

    async def GetReport(self, request: pb.GetReportRequest, context: Any) -> pb.GetReportResponse:
        """Get the debugfs-format report of a system as text."""
        async with translate_errors(context, "Stats.GetReport"):
            system = _system_id(request.system)
            report_format = convert.report_format_from_proto(request.format)
            found = await self._read(lambda: self._store.report(system))
            if found is None:
                raise NotFound(f"there is no system {system!r}", field="system")
            row, failed = found
            modules = [entry.module for entry in failed]
            text = report(report_format, row.counters, modules, kernel_buffer=request.kernel_buffer)
        return pb.GetReportResponse(text=text)

    async def GetStats(self, request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:
        """Get the counters of a system."""
        async with translate_errors(context, "Stats.GetStats"):
            stats = await self._stats(_system_id(request.system))
        return pb.GetStatsResponse(stats=stats)

    async def WatchStats(self, request: pb.WatchStatsRequest, context: Any) -> AsyncIterator[pb.WatchStatsResponse]:
        """Stream the counters of a system, at once and after changes; changes within the interval come together."""
        async with translate_errors(context, "Stats.WatchStats"):
            system = _system_id(request.system)
            interval_seconds = _interval_seconds(request)
            loop = asyncio.get_running_loop()
            stopping = asyncio.ensure_future(self._stopping.wait())
            told: pb.Stats | None = None
            try:
                with self._ledger.watch(system) as changed:
                    while True:
                        changed.clear()
                        due = loop.time() + interval_seconds
                        stats = await self._stats(system)
                        # What is committed can be read a moment before it is told of.
                        if stats != told:
                            yield pb.WatchStatsResponse(stats=stats)
                            told = stats
                        change = asyncio.ensure_future(changed.wait())
                        try:
                            await asyncio.wait({change, stopping}, return_when=asyncio.FIRST_COMPLETED)
                            await asyncio.wait({stopping}, timeout=max(0.0, due - loop.time()))
                        finally:
                            change.cancel()
                        if stopping.done():
                            raise Unavailable("stats_svc is stopping")
            finally:
                stopping.cancel()

    async def ListFailedModules(
        self, request: pb.ListFailedModulesRequest, context: Any
    ) -> pb.ListFailedModulesResponse:
        """List the modules that failed as duplicates, newest name first."""
        async with translate_errors(context, "Stats.ListFailedModules"):
            system = _system_id(request.system)
            size = page_size(request.page_size)
            before = number_position(request.page_token, "failed", system) or None
            await self._system(system)
            rows = await self._read(lambda: self._store.failed_modules(system, before_position=before, limit=size + 1))
        response = pb.ListFailedModulesResponse(
            modules=[convert.failed_module_to_proto(row.module) for row in rows[:size]]
        )
        if len(rows) > size:
            response.next_page_token = page_token(rows[size - 1].position, "failed", system)
        return response

    async def ListLoadedModules(
        self, request: pb.ListLoadedModulesRequest, context: Any
    ) -> pb.ListLoadedModulesResponse:
        """List what is loaded or being loaded, newest first."""
        async with translate_errors(context, "Stats.ListLoadedModules"):
            system = _system_id(request.system)
            size = page_size(request.page_size)
            before = number_position(request.page_token, "loaded", system) or None
            await self._system(system)
            rows = await self._read(lambda: self._store.modules(system, before_position=before, limit=size + 1))
            names = [row.name for row in rows[:size]]
            users = await self._read(lambda: self._store.users(system, names))
        response = pb.ListLoadedModulesResponse(
            modules=[convert.loaded_module_to_proto(row, users.get(row.name, [])) for row in rows[:size]]
        )
        if len(rows) > size:
            response.next_page_token = page_token(rows[size - 1].position, "loaded", system)
        return response

    async def ListEvents(self, request: pb.ListEventsRequest, context: Any) -> pb.ListEventsResponse:
        """List events, oldest or newest first."""
        async with translate_errors(context, "Stats.ListEvents"):
            system = _system_id(request.system)
            size = page_size(request.page_size)
            after = request.after_event_id
            if after < 0:
                raise BadRequest(f"after_event_id {after} is negative", field="after_event_id")
            outcomes = convert.outcomes_from_proto(list(request.outcomes))
            wanted = EventFilter(request.module, outcomes)
            newest = request.descending
            asked = ("events", system, newest, request.module, sorted(outcomes), after)
            position = number_position(request.page_token, *asked)
            await self._system(system)
            page = await self._read(
                lambda: self._events.page(
                    system,
                    wanted,
                    limit=size,
                    newest=newest,
                    after_event_id=after if newest else max(after, position),
                    before_event_id=position if newest else 0,
                )
            )
            oldest = await self._read(lambda: self._store.oldest_event_id(system))
        response = pb.ListEventsResponse(events=page.events, oldest_event_id=oldest)
        if page.last_event_id:
            response.next_page_token = page_token(page.last_event_id, *asked)
        return response

    async def CreateSystem(self, request: pb.CreateSystemRequest, context: Any) -> pb.CreateSystemResponse:
        """Create a system."""
        async with translate_errors(context, "Stats.CreateSystem"):
            policy = convert.policy_from_proto(request.system.policy)
            limits = convert.limits_from_proto(request.system)
            row = await self._ledger.create_system(request.system.id, policy, limits)
        return pb.CreateSystemResponse(system=convert.system_to_proto(row, convert.NOTHING_TAKEN))

    async def GetSystem(self, request: pb.GetSystemRequest, context: Any) -> pb.GetSystemResponse:
        """Get one system."""
        async with translate_errors(context, "Stats.GetSystem"):
            row = await self._system(_system_id(request.system))
        return pb.GetSystemResponse(system=self._system_message(row))

    async def ListSystems(self, request: pb.ListSystemsRequest, context: Any) -> pb.ListSystemsResponse:
        """List systems, by id."""
        async with translate_errors(context, "Stats.ListSystems"):
            size = page_size(request.page_size)
            after = token_position(request.page_token, "systems")
            rows = await self._read(lambda: self._store.systems(after_id=after, limit=size + 1))
        response = pb.ListSystemsResponse(systems=[self._system_message(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = page_token(rows[size - 1].id, "systems")
        return response

    async def ResetSystem(self, request: pb.ResetSystemRequest, context: Any) -> pb.ResetSystemResponse:
        """Reset a system as a reboot would."""
        async with translate_errors(context, "Stats.ResetSystem"):
            row = await self._ledger.reset_system(_system_id(request.system))
        return pb.ResetSystemResponse(system=convert.system_to_proto(row, convert.NOTHING_TAKEN))

    async def DeleteSystem(self, request: pb.DeleteSystemRequest, context: Any) -> pb.DeleteSystemResponse:
        """Delete a system and all that was counted for it."""
        async with translate_errors(context, "Stats.DeleteSystem"):
            if not request.system:
                raise BadRequest("which system is to be deleted must be said", field="system")
            await self._ledger.delete_system(request.system)
        return pb.DeleteSystemResponse()

    async def ExportSystem(
        self, request: pb.ExportSystemRequest, context: Any
    ) -> AsyncIterator[pb.ExportSystemResponse]:
        """Stream a system as one file."""
        async with translate_errors(context, "Stats.ExportSystem"):
            system = _system_id(request.system)
            found = False
            chunks = self._exports.chunks(lambda: self._store.export_system(system))
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    found = True
                    for start in range(0, len(chunk), CHUNK_BYTES):
                        yield pb.ExportSystemResponse(chunk=chunk[start : start + CHUNK_BYTES])
            if not found:
                raise NotFound(f"there is no system {system!r}", field="system")

    async def ImportSystem(
        self, request_iterator: AsyncIterator[pb.ImportSystemRequest], context: Any
    ) -> pb.ImportSystemResponse:
        """Make a system of a file."""
        async with translate_errors(context, "Stats.ImportSystem"):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("kind") != "header":
                raise BadRequest("the first message must be a header", field="header")
            if not first.header.system:
                raise BadRequest("which system it is to be must be said", field="system")
            rows = self._rows_of(request_iterator)
            try:
                async with contextlib.aclosing(rows):
                    row = await self._ledger.import_system(rows, first.header.system, replace=first.header.replace)
            except ModpressureError:
                await self._read_off(request_iterator)
                raise
        return pb.ImportSystemResponse(system=self._system_message(row))

    async def _read_off(self, requests: AsyncIterator[pb.ImportSystemRequest]) -> None:
        """Read the rest of a file that is refused, if it is not too long.

        A client of grpc.aio that writes when its call has ended is told INTERNAL instead of why it has.
        """
        left_bytes = self._import_limit_bytes
        with contextlib.suppress(TimeoutError):
            while left_bytes > 0:
                async with asyncio.timeout(STALLED_SECONDS):
                    request = await anext(requests, None)
                if request is None:
                    return
                left_bytes -= len(request.chunk)

    async def _rows_of(self, requests: AsyncIterator[pb.ImportSystemRequest]) -> AsyncGenerator[list[FileRows], None]:
        """Yield the rows of the file that requests bring, some for each. OverLimit if none comes for long."""
        reader = Reader(self._import_limit_bytes)
        while True:
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    request = await anext(requests, None)
            except TimeoutError:
                raise OverLimit(f"no more of the file came for {STALLED_SECONDS:g} s") from None
            if request is None:
                break
            if request.WhichOneof("kind") != "chunk":
                raise BadRequest("after the header comes the file", field="chunk")
            yield await self._read(functools.partial(reader.feed, request.chunk))
        yield await self._read(reader.end)


def _system_id(asked: str) -> str:
    return check_system_id(asked) if asked else DEFAULT_SYSTEM


def _interval_seconds(request: pb.WatchStatsRequest) -> float:
    if not request.HasField("interval"):
        return DEFAULT_WATCH_SECONDS
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if seconds < 0:
        raise BadRequest(f"interval {seconds:g} s is negative", field="interval")
    return min(max(seconds, MIN_WATCH_SECONDS), MAX_WATCH_SECONDS)
