"""Virtual time, and the CPUs that share it: what happens next, decided by nothing but the order of events."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

Action = Callable[[], None]
Task = Callable[[], int | None]

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


class Cpus:
    """CPUs that take turns at tasks, a slice at a time.

    A task is called to do its next piece of work at once, and returns how long that keeps the CPU busy, in ns, or None
    when it leaves the CPU: because it waits or because it has ended.
    """

    def __init__(self, clock: Clock, count: int | None = None, slice_ns: int = DEFAULT_SLICE_NS) -> None:
        """``count`` None means as many CPUs as there are tasks."""
        self._clock = clock
        self._count = count
        self._slice_ns = slice_ns
        self._busy = 0
        self._queue: deque[tuple[Task, int]] = deque()

    def enter(self, task: Task) -> None:
        """Have a task called in its turn."""
        self._queue.append((task, 0))
        self._clock.at(self._clock.now_ns, self._dispatch)

    def _dispatch(self) -> None:
        while self._queue and (self._count is None or self._busy < self._count):
            task, owed_ns = self._queue.popleft()
            self._busy += 1
            self._stay(task, owed_ns, self._slice_ns)

    def _stay(self, task: Task, owed_ns: int, left_ns: int) -> None:
        """Go on with a task that owes some time for what it did, and has some left of its slice."""
        while not owed_ns:
            cost_ns = task()
            if cost_ns is None:
                self._leave()
                return
            owed_ns = cost_ns
        spent_ns = owed_ns if self._count is None else min(owed_ns, left_ns)
        self._clock.at(
            self._clock.now_ns + spent_ns, partial(self._spent, task, owed_ns - spent_ns, left_ns - spent_ns)
        )

    def _spent(self, task: Task, owed_ns: int, left_ns: int) -> None:
        if left_ns > 0:
            self._stay(task, owed_ns, left_ns)
        elif self._queue:
            self._queue.append((task, owed_ns))
            self._leave()
        else:
            self._stay(task, owed_ns, self._slice_ns)

    def _leave(self) -> None:
        self._busy -= 1
        if self._queue:
            self._clock.at(self._clock.now_ns, self._dispatch)
