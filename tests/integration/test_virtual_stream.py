"""A storm in virtual time whose calls a stats_svc counts, and the command that runs one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import open_tree
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.storm import StormRun, VirtualStorm, VirtualStormResult
from loader_svc.virtual.stream import BATCH_CALLS, Messages, Send, StatsTarget, streamed
from modpressure.cli.main import main
from modpressure.errors import Unavailable
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES
from modpressure.kernel.policy import V6_4
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch

EPOCH_NS = 1_700_000_000_000_000_000

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command line and returns its exit code and what it printed."""

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


async def test_stats_svc_counts_what_the_simulation_counts(launch: Launch, tmp_path: Path) -> None:
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"))
    storm = VirtualStorm(("xfs", "loop"), workers=700, cpus=64, once=True)
    tree = open_tree(catalogue_tree())
    messages = Messages(V6_4, EPOCH_NS)
    run = StormRun(storm, tree, 3)

    def simulate(send: Send) -> tuple[VirtualStormResult, VirtualMachine]:
        return run.run(lambda call: send(messages.of(call, "storm"))), run.machine

    result = await streamed(StatsTarget(stats.address, "virtual"), "storm", simulate)
    assert result.counters.calls == 1400 > BATCH_CALLS
    async with grpc.aio.insecure_channel(stats.address) as channel:
        stub = StatsServiceStub(channel)
        answer = (await stub.GetStats(stats_service_pb2.GetStatsRequest(system="virtual"))).stats
        for name in (*KERNEL_COUNTER_NAMES, "calls", "duplicates"):
            assert getattr(answer, name) == getattr(result.counters, name), name
        assert answer.peak_held_bytes == run.machine.areas.peak_bytes > 0
        listing = await stub.ListLoadedModules(stats_service_pb2.ListLoadedModulesRequest(system="virtual"))
        live, links = list(run.machine.modules), run.machine.links
        assert [(each.module, each.core_bytes) for each in listing.modules] == [(e.name, e.core_bytes) for e in live]
        assert [tuple(each.used_by) for each in listing.modules] == [links.users(entry.name) for entry in live]
        assert any(each.used_by for each in listing.modules)
        calls = []
        request = stats_service_pb2.ListEventsRequest(system="virtual", page_size=1000)
        while True:
            page = await stub.ListEvents(request)
            calls += [event.call for event in page.events]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    assert len(calls) == result.counters.calls
    assert {call.loader for call in calls} == {"storm"}
    assert {call.requester for call in calls} == {"storm"}
    ends = [call.start_time.ToNanoseconds() + call.duration_ns for call in calls]
    assert min(call.start_time.ToNanoseconds() for call in calls) >= EPOCH_NS
    assert max(ends) <= EPOCH_NS + 60 * 10**9
    live = [call for call in calls if call.outcome == call_pb2.OUTCOME_LIVE]
    assert all(call.mod_bytes and call.peak_held_bytes >= call.mod_bytes for call in live)
    assert any(call.wait_ns for call in calls)


async def test_a_stats_svc_that_is_away_is_named() -> None:
    def simulate(send: Send) -> None:
        raise AssertionError("not without a server")

    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 "):
        await streamed(StatsTarget("127.0.0.1:1", "virtual"), "storm", simulate)


def test_the_command_needs_no_server_and_tells_the_spread(run: Run) -> None:
    arguments = ("storm", "--virtual", "-m", "xfs,loop", "-w", "20", "--mode", "once", "--cpus", "4", "--seed", "5")
    code, out, err = run(*arguments, "--repeat", "3")
    assert (code, err) == (0, "")
    assert out.startswith("20 workers on 4 CPUs, xfs, loop; v6.4; 3 storms, seeds 5 to 7\n")
    assert run(*arguments, "--repeat", "3") == (code, out, err)
    document = json.loads(run(*arguments, "--repeat", "1", "--json")[1])
    (storm,) = document["storms"]
    assert storm["seed"] == 5
    assert storm["counters"]["modcount"] == 2
    assert storm["counters"]["duplicates"] == 38
    assert "That is one storm" in run(*arguments, "--repeat", "1")[1]


def test_the_command_records_its_calls(run: Run, launch: Launch, tmp_path: Path) -> None:
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "stats.sqlite3"))
    where = ("--stats", stats.address, "--system", "quick")
    code, out, err = run("storm", "--virtual", "-m", "xfs", "-w", "9", "--mode", "once", "--record", *where, "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)["storms"][0]["counters"]
    code, out, _ = run("stats", *where, "--json")
    counted = json.loads(out)
    assert code == 0
    for name in KERNEL_COUNTER_NAMES:
        assert int(counted.get(name, 0)) == first[name], name
    code, out, _ = run("events", *where, "--json")
    assert (code, len(out.splitlines())) == (0, 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cpus", "4"), "--cpus is for storms in virtual time: it needs --virtual"),
        (("--record",), "--record is for storms in virtual time: it needs --virtual"),
        (("--virtual", "--cpus", "0"), "0 is not between 1 and 65536"),
        (("--virtual", "--costs", "/nonexistent.toml"), "/nonexistent.toml can't be read"),
        (("--virtual", "--tree", "/nonexistent"), "/nonexistent"),
        (("--virtual", "-m", "nosuch"), "'nosuch' is not a module"),
        (("--virtual", "--record", "--stats", "127.0.0.1:1"), "stats_svc at 127.0.0.1:1 does not answer"),
    ],
)
def test_bad_input_is_named_in_one_sentence(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = run("storm", "-m", "xfs", *arguments)
    assert code in (1, 2)
    assert out == ""
    assert sentence in err
    assert len(err.splitlines()) == 1
