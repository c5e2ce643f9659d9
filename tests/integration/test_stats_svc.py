"""stats_svc as its users start it: a process, over a file, asked by real clients; killed, cut off and filled up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modpressure.kernel.outcome import Outcome
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch, Process

PROCEED = ledger.OperationResult.VERDICT_PROCEED
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
WAIT_SECONDS = 60


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "stats.sqlite3"


@pytest.fixture
def start(launch: Launch, database: Path) -> Callable[..., Process]:
    """Start a stats_svc over the test's own file; again at the same address if told."""

    def start_it(listen: str = "127.0.0.1:0", *arguments: str) -> Process:
        return launch("stats_svc", "--listen", listen, "--database", str(database), *arguments)

    return start_it


class Loader:
    """A loader: keeps what is unanswered, and asks it again on a new stream."""

    def __init__(self, address: str, name: str = "") -> None:
        self.name = name or f"loader-{uuid.uuid4().hex}"
        self.sequence = 0
        self.unanswered: dict[int, ledger.OperationBatch] = {}
        self.results: dict[int, ledger.OperationResult] = {}
        self.released: list[int] = []
        # A channel of its own, that comes back at once: tests kill servers.
        self._channel = grpc.aio.insecure_channel(
            address, [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100)]
        )
        self._stream: Any = None

    async def connect(self) -> int:
        """Open a stream once there is a server, and ask again; return the sequence that it is welcomed with."""
        self._stream = LedgerServiceStub(self._channel).Connect(wait_for_ready=True)
        hello = ledger.Hello(instance_id=self.name, loader=self.name)
        await self._stream.write(ledger.ConnectRequest(hello=hello))
        response = await asyncio.wait_for(self._stream.read(), WAIT_SECONDS)
        assert isinstance(response, ledger.ConnectResponse), await self._stream.details()
        for batch in self.unanswered.values():
            await self._stream.write(ledger.ConnectRequest(batch=batch))
        return response.welcome.applied_sequence

    async def tell(self, *operations: ledger.Operation, sequence: int | None = None) -> None:
        """Send operations as one batch."""
        for operation in operations:
            operation.system = operation.system or "default"
        self.sequence = sequence or self.sequence + 1
        batch = ledger.OperationBatch(sequence=self.sequence, operations=operations)
        self.unanswered[self.sequence] = batch
        await self._stream.write(ledger.ConnectRequest(batch=batch))

    async def read(self) -> None:
        """Take the next message. ConnectionError says why there is none."""
        try:
            response = await asyncio.wait_for(self._stream.read(), WAIT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(error.details()) from error
        if not isinstance(response, ledger.ConnectResponse):
            raise ConnectionError(await self._stream.details())
        self.released += response.results.released_call_ids
        for result in response.results.results:
            self.results[result.call_id] = result
            for sequence, batch in list(self.unanswered.items()):
                if any(operation.call_id == result.call_id for operation in batch.operations):
                    del self.unanswered[sequence]

    async def answer(self, call_id: int) -> ledger.OperationResult:
        """Return the next answer to a call."""
        while call_id not in self.results:
            await self.read()
        return self.results.pop(call_id)

    async def ask(self, operation: ledger.Operation) -> ledger.OperationResult:
        """Send an operation and return its answer."""
        await self.tell(operation)
        return await self.answer(operation.call_id)

    async def end(self) -> Any:
        """End the stream as a loader that stops does; return how the server saw it."""
        await self._stream.done_writing()
        while isinstance(await self._stream.read(), ledger.ConnectResponse):
            pass
        return await self._stream.code()

    async def close(self) -> None:
        """Hang up."""
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()


@asynccontextmanager
async def loaders(address: str, count: int) -> AsyncIterator[list[Loader]]:
    many = [Loader(address) for _ in range(count)]
    for loader in many:
        await loader.connect()
    yield many
    for loader in many:
        await loader.close()


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield StatsServiceStub(channel)


def reserve(call_id: int, module: str) -> ledger.Operation:
    return ledger.Operation(call_id=call_id, reserve_name=ledger.ReserveName(module=module))


def live(call_id: int, module: str) -> ledger.Operation:
    call = call_pb2.Call(
        module=module, outcome=call_pb2.OUTCOME_LIVE, syscall=call_pb2.SYSCALL_FINIT_MODULE, mod_bytes=8192,
        text_bytes=4096, image_bytes=1000,
    )  # fmt: skip
    finish = ledger.FinishCall(call=call, core_bytes=4096, reserved=True)
    return ledger.Operation(call_id=call_id, finish_call=finish)


def duplicate(call_id: int, module: str, outcome: int = Outcome.BECOMING) -> ledger.Operation:
    call = call_pb2.Call(
        module=module, outcome=call_pb2.Outcome.ValueType(outcome), syscall=call_pb2.SYSCALL_FINIT_MODULE,
        errno="EEXIST", duplicate=True, image_bytes=1000,
    )  # fmt: skip
    return ledger.Operation(call_id=call_id, finish_call=ledger.FinishCall(call=call))


async def health_of(address: str, service: str) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        health: Any = health_pb2_grpc.HealthStub(channel)
        return (await health.Check(request)).status


async def until_health(address: str, service: str, status: Any) -> None:
    """Return when the health of a service, as it is watched, is so."""
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service))
        async with asyncio.timeout(WAIT_SECONDS):
            while (await watch.read()).status != status:
                pass
        watch.cancel()


