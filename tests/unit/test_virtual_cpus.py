"""CPUs of a simulated machine, and who gets one when."""

from __future__ import annotations

import pytest

from loader_svc.virtual.clock import Clock
from loader_svc.virtual.cpus import MAX_SLICES, Cpus, Task

SLICE_NS = 10


class Work:
    """A task that is busy for a while, once, and notes when it begins and ends."""

    def __init__(self, clock: Clock, busy_ns: int) -> None:
        self._clock = clock
        self._busy_ns = busy_ns
        self.begun_ns = self.ended_ns = -1

    def task(self) -> int | None:
        """Be the task."""
        if self.begun_ns < 0:
            self.begun_ns = self._clock.now_ns
            return self._busy_ns
        self.ended_ns = self._clock.now_ns
        return None


def run(cpus: int, *works: tuple[int, int]) -> tuple[list[Work], Clock, Cpus]:
    """Have works of so many ns come at some times, and carry them to their ends."""
    clock = Clock()
    made = Cpus(clock, cpus, SLICE_NS)
    done = []
    for at_ns, busy_ns in works:
        work = Work(clock, busy_ns)
        task: Task = work.task
        made.enter(task, at_ns)
        done.append(work)
    clock.run()
    return done, clock, made


@pytest.mark.parametrize(
    ("comes_ns", "begins_ns"),
    # While nobody waits slices double: they end at 10, 30, 70, 150, 310, 630, 1270 ns and then every 640.
    [(5, 10), (10, 30), (11, 30), (69, 70), (70, 150), (1269, 1270), (1271, 1910), (2000, 2550)],
)
def test_who_comes_gets_a_cpu_at_the_end_of_the_slice_that_it_finds(comes_ns: int, begins_ns: int) -> None:
    assert MAX_SLICES == 64
    (first, second), clock, cpus = run(1, (0, 5000), (comes_ns, 4))
    assert (first.begun_ns, second.begun_ns, second.ended_ns) == (0, begins_ns, begins_ns + 4)
    # Nothing of what the first had to spend got lost or was spent twice.
    assert first.ended_ns == 5004
    assert (cpus.busy, cpus.queued, clock.events) == (0, 0, [])


def test_those_who_come_one_after_the_other_find_each_cpu_in_its_own_slice() -> None:
    (first, second, third, fourth), clock, cpus = run(2, (0, 1000), (4, 1000), (31, 3), (32, 3))
    # The CPUs' slices end at 10, 30, 70 and at 14, 34, 74 ns.
    assert (third.begun_ns, fourth.begun_ns) == (34, 37)
    assert (first.ended_ns, second.ended_ns) == (1000, 1010)
    assert (cpus.busy, cpus.queued, clock.events) == (0, 0, [])


def test_a_long_work_that_nobody_waits_behind_is_one_event() -> None:
    (work,), clock, _ = run(1, (0, 10_000_000))
    assert work.ended_ns == 10_000_000
    assert clock.made <= 3
