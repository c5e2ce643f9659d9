"""CPUs that take turns at tasks; and virtual CPUs, which take turns at the cores of a host in their turn."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from heapq import heappush
from typing import Final

from loader_svc.virtual.clock import DEFAULT_SLICE_NS, Clock
from loader_svc.virtual.host import Host, Thread

Task = Callable[[], int | None]
"""Does its next piece of work at once when it is called, and returns how long that keeps the CPU busy, in ns, or None
when it leaves the CPU: because it waits or because it has ended. 0 means that there is more to be done at once."""


MAX_SLICES: Final = 64
"""How many slices a task may have on end that nobody waits behind, before it is looked whether somebody does by now."""


class _Cpu:
    """What one CPU is at."""

    __slots__ = ("_cpus", "left_ns", "owed_ns", "spending_ns", "task", "thread")

    def __init__(self, cpus: Cpus) -> None:
        self._cpus = cpus
        self.task: Task = _nothing
        self.owed_ns = 0
        """Time that the task has still to spend on what it did."""
        self.left_ns = 0
        """What is left of the task's slice."""
        self.spending_ns = 0
        """What is being spent just now."""
        self.thread = None if cpus._host is None else Thread(self.go_on)
        """What a virtual CPU is to its host."""

    def go_on(self) -> int | None:
        """Go on after what was to be spent has passed: a virtual CPU is a task of its host."""
        return self._cpus.go_on(self)


class _Stretch:
    """What a CPU spends while nobody waits for one: a row of slices, each of them longer, that need no events.

    As soon as somebody waits, the CPU is to be looked at where the slice ends that it is in.
    """

    __slots__ = ("begun_ns", "cpu", "left_ns", "owed_ns")

    def __init__(self, cpu: _Cpu, begun_ns: int) -> None:
        self.cpu: _Cpu | None = cpu
        """None once the stretch has been cut short."""
        self.begun_ns = begun_ns
        self.left_ns = cpu.left_ns
        """What was left of the slice when it began."""
        self.owed_ns = cpu.owed_ns


