"""Whether two small samples of a race look like the same race: the rank-sum test, exact, ties included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb


def rank_chance(sample: Sequence[int], reference: Sequence[int]) -> float:
    """Return the chance that ``sample`` would rank at least as far off among both as it does, to either side.

    1 means that nothing is odd about it, 0 can't be reached: it takes several values, all beyond all of the reference,
    to come near. Nothing is assumed about how the values are distributed (Wilcoxon's rank-sum test; the chance is
    counted over all choices of as many values from both samples together). 1 for a sample without values.
    """
    pooled = sorted([*sample, *reference])
    counts = Counter(pooled)
    # Twice the rank, the mean of the ranks for equal values, so that all are whole numbers.
    ranks: dict[int, int] = {}
    before = 0
    for value, count in counts.items():
        ranks[value] = 2 * before + count + 1
        before += count
    # How many choices of k values have a given sum of ranks, for all k up to the size of the sample.
    choices: list[Counter[int]] = [Counter({0: 1}), *(Counter[int]() for _ in sample)]
    for value in pooled:
        for size in range(len(sample), 0, -1):
            for total, ways in choices[size - 1].items():
                choices[size][total + ranks[value]] += ways
    observed = sum(ranks[value] for value in sample)
    sums = choices[len(sample)]
    low = sum(ways for total, ways in sums.items() if total <= observed)
    high = sum(ways for total, ways in sums.items() if total >= observed)
    return min(1.0, 2 * min(low, high) / comb(len(pooled), len(sample)))
