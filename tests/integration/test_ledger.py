"""The ledger, in this process over a real database, with clocks and faults of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modpressure.errors import AlreadyExists, BadRequest, LeaseEnded, NotFound, NotNow, Replaced, Unavailable
from modpressure.kernel.outcome import Outcome
from modpressure.operations import STEPS
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.events import EventFilter, EventLog
from stats_svc.group import OPERATION_BYTES
from stats_svc.ledger import Ledger
from stats_svc.rows import ClaimKey, ClaimRow, Commit, InstanceRow, SegmentKind, Snapshot, StoredSegment, StoreError
from stats_svc.session import Session
from stats_svc.store import SqlStore

PROCEED = pb.OperationResult.VERDICT_PROCEED
DUPLICATE = pb.OperationResult.VERDICT_DUPLICATE
SHARED = pb.OperationResult.VERDICT_SHARED
INTERRUPTED = pb.OperationResult.VERDICT_INTERRUPTED
FAILED = pb.OperationResult.VERDICT_FAILED
INVALID = pb.OperationResult.VERDICT_INVALID


class FaultyStore:
    """The real store, which fails as told."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store
        self.fail_before = False
        """Fail, having stored nothing."""

        self.fail_after = False
        """Store, and then fail: as a connection that breaks before the answer to a COMMIT."""

        self.commits = 0

    def load(self) -> Snapshot:
        if self.fail_before:
            raise StoreError("the disk is full")
        return self._store.load()

    def commit(self, commit: Commit) -> None:
        if self.fail_before:
            raise StoreError("the disk is full")
        self._store.commit(commit)
        self.commits += 1
        if self.fail_after:
            self.fail_after = False
            raise StoreError("the connection was lost")

    @property
    def leads_for_certain(self) -> bool:
        return self._store.leads_for_certain

    def ping(self) -> None:
        self._store.ping()

    def segments(
        self, system: str, *, after_event_id: int = 0, before_event_id: int | None = None,
        kind: SegmentKind | None = None, newest: bool, limit: int,
    ) -> list[StoredSegment]:  # fmt: skip
        return list(
            self._store.segments(
                system,
                after_event_id=after_event_id,
                before_event_id=before_event_id,
                kind=kind,
                newest=newest,
                limit=limit,
            )
        )

    def first_segment(self, instance_id: str) -> int:
        return self._store.first_segment(instance_id)

    def find_claims(self, keys: Collection[ClaimKey]) -> dict[ClaimKey, ClaimRow]:
        return self._store.find_claims(keys)

    def instance(self, instance_id: str) -> InstanceRow | None:
        return self._store.instance(instance_id)


@dataclass
class Bench:
    """A ledger, its store, and the clock that its leases go by."""

    path: Path
    store: SqlStore
    faulty: FaultyStore
    ledger: Ledger
    now_seconds: float = 1000.0
    available: list[bool] = field(default_factory=list)

    @classmethod
    async def open(cls, path: Path) -> Bench:
        store = SqlStore(str(path))
        faulty = FaultyStore(store)
        bench = cls(path, store, faulty, Ledger(faulty))
        await bench._start()
        return bench

    async def _start(self) -> None:
        self.ledger = Ledger(
            self.faulty, lease_seconds=10.0, clock=lambda: self.now_seconds, on_available=self.available.append
        )
        await self.ledger.start()

    def end_leases(self) -> None:
        """Let the time of a lease pass: it ends for who is away, or has been silent all that time."""
        self.now_seconds += 11
        self.ledger.expire_leases()

    async def crash(self) -> None:
        """Lose all that is in memory, and start again from the file, as after kill -9."""
        for task in self.ledger._tasks:
            task.cancel()
        await asyncio.gather(*self.ledger._tasks, return_exceptions=True)
        self.ledger._writer.shutdown()
        for session in list(self.ledger._sessions):
            session.close(Unavailable("killed"))
        self.store.close()
        self.store = SqlStore(str(self.path))
        self.faulty = FaultyStore(self.store)
        await self._start()

    async def close(self) -> None:
        await self.ledger.stop()
        self.store.close()

    def events(self, system: str = "default") -> list[call_pb2.Event]:
        page = EventLog(self.store).page(
            system, EventFilter(), limit=10**6, newest=False, after_event_id=0, before_event_id=0
        )
        assert page.last_event_id == 0
        return page.events


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    yield bench
    await bench.close()


