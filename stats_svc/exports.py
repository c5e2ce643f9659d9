"""Systems on their way out as files: read step by step, each in a transaction that stays open until its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Final

from modpressure.errors import OverLimit, Overloaded
from stats_svc.database import EXPORTS

_RETRY_SECONDS: Final = 5.0

STALLED_SECONDS: Final = 60.0
"""How long whoever reads or sends a file may do nothing."""

EXPORT_SECONDS: Final = 3600.0
"""How long an export may take in all. As long, what is deleted meanwhile can't be let go of: SQLite's log grows, and
PostgreSQL's vacuum leaves it."""


class Exports:
    """Hands out files, a few at a time: each holds a connection for as long as its reader takes, within limits."""

    def __init__(
        self,
        read: Callable[[Callable[[], Any]], Awaitable[Any]],
        *,
        stalled_seconds: float = STALLED_SECONDS,
        most_seconds: float = EXPORT_SECONDS,
    ) -> None:
        """``read`` runs work that blocks. A reader may do nothing for so long, and take so long in all."""
        self._read = read
        self._stalled_seconds = stalled_seconds
        self._most_seconds = most_seconds
        self._open = 0
        self._endings: set[asyncio.Task[None]] = set()

    async def chunks(self, begin: Callable[[], Generator[bytes, None, None]]) -> AsyncGenerator[bytes, None]:
        """Yield what the generator of ``begin`` yields.

        Overloaded while there are as many as there may be; OverLimit for a reader that comes back too late. What it
        held was given back when its time was over.
        """
        if self._open >= EXPORTS:
            raise Overloaded(
                f"{self._open} systems are being exported, which is as many as there may be at once",
                retry_seconds=_RETRY_SECONDS,
            )
        self._open += 1
        steps = begin()
        step: asyncio.Future[bytes | None] | None = None
        loop = asyncio.get_running_loop()
        due = loop.time() + self._most_seconds
        too_late = ""

        def end(why: str) -> None:
            nonlocal too_late
            too_late = why
            # Apart from any task, which may be cancelled once more: else the connection would never be given back.
            ending = asyncio.ensure_future(self._end(step, steps))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

        try:
            while True:
                step = asyncio.ensure_future(self._read(lambda: next(steps, None)))
                # A thread is at it, whoever goes meanwhile.
                chunk = await asyncio.shield(step)
                if chunk is None:
                    return
                left_seconds = due - loop.time()
                if left_seconds < self._stalled_seconds:
                    watch = loop.call_later(left_seconds, end, f"it took longer than {self._most_seconds:g} s")
                else:
                    why = f"nothing of it was read for {self._stalled_seconds:g} s"
                    watch = loop.call_later(self._stalled_seconds, end, why)
                try:
                    yield chunk
                finally:
                    watch.cancel()
                if too_late:
                    raise OverLimit(f"the export was given up: {too_late}")
        finally:
            if not too_late:
                end("it is over")

    async def _end(self, step: asyncio.Future[bytes | None] | None, steps: Generator[bytes, None, None]) -> None:
        try:
            if step is not None:
                await asyncio.gather(step, return_exceptions=True)
            await self._read(steps.close)
        finally:
            self._open -= 1
