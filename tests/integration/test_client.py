"""The client against servers that fail in every way that a server can; the services themselves are in tests/e2e."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from modpressure.addresses import expand_addresses
from modpressure.client import Client
from modpressure.client_errors import NoAnswer, ServerFailed, TimedOut, end_requests, rpc_errors
from modpressure.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    ModpressureError,
    NotFound,
    NotNow,
    OverLimit,
    Overloaded,
    Unavailable,
)
from modpressure.grpc_errors import translate_errors
from modpressure.grpc_server import GrpcServer
from modpressure.storm import StormResult, StormRun, split_workers
from modpressure.v1 import loader_service_pb2 as loader_pb
from modpressure.v1 import stats_service_pb2 as stats_pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceServicer, add_LoaderServiceServicer_to_server
from modpressure.v1.stats_service_pb2_grpc import StatsServiceServicer, add_StatsServiceServicer_to_server


@asynccontextmanager
async def serving(servicer: Any) -> AsyncIterator[str]:
    """Serve ``servicer`` on a free port; gives the address."""
    server = GrpcServer("127.0.0.1:0", grace_seconds=0)
    if isinstance(servicer, LoaderServiceServicer):
        server.add(servicer, add_LoaderServiceServicer_to_server, "modpressure.v1.LoaderService")
    else:
        server.add(servicer, add_StatsServiceServicer_to_server, "modpressure.v1.StatsService")
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


class Failing(StatsServiceServicer):  # type: ignore[misc]
    """Answers with the error it was told, as a service does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def GetStats(self, request: Any, context: Any) -> Any:
        async with translate_errors(context, "Stats.GetStats"):
            raise self.error


@pytest.mark.parametrize("kind", [AlreadyExists, BadRequest, Forbidden, NotFound, NotNow, OverLimit, Unavailable])
async def test_an_error_comes_back_as_it_was_raised(kind: type[ModpressureError]) -> None:
    async with (
        serving(Failing(kind("system 'x' is wrong", field="system"))) as address,
        Client(stats=address) as client,
    ):
        with pytest.raises(ModpressureError) as raised:
            await client.stats("x")
    assert type(raised.value) is kind
    assert raised.value.sentence == "system 'x' is wrong"
    assert raised.value.field == "system"


async def test_a_fault_inside_of_a_server_names_the_server() -> None:
    async with serving(Failing(KeyError("secret"))) as address, Client(stats=address) as client:
        with pytest.raises(ServerFailed) as raised:
            await client.stats()
    assert raised.value.sentence.startswith(f"stats_svc at {address} failed: ")
    assert "secret" not in raised.value.sentence


async def test_what_grpc_cancels_itself_is_no_answer_and_a_cancelled_task_stays_cancelled() -> None:
    """As grpc.aio cancels a call whose connection breaks while the end of the requests is told."""

    async def ask(is_waiting: asyncio.Event) -> None:
        with rpc_errors("loader_svc", "127.0.0.1:1"):
            is_waiting.set()
            await call

    for cancels_task in (False, True):
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        is_waiting = asyncio.Event()
        task = asyncio.create_task(ask(is_waiting))
        await is_waiting.wait()
        if cancels_task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
        else:
            call.cancel()
            with pytest.raises(NoAnswer, match=r"^no answer from loader_svc at 127\.0\.0\.1:1: the call was cut off$"):
                await task


async def test_the_end_of_requests_is_told_to_nobody_if_the_connection_is_gone() -> None:
    class Call:
        async def done_writing(self) -> None:
            raise grpc.aio.InternalError("Failed grpc_call_start_batch")

    await end_requests(Call())


async def test_nobody_there() -> None:
    async with serving(Failing(KeyError())) as address:
        pass
    async with Client(loaders=[address], stats=address) as client:
        with pytest.raises(NoAnswer, match=f"no answer from stats_svc at {address}: connection refused"):
            await client.stats()
        with pytest.raises(NoAnswer, match=f"no answer from loader_svc at {address}: connection refused"):
            await client.load("xfs")