class Cpus:
    """CPUs that take turns at tasks, a slice at a time, first come, first served."""

    def __init__(
        self,
        clock: Clock,
        count: int | None = None,
        slice_ns: int = DEFAULT_SLICE_NS,
        *,
        host: Host | None = None,
        is_patient: bool = False,
    ) -> None:
        """``count`` None means as many CPUs as there are tasks; ``host`` has the cores that virtual CPUs share.

        ``is_patient`` lets a task that nobody waits behind do a piece of work to its end, up to a slice late.
        """
        self._clock = clock
        self._count = count
        self._slice_ns = slice_ns
        self._host = host
        self._grace_ns = slice_ns if is_patient else 0
        self._busy = 0
        self._idle: list[_Cpu] = []
        self._made: list[_Cpu] = []
        self._queue: deque[tuple[Task, int]] = deque()
        self._stretches: dict[_Stretch, None] = {}
        """There are some only while nobody waits."""

    @property
    def busy(self) -> int:
        """How many CPUs have a task."""
        return self._busy

    @property
    def queued(self) -> int:
        """How many tasks wait for a CPU."""
        return len(self._queue)

    def enter(self, task: Task, delay_ns: int = 0) -> None:
        """Have a task called in its turn, after a delay."""
        clock = self._clock
        clock.made = made = clock.made + 1
        heappush(clock.events, (clock.now_ns + delay_ns, made, self._arrive, task))

    @property
    def idle(self) -> int:
        """How many tasks could begin at once; for virtual CPUs it is for their host to say, so none."""
        if self._host is not None:
            return 0
        return sys.maxsize if self._count is None else self._count - self._busy

    def occupy(self, task: Task, spent_ns: int) -> None:
        """Have an idle CPU take a task that has done its first piece of work already, and spend what that takes."""
        self._busy += 1
        cpu = self._idle.pop() if self._idle else self._make()
        cpu.task = task
        cpu.owed_ns = spent_ns
        cpu.left_ns = slice_ns = self._slice_ns
        cpu.spending_ns = spending_ns = spent_ns if spent_ns < slice_ns or self._count is None else slice_ns
        clock = self._clock
        clock.made = made = clock.made + 1
        heappush(clock.events, (clock.now_ns + spending_ns, made, self._spent, cpu))

    def runs(self, task: Task) -> bool:
        """Whether a task has a CPU at this moment, and that a core of its host."""
        for cpu in self._made:
            if cpu.task == task:
                return cpu.thread is None or cpu.thread.core is not None
        return False

    def cut_short(self, task: Task) -> None:
        """Have a task of a virtual CPU be called as soon as that has a core, whatever it has still to spend."""
        for cpu in self._made:
            if cpu.task == task:
                assert self._host is not None
                assert cpu.thread is not None
                cpu.spending_ns -= self._host.cut_short(cpu.thread)
                cpu.owed_ns = cpu.spending_ns
                return

    def _make(self) -> _Cpu:
        cpu = _Cpu(self)
        self._made.append(cpu)
        return cpu

    def _arrive(self, task: Task) -> None:
        if self._count is not None and self._busy >= self._count:
            self._queue.append((task, 0))
            if self._stretches:
                self._cut_stretches()
            return
        self._busy += 1
        cpu = self._idle.pop() if self._idle else self._make()
        cpu.task = task
        cpu.owed_ns = cpu.spending_ns = 0
        cpu.left_ns = self._slice_ns
        if self._host is not None:
            assert cpu.thread is not None
            self._host.wake(cpu.thread)
        else:
            again_ns = self._spent(cpu)
            if again_ns is not None:
                self._clock.send(self._clock.now_ns + again_ns, self._spent, cpu)

    def _spent(self, cpu: _Cpu) -> int | None:
        """Have a CPU that is no virtual one go on; return what it spends then, after which this is due again."""
        spending_ns = cpu.spending_ns
        left_ns = cpu.left_ns - spending_ns
        if cpu.owed_ns == spending_ns and left_ns > 0:
            # As go_on would, for what happens most of the time: the task goes on, on the same CPU.
            task = cpu.task
            answer = task()
            if answer:
                cpu.owed_ns = answer
                cpu.left_ns = left_ns
                if answer < left_ns or self._count is None or (not self._queue and answer - left_ns < self._grace_ns):
                    cpu.spending_ns = answer
                    return answer
                cpu.spending_ns = left_ns
                if self._queue:
                    return left_ns
                self._stretch(cpu)
                return None
            cpu.owed_ns = cpu.spending_ns = 0
            cpu.left_ns = left_ns
            if answer is None and not self._next(cpu):
                return None
        again_ns = self.go_on(cpu)
        if again_ns is not None and again_ns < cpu.owed_ns and not self._queue:
            self._stretch(cpu)
            return None
        return again_ns

    def _stretch(self, cpu: _Cpu) -> None:
        """Have a CPU spend all that it owes, without an event at the end of each slice."""
        clock = self._clock
        stretch = _Stretch(cpu, clock.now_ns)
        self._stretches[stretch] = None
        clock.send(clock.now_ns + cpu.owed_ns, self._end_stretch, stretch)

    def _end_stretch(self, stretch: _Stretch) -> None:
        if stretch.cpu is not None:
            del self._stretches[stretch]
            self._enter_slice(stretch.cpu, stretch, stretch.begun_ns + stretch.owed_ns)
            again_ns = self._spent(stretch.cpu)
            if again_ns is not None:
                self._clock.send(self._clock.now_ns + again_ns, self._spent, stretch.cpu)

    def _cut_stretches(self) -> None:
        """Look at each CPU that spends a stretch at the end of its slice: somebody waits for one."""
        clock = self._clock
        for stretch in self._stretches:
            cpu = stretch.cpu
            assert cpu is not None
            stretch.cpu = None
            ends_ns = self._enter_slice(cpu, stretch, clock.now_ns)
            clock.send(ends_ns, self._spent, cpu)
        self._stretches.clear()

    def _enter_slice(self, cpu: _Cpu, stretch: _Stretch, now_ns: int) -> int:
        """Have a CPU be in that slice of a stretch which a moment is in, or the last one; return when that ends."""
        begun_ns, owed_ns, left_ns = stretch.begun_ns, stretch.owed_ns, stretch.left_ns
        while owed_ns > left_ns and begun_ns + left_ns <= now_ns:
            begun_ns += left_ns
            owed_ns -= left_ns
            left_ns = self._longer_ns(left_ns)
        cpu.owed_ns, cpu.left_ns = owed_ns, left_ns
        cpu.spending_ns = spending_ns = min(owed_ns, left_ns)
        return begun_ns + spending_ns

    def _longer_ns(self, spent_ns: int) -> int:
        """Return how long a slice is that begins when so much time has passed without anybody waiting."""
        return min(max(2 * spent_ns, self._slice_ns), MAX_SLICES * self._slice_ns)

    def _next(self, cpu: _Cpu) -> bool:
        """Give the next task to a CPU that the last one has left; return whether there is one."""
        cpu.spending_ns = 0
        if self._queue:
            cpu.task, cpu.owed_ns = self._queue.popleft()
            cpu.left_ns = self._slice_ns
            return True
        self._busy -= 1
        cpu.task = _nothing
        self._idle.append(cpu)
        return False

    def go_on(self, cpu: _Cpu) -> int | None:
        """Have a CPU go on: return how long it is busy now, in ns, None when it has nothing left to do."""
        queue = self._queue
        spent_ns = cpu.spending_ns
        cpu.owed_ns -= spent_ns
        cpu.left_ns -= spent_ns
        thread = cpu.thread
        if cpu.left_ns <= 0:
            cpu.left_ns = self._slice_ns
            if queue:
                if thread is not None and thread.is_pausing:
                    # Who spins looks up when it is back.
                    cpu.owed_ns, thread.is_pausing = 0, False
                queue.append((cpu.task, cpu.owed_ns))
                cpu.task, cpu.owed_ns = queue.popleft()
            elif cpu.owed_ns:
                # Nobody else wants the CPU: look again when as much time has passed as did until now.
                cpu.left_ns = self._longer_ns(spent_ns)
        while not cpu.owed_ns:
            if thread is not None:
                thread.is_pausing = False
            answer = cpu.task()
            if answer is not None:
                cpu.owed_ns = answer
            elif not self._next(cpu):
                return None
        owed_ns, left_ns = cpu.owed_ns, cpu.left_ns
        cpu.spending_ns = spending_ns = owed_ns if self._count is None or owed_ns < left_ns else left_ns
        return spending_ns


def _nothing() -> None:
    """Be no task."""
