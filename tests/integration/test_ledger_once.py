"""Once, and only once, in the ledger: processes that are over, calls that they abandon, and claims on request ids."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modpressure.errors import BadRequest, Forbidden, LeaseEnded, NotNow, OverLimit, Replaced
from modpressure.kernel.outcome import Outcome
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc import state
from stats_svc.ages import Ages
from stats_svc.claim_rows import STEP_CLAIMS
from stats_svc.housekeeping import CLAIM_SECONDS, INSTANCE_SECONDS, Housekeeping
from stats_svc.ledger import Ledger
from stats_svc.names import MAX_RECORD_BYTES
from stats_svc.rows import Commit, Retention, SystemRow
from stats_svc.store import SqlStore
from tests.integration.test_ledger import (
    DUPLICATE,
    INTERRUPTED,
    INVALID,
    PROCEED,
    SHARED,
    Bench,
    Loader,
    check,
    ended,
    enter,
    fail,
    interrupt,
    live,
    remove,
    reserve,
    said,
    settle,
    until,
)

LOST = pb.OperationResult.VERDICT_LOST


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    yield bench
    await bench.close()


async def connected(bench: Bench, *names: str) -> list[Loader]:
    """Connect loaders whose own calls have numbers beyond those that the tests give."""
    loaders = [Loader(bench, name) for name in names]
    for loader in loaders:
        loader.calls = 1000
        await loader.connect()
    return loaders


def counted(bench: Bench) -> SystemRow:
    system = bench.store.system("default")
    assert system is not None
    return system


def abandoned(bench: Bench) -> list[tuple[str, int, str]]:
    """Return loader, call and module of the calls that were abandoned."""
    calls = [event.call for event in bench.events() if event.call.outcome == call_pb2.OUTCOME_ABANDONED]
    return [(call.loader, call.call_id, call.module) for call in calls]


# --- leases, and what is over ---


async def test_calls_of_a_loader_that_is_gone_are_seen_and_never_counted(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1, "tree:kernel/fs/btrfs-old.ko.xz:0"))
    await a.ask(check(2, "xfs"))
    await a.ask(reserve(3, "kvm"))
    await a.ask(fail(4))
    await a.ask(reserve(5, "loop"))
    await a.ask(live(5, "loop"))
    a.disconnect()
    bench.end_leases()
    await settle(b)
    assert sorted(abandoned(bench)) == [("loader a", 1, "btrfs_old"), ("loader a", 2, "xfs"), ("loader a", 3, "kvm")]
    counters = counted(bench).counters
    assert (counters.abandoned_calls, counters.calls, counters.modcount) == (3, 2, 1)
    assert counted(bench).live_modules == 1
    # The same after a restart.
    await bench.crash()
    assert counted(bench).counters.abandoned_calls == len(abandoned(bench)) == 3


async def test_calls_of_a_loader_that_came_back_after_a_restart_and_is_gone_are_seen(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1, "tree:kernel/fs/btrfs-old.ko.xz:0"))
    await a.ask(check(2, "xfs"))
    await a.ask(reserve(3, "kvm"))
    await a.ask(check(4, "loop"))
    await a.ask(fail(4, module="loop"))
    await bench.crash()
    await b.connect()
    await a.connect()
    a.disconnect()
    bench.end_leases()
    await settle(b)
    assert sorted(abandoned(bench)) == [("loader a", 1, "btrfs_old"), ("loader a", 2, "xfs"), ("loader a", 3, "kvm")]
    counters = counted(bench).counters
    assert (counters.abandoned_calls, counters.calls) == (3, 1)


async def test_calls_that_a_database_has_never_heard_of_are_not_abandoned_there(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1, "tree:kernel/fs/btrfs-old.ko.xz:0"))
    elsewhere = a.hello()
    elsewhere.instance_id = "elsewhere"
    await bench.ledger.connect(elsewhere)
    await bench.ledger.connect(pb.Hello(instance_id="new", loader=elsewhere.loader))
    await settle(b)
    # Of its first stream, whose place that hello took.
    assert abandoned(bench) == [("loader a", 1, "btrfs_old")]
    assert [event.call.instance_id for event in bench.events()] == ["a"]


async def test_an_abandoned_call_is_not_called_what_no_module_can_be_called(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    for call_id, name in ((1, "two words\n"), (2, "y" * 70)):
        assert (await a.ask(check(call_id, name))).verdict == pb.OperationResult.VERDICT_INVALID
    a.disconnect()
    bench.end_leases()
    await settle(b)
    assert sorted(abandoned(bench)) == [("loader a", 1, ""), ("loader a", 2, "")]


async def test_a_call_that_ended_in_a_system_that_is_gone_is_not_abandoned_in_the_next_of_that_id(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await bench.ledger.create_system("other", 2)
    for operation in (check(1, "xfs"), fail(1)):
        operation.system = "other"
        answer = await a.ask(operation)
        if operation.HasField("check_name"):
            await bench.ledger.delete_system("other")
    assert answer.verdict == pb.OperationResult.VERDICT_INVALID
    await bench.ledger.create_system("other", 2)
    a.disconnect()
    bench.end_leases()
    await settle(b)
    row = bench.store.system("other")
    assert row is not None
    assert row.counters.abandoned_calls == 0


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (pb.Hello(calls=[pb.CallInFlight(system="a", inode="x" * 5000)]), "is longer than 4352 bytes"),
        (pb.Hello(calls=[pb.CallInFlight(system="a", module="two words")]), "'two words' is no name of a module"),
        (pb.Hello(calls=[pb.CallInFlight(system="a", module="x" * 65)]), "is no name of a module"),
        (pb.Hello(calls=[pb.CallInFlight(system="a" * 64)]), "is no system id"),
        (pb.Hello(requests=[pb.HeldRequest(system="a" * 64)]), "is no system id"),
        (
            pb.Hello(requests=[pb.HeldRequest(system="a", request=pb.RequestModule(name="x" * 56))]),
            "is longer than 55 bytes",
        ),
        (pb.Hello(former_instance_ids=["a", "x" * 65]), "is no instance id"),
        (
            pb.Hello(calls=[pb.CallInFlight()] * 60_000, requests=[pb.HeldRequest()] * 40_001),
            "100001 calls in flight are more than 100000",
        ),
        (pb.Hello(live_call_ids=range(1_000_001)), "1000001 live modules are more than 1000000"),
    ],
)
async def test_a_hello_that_makes_no_sense_is_refused(bench: Bench, hello: pb.Hello, message: str) -> None:
    await connected(bench, "a")
    hello.instance_id = hello.loader = "b"
    with pytest.raises(BadRequest, match=message):
        await bench.ledger.connect(hello)


async def test_a_gate_of_what_is_no_file_is_refused(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    refused = await a.ask(enter(1, "x" * 5000))
    assert refused.verdict == pb.OperationResult.VERDICT_INVALID
    assert "is longer than 4352 bytes" in refused.message


async def test_a_call_has_one_gate_which_is_free_when_its_loader_is_gone(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1, "first"))
    refused = await a.ask(enter(1, "second"))
    assert refused.verdict == pb.OperationResult.VERDICT_INVALID
    assert refused.message == "the call holds the gate of another file, and can't enter that of 'second'"
    twice = a.hello()
    twice.calls.add(system="default", call_id=1, inode="second")
    a.disconnect()
    await bench.ledger.connect(twice)
    await bench.ledger.connect(pb.Hello(instance_id="a2", loader="loader a"))
    for inode in ("first", "second"):
        assert said(await b.ask(enter(b.new_call(), inode))) == (PROCEED, "", False)


async def test_a_name_whose_loader_is_gone_before_and_after_a_restart_is_abandoned_once(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(1))
    await bench.crash()
    await b.connect()
    bench.end_leases()
    await settle(b)
    assert abandoned(bench) == [("loader a", 1, "xfs")]
    await bench.crash()
    await b.connect()
    bench.end_leases()
    await settle(b)
    assert abandoned(bench) == [("loader a", 1, "xfs")]


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_call_that_has_ended_is_not_abandoned_by_a_loader_that_was_not_told_and_said_hello(
    bench: Bench, restarted: bool
) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1))
    await a.ask(reserve(1))
    assert a._reader is not None
    a._reader.cancel()
    await a.send(live(1))
    await until(lambda: len(bench.events()) == 1)
    if restarted:
        await bench.crash()
        await b.connect()
    hello = a.hello()
    assert [call.call_id for call in hello.calls] == [1]
    await bench.ledger.connect(hello)
    # It is killed before it asks again, and nobody has to wait until that is noticed.
    entering = b.begin(enter(b.new_call()))
    await settle(b)
    assert entering.done()
    await bench.ledger.connect(pb.Hello(instance_id="a2", loader="loader a"))
    await settle(b)
    assert abandoned(bench) == []
    counters = counted(bench).counters
    assert (counters.calls, counters.abandoned_calls) == (1, 0)


async def test_a_call_whose_end_was_lost_with_stats_svc_is_abandoned_by_a_loader_that_said_hello(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(enter(1, "tree:kernel/fs/xfs/xfs.ko:0"))
    a.disconnect()
    await a.send(fail(1))
    await bench.crash()
    await b.connect()
    hello = a.hello()
    assert hello.calls[0].finish_sequence == 2
    await bench.ledger.connect(hello)
    waiting = b.begin(enter(b.new_call(), "tree:kernel/fs/xfs/xfs.ko:0"))
    await settle(b)
    assert not waiting.done()
    await bench.ledger.connect(pb.Hello(instance_id="a2", loader="loader a"))
    assert said(await waiting) == (PROCEED, "", True)
    assert abandoned(bench) == [("loader a", 1, "xfs")]


@pytest.mark.parametrize("restarted", [False, True])
async def test_who_comes_back_after_its_lease_is_refused_for_ever(bench: Bench, restarted: bool) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(1))
    a.disconnect()
    bench.end_leases()
    await settle(b)
    if restarted:
        await bench.crash()
    for _ in range(2):
        with pytest.raises(LeaseEnded, match="the lease of process a of loader 'loader a' has ended"):
            await a.connect()
    assert counted(bench).counters.calls == 0


async def test_a_silent_loader_that_promised_heartbeats_loses_its_lease_though_its_stream_stands(bench: Bench) -> None:
    [b] = await connected(bench, "b")
    session, welcome = await bench.ledger.connect(pb.Hello(instance_id="a", loader="a", heartbeats=True))
    assert welcome.lease_seconds == 10
    operation = reserve(1)
    operation.system = "default"
    await bench.ledger.submit(session, pb.OperationBatch(sequence=1, operations=[operation]))
    wait = b.begin(reserve(b.new_call()))
    for _ in range(3):
        bench.now_seconds += 9
        bench.ledger.hear(session)
        bench.ledger.expire_leases()
    await settle(b)
    assert not wait.done()
    bench.now_seconds += 10
    bench.ledger.expire_leases()
    assert said(await wait) == (DUPLICATE, "EBUSY", True)
    # What it had on its way when it fell asleep is not applied.
    late = live(1)
    late.system = "default"
    await bench.ledger.submit(session, pb.OperationBatch(sequence=2, operations=[late]))
    with pytest.raises(LeaseEnded):
        while True:
            await session.next_results()
    await settle(b)
    counters = counted(bench).counters
    assert (counters.calls, counters.abandoned_calls, counted(bench).live_modules) == (0, 1, 0)
    # Who promised nothing may be silent: it is from before there were heartbeats.
    bench.now_seconds += 100
    bench.ledger.expire_leases()
    await settle(b)


async def test_time_in_which_stats_svc_itself_stood_still_is_nobodys_silence(bench: Bench) -> None:
    session, _ = await bench.ledger.connect(pb.Hello(instance_id="a", loader="a", heartbeats=True))
    [b] = await connected(bench, "b")
    b.disconnect()
    bench.now_seconds += 100
    bench.ledger.excuse(95)
    bench.ledger.expire_leases()
    assert not session.closed
    await b.connect()
    bench.now_seconds += 5
    bench.ledger.expire_leases()
    assert session.closed


async def test_nor_is_time_in_which_it_stood_still_while_it_asked_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stats_svc.ledger.PING_SECONDS", 0.01)
    store = SqlStore(str(tmp_path / "stats.sqlite3"))
    asked, answers = threading.Event(), threading.Event()

    def ping() -> None:
        asked.set()
        answers.wait()

    loop, stood_seconds = asyncio.get_running_loop(), 0.0

    def now_seconds() -> float:
        return time.monotonic() + stood_seconds

    monkeypatch.setattr(loop, "time", now_seconds)
    ledger = Ledger(store, lease_seconds=50, clock=now_seconds)
    await ledger.start()
    session, _ = await ledger.connect(pb.Hello(instance_id="a", loader="a", heartbeats=True))
    monkeypatch.setattr(store, "ping", ping)

    def hear() -> bool:
        ledger.hear(session)
        return asked.is_set()

    await until(hear)
    answers.set()
    # As SIGSTOP would have it: nothing runs here, and all that was to happen meanwhile is due at once.
    stood_seconds = 100
    asked.clear()
    await until(asked.is_set)
    assert not session.closed
    await ledger.stop()
    store.close()


async def test_a_loader_is_not_silent_while_its_hello_is_committed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = threading.Event()
    commit = bench.faulty.commit

    def late(one: Commit) -> None:
        commits.wait()
        commit(one)

    monkeypatch.setattr(bench.faulty, "commit", late)
    connecting = asyncio.ensure_future(bench.ledger.connect(pb.Hello(instance_id="a", loader="a", heartbeats=True)))
    await until(lambda: bench.ledger.loaders == 1)
    bench.end_leases()
    commits.set()
    session, _ = await connecting
    bench.ledger.expire_leases()
    assert not session.closed


async def test_of_whom_less_is_known_than_it_was_told_begins_anew(bench: Bench) -> None:
    for _ in range(2):
        # However often it comes.
        with pytest.raises(LeaseEnded, match="process a of loader 'l' has done more than is known of it"):
            await bench.ledger.connect(pb.Hello(instance_id="a", loader="l", welcomed=True))
    await bench.ledger.connect(pb.Hello(instance_id="b", loader="l"))
    await bench.ledger.connect(pb.Hello(instance_id="b", loader="l", welcomed=True))
    with pytest.raises(LeaseEnded):
        await bench.ledger.connect(pb.Hello(instance_id="b", loader="l", welcomed=True, committed_sequence=1))
    await bench.crash()
    await bench.ledger.connect(pb.Hello(instance_id="b", loader="l", welcomed=True))
    with pytest.raises(LeaseEnded):
        await bench.ledger.connect(pb.Hello(instance_id="b", loader="l", welcomed=True, committed_sequence=1))


@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_new_process_of_the_same_name_ends_its_old_self_at_once(bench: Bench, is_connected: bool) -> None:
    [a] = await connected(bench, "a")
    await a.ask(reserve(1))
    old = a.session
    assert old is not None
    if not is_connected:
        a.disconnect()
    [b] = await connected(bench, "b")
    new, _ = await bench.ledger.connect(pb.Hello(instance_id="a2", loader="loader a"))
    # The name is free without waiting for the lease, and the old one's batches can't come in behind.
    assert (await b.ask(check(b.new_call()))).verdict == PROCEED
    late = live(1)
    late.system = "default"
    await bench.ledger.submit(old, pb.OperationBatch(sequence=2, operations=[late]))
    await settle(b)
    assert abandoned(bench) == [("loader a", 1, "xfs")]
    assert not new.closed
    await bench.crash()
    bench.end_leases()
    with pytest.raises(Replaced, match="another loader process named 'loader a' has taken the place of process a"):
        await a.connect()


@pytest.mark.parametrize("hello", [{"instance_id": "a"}, {"instance_id": "x", "loader": "loader a"}])
async def test_who_may_use_fewer_systems_is_not_taken_for_a_loader(bench: Bench, hello: dict[str, str]) -> None:
    [a] = await connected(bench, "a")
    await a.ask(reserve(1))
    session = a.session
    assert session is not None
    stranger = pb.Hello(**{"loader": "stranger", **hello})
    for restarted in (False, True):
        with pytest.raises(Forbidden, match="the token is for fewer systems than that of process a"):
            await bench.ledger.connect(stranger, ("ci-*",))
        if not restarted:
            assert not session.closed
            await bench.crash()
    await a.connect()
    assert (await a.ask(live(1))).verdict == PROCEED
    assert not abandoned(bench)
    # One that was renewed, with the same systems or more, goes on.
    await bench.ledger.connect(stranger, ("ci-*", "*"))
    assert session.closed


async def test_what_a_batch_asks_of_other_systems_is_refused_by_itself(bench: Bench) -> None:
    [b] = await connected(bench, "b")
    await bench.ledger.create_system("ci-1", 0)
    session, _ = await bench.ledger.connect(pb.Hello(instance_id="a", loader="a"), ("ci-*",))
    operations = [
        pb.Operation(call_id=1, system="default", reserve_name=pb.ReserveName(module="xfs")),
        pb.Operation(call_id=2, system="ci-1", reserve_name=pb.ReserveName(module="xfs")),
        pb.Operation(call_id=1, system="default", interrupt=pb.Interrupt()),
        pb.Operation(call_id=3, system="default", claim_request=pb.ClaimRequest(request_id="r")),
        pb.Operation(call_id=4, open_system=pb.OpenSystem()),
        # What says another one within, too.
        pb.Operation(
            call_id=5, system="ci-1", record_calls=pb.RecordCalls(calls=[call_pb2.Call(system="default", module="xfs")])
        ),
    ]
    for _ in range(2):
        # Asked again, it is answered alike.
        await bench.ledger.submit(session, pb.OperationBatch(sequence=1, operations=operations, has_claims=True))
        results = await session.next_results()
        assert results is not None and results.applied_sequence == 1
        assert {r.call_id: (r.verdict, r.forbidden, r.message) for r in results.results} == {
            2: (PROCEED, False, "")
        } | dict.fromkeys((1, 3, 4, 5), (INVALID, True, "the loader's token is not for system 'default'"))
        assert len(results.results) == 5
    assert (await b.ask(check(b.new_call(), "xfs"))).verdict == PROCEED, "nothing holds the name there"
    assert counted(bench).next_event_id == 1
    bench.ledger.disconnect(session)


async def test_of_whom_the_token_is_good_for_less_what_its_calls_held_elsewhere_is_given_back(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    session = a.session
    assert session is not None
    bench.ledger.allow(session, ("default", "ci-1"))
    await a.ask(reserve(1))
    bench.ledger.allow(session, ("default",))
    assert not session.closed, "it holds nothing elsewhere"
    with pytest.raises(
        LeaseEnded, match="the token of process a of loader 'loader a' is no longer for system 'default'"
    ):
        bench.ledger.allow(session, ("ci-1",))
    assert session.closed
    assert (await b.ask(check(b.new_call()))).verdict == PROCEED
    assert abandoned(bench) == [("loader a", 1, "xfs")]


async def test_a_hello_gives_back_no_gate_of_systems_that_the_token_is_not_for(bench: Bench) -> None:
    [b] = await connected(bench, "b")
    await bench.ledger.connect(pb.Hello(instance_id="a", loader="a"), ("ci-*",))
    held = pb.CallInFlight(system="default", call_id=1, inode="tree:/x.ko:0", module="x")
    await bench.ledger.connect(pb.Hello(instance_id="a", loader="a", calls=[held]), ("ci-*",))
    assert (await b.ask(enter(b.new_call(), "tree:/x.ko:0"))).verdict == PROCEED


async def test_who_may_use_fewer_systems_is_not_told_of_others_modules(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    for call_id, module in ((1, "xfs"), (2, "kvm")):
        await a.ask(reserve(call_id, module))
        await a.ask(live(call_id, module))
        if call_id == 1:
            a.disconnect()
            bench.end_leases()
            await settle(b)
            await a.begin_anew()
    stranger = pb.Hello(instance_id="x", loader="stranger", former_instance_ids=["a", "a+"])
    session, _ = await bench.ledger.connect(stranger, ("ci-*",))
    await b.ask(remove(b.new_call(), "xfs"))
    await b.ask(remove(b.new_call(), "kvm"))
    await settle(a)
    assert a.released == [1, 2]
    bench.ledger.disconnect(session)


async def test_a_loader_with_a_token_for_some_systems_is_known_after_a_restart(bench: Bench) -> None:
    session, _ = await bench.ledger.connect(pb.Hello(instance_id="a", loader="l"), ("def*",))
    operation = reserve(1)
    operation.system = "default"
    await bench.ledger.submit(session, pb.OperationBatch(sequence=1, operations=[operation]))
    await session.next_results()
    await bench.crash()
    with pytest.raises(Forbidden):
        await bench.ledger.connect(pb.Hello(instance_id="b", loader="l"), ("def*",))
    await bench.ledger.connect(pb.Hello(instance_id="a", loader="l"), ("def*",))
    # By now it has shown its token.
    await bench.ledger.connect(pb.Hello(instance_id="b", loader="l"), ("def*",))
    await bench.crash()
    bench.end_leases()
    await bench.ledger.connect(pb.Hello(instance_id="c", loader="l"), ("def*",))


async def test_modules_stay_with_the_process_that_went_on_as_a_new_instance(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    for call_id, module in ((1, "xfs"), (2, "kvm"), (3, "loop")):
        await a.ask(reserve(call_id, module))
        await a.ask(live(call_id, module))
    a.disconnect()
    bench.end_leases()
    assert (await b.ask(remove(b.new_call(), "xfs"))).verdict == PROCEED
    again = Loader(bench, "a2")
    again.former, again.live, again.calls = ["a"], {1, 2, 3}, 1000
    await again.connect()
    await settle(again)
    assert again.released == [1]
    await b.ask(remove(b.new_call(), "kvm"))
    await settle(again)
    assert again.released == [1, 2]
    await bench.crash()
    await b.connect()
    await b.ask(remove(b.new_call(), "loop"))
    again.disconnect()
    await again.connect()
    await settle(again)
    assert again.released == [1, 2, 3]


async def test_more_former_instances_than_make_sense_are_refused(bench: Bench) -> None:
    with pytest.raises(BadRequest, match="1001 former instances are more than 1000"):
        await bench.ledger.connect(pb.Hello(instance_id="a", loader="a", former_instance_ids=["x"] * 1001))


# --- claims ---


def claim(call_id: int, request_id: str = "r", digest: bytes = b"xfs") -> pb.Operation:
    return pb.Operation(call_id=call_id, claim_request=pb.ClaimRequest(request_id=request_id, digest=digest))


def request_module(call_id: int) -> pb.Operation:
    return pb.Operation(call_id=call_id, request_module=pb.RequestModule(name="xfs"))


def gives_up(call_id: int) -> pb.Operation:
    return pb.Operation(call_id=call_id, settle_claim=pb.SettleClaim(gives_up=True))


def part(operation: pb.Operation, claim: int, name: str = "", *, settles: bool = True) -> pb.Operation:
    """Make the end of a call part of a claimed request."""
    if operation.HasField("finish_call"):
        operation.finish_call.claim, operation.finish_call.part, operation.finish_call.settles = claim, name, settles
    else:
        operation.remove_module.claim = claim
    return operation


def parts(result: pb.OperationResult) -> list[tuple[str, str, int]]:
    """Return name, loader and event of the calls of a record."""
    return [
        (
            p.name,
            (p.call if p.HasField("call") else p.unload).loader,
            (p.call if p.HasField("call") else p.unload).event_id,
        )
        for p in result.record.parts
    ]


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_request_that_comes_again_anywhere_has_the_same_result(bench: Bench, restarted: bool) -> None:
    a, b = await connected(bench, "a", "b")
    assert said(await a.ask(claim(1))) == (PROCEED, "", False)
    await a.ask(reserve(2))
    event_id = (await a.ask(part(live(2), 1, "xfs"))).event_id
    if restarted:
        await bench.crash()
        for loader in (a, b):
            loader.disconnect()
            await loader.connect()
    for loader, call_id in ((a, 10), (b, 10)):
        result = await loader.ask(claim(call_id))
        assert result.verdict == SHARED
        assert parts(result) == [("xfs", "loader a", event_id)]
        assert result.record.parts[0].call.system == "default"
    assert counted(bench).counters.calls == 1
    # Another system has ids of its own, and one that is reset has none.
    await bench.ledger.create_system("other", 2)
    elsewhere = claim(11)
    elsewhere.system = "other"
    assert (await b.ask(elsewhere)).verdict == PROCEED
    await bench.ledger.reset_system("default")
    assert (await b.ask(claim(12))).verdict == PROCEED


@pytest.mark.parametrize("state", ["held", "settled", "settled before a restart"])
async def test_an_id_stands_for_one_request(bench: Bench, state: str) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    if state != "held":
        await a.ask(part(fail(2), 1))
    if "restart" in state:
        await bench.crash()
        await b.connect()
    result = await b.ask(claim(1, digest=b"kvm"))
    assert (result.verdict, result.message) == (
        INVALID,
        "request_id 'r' was used for another request; it stands for that one for a day",
    )


async def test_a_second_request_waits_for_the_first_and_can_be_interrupted(bench: Bench) -> None:
    a, b, c = await connected(bench, "a", "b", "c")
    await a.ask(claim(1))
    first, second = b.begin(claim(1)), c.begin(claim(1))
    await settle(b, c)
    await c.send(interrupt(1))
    assert (await second).verdict == INTERRUPTED
    assert not first.done()
    await a.ask(part(fail(2), 1, "xfs"))
    result = await first
    assert (result.verdict, result.waited, parts(result)) == (SHARED, True, [("xfs", "loader a", 1)])


async def test_who_waits_goes_on_where_a_loader_that_is_gone_had_stopped(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    await a.ask(part(fail(2, module="libcrc32c"), 1, "libcrc32c", settles=False))
    await a.ask(reserve(3))
    wait = b.begin(claim(1))
    await settle(b)
    a.disconnect()
    bench.end_leases()
    result = await wait
    # The one that was counted is not made again; the one that was not has been abandoned.
    assert (result.verdict, parts(result)) == (PROCEED, [("libcrc32c", "loader a", 1)])
    await b.ask(reserve(2))
    await b.ask(part(live(2), 1, "xfs"))
    assert [name for name, _, _ in parts(await b.ask(claim(3)))] == ["libcrc32c", "xfs"]
    counters = counted(bench).counters
    assert (counters.calls, counters.modcount, counters.abandoned_calls) == (2, 1, 1)


async def test_a_claim_outlives_a_restart_and_a_claim_that_nobody_holds_is_taken_over(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    await a.ask(part(fail(2, module="libcrc32c"), 1, "libcrc32c", settles=False))
    await bench.crash()
    await b.connect()
    # Its loader may come back: until then it holds the claim.
    wait = b.begin(claim(1))
    await settle(b)
    assert not wait.done()
    await b.send(interrupt(1))
    assert (await wait).verdict == INTERRUPTED
    bench.end_leases()
    # A crash before that is committed would leave the claim to its holder.
    await settle(b)
    await bench.crash()
    await b.connect()
    result = await b.ask(claim(2))
    assert (result.verdict, parts(result)) == (PROCEED, [("libcrc32c", "loader a", 1)])


async def test_a_request_that_could_not_be_carried_out_can_be_tried_again(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    wait = b.begin(claim(1))
    await settle(b)
    await a.ask(gives_up(1))
    assert said(await wait) == (PROCEED, "", True)
    await b.ask(gives_up(1))
    assert said(await a.ask(claim(2))) == (PROCEED, "", False)


async def test_a_call_without_its_claim_is_not_counted(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await a.ask(claim(1))
    await a.ask(gives_up(1))
    assert (await a.ask(part(fail(2), 1))).verdict == LOST
    assert (await a.ask(part(remove(3), 1))).verdict == LOST
    assert bench.events() == []


async def test_a_removal_is_settled_with_what_came_of_it(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(1))
    await a.ask(live(1))
    for request_id, errno in (("first", ""), ("second", "ENOENT")):
        await a.ask(claim(10, request_id))
        assert (await a.ask(part(remove(11), 10))).errno == errno
        again = await b.ask(claim(10, request_id))
        assert again.verdict == SHARED
        assert again.record.parts[0].unload.errno == errno
    assert counted(bench).counters.unloads == 1


async def test_a_batch_with_claims_that_comes_twice_is_answered_alike(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await a.ask(claim(1))
    first = await a.ask(part(fail(2), 1))
    for sequence, operation in ((2, part(fail(2), 1)),):
        answer = a.expect(2)
        await a.submit(sequence, operation)
        assert (await answer).event_id == first.event_id
    answer = a.expect(1)
    settle_again = pb.Operation(call_id=1, settle_claim=pb.SettleClaim())
    await a.submit(3, settle_again)
    assert (await answer).verdict == PROCEED
    assert counted(bench).counters.calls == 1


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        (claim(1, ""), "'' is no request id: 1 to 128 bytes"),
        (claim(1, "x" * 129), "is no request id: 1 to 128 bytes"),
        (claim(1, "a\0"), "is no request id: 1 to 128 bytes, printable"),
        (claim(1, digest=b"x" * 65), "a digest of 65 bytes is longer than 64"),
        (pb.Operation(call_id=1, settle_claim=pb.SettleClaim(result=b"x" * 65537)), "a result of 65537 bytes"),
    ],
)
async def test_a_claim_that_makes_no_sense_is_answered_by_a_sentence(
    bench: Bench, operation: pb.Operation, sentence: str
) -> None:
    [a] = await connected(bench, "a")
    result = await a.ask(operation)
    assert result.verdict == INVALID
    assert sentence in result.message


async def test_a_batch_must_say_that_it_has_claims(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    answer = a.expect(1)
    await a.submit(1, claim(1))
    assert (await answer).message == "the batch of call 1 does not say that it has claims"


async def test_what_a_claim_is_answered_with_is_bounded(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    for call_id in range(2, 99):
        long = fail(call_id)
        long.finish_call.call.worker = "x" * 16_000
        result = await a.ask(part(long, 1, settles=False))
        if result.verdict == INVALID:
            break
        assert result.verdict == PROCEED
    assert result.message == f"the record of request 'r' can't be longer than {MAX_RECORD_BYTES} bytes"
    assert counted(bench).counters.calls == call_id - 2 == 65
    # However it is that a part is long.
    too_long = [part(fail(99), 1, "x" * MAX_RECORD_BYTES), part(remove(100), 1)]
    too_long[1].remove_module.unload.worker = "x" * 16_000
    for operation in too_long:
        assert (await a.ask(operation)).verdict == INVALID
    # The claim goes on with what it has.
    await a.ask(part(fail(101), 1))
    assert len((await b.ask(claim(1))).record.parts) == 66


async def test_what_a_stream_is_told_at_once_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_TOLD_BYTES", 160_000)
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    waiting = await b.send(*(claim(b.new_call()) for _ in range(20)))
    await settle(b)
    long = fail(2)
    long.finish_call.call.worker = "x" * 16_000
    await a.ask(part(long, 1))
    asked = await b.send(*(claim(b.new_call()) for _ in range(20)))
    for answers in (waiting, asked):
        told = [await answer for answer in answers]
        assert [result.verdict for result in told] == 10 * [SHARED] + 10 * [LOST]
        # They are told when they ask again.
        assert len((await b.ask(claim(told[-1].call_id))).record.parts) == 1
    monkeypatch.setattr(state, "MAX_TOLD_BYTES", 1_000_000)
    names = [f"symbol{number}" for number in range(2000)]
    exports = pb.Exports(exports=[pb.Export(symbol=name, namespace="n" * 400) for name in names])
    formation = pb.Formation(exports=exports.SerializeToString())
    await a.ask(pb.Operation(call_id=3, reserve_name=pb.ReserveName(module="xfs", formation=formation)))
    finds = [pb.Operation(call_id=b.new_call(), find_symbols=pb.FindSymbols(symbols=names)) for _ in range(3)]
    found = [await answer for answer in await b.send(*finds)]
    assert [(result.verdict, len(result.found)) for result in found] == [(PROCEED, 2000), (PROCEED, 2000), (INVALID, 0)]


@pytest.mark.parametrize("field", ["symbol", "namespace"])
async def test_a_symbol_that_is_longer_than_any_is_refused(bench: Bench, field: str) -> None:
    [a] = await connected(bench, "a")
    export = pb.Export(symbol="s")
    setattr(export, field, "x" * 513)
    formation = pb.Formation(exports=pb.Exports(exports=[export]).SerializeToString())
    result = await a.ask(pb.Operation(call_id=1, reserve_name=pb.ReserveName(module="xfs", formation=formation)))
    assert result.verdict == INVALID and result.message.endswith("is longer than 512 characters")


async def test_a_loader_has_so_many_calls_in_flight_and_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_CALLS_IN_FLIGHT", 5)
    a, b = await connected(bench, "a", "b")
    begun = [enter(1), enter(2), reserve(3), claim(4), request_module(5)]
    begins = [a.begin(operation) for operation in begun]
    await settle(a)
    [instance, system] = [bench.ledger._state.instances["a"], bench.ledger._state.systems["default"]]
    for operation in (enter(6, "another"), check(7), reserve(8, "new"), claim(9, "s"), request_module(10)):
        refused = await a.ask(operation)
        assert (refused.verdict, refused.over_limit) == (INVALID, True)
        assert refused.message == "loader 'loader a' can't have more than 5 calls in flight"
    # Nothing of it is held, and nothing said in a hello.
    assert set(instance.calls) == {1, 2, 3} and set(instance.requests) == {4, 5}
    assert len(system.gate.held) == 1 and system.autoload.in_flight == 1 and system.claims.held == 1
    for more in (
        pb.Hello(calls=[pb.CallInFlight(system="default", call_id=6)]),
        pb.Hello(requests=[pb.HeldRequest(system="default", call_id=6)]),
    ):
        hello = a.hello()
        hello.MergeFrom(more)
        with pytest.raises(OverLimit, match="more than 5 calls in flight"):
            await bench.ledger.connect(hello)
    # Others have their own.
    assert (await b.ask(reserve(b.new_call(), "new"))).verdict == PROCEED
    # What is in flight goes on, and makes room when it ends.
    assert (await a.ask(check(1, "other"))).verdict == PROCEED
    ends = [
        fail(1),
        fail(3, reserved=True),
        pb.Operation(call_id=4, settle_claim=pb.SettleClaim()),
        pb.Operation(call_id=5, finish_request=pb.FinishRequest()),
    ]
    for number, end in enumerate(ends):
        assert (await a.ask(end)).verdict == PROCEED
        assert (await a.ask(check(20 + number, "other"))).verdict == PROCEED
        assert (await a.ask(check(30 + number, "other"))).over_limit
    assert all(begin.done() for begin in begins)


async def test_a_call_waits_for_one_claim_at_a_time(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    for number, request_id in ((1, "r"), (2, "s")):
        await a.ask(claim(number, request_id))
        waiting = b.begin(claim(1, request_id))
        await settle(b)
    for number in (1, 2):
        await a.ask(pb.Operation(call_id=number, settle_claim=pb.SettleClaim()))
    assert (await waiting).verdict == SHARED


async def test_a_call_is_one_systems(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await bench.ledger.create_system("other", 2)
    begun = [enter(1), claim(2), request_module(3)]
    for operation in begun:
        assert (await a.ask(operation)).verdict == PROCEED
        elsewhere = pb.Operation()
        elsewhere.CopyFrom(operation)
        elsewhere.system = "other"
        refused = await a.ask(elsewhere)
        assert refused.verdict == INVALID
        assert refused.message == f"call {operation.call_id} was begun in system 'default', not in 'other'"
    # Nor does it end there.
    ends = [
        fail(1),
        pb.Operation(call_id=2, settle_claim=pb.SettleClaim()),
        pb.Operation(call_id=3, finish_request=pb.FinishRequest()),
    ]
    for operation in ends:
        operation.system = "other"
        assert "was begun in system 'default'" in (await a.ask(operation)).message
    [instance, system] = [bench.ledger._state.instances["a"], bench.ledger._state.systems["default"]]
    assert set(instance.calls) == {1} and set(instance.requests) == {2, 3}
    refused = await a.ask(claim(2, "another"))
    assert refused.message == "call 2 holds a claim on another request id: 'r'"
    # A call that has ended in a way that makes no sense keeps nobody waiting.
    waiting = a.begin(enter(4))
    await settle(a)
    assert (await a.ask(fail(1, 99))).verdict == INVALID
    assert said(await waiting) == (PROCEED, "", True)
    assert len(system.gate.held) == 1
    assert not bench.ledger._state.systems["other"].has_calls_in_flight


async def test_signals_are_remembered_of_so_many_calls_and_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MAX_INTERRUPTED", 3)
    a, b = await connected(bench, "a", "b")
    await a.ask(claim(1))
    for call_id in range(10, 20):
        wait = b.begin(claim(call_id))
        await settle(b)
        await b.send(interrupt(call_id))
        assert (await wait).verdict == INTERRUPTED
    assert list(bench.ledger._state.instances["b"].interrupted) == [17, 18, 19]


async def test_claims_are_forgotten_after_a_day_some_at_a_time(tmp_path: Path) -> None:
    now_ns, steady_ns = 10**18, 0
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    await bench.ledger.stop()
    bench.ledger = Ledger(bench.faulty, wall_clock_ns=lambda: now_ns)
    await bench.ledger.start()
    ages = Ages(lambda: now_ns, lambda: steady_ns)
    house = Housekeeping(bench.store, bench.ledger.in_writer, keep_events=0, keep_days=0, ages=ages)
    [a] = await connected(bench, "a")
    for number in range(STEP_CLAIMS + 10):
        await a.send(claim(2 * number + 2, f"r{number}"))
        await a.send(part(fail(2 * number + 3), 2 * number + 2))
    await a.ask(claim(1, "held"))
    await settle_all(a)

    def pass_time(seconds: int) -> None:
        nonlocal now_ns, steady_ns
        steady_ns += seconds * 10**9
        now_ns += seconds * 10**9

    pass_time(CLAIM_SECONDS - 1)
    everything = [("default", f"r{number}") for number in range(STEP_CLAIMS + 10)]

    def left() -> int:
        return len(bench.store.find_claims(everything))

    assert not await bench.ledger.in_writer(house.step)
    # A clock that is put forward makes nothing old.
    now_ns += 2 * CLAIM_SECONDS * 10**9
    assert not await bench.ledger.in_writer(house.step)
    assert left() == STEP_CLAIMS + 10
    pass_time(CLAIM_SECONDS)
    assert await bench.ledger.in_writer(house.step)
    assert left() == 10
    assert not await bench.ledger.in_writer(house.step)
    assert left() == 0
    assert set(bench.store.find_claims([("default", "held"), ("default", "r1")])) == {("default", "held")}
    assert (await a.ask(claim(9999, "r1"))).verdict == PROCEED
    await bench.close()


async def settle_all(loader: Loader) -> None:
    await until(lambda: not loader.answers)


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_asks_and_dies_each_request_is_counted_once(bench: Bench, seed: int) -> None:
    """Clients send requests with ids again and again to loaders that die at any moment, until they have an answer."""
    rng = random.Random(seed)
    loaders: list[Loader] = []
    names = iter(range(10**6))
    answers: dict[str, int] = {}
    attempts = 0

    async def start() -> Loader:
        loader = Loader(bench, f"p{next(names)}")
        await loader.connect()
        loaders.append(loader)
        return loader

    async def kill(loader: Loader) -> None:
        loaders.remove(loader)
        loader.disconnect()
        for answer in loader.answers.values():
            answer.cancel()

    async def ask(loader: Loader, operation: pb.Operation) -> pb.OperationResult:
        """Ask a loader; whoever asks one that is dead by now is cut off like those who wait for it."""
        if loader not in loaders:
            raise asyncio.CancelledError
        return await loader.ask(operation)

    async def attempt(request_id: str) -> int:
        """Carry a request out on some loader, as one does; return the event of its call."""
        loader = rng.choice(loaders)
        held = loader.new_call()
        result = await ask(loader, claim(held, request_id))
        if result.verdict == SHARED:
            return result.record.parts[0].call.event_id
        assert result.verdict == PROCEED, result.message
        call = loader.new_call()
        if rng.random() < 0.5:
            await ask(loader, check(call, f"m{rng.randrange(3)}"))
        return (await ask(loader, part(fail(call, Outcome.KREAD), held))).event_id

    async def client(number: int) -> None:
        nonlocal attempts
        for step in range(15):
            request_id = f"{number}-{step}"
            tries = {asyncio.ensure_future(attempt(request_id)) for _ in range(rng.choice([1, 1, 2]))}
            while True:
                attempts += 1
                done, _ = await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
                results = {task.result() for task in done if not task.cancelled()}
                if results:
                    assert len(results) == 1
                    answers[request_id] = results.pop()
                    break
                tries = {task for task in tries if not task.done()} | {asyncio.ensure_future(attempt(request_id))}
            for task in tries:
                if not task.done():
                    results = {await task} if not (await asyncio.wait({task}))[0].pop().cancelled() else set()
                    assert results <= {answers[request_id]}

    for _ in range(3):
        await start()
    clients = [asyncio.create_task(client(number)) for number in range(6)]
    kills = 0
    while not all(task.done() for task in clients):
        floor = len(answers) + rng.randrange(1, 6)
        await until(lambda floor=floor: len(answers) >= floor or all(task.done() for task in clients))  # type: ignore[misc]
        await kill(rng.choice(loaders))
        kills += 1
        await start()
        bench.end_leases()
    await asyncio.gather(*clients)
    context = f"seed {seed}, {kills} kills, {attempts} attempts"
    events = [event.call for event in bench.events() if event.call.outcome != call_pb2.OUTCOME_ABANDONED]
    assert kills > 10, context
    assert len(answers) == 90, context
    assert sorted(answers.values()) == sorted(call.event_id for call in events), context
    assert counted(bench).counters.calls == 90, context


async def test_open_claims_are_requests_in_flight(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await a.ask(claim(1))
    with pytest.raises(NotNow):
        await bench.ledger.reset_system("default")
    await a.ask(part(pb.Operation(call_id=2, finish_call=pb.FinishCall(call=ended(Outcome.KREAD))), 1))
    await bench.ledger.reset_system("default")


# --- what is remembered of whom ---


async def test_loaders_that_come_and_go_leave_nothing_in_memory(bench: Bench) -> None:
    [b] = await connected(bench, "b")
    state = bench.ledger._state
    for number in range(20):
        # Each is the one before, which has a lease no more, and loads a module that stays.
        hello = pb.Hello(instance_id=f"p{number}", loader="p", former_instance_ids=[f"p{n}" for n in range(number)])
        session, _ = await bench.ledger.connect(hello)
        for sequence, operation in enumerate((reserve(1, f"m{number}"), live(1, f"m{number}")), 1):
            operation.system = "default"
            await bench.ledger.submit(session, pb.OperationBatch(sequence=sequence, operations=[operation]))
        await bench.ledger.finish(session)
        bench.ledger.disconnect(session, graceful=number % 2 == 0)
        bench.now_seconds += 11
        bench.ledger.hear(b.session) if b.session is not None else None
        bench.ledger.expire_leases()
        await settle(b)
    assert set(state.instances) == {"b"} and not state._heirs
    assert counted(bench).live_modules == 20
    # What is no more in memory is refused all the same.
    for name in ("p0", "p1", "p19"):
        with pytest.raises(LeaseEnded):
            await bench.ledger.connect(pb.Hello(instance_id=name, loader="p"))
    # Whoever owns modules by a former name is told, as long as it is there.
    session, _ = await bench.ledger.connect(
        pb.Hello(instance_id="p20", loader="p", former_instance_ids=["p3"], live_call_ids=[1])
    )
    await b.ask(remove(b.new_call(), "m3"))
    message = await session.next_results()
    assert message is not None and list(message.released_call_ids) == [1]


async def test_of_a_call_its_module_is_remembered_and_not_what_it_asked(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    exports = pb.Exports(exports=[pb.Export(symbol=f"symbol_{n}") for n in range(1000)]).SerializeToString()
    formation = pb.Formation(exports=exports)
    await a.ask(pb.Operation(call_id=1, reserve_name=pb.ReserveName(module="xfs", formation=formation)))
    await a.ask(pb.Operation(call_id=1, find_symbols=pb.FindSymbols(symbols=["x"])))
    await a.ask(pb.Operation(call_id=2, find_symbols=pb.FindSymbols(symbols=["x"])))
    instance = bench.ledger._state.instances["a"]
    assert instance.calls == {1: ("default", "xfs"), 2: ("default", "")}
    await a.ask(fail(1, reserved=True))
    await a.ask(fail(2))
    assert not instance.calls


async def test_processes_that_are_over_are_forgotten_after_a_week_unless_they_own_something(tmp_path: Path) -> None:
    now_ns, steady_ns = 10**18, 0
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    await bench.ledger.stop()
    bench.ledger = Ledger(bench.faulty, wall_clock_ns=lambda: now_ns)
    await bench.ledger.start()
    ages = Ages(lambda: now_ns, lambda: steady_ns)
    house = Housekeeping(bench.store, bench.ledger.in_writer, keep_events=0, keep_days=0, ages=ages)
    owner, idle = await connected(bench, "owner", "idle")
    await owner.ask(reserve(1))
    await owner.ask(live(1))
    for loader in (owner, idle):
        assert loader.session is not None
        bench.ledger.disconnect(loader.session, graceful=True)
    [b] = await connected(bench, "b")
    now_ns += 365 * 24 * 3600 * 10**9
    await bench.ledger.in_writer(house.step)
    assert bench.store.instance("idle") is not None
    now_ns += (INSTANCE_SECONDS + 1) * 10**9
    steady_ns += (INSTANCE_SECONDS + 1) * 10**9
    await bench.ledger.in_writer(house.step)
    assert bench.store.instance("idle") is None
    # One that is there, and one that would lose its modules, are not.
    known = bench.store.instance("b"), bench.store.instance("owner")
    assert all(known)
    with pytest.raises(LeaseEnded):
        await owner.connect()
    await settle(b)
    await bench.close()


# --- what is asked again after its events may have gone ---


async def removed_and_loaded_again(bench: Bench) -> tuple[Loader, Loader, int, int]:
    """Have a loader remove a module that another one loads again; return both, and batch and event of the removal."""
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(1))
    await a.ask(live(1))
    event_id = (await a.ask(remove(2))).event_id
    sequence = a.sequence
    await b.ask(reserve(1))
    await b.ask(live(1))
    a.disconnect()
    return a, b, sequence, event_id


async def asked_again(bench: Bench, *batches: tuple[int, pb.Operation]) -> list[pb.OperationResult]:
    """Have loader a open a stream, send batches, and break; return the answers, of which it reads none."""
    session, _ = await bench.ledger.connect(pb.Hello(instance_id="a", loader="loader a"))
    for sequence, operation in batches:
        operation.system = "default"
        await bench.ledger.submit(session, pb.OperationBatch(sequence=sequence, operations=[operation]))
    results: list[pb.OperationResult] = []
    while len(results) < len(batches):
        message = await session.next_results()
        assert message is not None
        results += message.results
    bench.ledger.disconnect(session)
    return results


async def prune_all(bench: Bench) -> None:
    """Let go of every event that need not be kept, as after a long outage."""
    while await bench.ledger.in_writer(lambda: bench.store.prune_events(Retention(1, 0, 8 * 10**18))):
        pass


async def test_what_a_loader_may_ask_again_is_kept_though_it_comes_back_before_it_asks(bench: Bench) -> None:
    _, b, sequence, event_id = await removed_and_loaded_again(bench)
    for _ in range(2):
        # The stream breaks before anything is asked, then after it, and the answer is lost once more.
        await asked_again(bench)
        await settle(b)
        await b.ask(fail(b.new_call()))
        await prune_all(bench)
        [again] = await asked_again(bench, (sequence, remove(2)))
        assert (again.verdict, again.event_id) == (PROCEED, event_id)
    assert (counted(bench).counters.unloads, counted(bench).live_modules) == (1, 1)


async def test_a_removal_is_done_once_though_more_was_done_since_and_its_event_is_gone(bench: Bench) -> None:
    """Two batches were sent again, and neither answer came: the first may have left nothing that is still kept."""
    _, b, sequence, event_id = await removed_and_loaded_again(bench)
    first, _ = await asked_again(bench, (sequence, remove(2)), (sequence + 1, fail(3)))
    assert first.event_id == event_id
    await b.ask(fail(b.new_call()))
    await prune_all(bench)
    assert event_id not in {event.event_id for event in bench.events()}
    again, _ = await asked_again(bench, (sequence, remove(2)), (sequence + 1, fail(3)))
    assert again.verdict == INVALID
    assert again.message == "what became of the removal by call 2 is not known any more: more was done since"
    assert (counted(bench).counters.unloads, counted(bench).live_modules) == (1, 1)
    # Of the last batch it is known: what left no event failed, and fails again.
    [failed] = await asked_again(bench, (sequence + 2, remove(4, "absent")))
    assert failed.errno == "ENOENT"
    assert (await asked_again(bench, (sequence + 2, remove(4, "absent"))))[0].errno == "ENOENT"
