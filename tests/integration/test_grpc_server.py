"""The server that both services start: real sockets, real clients, real signals."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from loader_svc.loader import Loader
from loader_svc.memory import Meter
from loader_svc.servicer import LoaderServicer
from loader_svc.storm import MAX_WORKERS, MAX_WORKERS_AT_ONCE
from modpressure.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    ModpressureError,
    NotFound,
    NotNow,
    OverLimit,
    Unavailable,
)
from modpressure.grpc_errors import INTERNAL_SENTENCE, status_code_of, translate_errors
from modpressure.grpc_server import CannotListen, GrpcServer, split_address
from modpressure.limits import Limits
from modpressure.shares import Places
from modpressure.v1 import (
    call_pb2,
    ledger_service_pb2,
    loader_service_pb2,
    loader_service_pb2_grpc,
    stats_service_pb2,
    stats_service_pb2_grpc,
)
from tests.services import Process

SERVICE = "modpressure.v1.StatsService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Raising(stats_service_pb2_grpc.StatsServiceServicer):
    """Raises what the test says, from a unary and from a streaming RPC."""

    error: BaseException = NotFound("there is no system 'x'")

    async def GetStats(self, request: Any, context: Any) -> Any:
        async with translate_errors(context, "Stats.GetStats"):
            if request.system == "fine":
                return stats_service_pb2.GetStatsResponse()
            if request.system == "own abort":
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, "its own")
            raise self.error

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with translate_errors(context, "Stats.WatchStats"):
            yield stats_service_pb2.WatchStatsResponse()
            raise self.error


def serve(servicer: Any, listen: str = "127.0.0.1:0", **options: Any) -> GrpcServer:
    server = GrpcServer(listen, **{"grace_seconds": 5, **options})
    server.add(servicer, stats_service_pb2_grpc.add_StatsServiceServicer_to_server, SERVICE)
    return server


@pytest.fixture
async def raising() -> AsyncIterator[tuple[Raising, Any]]:
    servicer = Raising()
    server = serve(servicer)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield servicer, stats_service_pb2_grpc.StatsServiceStub(channel)
    await server.stop()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("copy -1 is negative", field="copy"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("there is no module 'nope'"), grpc.StatusCode.NOT_FOUND),
        (AlreadyExists("there is a system 'a' already"), grpc.StatusCode.ALREADY_EXISTS),
        (Forbidden("/etc/passwd lies outside of the tree"), grpc.StatusCode.PERMISSION_DENIED),
        (OverLimit("1001 workers are more than 1000"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NotNow("3 calls are in flight"), grpc.StatusCode.FAILED_PRECONDITION),
        (Unavailable("stats_svc is away"), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_an_error_reaches_the_client_as_its_code_and_sentence(
    raising: tuple[Raising, Any], error: ModpressureError, code: Any
) -> None:
    servicer, stub = raising
    servicer.error = error
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await stub.GetStats(stats_service_pb2.GetStatsRequest())
    assert (unary.value.code(), unary.value.details()) == (code, error.sentence)
    stream = stub.WatchStats(stats_service_pb2.WatchStatsRequest())
    assert await stream.read() == stats_service_pb2.WatchStatsResponse()
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        await stream.read()
    assert (streamed.value.code(), streamed.value.details()) == (code, error.sentence)
    assert status_code_of(error) is code


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for packed in status.details:
        detail = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])()
        assert packed.Unpack(detail)
        found[type(detail).__name__] = detail
    return found


async def test_details_name_the_field_and_advise_a_retry(raising: tuple[Raising, Any]) -> None:
    servicer, stub = raising
    servicer.error = BadRequest("copy -1 is negative", field="copy")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStats(stats_service_pb2.GetStatsRequest())
    details = details_of(caught.value)
    assert [v.field for v in details["BadRequest"].field_violations] == ["copy"]
    assert details["ErrorInfo"].reason == "INVALID_ARGUMENT"
    servicer.error = Unavailable("stats_svc is away")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStats(stats_service_pb2.GetStatsRequest())
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds == 1


@pytest.mark.parametrize("error", [ValueError("secret /path"), ModpressureError("secret /path")])
async def test_what_nobody_foresaw_tells_nothing_on_the_wire(
    raising: tuple[Raising, Any], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer, stub = raising
    servicer.error = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStats(stats_service_pb2.GetStatsRequest())
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, INTERNAL_SENTENCE)
    logged = capsys.readouterr()
    assert "secret /path" in logged.out + logged.err


def machine_of(**parts: Any) -> Any:
    """Return as much of a loader's machine as a test needs."""
    return SimpleNamespace(plans=SimpleNamespace(identity=SimpleNamespace(decompressors=())), **parts)


