"""The cores of a host: who has had the least goes first, and who slept is served before who spins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader_svc.virtual.clock import Clock
from loader_svc.virtual.cpus import Cpus
from loader_svc.virtual.host import PAUSED_TURN_NS, Host, Thread, scaled_ns

MS = 1_000_000


class Bench:
    """Threads that want a core for some time, and what became of them."""

    def __init__(self, cores: int = 1, tick_ns: int = MS // 2) -> None:
        self.clock = Clock()
        self.host = Host(self.clock, cores, latency_ns=12 * MS, slice_ns=3 * MS // 2, wake_ns=2 * MS, tick_ns=tick_ns)
        self.begun: list[tuple[str, float]] = []
        self.done: list[tuple[str, float]] = []

    def thread(self, name: str, *works_ms: float) -> Thread:
        """Return a thread that does these pieces of work, one each time that it is woken."""
        works = list(works_ms)
        is_busy = False

        def on_core() -> int | None:
            nonlocal is_busy
            if is_busy:
                self.done.append((name, self.clock.now_ns / MS))
            is_busy = not is_busy
            if not is_busy:
                return None
            self.begun.append((name, self.clock.now_ns / MS))
            return int(works.pop(0) * MS)

        return Thread(on_core)

    def spinner(self, name: str, works_ms: float) -> Thread:
        """Return a thread that spins for as long, in looks of 0.2 ms, and says so."""
        left_ns = int(works_ms * MS)

        def on_core() -> int | None:
            nonlocal left_ns
            self.begun.append((name, self.clock.now_ns / MS))
            if left_ns <= 0:
                self.done.append((name, self.clock.now_ns / MS))
                return None
            self.host.pause()
            left_ns -= PAUSED_TURN_NS
            return PAUSED_TURN_NS

        return Thread(on_core)

    def wake(self, thread: Thread, at_ms: float = 0) -> None:
        self.clock.send(int(at_ms * MS), self.host.wake, thread)


@pytest.mark.parametrize(("cpus", "factor"), [(1, 1), (2, 2), (3, 2), (4, 3), (8, 4), (48, 4)])
def test_times_grow_with_the_number_of_cpus_as_the_kernels_do(cpus: int, factor: int) -> None:
    assert scaled_ns(750_000, cpus) == factor * 750_000


def test_a_core_is_shared_in_turns_within_the_latency() -> None:
    bench = Bench()
    for name in "ab":
        bench.wake(bench.thread(name, 9))
    bench.clock.run()
    # Turns of 6 ms: a 0-6, b 6-12, a 12-15, b 15-18.
    assert bench.done == [("a", 15), ("b", 18)]


def test_turns_do_not_get_shorter_than_the_slice() -> None:
    bench = Bench()
    for number in range(20):
        bench.wake(bench.thread(str(number), 1.5))
    bench.clock.run()
    assert [at for _, at in bench.done] == [1.5 * (number + 1) for number in range(20)]


def test_a_turn_ends_at_a_tick() -> None:
    bench = Bench(tick_ns=4 * MS)
    for name in "abcdefghij":
        bench.wake(bench.thread(name, 5))
    bench.clock.run()
    # Each would have 1.5 ms, and has the 4 ms up to the tick; then, in the same order, the 1 ms that it still wants.
    assert [at for _, at in bench.done] == [41, 42, 43, 44, 45, 46, 47, 48, 49, 50]


def test_who_spins_makes_room_for_who_waits() -> None:
    bench = Bench(tick_ns=4 * MS)
    for number in range(4):
        bench.wake(bench.spinner(f"spinner {number}", 1000))
    worker = bench.thread("worker", 1)
    bench.wake(worker)
    bench.clock.run(100 * MS)
    # All four have a look first; then it has its 1 ms at once, as its turn lasts until the next tick.
    assert bench.done == [("worker", 1.8)]
    looks = [name for name, _ in bench.begun if name != "worker"]
    assert looks[:8] == [f"spinner {number}" for number in range(4)] * 2


def test_who_spins_keeps_a_core_that_nobody_waits_for() -> None:
    bench = Bench(tick_ns=4 * MS)
    spinner = bench.spinner("spinner", 10)
    bench.wake(spinner)
    bench.clock.run()
    assert bench.done == [("spinner", 10)]
    assert spinner.begun == 1


def test_who_slept_gets_a_core_at_once_among_any_number_that_spin() -> None:
    bench = Bench()
    for number in range(30):
        bench.wake(bench.thread(f"spinner {number}", 1000))
    bench.wake(bench.thread("sleeper", 5), 200)
    bench.clock.run(300 * MS)
    assert bench.done == [("sleeper", 205)]


def test_who_slept_gives_way_once_it_has_caught_up() -> None:
    bench = Bench()
    bench.wake(bench.thread("long", 1000))
    bench.wake(bench.thread("sleeper", 100), 200)
    bench.clock.run(320 * MS)
    assert bench.begun[1] == ("sleeper", 200)
    assert not bench.done, "they share the core from then on"
    bench.clock.run(420 * MS)
    assert [name for name, _ in bench.done] == ["sleeper"]


def test_who_slept_hardly_at_all_has_to_wait_its_turn() -> None:
    bench = Bench()
    brief = bench.thread("brief", 5, 1)
    bench.wake(brief)
    bench.wake(bench.thread("long", 50))
    bench.wake(brief, 5.5)
    bench.clock.run()
    # It has had 5 ms when the other one begins: that may have as much first, and its turn.
    assert bench.begun[:2] == [("brief", 0), ("long", 5)]
    assert bench.begun[2][1] > 10


def test_what_spins_looks_up_as_soon_as_it_is_told_to() -> None:
    bench = Bench()
    spinner = bench.thread("spinner", 100)
    bench.wake(spinner)
    bench.clock.send(30 * MS, lambda _: bench.host.cut_short(spinner) and None, None)
    bench.clock.run()
    assert bench.done == [("spinner", 30)]
    assert bench.host.cut_short(spinner) == 0


def test_a_virtual_cpu_that_is_cut_short_owes_nothing_more() -> None:
    clock = Clock()
    host = Host(clock, 1, latency_ns=12 * MS, slice_ns=MS, wake_ns=MS, tick_ns=MS)
    cpus = Cpus(clock, 2, slice_ns=50 * MS, host=host)
    seen: list[int] = []

    def task() -> int | None:
        seen.append(clock.now_ns)
        return 40 * MS if len(seen) < 3 else None

    cpus.enter(task)
    clock.send(10 * MS, cpus.cut_short, task)
    clock.run()
    assert seen == [0, 10 * MS, 50 * MS]
    assert cpus.busy == 0


def test_a_virtual_cpu_spins_on_beyond_the_slice_of_its_task() -> None:
    clock = Clock()
    # Nobody takes a core only because it wakes up.
    host = Host(clock, 1, latency_ns=12 * MS, slice_ns=3 * MS // 2, wake_ns=100 * MS, tick_ns=4 * MS)
    cpus = Cpus(clock, 2, slice_ns=3 * MS, host=host)
    done: list[float] = []
    works = iter((2 * MS, 3 * MS))

    def spins() -> int | None:
        spent_ns = next(works, None)
        if spent_ns == 3 * MS:
            # 1 ms before its slice ends, for 2 ms more than that.
            host.pause()
        return spent_ns

    def waits() -> int | None:
        if done:
            return None
        done.append(clock.now_ns / MS)
        return MS

    cpus.enter(spins)
    # The first has 1.5 ms of its 5 left: it is beyond its slice, and spins as before.
    cpus.enter(waits, int(3.5 * MS))
    clock.run()
    assert done == [3.5]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.001, 30)), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_every_thread_has_what_it_wants_and_no_core_idles_while_one_waits(
    wants: list[tuple[float, float]], cores: int
) -> None:
    bench = Bench(cores)
    threads = []
    for number, (at_ms, work_ms) in enumerate(wants):
        threads.append(bench.thread(str(number), work_ms))
        bench.wake(threads[-1], at_ms)

    def watch(_: None) -> int | None:
        if bench.host.queued:
            assert all(core.thread is not None for core in bench.host._cores)
        return MS // 3 if len(bench.done) < len(wants) else None

    bench.clock.send(0, watch, None)
    bench.clock.run()
    assert len(bench.done) == len(wants)
    assert not bench.host.queued
    last_ms = max(at for _, at in bench.done)
    first_ms = min(at for at, _ in wants)
    assert last_ms >= first_ms + sum(work for _, work in wants) / cores - 0.01 * len(wants)
    assert all(thread.core is None for thread in threads)


@pytest.mark.parametrize(("queued", "turn_ms"), [(0, 12), (1, 6), (2, 4), (3, 3), (7, 1.5), (50, 1.5)])
def test_a_turn_is_the_share_of_the_latency(queued: int, turn_ms: float) -> None:
    bench = Bench()
    for number in range(queued + 1):
        bench.wake(bench.thread(str(number), 500))
    bench.clock.run(0)
    assert bench.host._turn_ns() == turn_ms * MS
