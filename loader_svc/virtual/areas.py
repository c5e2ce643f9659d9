"""The memory that calls and live modules of a simulated machine hold, and the locks under which it is had.

What one call holds follows from how far it has come on its way through the pipeline: it is found out once for each step
(``Held``, ``Freed``), and only the machine's sums are kept while calls go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loader_svc.steps import Failure
from loader_svc.virtual.locks import Lock

if TYPE_CHECKING:
    from loader_svc.virtual.call import VirtualCall
    from loader_svc.virtual.clock import Clock
    from loader_svc.virtual.files import Area


class Held(NamedTuple):
    """What a call holds at some point of its way, in bytes."""

    copy_bytes: int = 0
    """Of copies of its file, as read and as decompressed."""

    core_bytes: int = 0
    init_bytes: int = 0
    peak_bytes: int = 0
    """The most that it has held at once until then."""

    @property
    def size_bytes(self) -> int:
        """All of it."""
        return self.copy_bytes + self.core_bytes + self.init_bytes


class Freed(NamedTuple):
    """What a call frees at once."""

    copy_bytes: int
    size_bytes: int
    """All that it frees, copies included."""

    ns: int
    """How long that takes, waits not included."""

    has_core: bool
    """Whether memory that was executable is freed."""


class Areas:
    """The areas of one machine: sums, peaks, and the time that it takes to have one and to give it back."""

    __slots__ = (
        "_clock",
        "_purge_ns",
        "area_lock",
        "copy_bytes",
        "held_bytes",
        "page_lock",
        "peak_bytes",
        "peak_copy_bytes",
        "purge_lock",
    )

    def __init__(self, clock: Clock, purge_ns: int) -> None:
        """``purge_ns`` is for how long memory that was executable keeps the mutex when it is freed."""
        self._clock = clock
        self.held_bytes = 0
        self.peak_bytes = 0
        """Most memory that module loading held at once: copies, decompressed images, layouts, live modules."""
        self.copy_bytes = 0
        self.peak_copy_bytes = 0
        """Most bytes that copies of files and decompressed images had at once."""
        self.area_lock = Lock()
        """The lock of the vmalloc areas (``vmap_area_lock``)."""
        self.page_lock = Lock()
        """The lock of the zone that pages are from."""
        self.purge_lock = Lock()
        """The mutex of those who unmap vmalloc areas at once (``vmap_purge_lock``)."""
        self._purge_ns = purge_ns

    def reset_peaks(self) -> None:
        """Begin to look for peaks anew."""
        self.peak_bytes, self.peak_copy_bytes = self.held_bytes, self.copy_bytes

    def read(self, call: VirtualCall) -> Failure | None:
        """Have a call read its file, or copy what its caller has."""
        loadable = call.loadable
        if loadable.read_failure is not None:
            call._owed_ns += loadable.read_failure_ns
            return loadable.read_failure
        # As _hold_copy would, but without a call.
        read_bytes = loadable.read_bytes
        self.copy_bytes = copy_bytes = self.copy_bytes + read_bytes
        if copy_bytes > self.peak_copy_bytes:
            self.peak_copy_bytes = copy_bytes
        self.held_bytes = held_bytes = self.held_bytes + read_bytes
        if held_bytes > self.peak_bytes:
            self.peak_bytes = held_bytes
        call._owed_ns += loadable.read_ns + self._lock(loadable.read_area)
        return None

    def decompress(self, call: VirtualCall) -> Failure | None:
        """Have a call decompress the copy of its file into another one."""
        loadable = call.loadable
        if loadable.algorithm is None:
            return Failure("EOPNOTSUPP", "decompress: support")
        call._owed_ns += loadable.decompress_ns
        failure = loadable.plan.failure_at("decompress")
        if failure is None:
            call._owed_ns += self._lock(loadable.unpacked_area)
            self._hold_copy(loadable.unpacked_bytes)
            self._hold_copy(-loadable.read_bytes)
        return failure

    def allocate(self, call: VirtualCall) -> Failure | None:
        """Have a call allocate its layout and copy the sections."""
        loadable = call.loadable
        if loadable.plan.layout is None:
            return loadable.plan.failure_at("layout")
        self._hold(loadable.layout_bytes)
        call._owed_ns += loadable.allocate_ns + self._lock(loadable.layout_area)
        return None

    def free(self, call: VirtualCall, freed: Freed) -> None:
        """Have a call free something."""
        self.copy_bytes -= freed.copy_bytes
        self.held_bytes -= freed.size_bytes
        call._owed_ns += freed.ns
        if freed.has_core and self._purge_ns:
            # Memory that was executable is not left to be unmapped some time later: all TLBs are flushed at once, by
            # one caller after the other (``vm_reset_perms`` and ``vmap_purge_lock``, mm/vmalloc.c). So those who fail
            # behind their layout leave one by one, and the more CPUs there are to be flushed, the further apart.
            call._owed_ns += self._purge_ns + self.purge_lock.take(self._clock.now_ns, self._purge_ns)

    def unload(self, core_bytes: int) -> None:
        """Free a module that was live."""
        self.held_bytes -= core_bytes

    def _hold(self, size_bytes: int) -> None:
        self.held_bytes = held_bytes = self.held_bytes + size_bytes
        if held_bytes > self.peak_bytes:
            self.peak_bytes = held_bytes

    def _hold_copy(self, size_bytes: int) -> None:
        self.copy_bytes = copy_bytes = self.copy_bytes + size_bytes
        if copy_bytes > self.peak_copy_bytes:
            self.peak_copy_bytes = copy_bytes
        self._hold(size_bytes)

    def _lock(self, area: Area) -> int:
        """Take the locks that allocating needs; return how long that waits for them, in ns."""
        # As the locks' take would, but without a call.
        now_ns = self._clock.now_ns
        wait_ns = 0
        lock = self.area_lock
        if lock.free_at_ns <= now_ns:
            lock.free_at_ns = now_ns + area.area_lock_ns
        else:
            wait_ns = lock.free_at_ns - now_ns
            lock.free_at_ns += area.area_lock_ns
            lock.waited_ns += wait_ns
        lock = self.page_lock
        if lock.free_at_ns <= now_ns:
            lock.free_at_ns = now_ns + area.page_lock_ns
            return wait_ns
        wait_for_page_ns = lock.free_at_ns - now_ns
        lock.free_at_ns += area.page_lock_ns
        lock.waited_ns += wait_for_page_ns
        return wait_ns + wait_for_page_ns
