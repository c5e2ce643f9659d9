"""Real memory for simulated allocations: areas of pages, the meter that counts them, the budget that limits them."""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from modpressure.errors import OverLimit, Overloaded

PAGE_BYTES = mmap.PAGESIZE

PATIENCE_SECONDS: Final = 30.0
"""For how long a client's calls wait for memory while not one of them gets any. Long enough for calls in flight to end,
and not without end: the client of a call with a request id may have gone, and others wait behind it."""


def page_round(size_bytes: int) -> int:
    """Round a size up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class Peak:
    """The most that a meter showed since this was begun or last taken."""

    __slots__ = ("bytes",)

    def __init__(self, held_bytes: int) -> None:
        self.bytes = held_bytes


class Meter:
    """What a loader holds in areas now, and the most that it held. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peaks: list[Peak] = []
        self.held_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Count pages that were allocated, or with a negative size freed."""
        with self._lock:
            held = self.held_bytes = self.held_bytes + size_bytes
            for peak in self._peaks:
                if held > peak.bytes:
                    peak.bytes = held

    def begin_peak(self) -> Peak:
        """Return a peak that follows this meter until it is ended."""
        with self._lock:
            peak = Peak(self.held_bytes)
            self._peaks.append(peak)
            return peak

    def take_peak(self, peak: Peak) -> int:
        """Return what ``peak`` has come to, and let it begin anew."""
        with self._lock:
            taken, peak.bytes = peak.bytes, self.held_bytes
            return taken

    def end_peak(self, peak: Peak) -> int:
        """Return what ``peak`` has come to, for the last time."""
        with self._lock:
            self._peaks.remove(peak)
            return peak.bytes


class Area:
    """Anonymous pages of our own: one allocation of the simulated kernel. Freed pages go back to the system at once."""

    __slots__ = ("_holdings", "pages", "size_bytes")

    def __init__(self, size_bytes: int, holdings: Holdings, *, populate: bool = False) -> None:
        """Allocate whole pages for ``size_bytes`` (at least one page). OSError ENOMEM where the system has none.

        ``populate`` touches every page now, as the kernel's clearing of a module's memory does; without it the caller
        touches them by writing.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.size_bytes = page_round(max(size_bytes, 1))
        self.pages = mmap.mmap(-1, self.size_bytes, flags=flags | mmap.MAP_POPULATE if populate else flags)
        self._holdings = holdings
        holdings.change(self.size_bytes)

    def free(self) -> None:
        """Give the pages back."""
        self.pages.close()
        self._holdings.change(-self.size_bytes)
        self.size_bytes = 0


class Holdings:
    """What one call holds, and the most that it held."""

    __slots__ = ("_meter", "held_bytes", "peak_bytes")

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.held_bytes = 0
        self.peak_bytes = 0

    def change(self, size_bytes: int) -> None:
        """Count pages allocated, or with a negative size freed."""
        held = self.held_bytes = self.held_bytes + size_bytes
        if held > self.peak_bytes:
            self.peak_bytes = held
        self._meter.add(size_bytes)


@dataclass(slots=True)
class Taken:
    """What was taken of a budget at once. A part may be given back before the rest."""

    size_bytes: int
    number: int
    """How many takings there were up to this one."""

    def part(self, size_bytes: int) -> Taken:
        """Return ``size_bytes`` of it as a taking of its own, which this one is smaller by."""
        self.size_bytes -= size_bytes
        return Taken(size_bytes, self.number)


@dataclass(slots=True)
class _Wait:
    """Somebody who waits for memory."""

    size_bytes: int
    what: str
    since_seconds: float


class _Queue:
    """Who waits of one client, in the order in which they came."""

    __slots__ = ("last_number", "old_bytes", "served_seconds", "timer", "waits")

    def __init__(self) -> None:
        self.waits: OrderedDict[asyncio.Future[Taken], _Wait] = OrderedDict()
        self.served_seconds = 0.0
        """When one of them was last given what it waited for; 0 for never."""

        self.last_number = 0
        """The last taking before the first of them became the first."""

        self.old_bytes = 0
        """What is left of the takings up to that one."""

        self.timer: asyncio.TimerHandle | None = None

    @property
    def first(self) -> _Wait:
        """Who is served next."""
        return next(iter(self.waits.values()))


