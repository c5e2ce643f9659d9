"""Areas, the meter and the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import pytest

from loader_svc.memory import PAGE_BYTES, Area, Holdings, MemoryBudget, Meter, Taken
from modpressure.errors import OverLimit, Overloaded


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE_BYTES


@pytest.fixture
def big_area() -> Iterator[Area]:
    area = Area(64 << 20, Holdings(Meter()), populate=True)
    yield area
    if area.size_bytes:
        area.free()


def test_an_area_takes_whole_pages_and_both_meters_show_it() -> None:
    meter = Meter()
    holdings = Holdings(meter)
    area = Area(PAGE_BYTES + 1, holdings)
    assert area.size_bytes == holdings.held_bytes == meter.held_bytes == 2 * PAGE_BYTES
    area.free()
    assert holdings.held_bytes == meter.held_bytes == 0
    assert holdings.peak_bytes == 2 * PAGE_BYTES


def test_the_resident_set_shows_a_populated_area_and_its_end(big_area: Area) -> None:
    with_area = resident_bytes()
    big_area.free()
    assert with_area - resident_bytes() == pytest.approx(64 << 20, rel=0.05)


def test_peaks_are_each_their_own() -> None:
    meter = Meter()
    whole = meter.begin_peak()
    meter.add(100)
    later = meter.begin_peak()
    meter.add(-100)
    meter.add(30)
    assert meter.take_peak(later) == 100
    meter.add(10)
    assert meter.end_peak(later) == 40
    assert meter.end_peak(whole) == 100


class Takers:
    """Those who ask a budget for memory, and the order in which they get it."""

    def __init__(self, limit_bytes: int, **settings: float) -> None:
        self.budget = MemoryBudget(limit_bytes, **settings)
        self.served: list[str] = []
        self.taken: dict[str, Taken] = {}

    async def ask(self, size_bytes: int, name: str) -> asyncio.Task[None]:
        """Ask for the client that the name begins with, and wait if need be."""

        async def take() -> None:
            self.taken[name] = await self.budget.take(size_bytes, name, name[0])
            self.served.append(name)

        task = asyncio.ensure_future(take())
        await asyncio.sleep(0)
        return task

    async def give(self, name: str) -> None:
        """Give back what somebody was given, and let those run who have it now."""
        self.budget.give(self.taken.pop(name))
        await asyncio.sleep(0)


async def test_of_one_client_the_large_is_not_overtaken_by_the_small() -> None:
    takers = Takers(100)
    await takers.ask(80, "a1")
    await takers.ask(90, "a large")
    await takers.ask(10, "a small")
    assert takers.served == ["a1"]
    assert takers.budget.try_take(1, "a thread", "a") is None
    await takers.give("a1")
    assert takers.served == ["a1", "a large", "a small"]
    assert takers.budget.taken_bytes == 100


async def test_others_pass_who_waits_for_what_was_there_before() -> None:
    takers = Takers(100)
    await takers.ask(60, "a live module")
    waiting = await takers.ask(50, "a waits")
    await takers.ask(30, "b1")
    assert takers.budget.try_take(10, "a thread", "b") is not None
    assert takers.served == ["a live module", "b1"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not takers.budget.waiting


async def test_who_would_fit_without_those_that_passed_is_passed_no_more() -> None:
    takers = Takers(100)
    await takers.ask(60, "a1")
    await takers.ask(90, "a large")
    await takers.ask(30, "b1")
    await takers.give("a1")
    # Others that go on asking for less would keep the large one out for ever.
    await takers.ask(10, "b2")
    await takers.ask(10, "c1")
    assert takers.budget.try_take(1, "a thread", "d") is None
    assert takers.served == ["a1", "b1"]
    await takers.give("b1")
    assert takers.served == ["a1", "b1", "a large", "b2"]
    await takers.give("b2")
    assert takers.served[-1] == "c1"


async def test_a_part_that_a_live_module_keeps_is_as_old_as_its_call() -> None:
    takers = Takers(100)
    await takers.ask(60, "a1")
    kept = takers.taken["a1"].part(20)
    await takers.ask(90, "a large")
    await takers.give("a1")
    await takers.ask(30, "b1")
    assert takers.served == ["a1", "b1"]
    takers.budget.give(kept)
    await takers.ask(30, "b2")
    await takers.give("b1")
    assert takers.served == ["a1", "b1", "a large"]


async def test_clients_take_turns() -> None:
    takers = Takers(100)
    await takers.ask(100, "z")
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        await takers.ask(50, name)
    await takers.give("z")
    for name in ("a1", "b1", "c1", "a2"):
        await takers.give(name)
    assert takers.served == ["z", "a1", "b1", "c1", "a2", "c2", "a3"]


async def test_what_can_never_fit_is_refused_at_once_with_both_numbers() -> None:
    with pytest.raises(OverLimit, match=r"xfs\.ko needs 101 bytes .* limit is 100 bytes"):
        await MemoryBudget(100).take(101, "xfs.ko")


async def test_who_may_not_wait_is_refused_while_it_is_full() -> None:
    budget = MemoryBudget(100)
    await budget.take(60, "first")
    with pytest.raises(OverLimit, match=r"xfs\.ko needs 50 bytes of memory, 40 of the loader's 100 bytes are free"):
        await budget.take(50, "xfs.ko", wait=False)


async def test_a_client_that_is_given_nothing_for_too_long_is_sent_away_and_what_fits_behind_is_served() -> None:
    takers = Takers(100, patience_seconds=0.01)
    await takers.ask(60, "a live module")
    waiting = [await takers.ask(size_bytes, f"a{number}") for number, size_bytes in enumerate((50, 60, 40, 50))]
    refused = r"a0 needs 50 bytes of memory, 40 of the loader's 100 bytes are free, and a was given none for 0.01 s"
    with pytest.raises(Overloaded, match=refused):
        await waiting[0]
    with pytest.raises(Overloaded, match="a1 needs 60"):
        await waiting[1]
    await waiting[2]
    with pytest.raises(Overloaded, match=r"a3 needs 50 bytes of memory, 0 of"):
        await waiting[3]
    assert takers.served == ["a live module", "a2"]
    assert (takers.budget.waiting, takers.budget.taken_bytes) == (0, 100)


async def test_a_cancelled_wait_neither_keeps_its_place_nor_leaks() -> None:
    takers = Takers(100)
    await takers.ask(100, "a1")
    waiting = await takers.ask(100, "a2")
    await takers.ask(10, "a3")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await takers.give("a1")
    assert takers.served == ["a1", "a3"]
    assert takers.budget.taken_bytes == 10


async def test_a_wait_cancelled_after_it_was_served_gives_back_what_it_got() -> None:
    takers = Takers(100)
    await takers.ask(100, "a1")
    waiting = await takers.ask(100, "a2")
    takers.budget.give(takers.taken["a1"])
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert takers.budget.taken_bytes == 0


async def test_who_has_cancelled_its_turn_but_not_yet_left_is_passed_over() -> None:
    takers = Takers(100)
    await takers.ask(100, "a1")
    waiting = await takers.ask(100, "a2")
    behind = await takers.ask(60, "a3")
    waiting.cancel()
    # Before the cancelled one runs again.
    takers.budget.give(takers.taken["a1"])
    await asyncio.gather(waiting, return_exceptions=True)
    await behind
    assert waiting.cancelled()
    assert takers.budget.taken_bytes == 60


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_the_limit_holds_and_everybody_is_served_in_the_end(seed: int) -> None:
    random, takers = Random(seed), Takers(100)
    tasks: list[asyncio.Task[None]] = []
    for number in range(500):
        name = f"{random.choice('abc')}{number}"
        waiting = [task for task in tasks if not task.done()]
        match random.choice(["ask", "ask", "give", "give", "keep", "cancel"]):
            case "ask":
                tasks.append(await takers.ask(random.randint(1, 100), name))
            case "give" if takers.taken:
                await takers.give(random.choice(list(takers.taken)))
            case "keep" if takers.taken:
                taken = takers.taken[random.choice(list(takers.taken))]
                takers.taken[name] = taken.part(random.randint(0, taken.size_bytes))
            case "cancel" if waiting:
                random.choice(waiting).cancel()
                if random.random() < 0.5:
                    await asyncio.sleep(0)
        assert 0 <= takers.budget.taken_bytes <= 100
    await asyncio.sleep(0)
    while takers.taken:
        await takers.give(random.choice(list(takers.taken)))
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    assert (takers.budget.waiting, takers.budget.taken_bytes) == (0, 0)
