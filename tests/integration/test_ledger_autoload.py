"""The kernel's requests for modules in the ledger: fifty places for all loaders, five seconds, and who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modpressure.errors import NotNow
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.systems import DEFAULT_SYSTEM
from tests.integration.test_ledger import FAILED, PROCEED, SHARED, Bench, Loader, connected, settle, until


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    yield bench
    await bench.close()


def request(call_id: int, name: str = "fs-xfs", *, merge: bool = False) -> pb.Operation:
    return pb.Operation(call_id=call_id, request_module=pb.RequestModule(name=name, merge=merge))


def finish(call_id: int, exit_status: int = 0) -> pb.Operation:
    return pb.Operation(call_id=call_id, finish_request=pb.FinishRequest(exit_status=exit_status))


async def fill(*loaders: Loader) -> None:
    """Take all fifty places, each loader as many."""
    for loader in loaders:
        for _ in range(50 // len(loaders)):
            answer = await loader.ask(request(loader.new_call()))
            assert (answer.verdict, answer.waited) == (PROCEED, False)


async def test_fifty_places_are_all_loaders_together(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await fill(a, b)
    waiting = b.begin(request(b.new_call()))
    await settle(b)
    assert bench.ledger.module_requests(DEFAULT_SYSTEM) == (51, 1)
    with pytest.raises(NotNow, match="calls are in flight"):
        await bench.ledger.reset_system(DEFAULT_SYSTEM)
    await a.ask(finish(1))
    answer = await waiting
    assert (answer.verdict, answer.waited) == (PROCEED, True)
    # An end that is told twice frees one place.
    await a.submit(a.sequence, finish(1))
    assert bench.ledger.module_requests(DEFAULT_SYSTEM) == (50, 0)


async def test_without_a_place_for_five_seconds_it_is_etime(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await fill(a)
    first = a.begin(request(a.new_call()))
    await settle(a)
    bench.now_seconds += 4
    second = a.begin(request(a.new_call()))
    await settle(a)
    bench.ledger.expire_requests()
    await settle(a)
    assert not first.done()
    bench.now_seconds += 1
    bench.ledger.expire_requests()
    answer = await first
    assert (answer.verdict, answer.errno) == (FAILED, "ETIME")
    await settle(a)
    assert not second.done()
    await a.ask(finish(1))
    assert (await second).verdict == PROCEED


async def test_a_timer_ends_the_wait(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await fill(a)
    # The clock stands still, but for what this test says; the timer is due by it at once.
    waiting = a.begin(request(a.new_call()))
    await settle(a)
    timer = bench.ledger._expiry
    assert timer is not None
    assert 4 < timer.when() - asyncio.get_running_loop().time() <= 5
    bench.now_seconds += 5
    timer._run()
    assert (await asyncio.wait_for(waiting, 30)).errno == "ETIME"
    assert bench.ledger._expiry is None


async def test_equal_names_share_one_result_over_all_loaders(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    owner = a.new_call()
    assert (await a.ask(request(owner, merge=True))).verdict == PROCEED
    waiting = b.begin(request(b.new_call(), merge=True))
    await settle(b)
    await a.ask(finish(owner, exit_status=1))
    answer = await waiting
    assert (answer.verdict, answer.exit_status, answer.waited) == (SHARED, 1, True)
    bench.now_seconds += 59
    assert (await b.ask(request(b.new_call(), merge=True))).verdict == SHARED
    bench.now_seconds += 1
    assert (await b.ask(request(b.new_call(), merge=True))).verdict == PROCEED


async def test_a_loader_that_is_gone_gives_its_places_back(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await fill(a)
    merged = [b.begin(request(b.new_call(), "x", merge=True)) for _ in range(2)]
    await settle(b)
    a.disconnect()
    bench.now_seconds += 10
    bench.ledger.expire_leases()
    done, waiting = await asyncio.wait(merged, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().verdict for task in done] == [PROCEED]
    await b.ask(finish(done.pop().result().call_id))
    assert [(await task).verdict for task in waiting] == [SHARED]
    assert bench.ledger.module_requests(DEFAULT_SYSTEM) == (0, 0)


async def test_places_and_waits_survive_a_crash(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await fill(a)
    waiting = b.begin(request(b.new_call()))
    await settle(b)
    await bench.crash()
    held = [
        pb.HeldRequest(system=DEFAULT_SYSTEM, call_id=call_id, request=pb.RequestModule(name="fs-xfs"))
        for call_id in range(1, 51)
    ]
    a.requests = held
    await a.connect()
    await b.connect()
    await settle(b)
    assert bench.ledger.module_requests(DEFAULT_SYSTEM) == (51, 1)
    await a.ask(finish(50))
    assert (await waiting).verdict == PROCEED
    await until(lambda: bench.ledger.module_requests(DEFAULT_SYSTEM) == (50, 0))
