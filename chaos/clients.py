"""Clients: each asks one thing after another of any loader, and writes down what it is answered."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Final

import grpc

from chaos.diary import PASSING, Attempt, Diary, Entry, Request, Response, StormEntry
from modpressure.client_errors import is_cut_off
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

if TYPE_CHECKING:
    from modpressure.v1.loader_service_pb2_grpc import LoaderServiceAsyncStub

MODULES: Final = ("crc16", "crc64", "failover", "irqbypass", "fat", "vfat")
"""Small ones, and few, so that clients come across each other; the last one uses the one before."""

TIMEOUTS_SECONDS: Final = (0.05, 0.3, 1.0, 3.0)
"""How long a client waits for an answer; sometimes it is in a hurry."""

STORM_TIMEOUT_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 0.05
"""Pause after a failure: whoever is refused at once would ask thousands of times."""

WITHOUT_ID: Final = 0.3
"""Share of requests without a request_id, which are never sent twice."""

ONCE_MORE: Final = 0.15
"""Share of requests that are sent once more after they were answered."""

_CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 300),
    ("grpc.max_reconnect_backoff_ms", 300),
)


class Lines:
    """The clients' ways to the loaders, which all clients share."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """``addresses`` are those of the loaders."""
        self._channels = [grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS) for address in addresses]
        self.stubs: list[LoaderServiceAsyncStub] = [LoaderServiceStub(channel) for channel in self._channels]

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()


