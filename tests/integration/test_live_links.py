"""Links and init functions on the live driver, in this process against a real stats_svc; a hand is another loader."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import pytest

from loader_svc import call_links
from loader_svc.call_memory import File
from loader_svc.catalogue import catalogue_identity, catalogue_modules, catalogue_tree
from loader_svc.init_results import InitResults
from loader_svc.ledger_client import LedgerClient
from loader_svc.live import LiveCall, Machine, Request
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from loader_svc.workers import FileWorkers
from modpressure.kernel.identity import ANY
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_4
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Hand, Process

LIMIT_BYTES = 256 << 20
PROCEED = ledger.OperationResult.VERDICT_PROCEED
OWNER = "libcrc32c"
SYMBOL = "crc32c"
USER = "xfs"
"""Needs the symbol, which only the owner exports."""


@pytest.fixture(params=["catalogue", "any"])
async def machine(stats: Process, request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    """A loader whose kernel's symbols are known, and one whose are not."""
    meter, machines = Meter(), []
    client = LedgerClient(
        stats.address,
        instance_id=uuid.uuid4().hex,
        meter=meter,
        on_released=lambda call_id: machines[0].release(call_id),
        on_connected=lambda connected: None,
    )
    identity = catalogue_identity() if request.param == "catalogue" else ANY
    plans, budget = Plans(LIMIT_BYTES, identity), MemoryBudget(LIMIT_BYTES)
    machine = Machine(client, FileWorkers(2), plans, budget, meter, "here", tree_exports={SYMBOL})
    machines.append(machine)
    running = asyncio.ensure_future(client.run())
    await client.wait_connected()
    yield machine
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    machine.workers.shutdown()


Make = Callable[[str], LiveCall]


@pytest.fixture
def make(machine: Machine, hand: Hand, system: str) -> Make:
    """Return a function that makes a call of a module; ``hand`` has opened its system."""
    paths = {path.stem.replace("-", "_"): path for path in catalogue_tree("plain").rglob("*.ko")}

    def call(name: str) -> LiveCall:
        path = paths[name]
        spec = CallSpec(name, f"tree:{path}", V6_4, Syscall.FINIT_MODULE)
        file = File(str(path), None, partial(os.open, path, os.O_RDONLY))
        return LiveCall(machine, Request(spec, file, system, call_pb2.POLICY_V6_4))

    return call


@pytest.fixture
async def stub(stats: Process) -> AsyncIterator[StatsServiceStub]:
    async with grpc.aio.insecure_channel(stats.address) as channel:
        yield StatsServiceStub(channel)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def exports(*symbols: str) -> bytes:
    crcs = {export.name: export.crc for export in catalogue_modules()[OWNER].exports}
    table = [ledger.Export(symbol=symbol, crc=crcs[symbol]) for symbol in symbols]
    return ledger.Exports(exports=table).SerializeToString()


async def form(hand: Hand, call_id: int, name: str = OWNER) -> None:
    """Have another loader's module be coming, with the symbol."""
    reserve = ledger.ReserveName(module=name, formation=ledger.Formation(exports=exports(SYMBOL)))
    result = await hand.ask(ledger.Operation(call_id=call_id, reserve_name=reserve))
    assert (result.verdict, result.errno) == (PROCEED, "")


async def live(hand: Hand, call_id: int, name: str = OWNER) -> None:
    """Let its init function return 0."""
    call = call_pb2.Call(module=name, outcome=call_pb2.OUTCOME_LIVE)
    finish = ledger.FinishCall(call=call, reserved=True, formed=True, core_bytes=4096)
    assert (await hand.ask(ledger.Operation(call_id=call_id, finish_call=finish))).verdict == PROCEED


async def unload(hand: Hand, call_id: int, name: str) -> str:
    remove = ledger.RemoveModule(unload=call_pb2.Unload(module=name))
    return (await hand.ask(ledger.Operation(call_id=call_id, remove_module=remove))).errno


async def waiting(stub: StatsServiceStub, system: str) -> None:
    """Return once a call waits for another one."""
    async with asyncio.timeout(30):
        while not (await stub.GetStats(stats_service_pb2.GetStatsRequest(system=system))).stats.waiting_calls:
            await asyncio.sleep(0.01)


def ended(call: call_pb2.Call) -> tuple[int, str, str, str]:
    return call.outcome, call.errno, call.check, call.value


async def test_an_owner_that_is_coming_is_waited_for_and_then_used(
    make: Make, hand: Hand, stub: StatsServiceStub, system: str
) -> None:
    await form(hand, 2)
    call = make(USER)
    task = asyncio.ensure_future(call.run())
    await waiting(stub, system)
    await live(hand, 2)
    done = await task
    assert ended(done) == (call_pb2.OUTCOME_LIVE, "", "", "")
    assert done.wait_ns > 0
    assert await unload(hand, 3, OWNER) == "EWOULDBLOCK"
    assert await unload(hand, 4, USER) == ""
    assert await unload(hand, 5, OWNER) == ""


async def test_an_owner_whose_init_fails_leaves_what_needs_it_without(
    machine: Machine, make: Make, hand: Hand, stub: StatsServiceStub, system: str
) -> None:
    await form(hand, 2)
    call = make(USER)
    task = asyncio.ensure_future(call.run())
    await waiting(stub, system)
    await hand.give_up(2, OWNER)
    if machine.plans.identity is ANY:
        # Then the kernel is taken to have it.
        assert (await task).outcome == call_pb2.OUTCOME_LIVE
    else:
        assert ended(await task) == (call_pb2.OUTCOME_LOAD, "ENOENT", "symbols: unknown", SYMBOL)


