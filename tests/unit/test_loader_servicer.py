"""What requests to a loader hold for as long as something is done for them, though their clients have gone."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

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
