"""Sharing what there is a limited number of, so that no one has it all."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

from modpressure.errors import Overloaded


class Shares:
    """A number of places, of which each holder may have as many as are left free then.

    One holder alone gets half of the places, two get a third each, and so on: there is always room for one more holder,
    however much the others ask for. This is the rule by which switches share a buffer among their queues (dynamic
    thresholds: Choudhury, Hahne, 1998).
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        self._held: Counter[str] = Counter()

    def try_take(self, holder: str, number: int = 1) -> bool:
        """Take ``number`` places for ``holder``; return whether it may have them."""
        held = self._held[holder] + number
        if held > self.places - self.taken - number:
            if held == number:
                del self._held[holder]
            return False
        self._held[holder] = held
        self.taken += number
        return True

    def give(self, holder: str, number: int = 1) -> None:
        """Give places back."""
        self.taken -= number
        self._held[holder] -= number
        if not self._held[holder]:
            del self._held[holder]

    def held(self, holder: str) -> int:
        """Return how many places ``holder`` has."""
        return self._held.get(holder, 0)


class Places:
    """Shares for which one may wait; holders' own come in the order in which they asked. For one event loop."""

    def __init__(self, places: int, what: str) -> None:
        """Have ``places`` for ``what``, in the plural."""
        self._shares = Shares(places)
        self._what = what
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def take(self, holder: str) -> None:
        """Take a place, once ``holder`` may have one more.

        Overloaded if it has none that could become free, and there is none left for it.
        """
        if holder not in self._waiting and self._shares.try_take(holder):
            return
        if not self._shares.held(holder):
            raise Overloaded(f"there is no place left for {holder or 'this client'}: {self._what} are too many now")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(holder, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(holder)
            else:
                self._leave(holder, turn)
            raise

    def give(self, holder: str, number: int = 1) -> None:
        """Give places back, and let those that wait have what they may have now."""
        if not number:
            return
        self._shares.give(holder, number)
        for waiting, turns in list(self._waiting.items()):
            while turns and (turns[0].done() or self._shares.try_take(waiting)):
                if not (turn := turns.popleft()).done():
                    turn.set_result(None)
            if not turns:
                del self._waiting[waiting]

    def held(self, holder: str) -> int:
        """Return how many places ``holder`` has."""
        return self._shares.held(holder)

    def _leave(self, holder: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(holder)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[holder]


class Permit:
    """What a request has taken, kept for as long as it or anything that was begun for it goes on.

    A client that goes away ends its request, but not all that this has begun: who opens and cancels requests again and
    again must not have more going on than who waits for them.
    """

    __slots__ = ("_gives", "_users")

    def __init__(self, give: Callable[[], None]) -> None:
        """``give`` gives back what was taken. The request itself is the first to use it."""
        self._gives = [give]
        self._users = 1

    def add(self, give: Callable[[], None]) -> None:
        """Keep what the request has taken since, too; ``give`` gives that back."""
        self._gives.append(give)

    def keep_for(self, task: asyncio.Future[Any]) -> None:
        """Keep it until ``task`` has ended, too."""
        self._users += 1
        task.add_done_callback(self.release)

    def release(self, _: object = None) -> None:
        """Use it no longer; the last one to do so gives back what was taken."""
        self._users -= 1
        if not self._users:
            for give in self._gives:
                give()


PERMIT: Final[ContextVar[Permit | None]] = ContextVar("permit", default=None)
"""In the task of a request and in those that it starts."""


class Rate:
    """A token bucket: so many a second, and as many as a second allows at once after a rest."""

    __slots__ = ("_left", "_per_second", "_time")

    def __init__(self, per_second: float, now_seconds: float) -> None:
        self._per_second = per_second
        self._left = max(per_second, 1.0)
        self._time = now_seconds

    def take(self, now_seconds: float) -> float:
        """Take one; return how many seconds are missing until it may be had, 0 if it was taken."""
        self._refill(now_seconds)
        if self._left < 1:
            return (1 - self._left) / self._per_second
        self._left -= 1
        return 0.0

    def take_later(self, now_seconds: float) -> float:
        """Take one in any case; return after how many seconds it may be used."""
        self._refill(now_seconds)
        self._left -= 1
        return max(0.0, -self._left / self._per_second)

    def is_full(self, now_seconds: float) -> bool:
        """Return whether nothing was taken for long enough for it to be as new."""
        self._refill(now_seconds)
        return self._left >= max(self._per_second, 1.0)

    def _refill(self, now_seconds: float) -> None:
        self._left = min(max(self._per_second, 1.0), self._left + (now_seconds - self._time) * self._per_second)
        self._time = now_seconds