# --- reading ---


async def test_a_new_server_has_a_default_system_that_has_counted_nothing(start: Callable[..., Process]) -> None:
    address = start().address
    async with stub(address) as stats:
        assert (await stats.GetStats(pb.GetStatsRequest())).stats == pb.Stats(system="default")
        text = (await stats.GetReport(pb.GetReportRequest())).text
        assert text.startswith("           Modules loaded\t0\n")
        system = (await stats.GetSystem(pb.GetSystemRequest())).system
        assert (system.id, system.policy, system.HasField("reset_time")) == ("default", call_pb2.POLICY_V6_4, False)
        for service in ("modpressure.v1.StatsService", "modpressure.v1.LedgerService", ""):
            assert await health_of(address, service) == SERVING


async def test_what_was_counted_is_read_in_every_way(start: Callable[..., Process]) -> None:
    address = start().address
    async with loaders(address, 2) as [a, b], stub(address) as stats:
        await a.ask(reserve(1, "xfs"))
        await a.ask(live(1, "xfs"))
        await b.ask(duplicate(1, "xfs"))
        await b.ask(duplicate(2, "kvm", Outcome.LOAD))
        await b.ask(reserve(3, "nvme"))
        found = (await stats.GetStats(pb.GetStatsRequest(system="default"))).stats
        assert (found.modcount, found.calls, found.duplicates, found.events) == (1, 3, 2, 3)
        assert (found.live_modules, found.loaders, found.virtual_mem_wasted_bytes) == (1, 2, 3000)
        assert found.HasField("update_time")
        request = pb.GetReportRequest(format=pb.REPORT_FORMAT_MAINLINE)
        assert (
            "                      kvm\t              1\t                     Load\n"
            in (await stats.GetReport(request)).text
        )
        failed = (await stats.ListFailedModules(pb.ListFailedModulesRequest())).modules
        assert [(m.module, m.count, m.reason, m.wasted_bytes) for m in failed] == [
            ("kvm", 1, "Load", 2000),
            ("xfs", 1, "Becoming", 1000),
        ]
        loaded = (await stats.ListLoadedModules(pb.ListLoadedModulesRequest())).modules
        assert [(m.module, m.state, m.core_bytes, m.loader) for m in loaded] == [
            ("nvme", pb.LoadedModule.STATE_UNFORMED, 0, b.name),
            ("xfs", pb.LoadedModule.STATE_LIVE, 4096, a.name),
        ]
        events = (await stats.ListEvents(pb.ListEventsRequest(descending=True))).events
        assert [(e.event_id, e.call.module, e.call.loader) for e in events] == [
            (3, "kvm", b.name),
            (2, "xfs", b.name),
            (1, "xfs", a.name),
        ]


async def pages(rpc: Any, request: Any, field: str) -> list[list[Any]]:
    found = []
    while True:
        response = await rpc(request)
        found.append(list(getattr(response, field)))
        if not response.next_page_token:
            return found
        request.page_token = response.next_page_token


