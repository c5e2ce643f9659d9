"""One timer for many deadlines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modpressure.deadlines import Deadlines


class Loop:
    """A loop whose time the test tells."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any, tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, work: Any, *arguments: Any) -> object:
        return self.call_at(self.now + seconds, work, *arguments)

    def call_at(self, due: float, work: Any, *arguments: Any) -> object:
        self.timers.append((due, work, arguments))
        return object()

    def pass_time(self, until: float) -> None:
        while self.timers and self.timers[0][0] <= until:
            self.now, work, arguments = self.timers.pop(0)
            work(*arguments)
        self.now = until


class Task:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


def test_who_is_late_is_cancelled_at_its_own_time_by_the_one_timer_that_there_is(loop: Loop) -> None:
    deadlines = Deadlines(10)
    tasks: list[Any] = [Task() for _ in range(4)]
    for number, task in enumerate(tasks):
        loop.pass_time(number)
        deadlines.begin(task)
        assert len(loop.timers) == 1
    deadlines.end(tasks[0])
    loop.pass_time(10.5)
    assert not any(task.cancelled for task in tasks)
    loop.pass_time(11)
    assert [task.cancelled for task in tasks] == [False, True, False, False]
    assert deadlines.is_late(tasks[1]) and not deadlines.is_late(tasks[2])
    deadlines.end(tasks[1])
    assert not deadlines.is_late(tasks[1])
    deadlines.end(tasks[2])
    loop.pass_time(13)
    assert [task.cancelled for task in tasks] == [False, True, False, True]
    # Nobody is left, and so no timer; the next one has one again.
    assert not loop.timers
    late: Any = Task()
    deadlines.begin(late)
    loop.pass_time(23)
    assert late.cancelled and deadlines.is_late(late)
