"""Rounds: clients at work, faults at random moments, all healed, and then the books against the diaries."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from chaos.check import Books, Finding, findings
from chaos.clients import Client, Lines
from chaos.diary import Diary
from chaos.faults import Fault, deck
from chaos.fleet import LOADERS, Fleet
from modpressure.v1 import call_pb2
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from modpressure.v1.stats_service_pb2_grpc import StatsServiceAsyncStub

T = TypeVar("T")

CLIENTS: Final = 4
ROUND_SECONDS: Final = 1.0
"""How long clients ask and faults begin."""

FAULTS_PER_ROUND: Final = (1, 3)
SETTLE_SECONDS: Final = 30.0
"""How long it may take after the last fault until every request is answered and the books stand still."""

MEMORY_BYTES: Final = 400 << 10
"""What a system has that has limits: too little for all modules, with what calls in flight take."""

ROUNDS_TOLD: Final = 50
"""After so many there is a word of how far it is."""

_POLICIES: Final = (call_pb2.POLICY_V6_3, call_pb2.POLICY_V6_4, call_pb2.POLICY_V6_5)


@dataclass
class Score:
    """What the rounds over one database came to."""

    rounds: int = 0
    answered: int = 0
    unanswered: int = 0
    events: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    """How attempts ended that were not answered."""

    ends: Counter[str] = field(default_factory=Counter)
    """How calls ended that were counted."""

    findings: Counter[str] = field(default_factory=Counter)
    evidence: list[Path] = field(default_factory=list)


@dataclass
class _Past:
    """The round before, whose books are looked at once more."""

    number: int
    system: str
    diary: Diary
    faults: list[str]


class _RefusedError(RuntimeError):
    """What was asked for can't be done as things are, and that has not changed."""


