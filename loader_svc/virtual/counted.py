"""The order in which a machine counts its calls, which is not that in which they end."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Call = TypeVar("Call")


class CountedOrder(Generic[Call]):
    """Hands calls on in the order in which they were counted, each as soon as it and all before it have ended.

    A call that fails is counted, and its module's name noted, before it frees what it holds; another one may be counted
    later and end sooner. Who counts the calls again, as stats_svc does, is to note the names in the same order.
    """

    def __init__(self, record: Callable[[Call], None], first: int) -> None:
        """``record`` takes the calls; ``first`` is the number of the first one that there is to be."""
        self._record = record
        self._next = first
        self._ended: list[tuple[int, int, Call]] = []
        self._added = 0

    def add(self, number: int, call: Call) -> None:
        """Take a call that has ended, and was the ``number``-th to be counted."""
        self._added += 1
        heapq.heappush(self._ended, (number, self._added, call))
        while self._ended and self._ended[0][0] <= self._next:
            self._next = self._ended[0][0] + 1
            self._record(heapq.heappop(self._ended)[2])

    def finish(self) -> None:
        """Hand on what is left: no more calls will end."""
        while self._ended:
            self._record(heapq.heappop(self._ended)[2])
