"""Exports that are slow, left, or too many: they hold up nothing else, and give back what they held."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

from modpressure.errors import OverLimit, Overloaded
from stats_svc.database import EXPORTS
from stats_svc.exports import Exports


async def read(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


class Slow:
    """A file whose second step takes until it is told to go on."""

    def __init__(self) -> None:
        self.at_work, self.go_on, self.closed = threading.Event(), threading.Event(), threading.Event()

    def steps(self) -> Generator[bytes, None, None]:
        try:
            yield b"first"
            self.at_work.set()
            assert self.go_on.wait(60)
            yield b"second"
        finally:
            self.closed.set()


async def test_what_is_left_in_the_middle_of_a_step_is_closed_after_it() -> None:
    slow, exports = Slow(), Exports(read)

    async def consume() -> None:
        async with contextlib.aclosing(exports.chunks(slow.steps)) as chunks:
            async for _ in chunks:
                pass

    consumer = asyncio.ensure_future(consume())
    await asyncio.to_thread(slow.at_work.wait, 60)
    consumer.cancel()
    await asyncio.sleep(0)
    # As a client's deadline does when the client is gone already.
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    assert not slow.closed.is_set()
    slow.go_on.set()
    assert await asyncio.to_thread(slow.closed.wait, 60)


async def test_no_more_are_begun_than_there_are_connections_for() -> None:
    exports = Exports(read)
    slow = [Slow() for _ in range(EXPORTS)]
    running = [exports.chunks(one.steps) for one in slow]
    for chunks in running:
        assert await anext(chunks) == b"first"
    with pytest.raises(Overloaded, match=f"^{EXPORTS} systems are being exported"):
        await anext(exports.chunks(Slow().steps))
    await running[0].aclose()
    assert await asyncio.to_thread(slow[0].closed.wait, 60)
    # The place is free once the connection is given back, which is a moment later.
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Overloaded):
                another = exports.chunks(Slow().steps)
                assert await anext(another) == b"first"
                break
            await asyncio.sleep(0)
    for chunks in (another, *running[1:]):
        await chunks.aclose()


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"stalled_seconds": 0.05}, "nothing of it was read for 0.05 s"),
        ({"most_seconds": 0.05}, "it took longer than 0.05 s"),
    ],
)
async def test_a_reader_that_stands_still_holds_nothing_for_long(limits: dict[str, float], sentence: str) -> None:
    exports = Exports(read, **limits)
    slow = Slow()
    slow.go_on.set()
    chunks = exports.chunks(slow.steps)
    assert await anext(chunks) == b"first"
    # Its reader does not come back; the connection is given back without it, and its place is free.
    assert await asyncio.to_thread(slow.closed.wait, 60)
    others = [exports.chunks(Slow().steps) for _ in range(EXPORTS)]
    async with asyncio.timeout(60):
        while exports._open:
            await asyncio.sleep(0)
    for other in others:
        assert await anext(other) == b"first"
    with pytest.raises(OverLimit, match=f"^the export was given up: {sentence}$"):
        await anext(chunks)
    for other in others:
        await other.aclose()


async def test_a_reader_that_goes_on_reads_to_the_end() -> None:
    slow = Slow()
    slow.go_on.set()
    assert [chunk async for chunk in Exports(read).chunks(slow.steps)] == [b"first", b"second"]
    assert await asyncio.to_thread(slow.closed.wait, 60)
