"""Virtual time and the CPUs that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loader_svc.virtual.clock import Clock
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.cpus import MAX_SLICES, Cpus
from loader_svc.virtual.host import Host
from loader_svc.virtual.locks import Lock
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.process import Body, Process


def task(clock: Clock, log: list[tuple[str, int]], name: str, *costs: int) -> Callable[[], int | None]:
    """Return a task with pieces of work that cost so much each, and note when each one is begun."""
    left: Iterator[int] = iter(costs)

    def work() -> int | None:
        log.append((name, clock.now_ns))
        return next(left, None)

    return work


def test_a_patient_cpu_lets_a_piece_of_work_end_that_nobody_waits_behind() -> None:
    def begins(piece_ns: int, *, is_patient: bool) -> list[tuple[str, int]]:
        clock, log = Clock(), list[tuple[str, int]]()
        cpu = Cpus(clock, 1, slice_ns=10, is_patient=is_patient)
        cpu.enter(task(clock, log, "first", 4, piece_ns))
        cpu.enter(task(clock, log, "other", 2), 5)
        clock.run()
        return [entry for entry in log if entry[0] == "other"][:1]

    assert begins(12, is_patient=False) == [("other", 10)]
    assert begins(12, is_patient=True) == [("other", 16)]
    assert begins(16, is_patient=True) == [("other", 10)], "a slice late at most"


def test_events_come_in_order_of_time_and_then_of_making() -> None:
    clock, log = Clock(), []
    for name, at in (("c", 20), ("a", 10), ("b", 10)):
        clock.at(at, lambda name=name: log.append((name, clock.now_ns)))
    clock.run(15)
    assert (log, clock.now_ns) == ([("a", 10), ("b", 10)], 15)
    clock.at(3, lambda: log.append(("late", clock.now_ns)))
    clock.run()
    assert log[2:] == [("late", 15), ("c", 20)]


@pytest.mark.parametrize(
    ("cpus", "ends"),
    [(None, {"a": 10, "b": 10, "c": 10}), (3, {"a": 10, "b": 10, "c": 10}), (2, {"a": 10, "b": 10, "c": 20})],
)
def test_tasks_take_turns_when_there_are_fewer_cpus(cpus: int | None, ends: dict[str, int]) -> None:
    clock, log = Clock(), []
    shared = Cpus(clock, cpus, slice_ns=1000)
    for name in "abc":
        shared.enter(task(clock, log, name, 4, 6))
    clock.run()
    assert {name: at for name, at in log if at} | {} == ends | {}


def test_a_slice_used_up_lets_the_next_one_in() -> None:
    clock, log = Clock(), []
    cpu = Cpus(clock, 1, slice_ns=10)
    cpu.enter(task(clock, log, "long", 25))
    cpu.enter(task(clock, log, "short", 5))
    clock.run()
    # long 0-10, short 10-15, long 15-30: nobody else wants the CPU any more.
    assert log == [("long", 0), ("short", 10), ("short", 15), ("long", 30)]


def test_a_task_that_waits_leaves_its_cpu_to_another_one() -> None:
    clock, log = Clock(), []
    cpu = Cpus(clock, 1)
    for name in "ab":
        cpu.enter(task(clock, log, name))
    clock.run()
    assert log == [("a", 0), ("b", 0)]


def test_virtual_cpus_take_turns_at_the_cores_of_their_host() -> None:
    clock, log = Clock(), []
    virtual = Cpus(clock, 2, slice_ns=1000, host=Host(clock, 1, latency_ns=20, slice_ns=1, wake_ns=0, tick_ns=1))
    virtual.enter(task(clock, log, "long", 25))
    virtual.enter(task(clock, log, "short", 5))
    clock.run()
    # Both have a CPU of their own, but it is one core that does the work: 0-10, 10-15, 15-30.
    assert log == [("long", 0), ("short", 10), ("short", 15), ("long", 30)]
    assert virtual.busy == virtual.queued == 0


def test_a_long_task_that_nobody_waits_behind_is_few_events_and_gives_way_all_the_same() -> None:
    clock, log = Clock(), []
    cpu = Cpus(clock, 1, slice_ns=10)
    cpu.enter(task(clock, log, "long", 100_000))
    clock.run(5000)
    assert clock.made < 30
    cpu.enter(task(clock, log, "short", 5))
    clock.run()
    begun_ns = next(at for name, at in log if name == "short")
    assert 5000 < begun_ns <= 5000 + MAX_SLICES * 10
    assert log[-1] == ("long", 100_005)


def test_a_lock_is_first_come_first_served() -> None:
    lock = Lock()
    assert [lock.take(0, 10), lock.take(4, 10), lock.take(5, 1), lock.take(30, 5)] == [0, 6, 15, 0]
    assert (lock.waited_ns, lock.free_at_ns) == (21, 35)


@pytest.mark.parametrize("cpus", [None, 1, 3])
def test_a_process_yields_time_sleeps_and_is_woken(cpus: int | None) -> None:
    machine = VirtualMachine(cpus=cpus)
    clock, log = machine.clock, []

    def body() -> Body:
        yield 5
        yield 0
        log.append(("worked", clock.now_ns))
        yield None
        log.append(("woken", clock.now_ns))

    process = Process(machine, body(), 10)
    process.wake()
    clock.at(50, process.wake)
    clock.at(60, process.wake)
    machine.run()
    assert log == [("worked", 15), ("woken", 50)]
    assert imbalances(machine) == []
