"""What a client may have of a service, and what it is told beyond: real processes with small limits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from grpc_status import rpc_status

from fuzz.wire import varint
from modpressure.client import Client
from modpressure.errors import Overloaded
from modpressure.tls import open_channel
from modpressure.tokens import Role, entry, new_token
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as ledger_pb
from modpressure.v1 import loader_service_pb2 as loader_pb
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceStub
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests import http2
from tests.services import Hand, Launch, Process

HALF_OPEN = 1500
WAIT_SECONDS = 60
GET_STATS = "/modpressure.v1.StatsService/GetStats"

Start = Callable[..., Process]


@pytest.fixture
def start(launch: Launch, tmp_path: Path) -> Start:
    """Start a stats_svc with the limits that are given."""

    def start(**limits: object) -> Process:
        flags = [text for name, value in limits.items() for text in ("--" + name.replace("_", "-"), str(value))]
        return launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"), *flags)

    return start


@contextlib.asynccontextmanager
async def stub_at(address: str, token: str = "") -> AsyncIterator[Any]:
    async with open_channel(address, None, token=token) as channel:
        yield StatsServiceStub(channel)


async def refused(asked: Any, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asked
    assert raised.value.code() is code, raised.value
    return raised.value


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    """Return when the server says that one may come again."""
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else ():
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(retry):
            return float(retry.retry_delay.ToMilliseconds()) / 1000
    raise AssertionError(f"no RetryInfo in {error}")


def tokens(tmp_path: Path, *names: str) -> tuple[Path, list[str]]:
    """Make a file of tokens for reading, and return it and the tokens."""
    made = [new_token() for _ in names]
    file = tmp_path / "tokens.toml"
    roles = [Role.READ]
    file.write_text("".join(entry(token, name, roles, ["*"]) for name, token in zip(names, made, strict=True)))
    return file, made


async def test_what_is_too_long_is_refused_and_what_is_not_is_served(start: Start) -> None:
    stats = start(message_limit="64KiB", metadata_limit="4KiB")
    async with stub_at(stats.address) as stub:
        error = await refused(
            stub.GetStats(pb.GetStatsRequest(system="x" * 70_000)), grpc.StatusCode.RESOURCE_EXHAUSTED
        )
        assert "larger than max" in (error.details() or "")
        long = (("x-long", "x" * 8000),)
        await refused(stub.GetStats(pb.GetStatsRequest(), metadata=long), grpc.StatusCode.RESOURCE_EXHAUSTED)
        await stub.GetStats(pb.GetStatsRequest(), metadata=(("x-short", "x" * 1000),))


async def test_what_would_take_too_much_memory_when_it_is_parsed_is_not_parsed(
    start: Start, launch: Launch, system: str
) -> None:
    limit = ("--message-limit", "1MiB")
    stats = start(message_limit="1MiB")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *limit)
    hello = ledger_pb.ConnectRequest(hello=ledger_pb.Hello(instance_id="many-parts", loader="x")).SerializeToString()
    # Two bytes each: an operation in a batch, a request, a module of a storm.
    count = 400_000
    batch = b"\x12" + varint(2 * count) + b"\x12\0" * count
    storm = b"\x0a" + varint(2 * count) + b"\x12\0" * count
    for address, method, messages in (
        (stats.address, "LedgerService/Connect", [hello, batch]),
        (loader.address, "LoaderService/LoadModules", [b"\x0a\0" * count]),
        (loader.address, "LoaderService/RunStorm", [storm]),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            stream = channel.stream_stream(f"/modpressure.v1.{method}")()
            for message in messages[:-1]:
                await stream.write(message)
                assert await stream.read()
            await stream.write(messages[-1])
            assert await stream.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await stream.details() == (
                f"what was sent to {method}, {len(messages[-1])} bytes, has so many parts that it would take more than"
                f" {4 << 20} bytes of memory, 4 times the message_limit"
            )
    # Both go on.
    async with Client([loader.address], stats.address) as client:
        assert not (await client.load("minix", system=system)).call.errno


async def test_a_loader_says_no_more_at_once_than_stats_svc_takes(start: Start, launch: Launch) -> None:
    stats = start(message_limit="16KiB")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    label = "x" * 128
    async with open_channel(loader.address, None) as channel:
        stub = LoaderServiceStub(channel)
        requests = [
            loader_pb.LoadModuleRequest(module="minix", worker=label, requester=label, request_id=f"{n:0128}")
            for n in range(400)
        ]
        calls = await asyncio.gather(
            *(stub.LoadModule(request, timeout=WAIT_SECONDS, wait_for_ready=True) for request in requests)
        )
    assert sum(call.call.outcome == call_pb2.OUTCOME_LIVE for call in calls) == 1
    assert not any("lost stats_svc" in line for line in loader.lines)


async def test_rpcs_beyond_the_streams_of_a_connection_wait_their_turn(start: Start) -> None:
    stats = start(stream_limit=4)
    connection = http2.Connection(stats.address)
    assert connection.settings()[http2.MAX_CONCURRENT_STREAMS] == 4
    connection.close()
    async with stub_at(stats.address) as stub:
        watches = [stub.WatchStats(pb.WatchStatsRequest()) for _ in range(4)]
        for watch in watches:
            await watch.read()
        fifth = asyncio.ensure_future(stub.GetStats(pb.GetStatsRequest()))
        # A connection of its own has room, so it is not the server that has none.
        own = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(stats.address, options=own) as channel:
            await StatsServiceStub(channel).GetStats(pb.GetStatsRequest())
        assert not fifth.done()
        watches[0].cancel()
        assert (await fifth).stats.system == "default"


async def test_a_client_has_its_rate_and_is_told_when_to_come_again(start: Start, tmp_path: Path) -> None:
    file, (mine, theirs) = tokens(tmp_path, "mine", "theirs")
    stats = start(rate_limit=20, tokens=file)
    async with stub_at(stats.address, mine) as stub, stub_at(stats.address, theirs) as other:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            for _ in range(1000):
                await stub.GetStats(pb.GetStatsRequest())
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.details() == "token mine may send 20 requests a second"
        assert 0 < retry_seconds(raised.value) <= 0.05
        # It is a matter of this client alone.
        await other.GetStats(pb.GetStatsRequest())
    # Our client comes again by itself, when it is told to.
    async with Client(stats=stats.address, token=mine, timeout_seconds=60) as client:
        for _ in range(25):
            await client.stats()
    # Not if that is later than it has time for.
    async with Client(stats=stats.address, token=mine, timeout_seconds=0.01) as client:
        with pytest.raises(Exception, match=r"may send 20 requests a second|did not answer") as told:
            for _ in range(1000):
                await client.stats()
        assert isinstance(told.value, Overloaded) or "did not answer" in str(told.value)
    assert sum('"client refused"' in line for line in stats.lines) >= 1


async def test_one_client_leaves_room_for_others(start: Start, tmp_path: Path) -> None:
    file, (greedy, modest) = tokens(tmp_path, "greedy", "modest")
    stats = start(rpc_limit=8, tokens=file)
    async with stub_at(stats.address, greedy) as many, stub_at(stats.address, modest) as few:
        held = [many.WatchStats(pb.WatchStatsRequest()) for _ in range(4)]
        for watch in held:
            await watch.read()
        error = await refused(many.GetStats(pb.GetStatsRequest()), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert error.details() == ("token greedy has 4 RPCs in progress, and the 8 places leave no more for it now")
        assert retry_seconds(error) == 1
        await few.GetStats(pb.GetStatsRequest())
        # Whether it is well it says to everybody, however much there is to do.
        async with grpc.aio.insecure_channel(stats.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        held[0].cancel()
        async with asyncio.timeout(30):
            # The place is free when the server has heard of it.
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await many.GetStats(pb.GetStatsRequest())
                    break


async def test_an_old_connection_is_replaced_by_a_new_one(start: Start) -> None:
    stats = start(age_seconds=0.5, age_grace_seconds=0.5)
    async with stub_at(stats.address) as stub:
        watch = stub.WatchStats(pb.WatchStatsRequest())
        await watch.read()
        # Nothing changes, so the next thing to hear is the end.
        error = await refused(watch.read(), grpc.StatusCode.UNAVAILABLE)
        assert error.details() == "max connection age"
        assert (await stub.GetStats(pb.GetStatsRequest(), wait_for_ready=True)).stats.system == "default"


async def test_a_loader_whose_connection_grows_old_comes_back_and_nobody_notices(
    start: Start, launch: Launch, system: str
) -> None:
    stats = start(age_seconds=0.5, age_grace_seconds=0.5)
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    calls = 0
    async with Client([loader.address], stats.address) as client, asyncio.timeout(60):
        while sum('"loader connected"' in line for line in stats.lines) < 3:
            assert (await client.load("minix", system=system)).call.errno == ""
            assert (await client.unload("minix", system=system)).unload.errno == ""
            calls += 1
        counted = await client.stats(system)
    assert (counted.modcount, counted.calls) == (calls, calls)


def test_who_pings_too_often_is_cut_off(stats: Process) -> None:
    connection = http2.Connection(stats.address)
    connection.settings()
    # The first is welcome, two more are forgiven. Together, so that the server has read all when it hangs up.
    connection.send(4 * http2.frame(http2.PING, b"\0" * 8))
    payload = connection.payload(http2.GOAWAY)
    assert int.from_bytes(payload[4:8], "big") == http2.ENHANCE_YOUR_CALM
    assert payload[8:] == b"too_many_pings"
    connection.close()


def test_how_often_is_too_often_can_be_said(start: Start) -> None:
    connection = http2.Connection(start(ping_seconds=0.001).address)
    connection.settings()
    for number in range(8):
        time.sleep(0.002)  # the pace, not a wait for anything
        connection.send(http2.frame(http2.PING, bytes([number]) * 8))
        # It would be cut off after two pings too many; GOAWAY is another kind.
        while connection.frame() != (http2.PING, bytes([number]) * 8):
            pass
    connection.close()


async def test_a_request_that_does_not_come_is_not_waited_for_for_ever(start: Start) -> None:
    stats = start(request_seconds=0.2)
    async with grpc.aio.insecure_channel(stats.address) as channel:
        # To the client a method that takes a stream, so that nothing follows the headers.
        call = channel.stream_unary(GET_STATS, None, pb.GetStatsResponse.FromString)()
        await call.wait_for_connection()
        error = await refused(call, grpc.StatusCode.INVALID_ARGUMENT)
        assert error.details() == "no request came within 0.2 s"


async def test_a_stream_without_a_first_message_gives_its_place_back(
    start: Start, launch: Launch, tmp_path: Path
) -> None:
    limits = ("--request-seconds", "1", "--rpc-limit", "4")
    stats = start()
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *limits)
    other = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "other.sqlite3"), *limits)
    async with (
        grpc.aio.insecure_channel(other.address) as counting,
        grpc.aio.insecure_channel(loader.address) as loading,
    ):

        async def is_late(stream: Any) -> None:
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert await stream.details() == "no request came within 1 s"

        for begin in (
            LoaderServiceStub(loading).LoadModules,
            LoaderServiceStub(loading).RunStorm,
            StatsServiceStub(counting).ImportSystem,
            LedgerServiceStub(counting).Connect,
            ServerReflectionStub(counting).ServerReflectionInfo,
        ):
            # Of four places a lone client has two.
            for stream in (begin(), begin()):
                await is_late(stream)
        # No later message has a time of its own.
        spoken = LoaderServiceStub(loading).LoadModules()
        for tag in range(2):
            load = loader_pb.LoadModuleRequest(module="nothing")
            await spoken.write(loader_pb.LoadModulesRequest(requests=[loader_pb.ModuleRequest(tag=tag, load=load)]))
            assert [answer.tag for answer in (await spoken.read()).responses] == [tag]
            await is_late(LoaderServiceStub(loading).LoadModules())
        await spoken.done_writing()
        assert await spoken.code() is grpc.StatusCode.OK

        # Our client begins a stream when there is something to say.
        async def late_batches() -> AsyncIterator[list[loader_pb.ModuleRequest]]:
            await is_late(LoaderServiceStub(loading).LoadModules())
            yield [loader_pb.ModuleRequest(tag=7, load=load)]

        async with Client([loader.address]) as client:
            assert [answer.tag async for answer in client.load_many(late_batches())] == [7]


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process have as many open files as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < HALF_OPEN + 200:
        pytest.skip(f"only {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_connections_that_say_nothing_are_closed_while_others_are_served(start: Start, many_files: None) -> None:
    stats = start(handshake_seconds=2)
    files = Path(f"/proc/{stats.popen.pid}/fd")
    async with stub_at(stats.address) as stub:
        await stub.GetStats(pb.GetStatsRequest())
        before = len(os.listdir(files))
        silent = [http2.connect(stats.address) for _ in range(HALF_OPEN)]
        # Who is connected is served, and so is who comes.
        await stub.GetStats(pb.GetStatsRequest())
        async with stub_at(f"localhost:{stats.address.rpartition(':')[2]}") as late:
            await late.GetStats(pb.GetStatsRequest())
        for connection in silent:
            assert await asyncio.to_thread(http2.is_closed, connection)
            connection.close()
        await stub.GetStats(pb.GetStatsRequest())
    assert len(os.listdir(files)) <= before + 4


async def test_connections_beyond_the_limit_are_closed_at_once(start: Start) -> None:
    stats = start(connection_limit=8, idle_seconds=1)
    async with stub_at(stats.address) as stub:
        await stub.GetStats(pb.GetStatsRequest())
        files = Path(f"/proc/{stats.popen.pid}/fd")
        before = len(os.listdir(files))
        crowd: list[socket.socket] = [http2.connect(stats.address) for _ in range(100)]
        # All but as many as there may be are closed without a word; of those that are left some never say anything.
        assert sum(len(connection.recv(1)) == 0 for connection in crowd[-50:]) == 50
        assert len(os.listdir(files)) <= before + 8
        await stub.GetStats(pb.GetStatsRequest())
        for connection in crowd:
            connection.close()


async def test_a_connection_without_rpcs_is_closed(start: Start) -> None:
    stats = start(idle_seconds=0.5)
    connection = http2.Connection(stats.address)
    connection.settings()
    assert connection.payload(http2.GOAWAY)
    connection.close()
    async with stub_at(stats.address) as stub:
        await stub.GetStats(pb.GetStatsRequest(), wait_for_ready=True)


async def test_storms_leave_room_for_each_other(loader: Process, system: str) -> None:
    async with grpc.aio.insecure_channel(loader.address) as channel:
        stub: Any = LoaderServiceStub(channel)

        async def begun(workers: int) -> Any:
            stream: Any = stub.RunStorm()
            asked = loader_pb.Storm(
                system=system, modules=["minix"], workers=workers, mode=loader_pb.Storm.MODE_ONCE, await_start=True
            )
            await stream.write(loader_pb.RunStormRequest(storm=asked))
            return stream

        async def held(workers: int) -> Any:
            stream = await begun(workers)
            assert (await stream.read()).HasField("ready")
            return stream

        first = await held(10_000)
        second = await held(10_000)
        # Half of all: another client would have room, this one does not.
        error = await refused((await begun(1)).read(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert error.details() == "1 workers are more than there is room for beside the storms that run"
        assert retry_seconds(error) == 1
        for stream in (first, second):
            await stream.done_writing()
            while (message := await stream.read()) is not grpc.aio.EOF:
                assert not message.summary.calls
        third = await held(1)
        third.cancel()


@pytest.mark.parametrize(
    "operations",
    [
        [ledger_pb.Operation(call_id=number) for number in range(10_001)],
        [
            ledger_pb.Operation(call_id=1, record_calls=ledger_pb.RecordCalls(calls=[call_pb2.Call()] * 9_000)),
            ledger_pb.Operation(
                call_id=2, record_modules=ledger_pb.RecordModules(modules=[ledger_pb.RecordedModule()] * 999)
            ),
        ],
    ],
    ids=["operations", "records"],
)
async def test_a_loader_that_asks_too_much_at_once_is_sent_away(
    stats: Process, system: str, operations: list[ledger_pb.Operation]
) -> None:
    hand = Hand(stats.address, f"greedy-{system}", system)
    await hand.open()
    for operation in operations:
        operation.system = system
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await hand.send(operations)
        await hand.answer()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.details() == "10001 operations in a batch, with what they record, are more than 10000"
    await hand.close()


async def test_a_loader_that_finds_no_place_waits_for_one(start: Start, launch: Launch, system: str) -> None:
    stats = start(rpc_limit=2)
    async with stub_at(stats.address) as stub:
        watch = stub.WatchStats(pb.WatchStatsRequest())
        await watch.read()
        # To stats_svc both are the same client, which may have one of the two places.
        loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
        async with grpc.aio.insecure_channel(loader.address) as channel:
            load: Any = LoaderServiceStub(channel)
            request = loader_pb.LoadModuleRequest(system=system, module="minix")
            error = await refused(load.LoadModule(request), grpc.StatusCode.UNAVAILABLE)
            assert "does not serve this loader" in (error.details() or "")
            watch.cancel()
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        assert (await load.LoadModule(request)).call.errno == ""
                        break
    told = [line["reason"] for line in map(json.loads, loader.lines) if line["event"] == "no stats_svc"]
    assert any("and the 2 places leave no more for it now" in reason for reason in told), told
    # However often it asked, it says so again only where something else came in between.
    assert all(one != next_one for one, next_one in itertools.pairwise(told)), told


async def test_of_thousands_of_idle_streams_each_has_its_place_or_is_told_why_not(start: Start) -> None:
    stats = start()
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with contextlib.AsyncExitStack() as opened:
        channels = [
            await opened.enter_async_context(grpc.aio.insecure_channel(stats.address, options=own)) for _ in range(3)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        streams = [StatsServiceStub(channels[number % 3]).ImportSystem() for number in range(2500)]
        async with asyncio.timeout(WAIT_SECONDS):
            while len(ended := [stream for stream in streams if stream.done()]) < 2500 - 2048:
                await asyncio.sleep(0.05)
        assert {await stream.code() for stream in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert len(ended) == 2500 - 2048


async def test_a_host_has_no_more_connections_than_it_may(start: Start) -> None:
    stats = start(host_connection_limit=8)
    host, _, port = stats.address.rpartition(":")
    async with stub_at(stats.address) as stub:
        await stub.GetStats(pb.GetStatsRequest())
        other = socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0))
        crowd = [http2.connect(stats.address) for _ in range(40)]

        def hung_up() -> int:
            entries = [json.loads(line) for line in stats.lines]
            return sum(entry["connections"] for entry in entries if entry["event"].startswith("hung up on a host"))

        async with asyncio.timeout(WAIT_SECONDS):
            while hung_up() < 33:
                await asyncio.sleep(0.05)
        # The newest have gone; who was there before stays, and others have not been looked at.
        assert [await asyncio.to_thread(http2.is_closed, connection) for connection in crowd[-10:]] == [True] * 10
        await stub.GetStats(pb.GetStatsRequest())
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while other.recv(1000):
                pass
        for connection in (*crowd, other):
            connection.close()


async def test_streams_of_many_requests_leave_room_for_other_clients(
    stats: Process, launch: Launch, tmp_path: Path
) -> None:
    names = [f"client-{letter}" for letter in "abcd"]
    made = {name: new_token() for name in names}
    file = tmp_path / "tokens.toml"
    file.write_text("".join(entry(token, name, [Role.LOAD], ["*"]) for name, token in made.items()))
    limits = ("--request-limit", "6", "--tokens", str(file))
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *limits)
    # A call of somebody else has the name, and all loads of it wait.
    hand = Hand(stats.address, f"hand-{uuid.uuid4().hex}", system := f"test-{uuid.uuid4().hex[:12]}")
    await hand.open()
    await hand.reserve(2, "minix")

    async with contextlib.AsyncExitStack() as opened:

        async def loads(name: str, *modules: str) -> Any:
            channel = await opened.enter_async_context(open_channel(loader.address, None, token=made[name]))
            stream = LoaderServiceStub(channel).LoadModules()
            requests = [
                loader_pb.ModuleRequest(tag=tag, load=loader_pb.LoadModuleRequest(system=system, module=module))
                for tag, module in enumerate(modules)
            ]
            await stream.write(loader_pb.LoadModulesRequest(requests=requests))
            return stream

        async def waiting(number: int) -> None:
            async with stub_at(stats.address) as stub, asyncio.timeout(WAIT_SECONDS):
                while (await stub.GetStats(pb.GetStatsRequest(system=system))).stats.waiting_calls != number:
                    await asyncio.sleep(0.02)

        crowd = [await loads(names[0], *["minix"] * 5)]
        await waiting(3)
        # Another client is served meanwhile.
        quick = await loads(names[1], "bfs")
        assert [answer.load.call.errno for answer in (await quick.read()).responses] == [""]
        crowd += [await loads(name, "minix") for name in names[1:3]]
        await waiting(5)
        late = await loads(names[3], "bfs")
        error = await refused(late.read(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "no place left for token client-d" in (error.details() or "")
        assert retry_seconds(error) == 1
        await hand.give_up(2, "minix")
        answers = []
        for stream, number in zip(crowd, (5, 1, 1), strict=True):
            await stream.done_writing()
            found = [answer async for message in stream for answer in message.responses]
            assert len(found) == number
            answers += [answer.load.call.errno or answer.error.message for answer in found]
        assert set(answers) <= {"", "EEXIST", "EBUSY"}
    await hand.close()


async def test_a_request_of_a_cut_stream_keeps_its_place_until_its_call_ends(
    stats: Process, launch: Launch, tmp_path: Path, hand: Hand, system: str
) -> None:
    made = {name: new_token() for name in ("cutter", "other")}
    file = tmp_path / "tokens.toml"
    file.write_text("".join(entry(token, name, [Role.LOAD], ["*"]) for name, token in made.items()))
    # Of two places, of RPCs as of requests, one client may have one, and nobody the other one meanwhile.
    limits = ("--rpc-limit", "2", "--request-limit", "2", "--tokens", str(file))
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *limits)
    await hand.reserve(2, "minix")

    async def loads(channel: Any, module: str, request_id: str = "") -> Any:
        stream: Any = LoaderServiceStub(channel).LoadModules()
        load = loader_pb.LoadModuleRequest(system=system, module=module, request_id=request_id)
        await stream.write(loader_pb.LoadModulesRequest(requests=[loader_pb.ModuleRequest(load=load)]))
        return stream

    async with (
        open_channel(loader.address, None, token=made["cutter"]) as cutting,
        open_channel(loader.address, None, token=made["other"]) as loading,
    ):

        async def refusal() -> str:
            """Load as the other client; return what it is told, empty if it is served."""
            stream = await loads(loading, "bfs")
            try:
                await stream.read()
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return error.details() or ""
            finally:
                stream.cancel()
            return ""

        # One with an id is not interrupted when its client goes.
        cut = await loads(cutting, "minix", "goes on")
        async with stub_at(stats.address) as stub, asyncio.timeout(WAIT_SECONDS):
            while (await stub.GetStats(pb.GetStatsRequest(system=system))).stats.waiting_calls != 1:
                await asyncio.sleep(0.02)
        cut.cancel()
        async with asyncio.timeout(WAIT_SECONDS):
            # The stream's own place comes back when the loader has heard of the cut.
            while "RPCs in progress" in (told := await refusal()):
                await asyncio.sleep(0.02)
            assert "no place left for token other" in told
            await hand.give_up(2, "minix")
            while await refusal():
                await asyncio.sleep(0.02)
