"""Virtual time, and the CPUs that share it: what happens next, decided by nothing but the order of events."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

Action = Callable[[], None]

DEFAULT_SLICE_NS: Final = 3_000_000
"""How long a CPU stays with one task while others wait for it (the kernel's base slice on a few CPUs)."""


class Clock:
    """Events in order of their time, and of their making where that is equal."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._events: list[tuple[int, int, Action]] = []
        self._made = 0

    def at(self, time_ns: int, action: Action) -> None:
        """Have something done at a time, now at the earliest."""
        self._made += 1
        heapq.heappush(self._events, (max(time_ns, self.now_ns), self._made, action))

    def run(self, until_ns: int | None = None) -> None:
        """Do all that is to be done, up to a time if one is given."""
        while self._events and (until_ns is None or self._events[0][0] <= until_ns):
            self.now_ns, _, action = heapq.heappop(self._events)
            action()
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)


@dataclass(slots=True)
class _Work:
    cost_ns: int
    done: Action


@dataclass(slots=True)
class Cpus:
    """CPUs that take turns at work, a slice at a time. Work that costs nothing is done at its turn."""

    clock: Clock
    count: int | None = None
    """None for as many as are needed."""

    slice_ns: int = DEFAULT_SLICE_NS
    _busy: int = 0
    _queue: deque[_Work] = field(default_factory=deque)

    def work(self, cost_ns: int, done: Action) -> None:
        """Have ``cost_ns`` of work done on some CPU, and then ``done`` called."""
        self._queue.append(_Work(cost_ns, done))
        self.clock.at(self.clock.now_ns, self._dispatch)

    def _dispatch(self) -> None:
        while self._queue and (self.count is None or self._busy < self.count):
            work = self._queue.popleft()
            self._busy += 1
            spent_ns = work.cost_ns if self.count is None else min(work.cost_ns, self.slice_ns)
            self.clock.at(self.clock.now_ns + spent_ns, partial(self._after, work, spent_ns))

    def _after(self, work: _Work, spent_ns: int) -> None:
        self._busy -= 1
        work.cost_ns -= spent_ns
        if work.cost_ns > 0:
            self._queue.append(work)
        else:
            work.done()
        self._dispatch()