class Loader:
    """The loader's side: numbers its batches, keeps them until they are done with, and sends them again."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench = bench
        self.name = name
        self.calls = 0
        self.sequence = 0
        self.session: Session | None = None
        self.released: list[int] = []
        self.deleted_systems: list[str] = []
        self.in_flight: dict[int, pb.CallInFlight] = {}
        self.live: set[int] = set()
        self.requests: list[pb.HeldRequest] = []
        self.former: list[str] = []
        self.batches: dict[int, dict[int, pb.Operation]] = {}
        """Unanswered operations by the sequence of their batch."""

        self.unacknowledged: dict[int, pb.OperationBatch] = {}
        self.answers: dict[int, asyncio.Future[pb.OperationResult]] = {}
        self.answered: Counter[int] = Counter()
        self.held_bytes = 0
        self._newest: Session | None = None
        self.said = 0
        """The last batch that was said on this stream."""

        self._turn = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    def hello(self) -> pb.Hello:
        """Return what it says first on a stream."""
        for sequence, unanswered in self.batches.items():
            for call_id, operation in unanswered.items():
                if operation.HasField("finish_call") and call_id in self.in_flight:
                    self.in_flight[call_id].finish_sequence = sequence
        return pb.Hello(
            instance_id=self.name,
            loader=f"loader {self.name}",
            calls=self.in_flight.values(),
            live_call_ids=self.live,
            requests=self.requests,
            former_instance_ids=self.former,
        )

    async def connect(self) -> int:
        """Open a stream, and ask again what is unanswered; return the sequence that it is welcomed with."""
        session, welcome = await self.bench.ledger.connect(self.hello())
        self._reader = asyncio.create_task(self._read(session))
        self._newest = session
        self.said = 0
        # Old numbers go first: what is asked meanwhile is kept, and its turn comes here.
        while sequence := min((n for n in {*self.unacknowledged, *self.batches} if n > self.said), default=0):
            self.said = sequence
            message = self.unacknowledged.get(sequence)
            unanswered = self.batches.get(sequence)
            if message is not None and sequence > welcome.applied_sequence:
                await self.bench.ledger.submit(session, message)
            else:
                self.unacknowledged.pop(sequence, None)
                if unanswered:
                    has_claims = any(operation.HasField("claim_request") for operation in unanswered.values())
                    again = pb.OperationBatch(sequence=sequence, operations=unanswered.values(), has_claims=has_claims)
                    await self.bench.ledger.submit(session, again)
        self.session = session
        return welcome.applied_sequence

    async def begin_anew(self) -> None:
        """Go on as a new instance, the lease of this one being over; what was unanswered is lost."""
        self.former.append(self.name)
        self.name += "+"
        self.sequence = 0
        for kept in (self.batches, self.unacknowledged, self.answers, self.in_flight):
            kept.clear()
        await self.connect()

    def disconnect(self) -> None:
        """Lose the stream; what is on its way is lost."""
        if self._reader is not None:
            self._reader.cancel()
        # Also one that is only being opened.
        if self._newest is not None:
            self.bench.ledger.disconnect(self._newest)
        self.session = self._newest = None

    async def _read(self, session: Session) -> None:
        try:
            while (results := await session.next_results()) is not None:
                self._take(results)
        except (Unavailable, LeaseEnded, Replaced):
            self.session = None

    def _take(self, results: pb.ResultBatch) -> None:
        for result in results.results:
            answer = self.answers.pop(result.call_id)
            for sequence, unanswered in list(self.batches.items()):
                operation = unanswered.pop(result.call_id, None)
                is_refused = result.verdict == pb.OperationResult.VERDICT_INVALID
                if operation is not None and operation.WhichOneof("kind") in STEPS and not is_refused:
                    call = self.in_flight.setdefault(
                        result.call_id, pb.CallInFlight(system=operation.system, call_id=result.call_id)
                    )
                    if operation.HasField("enter_gate") and result.verdict == PROCEED:
                        call.inode = operation.enter_gate.inode
                    call.module = operation.check_name.module or operation.reserve_name.module or call.module
                if operation is not None and operation.HasField("finish_call"):
                    self.in_flight.pop(result.call_id, None)
                    if result.verdict == PROCEED and operation.finish_call.call.outcome == call_pb2.OUTCOME_LIVE:
                        self.live.add(result.call_id)
                if not unanswered:
                    del self.batches[sequence]
            answer.set_result(result)
        for sequence in [s for s in self.unacknowledged if s <= results.applied_sequence]:
            del self.unacknowledged[sequence]
        self.released += results.released_call_ids
        self.live -= set(results.released_call_ids)
        self.deleted_systems += results.deleted_systems

    def new_call(self) -> int:
        self.calls += 1
        return self.calls

    async def send(
        self, *operations: pb.Operation, sequence: int | None = None
    ) -> list[asyncio.Future[pb.OperationResult]]:
        """Send operations as a batch, or keep them while there is no stream; return the answers to come."""
        self.sequence = sequence or self.sequence + 1
        for operation in operations:
            operation.system = operation.system or "default"
        batch = pb.OperationBatch(
            sequence=self.sequence,
            operations=operations,
            held_bytes=self.held_bytes,
            peak_held_bytes=self.held_bytes,
            has_claims=any(operation.HasField("claim_request") for operation in operations),
            answered_sequence=self._answered_before(self.sequence),
        )
        self.unacknowledged[self.sequence] = batch
        asks = {operation.call_id: operation for operation in operations if not operation.HasField("interrupt")}
        if asks:
            self.batches[self.sequence] = asks
        answers = [self.expect(call_id) for call_id in asks]
        # One after another, as they come out of a stream.
        async with self._turn:
            is_new = sequence is not None or batch.sequence > self.said
            if self.session is not None and not self.session.closed and is_new:
                self.said = batch.sequence
                await self.bench.ledger.submit(self.session, batch)
        return answers

    def _answered_before(self, sequence: int) -> int:
        """Return up to which batch before ``sequence`` all is answered that batches have ended."""
        ends = {"finish_call", "remove_module"}
        ending = (
            number
            for number, unanswered in self.batches.items()
            if ends & {operation.WhichOneof("kind") for operation in unanswered.values()}
        )
        return min(ending, default=sequence) - 1

    def expect(self, call_id: int) -> asyncio.Future[pb.OperationResult]:
        """Return the next answer to come for a call."""
        answer = self.answers[call_id] = asyncio.get_running_loop().create_future()
        return answer

    async def ask(self, operation: pb.Operation) -> pb.OperationResult:
        [answer] = await self.send(operation)
        return await answer

    async def submit(self, sequence: int, *operations: pb.Operation) -> None:
        """Send a batch as it is."""
        for operation in operations:
            operation.system = operation.system or "default"
        assert self.session is not None
        await self.bench.ledger.submit(self.session, pb.OperationBatch(sequence=sequence, operations=operations))

    def begin(self, operation: pb.Operation) -> asyncio.Task[pb.OperationResult]:
        return asyncio.create_task(self.ask(operation))


async def until(condition: Callable[[], bool]) -> None:
    """Return when something is so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def settle(*loaders: Loader) -> None:
    """Return when all that was asked so far has been applied, committed and answered as far as it can be."""
    for loader in loaders:
        call_id = loader.new_call()
        await asyncio.wait_for(
            loader.ask(pb.Operation(call_id=call_id, system="default", read_initstate=pb.ReadInitstate(module="-"))), 10
        )


def enter(call_id: int, inode: str = "inode") -> pb.Operation:
    return pb.Operation(call_id=call_id, enter_gate=pb.EnterGate(inode=inode))


