"""One timer for many deadlines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modpressure.deadlines import Deadlines


class Loop:
    """A loop's time and timers, which the test tells."""

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

    async def pass_time(self, until: float) -> None:
        while self.timers and self.timers[0][0] <= until:
            self.now, work, arguments = self.timers.pop(0)
            work(*arguments)
        self.now = until
        await settled()


async def settled() -> None:
    """Let all run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr("modpressure.deadlines.asyncio.get_running_loop", lambda: loop)
    return loop


async def test_who_is_late_is_told_at_its_own_time_by_the_one_timer_that_there_is(loop: Loop) -> None:
    deadlines = Deadlines(10)
    comes = [asyncio.Event() for _ in range(4)]
    waits = []
    for number, event in enumerate(comes):
        await loop.pass_time(number)
        waits.append(asyncio.ensure_future(deadlines.wait(event.wait())))
        await settled()
        assert len(loop.timers) == 1
    comes[0].set()
    await settled()
    await loop.pass_time(10.5)
    assert [wait.done() for wait in waits] == [True, False, False, False]
    await loop.pass_time(11)
    assert [wait.done() for wait in waits] == [True, True, False, False]
    comes[2].set()
    await settled()
    await loop.pass_time(13)
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(result) for result in results] == [bool, TimeoutError, bool, TimeoutError]
    # Nobody is left, and so no timer; the next one has one again.
    assert not loop.timers
    late = asyncio.ensure_future(deadlines.wait(asyncio.Event().wait()))
    await settled()
    await loop.pass_time(23)
    with pytest.raises(TimeoutError):
        await late


async def test_who_is_late_goes_on_and_may_wait_again(loop: Loop) -> None:
    deadlines = Deadlines(10)

    async def wait_twice() -> bool:
        with pytest.raises(TimeoutError):
            await deadlines.wait(asyncio.Event().wait())
        return await deadlines.wait(asyncio.sleep(0, True))

    waits = asyncio.ensure_future(wait_twice())
    await settled()
    await loop.pass_time(10)
    assert await waits
    assert not waits.cancelling()


async def test_who_is_cancelled_is_cancelled_be_it_late_or_not(loop: Loop) -> None:
    deadlines = Deadlines(10)
    early, late = (asyncio.ensure_future(deadlines.wait(asyncio.Event().wait())) for _ in range(2))
    await settled()
    early.cancel()
    await settled()
    assert early.cancelled()
    late.cancel()
    await loop.pass_time(10)
    assert late.cancelled()
