"""Calls of the live driver, made in this process against a real stats_svc: what goes wrong, what comes in between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loader_svc import storm
from loader_svc.call_memory import File
from loader_svc.catalogue import catalogue_tree
from loader_svc.ledger_client import LedgerClient
from loader_svc.live import LiveCall, Machine, Request
from loader_svc.loader import Loader
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from loader_svc.storm import Storm
from loader_svc.trees import open_tree
from loader_svc.workers import FileWorkers
from modpressure.errors import Overloaded
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_3, V6_4, Policy
from modpressure.v1 import call_pb2, loader_service_pb2
from tests.services import Hand, Process

LIMIT_BYTES = 256 << 20


@pytest.fixture(scope="module")
def path() -> Path:
    """A plain module file."""
    return next(path for path in catalogue_tree("plain").rglob("*.ko") if path.stem == "libcrc32c")


@pytest.fixture
async def machine(stats: Process) -> AsyncIterator[Machine]:
    meter, machines = Meter(), []
    client = LedgerClient(
        stats.address,
        instance_id=uuid.uuid4().hex,
        meter=meter,
        on_released=lambda call_id: machines[0].release(call_id),
        on_connected=lambda connected: None,
    )
    machine = Machine(client, FileWorkers(2), Plans(LIMIT_BYTES), MemoryBudget(LIMIT_BYTES), meter, "here")
    machines.append(machine)
    running = asyncio.ensure_future(client.run())
    await client.wait_connected()
    yield machine
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    machine.workers.shutdown()


Make = Callable[..., LiveCall]


@pytest.fixture
def make(machine: Machine, hand: Hand, system: str, path: Path) -> Make:
    """Return a function that makes a call of the module; ``hand`` has opened its system."""

    def call(policy: Policy = V6_4) -> LiveCall:
        spec = CallSpec("libcrc32c", f"tree:{path}", policy, Syscall.FINIT_MODULE)
        number = call_pb2.POLICY_V6_3 if policy is V6_3 else call_pb2.POLICY_V6_4
        return LiveCall(
            machine, Request(spec, File(str(path), None, partial(os.open, path, os.O_RDONLY)), system, number)
        )

    return call


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def storm_of(system: str, modules: list[str], **fields: Any) -> loader_service_pb2.Storm:
    """Return a storm whose workers load each module once."""
    mode = loader_service_pb2.Storm.MODE_ONCE
    return loader_service_pb2.Storm(system=system, modules=modules, mode=mode, **fields)


def descriptors_of(path: Path) -> int:
    """Return how many descriptors this process has on a file."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += Path(os.readlink(link)) == path
        except OSError:
            continue
    return found


async def test_a_call_that_breaks_gives_its_name_back(
    machine: Machine, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: LiveCall, *_: object) -> None:
        raise ZeroDivisionError("nobody foresaw this \udcff")

    with monkeypatch.context() as patch:
        patch.setattr(LiveCall, "_link", broken)
        with pytest.raises(ZeroDivisionError):
            await make().run()
    assert machine.meter.held_bytes == machine.budget.taken_bytes == 0

    async with asyncio.timeout(30):
        call = await make().run()
    assert call.outcome == call_pb2.OUTCOME_LIVE


async def test_a_call_that_waits_keeps_no_descriptor(machine: Machine, make: Make, hand: Hand, path: Path) -> None:
    await hand.reserve(2, "libcrc32c")
    waiting = make()
    task = asyncio.ensure_future(waiting.run())
    await until(lambda: waiting.call_id in machine.ledger._asked)
    assert descriptors_of(path) == 0
    rest = await machine.budget.take(LIMIT_BYTES - machine.budget.taken_bytes, "all")
    queued = asyncio.ensure_future(make().run())
    await until(lambda: bool(machine.budget.waiting))
    assert descriptors_of(path) == 0
    machine.budget.give(rest)
    await hand.give_up(2, "libcrc32c")
    assert (await task).errno == "EBUSY"
    assert (await queued).errno in ("", "EBUSY")


async def test_a_signal_ends_the_wait_for_memory(machine: Machine, make: Make) -> None:
    taken = await machine.budget.take(LIMIT_BYTES, "all")
    call = make()
    task = asyncio.ensure_future(call.run())
    await until(lambda: bool(machine.budget.waiting))
    call.interrupt()
    ended = await task
    assert (ended.outcome, ended.errno, ended.check) == (call_pb2.OUTCOME_REFUSED, "EINTR", "signal")
    assert not machine.budget.waiting
    machine.budget.give(taken)
    assert machine.budget.taken_bytes == 0