def check(call_id: int, module: str = "xfs") -> pb.Operation:
    return pb.Operation(call_id=call_id, check_name=pb.CheckName(module=module))


def reserve(call_id: int, module: str = "xfs") -> pb.Operation:
    return pb.Operation(call_id=call_id, reserve_name=pb.ReserveName(module=module))


def interrupt(call_id: int) -> pb.Operation:
    return pb.Operation(call_id=call_id, interrupt=pb.Interrupt())


def ended(outcome: int, module: str = "xfs", errno: str = "", *, duplicate: bool = False) -> call_pb2.Call:
    return call_pb2.Call(
        module=module,
        outcome=call_pb2.Outcome.ValueType(outcome),
        syscall=call_pb2.SYSCALL_FINIT_MODULE,
        errno=errno,
        duplicate=duplicate,
        image_bytes=1000,
        mod_bytes=8192 if outcome == Outcome.LIVE else 0,
        text_bytes=4096 if outcome == Outcome.LIVE else 0,
    )


def live(call_id: int, module: str = "xfs") -> pb.Operation:
    finish = pb.FinishCall(call=ended(Outcome.LIVE, module), core_bytes=4096, reserved=True)
    return pb.Operation(call_id=call_id, finish_call=finish)


def fail(call_id: int, outcome: int = Outcome.LOAD, module: str = "xfs", *, reserved: bool = False) -> pb.Operation:
    duplicate = not reserved and outcome in (Outcome.BECOMING, Outcome.LOAD)
    finish = pb.FinishCall(
        call=ended(outcome, module, "EEXIST" if duplicate else "ENOENT", duplicate=duplicate), reserved=reserved
    )
    return pb.Operation(call_id=call_id, finish_call=finish)


def kread(call_id: int, **fields: str) -> pb.Operation:
    call = call_pb2.Call(module="xfs", outcome=call_pb2.OUTCOME_KREAD, **fields)  # type: ignore[arg-type]
    return pb.Operation(call_id=call_id, finish_call=pb.FinishCall(call=call))


def remove(call_id: int, module: str = "xfs") -> pb.Operation:
    return pb.Operation(call_id=call_id, remove_module=pb.RemoveModule(unload=call_pb2.Unload(module=module)))


async def connected(bench: Bench, *names: str) -> list[Loader]:
    loaders = [Loader(bench, name) for name in names]
    for loader in loaders:
        await loader.connect()
    return loaders


def said(result: pb.OperationResult) -> tuple[int, str, bool]:
    return (result.verdict, result.errno, result.waited)


# --- what the kernel does, across loaders ---