async def test_a_name_that_stands_for_nothing() -> None:
    async with Client(stats="dns:///no-such-name.invalid:1") as client:
        with pytest.raises(NoAnswer, match="no-such-name"):
            await client.stats()
    with pytest.raises(NoAnswer, match=r"'no-such-name\.invalid'"):
        await expand_addresses(["dns:///no-such-name.invalid:1"])


async def test_the_wrong_service_at_the_address() -> None:
    async with serving(Failing(KeyError())) as address, Client(loaders=[address]) as client:
        with pytest.raises(ServerFailed, match=f"what answers at {address} is not loader_svc"):
            await client.load("xfs")


async def test_no_answer_in_time() -> None:
    class Slow(StatsServiceServicer):  # type: ignore[misc]
        async def GetStats(self, request: Any, context: Any) -> Any:
            await asyncio.Event().wait()

    async with serving(Slow()) as address, Client(stats=address, timeout_seconds=0.05) as client:
        with pytest.raises(TimedOut, match=f"stats_svc at {address} did not answer within 0.05 s"):
            await client.stats()


class Shaky:
    """Counts calls, and is away for the first two of each method."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    async def answer(self, method: str, context: Any, response: Any) -> Any:
        self.calls[method] = self.calls.get(method, 0) + 1
        if self.calls[method] <= 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away for a moment")
        return response


class ShakyStats(Shaky, StatsServiceServicer):  # type: ignore[misc]
    async def GetReport(self, request: Any, context: Any) -> Any:
        return await self.answer("GetReport", context, stats_pb.GetReportResponse(text="x"))

    async def CreateSystem(self, request: Any, context: Any) -> Any:
        return await self.answer("CreateSystem", context, stats_pb.CreateSystemResponse())

    async def WatchStats(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield await self.answer("WatchStats", context, stats_pb.WatchStatsResponse(stats=stats_pb.Stats(calls=7)))


class ShakyLoader(Shaky, LoaderServiceServicer):  # type: ignore[misc]
    async def GetModule(self, request: Any, context: Any) -> Any:
        return await self.answer("GetModule", context, loader_pb.GetModuleResponse())

    async def LoadModule(self, request: Any, context: Any) -> Any:
        return await self.answer("LoadModule", context, loader_pb.LoadModuleResponse())


async def test_reads_are_tried_again_and_nothing_else_is() -> None:
    stats, loader = ShakyStats(), ShakyLoader()
    async with (
        serving(stats) as stats_address,
        serving(loader) as loader_address,
        Client([loader_address], stats_address) as client,
    ):
        assert await client.report() == "x"
        assert [counters.calls async for counters in client.watch()] == [7]
        await client.module("xfs")
        with pytest.raises(Unavailable):
            await client.create_system("a")
        with pytest.raises(Unavailable):
            await client.load("xfs")
    assert stats.calls == {"GetReport": 3, "WatchStats": 3, "CreateSystem": 1}
    assert loader.calls == {"GetModule": 3, "LoadModule": 1}


async def test_single_loads_go_to_the_loaders_in_turn() -> None:
    class Counting(LoaderServiceServicer):  # type: ignore[misc]
        calls = 0

        async def LoadModule(self, request: Any, context: Any) -> Any:
            self.calls += 1
            return loader_pb.LoadModuleResponse()

    first, second = Counting(), Counting()
    async with serving(first) as one, serving(second) as two, Client([one, two]) as client:
        for _ in range(4):
            await client.load("xfs")
        await client.load("xfs", loader=two)
    assert (first.calls, second.calls) == (2, 3)


async def test_pages_are_put_together() -> None:
    class Paged(StatsServiceServicer):  # type: ignore[misc]
        async def ListSystems(self, request: Any, context: Any) -> Any:
            number = int(request.page_token or 0)
            token = str(number + 1) if number < 3 else ""
            # A page may be empty and not the last.
            systems = [] if number == 1 else [stats_pb.System(id=f"s{number}")]
            return stats_pb.ListSystemsResponse(systems=systems, next_page_token=token)

    async with serving(Paged()) as address, Client(stats=address) as client:
        assert [system.id async for system in client.systems()] == ["s0", "s2", "s3"]


class Watched(StatsServiceServicer):
    """Tells how many calls there are, and is cut off, or not there, in turn."""

    def __init__(self, ends: list[ModpressureError | None]) -> None:
        self.ends = ends
        self.asked = 0

    async def WatchStats(
        self, request: stats_pb.WatchStatsRequest, context: Any
    ) -> AsyncIterator[stats_pb.WatchStatsResponse]:
        """Tell the number, and end as it is said."""
        async with translate_errors(context, "Stats.WatchStats"):
            end = self.ends[self.asked]
            self.asked += 1
            if not isinstance(end, Overloaded):
                yield stats_pb.WatchStatsResponse(stats=stats_pb.Stats(calls=self.asked // 2))
            if end is not None:
                raise end


async def test_a_watch_goes_on_after_a_cut_and_tells_nothing_twice() -> None:
    away, full = Unavailable("stats_svc is stopping"), Overloaded("too many", retry_seconds=0.01)
    servicer = Watched([away, away, full, away, None])
    async with serving(servicer) as address, Client(stats=address) as client:
        assert [told.calls async for told in client.watch()] == [0, 1, 2]
    assert servicer.asked == 5


async def test_a_watch_ends_if_nobody_comes_back_in_time() -> None:
    servicer = Watched([Unavailable("stats_svc is stopping")])
    async with serving(servicer) as address, Client(stats=address, timeout_seconds=0.3) as client:
        watch = client.watch()
        assert (await anext(watch)).calls == 0
        servicer.ends += [Overloaded("too many", retry_seconds=9)]
        with pytest.raises(OverLimit, match="too many"):
            await anext(watch)
    async with Client(stats=address) as client:
        with pytest.raises(NoAnswer, match=f"no answer from stats_svc at {address}"):
            await anext(client.watch())


async def test_a_client_without_loaders_is_refused() -> None:
    with pytest.raises(BadRequest, match="at least one loader"):
        Client(loaders=[])


async def test_other_addresses_than_names_stay_as_they_are() -> None:
    addresses = ["127.0.0.1:5", "[::1]:5", "host:5", "unix:/run/x", "127.0.0.1:5"]
    assert await expand_addresses(addresses) == ["127.0.0.1:5", "[::1]:5", "host:5", "unix:/run/x"]


async def test_a_name_is_replaced_by_its_addresses_of_one_family() -> None:
    assert await expand_addresses(["dns:///localhost:50051"]) in (["127.0.0.1:50051"], ["[::1]:50051"])
    assert await expand_addresses(["dns:127.0.0.2:1", "dns:///127.0.0.1:1"]) == ["127.0.0.2:1", "127.0.0.1:1"]


def test_workers_are_split_evenly() -> None:
    assert split_workers(10, ["a", "b", "c"]) == {"a": 4, "b": 3, "c": 3}
    assert split_workers(2, ["a", "b", "c"]) == {"a": 1, "b": 1}
    assert split_workers(100_000, list("abcdefghij")) == dict.fromkeys("abcdefghij", 10_000)
    for workers, sentence in ((0, "^0 workers"), (-1, "^-1 workers"), (10**9, "^1000000000 workers")):
        with pytest.raises(BadRequest, match=sentence):
            split_workers(workers, ["a"])
    with pytest.raises(BadRequest, match="20001 workers are too many for 2 loaders"):
        split_workers(20_001, ["a", "b"])


class StormLoader(LoaderServiceServicer):  # type: ignore[misc]
    """A loader whose storms do what a test says; remembers what it was told."""

    def __init__(self, after_start: Callable[[Any], Any] | None = None) -> None:
        self.storm: Any = None
        self.told: list[str] = []
        self.ended = asyncio.Event()
        self.started = asyncio.Event()
        self.after_start = after_start

    async def RunStorm(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for request in requests:
                kind = request.WhichOneof("kind")
                self.told.append(kind)
                if kind == "storm":
                    self.storm = request.storm
                    async for response in self.prepare(context):
                        yield response
                elif kind == "start":
                    self.started.set()
                    yield loader_pb.RunStormResponse(progress=loader_pb.StormProgress(calls=3, active_workers=1))
                    if self.after_start is not None:
                        await self.after_start(context)
                        yield self.summary()
                        return
                else:
                    yield self.summary(stopped=True)
                    return
        finally:
            self.ended.set()

    async def prepare(self, context: Any) -> AsyncIterator[Any]:
        yield loader_pb.RunStormResponse(ready=loader_pb.StormReady(loader="l"))

    def summary(self, **fields: Any) -> Any:
        return loader_pb.RunStormResponse(
            summary=loader_pb.StormSummary(loader="l", workers=self.storm.workers, calls=self.storm.workers, **fields)
        )


async def done(context: Any) -> None:
    """End the storm at once."""


def storm(workers: int) -> loader_pb.Storm:
    return loader_pb.Storm(modules=["xfs"], workers=workers, operations=1, with_dependencies=True)


async def test_a_storm_gets_all_loaders_ready_and_starts_them_together() -> None:
    loaders = [StormLoader(done) for _ in range(3)]
    ready: list[str] = []
    async with serving(loaders[0]) as one, serving(loaders[1]) as two, serving(loaders[2]) as three:
        async with Client([one, two, three]) as client:
            run = StormRun(client, storm(8), on_ready=lambda address, _: ready.append(address))
            result = await run.run()
        assert ready[0] == one
        assert sorted(ready) == sorted([one, two, three])
        assert set(result.summaries) == {one, two, three}
    assert [loader.storm.workers for loader in loaders] == [3, 3, 2]
    assert [loader.storm.first_worker for loader in loaders] == [0, 3, 6]
    assert [loader.storm.with_dependencies for loader in loaders] == [True, False, False]
    assert all(loader.storm.await_start for loader in loaders)
    assert all(loader.told == ["storm", "start"] for loader in loaders)
    assert result.failures == {}
    assert not result.interrupted


async def test_what_a_loader_refuses_before_the_start_ends_the_storm_everywhere() -> None:
    class Refusing(StormLoader):
        async def prepare(self, context: Any) -> AsyncIterator[Any]:
            async with translate_errors(context, "Loader.RunStorm"):
                raise NotFound("there is no module 'xfs' here")
            yield

    good, bad = StormLoader(done), Refusing()
    async with serving(good) as one, serving(bad) as two, Client([one, two]) as client:
        with pytest.raises(NotFound, match="there is no module 'xfs' here"):
            await StormRun(client, storm(4)).run()
        async with asyncio.timeout(10):
            await good.ended.wait()
    assert good.told == ["storm"]


async def test_a_loader_that_is_lost_midway_is_a_failure_and_the_others_go_on() -> None:
    async def die(context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the machine is on fire")

    good, bad = StormLoader(done), StormLoader(die)
    async with serving(good) as one, serving(bad) as two, Client([one, two]) as client:
        result = await StormRun(client, storm(4)).run()
    assert list(result.summaries) == [one]
    assert list(result.failures) == [two]
    assert str(result.failures[two]) == f"no answer from loader_svc at {two}: the machine is on fire"


async def test_a_stop_is_told_to_all_and_what_was_counted_comes_back() -> None:
    loaders = [StormLoader(), StormLoader()]
    async with serving(loaders[0]) as one, serving(loaders[1]) as two, Client([one, two]) as client:
        run = StormRun(client, storm(4))
        task = asyncio.ensure_future(run.run())
        async with asyncio.timeout(10):
            await asyncio.gather(*(loader.started.wait() for loader in loaders))
            run.stop()
            result: StormResult = await task
    assert result.interrupted
    assert [summary.calls for summary in result.summaries.values()] == [2, 2]
    assert all(loader.told == ["storm", "start", "stop"] for loader in loaders)


async def test_a_stop_before_the_start_starts_nothing() -> None:
    asked = asyncio.Event()

    class Pondering(StormLoader):
        async def prepare(self, context: Any) -> AsyncIterator[Any]:
            asked.set()
            await asyncio.Event().wait()
            yield

    loader = Pondering()
    async with serving(loader) as address, Client([address]) as client:
        run = StormRun(client, storm(4))
        task = asyncio.ensure_future(run.run())
        async with asyncio.timeout(10):
            await asked.wait()
            run.stop()
            result = await task
            await loader.ended.wait()
    assert result.interrupted
    assert result.summaries == {}
    assert loader.told == ["storm"]