@pytest.mark.parametrize("by_signal", [False, True])
async def test_the_wait_for_an_owner_ends_out_of_patience_or_by_a_signal(
    machine: Machine,
    make: Make,
    hand: Hand,
    stub: StatsServiceStub,
    system: str,
    monkeypatch: pytest.MonkeyPatch,
    by_signal: bool,
) -> None:
    monkeypatch.setattr(call_links, "OWNER_PATIENCE_SECONDS", 600 if by_signal else 0.05)
    await form(hand, 2)
    call = make(USER)
    task = asyncio.ensure_future(call.run())
    if by_signal:
        await waiting(stub, system)
        call.interrupt()
    assert ended(await task) == (call_pb2.OUTCOME_LOAD, "EBUSY", "symbols: owner", f"{SYMBOL} of {OWNER}")
    assert machine.meter.held_bytes == 0
    await hand.give_up(2, OWNER)


async def test_a_symbol_that_another_module_exports_cant_be_exported_again(make: Make, hand: Hand) -> None:
    await form(hand, 2, "other")
    call = await make(OWNER).run()
    assert ended(call) == (call_pb2.OUTCOME_LOAD, "ENOEXEC", "exports: taken", SYMBOL)
    await hand.give_up(2, "other")
    assert (await make(OWNER).run()).outcome == call_pb2.OUTCOME_LIVE


async def test_an_owner_that_was_loaded_anew_meanwhile_is_found_anew(
    machine: Machine, make: Make, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    await form(hand, 2)
    await live(hand, 2)
    ask, formed = machine.ledger.ask, []

    async def ask_late(operation: ledger.Operation, **options: bool) -> ledger.OperationResult:
        if operation.HasField("form_module") and not formed:
            assert await unload(hand, 3, OWNER) == ""
            await form(hand, 4)
            await live(hand, 4)
        result = await ask(operation, **options)
        if operation.HasField("form_module"):
            formed.append(result.errno)
        return result

    monkeypatch.setattr(machine.ledger, "ask", ask_late)
    assert (await make(USER).run()).outcome == call_pb2.OUTCOME_LIVE
    assert formed == ["EAGAIN", ""]
    assert await unload(hand, 5, OWNER) == "EWOULDBLOCK"


async def test_a_module_is_coming_while_its_init_runs_and_no_signal_ends_that(
    machine: Machine, make: Make, hand: Hand, stub: StatsServiceStub, system: str
) -> None:
    machine.init_results = InitResults.parse(
        f"module,condition,duration_ms,result\n{OWNER},always,600000,0\n{USER},always,0,-ENODEV\n"
    )

    async def listed() -> list[tuple[str, int, int]]:
        request = stats_service_pb2.ListLoadedModulesRequest(system=system)
        found = (await stub.ListLoadedModules(request)).modules
        return [(module.module, module.state, module.references) for module in found]

    call = make(OWNER)
    task = asyncio.ensure_future(call.run())
    coming = [(OWNER, stats_service_pb2.LoadedModule.STATE_COMING, 1)]
    async with asyncio.timeout(30):
        while await listed() != coming:
            await asyncio.sleep(0.01)
    call.interrupt()
    duplicate = make(OWNER)
    again = asyncio.ensure_future(duplicate.run())
    await until(lambda: duplicate.call_id in machine.ledger._asked)
    duplicate.interrupt()
    assert (await again).errno == "EINTR"
    assert not task.done()
    assert await listed() == coming
    # Others go on meanwhile.
    assert (await make("crc16").run()).outcome == call_pb2.OUTCOME_LIVE
    assert await unload(hand, 2, OWNER) == "EBUSY"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_init_that_fails_leaves_no_entry_no_export_and_no_user(
    machine: Machine, make: Make, hand: Hand
) -> None:
    machine.init_results = InitResults.parse(
        f"module,condition,duration_ms,result\n{USER},while {OWNER} is live,1,-ENODEV\n"
    )
    owner = await make(OWNER).run()
    assert owner.outcome == call_pb2.OUTCOME_LIVE
    assert ended(await make(USER).run()) == (call_pb2.OUTCOME_INIT, "ENODEV", "init", "")
    assert await unload(hand, 2, USER) == "ENOENT"
    assert await unload(hand, 3, OWNER) == ""
    await until(lambda: machine.meter.held_bytes == 0)


async def test_one_with_per_cpu_variables_is_formed_with_its_name_where_there_is_room(
    machine: Machine, make: Make, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = machine.ledger.ask

    async def noting(operation: ledger.Operation, *, interrupted: bool = False) -> ledger.OperationResult:
        asked.append(operation.WhichOneof("kind") or "")
        return await ask(operation, interrupted=interrupted)

    monkeypatch.setattr(machine.ledger, "ask", noting)
    room_bytes = machine.plans.identity.percpu_reserve_bytes
    taking = ledger.ReserveName(module=OWNER, formation=ledger.Formation(percpu_bytes=room_bytes - 7))
    assert (await hand.ask(ledger.Operation(call_id=2, reserve_name=taking))).verdict == PROCEED
    await live(hand, 2)
    assert ended(await make("powernow_k8").run()) == (call_pb2.OUTCOME_LOAD, "ENOMEM", "percpu", "8")
    assert await unload(hand, 3, OWNER) == ""
    asked.clear()
    assert ended(await make("powernow_k8").run()) == (call_pb2.OUTCOME_LIVE, "", "", "")
    assert asked == ["check_name", "reserve_name", "finish_call"]
