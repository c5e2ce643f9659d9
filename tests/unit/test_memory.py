"""Areas, the meter and the budget."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from loader_svc.memory import PAGE_BYTES, Area, Holdings, MemoryBudget, Meter
from modpressure.errors import OverLimit


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


async def test_the_budget_serves_in_turn_and_the_large_is_not_overtaken_by_the_small() -> None:
    budget = MemoryBudget(100)
    await budget.take(80, "first")
    order: list[str] = []

    async def take(size: int, name: str) -> None:
        await budget.take(size, name)
        order.append(name)

    large = asyncio.ensure_future(take(90, "large"))
    await asyncio.sleep(0)
    small = asyncio.ensure_future(take(10, "small"))
    await asyncio.sleep(0)
    assert order == []
    assert not budget.try_take(1, "a thread")
    budget.give(80)
    await asyncio.gather(large, small)
    assert order == ["large", "small"]
    assert budget.taken_bytes == 100


async def test_what_can_never_fit_is_refused_at_once_with_both_numbers() -> None:
    with pytest.raises(OverLimit, match=r"xfs\.ko needs 101 bytes .* limit is 100 bytes"):
        await MemoryBudget(100).take(101, "xfs.ko")


async def test_who_may_not_wait_is_refused_while_it_is_full() -> None:
    budget = MemoryBudget(100)
    await budget.take(60, "first")
    with pytest.raises(OverLimit, match=r"xfs\.ko needs 50 bytes of memory, 40 of the loader's 100 bytes are free"):
        await budget.take(50, "xfs.ko", wait=False)


async def test_a_cancelled_wait_neither_keeps_its_place_nor_leaks() -> None:
    budget = MemoryBudget(100)
    await budget.take(100, "first")
    waiting = asyncio.ensure_future(budget.take(100, "second"))
    behind = asyncio.ensure_future(budget.take(10, "third"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    budget.give(100)
    await behind
    assert budget.taken_bytes == 10


async def test_a_wait_cancelled_after_it_was_served_gives_back_what_it_got() -> None:
    budget = MemoryBudget(100)
    await budget.take(100, "first")
    waiting = asyncio.ensure_future(budget.take(100, "second"))
    await asyncio.sleep(0)
    budget.give(100)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert budget.taken_bytes == 0


async def test_who_has_cancelled_its_turn_but_not_yet_left_is_passed_over() -> None:
    budget = MemoryBudget(100)
    await budget.take(100, "first")
    waiting = asyncio.ensure_future(budget.take(100, "second"))
    behind = asyncio.ensure_future(budget.take(60, "third"))
    await asyncio.sleep(0)
    waiting.cancel()
    # Before the cancelled one runs again.
    budget.give(100)
    await asyncio.gather(waiting, return_exceptions=True)
    await behind
    assert waiting.cancelled()
    assert budget.taken_bytes == 60