async def test_one_load_from_check_to_unload(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    call = a.new_call()
    assert said(await a.ask(check(call))) == (PROCEED, "", False)
    assert said(await a.ask(reserve(call))) == (PROCEED, "", False)
    result = await a.ask(live(call))
    assert (result.verdict, result.event_id) == (PROCEED, 1)
    result = await a.ask(remove(a.new_call()))
    assert (result.verdict, result.event_id) == (PROCEED, 2)
    assert a.released == [call]
    assert said(await a.ask(remove(a.new_call()))) == (FAILED, "ENOENT", False)
    loaded, unloaded = bench.events()
    assert (loaded.call.instance_id, loaded.call.loader, loaded.call.call_id) == ("a", "loader a", call)
    assert (unloaded.unload.module, unloaded.unload.loader, unloaded.event_id) == ("xfs", "loader a", 2)
    system = bench.store.system("default")
    assert system is not None
    counters = system.counters
    assert (counters.modcount, counters.calls, counters.unloads, counters.total_mod_size) == (1, 1, 1, 8192)


@pytest.mark.parametrize(("succeeds", "errno"), [(True, "EEXIST"), (False, "EBUSY")])
async def test_a_call_of_another_loader_waits_for_the_name(bench: Bench, succeeds: bool, errno: str) -> None:
    a, b, c = await connected(bench, "a", "b", "c")
    first, second, third = a.new_call(), b.new_call(), c.new_call()
    await a.ask(reserve(first))
    waits = [b.begin(check(second)), c.begin(reserve(third))]
    await settle(a, b, c)
    assert not any(wait.done() for wait in waits)
    await a.ask(live(first) if succeeds else fail(first, reserved=True))
    for wait in waits:
        assert said(await wait) == (DUPLICATE, errno, True)
    await b.ask(fail(second, Outcome.BECOMING))
    await c.ask(fail(third, Outcome.LOAD))
    found = bench.store.report("default")
    assert found is not None
    [failed] = [row.module for row in found[1]]
    assert (failed.module, failed.becoming_count, failed.load_count, failed.wasted_bytes) == ("xfs", 1, 1, 3000)
    assert found[0].counters.duplicates == 2


async def test_the_gate_shares_one_result_across_loaders(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    first, second, third = a.new_call(), b.new_call(), b.new_call()
    await a.ask(enter(first))
    wait = b.begin(enter(second))
    assert said(await b.ask(enter(third, "another inode"))) == (PROCEED, "", False)
    await settle(a, b)
    assert not wait.done()
    await a.ask(fail(first, Outcome.BECOMING))
    assert said(await wait) == (SHARED, "EEXIST", True)
    assert said(await b.ask(enter(b.new_call()))) == (PROCEED, "", False)


async def test_a_signal_ends_a_wait(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    holder, waiter, gate_holder, gate_waiter = (a.new_call() for _ in range(4))
    await a.ask(reserve(holder))
    await a.ask(enter(gate_holder))
    waits = [a.begin(check(waiter)), a.begin(enter(gate_waiter))]
    await settle(a)
    await a.send(interrupt(waiter), interrupt(gate_waiter), interrupt(holder))
    for wait in waits:
        assert said(await wait) == (INTERRUPTED, "EINTR", True)
    assert said(await a.ask(check(waiter + 100, "kvm"))) == (PROCEED, "", False)


async def test_a_signal_is_not_forgotten_if_its_answer_is_lost(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await b.ask(reserve(b.new_call()))
    call = a.new_call()
    a.begin(check(call))
    await settle(a)
    sequence = max(a.batches)
    a.disconnect()
    hello = pb.Hello(instance_id="a", loader="a")
    session, _ = await bench.ledger.connect(hello)
    batch = pb.OperationBatch(sequence=a.sequence + 1, operations=[interrupt(call)])
    batch.operations[0].system = "default"
    await bench.ledger.submit(session, batch)
    bench.ledger.disconnect(session)
    # The answer went nowhere. It asks again what it had asked first.
    a.unacknowledged.clear()
    assert list(a.batches) == [sequence]
    answer = a.answers[call]
    await a.connect()
    assert said(await answer) == (INTERRUPTED, "EINTR", True)


async def test_a_module_is_unloaded_by_whomever_and_its_owner_is_told(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    # delete_module looks for modules that are formed.
    assert said(await b.ask(remove(b.new_call()))) == (FAILED, "ENOENT", False)
    await a.ask(live(call))
    assert (await b.ask(remove(b.new_call()))).verdict == PROCEED
    await settle(a)
    assert (a.released, b.released) == ([call], [])


async def test_an_owner_who_was_away_is_told_when_it_comes_back(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    await a.ask(live(call))
    a.disconnect()
    await b.ask(remove(b.new_call()))
    await a.connect()
    await settle(a)
    assert a.released == [call]


async def test_an_owner_is_told_of_what_was_unloaded_before_stats_svc_was_killed(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    unloaded, kept = a.new_call(), a.new_call()
    for call, name in ((unloaded, "kvm"), (kept, "xfs")):
        await a.ask(reserve(call, name))
        await a.ask(live(call, name))
    a.disconnect()
    await b.ask(remove(b.new_call(), "kvm"))
    await bench.crash()
    await a.connect()
    await settle(a)
    assert a.released == [unloaded]


async def test_who_learns_late_that_its_module_went_live_learns_that_it_is_gone_again(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    operation = live(call)
    operation.system = "default"
    assert a.session is not None
    await bench.ledger.submit(a.session, pb.OperationBatch(sequence=a.sequence + 1, operations=[operation]))
    a.disconnect()
    assert (await b.ask(remove(b.new_call()))).verdict == PROCEED
    # Its answer was lost, so it does not know yet that it has anything to lose.
    await a.connect()
    assert (await (await a.send(live(call)))[0]).verdict == PROCEED
    await settle(a)
    assert a.released == [call]


async def test_a_call_that_ended_before_a_reset_is_not_counted_after_it(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    call = a.new_call()
    sequence = a.sequence + 1
    await a.ask(fail(call))
    await bench.ledger.reset_system("default")
    # What is counted once is counted once whoever remembers it.
    await bench.crash()
    a.disconnect()
    await a.connect()
    answer = a.expect(call)
    await a.submit(sequence, fail(call))
    result = await answer
    assert (result.verdict, result.message) == (
        INVALID,
        f"call {call} left nothing: it was refused, or system 'default' was reset since it ended",
    )
    assert bench.events() == []


async def test_whether_a_module_is_live_can_be_read_without_waiting(bench: Bench) -> None:
    [a] = await connected(bench, "a")

    async def is_live() -> bool:
        operation = pb.Operation(call_id=a.new_call(), read_initstate=pb.ReadInitstate(module="xfs"))
        return (await a.ask(operation)).live

    assert not await is_live()
    call = a.new_call()
    await a.ask(reserve(call))
    assert not await is_live()
    await a.ask(live(call))
    assert await is_live()


# --- what makes no sense ---


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        (pb.Operation(call_id=1, system="absent", check_name=pb.CheckName(module="x")), "no system 'absent'"),
        (check(1, ""), "'' is no name of a module"),
        (reserve(1, "a b"), "'a b' is no name of a module"),
        (reserve(1, "nul\0"), "is no name of a module"),
        (check(1, "x" * 1000), r"x'\.\.\. \(1000 characters\) is no name"),
        (live(1), "call 1 can't be live: it has not inserted 'xfs'"),
        (fail(1, 0), "there is no outcome number 0"),
        (fail(1, 9), "there is no outcome number 9"),
        (pb.Operation(call_id=1, open_system=pb.OpenSystem(), system="Bad"), "'Bad' is no system id"),
        (pb.Operation(call_id=1), "asks nothing that is known here"),
        (
            pb.Operation(
                call_id=1, finish_call=pb.FinishCall(call=call_pb2.Call(outcome=call_pb2.OUTCOME_LOAD, image_bytes=-1))
            ),
            "image_bytes -1 is no size",
        ),
        (kread(1, value="v" * (16 << 10)), "a call of 16[0-9]{3} bytes is longer than 16384"),
        (kread(1, errno="E" * 33), "is no name of an errno"),
        (
            pb.Operation(call_id=1, record_calls=pb.RecordCalls(calls=[call_pb2.Call(file="f" * (16 << 10))])),
            "is longer than 16384",
        ),
        (
            pb.Operation(
                call_id=1, remove_module=pb.RemoveModule(unload=call_pb2.Unload(module="xfs", worker="w" * (16 << 10)))
            ),
            "is longer than 16384",
        ),
    ],
)
async def test_an_operation_that_makes_no_sense_is_answered_by_a_sentence(
    bench: Bench, operation: pb.Operation, sentence: str
) -> None:
    [a] = await connected(bench, "a")
    if operation.finish_call.call.outcome == call_pb2.OUTCOME_LIVE:
        operation.finish_call.reserved = False
    result = await a.ask(operation)
    assert result.verdict == INVALID
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(result.message)
    # Nothing has happened, and the stream goes on.
    await settle(a)
    assert bench.events() == []


async def test_a_record_with_one_bad_call_is_refused_whole(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    good = ended(Outcome.BECOMING, duplicate=True)
    bad = ended(Outcome.BECOMING, module="bad name", duplicate=True)
    for call in (bad, ended(42)):
        record = pb.RecordCalls(calls=[good, call])
        assert (await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))).verdict == INVALID
    assert bench.events() == []
    record = pb.RecordCalls(calls=[good] * 3)
    assert (await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))).verdict == PROCEED
    assert [event.call.instance_id for event in bench.events()] == ["a"] * 3
    system = bench.store.system("default")
    assert system is not None
    assert (system.counters.failed_becoming, system.counters.invalid_becoming_bytes) == (3, 3000)


async def test_modules_that_went_live_elsewhere_are_listed_and_stay_so(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    xfs = pb.RecordedModule(module="xfs", core_bytes=4096, formation=pb.Formation(uses=[pb.Use(module="libcrc32c")]))
    exporter = pb.RecordedModule(module="libcrc32c", core_bytes=8192, formation=pb.Formation())
    record = pb.RecordModules(modules=[exporter, xfs], peak_held_bytes=99)
    strange = pb.RecordedModule(module="ext4", formation=pb.Formation(exports=b"\xff"))
    for bad in (
        pb.RecordModules(modules=[*record.modules, pb.RecordedModule(module="bad name")]),
        pb.RecordModules(modules=[*record.modules, pb.RecordedModule(module="ext4", core_bytes=-1)]),
        pb.RecordModules(modules=[*record.modules, strange]),
        pb.RecordModules(modules=record.modules, peak_held_bytes=-1),
    ):
        assert (await a.ask(pb.Operation(call_id=a.new_call(), record_modules=bad))).verdict == INVALID

    def listed() -> list[tuple[str, int, str]]:
        rows = bench.store.modules("default", before_position=None, limit=10)
        return [(row.name, row.core_bytes, row.loader) for row in rows]

    assert listed() == []
    for _ in range(2):
        assert (await a.ask(pb.Operation(call_id=a.new_call(), record_modules=record))).verdict == PROCEED
        assert listed() == [("xfs", 4096, "loader a"), ("libcrc32c", 8192, "loader a")]
        assert dict(bench.store.users("default", ["libcrc32c", "xfs"])) == {"libcrc32c": ["xfs"]}
        assert bench.ledger.peak_held_bytes("default") == 99
        await bench.crash()
        await a.connect()
    # The rules of a list hold for them: who is used can't be unloaded, the other one can.
    for name, errno in (("libcrc32c", "EWOULDBLOCK"), ("xfs", ""), ("libcrc32c", "")):
        unload = pb.RemoveModule(unload=call_pb2.Unload(module=name))
        assert (await a.ask(pb.Operation(call_id=a.new_call(), remove_module=unload))).errno == errno


@pytest.mark.parametrize(
    "hello",
    [
        pb.Hello(),
        pb.Hello(instance_id="x" * 65),
        pb.Hello(instance_id="a\0"),
        pb.Hello(instance_id="a", loader="l" * 129),
    ],
)
async def test_a_hello_that_makes_no_sense_is_refused(bench: Bench, hello: pb.Hello) -> None:
    with pytest.raises(BadRequest):
        await bench.ledger.connect(hello)
    assert bench.ledger.loaders == 0


# --- exactly once ---


async def test_a_batch_that_comes_twice_is_applied_once_and_answered_twice(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    call = a.new_call()
    await a.ask(reserve(call))
    first = await a.ask(live(call))
    # The answer was lost: it asks again, under the old number.
    answer = a.expect(call)
    await a.submit(2, live(call))
    again = await answer
    assert (again.verdict, again.event_id) == (PROCEED, first.event_id)
    assert len(bench.events()) == 1


async def test_a_removal_that_is_asked_again_does_not_remove_what_came_after_it(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    first = a.new_call()
    await a.ask(reserve(first))
    await a.ask(live(first))
    removal = a.new_call()
    sequence = a.sequence + 1
    event_id = (await a.ask(remove(removal))).event_id
    # As if the answer had been lost.
    a.batches[sequence] = {removal: remove(removal)}
    second = a.new_call()
    await a.ask(reserve(second))
    await a.ask(live(second))
    answer = a.expect(removal)
    await a.submit(sequence, remove(removal))
    assert (await answer).event_id == event_id
    # Once it is said to be answered nobody looks for it, and still nothing is removed.
    await a.ask(fail(a.new_call()))
    answer = a.expect(removal)
    await a.submit(sequence, remove(removal))
    assert (await answer).message == (
        f"what became of the removal by call {removal} is not known any more: more was done since"
    )
    assert a.released == [first]


async def test_a_call_that_has_ended_can_take_hold_of_nothing_by_an_old_question(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    call = a.new_call()
    await a.ask(enter(call))
    await a.ask(fail(call, Outcome.KREAD))
    await a.submit(1, enter(call))
    await settle(a)
    assert said(await a.ask(enter(a.new_call()))) == (PROCEED, "", False)


async def test_missing_batches_are_an_error(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    with pytest.raises(BadRequest, match="batch 3 follows batch 0: those in between are missing"):
        await a.send(check(1), sequence=3)
    with pytest.raises(BadRequest, match="0 is no sequence"):
        await a.submit(0)


async def test_what_changes_nothing_durable_is_answered_without_a_commit(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    commits = bench.faulty.commits
    for _ in range(5):
        call = a.new_call()
        await a.ask(check(call))
        await a.ask(enter(call, f"inode {call}"))
    assert bench.faulty.commits == commits
    await a.ask(reserve(a.new_call()))
    assert bench.faulty.commits == commits + 1


async def test_after_a_crash_batches_that_were_not_stored_may_be_missing(bench: Bench) -> None:
    # They were answered without a commit, so this process never heard of them, and the loader is done with them.
    [a] = await connected(bench, "a")
    waiter, holder = a.new_call(), a.new_call()
    await a.ask(enter(holder))
    wait = a.begin(enter(waiter))
    for _ in range(3):
        await a.ask(check(a.new_call()))
    await bench.crash()
    assert await a.connect() < a.sequence
    await a.ask(check(a.new_call()))
    await a.ask(fail(holder, Outcome.KREAD))
    assert (await wait).verdict == SHARED


async def test_a_reservation_survives_a_crash(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    await bench.crash()
    for loader in (b, a):
        await loader.connect()
    wait = b.begin(reserve(b.new_call()))
    await settle(b)
    assert not wait.done()
    await a.ask(live(call))
    assert said(await wait) == (DUPLICATE, "EEXIST", True)


async def test_the_hello_gives_the_gates_back_after_a_crash(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(enter(call))
    await bench.crash()
    await a.connect()
    await b.connect()
    wait = b.begin(enter(b.new_call()))
    await settle(b)
    assert not wait.done()
    await a.ask(fail(call, Outcome.BECOMING))
    assert (await wait).verdict == SHARED


async def test_what_was_answered_is_not_looked_through_for_what_is_asked_again(
    bench: Bench, decoded: list[int]
) -> None:
    a, b = await connected(bench, "a", "b")
    for _ in range(40):
        await b.ask(fail(b.new_call()))
    holder = a.new_call()
    await a.ask(reserve(holder))
    waits = [b.begin(check(b.new_call())) for _ in range(5)]
    # So that it is stored that those before it were applied.
    await b.ask(fail(b.new_call()))
    await bench.crash()
    for loader in (a, b):
        await loader.connect()
    await settle(b)
    assert not any(wait.done() for wait in waits)
    assert len(decoded) <= 1
    await a.ask(live(holder))
    for wait in waits:
        assert said(await wait) == (DUPLICATE, "EEXIST", True)


async def test_a_newer_stream_of_the_same_process_ends_the_older(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    old = a.session
    assert old is not None
    await a.connect()
    with pytest.raises(Unavailable, match="another stream"):
        await old.next_results()
    assert bench.ledger.loaders == 1
    bench.ledger.disconnect(old)
    assert bench.ledger.loaders == 1


# --- leases ---


async def test_a_loader_that_stays_away_loses_what_its_calls_held(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    done, holder, gate_holder = a.new_call(), a.new_call(), a.new_call()
    await a.ask(reserve(done, "kvm"))
    await a.ask(live(done, "kvm"))
    await a.ask(reserve(holder))
    await a.ask(enter(gate_holder))
    name_wait = b.begin(reserve(b.new_call()))
    first_gate, second_gate = b.new_call(), b.new_call()
    gate_wait, later_gate_wait = b.begin(enter(first_gate)), b.begin(enter(second_gate))
    await settle(b)
    a.disconnect()
    bench.now_seconds += 9.9
    bench.ledger.expire_leases()
    await settle(b)
    assert not name_wait.done() and not gate_wait.done()
    bench.now_seconds += 0.2
    bench.ledger.expire_leases()
    # As if the load had failed; there is no result to share, so the first waiter works.
    assert said(await name_wait) == (DUPLICATE, "EBUSY", True)
    assert said(await gate_wait) == (PROCEED, "", True)
    await settle(b)
    assert not later_gate_wait.done()
    await b.ask(fail(first_gate, Outcome.KREAD))
    assert (await later_gate_wait).verdict == SHARED
    # What was live stays, and is free to be unloaded.
    assert [row.name for row in bench.store.modules("default", before_position=None, limit=9)] == ["kvm"]
    assert (await b.ask(remove(b.new_call(), "kvm"))).verdict == PROCEED


async def test_a_loader_that_is_back_in_time_loses_nothing(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    a.disconnect()
    bench.now_seconds += 9.0
    await a.connect()
    bench.now_seconds += 9.0
    bench.ledger.expire_leases()
    assert (
        await b.ask(pb.Operation(call_id=b.new_call(), read_initstate=pb.ReadInitstate(module="xfs")))
    ).live is False
    assert (await a.ask(live(call))).event_id == 1


async def test_after_a_crash_a_loader_that_does_not_come_back_loses_its_lease(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(a.new_call()))
    await bench.crash()
    await b.connect()
    wait = b.begin(reserve(b.new_call()))
    await settle(b)
    bench.end_leases()
    assert said(await wait) == (DUPLICATE, "EBUSY", True)


async def test_a_loader_that_ends_its_stream_gives_all_up_at_once(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(reserve(a.new_call()))
    wait = b.begin(reserve(b.new_call()))
    await settle(b)
    assert a.session is not None
    await bench.ledger.finish(a.session)
    bench.ledger.disconnect(a.session, graceful=True)
    assert said(await wait) == (DUPLICATE, "EBUSY", True)


async def test_waits_of_a_loader_that_is_gone_are_forgotten(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    holder = b.new_call()
    await b.ask(reserve(holder))
    wait = a.begin(check(a.new_call()))
    await settle(a)
    a.disconnect()
    with pytest.raises(NotNow):
        await bench.ledger.reset_system("default")
    bench.end_leases()
    await b.ask(fail(holder, reserved=True))
    await bench.ledger.reset_system("default")
    wait.cancel()


# --- memory ---


async def test_held_bytes_are_summed_over_loaders_and_their_peak_is_kept(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    a.held_bytes, b.held_bytes = 1000, 50
    await settle(a, b)
    assert bench.ledger.held_bytes == 1050
    assert b.session is not None
    b.sequence += 1
    reservation = reserve(b.new_call())
    reservation.system = "default"
    batch = pb.OperationBatch(sequence=b.sequence, operations=[reservation], held_bytes=10, peak_held_bytes=500)
    b.expect(reservation.call_id)
    await bench.ledger.submit(b.session, batch)
    b.held_bytes = 10
    await settle(b)
    assert bench.ledger.held_bytes == 1010
    assert bench.ledger.peak_held_bytes("default") == 1500
    system = bench.store.system("default")
    assert system is not None
    assert system.peak_held_bytes == 1500
    a.disconnect()
    assert bench.ledger.held_bytes == 10
    await bench.crash()
    assert bench.ledger.peak_held_bytes("default") == 1500


async def test_no_numbers_can_make_a_commit_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = await connected(bench, "a", "b")
    a.held_bytes = b.held_bytes = 2**63 - 1
    await settle(a, b)
    most = 2**44 - 1
    call = call_pb2.Call(module="xfs", outcome=call_pb2.OUTCOME_LOAD, image_bytes=most, compressed_bytes=most)
    record = pb.RecordCalls(calls=[call] * 10)
    assert (await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))).verdict == PROCEED
    # As if this had gone on for a while.
    monkeypatch.setattr("stats_svc.system.MAX_COUNTED_BYTES", 50 * most)
    result = await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))
    assert result.message == "the counters of system 'default' can't hold any more; reset it"
    await bench.crash()
    await a.connect()
    result = await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))
    assert result.verdict == INVALID
    await bench.ledger.reset_system("default")
    assert (await a.ask(pb.Operation(call_id=a.new_call(), record_calls=record))).verdict == PROCEED


# --- systems ---


async def test_systems_are_separate_machines(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    await bench.ledger.create_system("other", call_pb2.POLICY_V6_5)
    with pytest.raises(AlreadyExists, match="'other'"):
        await bench.ledger.create_system("other", call_pb2.POLICY_V6_5)
    opened = await a.ask(pb.Operation(call_id=a.new_call(), system="other", open_system=pb.OpenSystem()))
    assert opened.policy == call_pb2.POLICY_V6_5
    opened = await a.ask(pb.Operation(call_id=a.new_call(), system="third", open_system=pb.OpenSystem()))
    assert opened.policy == call_pb2.POLICY_V6_4
    for system in ("default", "other", "third"):
        call = a.new_call()
        for operation in (reserve(call), live(call)):
            operation.system = system
            result = await a.ask(operation)
        assert (result.verdict, result.event_id) == (PROCEED, 1)
    assert [row.id for row in bench.store.systems(after_id="", limit=9)] == ["default", "other", "third"]


async def test_a_reset_makes_a_system_new_and_frees_its_modules(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    await a.ask(reserve(call))
    with pytest.raises(NotNow, match="system 'default' can't be reset while calls are in flight"):
        await bench.ledger.reset_system("default")
    await a.ask(live(call))
    await b.ask(fail(b.new_call()))
    row = await bench.ledger.reset_system("default")
    assert row.reset_time_ns > row.create_time_ns
    await settle(a)
    assert a.released == [call]
    assert bench.events() == []
    call = b.new_call()
    await b.ask(reserve(call))
    assert (await b.ask(live(call))).event_id == 1


async def test_a_deleted_system_is_gone_and_all_loaders_are_told(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await a.ask(pb.Operation(call_id=a.new_call(), system="other", open_system=pb.OpenSystem()))
    await bench.ledger.delete_system("other")
    with pytest.raises(NotFound, match="no system 'other'"):
        await bench.ledger.delete_system("other")
    await settle(a, b)
    assert a.deleted_systems == b.deleted_systems == ["other"]
    result = await a.ask(pb.Operation(call_id=a.new_call(), system="other", check_name=pb.CheckName(module="x")))
    assert result.message == "there is no system 'other'"


# --- the database goes away ---


@pytest.mark.parametrize("stored", [False, True])
async def test_a_commit_that_fails_answers_nothing_and_counts_once(bench: Bench, stored: bool) -> None:
    [a] = await connected(bench, "a")
    call = a.new_call()
    await a.ask(reserve(call))
    if stored:
        bench.faulty.fail_after = True
    else:
        bench.faulty.fail_before = True
    end = a.begin(live(call))
    await until(lambda: False in bench.available)
    assert not end.done()
    if not stored:
        with pytest.raises(Unavailable, match="the database is away: the disk is full"):
            await a.connect()
        with pytest.raises(Unavailable):
            await bench.ledger.create_system("other", 1)
        bench.faulty.fail_before = False
    await until(lambda: bench.available[-1])
    await a.connect()
    assert (await end).event_id == 1
    assert len(bench.events()) == 1
    assert said(await a.ask(check(a.new_call()))) == (DUPLICATE, "EEXIST", False)


async def test_nothing_is_answered_before_its_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [a] = await connected(bench, "a")
    order: list[str] = []
    commit = bench.faulty.commit

    def slow_commit(what: Commit) -> None:
        commit(what)
        order.append("committed")

    monkeypatch.setattr(bench.faulty, "commit", slow_commit)
    call = a.new_call()
    for operation in (reserve(call), live(call), check(a.new_call())):
        await a.ask(operation)
        order.append("answered")
    assert order == ["committed", "answered", "committed", "answered", "answered"]


async def test_waves_of_operations_are_committed_in_groups(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    commits = bench.faulty.commits
    calls = [a.new_call() for _ in range(200)]
    waits = [a.begin(reserve(call, f"m{call}")) for call in calls]
    for wait in waits:
        assert (await wait).verdict == PROCEED
    assert bench.faulty.commits - commits < 20


@pytest.mark.parametrize(("value", "most"), [("", 10), ("v" * 3000, 3)], ids=["many", "long"])
async def test_a_slow_database_makes_loaders_wait_instead_of_filling_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, value: str, most: int
) -> None:
    # A group has ten of the smallest operations, or three of the long ones.
    monkeypatch.setattr("stats_svc.ledger.MAX_GROUP_BYTES", 10 * OPERATION_BYTES)
    [a] = await connected(bench, "a")
    go_on = threading.Event()
    commit = bench.faulty.commit

    def stuck_commit(what: Commit) -> None:
        assert go_on.wait(60)
        commit(what)

    monkeypatch.setattr(bench.faulty, "commit", stuck_commit)
    applied = 0

    async def pour() -> list[asyncio.Future[pb.OperationResult]]:
        nonlocal applied
        answers = []
        for _ in range(100):
            answers += await a.send(kread(a.new_call(), value=value))
            applied += 1
        return answers

    pouring = asyncio.create_task(pour())
    # One group is stuck in the commit, the next is full; everybody else has had their turns.
    for _ in range(1000):
        await asyncio.sleep(0)
    assert most <= applied <= 2 * most + 1
    go_on.set()
    for answer in await pouring:
        assert (await answer).verdict == PROCEED


@pytest.mark.parametrize(("limit", "most"), [("MAX_UNREAD_RESULTS", 10), ("MAX_UNREAD_BYTES", 100)])
async def test_a_loader_that_does_not_read_its_answers_is_not_listened_to(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(f"stats_svc.session.{limit}", most)
    session, _ = await bench.ledger.connect(pb.Hello(instance_id="a", loader="a"))
    sent = 0

    async def pour() -> None:
        nonlocal sent
        for sequence in range(1, 101):
            operation = check(sequence)
            operation.system = "default"
            await bench.ledger.submit(session, pb.OperationBatch(sequence=sequence, operations=[operation]))
            sent += 1
            # As between two messages of a stream: the answer is delivered meanwhile.
            for _ in range(10):
                await asyncio.sleep(0)

    pouring = asyncio.create_task(pour())
    for _ in range(2000):
        await asyncio.sleep(0)
    assert 5 <= sent < 100
    answered: list[int] = []
    while len(answered) < 100:
        results = await session.next_results()
        assert results is not None
        answered += [result.call_id for result in results.results]
    assert answered == list(range(1, 101))
    await pouring
    bench.ledger.disconnect(session)


# --- all of it at once ---


class Diary:
    """What the loaders were told, to be compared with what was counted."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.event_ids: Counter[int] = Counter()
        self.unloads = 0
        self.duplicates = 0


async def work(
    loader: Loader, diary: Diary, rng: random.Random, ask: Callable[..., Awaitable[pb.OperationResult]]
) -> None:
    """Make one call as a v6.5 kernel would, or unload a module."""
    module = f"m{rng.randrange(4)}"
    call = loader.new_call()
    if rng.random() < 0.3:
        result = await ask(remove(call, module))
        if result.verdict == PROCEED:
            diary.unloads += 1
            diary.event_ids[result.event_id] += 1
        return
    end: pb.Operation | None = None
    if rng.random() < 0.5:
        result = await ask(enter(call, module))
        if result.verdict != PROCEED:
            shared = result.verdict == SHARED
            end = fail(call, Outcome.SHARED if shared else Outcome.REFUSED, module)
    if end is None:
        result = await ask(check(call, module))
        if result.verdict != PROCEED:
            end = fail(call, Outcome.BECOMING, module)
    if end is None:
        result = await ask(reserve(call, module))
        if result.verdict != PROCEED:
            end = fail(call, Outcome.LOAD, module)
        elif rng.random() < 0.2:
            end = fail(call, Outcome.INIT, module, reserved=True)
        else:
            end = live(call, module)
    result = await ask(end)
    assert result.verdict == PROCEED, result.message
    outcome = end.finish_call.call.outcome
    diary.calls[outcome] += 1
    diary.duplicates += end.finish_call.call.duplicate
    diary.event_ids[result.event_id] += 1


@pytest.mark.parametrize("seed", range(int(os.environ.get("LEDGER_FAULT_SEEDS", "6"))))
async def test_through_any_faults_each_answered_call_is_counted_once(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    loaders = await connected(bench, "a", "b", "c")
    diary = Diary()
    ending = False

    async def worker(loader: Loader) -> None:
        while not ending:
            await work(loader, diary, rng, loader.ask)

    async def keep_connected(loader: Loader) -> None:
        while True:
            if loader.session is None or loader.session.closed:
                with contextlib.suppress(Unavailable):
                    await loader.connect()
            await asyncio.sleep(0.001)

    workers = [asyncio.create_task(worker(loader)) for loader in loaders for _ in range(6)]
    keepers = [asyncio.create_task(keep_connected(loader)) for loader in loaders]
    faults: Counter[str] = Counter()
    for _ in range(30):
        # At any moment, also while the fault before is not yet overcome; but on the whole work goes on.
        target = diary.event_ids.total() + rng.randrange(12)
        await until(lambda target=target: diary.event_ids.total() >= target)  # type: ignore[misc]
        fault = rng.choice(["cut", "cut", "crash", "full disk", "lost commit", "signal"])
        faults[fault] += 1
        if fault == "cut":
            rng.choice(loaders).disconnect()
        elif fault == "crash":
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            await bench.crash()
            for loader in loaders:
                loader.disconnect()
            keepers = [asyncio.create_task(keep_connected(loader)) for loader in loaders]
        elif fault == "full disk":
            bench.faulty.fail_before = True
            await until(lambda: not bench.available[-1])
            bench.faulty.fail_before = False
        elif fault == "lost commit":
            bench.faulty.fail_after = True
        elif fault == "signal":
            loader = rng.choice(loaders)
            if loader.answers and loader.session is not None:
                await loader.send(interrupt(rng.choice(list(loader.answers))))
    ending = True
    await asyncio.wait_for(asyncio.gather(*workers), 60)
    for keeper in keepers:
        keeper.cancel()
    await asyncio.gather(*keepers, return_exceptions=True)

    context = f"seed {seed}, faults {dict(faults)}"
    events = bench.events()
    assert [event.event_id for event in events] == list(range(1, len(events) + 1)), context
    assert diary.event_ids == Counter(event.event_id for event in events), context
    system = bench.store.system("default")
    assert system is not None
    counters = system.counters
    assert counters.calls == diary.calls.total() > 100, context
    assert counters.modcount == diary.calls[Outcome.LIVE], context
    assert counters.failed_becoming == diary.calls[Outcome.BECOMING], context
    assert counters.failed_load_modules == diary.calls[Outcome.LOAD], context
    assert counters.shared_calls == diary.calls[Outcome.SHARED], context
    assert counters.refused_calls == diary.calls[Outcome.REFUSED], context
    assert counters.failed_inits == diary.calls[Outcome.INIT], context
    assert (counters.unloads, counters.duplicates) == (diary.unloads, diary.duplicates), context
    # Nobody waits, no name is reserved, no gate is held: the system can be reset.
    assert system.live_modules == counters.modcount - counters.unloads, context
    await bench.ledger.reset_system("default")


def test_kinds_of_segments_are_numbered_for_ever() -> None:
    assert {kind.name: int(kind) for kind in SegmentKind} == {"EVENTS": 1, "CALLS": 2}
