"""Calls are handed on in the order in which they were counted, whatever order they end in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loader_svc.virtual.counted import CountedOrder


@given(st.permutations(range(5, 25)))
def test_any_order_of_ends_gives_the_order_of_counting(ends: list[int]) -> None:
    handed: list[int] = []
    order = CountedOrder(handed.append, 5)
    for place, number in enumerate(ends):
        order.add(number, number)
        ended = set(ends[: place + 1])
        # All that nothing before them holds up.
        assert handed == list(range(5, 5 + len(handed)))
        assert 5 + len(handed) not in ended
    assert handed == sorted(ends)


def test_a_number_that_never_comes_holds_up_no_longer_than_to_the_end() -> None:
    handed: list[int] = []
    order = CountedOrder(handed.append, 0)
    for number in (3, 2):
        order.add(number, number)
    assert handed == []
    order.finish()
    assert handed == [2, 3]