L = TypeVar("L", bound=Loader)


async def served(kind: type[L]) -> tuple[L, GrpcServer, str]:
    """Serve a loader of some kind, whose stats_svc is there; return it, its server and where that is."""

    async def stands() -> None:
        pass

    ledger = SimpleNamespace(require=stands, wait_away=asyncio.Event().wait)
    tree: Any = SimpleNamespace(module=lambda name: SimpleNamespace(name=name))
    loader = kind(machine_of(ledger=ledger, loader=kind.__name__.lower(), meter=Meter()), tree, kmod=34)
    server = GrpcServer("127.0.0.1:0", grace_seconds=5)
    server.add(
        LoaderServicer(loader, 16),
        loader_service_pb2_grpc.add_LoaderServiceServicer_to_server,
        "modpressure.v1.LoaderService",
    )
    return loader, server, await server.start()


async def test_what_nobody_foresaw_is_logged_whether_it_ends_an_rpc_or_a_part_of_a_stream(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Broken(Loader):
        async def load(self, request: Any) -> Any:
            raise ValueError(f"secret of {request.module}")

        async def policy(self, system: str, asked: int) -> int:
            return asked

        def spec(self, name: str, **options: Any) -> Any:
            raise ValueError(f"secret of {name}")

    _, server, address = await served(Broken)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = loader_service_pb2_grpc.LoaderServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LoadModule(loader_service_pb2.LoadModuleRequest(module="unary"))
        requests = [
            loader_service_pb2.ModuleRequest(load=loader_service_pb2.LoadModuleRequest(module="streamed")),
            loader_service_pb2.ModuleRequest(tag=1),
        ]
        stream = stub.LoadModules(iter([loader_service_pb2.LoadModulesRequest(requests=requests)]))
        told = {answer.tag: answer.error async for message in stream for answer in message.responses}
        once = loader_service_pb2.Storm.MODE_ONCE
        storm = loader_service_pb2.Storm(modules=["stormed"], workers=1, mode=once, keep_loaded=True)
        storming = stub.RunStorm(iter([loader_service_pb2.RunStormRequest(storm=storm)]))
        [summary] = [message.summary async for message in storming if message.HasField("summary")]
    await server.stop()
    internal = grpc.StatusCode.INTERNAL
    assert (caught.value.code(), caught.value.details()) == (internal, INTERNAL_SENTENCE)
    assert (told[0].code, told[0].message) == (internal.value[0], INTERNAL_SENTENCE)
    assert "asks for nothing" in told[1].message
    assert (summary.errors, summary.first_error) == (1, INTERNAL_SENTENCE)
    logged = capsys.readouterr()
    for rpc, module in (("LoadModule", "unary"), ("LoadModules", "streamed"), ("RunStorm", "stormed")):
        assert f"ValueError: secret of {module}\n" in logged.out + logged.err
        assert re.search(rf"rpc failed .*code\W.*INTERNAL.*rpc\W.*Loader\.{rpc}\b", logged.out + logged.err), rpc
    # What was foreseen is no news: a stream may have thousands of them.
    assert "asks for nothing" not in logged.out + logged.err


async def test_an_rpc_that_was_cut_keeps_its_place_until_what_it_has_begun_ends() -> None:
    begun, gone, goes_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loader = Loader(machine_of(), None, kmod=34)  # type: ignore[arg-type]

    async def work() -> None:
        begun.set()
        await goes_on.wait()

    class Slow(stats_service_pb2_grpc.StatsServiceServicer):
        async def GetStats(self, request: Any, context: Any) -> Any:
            async with translate_errors(context, "Stats.GetStats"):
                if not request.system:
                    return stats_service_pb2.GetStatsResponse()
                await loader.answer(work(), on_cancel=gone.set)

    server = serve(Slow(), limits=Limits(rpcs=2))
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = stats_service_pb2_grpc.StatsServiceStub(channel)
        call = stub.GetStats(stats_service_pb2.GetStatsRequest(system="slow"))
        await begun.wait()
        call.cancel()
        await gone.wait()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetStats(stats_service_pb2.GetStatsRequest())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        goes_on.set()
        await loader.drain()
        await stub.GetStats(stats_service_pb2.GetStatsRequest())
    await server.stop()


async def test_a_storm_that_was_cut_keeps_room_for_its_workers_until_what_it_has_begun_ends() -> None:
    begun, gone, goes_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Slow(Loader):
        is_slow = True

        async def policy(self, system: str, asked: int) -> int:
            return asked

        async def remove(self, *arguments: Any, **options: Any) -> Any:
            if self.is_slow:
                begun.set()
                await goes_on.wait()
            return call_pb2.Unload()

        async def answer(self, work: Any, on_cancel: Any = None) -> Any:
            return await super().answer(work, gone.set)

        def spec(self, name: str, **options: Any) -> Any:
            return None, None

    loader, server, address = await served(Slow)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = loader_service_pb2_grpc.LoaderServiceStub(channel)

        def storm(workers: int) -> Any:
            asked = loader_service_pb2.Storm(modules=["minix"], workers=workers, operations=1, await_start=True)
            return stub.RunStorm(iter([loader_service_pb2.RunStormRequest(storm=asked)]))

        # As many as fit into half of all, which is what one client may have.
        for _ in range(MAX_WORKERS_AT_ONCE // MAX_WORKERS // 2):
            call = storm(MAX_WORKERS)
            await begun.wait()
            call.cancel()
            await gone.wait()
            begun.clear()
            gone.clear()
        loader.is_slow = False
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await storm(1).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        goes_on.set()
        await loader.drain()
        assert [message.summary.workers async for message in storm(1) if message.HasField("summary")] == [1]
    await server.stop()


async def test_what_breaks_the_reader_of_a_stream_is_logged_though_its_client_has_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, broken, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Endless(Loader):
        async def load(self, request: Any) -> Any:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                gone.set()

    async def take(places: Places, holder: str) -> None:
        if begun.is_set():
            broken.set()
            raise ValueError(f"secret of {holder}")

    monkeypatch.setattr(Places, "take", take)
    monkeypatch.setattr(Places, "give", lambda *_: None)
    server = GrpcServer("127.0.0.1:0", grace_seconds=5)
    server.add(
        LoaderServicer(Endless(machine_of(), None, kmod=34), 16),  # type: ignore[arg-type]
        loader_service_pb2_grpc.add_LoaderServiceServicer_to_server,
        "modpressure.v1.LoaderService",
    )
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stream: Any = loader_service_pb2_grpc.LoaderServiceStub(channel).LoadModules()
        request = loader_service_pb2.ModuleRequest(load=loader_service_pb2.LoadModuleRequest(module="minix"))
        await stream.write(loader_service_pb2.LoadModulesRequest(requests=[request]))
        await begun.wait()
        await stream.write(loader_service_pb2.LoadModulesRequest(requests=[request]))
        await broken.wait()
        stream.cancel()
        await gone.wait()
    await server.stop()
    gc.collect()
    captured = capsys.readouterr()
    logged = captured.out + captured.err
    assert re.search(r"rpc failed .*code\W.*INTERNAL.*rpc\W.*Loader\.LoadModules\b", logged)
    assert "ValueError: secret of 127.0.0.1\n" in logged
    assert "never retrieved" not in logged


async def test_success_and_the_blocks_own_abort_pass_through(raising: tuple[Raising, Any]) -> None:
    _, stub = raising
    assert await stub.GetStats(stats_service_pb2.GetStatsRequest(system="fine")) is not None
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetStats(stats_service_pb2.GetStatsRequest(system="own abort"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "its own")


async def test_health_is_told_by_service_and_as_a_whole() -> None:
    server = serve(Raising())
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> Any:
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        assert (await status(SERVICE), await status("")) == (SERVING, SERVING)
        await server.set_serving(SERVICE, False)
        assert (await status(SERVICE), await status("")) == (NOT_SERVING, NOT_SERVING)
        await server.set_serving(SERVICE, True)
        assert (await status(SERVICE), await status("")) == (SERVING, SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status("modpressure.v1.NoService")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    await server.stop()


async def test_who_watches_the_health_hears_of_the_stop_and_does_not_hold_it_up() -> None:
    server = serve(Raising(), grace_seconds=3600)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        await server.stop()
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_who_watches_the_health_is_told_when_the_server_is_given_up() -> None:
    server = serve(Raising(), grace_seconds=3600)
    address = await server.start()
    serving = asyncio.ensure_future(server.serve_until_stopped())
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        serving.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert (caught.value.code(), caught.value.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "the server is stopping",
        )
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_reflection_lists_the_services_and_can_be_off() -> None:
    for on in (True, False):
        server = serve(Raising(), reflection=on)
        async with grpc.aio.insecure_channel(await server.start()) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            if on:
                answer = await call.read()
                names = {service.name for service in answer.list_services_response.service}
                assert {SERVICE, "grpc.health.v1.Health"} <= names
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await server.stop()


async def test_a_port_in_use_is_refused_by_name() -> None:
    first = serve(Raising())
    address = await first.start()
    with pytest.raises(CannotListen, match=f"can't listen on {address}: address already in use"):
        await serve(Raising(), address).start()
    await first.stop()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=str(port)):
            await serve(Raising(), f"127.0.0.1:{port}").start()


async def test_a_unix_socket_works_and_is_not_taken_over(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s"
    server = serve(Raising(), listen)
    assert await server.start() == listen
    async with grpc.aio.insecure_channel(listen) as channel:
        stub = stats_service_pb2_grpc.StatsServiceStub(channel)
        await stub.GetStats(stats_service_pb2.GetStatsRequest(system="fine"))
    with pytest.raises(CannotListen, match="already in use"):
        await serve(Raising(), listen).start()
    await server.stop()


@pytest.mark.parametrize(
    "listen", ["", "localhost", ":50051", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:http", "::1:5"]
)
async def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await serve(Raising(), listen).start()
    assert repr(listen) in caught.value.sentence


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(CannotListen, match=r"192\.0\.2\.1:0"):
        await serve(Raising(), "192.0.2.1:0").start()


def test_addresses_are_split() -> None:
    assert split_address("[::]:0") == ("::", 0)
    assert split_address("localhost:50051") == ("localhost", 50051)


SERVER_PROGRAM = """
import asyncio, sys
from modpressure import aio
from modpressure.grpc_server import GrpcServer
from modpressure.v1 import ledger_service_pb2, loader_service_pb2, stats_service_pb2, stats_service_pb2_grpc
from tests.services import Process

class Slow(stats_service_pb2_grpc.StatsServiceServicer):
    async def GetStats(self, request, context):
        print("begun", flush=True)
        if request.system == "forever":
            await asyncio.Event().wait()
        await server.stopping.wait()
        return stats_service_pb2.GetStatsResponse()

async def main():
    global server
    server = GrpcServer("127.0.0.1:0", grace_seconds=3600)
    server.add(Slow(), stats_service_pb2_grpc.add_StatsServiceServicer_to_server, "modpressure.v1.StatsService")
    print(await server.start(), flush=True)
    await server.serve_until_stopped()
    print("ended", flush=True)

aio.run(main())
"""


@pytest.mark.parametrize("system", ["finite", "forever"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_calls_in_flight_end_and_a_second_one_hurries(system: str, number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER_PROGRAM, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stats_service_pb2_grpc.StatsServiceStub(channel)
        call = stub.GetStats(stats_service_pb2.GetStatsRequest(system=system))
        reply = asyncio.ensure_future(call)
        assert await process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        if system == "finite":
            assert await reply == stats_service_pb2.GetStatsResponse()
        else:
            assert b"stopping" in await process.stdout.readline()
            process.send_signal(number)
            with pytest.raises(grpc.aio.AioRpcError):
                await reply
        rest = await process.stdout.read()
        assert rest.endswith(b"ended\n")
        assert await process.wait() == 0


NOT_A_MESSAGE = b"\x0a\xff"
"""A field of a length that is not there."""


async def status_of_bytes(call: Any) -> tuple[Any, str]:
    return await call.code(), await call.details()


@pytest.mark.parametrize(
    "method",
    [
        "/modpressure.v1.StatsService/GetStats",
        "/modpressure.v1.StatsService/WatchStats",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_what_is_no_message_is_the_callers_mistake(method: str, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(Raising())
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        if method.endswith("Info"):
            stream = channel.stream_stream(method)()
            await stream.write(NOT_A_MESSAGE)
            answer = await status_of_bytes(stream)
        elif "Watch" in method:
            answer = await status_of_bytes(channel.unary_stream(method)(NOT_A_MESSAGE))
        else:
            answer = await status_of_bytes(channel.unary_unary(method)(NOT_A_MESSAGE))
    await server.stop()
    name = method.rpartition(".")[2]
    sentence = f"what was sent to {name}, 2 bytes, is not the message that it takes"
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, sentence)
    assert not caplog.records, "a traceback of it in the log is noise that anybody can make"


async def test_what_is_no_message_is_refused_in_the_middle_of_a_stream(
    stats: Process, loader: Process, system: str
) -> None:
    hello = ledger_service_pb2.ConnectRequest(hello=ledger_service_pb2.Hello(instance_id="malformed", loader="x"))
    load = loader_service_pb2.LoadModulesRequest(requests=[loader_service_pb2.ModuleRequest(tag=1)])
    storm = loader_service_pb2.Storm(system=system, modules=["minix"], workers=1, operations=1, await_start=True)
    for address, method, first in (
        (stats.address, "LedgerService/Connect", hello),
        (loader.address, "LoaderService/LoadModules", load),
        (loader.address, "LoaderService/RunStorm", loader_service_pb2.RunStormRequest(storm=storm)),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            stream = channel.stream_stream(f"/modpressure.v1.{method}")()
            await stream.write(first.SerializeToString())
            assert await stream.read()
            await stream.write(NOT_A_MESSAGE)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while await stream.read():
                    pass
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert method in (refused.value.details() or "")


async def test_health_of_all_services_is_listed() -> None:
    server = serve(Raising())
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    await server.stop()
    assert {name: answer.status for name, answer in listed.statuses.items()} == {"": SERVING, SERVICE: SERVING}


class Left:
    """The context of an RPC whose client has just left, as ``make fuzz`` met it."""

    async def abort_with_status(self, status: Any) -> None:
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_who_has_left_needs_no_status() -> None:
    with pytest.raises(asyncio.CancelledError):
        async with translate_errors(Left(), "Loader.LoadModules"):
            raise BadRequest("copy -1 is negative")


class Hanging(stats_service_pb2_grpc.StatsServiceServicer):
    """Answers nothing: it waits, or waits for something that is given up."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.given_up: asyncio.Future[None] | None = None

    async def GetStats(self, request: Any, context: Any) -> Any:
        async with translate_errors(context, "Hanging.GetStats"):
            self.begun.release()
            if self.given_up is not None:
                self.given_up.cancel()
                await self.given_up
            await asyncio.Event().wait()

    async def WatchStats(self, request: Any, context: Any) -> Any:
        async with translate_errors(context, "Hanging.WatchStats"):
            yield stats_service_pb2.WatchStatsResponse()
            self.begun.release()
            await asyncio.Event().wait()


async def test_rpcs_that_a_stop_cuts_off_are_unavailable_and_never_cancelled() -> None:
    for grace_seconds in (0.0, 0.1) * 15:
        servicer = Hanging()
        server = serve(servicer)
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = stats_service_pb2_grpc.StatsServiceStub(channel)

            async def watch(stub: Any = stub) -> None:
                async for _ in stub.WatchStats(stats_service_pb2.WatchStatsRequest()):
                    pass

            calls = [asyncio.ensure_future(watch()) for _ in range(3)]
            calls += [asyncio.ensure_future(_unary(stub)) for _ in range(3)]
            for _ in calls:
                await servicer.begun.acquire()
            await server.stop(grace_seconds)
            ends = await asyncio.gather(*calls, return_exceptions=True)
        said = {(e.code(), e.details()) for e in ends if isinstance(e, grpc.aio.AioRpcError)}
        assert said == {(grpc.StatusCode.UNAVAILABLE, "the server is stopping")}


async def _unary(stub: Any) -> None:
    await stub.GetStats(stats_service_pb2.GetStatsRequest())


async def test_who_waits_for_what_was_given_up_is_told() -> None:
    servicer = Hanging()
    servicer.given_up = asyncio.get_running_loop().create_future()
    server = serve(servicer)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = stats_service_pb2_grpc.StatsServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="what the request waited for was cut off") as refused:
            await stub.GetStats(stats_service_pb2.GetStatsRequest(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(0)