class Rounds:
    """Rounds over one fleet."""

    def __init__(self, fleet: Fleet, seed: int, evidence: Path, faults: Collection[str] = ()) -> None:
        """Prepare: findings go into the directory ``evidence``, ``faults`` are the names of the only ones."""
        self.score = Score()
        self._fleet = fleet
        self._seed = seed
        self._evidence = evidence
        self._deck: Iterator[Fault] = deck(fleet, Random(f"{seed} {fleet.kind} deck"), faults)
        self._past: _Past | None = None
        self._turn = 0

    async def run(self, rounds: int, stopping: asyncio.Event, *, stop_at_first: bool = False) -> None:
        """Run so many rounds, or until something is found; none begins once ``stopping`` is set."""
        lines = Lines([link.address for link in self._fleet.clients_to_loader])
        await self._ask_stats(lambda stub: _create(stub, pb.System(id="start")))
        await self._compare("start", Diary())
        try:
            for number in range(1, rounds + 1):
                await self._round(number, lines)
                if number % ROUNDS_TOLD == 0:
                    found = sum(self.score.findings.values())
                    print(f"{self._fleet.kind}: {number} rounds, {found} findings", file=sys.stderr, flush=True)
                if stopping.is_set() or (stop_at_first and self.score.findings):
                    return
        finally:
            await lines.close()

    async def _round(self, number: int, lines: Lines) -> None:
        fleet, score = self._fleet, self.score
        dice = Random(f"{self._seed} {fleet.kind} {number}")
        system, diary = f"round-{number}", Diary()
        limits = pb.MemoryAmounts(memory_bytes=MEMORY_BYTES) if dice.random() < 0.3 else None
        about = pb.System(id=system, policy=dice.choice(_POLICIES), limits=limits)
        await self._ask_stats(lambda stub: _create(stub, about))
        storm_numbers = itertools.count(1)
        clients = [
            Client(f"r{number}c{n}", system, lines, diary, Random(dice.random()), storm_numbers) for n in range(CLIENTS)
        ]
        chosen = [next(self._deck) for _ in range(dice.randint(*FAULTS_PER_ROUND))]
        plan = [(dice.uniform(0.0, ROUND_SECONDS), fault, Random(dice.random())) for fault in chosen]
        told = [f"{at:.2f} s {fault.name}" for at, fault, _ in plan]
        living = [asyncio.ensure_future(client.live()) for client in clients]
        troubles = [asyncio.ensure_future(self._inject(*one)) for one in plan]
        found: list[Finding] = []
        try:
            await asyncio.gather(asyncio.sleep(ROUND_SECONDS), *troubles)
            for client in clients:
                client.stop_asking.set()
            await fleet.heal()
            _, late = await asyncio.wait(living, timeout=SETTLE_SECONDS)
            for client in clients:
                client.give_up.set()
            if late:
                sentence = f"{len(late)} clients have no answer {SETTLE_SECONDS:.0f} s after the last fault"
                found.append(Finding("wrong", sentence))
            for one in living:
                one.cancel()
            for end in await asyncio.gather(*living, return_exceptions=True):
                if isinstance(end, Exception):
                    raise end
        finally:
            for task in (*living, *troubles):
                task.cancel()
        score.faults.update(fault.name for fault in chosen)
        score.rounds += 1
        score.answered += diary.answered
        score.unanswered += diary.unanswered
        score.statuses.update(attempt.status for attempt in diary.attempts())
        differences, books = await self._compare(system, diary)
        found += differences
        score.events += len(books.events)
        score.ends.update(_end(event) for event in books.events)
        if not late and any(entry.is_in_doubt for entry in diary.entries):
            found.append(Finding("wrong", "a request that might be asked again was not answered in the end"))
        for process in fleet.processes:
            found += [Finding("wrong", f"{process.name} has logged {line.strip()}") for line in process.tracebacks]
            process.tracebacks.clear()
        self._note(number, system, diary, told, found)
        await self._look_back(_Past(number, system, diary, told))

    async def _inject(self, at_seconds: float, fault: Fault, dice: Random) -> None:
        await asyncio.sleep(at_seconds)
        await fault.inject(self._fleet, dice)

    async def _look_back(self, now: _Past) -> None:
        """Compare the round before once more: another round's faults must not have touched it. Then forget it."""
        past, self._past = self._past, now
        if past is None:
            return
        found, _ = await self._compare(past.system, past.diary)
        try:
            await self._ask_stats(lambda stub: _delete(stub, past.system))
        except _RefusedError as error:
            # What the books do not tell of: a call that holds a gate, and has long ended as its loader knows.
            found.append(Finding("wrong", str(error)))
        finally:
            self._note(past.number, past.system, past.diary, [*past.faults, "and those of the next round"], found)

    def _note(self, number: int, system: str, diary: Diary, told: list[str], found: list[Finding]) -> None:
        if not found:
            return
        self.score.findings.update(finding.kind for finding in found)
        self._evidence.mkdir(parents=True, exist_ok=True)
        path = self._evidence / f"{self._fleet.kind}-{number}-{len(self.score.evidence)}.txt"
        text = [
            f"seed {self._seed}, {self._fleet.kind}, round {number}, system {system}",
            f"faults: {'; '.join(told)}",
            *(f"{finding.kind}: {finding.sentence}" for finding in found),
            "",
            *diary.lines(),
        ]
        for process in self._fleet.processes:
            text += ["", f"log of {process.name}", *(line.rstrip("\n") for line in process.lines)]
        path.write_text("\n".join(text) + "\n")
        self.score.evidence.append(path)

    # --- reading ---

    async def _compare(self, system: str, diary: Diary) -> tuple[list[Finding], Books]:
        """Compare once nothing is in flight any more; return what was found, and the books."""
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while True:
            books, unsettled = await self._ask_stats(lambda stub: _read(stub, system))
            if not unsettled or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(0.1)
        found = findings(diary, books)
        if unsettled:
            found.append(Finding("wrong", f"{SETTLE_SECONDS:.0f} s after the last fault {unsettled}"))
        return found, books

    async def _ask_stats(self, ask: Callable[[StatsServiceAsyncStub], Awaitable[T]]) -> T:
        """Ask any stats_svc directly, and the next, until one answers.

        _RefusedError if the last one says that it is not the time for it, another RuntimeError if it does not answer.
        """
        deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
        while True:
            self._turn += 1
            stats = self._fleet.stats[self._turn % len(self._fleet.stats)]
            async with grpc.aio.insecure_channel(stats.address) as channel:
                try:
                    return await ask(StatsServiceStub(channel))
                except grpc.aio.AioRpcError as error:
                    if asyncio.get_running_loop().time() > deadline:
                        sentence = (
                            f"{SETTLE_SECONDS:.0f} s long {stats.name} said {error.code().name}: {error.details()}"
                        )
                        refused = error.code() is grpc.StatusCode.FAILED_PRECONDITION
                        raise (_RefusedError if refused else RuntimeError)(sentence) from None
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION):
                        raise
            await asyncio.sleep(0.1)


