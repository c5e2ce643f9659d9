"""The stream of many requests, with a loader that answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from loader_svc.servicer import MAX_STREAM_IN_FLIGHT, _ManyRequests
from modpressure.shares import Places
from modpressure.v1 import loader_service_pb2 as pb


class QuickLoader:
    """Answers every request at once."""

    def __init__(self) -> None:
        self.begun = 0

    async def load(self, request: pb.LoadModuleRequest) -> pb.LoadModuleResponse:
        self.begun += 1
        return pb.LoadModuleResponse()


async def messages(count: int) -> AsyncIterator[pb.LoadModulesRequest]:
    for tag in range(count):
        yield pb.LoadModulesRequest(requests=[pb.ModuleRequest(tag=tag, load=pb.LoadModuleRequest(module="xfs"))])


async def test_for_who_reads_no_answers_no_more_is_begun() -> None:
    loader = QuickLoader()
    stream = _ManyRequests(loader, Places(2 * MAX_STREAM_IN_FLIGHT, "requests"), "a")  # type: ignore[arg-type]
    count = 3 * MAX_STREAM_IN_FLIGHT
    reader = asyncio.ensure_future(stream.read(messages(count)))
    answers = stream.answers(reader)
    for _ in range(2 * count):
        await asyncio.sleep(0)
    assert loader.begun == MAX_STREAM_IN_FLIGHT

    tags = [answer.tag async for some in answers for answer in some]
    assert sorted(tags) == list(range(count))
    await reader
