"""What services log of what they do: lines of JSON that say what they belong to."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from modpressure.v1 import call_pb2
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1 import stats_service_pb2 as stats_pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch, Process


def lines(process: Process, event: str) -> list[dict[str, Any]]:
    """Return the lines of an event; all lines must be JSON."""
    parsed = [json.loads(line) for line in process.lines]
    return [line for line in parsed if line["event"] == event]


@pytest.fixture
async def machine(launch: Launch, tmp_path: Path) -> AsyncIterator[tuple[Process, Process, Any, Any]]:
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"))
    loader = launch(
        *("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, "--name", "cpu-0"),
        *("--log-level", "debug"),
    )
    async with grpc.aio.insecure_channel(loader.address) as one, grpc.aio.insecure_channel(stats.address) as other:
        yield stats, loader, LoaderServiceStub(one), StatsServiceStub(other)


async def test_lines_of_a_call_say_which_request_system_loader_and_call(
    machine: tuple[Process, Process, Any, Any],
) -> None:
    stats, loader, load, _ = machine
    answers = [
        await load.LoadModule(pb.LoadModuleRequest(system="ci-1", module="minix", request_id=f"request-{number}"))
        for number in range(2)
    ]
    requests = [
        pb.ModuleRequest(tag=n, load=pb.LoadModuleRequest(system="ci-2", module="minix", request_id=f"many-{n}"))
        for n in range(2)
    ]
    stream = load.LoadModules(iter([pb.LoadModulesRequest(requests=requests)]))
    answers += [response.load async for message in stream for response in message.responses]
    with pytest.raises(grpc.aio.AioRpcError):
        await load.LoadModule(pb.LoadModuleRequest(system="ci-1", module="no-such", request_id="in vain"))
    with pytest.raises(grpc.aio.AioRpcError):
        await load.RunStorm(iter([])).read()
    assert loader.stop() == 0
    ended = lines(loader, "call ended")
    told = {
        (line["system"], line["request_id"], line["loader"], line["call"], line["outcome"], line["errno"])
        for line in ended
    }
    assert len(ended) == 4
    assert told == {
        (system, call.request_id, "cpu-0", call.call_id, call_pb2.Outcome.Name(call.outcome), call.errno)
        for system, call in zip(("ci-1", "ci-1", "ci-2", "ci-2"), (answer.call for answer in answers), strict=True)
    }
    assert {line["rpc"].rpartition("/")[2] for line in ended} == {"LoadModule", "LoadModules"}
    assert {line["client"] for line in ended} == {"127.0.0.1"}
    # One line for each RPC that failed.
    failed = lines(loader, "rpc failed")
    assert [(line["code"], line.get("system"), line.get("request_id"), line["loader"]) for line in failed] == [
        ("NOT_FOUND", "ci-1", "in vain", "cpu-0"),
        ("INVALID_ARGUMENT", None, None, "cpu-0"),
    ]
    assert "'no_such'" in failed[0]["sentence"] or "'no-such'" in failed[0]["sentence"]
    assert stats.stop() == 0


async def test_each_failed_rpc_of_stats_svc_is_one_line(machine: tuple[Process, Process, Any, Any]) -> None:
    stats, _, _, read = machine
    for system in ("nowhere", "a\nb"):
        with pytest.raises(grpc.aio.AioRpcError):
            await read.GetStats(stats_pb.GetStatsRequest(system=system))
    with pytest.raises(grpc.aio.AioRpcError):
        await read.WatchStats(stats_pb.WatchStatsRequest(system="nowhere")).read()
    await read.GetStats(stats_pb.GetStatsRequest())
    assert stats.stop() == 0
    # A line feed in a value makes no line of its own: each line was JSON.
    failed = [line for line in lines(stats, "rpc failed") if not line["rpc"].startswith("Ledger.")]
    assert [(line["code"], line["system"]) for line in failed] == [
        ("NOT_FOUND", "nowhere"),
        ("INVALID_ARGUMENT", "a\nb"),
        ("NOT_FOUND", "nowhere"),
    ]
