"""Whether stats_svc is there, and for how long those wait who need it."""

from __future__ import annotations

import asyncio
import contextlib

PATIENCE_SECONDS = 3.0
"""How long stats_svc may be away before new requests are refused."""

IN_FLIGHT_PATIENCE_SECONDS = 30.0
"""How long it may be away before the callers of what is in flight are told so, if they set no deadline before that."""


class Presence:
    """Of stats_svc, as a loader sees it: away at first. To be used from one event loop."""

    def __init__(self) -> None:
        self._there = asyncio.Event()
        self._long_away = asyncio.Event()
        self._left_at = 0.0
        self._patience: asyncio.TimerHandle | None = None

    @property
    def is_there(self) -> bool:
        """Whether it is there now."""
        return self._there.is_set()

    def set(self, is_there: bool) -> None:
        """Note that it is there, or that it is away from now on."""
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if is_there:
            self._there.set()
            self._long_away.clear()
        else:
            self._there.clear()
            loop = asyncio.get_running_loop()
            self._left_at = loop.time()
            self._patience = loop.call_later(IN_FLIGHT_PATIENCE_SECONDS, self._long_away.set)

    async def wait_there(self) -> None:
        """Return when it is there."""
        await self._there.wait()

    async def wait_briefly(self) -> bool:
        """Wait until it is there for as long as a new request may; return whether it is."""
        if not self.is_there:
            left_seconds = self._left_at + PATIENCE_SECONDS - asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._there.wait(), left_seconds)
        return self.is_there

    async def wait_long_away(self) -> None:
        """Return when it has been away for longer than callers of what is in flight wait."""
        await self._long_away.wait()
