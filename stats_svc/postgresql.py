"""A connection to PostgreSQL that does not wait for ever."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, Final, TypeVar

import psycopg
from psycopg.errors import ConnectionTimeout
from psycopg.waiting import Ready

T = TypeVar("T")

_LOOK_SECONDS: Final = 0.1
"""How long a wait goes on before somebody looks at it."""


class HeardConnection(psycopg.Connection[Any]):
    """A connection that is closed when its server has said nothing for ``silence_seconds`` while it was waited for.

    A server that is frozen, or whose disk hangs, has a kernel that takes what it is sent, so neither libpq nor TCP
    notices. Then ConnectionTimeout is raised, as if the server had not answered a connection's beginning.
    """

    silence_seconds = math.inf

    def wait(self, gen: Generator[Any, Any, T], interval: float = _LOOK_SECONDS, *rest: Any, **named: Any) -> T:
        """Run a generator of psycopg's, which waits for the socket wherever it yields."""
        return super().wait(self._heard(gen, interval), interval, *rest, **named)

    def _heard(self, gen: Generator[Any, Any, T], interval: float) -> Generator[Any, Any, T]:
        silent_seconds = 0.0
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                # Looks are counted, for time in which this process itself did not run is not the server's silence.
                silent_seconds = 0.0 if ready != Ready.NONE else silent_seconds + interval
                if silent_seconds >= self.silence_seconds:
                    self.close()
                    raise ConnectionTimeout(f"the server has said nothing for {self.silence_seconds:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
