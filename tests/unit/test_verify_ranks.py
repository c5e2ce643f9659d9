"""The rank-sum test, against counting all choices one by one."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_svc.verify.ranks import rank_chance

VALUES = st.integers(0, 6)


def by_counting(sample: list[int], reference: list[int]) -> float:
    pooled = [*sample, *reference]
    ranks = [sum(2 * (other < value) + (other == value) for other in pooled) for value in pooled]
    sums = [sum(choice) for choice in combinations(ranks, len(sample))]
    observed = sum(ranks[: len(sample)])
    low, high = sum(each <= observed for each in sums), sum(each >= observed for each in sums)
    return min(1.0, 2 * min(low, high) / len(sums))


@given(st.lists(VALUES, max_size=4), st.lists(VALUES, max_size=6))
def test_the_chance_is_that_of_all_choices(sample: list[int], reference: list[int]) -> None:
    assert rank_chance(sample, reference) == pytest.approx(by_counting(sample, reference))


def test_what_lies_beyond_all_others_is_unlikely_the_more_there_is_of_it() -> None:
    reference = list(range(48))
    chances = [rank_chance([99] * count, reference) for count in range(5)]
    assert chances[0] == 1
    assert chances == sorted(chances, reverse=True)
    assert chances[2] > 1e-4 > chances[3]
