"""Virtual time and the CPUs that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loader_svc.clock import Clock, Cpus


def task(clock: Clock, log: list[tuple[str, int]], name: str, *costs: int) -> Callable[[], int | None]:
    """Return a task with pieces of work that cost so much each, and note when each one is begun."""
    left: Iterator[int] = iter(costs)

    def work() -> int | None:
        log.append((name, clock.now_ns))
        return next(left, None)

    return work


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