class Client:
    """One client."""

    def __init__(
        self, name: str, system: str, lines: Lines, diary: Diary, dice: Random, storm_numbers: itertools.count[int]
    ) -> None:
        """``dice`` decide what it asks, ``storm_numbers`` what no other storm's workers are called."""
        self._name = name
        self._system = system
        self._stubs = lines.stubs
        self._diary = diary
        self._dice = dice
        self._storm_numbers = storm_numbers
        self._asked = 0
        self.stop_asking = asyncio.Event()
        """Set, it asks nothing new; what it has asked it still wants to know."""

        self.give_up = asyncio.Event()
        """Set, it does not ask once more."""

    async def live(self) -> None:
        """Ask until told to stop."""
        while not self.stop_asking.is_set():
            match self._dice.choices(("one", "kernel", "many", "storm"), (0.7, 0.1, 0.15, 0.05))[0]:
                case "one":
                    await self._ask_alone(self._write_down(self._load_or_unload()))
                case "kernel":
                    await self._ask_alone(self._write_down(self._request_of_the_kernel()))
                case "many":
                    await self._ask_together(
                        [self._write_down(self._load_or_unload()) for _ in range(self._dice.randint(2, 16))]
                    )
                case "storm":
                    await self._ask_storm()

    def _next_id(self) -> str:
        self._asked += 1
        return f"{self._name}-{self._asked}" if self._dice.random() > WITHOUT_ID else ""

    def _write_down(self, request: Request) -> Entry:
        entry = Entry(request)
        self._diary.entries.append(entry)
        return entry

    def _load_or_unload(self) -> pb.LoadModuleRequest | pb.UnloadModuleRequest:
        dice, module, request_id = self._dice, self._dice.choice(MODULES), self._next_id()
        if dice.random() < 0.4:
            return pb.UnloadModuleRequest(system=self._system, module=module, request_id=request_id)
        with_dependencies = dice.random() < 0.3
        return pb.LoadModuleRequest(
            system=self._system, module=module, with_dependencies=with_dependencies, request_id=request_id
        )

    def _request_of_the_kernel(self) -> pb.RequestModuleRequest:
        name, request_id = self._dice.choice(MODULES), self._next_id()
        return pb.RequestModuleRequest(system=self._system, name=name, requester="chaos", request_id=request_id)

    def _is_to_ask_again(self, request: Request, status: grpc.StatusCode) -> bool:
        return request.request_id != "" and status.name in PASSING and not self.give_up.is_set()

    async def _ask_alone(self, entry: Entry) -> None:
        while True:
            number = self._dice.randrange(len(self._stubs))
            timeout_seconds = self._dice.choice(TIMEOUTS_SECONDS)
            try:
                answer = await self._send(entry.request, self._stubs[number], timeout_seconds)
            except grpc.aio.AioRpcError as error:
                status, details = _status_of(error)
                entry.attempts.append(Attempt(number, status.name, details))
                await asyncio.sleep(RETRY_SECONDS)
                if not self._is_to_ask_again(entry.request, status):
                    return
                if entry.answer is not None:
                    return
            else:
                entry.attempts.append(Attempt(number, "OK"))
                if entry.answer is not None:
                    entry.other_answer = answer
                    return
                entry.answer = answer
                if not entry.request.request_id or self._dice.random() > ONCE_MORE:
                    return

    async def _send(self, request: Request, stub: LoaderServiceAsyncStub, timeout_seconds: float) -> Response:
        match request:
            case pb.LoadModuleRequest():
                return await stub.LoadModule(request, timeout=timeout_seconds)
            case pb.UnloadModuleRequest():
                return await stub.UnloadModule(request, timeout=timeout_seconds)
            case pb.RequestModuleRequest():
                return await stub.RequestModule(request, timeout=timeout_seconds)

    async def _ask_together(self, entries: list[Entry]) -> None:
        """Ask all over one stream, and those that are not answered once more, over another."""
        while entries:
            number = self._dice.randrange(len(self._stubs))
            requests = [_tagged(tag, entry.request) for tag, entry in enumerate(entries)]
            again: list[Entry] = []
            open_tags = set(range(len(entries)))
            try:
                stream = self._stubs[number].LoadModules(
                    iter([pb.LoadModulesRequest(requests=requests)]), timeout=self._dice.choice(TIMEOUTS_SECONDS)
                )
                async for message in stream:
                    for response in message.responses:
                        open_tags.discard(response.tag)
                        entry = entries[response.tag]
                        if response.HasField("error"):
                            status = _STATUSES[response.error.code]
                            entry.attempts.append(Attempt(number, status.name, response.error.message))
                            if self._is_to_ask_again(entry.request, status):
                                again.append(entry)
                            continue
                        entry.attempts.append(Attempt(number, "OK"))
                        entry.answer = response.load if response.HasField("load") else response.unload
                status, details = grpc.StatusCode.UNAVAILABLE, "the stream ended without an answer"
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                status, details = _status_of(error)
            for tag in sorted(open_tags):
                entries[tag].attempts.append(Attempt(number, status.name, details))
            again += [entries[tag] for tag in sorted(open_tags) if self._is_to_ask_again(entries[tag].request, status)]
            if open_tags:
                await asyncio.sleep(RETRY_SECONDS)
            entries = again

    async def _ask_storm(self) -> None:
        dice = self._dice
        number = dice.randrange(len(self._stubs))
        storm = pb.Storm(
            system=self._system,
            modules=[dice.choice(MODULES[:4])],
            workers=dice.randint(2, 6),
            mode=dice.choice((pb.Storm.MODE_ONCE, pb.Storm.MODE_REPEAT)),
            operations=dice.randint(1, 3),
            first_worker=100 * next(self._storm_numbers),
        )
        entry = StormEntry(storm)
        self._diary.storms.append(entry)
        try:
            stream = self._stubs[number].RunStorm(
                iter([pb.RunStormRequest(storm=storm)]), timeout=STORM_TIMEOUT_SECONDS
            )
            async for message in stream:
                if message.HasField("summary"):
                    entry.summary = message.summary
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            status, details = _status_of(error)
            entry.attempts.append(Attempt(number, status.name, details))
            await asyncio.sleep(RETRY_SECONDS)


def _status_of(error: grpc.aio.AioRpcError | asyncio.CancelledError) -> tuple[grpc.StatusCode, str]:
    """Return the status that a request ended with, and its details. CancelledError if the client was cancelled."""
    if isinstance(error, asyncio.CancelledError):
        if not is_cut_off():
            raise error
        return grpc.StatusCode.CANCELLED, "the stream was cut off"
    details = error.details() or ""
    # What gRPC itself says here where a connection breaks while a message is written (aio/call.pyx.pxi).
    if details == "Internal error from Core":
        return grpc.StatusCode.UNAVAILABLE, details
    return error.code(), details


def _tagged(tag: int, request: Request) -> pb.ModuleRequest:
    match request:
        case pb.LoadModuleRequest():
            return pb.ModuleRequest(tag=tag, load=request)
        case pb.UnloadModuleRequest():
            return pb.ModuleRequest(tag=tag, unload=request)
        case _:
            raise ValueError(f"a stream has no {type(request).__name__}")


_STATUSES: Final = {status.value[0]: status for status in grpc.StatusCode}
