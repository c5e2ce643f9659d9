"""Deadlines of one length for many tasks, with one timer for all of them."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

Task: TypeAlias = "asyncio.Task[Any]"


class Deadlines:
    """Cancels each task that does not end what it has begun within a time. To be used from one event loop.

    A timer for each would cost more than most of what is timed. As all take as long, they are due in the order in which
    they began, and the timer is set for the first.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: dict[Task, float] = {}
        self._late: set[Task] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, task: Task) -> None:
        """Have ``task`` cancelled after the time, unless it ends before."""
        loop = asyncio.get_running_loop()
        self._due[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._look, loop)

    def is_late(self, task: Task) -> bool:
        """Return whether ``task`` was cancelled for being late."""
        return task in self._late

    def end(self, task: Task) -> None:
        """Forget ``task``: it has ended what it had begun."""
        if self._due.pop(task, None) is None:
            self._late.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for task, due in list(self._due.items()):
            if due > now:
                self._timer = loop.call_at(due, self._look, loop)
                break
            del self._due[task]
            self._late.add(task)
            task.cancel()
