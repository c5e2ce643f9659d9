"""Finite memory in the ledger: shared by all loaders, kept through restarts, given back by whoever is gone."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modpressure.errors import NotNow
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.system_memory import Amounts
from modpressure.v1 import ledger_service_pb2 as pb
from tests.integration.test_ledger import FAILED, INVALID, PROCEED, Bench, Loader, check, ended, reserve

PAGE = 4096
LIMITS = Amounts(memory_bytes=20 * PAGE, module_area_bytes=10 * PAGE)
SYSTEM = "small"


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = await Bench.open(tmp_path / "stats.sqlite3")
    await bench.ledger.create_system(SYSTEM, 2, LIMITS)
    yield bench
    await bench.close()


async def connected(bench: Bench, *names: str) -> list[Loader]:
    loaders = [Loader(bench, name) for name in names]
    for loader in loaders:
        await loader.connect()
    return loaders


def here(operation: pb.Operation) -> pb.Operation:
    operation.system = SYSTEM
    return operation


def allocate(call_id: int, part: pb.MemoryPart.ValueType, *pages: int) -> pb.Operation:
    sizes = [PAGE * size for size in pages]
    return here(pb.Operation(call_id=call_id, allocate_memory=pb.AllocateMemory(part=part, sizes=sizes)))


def file(call_id: int, pages: int) -> pb.Operation:
    return allocate(call_id, pb.MEMORY_PART_FILE, pages)


def image(call_id: int, pages: int) -> pb.Operation:
    return allocate(call_id, pb.MEMORY_PART_IMAGE, pages)


def layout(call_id: int, *pages: int) -> pb.Operation:
    return allocate(call_id, pb.MEMORY_PART_LAYOUT, *pages)


def finish(call_id: int, outcome: Outcome, module: str = "xfs") -> pb.Operation:
    errno = "" if outcome is Outcome.LIVE else "ENOEXEC"
    core_bytes = 2 * PAGE if outcome is Outcome.LIVE else 0
    # Whoever may have the name says so: it is given back only if it is this call's.
    call = pb.FinishCall(call=ended(outcome, module, errno), reserved=True, core_bytes=core_bytes)
    return here(pb.Operation(call_id=call_id, finish_call=call))


async def load(loader: Loader, call_id: int, module: str) -> None:
    """Take a call to its end: two pages of file, and a layout of two pages for good and one for init."""
    for operation in (file(call_id, 2), layout(call_id, 1, 1, 0, 0, 1), here(reserve(call_id, module))):
        assert (await loader.ask(operation)).verdict == PROCEED
    assert (await loader.ask(finish(call_id, Outcome.LIVE, module))).verdict == PROCEED


def taken(bench: Bench) -> Amounts:
    found = bench.ledger.memory_taken(SYSTEM)
    assert found is not None
    return found[0]


MODULE = Amounts(2 * PAGE, 0, 4 * PAGE)
"""What stays of a module that ``load`` has loaded."""


async def test_loaders_share_what_a_system_has(bench: Bench) -> None:
    one, two = await connected(bench, "one", "two")
    assert (await one.ask(file(1, 15))).verdict == PROCEED
    refused = await two.ask(file(1, 6))
    assert (refused.verdict, refused.errno) == (FAILED, "ENOMEM")
    assert refused.shortage == pb.Shortage(area="pages", asked_bytes=6 * PAGE, left_bytes=5 * PAGE)
    await one.ask(finish(1, Outcome.KREAD))
    assert (await two.ask(file(1, 6))).verdict == PROCEED
    assert taken(bench) == Amounts(6 * PAGE, 7 * PAGE, 0)


async def test_the_packed_file_goes_with_the_next_question(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    await one.ask(file(1, 2))
    await one.ask(image(1, 5))
    assert taken(bench).memory_bytes == 7 * PAGE
    await one.ask(here(check(1)))
    assert taken(bench).memory_bytes == 5 * PAGE


async def test_copies_go_before_init_and_its_types_after_it(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    await one.ask(file(1, 2))
    await one.ask(layout(1, 1, 1, 0, 0, 1))
    await one.ask(here(pb.Operation(call_id=1, free_memory=pb.FreeMemory())))
    assert taken(bench) == Amounts(3 * PAGE, 0, 6 * PAGE)
    await one.ask(here(reserve(1)))
    await one.ask(finish(1, Outcome.LIVE))
    assert taken(bench) == MODULE


async def test_anybody_unloads_a_module_and_its_memory(bench: Bench) -> None:
    one, two = await connected(bench, "one", "two")
    await load(one, 1, "xfs")
    assert taken(bench) == MODULE
    remove = pb.RemoveModule()
    remove.unload.module = "xfs"
    assert (await two.ask(here(pb.Operation(call_id=1, remove_module=remove)))).verdict == PROCEED
    assert taken(bench) == Amounts()


async def test_a_batch_that_is_sent_again_takes_nothing_twice(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    await one.submit(1, file(1, 12))
    one.disconnect()
    await one.connect()
    answer = one.expect(1)
    await one.submit(1, file(1, 12))
    assert (await answer).verdict == PROCEED
    assert taken(bench).memory_bytes == 12 * PAGE


async def test_a_restart_knows_what_is_held_until_leases_end(bench: Bench) -> None:
    one, two = await connected(bench, "one", "two")
    await load(one, 1, "xfs")
    await one.ask(file(2, 3))
    await two.ask(file(1, 4))
    await two.ask(layout(1, 1))
    before = bench.ledger.memory_taken(SYSTEM)
    await bench.crash()
    assert bench.ledger.memory_taken(SYSTEM) == before
    two.session = None
    await two.connect()
    # The other one does not come back. Its live module stays.
    bench.end_leases()
    assert taken(bench) == MODULE.plus(Amounts(5 * PAGE, 5 * PAGE, 2 * PAGE))
    await two.ask(finish(1, Outcome.LOAD))
    assert taken(bench) == MODULE
    await bench.crash()
    assert taken(bench) == MODULE


async def test_who_holds_no_memory_can_neither_get_more_nor_become_live(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    refused = await one.ask(layout(1, 1))
    assert refused.verdict == INVALID
    assert "call 1 holds no memory to go on with" in refused.message
    await one.ask(file(2, 3))
    await one.ask(here(reserve(2)))
    refused = await one.ask(finish(2, Outcome.LIVE))
    assert "call 2 holds no memory to go on with" in refused.message
    assert (await one.ask(finish(2, Outcome.REFUSED))).verdict == PROCEED
    assert taken(bench) == Amounts()


async def test_a_system_is_not_reset_under_calls_that_hold_memory(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    await load(one, 1, "xfs")
    await one.ask(file(2, 3))
    with pytest.raises(NotNow, match="calls are in flight"):
        await bench.ledger.reset_system(SYSTEM)
    await one.ask(finish(2, Outcome.KREAD))
    await bench.ledger.reset_system(SYSTEM)
    assert bench.ledger.memory_taken(SYSTEM) == (Amounts(), Amounts())
    await bench.crash()
    assert bench.ledger.memory_taken(SYSTEM) == (Amounts(), Amounts())
    row = bench.store.system(SYSTEM)
    assert row is not None
    assert row.limits == LIMITS
    await bench.ledger.delete_system(SYSTEM)
    await bench.ledger.create_system(SYSTEM, 2)
    assert bench.ledger.memory_taken(SYSTEM) is None


async def test_opening_tells_whether_to_ask(bench: Bench) -> None:
    [one] = await connected(bench, "one")
    opened = await one.ask(here(pb.Operation(call_id=1, open_system=pb.OpenSystem())))
    assert opened.has_limits
    opened = await one.ask(pb.Operation(call_id=2, open_system=pb.OpenSystem()))
    assert not opened.has_limits
    asked = file(3, 1)
    asked.system = "default"
    refused = await one.ask(asked)
    assert refused.message == "system 'default' has no limits of memory"


@pytest.mark.parametrize(
    ("part", "sizes", "sentence"),
    [
        (9, [1], "there is no part of memory number 9"),
        (pb.MEMORY_PART_FILE, [], "0 sizes are not between 1 and 1"),
        (pb.MEMORY_PART_LAYOUT, [1] * 8, "8 sizes are not between 1 and 7"),
        (pb.MEMORY_PART_FILE, [-1], "-1 is no size"),
        (pb.MEMORY_PART_FILE, [1 << 60], f"{1 << 60} is no size"),
    ],
)
async def test_nonsense_is_refused_in_a_sentence(
    bench: Bench, part: pb.MemoryPart.ValueType, sizes: list[int], sentence: str
) -> None:
    [one] = await connected(bench, "one")
    asked = pb.AllocateMemory(part=part, sizes=sizes)
    refused = await one.ask(here(pb.Operation(call_id=1, allocate_memory=asked)))
    assert (refused.verdict, refused.message) == (INVALID, sentence)
    assert taken(bench) == Amounts()


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_to_loaders_and_stats_svc_only_live_modules_hold_memory(bench: Bench, seed: int) -> None:
    dice = random.Random(seed)
    loaders = await connected(bench, "one", "two", "three")
    calls: dict[tuple[int, int], list[str]] = {}
    """Calls in flight: what is left to be done of each."""
    next_call = dict.fromkeys(range(len(loaders)), 0)
    refused = 0

    async def step(number: int, call_id: int) -> None:
        nonlocal refused
        what = calls[number, call_id].pop(0)
        name = f"m{number}-{call_id}"
        operation = {
            "file": lambda: file(call_id, dice.randint(1, 4)),
            "image": lambda: image(call_id, dice.randint(1, 4)),
            "check": lambda: here(check(call_id, name)),
            "layout": lambda: layout(call_id, *(dice.randint(0, 2) for _ in range(6)), 1),
            "reserve": lambda: here(reserve(call_id, name)),
            "free": lambda: here(pb.Operation(call_id=call_id, free_memory=pb.FreeMemory())),
            "live": lambda: finish(call_id, Outcome.LIVE, name),
            "fail": lambda: finish(call_id, Outcome.KREAD, name),
        }[what]()
        result = await loaders[number].ask(operation)
        if result.verdict != PROCEED:
            refused += result.errno == "ENOMEM"
            calls[number, call_id] = ["fail"]
        elif what in ("live", "fail"):
            del calls[number, call_id]

    def assert_within_limits() -> None:
        found = bench.ledger.memory_taken(SYSTEM)
        assert found is not None
        for amounts in found:
            assert all(
                amount >= 0 and (not limit or amount <= limit) for amount, limit in zip(amounts, LIMITS, strict=True)
            )

    for _ in range(120):
        action = dice.choices(["begin", "step", "drop", "away", "crash", "unload"], [20, 70, 3, 2, 2, 8])[0]
        number = dice.randrange(len(loaders))
        loader = loaders[number]
        if action == "begin":
            next_call[number] += 1
            ending = dice.choice([["live"], ["live"], ["fail"]])
            steps = ["file", *dice.choice([[], ["image"]]), "check", "layout", "reserve", *dice.choice([[], ["free"]])]
            kept = len(steps) if ending == ["live"] else dice.randint(1, len(steps))
            calls[number, next_call[number]] = [*steps[:kept], *ending]
        elif action == "step" and calls:
            await step(*dice.choice(list(calls)))
        elif action == "drop":
            loader.disconnect()
            await loader.connect()
        elif action == "away":
            loader.disconnect()
            bench.end_leases()
            await loader.begin_anew()
            calls = {call: left for call, left in calls.items() if call[0] != number}
        elif action == "crash":
            await bench.crash()
            for each in loaders:
                each.session = None
                await each.connect()
        elif action == "unload":
            for row in bench.store.modules(SYSTEM, before_position=None, limit=1):
                remove = pb.RemoveModule()
                remove.unload.module = row.name
                await loader.ask(here(pb.Operation(call_id=10_000 + _, remove_module=remove)))
        assert_within_limits()
    while calls:
        await step(*next(iter(calls)))
    assert refused, "limits were never met"
    expected = Amounts()
    for row in bench.store.load().held:
        assert (row.holding.file_bytes, row.holding.image_bytes, row.holding.init_bytes) == (0, 0, 0)
        expected = expected.plus(row.holding.amounts)
    live = {(row.instance_id, row.call_id) for row in bench.store.modules(SYSTEM, before_position=None, limit=100)}
    assert {(row.instance_id, row.call_id) for row in bench.store.load().held} <= live
    assert taken(bench) == expected
    await bench.ledger.reset_system(SYSTEM)
    assert taken(bench) == Amounts()
