"""Real memory for simulated allocations: areas of pages, the meter that counts them, the budget that limits them."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections import deque

from modpressure.errors import OverLimit

PAGE_BYTES = mmap.PAGESIZE


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


class MemoryBudget:
    """A limit on real memory, handed out first come, first served.

    A call takes all that it will need at its peak before it allocates anything, and gives back at its end; so calls
    that wait hold nothing, and those that hold always come to an end.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    def try_take(self, size_bytes: int, what: str) -> bool:
        """Take ``size_bytes`` if it is free and nobody waits; return whether it was. From any thread.

        OverLimit if it could never be had; ``what`` names who asks.
        """
        if size_bytes > self.limit_bytes:
            raise OverLimit(
                f"{what} needs {size_bytes} bytes of memory, the loader's memory limit is {self.limit_bytes} bytes",
                field="module",
            )
        with self._lock:
            if self._queue or self.taken_bytes + size_bytes > self.limit_bytes:
                return False
            self.taken_bytes += size_bytes
            return True

    async def take(self, size_bytes: int, what: str, *, wait: bool = True) -> None:
        """Take ``size_bytes``, in turn. OverLimit if it can never be had, or not now and ``wait`` is false."""
        if self.try_take(size_bytes, what):
            return
        if not wait:
            raise OverLimit(
                f"{what} needs {size_bytes} bytes of memory, {self.limit_bytes - self.taken_bytes} of the loader's "
                f"{self.limit_bytes} bytes are free",
                field="module",
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size_bytes, turn)
        with self._lock:
            self._queue.append(entry)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(size_bytes)
            else:
                with self._lock, contextlib.suppress(ValueError):
                    # Not there if it was served when it had been cancelled already.
                    self._queue.remove(entry)
                self._serve()
            raise

    def give(self, size_bytes: int) -> None:
        """Give ``size_bytes`` back. On the event loop."""
        with self._lock:
            self.taken_bytes -= size_bytes
        if self._queue:
            self._serve()

    def _serve(self) -> None:
        with self._lock:
            while self._queue:
                size_bytes, turn = self._queue[0]
                if not turn.done():
                    if self.taken_bytes + size_bytes > self.limit_bytes:
                        return
                    self.taken_bytes += size_bytes
                    turn.set_result(None)
                # Who has cancelled its turn has not run yet to leave the queue by itself.
                self._queue.popleft()
