"""Calls a second through one loader, client to commit, against an empty unary call of the same grpc.aio.

The same number of calls in flight on both sides; small modules, each loaded and unloaded in turn by one of the callers,
so half of the calls are loads and half unloads, and none is a duplicate.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf import empty_pb2

from bench.peers import EMPTY_METHOD
from bench.services import loader_service, service, stats_service
from bench.table import Row
from modpressure import aio
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

Metadata: TypeAlias = tuple[tuple[str, str], ...]

IN_FLIGHT = 64
CALLS = 64 * 60
ROUNDS = 5


async def calls_a_second(call: Callable[[int, int], Awaitable[None]], calls: int) -> float:
    """Let ``IN_FLIGHT`` callers make ``call(caller, number)`` until there were ``calls``; return calls a second."""
    each = calls // IN_FLIGHT

    async def caller(who: int) -> None:
        for number in range(each):
            await call(who, number)

    begun = time.perf_counter()
    await asyncio.gather(*map(caller, range(IN_FLIGHT)))
    return each * IN_FLIGHT / (time.perf_counter() - begun)


async def small_modules(stub: Any) -> list[str]:
    """Return the names of the smallest modules of the tree that use no other, one for each caller.

    One that another caller's module uses at that moment could not be unloaded.
    """
    listed = await stub.ListModules(pb.ListModulesRequest(page_size=10_000))
    names: list[str] = []
    for _, name in sorted((module.file_bytes, module.name) for module in listed.modules if module.file):
        if len(names) < IN_FLIGHT and not (await stub.GetModule(pb.GetModuleRequest(module=name))).module.depends:
            names.append(name)
    return names


def loads_and_unloads(stub: Any, modules: list[str], metadata: Metadata = ()) -> Callable[[int, int], Awaitable[None]]:
    """Return what has a caller load and unload its module in turn, one RPC each."""

    async def call(caller: int, number: int) -> None:
        module = modules[caller]
        if number % 2:
            unloaded = await stub.UnloadModule(pb.UnloadModuleRequest(module=module), metadata=metadata)
            _check(pb.ModuleResponse(unload=unloaded))
        else:
            loaded = await stub.LoadModule(pb.LoadModuleRequest(module=module), metadata=metadata)
            _check(pb.ModuleResponse(load=loaded))

    return call


async def streamed(stub: Any, modules: list[str], calls: int, metadata: Metadata = ()) -> float:
    """Return calls a second through one stream: each caller's next request leaves when its last is answered."""
    requests: asyncio.Queue[pb.LoadModulesRequest | None] = asyncio.Queue()

    async def outgoing() -> AsyncIterator[pb.LoadModulesRequest]:
        while (request := await requests.get()) is not None:
            yield request

    def request(caller: int, number: int) -> pb.ModuleRequest:
        module = modules[caller]
        if number % 2:
            return pb.ModuleRequest(tag=caller, unload=pb.UnloadModuleRequest(module=module))
        return pb.ModuleRequest(tag=caller, load=pb.LoadModuleRequest(module=module))

    each = calls // IN_FLIGHT
    done = [0] * IN_FLIGHT
    begun = time.perf_counter()
    await requests.put(pb.LoadModulesRequest(requests=[request(caller, 0) for caller in range(IN_FLIGHT)]))
    left = IN_FLIGHT
    async for response in stub.LoadModules(outgoing(), metadata=metadata):
        following = []
        for answer in response.responses:
            _check(answer)
            caller = answer.tag
            done[caller] += 1
            if done[caller] < each:
                following.append(request(caller, done[caller]))
            else:
                left -= 1
        if following:
            await requests.put(pb.LoadModulesRequest(requests=following))
        if not left:
            await requests.put(None)
    return each * IN_FLIGHT / (time.perf_counter() - begun)


def _check(answer: pb.ModuleResponse) -> None:
    errno = answer.load.call.errno or answer.unload.unload.errno or answer.error.message
    if errno:
        raise SystemExit(f"a call of the benchmark failed: {answer}")


async def measure() -> list[Row]:
    """Measure both roads in turn with the peer, and return their rows."""
    single: list[float] = []
    stream: list[float] = []
    figures: list[tuple[float, float, float]] = []
    with (
        stats_service() as stats,
        loader_service(stats, "catalogue") as loader,
        service("bench.peers", "empty") as peer,
    ):
        async with grpc.aio.insecure_channel(peer.address) as empty, grpc.aio.insecure_channel(loader.address) as main:
            nothing = empty.unary_unary(EMPTY_METHOD, empty_pb2.Empty.SerializeToString, empty_pb2.Empty.FromString)
            stub: Any = LoaderServiceStub(main)
            modules = await small_modules(stub)

            async def call_empty(caller: int, number: int) -> None:
                await nothing(empty_pb2.Empty())

            call_loader = loads_and_unloads(stub, modules)
            for number in itertools.count(-1):
                peer_rate = await calls_a_second(call_empty, CALLS)
                single_rate = await calls_a_second(call_loader, CALLS)
                stream_rate = await streamed(stub, modules, CALLS)
                if number >= 0:  # the first round warms up
                    single.append(single_rate / peer_rate)
                    stream.append(stream_rate / peer_rate)
                    figures.append((single_rate, stream_rate, peer_rate))
                if number + 1 == ROUNDS:
                    break
    middle = [sorted(column)[len(column) // 2] for column in zip(*figures, strict=True)]
    against = f"an empty unary call, {middle[2]:.0f}/s"
    return [
        Row(
            "single calls (load, unload in turn)", single, 0.35, "at least", against, f"{middle[0]:.0f} calls a second"
        ),
        Row("many-loads stream (the same calls)", stream, 1.0, "at least", against, f"{middle[1]:.0f} calls a second"),
    ]


def run() -> list[Row]:
    """Return the rows of this benchmark."""
    return aio.run(measure())
