"""Links between modules in the ledger: found, formed, awaited, dropped; over restarts and leases that end."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from modpressure.errors import LeaseEnded
from modpressure.kernel.outcome import Outcome
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc import schema
from stats_svc.names import MAX_SYMBOLS
from tests.integration.test_ledger import (
    FAILED,
    INTERRUPTED,
    INVALID,
    PROCEED,
    Bench,
    Loader,
    connected,
    ended,
    interrupt,
    reserve,
    settle,
)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    yield bench
    await bench.close()


def exports(*symbols: str) -> bytes:
    return pb.Exports(exports=[pb.Export(symbol=symbol, crc=len(symbol)) for symbol in symbols]).SerializeToString()


def form(call_id: int, module: str, symbols: tuple[str, ...] = (), uses: tuple[pb.Use, ...] = ()) -> pb.Operation:
    formation = pb.Formation(exports=exports(*symbols), uses=uses)
    return pb.Operation(call_id=call_id, form_module=pb.FormModule(module=module, formation=formation))


def find(call_id: int, *symbols: str) -> pb.Operation:
    return pb.Operation(call_id=call_id, find_symbols=pb.FindSymbols(symbols=symbols))


def await_init(call_id: int, module: str) -> pb.Operation:
    return pb.Operation(call_id=call_id, await_init=pb.AwaitInit(module=module))


def finish(call_id: int, module: str, outcome: Outcome = Outcome.LIVE) -> pb.Operation:
    call = ended(outcome, module, "" if outcome is Outcome.LIVE else "ENODEV")
    return pb.Operation(
        call_id=call_id, finish_call=pb.FinishCall(call=call, core_bytes=4096, reserved=True, formed=True)
    )


def remove(call_id: int, module: str, *, forced: bool = False) -> pb.Operation:
    unload = call_pb2.Unload(module=module, forced=forced)
    return pb.Operation(call_id=call_id, remove_module=pb.RemoveModule(unload=unload))


async def errno_of_unload(loader: Loader, module: str, *, forced: bool = False) -> str:
    return (await loader.ask(remove(loader.new_call(), module, forced=forced))).errno


async def found(loader: Loader, symbol: str) -> pb.FoundSymbol:
    [result] = (await loader.ask(find(loader.new_call(), symbol))).found
    return result


async def load(loader: Loader, module: str, *symbols: str, uses: tuple[pb.Use, ...] = ()) -> int:
    call = loader.new_call()
    await loader.ask(reserve(call, module))
    assert (await loader.ask(form(call, module, symbols, uses))).verdict == PROCEED
    assert (await loader.ask(finish(call, module))).verdict == PROCEED
    return call


def stored(bench: Bench) -> list[int]:
    """Return how many rows there are of modules, and of what they use."""
    engine = sa.create_engine(f"sqlite:///{bench.path}")
    with engine.connect() as connection:
        counts = [
            connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (schema.modules, schema.module_uses)
        ]
    engine.dispose()
    return counts


async def test_a_symbol_is_found_from_the_forming_on_until_the_module_is_gone(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    call = a.new_call()
    reserved = await a.ask(
        pb.Operation(call_id=call, reserve_name=pb.ReserveName(module="jbd2", symbols=["jbd2_start"]))
    )
    assert not reserved.found
    await a.ask(form(call, "jbd2", ("jbd2_start",)))
    symbol = await found(b, "jbd2_start")
    assert (symbol.export.symbol, symbol.export.crc, symbol.owner.module) == ("jbd2_start", 10, "jbd2")
    assert symbol.initialising
    await a.ask(finish(call, "jbd2"))
    assert not (await found(b, "jbd2_start")).initialising
    other = b.new_call()
    reserved = await b.ask(
        pb.Operation(call_id=other, reserve_name=pb.ReserveName(module="ext4", symbols=["nothing", "jbd2_start"]))
    )
    assert [one.owner.module for one in reserved.found] == ["jbd2"]
    assert await errno_of_unload(a, "jbd2") == ""
    assert not (await b.ask(find(b.new_call(), "jbd2_start"))).found


async def test_a_module_that_is_used_stays_forced_or_not(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await load(a, "jbd2", "jbd2_start")
    await load(b, "ext4", uses=((await found(b, "jbd2_start")).owner,))
    assert await errno_of_unload(a, "jbd2") == await errno_of_unload(a, "jbd2", forced=True) == "EWOULDBLOCK"
    assert bench.store.users("default", ["jbd2", "ext4"]) == {"jbd2": ["ext4"]}
    assert await errno_of_unload(a, "ext4") == await errno_of_unload(a, "jbd2") == ""
    assert stored(bench) == [0, 0]


async def test_a_module_without_exit_function_is_unloaded_by_force_alone(bench: Bench) -> None:
    (a,) = await connected(bench, "a")
    call = a.new_call()
    reserve_it = pb.ReserveName(module="binfmt", formation=pb.Formation(permanent=True))
    assert (await a.ask(pb.Operation(call_id=call, reserve_name=reserve_it))).verdict == PROCEED
    await a.ask(finish(call, "binfmt"))
    assert await errno_of_unload(a, "binfmt") == "EBUSY"
    await bench.crash()
    await a.connect()
    assert await errno_of_unload(a, "binfmt") == "EBUSY"
    assert await errno_of_unload(a, "binfmt", forced=True) == ""
    [unload] = [event.unload for event in bench.events() if event.HasField("unload")]
    assert unload.forced


async def test_a_restart_forgets_no_user_and_no_export(bench: Bench) -> None:
    (a,) = await connected(bench, "a")
    await load(a, "jbd2", "jbd2_start")
    await load(a, "ext4", uses=((await found(a, "jbd2_start")).owner,))
    call = a.new_call()
    await a.ask(reserve(call, "xfs"))
    await a.ask(form(call, "xfs", ("xfs_new",)))
    await bench.crash()
    await a.connect()
    assert await errno_of_unload(a, "jbd2") == "EWOULDBLOCK"
    assert (await found(a, "xfs_new")).initialising
    # Asked again, as after a lost answer.
    assert (await a.ask(form(call, "xfs", ("xfs_new",)))).verdict == PROCEED
    await a.ask(finish(call, "xfs"))
    for module in ("ext4", "jbd2", "xfs"):
        assert await errno_of_unload(a, module) == ""
    assert stored(bench) == [0, 0]


async def test_what_is_found_may_have_been_unloaded_since(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await load(a, "jbd2", "jbd2_start")
    owner = (await found(b, "jbd2_start")).owner
    assert await errno_of_unload(a, "jbd2") == ""
    await load(a, "jbd2", "jbd2_start")
    call = b.new_call()
    await b.ask(reserve(call, "ext4"))
    answer = await b.ask(form(call, "ext4", (), (owner,)))
    assert (answer.verdict, answer.errno, answer.value) == (FAILED, "EAGAIN", "jbd2")
    answer = await b.ask(form(call, "ext4", (), ((await found(b, "jbd2_start")).owner,)))
    assert answer.verdict == PROCEED


async def test_what_a_module_exports_no_other_can(bench: Bench) -> None:
    (a,) = await connected(bench, "a")
    await load(a, "crc16", "crc16")
    call = a.new_call()
    await a.ask(reserve(call, "other"))
    answer = await a.ask(form(call, "other", ("mine", "crc16")))
    assert (answer.verdict, answer.errno, answer.value) == (FAILED, "ENOEXEC", "crc16")
    assert not (await a.ask(find(a.new_call(), "mine"))).found
    await a.ask(finish(call, "other", Outcome.LOAD))
    # The same, formed together with the insertion.
    call = a.new_call()
    together = pb.ReserveName(module="other", formation=pb.Formation(exports=exports("crc16")))
    answer = await a.ask(pb.Operation(call_id=call, reserve_name=together))
    assert (answer.verdict, answer.errno, answer.value) == (PROCEED, "ENOEXEC", "crc16")


async def test_who_waits_for_an_init_function_is_told_however_it_ends(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    for outcome in (Outcome.LIVE, Outcome.INIT):
        call = a.new_call()
        await a.ask(reserve(call, "jbd2"))
        await a.ask(form(call, "jbd2", ("jbd2_start",)))
        waiting = b.begin(await_init(b.new_call(), "jbd2"))
        given_up = b.new_call()
        impatient = b.begin(await_init(given_up, "jbd2"))
        await settle(b)
        assert bench.ledger.waiting_calls("default") == 2
        await b.send(interrupt(given_up))
        assert (await impatient).verdict == INTERRUPTED
        await a.ask(finish(call, "jbd2", outcome))
        told = await waiting
        assert (told.verdict, told.waited) == (PROCEED, True)
        assert (await b.ask(await_init(b.new_call(), "jbd2"))).verdict == PROCEED
        if outcome is Outcome.LIVE:
            assert await errno_of_unload(a, "jbd2") == ""
    assert bench.ledger.waiting_calls("default") == 0


async def test_a_module_whose_loader_is_gone_leaves_no_links(bench: Bench) -> None:
    a, b = await connected(bench, "a", "b")
    await load(b, "crc16", "crc16")
    call = a.new_call()
    await a.ask(reserve(call, "jbd2"))
    await a.ask(form(call, "jbd2", ("jbd2_start",), ((await found(a, "crc16")).owner,)))
    waiting = b.begin(await_init(b.new_call(), "jbd2"))
    await settle(b)
    a.disconnect()
    bench.now_seconds += 20
    bench.ledger.expire_leases()
    assert (await waiting).verdict == PROCEED
    assert not (await b.ask(find(b.new_call(), "jbd2_start"))).found
    assert await errno_of_unload(b, "crc16") == ""
    # What it formed is gone, and so is whoever could make it live.
    with pytest.raises(LeaseEnded):
        await a.connect()
    assert stored(bench) == [0, 0]


@pytest.mark.parametrize(
    ("formation", "says"),
    [
        (pb.Formation(exports=b"\xff"), "no Exports message"),
        (pb.Formation(exports=bytes(2 << 20)), "2097152 bytes"),
        (pb.Formation(exports=b"\x0a\0" * 70_000), "exports of 140000 bytes have so many parts"),
        (pb.Formation(uses=[pb.Use(module="a"), pb.Use(module="a")]), "not named once each"),
        (pb.Formation(uses=[pb.Use(module="xfs")]), "not named once each"),
        (pb.Formation(uses=[pb.Use(module="x y")]), "no name of a module"),
        (pb.Formation(percpu_bytes=-1), "percpu_bytes -1"),
    ],
)
async def test_a_formation_that_makes_no_sense_is_refused(bench: Bench, formation: pb.Formation, says: str) -> None:
    (a,) = await connected(bench, "a")
    call = a.new_call()
    await a.ask(reserve(call))
    answer = await a.ask(pb.Operation(call_id=call, form_module=pb.FormModule(module="xfs", formation=formation)))
    assert answer.verdict == INVALID
    assert says in answer.message
    stranger = a.new_call()
    answer = await a.ask(form(stranger, "xfs"))
    assert (answer.verdict, "can't form 'xfs'" in answer.message) == (INVALID, True)
    assert (await a.ask(form(call, "xfs"))).verdict == PROCEED


async def test_who_forms_with_the_insertion_is_told_where_per_cpu_room_is_missing(bench: Bench) -> None:
    (a,) = await connected(bench, "a")

    async def insert(call_id: int, module: str, percpu_bytes: int, room_bytes: int) -> pb.OperationResult:
        formation = pb.Formation(percpu_bytes=percpu_bytes)
        asked = pb.ReserveName(module=module, formation=formation, percpu_room_bytes=room_bytes)
        answer = await a.ask(pb.Operation(call_id=call_id, reserve_name=asked))
        assert answer.verdict == PROCEED
        return answer

    first, second, third = a.new_call(), a.new_call(), a.new_call()
    assert (await insert(first, "xfs", 60, 100)).errno == ""
    # It has its room: nothing else is to be found for it when it asks again.
    assert (await insert(first, "xfs", 60, 100)).errno == ""
    refused = await insert(second, "ext4", 41, 100)
    assert (refused.errno, refused.percpu_bytes) == ("ENOMEM", 60)
    assert (await insert(third, "btrfs", 40, 100)).errno == ""
    # The name is its own all the same, and its call ends as any other that fails then.
    await a.ask(finish(second, "ext4", Outcome.LOAD))
    for call, module in ((first, "xfs"), (third, "btrfs")):
        assert (await a.ask(finish(call, module))).verdict == PROCEED
    assert (await a.ask(find(a.new_call(), "any"))).percpu_bytes == 100
    fourth = a.new_call()
    assert (await insert(fourth, "ext4", 1, 0)).errno == "", "nobody has asked whether there is room"


@pytest.mark.parametrize("seed", range(4))
async def test_no_sequence_leaves_an_export_or_a_user_behind(bench: Bench, seed: int) -> None:
    draw = random.Random(seed)
    names = [f"m{number}" for number in range(6)]
    (loader,) = await connected(bench, "a")
    coming: dict[str, int] = {}
    live: set[str] = set()
    for _ in range(150):
        name = draw.choice(names)
        action = draw.random()
        if action < 0.03:
            await bench.crash()
            await loader.connect()
        elif action < 0.06:
            loader.disconnect()
            bench.now_seconds += 20
            bench.ledger.expire_leases()
            await loader.begin_anew()
            coming.clear()
        elif name in coming:
            outcome = draw.choice([Outcome.LIVE, Outcome.INIT])
            assert (await loader.ask(finish(coming.pop(name), name, outcome))).verdict == PROCEED
            live |= {name} if outcome is Outcome.LIVE else set()
        elif name in live:
            if not await errno_of_unload(loader, name, forced=draw.random() < 0.5):
                live.discard(name)
        else:
            call = loader.new_call()
            wanted = [f"{other}_symbol" for other in names if other != name]
            asked = pb.ReserveName(module=name, symbols=wanted)
            answer = await loader.ask(pb.Operation(call_id=call, reserve_name=asked))
            assert {one.owner.module for one in answer.found} == live | set(coming)
            uses = tuple(one.owner for one in answer.found if not one.initialising and draw.random() < 0.4)
            assert (await loader.ask(form(call, name, (f"{name}_symbol",), uses))).verdict == PROCEED
            coming[name] = call
    for name, call in coming.items():
        await loader.ask(finish(call, name, Outcome.INIT))
    while live:
        gone = {name for name in live if not await errno_of_unload(loader, name)}
        assert gone, f"nothing of {live} can be unloaded"
        live -= gone
    links = bench.ledger._state.systems["default"].links.links
    assert len(links) == links.waiting == links.percpu_bytes == 0
    assert stored(bench) == [0, 0]


async def test_no_more_symbols_are_asked_for_at_once_than_fit_into_an_answer(bench: Bench) -> None:
    [a] = await connected(bench, "a")
    many = [f"s{n}" for n in range(MAX_SYMBOLS + 1)]
    result = await a.ask(find(1, *many))
    assert (result.verdict, result.message) == (INVALID, f"{MAX_SYMBOLS + 1} symbols are more than {MAX_SYMBOLS}")
    asked = pb.ReserveName(module="xfs", symbols=many)
    assert (await a.ask(pb.Operation(call_id=2, reserve_name=asked))).verdict == INVALID
    assert (await a.ask(reserve(3, "xfs"))).verdict == PROCEED
