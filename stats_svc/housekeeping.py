"""Letting go of what is no longer kept, beside the work and in small steps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog

from stats_svc.ages import Ages
from stats_svc.rows import Retention, StoreError

CLAIM_SECONDS: Final = 24 * 3600
"""How long what came of a client's request is remembered, at least."""

INSTANCE_SECONDS: Final = 7 * 24 * 3600
"""How long it is remembered of a loader process that nothing more is accepted of it, at least."""

SETTLE_SECONDS: Final = 60
"""How long events are kept in any case, as loaders may ask what became of their calls."""

_IDLE_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 0.02
"""Between steps: who waits to be committed goes first."""

_log = structlog.get_logger(__name__)


class Swept(Protocol):
    """The store, as far as it is needed here."""

    def prune_claims(self, before_ns: int) -> bool:
        """Forget some claims that nobody holds and that last changed before a time; return whether more may be."""

    def prune_instances(self, before_ns: int) -> bool:
        """Forget some loader processes that were fenced before a time and own nothing; return whether more may be."""

    def prune_events(self, retention: Retention) -> bool:
        """Take some events away that need not be kept; return whether there may be more."""

    def sweep(self) -> bool:
        """Take something away of the systems that nobody sees any more; return whether there may be more."""

    def shrink(self) -> bool:
        """Give room back that is free; return whether there may be more."""


class Housekeeping:
    """Takes away what is not kept, for as long as it runs."""

    def __init__(
        self,
        store: Swept,
        in_writer: Callable[[Callable[[], bool]], Awaitable[bool]],
        *,
        keep_events: int,
        keep_days: float,
        idle_seconds: float = _IDLE_SECONDS,
        ages: Ages | None = None,
    ) -> None:
        """Keep ``keep_events`` of each system and those of ``keep_days``; 0 is no limit.

        ``in_writer`` runs work where nothing else writes, and raises StoreError if this process may not. ``ages`` says
        what is old.
        """
        self._store = store
        self._in_writer = in_writer
        self._keep_events = keep_events
        self._keep_seconds = keep_days * 24 * 3600
        self._idle_seconds = idle_seconds
        self._ages = ages or Ages()

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                more = await self._in_writer(self.step)
            except StoreError as error:
                _log.debug("nothing removed", reason=error.sentence)
                more = False
            await asyncio.sleep(_PAUSE_SECONDS if more else self._idle_seconds)

    def step(self) -> bool:
        """Take some of what is not kept away; return whether there may be more."""
        return (
            self._store.sweep()
            # Who forgets these too early counts twice.
            or self._store.prune_claims(self._before_ns(CLAIM_SECONDS, surely=True))
            or self._store.prune_instances(self._before_ns(INSTANCE_SECONDS, surely=True))
            or self._prune_events()
            or self._store.shrink()
        )

    def _prune_events(self) -> bool:
        if not self._keep_events and not self._keep_seconds:
            return False
        before_ns = self._before_ns(self._keep_seconds) if self._keep_seconds else 0
        return self._store.prune_events(Retention(self._keep_events, before_ns, self._before_ns(SETTLE_SECONDS)))

    def _before_ns(self, age_seconds: float, *, surely: bool = False) -> int:
        return self._ages.before_ns(round(age_seconds * 1e9), surely=surely)
