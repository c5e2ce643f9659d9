"""What makes no sense is answered with a status that says so, and changes nothing: real services, real channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from modpressure.client import Client
from modpressure.errors import BadRequest
from modpressure.grpc_errors import MAX_SENTENCE_BYTES
from modpressure.v1 import ledger_service_pb2 as ledger_pb
from modpressure.v1 import loader_service_pb2 as loader_pb
from modpressure.v1 import stats_service_pb2 as stats_pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Hand, Launch, Process

LONG = 10_000_000
IDS = {
    "10 MB": "x" * LONG,
    "line feed": "a\nb",
    "NUL": "a\x00b",
    "escape sequence": "\x1b[2J",
    "right-to-left": "a\u202eb",
    "10 MB of four bytes a character": "\U0001f427" * (LONG // 4),
    "capital": "Default",
    "path": "../etc",
}


class Services:
    """Stubs of both services."""

    def __init__(self, loader: Any, stats: Any, hand: Hand) -> None:
        self.loader = loader
        self.stats = stats
        self.hand = hand


@pytest.fixture
async def services(loader: Process, stats: Process, hand: Hand) -> AsyncIterator[Services]:
    async with grpc.aio.insecure_channel(loader.address) as one, grpc.aio.insecure_channel(stats.address) as other:
        await LoaderServiceStub(one).ListModules(loader_pb.ListModulesRequest(page_size=1))
        yield Services(LoaderServiceStub(one), StatsServiceStub(other), hand)


async def storm(services: Services, system: str) -> None:
    asked = loader_pb.Storm(system=system, modules=["minix"], workers=1, mode=loader_pb.Storm.MODE_ONCE)
    await services.loader.RunStorm(iter([loader_pb.RunStormRequest(storm=asked)])).read()


async def many(services: Services, system: str) -> None:
    """One of many requests on a stream: its answer says what is wrong with it, the stream goes on."""
    load = loader_pb.LoadModuleRequest(system=system, module="minix")
    request = loader_pb.LoadModulesRequest(requests=[loader_pb.ModuleRequest(tag=7, load=load)])
    [answer] = (await services.loader.LoadModules(iter([request])).read()).responses
    assert answer.tag == 7
    assert answer.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    raise grpc.aio.AioRpcError(
        grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(), details=answer.error.message
    )


async def operation(services: Services, system: str) -> None:
    await services.hand.send([ledger_pb.Operation(call_id=1, system=system, open_system=ledger_pb.OpenSystem())])
    answer = await services.hand.answer()
    assert answer.verdict == ledger_pb.OperationResult.VERDICT_INVALID
    raise grpc.aio.AioRpcError(
        grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(), details=answer.message
    )


ASKS: dict[str, Callable[[Services, str], Awaitable[Any]]] = {
    "LoadModule": lambda s, id: s.loader.LoadModule(loader_pb.LoadModuleRequest(system=id, module="minix")),
    "UnloadModule": lambda s, id: s.loader.UnloadModule(loader_pb.UnloadModuleRequest(system=id, module="minix")),
    "RequestModule": lambda s, id: s.loader.RequestModule(loader_pb.RequestModuleRequest(system=id, name="minix")),
    "LoadModules": many,
    "RunStorm": storm,
    "GetReport": lambda s, id: s.stats.GetReport(stats_pb.GetReportRequest(system=id)),
    "WatchStats": lambda s, id: s.stats.WatchStats(stats_pb.WatchStatsRequest(system=id)).read(),
    "ListEvents": lambda s, id: s.stats.ListEvents(stats_pb.ListEventsRequest(system=id)),
    "CreateSystem": lambda s, id: s.stats.CreateSystem(stats_pb.CreateSystemRequest(system=stats_pb.System(id=id))),
    "ResetSystem": lambda s, id: s.stats.ResetSystem(stats_pb.ResetSystemRequest(system=id)),
    "DeleteSystem": lambda s, id: s.stats.DeleteSystem(stats_pb.DeleteSystemRequest(system=id)),
    "Connect": operation,
}


@pytest.mark.parametrize("rpc", ASKS)
async def test_a_system_id_that_makes_no_sense_is_named_and_changes_nothing(services: Services, rpc: str) -> None:
    before = await services.stats.ListSystems(stats_pb.ListSystemsRequest())
    for what, system in IDS.items():
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ASKS[rpc](services, system)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, what
        sentence = raised.value.details() or ""
        assert "is no system id: " in sentence or "is no id: " in sentence, what
        assert repr(system[:3])[1:-1] in sentence, what
        assert sentence.isprintable(), what
        assert len(sentence.encode()) <= MAX_SENTENCE_BYTES, what
    after = await services.stats.ListSystems(stats_pb.ListSystemsRequest())
    assert [system.id for system in after.systems] == [system.id for system in before.systems]


async def test_an_id_that_a_database_does_not_take_is_refused_and_others_are_served(
    launch: Launch, postgres_database: str
) -> None:
    stats = await asyncio.to_thread(launch, "stats_svc", "--listen", "127.0.0.1:0", "--database", postgres_database)
    loader = await asyncio.to_thread(launch, "loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    async with Client([loader.address], stats.address) as client:
        for request_id in ("\0", "a\nb"):
            with pytest.raises(BadRequest, match="is no request id") as refused:
                await client.load("minix", request_id=request_id)
            assert refused.value.field == "request_id"
        hand = Hand(stats.address, "hand", "default")
        await hand.open()
        claim = ledger_pb.ClaimRequest(request_id="\0")
        await hand.send([ledger_pb.Operation(call_id=2, system="default", claim_request=claim)])
        answer = await hand.answer()
        assert answer.verdict == ledger_pb.OperationResult.VERDICT_INVALID
        assert r"'\x00' is no request id" in answer.message
        await hand.close()
        assert not (await client.load("minix", request_id="1")).call.errno


TEXTS = ("x" * LONG, "\x1b]0;\x07", "a\nb")


@pytest.mark.parametrize("text", TEXTS, ids=["10 MB", "escape sequence", "line feed"])
async def test_so_is_any_other_text(services: Services, system: str, text: str) -> None:
    load, stats = services.loader, services.stats
    asks: dict[str, Awaitable[Any]] = {
        "module": load.LoadModule(loader_pb.LoadModuleRequest(system=system, module=text)),
        "unload": load.UnloadModule(loader_pb.UnloadModuleRequest(system=system, module=text)),
        "alias": load.RequestModule(loader_pb.RequestModuleRequest(system=system, name=text)),
        "get": load.GetModule(loader_pb.GetModuleRequest(module=text)),
        "page": stats.ListEvents(stats_pb.ListEventsRequest(page_token=text)),
        "storm": load.RunStorm(
            iter([loader_pb.RunStormRequest(storm=loader_pb.Storm(system=system, modules=[text], workers=1))])
        ).read(),
    }
    if len(text) == LONG:
        for field in ("worker", "requester", "request_id", "parameters"):
            request = loader_pb.LoadModuleRequest(system=system, module="minix", **{field: text})
            asks[field] = load.LoadModule(request)
    for what, asked in asks.items():
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asked
        assert raised.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (
            what,
            raised.value,
        )
        sentence = raised.value.details() or ""
        assert sentence.isprintable() and len(sentence.encode()) <= MAX_SENTENCE_BYTES, what