async def test_lists_come_in_pages(start: Callable[..., Process]) -> None:
    address = start().address
    names = [f"m{number}" for number in range(7)]
    async with loaders(address, 1) as [a], stub(address) as stats:
        for number, name in enumerate(names, 1):
            await a.ask(reserve(number, name))
            await a.ask(duplicate(100 + number, name))
            await stats.CreateSystem(pb.CreateSystemRequest(system=pb.System(id=f"s{number}")))
        found = await pages(stats.ListFailedModules, pb.ListFailedModulesRequest(page_size=3), "modules")
        assert [[m.module for m in page] for page in found] == [["m6", "m5", "m4"], ["m3", "m2", "m1"], ["m0"]]
        found = await pages(stats.ListLoadedModules, pb.ListLoadedModulesRequest(page_size=4), "modules")
        assert [[m.module for m in page] for page in found] == [["m6", "m5", "m4", "m3"], ["m2", "m1", "m0"]]
        found = await pages(stats.ListSystems, pb.ListSystemsRequest(page_size=5), "systems")
        assert [[s.id for s in page] for page in found] == [["default", "s1", "s2", "s3", "s4"], ["s5", "s6", "s7"]]
        for descending in (False, True):
            request = pb.ListEventsRequest(page_size=2, descending=descending, after_event_id=1)
            found = await pages(stats.ListEvents, request, "events")
            ids = [e.event_id for page in found for e in page]
            assert ids == sorted(range(2, 8), reverse=descending)
            assert all(len(page) <= 2 for page in found)
        request = pb.ListEventsRequest(module="m3", outcomes=[call_pb2.OUTCOME_BECOMING])
        assert [e.event_id for e in (await stats.ListEvents(request)).events] == [4]
        request = pb.ListEventsRequest(module="m3", outcomes=[call_pb2.OUTCOME_LIVE])
        assert list((await stats.ListEvents(request)).events) == []


