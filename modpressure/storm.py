"""One storm over several loaders: their workers start together, and what they came to is put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from modpressure.addresses import expand_addresses
from modpressure.client import LOADER_SVC, Client
from modpressure.client_errors import ServerFailed, rpc_errors
from modpressure.errors import BadRequest, ModpressureError
from modpressure.v1.loader_service_pb2 import (
    RunStormRequest,
    StartStorm,
    StopStorm,
    Storm,
    StormProgress,
    StormReady,
    StormSummary,
)

MAX_WORKERS: Final = 100_000
"""Most workers of one storm."""

MAX_WORKERS_PER_LOADER: Final = 10_000
"""Most workers on one loader, by the contract."""


@dataclass(slots=True)
class StormResult:
    """What a storm came to, by the address of the loader."""

    summaries: dict[str, StormSummary] = field(default_factory=dict)
    failures: dict[str, ModpressureError] = field(default_factory=dict)
    """Loaders that were lost midway."""

    interrupted: bool = False
    """It was stopped before its workers had ended by themselves."""

    @property
    def elapsed_seconds(self) -> float:
        """Time from the start to the end of the last worker of all."""
        return max((_seconds(summary) for summary in self.summaries.values()), default=0.0)


def _seconds(summary: StormSummary) -> float:
    return summary.elapsed.seconds + summary.elapsed.nanos / 1e9


def split_workers(workers: int, addresses: Sequence[str]) -> dict[str, int]:
    """Return the number of workers for each loader, as even as can be; loaders left without one are left out.

    BadRequest names a number that is out of bounds.
    """
    if not 1 <= workers <= MAX_WORKERS:
        raise BadRequest(f"{workers} workers are not possible: 1 to {MAX_WORKERS}", field="workers")
    each, rest = divmod(workers, len(addresses))
    if each + (rest > 0) > MAX_WORKERS_PER_LOADER:
        most = MAX_WORKERS_PER_LOADER * len(addresses)
        raise BadRequest(
            f"{workers} workers are too many for {len(addresses)} loaders: {MAX_WORKERS_PER_LOADER} each, so at most"
            f" {most}",
            field="workers",
        )
    shares = {address: each + (index < rest) for index, address in enumerate(addresses)}
    return {address: share for address, share in shares.items() if share}


class StormRun:
    """A storm over all loaders of a client.

    ``storm`` says which, for all workers together: ``workers`` is split over the loaders. What the modules depend on is
    loaded through the first loader, before the others get ready. ``on_ready`` and ``on_progress`` are called as loaders
    tell; ``progress`` has the last of each.
    """

    def __init__(
        self,
        client: Client,
        storm: Storm,
        *,
        on_ready: Callable[[str, StormReady], None] = lambda address, ready: None,
        on_progress: Callable[[StormRun], None] = lambda run: None,
    ) -> None:
        self._client = client
        self._storm = storm
        self._on_ready = on_ready
        self._on_progress = on_progress
        self._calls: dict[str, Any] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        """A stream takes one message at a time."""
        self._stop_asked = asyncio.Event()
        self._started = False
        self.progress: dict[str, StormProgress] = {}
        self.ready: dict[str, StormReady] = {}

    def stop(self) -> None:
        """Ask the workers to stop after the calls that they are in."""
        self._stop_asked.set()

    async def run(self) -> StormResult:
        """Run it to its end, or until ``stop``; return what was counted.

        Raises what a loader answers before the start (an unknown module, say); a loader that is lost later is a
        failure in the result.
        """
        addresses = await expand_addresses(self._client.loaders)
        shares = split_workers(self._storm.workers, addresses)
        stopper = asyncio.create_task(self._send_stop())
        try:
            await self._get_ready(shares)
            result = StormResult(interrupted=self._stop_asked.is_set())
            if not result.interrupted:
                self._started = True
                await asyncio.gather(*(self._send(address, RunStormRequest(start=StartStorm())) for address in shares))
                await asyncio.gather(*(self._follow(address, result) for address in shares))
                result.interrupted = self._stop_asked.is_set()
                # In the order of the loaders, not of their end.
                result.summaries = {each: result.summaries[each] for each in shares if each in result.summaries}
            return result
        finally:
            stopper.cancel()
            for call in self._calls.values():
                call.cancel()

    async def _get_ready(self, shares: dict[str, int]) -> None:
        first_worker = 0
        others: list[Any] = []
        for index, (address, workers) in enumerate(shares.items()):
            storm = Storm()
            storm.CopyFrom(self._storm)
            storm.workers = workers
            storm.first_worker = self._storm.first_worker + first_worker
            storm.await_start = True
            first_worker += workers
            if index == 0:
                await self._or_stop(self._prepare(address, storm))
            else:
                storm.with_dependencies = False
                others.append(self._prepare(address, storm))
        await self._or_stop(_all(others))

    async def _or_stop(self, coroutine: Any) -> None:
        """Wait for ``coroutine``, but not when a stop is asked for first."""
        task = asyncio.ensure_future(coroutine)
        stop = asyncio.ensure_future(self._stop_asked.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            stop.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError, ModpressureError):
                await task

    async def _prepare(self, address: str, storm: Storm) -> None:
        with rpc_errors(LOADER_SVC, address):
            self._locks[address] = asyncio.Lock()
            self._calls[address] = self._client.loader_stub(address).RunStorm()
            await self._send(address, RunStormRequest(storm=storm))
            response = await self._read(address)
        if response is None or not response.HasField("ready"):
            raise ServerFailed(f"{LOADER_SVC} at {address} ended the storm before it was ready")
        self.ready[address] = response.ready
        self.progress[address] = StormProgress(active_workers=storm.workers)
        self._on_ready(address, response.ready)

    async def _follow(self, address: str, result: StormResult) -> None:
        try:
            with rpc_errors(LOADER_SVC, address):
                while (response := await self._read(address)) is not None:
                    if response.HasField("progress"):
                        self.progress[address] = response.progress
                        self._on_progress(self)
                    elif response.HasField("summary"):
                        result.summaries[address] = response.summary
                        last = StormProgress()
                        last.CopyFrom(self.progress[address])
                        last.operations, last.calls = response.summary.operations, response.summary.calls
                        last.duplicates, last.active_workers = response.summary.duplicates, 0
                        self.progress[address] = last
                        self._on_progress(self)
            if address not in result.summaries:
                raise ServerFailed(f"{LOADER_SVC} at {address} ended the storm without a summary")
        except ModpressureError as error:
            result.failures[address] = error

    async def _read(self, address: str) -> Any:
        """Return the next message, None at the end of the stream; raises the status that it ended with if not OK."""
        response = await self._calls[address].read()
        return None if response is grpc.aio.EOF else response

    async def _send(self, address: str, request: RunStormRequest) -> None:
        # A stream that has ended says why when it is read.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with self._locks[address]:
                await self._calls[address].write(request)

    async def _send_stop(self) -> None:
        await self._stop_asked.wait()
        if self._started:
            await asyncio.gather(*(self._send(address, RunStormRequest(stop=StopStorm())) for address in self._calls))


async def _all(coroutines: Sequence[Any]) -> None:
    """Wait for all; the first error cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except* ModpressureError as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
