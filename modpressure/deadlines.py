"""Deadlines of one length for many waits, with one timer for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlines:
    """Ends each wait that takes longer than a time. To be used from one event loop; a task waits once at a time.

    A timer for each, as ``asyncio.timeout`` has, would cost more than most of what is timed. As all take as long, they
    are due in the order in which they began, and the timer is set for the first.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: dict[asyncio.Task[Any], float] = {}
        """When each task that waits is cancelled."""

        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, work: Awaitable[T]) -> T:
        """Return what ``work`` comes to. TimeoutError if that takes too long."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._due[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._look, loop)
        try:
            return await work
        except asyncio.CancelledError:
            # Who was late is due no more; but it may have been cancelled by somebody else as well.
            if task not in self._due and not task.uncancel():
                raise TimeoutError from None
            raise
        finally:
            self._due.pop(task, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for task, due in list(self._due.items()):
            if due > now:
                self._timer = loop.call_at(due, self._look, loop)
                break
            del self._due[task]
            task.cancel()
