"""Shares of a limited number of places, and rates."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modpressure.errors import Overloaded
from modpressure.shares import Places, Rate, Shares


def take_all(shares: Shares, holder: str) -> int:
    """Take as much as the holder may have; return how much that was."""
    taken = 0
    while shares.try_take(holder):
        taken += 1
    return taken


def test_one_has_half_two_a_third_three_a_quarter() -> None:
    shares = Shares(1200)
    assert take_all(shares, "a") == 600
    # What the first one has it keeps; of the rest the second has half.
    assert take_all(shares, "b") == 300
    assert take_all(shares, "c") == 150
    shares.give("a", 600)
    assert take_all(shares, "d") == 375


@given(st.integers(2, 200), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 20)), max_size=200))
def test_whoever_comes_new_finds_room_as_long_as_there_is_a_place(places: int, asked: list[tuple[str, int]]) -> None:
    shares = Shares(places)
    held: dict[str, int] = {}
    for holder, number in asked:
        if shares.try_take(holder, number):
            held[holder] = held.get(holder, 0) + number
        elif held.get(holder):
            shares.give(holder, held.pop(holder))
        assert shares.taken == sum(held.values())
        assert all(shares.held(name) == number for name, number in held.items())
        # A holder has no more than was free when it took its last.
        free = places - shares.taken
        assert free >= 0
        assert shares.try_take("newcomer") is (free >= 2)
        if shares.held("newcomer"):
            shares.give("newcomer")


def test_a_rate_allows_a_second_at_once_and_then_one_after_another() -> None:
    rate = Rate(10, 100.0)
    assert [rate.take(100.0) for _ in range(10)] == [0.0] * 10
    assert rate.take(100.0) == 0.1
    assert round(rate.take(100.05), 6) == 0.05
    assert rate.take(100.125) == 0.0
    assert not rate.is_full(100.9)
    assert rate.is_full(101.2)


def test_what_is_taken_in_advance_is_paid_back_by_waiting() -> None:
    rate = Rate(10, 0.0)
    assert [rate.take_later(0.0) for _ in range(10)] == [0.0] * 10
    assert [round(rate.take_later(0.0), 3) for _ in range(3)] == [0.1, 0.2, 0.3]
    assert rate.take_later(1.0) == 0.0


def test_less_than_one_a_second_is_one_at_a_time() -> None:
    rate = Rate(0.5, 0.0)
    assert rate.take(0.0) == 0.0
    assert rate.take(0.0) == 2.0
    assert rate.take(2.0) == 0.0


async def taken(places: Places, holder: str, number: int) -> list[asyncio.Task[None]]:
    """Take so many places, as far as they are to be had; return what is taken or waits."""
    tasks = [asyncio.create_task(places.take(holder)) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


async def test_who_has_as_many_places_as_it_may_waits_for_its_next_and_others_do_not() -> None:
    places = Places(6, "things")
    mine = await taken(places, "a", 5)
    assert [task.done() for task in mine] == [True, True, True, False, False]
    others = await taken(places, "b", 1) + await taken(places, "c", 1)
    assert all(task.done() for task in others)
    with pytest.raises(Overloaded, match="no place left for d: things are too many"):
        await places.take("d")
    # Who has gone takes nothing, and the places go to whoever waits.
    mine[3].cancel()
    for holder in "bac":
        assert not mine[4].done()
        places.give(holder)
        await asyncio.sleep(0)
    assert (mine[4].done(), places.held("a")) == (True, 3)
    places.give("a", 3)
    assert [places.held(holder) for holder in "abc"] == [0, 0, 0]


async def test_who_goes_just_when_it_is_given_a_place_gives_it_back() -> None:
    places = Places(2, "things")
    mine = await taken(places, "a", 2)
    places.give("a")
    mine[1].cancel()
    await asyncio.gather(*mine, return_exceptions=True)
    assert (mine[1].cancelled(), places.held("a")) == (True, 0)