class MemoryBudget:
    """A limit on real memory, handed out to clients in turn, and of one client first come, first served.

    A call takes all that it will need at its peak before it allocates anything, and gives back at its end; so calls
    that wait hold nothing. What those in flight hold comes back by itself; what live modules hold comes back when
    somebody unloads them, which may be never. So others may pass a client's first call as long as that would not fit
    even without all that was given out since it became the first. From then on nobody passes it: whoever did has
    delayed it by no more than what it still holds. It is like the backfilling of job schedulers, where a small job may
    go first if the large one at the head could not start any earlier without it.
    """

    def __init__(self, limit_bytes: int, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        """``patience_seconds`` is for how long a client waits while it is given nothing at all."""
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._patience_seconds = patience_seconds
        self._number = 0
        self._lock = threading.Lock()
        self._queues: dict[str, _Queue] = {}
        """Of each client that waits, in the order of their turns."""

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(len(queue.waits) for queue in self._queues.values())

    def try_take(self, size_bytes: int, what: str, client: str = "") -> Taken | None:
        """Take ``size_bytes`` for a client; return None if it would have to wait. From any thread.

        OverLimit if it could never be had; ``what`` names who asks.
        """
        if size_bytes > self.limit_bytes:
            raise OverLimit(
                f"{what} needs {size_bytes} bytes of memory, the loader's memory limit is {self.limit_bytes} bytes",
                field="module",
            )
        with self._lock:
            is_free = client not in self._queues and self.taken_bytes + size_bytes <= self.limit_bytes
            if not is_free or any(self._is_due(queue) for queue in self._queues.values()):
                return None
            return self._take(size_bytes)

    async def take(self, size_bytes: int, what: str, client: str = "", *, wait: bool = True) -> Taken:
        """Take ``size_bytes`` for a client, in turn.

        OverLimit if it can never be had, or not now and ``wait`` is false; Overloaded if the client was given nothing
        for too long.
        """
        if (taken := self.try_take(size_bytes, what, client)) is not None:
            return taken
        if not wait:
            raise OverLimit(self._refusal(size_bytes, what), field="module")
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Taken] = loop.create_future()
        with self._lock:
            queue = self._queues.setdefault(client, _Queue())
            queue.waits[turn] = _Wait(size_bytes, what, loop.time())
            if len(queue.waits) == 1:
                self._begin_first(client, queue)
        self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give(turn.result())
            else:
                with self._lock:
                    self._leave(client, turn)
                self._serve()
            raise

    def give(self, taken: Taken) -> None:
        """Give back what was taken. On the event loop."""
        with self._lock:
            self.taken_bytes -= taken.size_bytes
            for queue in self._queues.values():
                if taken.number <= queue.last_number:
                    queue.old_bytes -= taken.size_bytes
        if self._queues:
            self._serve()

    def _take(self, size_bytes: int) -> Taken:
        self.taken_bytes += size_bytes
        self._number += 1
        return Taken(size_bytes, self._number)

    def _refusal(self, size_bytes: int, what: str) -> str:
        return (
            f"{what} needs {size_bytes} bytes of memory, {self.limit_bytes - self.taken_bytes} of the loader's "
            f"{self.limit_bytes} bytes are free"
        )

    # --- the queues ---

    def _is_due(self, queue: _Queue) -> bool:
        """Whether the first of a queue would fit but for what was given out since it became the first."""
        return queue.old_bytes + queue.first.size_bytes <= self.limit_bytes

    def _serve(self) -> None:
        """Let those have memory whose turn it is. On the event loop."""
        with self._lock:
            while (client := self._next()) is not None:
                queue = self._queues[client]
                turn, wait = next(iter(queue.waits.items()))
                # One that is cancelled has not run yet to leave by itself.
                if not turn.done():
                    turn.set_result(self._take(wait.size_bytes))
                    queue.served_seconds = turn.get_loop().time()
                    # The next turn of its client comes after those of all others.
                    self._queues[client] = self._queues.pop(client)
                self._leave(client, turn)

    def _next(self) -> str | None:
        """Return the client that is to be served, or whose first has cancelled; None if there is none."""
        for client, queue in self._queues.items():
            turn, wait = next(iter(queue.waits.items()))
            if turn.done() or self.taken_bytes + wait.size_bytes <= self.limit_bytes:
                return client
            if self._is_due(queue):
                return None
        return None

    def _leave(self, client: str, turn: asyncio.Future[Taken]) -> None:
        """Take somebody out of the queue of its client, if it is still there."""
        queue = self._queues.get(client)
        if queue is None or turn not in queue.waits:
            return
        was_first = next(iter(queue.waits)) is turn
        del queue.waits[turn]
        if not queue.waits:
            if queue.timer is not None:
                queue.timer.cancel()
            del self._queues[client]
        elif was_first:
            self._begin_first(client, queue)

    def _begin_first(self, client: str, queue: _Queue) -> None:
        """Note what there is as somebody becomes the first of its queue."""
        queue.last_number, queue.old_bytes = self._number, self.taken_bytes
        if queue.timer is None:
            self._set_timer(client, queue)

    # --- patience ---

    def _set_timer(self, client: str, queue: _Queue) -> None:
        ends_seconds = max(queue.first.since_seconds, queue.served_seconds) + self._patience_seconds
        queue.timer = asyncio.get_running_loop().call_at(ends_seconds, self._refuse_late, client, queue)

    def _refuse_late(self, client: str, queue: _Queue) -> None:
        """Send the first of a queue away if its client was given nothing for too long; one in a turn of the loop."""
        with self._lock:
            turn, wait = next(iter(queue.waits.items()))
            now_seconds = turn.get_loop().time()
            if max(wait.since_seconds, queue.served_seconds) + self._patience_seconds <= now_seconds:
                if not turn.done():
                    refusal = self._refusal(wait.size_bytes, wait.what)
                    sentence = (
                        f"{refusal}, and {client or 'this client'} was given none for {self._patience_seconds:g} s"
                    )
                    turn.set_exception(Overloaded(sentence, field="module"))
                self._leave(client, turn)
            if queue.waits:
                self._set_timer(client, queue)
        self._serve()
