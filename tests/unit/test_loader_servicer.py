"""What requests to a loader hold for as long as something is done for them, though their clients have gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest

from loader_svc import servicer
from loader_svc.loader import Loader
from loader_svc.memory import MemoryBudget
from loader_svc.servicer import LoaderServicer
from loader_svc.workers import FileWorkers
from modpressure.v1 import loader_service_pb2 as pb


class Context:
    """That of an RPC."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def add_done_callback(self, callback: Any) -> None:
        self.done.append(callback)

    async def abort_with_status(self, status: Any) -> NoReturn:
        raise grpc.aio.AbortError(status.details)

    async def cancel(self, task: asyncio.Task[Any]) -> None:
        """End the RPC as gRPC does when its client goes."""
        task.cancel()
        for callback in self.done:
            callback(self)
        with pytest.raises(asyncio.CancelledError):
            await task


def made_loader(**machine: Any) -> Any:
    identity = SimpleNamespace(decompressors=())
    plans = SimpleNamespace(identity=identity, image_limit_bytes=1 << 20)
    entry = SimpleNamespace(size_bytes=1000, compression="", path="xfs.ko")
    tree = SimpleNamespace(module=lambda name: entry, resolve_alias=lambda text: [text])
    return Loader(SimpleNamespace(plans=plans, **machine), tree, kmod=34)  # type: ignore[arg-type]


async def test_workers_of_a_cut_storm_keep_their_places_until_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()

    class Storm:
        """Its worker's call does not end when it is stopped."""

        plan = SimpleNamespace(workers=2, await_start=False)

        def __init__(self, loader: Any, message: Any) -> None:
            self._loader, self._stopped = loader, asyncio.Event()

        async def prepare(self) -> pb.StormReady:
            return pb.StormReady()

        async def run(self) -> pb.StormSummary:
            self._loader.begin(ended.wait())
            await self._stopped.wait()
            return pb.StormSummary()

        def stop(self) -> None:
            self._stopped.set()

        def progress(self) -> pb.StormProgress:
            return pb.StormProgress()

    monkeypatch.setattr(servicer, "Storm", Storm)
    # Of four one client may have two.
    monkeypatch.setattr(servicer, "MAX_WORKERS_AT_ONCE", 4)
    loader = made_loader()
    serving = LoaderServicer(loader, 1)

    async def messages() -> AsyncIterator[pb.RunStormRequest]:
        yield pb.RunStormRequest(storm=pb.Storm())
        await asyncio.Event().wait()

    async def begun() -> tuple[Context, asyncio.Task[None]]:
        """Run a storm; return when it has begun."""
        context, running = Context(), asyncio.Event()

        async def run() -> None:
            async for response in serving.RunStorm(messages(), context):
                if response.HasField("progress"):
                    running.set()

        task = asyncio.create_task(run())
        first = asyncio.create_task(running.wait())
        await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        return context, task

    context, task = await begun()
    await context.cancel(task)
    assert loader.in_flight == 1
    _, refused = await begun()
    assert refused.done()
    with pytest.raises(grpc.aio.AbortError, match="2 workers are more than there is room for"):
        await refused
    ended.set()
    await loader.drain()
    context, task = await begun()
    assert not task.done()
    await context.cancel(task)


async def test_describing_a_module_holds_memory_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ends = threading.Event(), threading.Event()

    def describe(*_: Any) -> pb.Module:
        begun.set()
        ends.wait()
        return pb.Module()

    monkeypatch.setattr(servicer, "describe_module", describe)
    loader = made_loader(budget=MemoryBudget(10_000), workers=FileWorkers(1))
    serving, context = LoaderServicer(loader, 1), Context()
    task = asyncio.create_task(serving.GetModule(pb.GetModuleRequest(module="xfs"), context))
    await asyncio.to_thread(begun.wait)
    taken_bytes = loader.machine.budget.taken_bytes
    assert taken_bytes
    await context.cancel(task)
    held_bytes = loader.machine.budget.taken_bytes
    ends.set()
    assert held_bytes == taken_bytes
    await loader.drain()
    assert not loader.machine.budget.taken_bytes
    loader.machine.workers.shutdown()