async def test_a_wait_for_memory_without_end_is_ended(machine: Machine, make: Make) -> None:
    machine.budget = MemoryBudget(LIMIT_BYTES, patience_seconds=0.01)
    taken = await machine.budget.take(LIMIT_BYTES, "all")
    call = make()
    with pytest.raises(Overloaded, match=r"libcrc32c\.ko needs .* was given none for 0\.01 s"):
        await asyncio.wait_for(call.run(), 30)
    assert call.call_id not in machine.ledger._asked
    assert not call._told
    machine.budget.give(taken)
    assert machine.budget.taken_bytes == machine.meter.held_bytes == 0


async def test_a_signal_between_two_waits_ends_the_next(machine: Machine, make: Make, hand: Hand) -> None:
    await hand.reserve(2, "libcrc32c")
    call = make(V6_3)
    # It asks for nothing yet.
    call.interrupt()
    ended = await asyncio.wait_for(call.run(), 30)
    assert (ended.outcome, ended.errno, ended.check) == (call_pb2.OUTCOME_LOAD, "EINTR", "signal")
    await hand.give_up(2, "libcrc32c")


async def test_a_signal_does_not_end_what_need_not_wait(make: Make) -> None:
    """A wait whose condition holds already does not look at signals (wait_event_interruptible)."""
    call = make()
    call.interrupt()
    assert (await call.run()).outcome == call_pb2.OUTCOME_LIVE


@contextlib.asynccontextmanager
async def grown(number: Callable[[], int]) -> AsyncIterator[list[int]]:
    """Give a list of by how much a number has grown in each turn of the loop, up to the block's end."""
    steps: list[int] = []
    before = number()

    async def look() -> None:
        nonlocal before
        while True:
            now = number()
            steps.append(now - before)
            before = now
            await asyncio.sleep(0)

    looking = asyncio.ensure_future(look())
    try:
        yield steps
    finally:
        looking.cancel()


@pytest.mark.parametrize("separate_copies", [False, True])
async def test_a_storm_makes_what_it_asks_when_it_asks_and_lets_others_have_their_turns(
    machine: Machine, system: str, monkeypatch: pytest.MonkeyPatch, separate_copies: bool
) -> None:
    loader = Loader(machine, open_tree(catalogue_tree("plain")), kmod=34)
    modules, workers = ["crc16", "minix", "libcrc32c"], 1_000
    asked = storm_of(system, modules, workers=workers, separate_copies=separate_copies)
    specs, begun, ahead = 0, 0, 0

    def spec(name: str, **fields: Any) -> Any:
        nonlocal specs
        specs += 1
        return Loader.spec(loader, name, **fields)

    class Counted(LiveCall):
        async def run(self) -> call_pb2.Call:
            nonlocal begun, ahead
            begun += 1
            ahead = max(ahead, specs - begun)
            return await super().run()

    monkeypatch.setattr(loader, "spec", spec)
    monkeypatch.setattr(storm, "LiveCall", Counted)
    asking = Storm(loader, asked)
    await asking.prepare()
    async with grown(lambda: begun) as in_each_turn:
        summary = await asking.run()
    assert (summary.calls, summary.errors) == (workers * len(modules), 0)
    assert ahead <= 0
    assert specs == (workers * len(modules) if separate_copies else len(modules))
    # Those that are started, and those that a commit has answered.
    assert max(in_each_turn) < workers / 2


async def test_a_storm_that_is_stopped_sends_its_signals_in_turns(
    machine: Machine, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(machine, open_tree(catalogue_tree("plain")), kmod=34)
    workers, signals = 1_000, 0
    interrupt = LiveCall.interrupt

    def counted(call: LiveCall) -> None:
        nonlocal signals
        signals += 1
        monkeypatch.setattr(storm, "STOP_SECONDS", 30)
        interrupt(call)

    monkeypatch.setattr(LiveCall, "interrupt", counted)
    # Nothing ends by itself, and all by a signal.
    monkeypatch.setattr(storm, "STOP_SECONDS", 0)
    asking = Storm(loader, storm_of(system, ["crc16"], workers=workers))
    await asking.prepare()
    taken = await machine.budget.take(LIMIT_BYTES, "all")
    running = asyncio.ensure_future(asking.run())
    await until(lambda: machine.budget.waiting == workers)
    async with grown(lambda: signals) as in_each_turn:
        asking.stop()
        summary = await running
    assert [(each.errno, each.count) for each in summary.outcomes] == [("EINTR", workers)]
    assert signals == workers
    assert max(in_each_turn) <= storm.MAX_AT_ONCE
    machine.budget.give(taken)
