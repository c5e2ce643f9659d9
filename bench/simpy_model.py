"""The peer of the virtual driver: the same calls as a SimPy model, as one would write it with SimPy.

A process for each call; the CPUs are a Resource, and so is the mutex of the modules list; each step is a timeout; who
waits for a name waits for one Event that each end of a load triggers, and looks again. The steps, their order, their
costs and what is counted are those of the virtual driver under ``v6.4``. Tuned where SimPy lets one: no conditions, no
context managers, the locks of memory are a number each instead of a Resource, and it leaves out what it can: slices of
CPU time, signals, links, other policies, failures, init results.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from random import Random
from typing import Any

import simpy

from loader_svc.virtual.costs import Costs, draw
from loader_svc.virtual.files import Area, Loadable
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.outcome import Outcome, Syscall

UNFORMED, LIVE = 1, 3
Steps = Generator[simpy.Event, Any, None]


class Lock:
    """A lock that is remembered as the time when it will be free."""

    def __init__(self) -> None:
        self._free_at_ns = 0

    def take(self, now_ns: int, hold_ns: int) -> int:
        """Take it; return how long that waits."""
        begin_ns = max(now_ns, self._free_at_ns)
        self._free_at_ns = begin_ns + hold_ns
        return begin_ns - now_ns


class SimpyMachine:
    """A machine that modules are loaded into."""

    def __init__(self, costs: Costs, cpus: int, seed: int) -> None:
        self.env = simpy.Environment()
        self.cpus = simpy.Resource(self.env, cpus)
        self.cpu_count = cpus
        self.costs = costs
        self.dice = Random(seed)
        self.counters = Counters()
        self.failed: dict[str, FailedModule] = {}
        self.modules: dict[str, int] = {}
        self.ended = self.env.event()
        """Triggered, and replaced, at each end of a load: the one wait queue."""
        self.list_mutex = simpy.Resource(self.env, 1)
        self.area_lock, self.page_lock = Lock(), Lock()
        self.held_bytes = self.peak_bytes = 0

    def hold(self, size_bytes: int) -> None:
        """Count memory as held, or as freed."""
        self.held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def vary(self, cost_ns: int) -> int:
        """Return a cost with chance in it."""
        jitter = self.costs.jitter
        return int(cost_ns * (1 - jitter + 2 * jitter * self.dice.random()))

    def locks_ns(self, area: Area) -> int:
        """Return how long allocating waits for its locks."""
        now_ns = int(self.env.now)
        return self.area_lock.take(now_ns, area.area_lock_ns) + self.page_lock.take(now_ns, area.page_lock_ns)

    def hold_ns(self) -> int:
        """Return for how long a look holds the list's mutex."""
        return self.costs.list_lock_ns + int(self.costs.list_lock_ns_per_module * len(self.modules))

    def count(self, loadable: Loadable, outcome: Outcome) -> None:
        """Count a call."""
        duplicate = outcome is not Outcome.LIVE
        wasted_bytes = self.counters.add_call(
            outcome,
            syscall=Syscall.FINIT_MODULE,
            duplicate=duplicate,
            image_bytes=loadable.image_bytes,
            compressed_bytes=0,
            mod_bytes=loadable.layout_bytes,
            text_bytes=loadable.text_bytes,
        )
        if duplicate:
            failed = self.failed.setdefault(loadable.module, FailedModule(loadable.module))
            failed.becoming_count += outcome is Outcome.BECOMING
            failed.load_count += outcome is Outcome.LOAD
            failed.wasted_bytes += wasted_bytes

    def look(self, name: str, *, reserve: bool = False) -> Generator[simpy.Event, Any, int | None]:
        """Look for a name under the mutex; return its state, None if it is not in the list."""
        env = self.env
        lock = self.list_mutex.request()
        yield lock
        yield env.timeout(self.hold_ns())
        state = self.modules.get(name)
        if state is None and reserve:
            self.modules[name] = UNFORMED
        self.list_mutex.release(lock)
        return state

    def call(self, loadable: Loadable) -> Steps:
        """Be one call."""
        env, costs, name, vary = self.env, self.costs, loadable.module, self.vary
        cpu = self.cpus.request()
        yield cpu
        self.hold(loadable.read_bytes)
        yield env.timeout(vary(loadable.read_ns + self.locks_ns(loadable.read_area)))
        yield env.timeout(vary(costs.inspect_ns))
        outcome, state = Outcome.BECOMING, (yield from self.look(name))
        if state is None:
            outcome = Outcome.LOAD
            self.hold(loadable.layout_bytes)
            yield env.timeout(vary(loadable.allocate_ns + self.locks_ns(loadable.layout_area)))
            state = yield from self.look(name, reserve=True)
        if state is not None:
            while state == UNFORMED:
                self.cpus.release(cpu)
                yield self.ended
                cpu = self.cpus.request()
                yield cpu
                yield env.timeout(costs.wake_latency_ns)
                state = yield from self.look(name)
            self.count(loadable, outcome)
            freed_ns = loadable.free_image_ns
            if outcome is Outcome.LOAD:
                freed_ns += loadable.free_core_ns + loadable.free_init_ns
                self.hold(-loadable.layout_bytes)
            self.hold(-loadable.read_bytes)
            yield env.timeout(vary(freed_ns))
            self.cpus.release(cpu)
            return
        yield env.timeout(vary(loadable.link_ns))
        self.hold(-loadable.read_bytes)
        yield env.timeout(vary(loadable.free_image_ns))
        yield env.timeout(vary(draw(costs.init_duration(name), self.dice)))
        lock = self.list_mutex.request()
        yield lock
        self.modules[name] = LIVE
        yield env.timeout(self.hold_ns())
        self.list_mutex.release(lock)
        yield env.timeout(vary(loadable.tail_ns))
        ended, self.ended = self.ended, env.event()
        ended.succeed()
        self.count(loadable, Outcome.LIVE)
        self.hold(-loadable.init_bytes)
        yield env.timeout(vary(loadable.free_init_ns))
        self.cpus.release(cpu)

    def worker(self, chain: Sequence[Loadable]) -> Steps:
        """Load a chain of modules, one after the other."""
        for loadable in chain:
            yield self.env.process(self.call(loadable))

    def run(self, chain: Sequence[Loadable], begins_ns: Iterator[int]) -> Counters:
        """Have a worker begin at each time, and return what was counted."""
        for begin_ns in begins_ns:
            self.env.process(self._begin(chain, begin_ns))
        self.env.run()
        return self.counters

    def _begin(self, chain: Sequence[Loadable], begin_ns: int) -> Steps:
        yield self.env.timeout(begin_ns)
        yield from self.worker(chain)
