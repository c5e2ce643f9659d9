"""The pulse of an event loop: whether the services that run on it have been busy with one thing for too long.

Time is counted in beats, so what the machine gives to other processes is nobody's fault: seconds in which this process
did not run don't count.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

STUCK_SECONDS: Final = 10.0
"""How long a service may do nothing else while it looks at one message."""

ANSWER_SECONDS: Final = 60.0
"""What has not ended after this long, though it has to end by itself or as its client has left, hangs."""

_DEAD_SECONDS: Final = 120.0
_BEAT_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 1.0


class Pulse:
    """Counts how often the loop was stuck, and ends the process if it stays so; ends what never ends by itself."""

    def __init__(self, answer_seconds: float = ANSWER_SECONDS) -> None:
        """``answer_seconds`` is how long what is ``limited`` may take."""
        self.stuck = 0
        self._most_beats = answer_seconds / _BEAT_SECONDS
        self._beat = 0
        self._began: dict[asyncio.Task[Any], int] = {}
        self._given_up: set[asyncio.Task[Any]] = set()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Raise TimeoutError in the running task if what is done meanwhile doesn't end.

        Like ``asyncio.timeout``, but without a timer for each of a million messages, and counted in beats.
        """
        task = asyncio.current_task()
        assert task is not None
        self._began[task] = self._beat
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._given_up:
                raise
            task.uncancel()
            raise TimeoutError from None
        finally:
            del self._began[task]
            self._given_up.discard(task)

    async def _beats(self) -> None:
        while True:
            self._beat += 1
            for task, began in self._began.items():
                if self._beat - began > self._most_beats and task not in self._given_up:
                    self._given_up.add(task)
                    task.cancel()
            await asyncio.sleep(_BEAT_SECONDS)

    def _watch(self) -> None:
        """Count the seconds that this thread could run in while the loop did nothing else."""
        beat, missing_seconds, told = self._beat, 0.0, False
        while not self._stop.wait(_LOOK_SECONDS):
            if self._beat != beat:
                beat, missing_seconds, told = self._beat, 0.0, False
                continue
            missing_seconds += _LOOK_SECONDS
            if missing_seconds > STUCK_SECONDS and not told:
                told = True
                self.stuck += 1
                faulthandler.dump_traceback(sys.stderr)
            if missing_seconds > _DEAD_SECONDS:
                os._exit(1)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the running loop meanwhile."""
        beats = asyncio.ensure_future(self._beats())
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            beats.cancel()
            self._stop.set()
            thread.join()
