"""The cores of a host, and the threads that want them: each virtual CPU of a guest is one.

They share as Linux has threads of one weight share (``SCHED_OTHER``, kernel/sched/fair.c up to Linux 6.5): who has had
the least goes first. Who comes back from sleep counts as if it had had somewhat less than the others, so that it gets a
core at once, and keeps it until it has caught up. A thread that seldom wants much never waits long, however many others
spin.

Whether a turn is over is looked at when the host's timer ticks (``entity_tick``; there), so a turn ends at a tick: with
many threads it is longer than the least that it may be. But a virtual CPU whose task spins makes room much sooner: at a
PAUSE a hypervisor lets others run (QEMU's TCG, target/i386/tcg/misc_helper.c: ``helper_pause`` leaves the guest's code
and takes the lock that all virtual CPUs share; KVM's pause-loop exiting, ``kvm_vcpu_on_spin``).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from loader_svc.virtual.clock import Clock


def scaled_ns(base_ns: int, cpus: int) -> int:
    """Return one of the scheduler's times as Linux has it with a number of CPUs.

    Times 1 + log2 of the CPUs, of which no more than 8 count (``get_update_sysctl_factor``, kernel/sched/fair.c).
    """
    return base_ns * min(cpus, 8).bit_length()


LATENCY_NS: Final = 6_000_000
SLICE_NS: Final = 750_000
WAKE_NS: Final = 1_000_000
"""``sched_latency``, ``sched_min_granularity`` and ``sched_wakeup_granularity`` of one core, up to Linux 6.5; there."""

DEFAULT_LATENCY_NS: Final = scaled_ns(LATENCY_NS, 2)
DEFAULT_SLICE_NS: Final = scaled_ns(SLICE_NS, 2)
"""Of two cores."""

DEFAULT_TICK_NS: Final = 4_000_000
"""CONFIG_HZ=250, as Debian and most others have it."""

PAUSED_TURN_NS: Final = 200_000
"""For how long who spins keeps a core that others wait for. Seen of a guest with 32 CPUs on 2 cores (QEMU 7.2, TCG):
while all of them are busy a turn takes 0.16 ms in the mean (schedstat of its threads); one in seven ends for the host's
sake."""


class Thread:
    """A thread of the host: a virtual CPU."""

    __slots__ = ("begun", "core", "had_ns", "is_pausing", "on_core", "owed_ns")

    def __init__(self, on_core: Callable[[], int | None]) -> None:
        """``on_core`` says for how long it is busy now, in ns, when it has spent what it said last; None to sleep."""
        self.on_core = on_core
        self.had_ns = 0
        """What it has had of the cores, or counts as having had (``vruntime``)."""
        self.owed_ns = 0
        """What it has still to spend of what it said."""
        self.begun = 0
        """How many times it was given a core."""
        self.is_pausing = False
        """Whether it spins, and makes room for others; ``on_core`` sets it to False where something else begins. That
        what it said last is spent does not mean that it spins no more."""
        self.core: _Core | None = None


class _Core:
    __slots__ = ("begun_ns", "number", "since_ns", "thread")

    def __init__(self) -> None:
        self.thread: Thread | None = None
        self.begun_ns = 0
        """When its thread got it, or was let go on after its slice."""
        self.since_ns = 0
        """Up to when what its thread had is counted."""
        self.number = 0
        """Counts what was planned for it: only what was planned last comes to pass."""


class Host:
    """Cores that are given to whichever thread has had the least."""

    def __init__(self, clock: Clock, cores: int, *, latency_ns: int, slice_ns: int, wake_ns: int, tick_ns: int) -> None:
        """Have as many cores, whose threads have a turn each within ``latency_ns``, of ``slice_ns`` at least.

        A turn goes on until the next tick, every ``tick_ns``.

        Who was asleep counts as having had half of ``latency_ns`` less than who has had the least. It takes the place
        of one that runs if that has had more by ``wake_ns``.
        """
        self._clock = clock
        self._cores = [_Core() for _ in range(cores)]
        self._latency_ns = latency_ns
        self._slice_ns = slice_ns
        self._wake_ns = wake_ns
        self._tick_ns = tick_ns
        self._asked: Thread | None = None
        """Who says just now what it is going to do."""
        self._queue: list[tuple[int, int, Thread]] = []
        self._made = 0
        self._least_ns = 0
        """The least that any thread has had that wants a core; it never falls (``min_vruntime``)."""

    @property
    def queued(self) -> list[Thread]:
        """The threads that wait for a core."""
        return [thread for _, _, thread in self._queue]

    def wake(self, thread: Thread) -> None:
        """Have a thread that slept ask for a core."""
        for core in self._cores:
            if core.thread is not None:
                self._count(core)
        self._rise()
        thread.had_ns = max(thread.had_ns, self._least_ns - self._latency_ns // 2)
        worst: _Core | None = None
        for core in self._cores:
            if core.thread is None:
                self._give(core, thread)
                return
            if worst is None or worst.thread is None or core.thread.had_ns > worst.thread.had_ns:
                worst = core
        assert worst is not None
        running = worst.thread
        assert running is not None
        if running.had_ns - thread.had_ns > self._wake_ns:
            running.core = None
            self._enqueue(running)
            self._give(worst, thread)
        else:
            self._enqueue(thread)
        for core in self._cores:
            self._plan(core)

    def cut_short(self, thread: Thread) -> int:
        """Have a thread that spins look up as soon as it has a core; return what it has not spent, in ns."""
        core = thread.core
        if core is not None:
            self._count(core)
        left_ns, thread.owed_ns = thread.owed_ns, 0
        if core is not None:
            self._plan(core)
        return left_ns

    def pause(self) -> None:
        """Have it known that the thread whose turn it is spins: others need not wait long for its core."""
        assert self._asked is not None
        self._asked.is_pausing = True

    def _enqueue(self, thread: Thread) -> None:
        self._made += 1
        heappush(self._queue, (thread.had_ns, self._made, thread))

    def _count(self, core: _Core) -> None:
        """Count what the thread of a core has had until now."""
        thread, now_ns = core.thread, self._clock.now_ns
        assert thread is not None
        spent_ns = now_ns - core.since_ns
        thread.had_ns += spent_ns
        thread.owed_ns -= spent_ns
        core.since_ns = now_ns

    def _rise(self) -> None:
        """Note the least that any thread has had that wants a core."""
        wanting = [core.thread.had_ns for core in self._cores if core.thread is not None]
        if self._queue:
            wanting.append(self._queue[0][0])
        self._least_ns = max(self._least_ns, min(wanting, default=0))

    def _give(self, core: _Core, thread: Thread) -> None:
        """Give a core to a thread, and have that go on."""
        core.thread = thread
        thread.core = core
        thread.begun += 1
        core.begun_ns = core.since_ns = self._clock.now_ns
        if thread.owed_ns:
            self._plan(core)
        else:
            self._go_on(core)

    def _go_on(self, core: _Core) -> None:
        """Ask the thread of a core what comes now; give the core to the next one if it sleeps."""
        thread = core.thread
        assert thread is not None
        self._asked = thread
        owed_ns = thread.on_core()
        if owed_ns is not None:
            thread.owed_ns = owed_ns
            self._plan(core)
            return
        self._rise()
        core.thread = thread.core = None
        core.number += 1
        if self._queue:
            self._give(core, heappop(self._queue)[2])

    def _plan(self, core: _Core) -> None:
        """Look at a core again when its thread has spent what it owes, or has had its turn."""
        thread = core.thread
        if thread is None:
            return
        now_ns = self._clock.now_ns
        at_ns = core.since_ns + thread.owed_ns
        if self._queue:
            at_ns = min(at_ns, self._end_of_turn_ns(core, thread))
        core.number += 1
        self._clock.send(max(at_ns, now_ns), self._look, (core, core.number))

    def _end_of_turn_ns(self, core: _Core, thread: Thread) -> int:
        """Return until when a core stays with a thread while others wait for one."""
        if thread.is_pausing:
            return core.begun_ns + PAUSED_TURN_NS
        end_ns = core.begun_ns + self._turn_ns()
        return -(-end_ns // self._tick_ns) * self._tick_ns

    def _turn_ns(self) -> int:
        """Return for how long a core stays with a thread at least while others wait for one."""
        sharing = 1 - -len(self._queue) // len(self._cores)
        return max(self._slice_ns, self._latency_ns // sharing)

    def _makes_room(self, core: _Core, thread: Thread) -> bool:
        """Whether a thread gives its core up to the first who waits."""
        if thread.is_pausing and self._clock.now_ns >= core.begun_ns + PAUSED_TURN_NS:
            return True
        return thread.owed_ns > 0 and self._queue[0][0] <= thread.had_ns

    def _look(self, planned: tuple[_Core, int]) -> None:
        core, number = planned
        if number != core.number:
            return
        self._count(core)
        thread = core.thread
        assert thread is not None
        if self._queue and self._makes_room(core, thread):
            _, _, first = heappop(self._queue)
            thread.core = None
            self._enqueue(thread)
            self._give(core, first)
        elif not thread.owed_ns:
            self._go_on(core)
        else:
            core.begun_ns = self._clock.now_ns
            self._plan(core)
