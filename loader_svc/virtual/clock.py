"""Virtual time: what happens next, decided by nothing but the order of events."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush, heapreplace
from typing import Any, Final

Action = Callable[[], None]

DEFAULT_SLICE_NS: Final = 3_000_000
"""How long a CPU stays with one task while others wait for it (the kernel's base slice on a few CPUs)."""

Entry = tuple[int, int, Callable[[Any], int | None], Any]
"""Time, number, what is to be done, and with what. It may return in how many ns it is to be done again."""


class Clock:
    """Events in order of their time, and of their making where that is equal."""

    __slots__ = ("events", "made", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self.events: list[Entry] = []
        """What is to be done, a heap."""
        self.made = 0
        """How many entries were made so far: the number of the last one."""

    def at(self, time_ns: int, action: Action) -> None:
        """Have something done at a time, now at the earliest."""
        self.send(time_ns, _do, action)

    def send(self, time_ns: int, action: Callable[[Any], int | None], argument: Any) -> None:
        """Have something done with an argument at a time, now at the earliest: no closure to be made for it."""
        self.made = made = self.made + 1
        now_ns = self.now_ns
        heappush(self.events, (time_ns if time_ns > now_ns else now_ns, made, action, argument))

    def run(self, until_ns: int | None = None) -> None:
        """Do all that is to be done, up to a time if one is given."""
        events = self.events
        while events and (until_ns is None or events[0][0] <= until_ns):
            # It stays the first one until it is done: what is made meanwhile comes later, by its number if not by time.
            self.now_ns, _, action, argument = events[0]
            try:
                again_ns = action(argument)
            except BaseException:
                heappop(events)
                raise
            if again_ns is None:
                heappop(events)
            else:
                self.made = made = self.made + 1
                heapreplace(events, (self.now_ns + again_ns, made, action, argument))
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)


def _do(action: Action) -> None:
    action()
