"""How many systems there may be: whoever would create one more is told so, and what is there goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from modpressure.client import Client
from modpressure.errors import AlreadyExists, OverLimit, Overloaded
from modpressure.v1 import call_pb2, loader_service_pb2
from modpressure.v1.loader_service_pb2 import LoadModuleRequest, ModuleRequest
from stats_svc.ledger import Ledger
from stats_svc.rows import Changes, Commit, SystemRow
from stats_svc.store import SqlStore
from tests.integration.test_imports import Sender, file_of
from tests.services import Launch


async def ids(client: Client) -> list[str]:
    return [system.id async for system in client.systems()]


async def storm_in(client: Client, system: str) -> None:
    storm = loader_service_pb2.Storm(system=system, modules=["minix"], workers=1, operations=1)
    call = client.loader_stub(client.loaders[0]).RunStorm()
    await call.write(loader_service_pb2.RunStormRequest(storm=storm))
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_one_system_too_many_is_refused_by_whatever_way_it_comes(launch: Launch, tmp_path: Path) -> None:
    database = str(tmp_path / "stats.sqlite3")
    with closing(SqlStore(database)) as store:
        store.load()
        there = [Changes(create=SystemRow(f"s{number}", 2, create_time_ns=5)) for number in range(4)]
        store.commit(Commit(1, there, []))
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", database, "--system-limit", "3")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    async with Client(loaders=[loader.address], stats=stats.address) as client:
        # All that were there are, and the one that is meant where none is said: without it there would be no start.
        assert await ids(client) == ["default", "s0", "s1", "s2", "s3"]
        assert (await client.load("minix", system="s3")).call.outcome == call_pb2.OUTCOME_LIVE
        with pytest.raises(AlreadyExists):
            await client.create_system("s3")
        file = [chunk async for chunk in client.export_system("s3")]
        ways: list[Callable[[], Awaitable[object]]] = [
            lambda: client.create_system("more"),
            lambda: client.import_system("more", file),
            # Whoever loads into a system that there is not has it created.
            lambda: client.load("minix", system="more"),
            lambda: client.load("minix", system="more", request_id="once"),
            lambda: client.request_module("minix", system="more"),
        ]
        sentence = "system 'more' can't be created: there are 5 systems, and stats_svc's system_limit is 3"
        for way in ways:
            with pytest.raises(OverLimit) as refused:
                await way()
            assert refused.value.sentence == sentence
            # Trying again does not help.
            assert not isinstance(refused.value, Overloaded)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await storm_in(client, "more")
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, sentence)
        requests = [
            ModuleRequest(tag=tag, load=LoadModuleRequest(module="minix", system=system))
            for tag, system in enumerate(("more", "s2"), 1)
        ]
        answers = {answer.tag: answer async for answer in client.load_many([requests])}
        error = answers[1].error
        assert (error.code, error.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], sentence)
        assert answers[2].load.call.outcome == call_pb2.OUTCOME_LIVE
        # What there is may be replaced and reset, and makes room when it goes.
        await client.import_system("s3", file, replace=True)
        await client.reset_system("s2")
        for system in ("s0", "s1"):
            await client.delete_system(system)
        with pytest.raises(OverLimit, match="there are 3 systems"):
            await client.load("minix", system="more")
        await client.delete_system("s2")
        assert (await client.load("minix", system="more")).call.outcome == call_pb2.OUTCOME_LIVE
        assert await ids(client) == ["default", "more", "s3"]


async def test_what_is_being_imported_has_its_place(tmp_path: Path) -> None:
    with closing(SqlStore(str(tmp_path / "stats.sqlite3"))) as store:
        ledger = Ledger(store, system_limit=2)
        await ledger.start()
        file = file_of(store, "default")
        sender = Sender(file)
        importing = asyncio.create_task(ledger.import_system(sender.rows(0), "imported", replace=False))
        await sender.wait(importing)
        with pytest.raises(OverLimit, match="there are 2 systems"):
            await ledger.create_system("created", 2)
        # One that is replaced has its place already.
        other = Sender(file)
        replacing = asyncio.create_task(ledger.import_system(other.rows(0), "default", replace=True))
        await other.wait(replacing)
        for one in (sender, other):
            one.go_on()
        rows: list[SystemRow] = await asyncio.gather(importing, replacing)
        assert [row.id for row in rows] == ["imported", "default"]
        await ledger.delete_system("imported")
        await ledger.create_system("created", 2)
        await ledger.stop()