def _end(event: call_pb2.Event) -> str:
    """Return in a word or two what an event tells of."""
    if event.HasField("unload"):
        return "unload"
    outcome = call_pb2.Outcome.Name(event.call.outcome).removeprefix("OUTCOME_").lower()
    return f"{outcome} {event.call.errno}".rstrip()


async def _create(stub: StatsServiceAsyncStub, system: pb.System) -> None:
    try:
        await stub.CreateSystem(pb.CreateSystemRequest(system=system))
    except grpc.aio.AioRpcError as error:
        # It was created, and we were not told.
        if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
            raise


async def _delete(stub: StatsServiceAsyncStub, system: str) -> None:
    try:
        await stub.DeleteSystem(pb.DeleteSystemRequest(system=system))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise


async def _pages(ask: Callable[[str], Awaitable[Any]], items: str) -> list[Any]:
    """Return all items of a list that comes in pages."""
    found: list[Any] = []
    token = ""
    while True:
        page = await ask(token)
        found += getattr(page, items)
        token = page.next_page_token
        if not token:
            return found


async def _read(stub: StatsServiceAsyncStub, system: str) -> tuple[Books, str]:
    """Return what is said of a system, and why that is not yet all, empty if it is."""
    before = (await stub.GetStats(pb.GetStatsRequest(system=system))).stats
    events = await _pages(
        lambda token: stub.ListEvents(pb.ListEventsRequest(system=system, page_token=token, page_size=10_000)), "events"
    )
    failed = await _pages(
        lambda token: stub.ListFailedModules(pb.ListFailedModulesRequest(system=system, page_token=token)), "modules"
    )
    modules = await _pages(
        lambda token: stub.ListLoadedModules(pb.ListLoadedModulesRequest(system=system, page_token=token)), "modules"
    )
    about = (await stub.GetSystem(pb.GetSystemRequest(system=system))).system
    stats = (await stub.GetStats(pb.GetStatsRequest(system=system))).stats
    unsettled = ""
    if stats.events != before.events:
        unsettled = "calls still end"
    elif stats.waiting_calls:
        unsettled = f"{stats.waiting_calls} calls still wait"
    elif stats.module_requests:
        unsettled = f"{stats.module_requests} requests of the kernel are not done"
    elif stats.loaders != LOADERS:
        unsettled = f"only {stats.loaders} loaders are connected"
    elif half := [m.module for m in modules if m.state != pb.LoadedModule.STATE_LIVE]:
        unsettled = f"{', '.join(half)} is still being loaded"
    elif about.HasField("limits") and not about.HasField("taken"):
        unsettled = "what is taken of its memory is unknown"
    elif about.taken.memory_bytes > sum(module.core_bytes for module in modules):
        # A call whose client has given up may be under way, on a busy machine for long, and be seen nowhere else.
        unsettled = "memory is still taken by a call"
    return Books(events, stats, failed, modules, about), unsettled