@pytest.mark.parametrize(
    ("rpc", "request_message", "code", "sentence"),
    [
        ("GetStats", pb.GetStatsRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("GetReport", pb.GetReportRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("GetSystem", pb.GetSystemRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("ListEvents", pb.ListEventsRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("ListFailedModules", pb.ListFailedModulesRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("ListLoadedModules", pb.ListLoadedModulesRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("ResetSystem", pb.ResetSystemRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("DeleteSystem", pb.DeleteSystemRequest(system="nope"), "NOT_FOUND", "there is no system 'nope'"),
        ("DeleteSystem", pb.DeleteSystemRequest(), "INVALID_ARGUMENT", "which system is to be deleted must be said"),
        ("GetStats", pb.GetStatsRequest(system="../x"), "INVALID_ARGUMENT", "'../x' is no system id"),
        ("GetStats", pb.GetStatsRequest(system="a\nb"), "INVALID_ARGUMENT", r"'a\nb' is no system id"),
        ("GetStats", pb.GetStatsRequest(system="x" * 10**7), "INVALID_ARGUMENT", "(10000000 characters)"),
        ("CreateSystem", pb.CreateSystemRequest(), "INVALID_ARGUMENT", "'' is no system id"),
        ("CreateSystem", pb.CreateSystemRequest(system=pb.System(id="default")), "ALREADY_EXISTS", "'default'"),
        ("GetReport", pb.GetReportRequest(format=9), "INVALID_ARGUMENT", "no report format number 9"),  # type: ignore[arg-type]
        (
            "CreateSystem",
            pb.CreateSystemRequest(system=pb.System(id="a", policy=77)),  # type: ignore[arg-type]
            "INVALID_ARGUMENT",
            "no policy number 77",
        ),
        ("ListEvents", pb.ListEventsRequest(outcomes=[0]), "INVALID_ARGUMENT", "no outcome number 0"),  # type: ignore[list-item]
        ("ListEvents", pb.ListEventsRequest(after_event_id=-1), "INVALID_ARGUMENT", "after_event_id -1 is negative"),
        ("ListEvents", pb.ListEventsRequest(page_size=-1), "INVALID_ARGUMENT", "page_size -1 is negative"),
        ("ListEvents", pb.ListEventsRequest(page_token="x"), "INVALID_ARGUMENT", "page_token 'x' is none"),
        ("ListSystems", pb.ListSystemsRequest(page_token="Zm9v"), "INVALID_ARGUMENT", "page_token 'Zm9v' is none"),
        ("ListFailedModules", pb.ListFailedModulesRequest(page_token="ü"), "INVALID_ARGUMENT", "page_token 'ü' is"),
        ("ListLoadedModules", pb.ListLoadedModulesRequest(page_size=-5), "INVALID_ARGUMENT", "page_size -5"),
    ],
)
async def test_a_bad_request_gets_its_status_and_a_sentence_that_names_the_value(
    stats: Process, rpc: str, request_message: Any, code: str, sentence: str
) -> None:
    async with stub(stats.address) as service:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(service, rpc)(request_message)
    assert caught.value.code().name == code
    details = caught.value.details() or ""
    assert sentence in details
    assert len(details) < 300 and "\n" not in details


async def test_a_token_of_one_list_is_no_token_of_another(stats: Process, system: str) -> None:
    async with loaders(stats.address, 1) as [a], stub(stats.address) as service:
        await a.ask(ledger.Operation(call_id=1, system=system, open_system=ledger.OpenSystem()))
        for number in range(2, 5):
            operation = duplicate(number, f"m{number}")
            operation.system = system
            await a.ask(operation)
        request = pb.ListEventsRequest(system=system, page_size=1)
        token = (await service.ListEvents(request)).next_page_token
        assert token
        for other in (
            pb.ListEventsRequest(system=system, page_size=1, descending=True, page_token=token),
            pb.ListEventsRequest(system=system, module="m2", page_token=token),
            pb.ListEventsRequest(system="default", page_token=token),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.ListEvents(other)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # Another size of page is the same list.
        request = pb.ListEventsRequest(system=system, page_size=9, page_token=token)
        assert [e.event_id for e in (await service.ListEvents(request)).events] == [2, 3]


async def test_a_watch_tells_changes_together(start: Callable[..., Process]) -> None:
    address = start().address
    async with loaders(address, 1) as [a], stub(address) as stats:
        watch = stats.WatchStats(pb.WatchStatsRequest(interval=duration_pb2.Duration(nanos=50_000_000)))
        assert (await watch.read()).stats.calls == 0
        calls = 400
        for number in range(1, calls + 1):
            await a.ask(duplicate(number, "xfs"))
        told: list[int] = []
        async with asyncio.timeout(WAIT_SECONDS):
            while not told or told[-1] != calls:
                told.append((await watch.read()).stats.calls)
        assert told == sorted(set(told))
        assert len(told) < calls
        watch.cancel()
        # A system that is deleted ends its watch.
        await stats.CreateSystem(pb.CreateSystemRequest(system=pb.System(id="doomed")))
        watch = stats.WatchStats(pb.WatchStatsRequest(system="doomed"))
        await watch.read()
        await stats.DeleteSystem(pb.DeleteSystemRequest(system="doomed"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_reset_is_refused_while_a_call_is_in_flight_and_frees_what_is_live(
    start: Callable[..., Process],
) -> None:
    address = start().address
    async with loaders(address, 1) as [a], stub(address) as stats:
        await a.ask(reserve(1, "xfs"))
        for rpc, request in (
            (stats.ResetSystem, pb.ResetSystemRequest()),
            (stats.DeleteSystem, pb.DeleteSystemRequest(system="default")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc(request)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await a.ask(live(1, "xfs"))
        system = (await stats.ResetSystem(pb.ResetSystemRequest())).system
        assert system.HasField("reset_time")
        while not a.released:
            await a.read()
        assert a.released == [1]
        assert (await stats.GetStats(pb.GetStatsRequest())).stats.calls == 0


# --- streams ---


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([ledger.ConnectRequest()], "the first message of a stream must be a hello"),
        ([ledger.ConnectRequest(batch=ledger.OperationBatch(sequence=1))], "the first message of a stream must be"),
        ([ledger.ConnectRequest(hello=ledger.Hello())], "'' is no instance id"),
        ([ledger.ConnectRequest(hello=ledger.Hello(instance_id="one"))] * 2, "after the hello a stream has batches"),
        (
            [
                ledger.ConnectRequest(hello=ledger.Hello(instance_id="two")),
                ledger.ConnectRequest(batch=ledger.OperationBatch(sequence=2)),
            ],
            "batch 2 follows batch 0: those in between are missing",
        ),
    ],
)
async def test_a_stream_that_makes_no_sense_ends_with_a_sentence(
    stats: Process, messages: list[ledger.ConnectRequest], sentence: str
) -> None:
    async with grpc.aio.insecure_channel(stats.address) as channel:
        stream: Any = LedgerServiceStub(channel).Connect(iter(messages))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in (caught.value.details() or "")


async def test_two_loaders_wait_for_one_name(stats: Process, system: str) -> None:
    async with loaders(stats.address, 3) as [a, b, c], stub(stats.address) as service:
        await a.ask(ledger.Operation(call_id=1, system=system, open_system=ledger.OpenSystem()))
        first = reserve(2, "xfs")
        first.system = system
        await a.ask(first)
        for waiter in (b, c):
            operation = reserve(2, "xfs")
            operation.system = system
            await waiter.tell(operation)
        async with asyncio.timeout(WAIT_SECONDS):
            while (await service.GetStats(pb.GetStatsRequest(system=system))).stats.waiting_calls < 2:
                pass
        end = live(2, "xfs")
        end.system = system
        await a.ask(end)
        for waiter in (b, c):
            result = await waiter.answer(2)
            assert (result.verdict, result.errno, result.waited) == (
                ledger.OperationResult.VERDICT_DUPLICATE,
                "EEXIST",
                True,
            )


async def test_a_loader_that_ends_its_stream_gives_up_at_once_and_one_that_dies_after_its_lease(
    start: Callable[..., Process],
) -> None:
    address = start("127.0.0.1:0", "--lease-seconds", "0.5").address
    async with loaders(address, 3) as [a, b, c]:
        await a.ask(reserve(1, "xfs"))
        await c.tell(reserve(1, "xfs"))
        assert await a.end() is grpc.StatusCode.OK
        assert (await c.answer(1)).errno == "EBUSY"
        await b.ask(reserve(1, "kvm"))
        await c.tell(reserve(2, "kvm"))
        await b.close()
        assert (await c.answer(2)).errno == "EBUSY"
        assert (await c.ask(reserve(3, "kvm"))).verdict == PROCEED


async def test_a_batch_that_comes_twice_counts_once(start: Callable[..., Process]) -> None:
    address = start().address
    async with loaders(address, 1) as [a], stub(address) as stats:
        first = await a.ask(duplicate(1, "xfs"))
        await a.tell(duplicate(1, "xfs"), sequence=1)
        again = await a.answer(1)
        assert (again.verdict, again.event_id) == (PROCEED, first.event_id)
        assert (await stats.GetStats(pb.GetStatsRequest())).stats.calls == 1


async def test_killed_at_any_moment_it_loses_nothing_and_counts_nothing_twice(start: Callable[..., Process]) -> None:
    server = start()
    address = server.address
    answered: dict[tuple[str, int], int] = {}
    calls_each, count, kills = 150, 3, 4
    enough = asyncio.Event()

    async def work(loader: Loader) -> None:
        await loader.connect()
        for call_id in range(1, calls_each + 1):
            module = f"m{call_id}-{loader.name}"[:60]
            for operation in (reserve(call_id, module), live(call_id, module)):
                sent = False
                while True:
                    try:
                        if not sent:
                            # It stays among the unanswered, also if the stream breaks now.
                            sent = True
                            await loader.tell(operation)
                        result = await loader.answer(call_id)
                        break
                    except (ConnectionError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        await reconnect(loader)
                assert result.verdict == PROCEED, result
            answered[loader.name, call_id] = result.event_id
            if len(answered) % 60 == 0:
                enough.set()

    async def reconnect(loader: Loader) -> None:
        while True:
            try:
                await loader.connect()
            except (AssertionError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                continue
            return

    many = [Loader(address) for _ in range(count)]
    tasks = [asyncio.create_task(work(loader)) for loader in many]
    for _ in range(kills):
        await asyncio.wait_for(enough.wait(), WAIT_SECONDS)
        enough.clear()
        server.kill()
        server = await asyncio.to_thread(start, address)
    await asyncio.wait_for(asyncio.gather(*tasks), WAIT_SECONDS)

    total = calls_each * count
    async with stub(address) as stats:
        found = (await stats.GetStats(pb.GetStatsRequest())).stats
        assert (found.calls, found.modcount, found.live_modules, found.events) == (total, total, total, total)
        assert found.total_mod_size == total * 8192
        logged = [event for page in await pages(stats.ListEvents, pb.ListEventsRequest(), "events") for event in page]
        assert {(e.call.instance_id, e.call.call_id): e.event_id for e in logged} == answered
        assert len(logged) == total
    for loader in many:
        await loader.close()


async def test_a_stop_answers_what_was_asked_and_lets_loaders_go(start: Callable[..., Process]) -> None:
    server = start()
    async with loaders(server.address, 1) as [a], stub(server.address) as stats:
        watch = stats.WatchStats(pb.WatchStatsRequest())
        await watch.read()
        await a.ask(reserve(1, "xfs"))
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionError, match="stats_svc is stopping"):
            while True:
                await a.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # Streams without an end of their own do not keep it for the whole of its grace.
        assert await asyncio.to_thread(server.popen.wait, WAIT_SECONDS) == 0
    assert any("stats_svc stopped" in line for line in server.lines)


# --- the database goes away ---


@contextmanager
def full_disk(process: Process) -> Iterator[None]:
    """Let a process write no file beyond its first page, as on a disk that has no room."""
    limits = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, limits)


async def test_on_a_full_disk_nothing_is_answered_until_there_is_room(start: Callable[..., Process]) -> None:
    server = start()
    async with loaders(server.address, 1) as [a], stub(server.address) as stats:
        await a.ask(reserve(1, "xfs"))
        with full_disk(server):
            await a.tell(live(1, "xfs"))
            with pytest.raises(ConnectionError, match=r"the database is away: .*stats\.sqlite3: "):
                while True:
                    await a.read()
            await until_health(server.address, "modpressure.v1.LedgerService", NOT_SERVING)
            assert await health_of(server.address, "modpressure.v1.StatsService") == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stats.CreateSystem(pb.CreateSystemRequest(system=pb.System(id="other")))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await until_health(server.address, "modpressure.v1.LedgerService", SERVING)
        await a.connect()
        assert (await a.answer(1)).event_id == 1
        assert (await stats.GetStats(pb.GetStatsRequest())).stats.modcount == 1


async def test_a_file_that_is_moved_away_is_missed_until_it_is_back(
    start: Callable[..., Process], database: Path
) -> None:
    server = start()
    async with loaders(server.address, 1) as [a]:
        database.rename(database.with_suffix(".away"))
        await a.tell(duplicate(1, "xfs"))
        with pytest.raises(ConnectionError, match="no such file"):
            while True:
                await a.read()
        assert not database.exists()
        database.with_suffix(".away").rename(database)
        await until_health(server.address, "modpressure.v1.LedgerService", SERVING)
        await a.connect()
        assert (await a.answer(1)).event_id == 1


async def test_somebody_who_holds_the_files_lock_for_a_moment_is_waited_for(
    start: Callable[..., Process], database: Path
) -> None:
    server = start()
    async with loaders(server.address, 1) as [a], stub(server.address) as stats:
        backup = sqlite3.connect(database, isolation_level=None)
        backup.execute("BEGIN IMMEDIATE")
        await a.tell(duplicate(1, "xfs"))
        # Reading goes on meanwhile.
        assert (await stats.GetStats(pb.GetStatsRequest())).stats.calls == 0
        backup.execute("ROLLBACK")
        backup.close()
        assert (await a.answer(1)).event_id == 1


# --- starts that fail ---


def failing_start(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "stats_svc", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env={**os.environ, **(environment or {})},
    )
    return ended.returncode, ended.stderr


def test_a_port_in_use_is_one_sentence(database: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        status, said = failing_start("--listen", listen, "--database", str(database))
    assert (status, said) == (1, f"stats_svc: can't listen on {listen}: address already in use\n")


def test_a_file_that_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk, bread\n" * 100)
    status, said = failing_start("--listen", "127.0.0.1:0", "--database", str(path))
    assert (status, said) == (1, f"stats_svc: {path}: file is not a database\n")


@pytest.mark.parametrize("way", ["its name", "a symbolic link", "a hard link", "a new name"])
def test_a_database_in_use_is_one_sentence(
    start: Callable[..., Process], database: Path, tmp_path: Path, way: str
) -> None:
    start()
    other = database if way == "its name" else tmp_path / "elsewhere" / "other.sqlite3"
    other.parent.mkdir(exist_ok=True)
    match way:
        case "a symbolic link":
            other.symlink_to(database)
        case "a hard link":
            other.hardlink_to(database)
        case "a new name":
            database.rename(other)
    # Nothing that lies beside it has a part in it.
    for path in database.parent.iterdir():
        if path.is_file() and not path.name.startswith(f"{database.name}-") and not path.samefile(other):
            path.unlink()
    status, said = failing_start("--listen", "127.0.0.1:0", "--database", str(other))
    assert (status, said) == (1, f"stats_svc: {other.resolve()} is in use by another stats_svc\n")


def test_a_database_under_two_names_is_one_sentence(start: Callable[..., Process], database: Path) -> None:
    start().kill()
    # What was committed is in a log that goes by the first name.
    other = database.with_name("other.sqlite3")
    other.hardlink_to(database)
    status, said = failing_start("--listen", "127.0.0.1:0", "--database", str(other))
    assert (status, said) == (
        1,
        f"stats_svc: {other} has other names, too (hard links): all but one have to go\n",
    )
    other.unlink()
    start()


def test_a_server_that_is_not_there_is_one_sentence_without_its_password() -> None:
    status, said = failing_start("--listen", "127.0.0.1:0", "--database", "postgresql://me:secret@127.0.0.1:1/stats")
    assert status == 1
    assert said.startswith("stats_svc: postgresql+psycopg://me:***@127.0.0.1:1/stats: ")
    assert said.count("\n") == 1 and "secret" not in said


def is_open(path: Path, pid: int) -> bool:
    """Return whether a process has a file open."""
    with contextlib.suppress(FileNotFoundError):
        return any(descriptor.samefile(path) for descriptor in Path(f"/proc/{pid}/fd").iterdir())
    return False


def test_an_interrupted_start_ends_without_a_word(database: Path) -> None:
    # Somebody holds the file, so that the start takes as long as the test needs.
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    arguments = ("--listen", "127.0.0.1:0", "--database", str(database))
    with subprocess.Popen(
        [sys.executable, "-m", "stats_svc", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        while not is_open(database, process.pid):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_SECONDS)
    holder.close()
    assert (process.returncode, said) == (130, "")


@pytest.mark.parametrize("arguments", [("--listen", "nowhere"), ("--lease-seconds", "0"), ("--no-such-flag",)])
def test_bad_usage_is_told_and_exits_2(arguments: tuple[str, ...]) -> None:
    status, said = failing_start(*arguments)
    assert status == 2
    assert arguments[-1] in said and "Traceback" not in said


# --- PostgreSQL ---


async def test_over_postgresql_it_survives_a_lost_connection(launch: Launch, postgres_database: str) -> None:
    process = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", postgres_database)
    engine = sa.create_engine(postgres_database, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    async with loaders(process.address, 1) as [a], stub(process.address) as stats:
        await a.ask(reserve(1, "xfs"))
        with engine.connect() as connection:
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        await a.tell(live(1, "xfs"))
        assert (await a.answer(1)).event_id == 1
        assert (await stats.GetStats(pb.GetStatsRequest())).stats.modcount == 1


def test_its_first_line_tells_where_it_listens(start: Callable[..., Process], database: Path) -> None:
    server = start()
    first = json.loads(server.lines[0])
    assert first["event"] == f"stats_svc listening on {first['address']}"
    assert first["address"].startswith("127.0.0.1:") and not first["address"].endswith(":0")
    assert first["database"] == str(database)
