"""The pulse of an event loop: whether the services that run on it have been busy with one thing for too long."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Final

STUCK_SECONDS: Final = 10.0
"""How long a service may do nothing else while it looks at one message."""

_DEAD_SECONDS: Final = 120.0
_BEAT_SECONDS: Final = 0.1


class Pulse:
    """Counts how often the loop was stuck; ends the process if it stays so."""

    def __init__(self) -> None:
        self.stuck = 0
        self._beat = time.monotonic()
        self._stop = threading.Event()

    async def _beats(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT_SECONDS)

    def _watch(self) -> None:
        told = 0.0
        while not self._stop.wait(1.0):
            beat = self._beat
            missing_seconds = time.monotonic() - beat
            if missing_seconds > STUCK_SECONDS and told != beat:
                told = beat
                self.stuck += 1
                faulthandler.dump_traceback(sys.stderr)
            if missing_seconds > _DEAD_SECONDS:
                os._exit(1)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the running loop meanwhile."""
        self._beat = time.monotonic()
        beats = asyncio.ensure_future(self._beats())
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            beats.cancel()
            self._stop.set()
            thread.join()
