"""udevd in virtual time: the loop that takes events in and hands them out, and the workers that handle them.

The loop (src/udev/udevd.c, systemd 252) has one thread: each turn takes one uevent or all workers' results, then walks
the list and starts whatever is queued and not blocked, on an idle worker or else on one that it forks, while it may. A
worker handles one event at a time; one that sleeps in the kernel keeps its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from loader_svc.boot.device import Device
from loader_svc.boot.queue import Event, EventQueue
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.process import Body, Process

IDLE_NS: Final = 3_000_000_000
"""How long workers stay after the list ran empty (``on_post``, src/udev/udevd.c: 3 s)."""

DEVICES: Final = "/devices/"
"""What the paths of devices begin with; those of buses, drivers and modules do not, and few rules match these."""


@dataclass(frozen=True, slots=True)
class UdevCosts:
    """What udev's own work takes, in ns."""

    event_ns: int = 0
    """The loop's work for one event, from taking it in to taking the result."""

    fork_ns: int = 0
    """Forking a worker, which the loop does by itself."""

    rules_ns: int = 0
    """A worker's pass over the rules for one event, with the entry in its database."""

    worker_ns: int = 0
    """A worker's own start, before its first event."""

    device_rules_ns: int = 0
    """What a pass over the rules takes more for a device."""


class Worker:
    """A process that handles one event at a time."""

    __slots__ = ("event", "number", "process")

    def __init__(self, number: int) -> None:
        self.number = number
        self.event: Event | None = None
        self.process: Process | None = None


Load = Callable[[Worker, Device], Generator[Any, Any, None]]
"""What a worker does for a new device with a modalias: a part of its body."""


class Udev:
    """The loop, its list and its workers."""

    def __init__(
        self,
        machine: VirtualMachine,
        load: Load,
        costs: UdevCosts,
        children_max: int,
        dice: Random,
    ) -> None:
        """``load`` is what the rules do for a new device with a modalias; ``children_max`` limits the workers."""
        self.queue = EventQueue()
        self.handled = 0
        """Events that workers have handled."""
        self.forked = 0
        """Workers started so far."""
        self.forks_ns: list[int] = []
        """When each worker had been forked."""
        self.idle_since_ns = 0
        """When the list last ran empty."""
        self._machine = machine
        self._load = load
        self._costs = costs
        self._children_max = children_max
        self._dice = dice
        self._inbox: deque[Event] = deque()
        self._results: deque[Worker] = deque()
        self._idle: list[Worker] = []
        self._alive = 0
        self._process = Process(machine, self._loop())

    def receive(self, event: Event) -> None:
        """Have the kernel send an event."""
        self._inbox.append(event)
        self._process.wake()

    def _loop(self) -> Body:
        costs = self._costs
        queue, vary = self.queue, self._machine.vary
        taking_ns = costs.event_ns // 2
        result_ns = costs.event_ns - taking_ns
        takes_result = False
        while True:
            if not self._inbox and not self._results:
                yield None
                continue
            # Where both wait they take turns (sd_event); one uevent at a time, but all results (``on_worker``).
            takes_result = bool(self._results) and not (takes_result and self._inbox)
            if takes_result:
                while self._results:
                    worker = self._results.popleft()
                    yield vary(result_ns)
                    self._take_result(worker)
            else:
                event = self._inbox.popleft()
                yield vary(taking_ns)
                queue.add(event)
            while queue.has_ready:
                if self._idle:
                    worker = self._any_idle()
                elif self._alive < self._children_max:
                    yield vary(costs.fork_ns)
                    self.forked += 1
                    self.forks_ns.append(self._machine.clock.now_ns)
                    self._alive += 1
                    worker = Worker(self.forked)
                else:
                    break
                worker.event = queue.next()
                if worker.process is None:
                    worker.process = Process(self._machine, self._work(worker))
                else:
                    worker.process.wake()

    def _any_idle(self) -> Worker:
        """Take an idle worker: udevd takes the first of a hash table, which may be any."""
        at = int(self._dice.random() * len(self._idle))
        self._idle[at], self._idle[-1] = self._idle[-1], self._idle[at]
        return self._idle.pop()

    def _take_result(self, worker: Worker) -> None:
        assert worker.event is not None
        self.queue.done(worker.event)
        worker.event = None
        self.handled += 1
        self._idle.append(worker)
        if not len(self.queue):
            self.idle_since_ns = since_ns = self._machine.clock.now_ns
            self._machine.clock.at(since_ns + IDLE_NS, lambda: self._dismiss(since_ns))

    def _dismiss(self, since_ns: int) -> None:
        """Let idle workers go if nothing has come since."""
        if self.idle_since_ns == since_ns and not len(self.queue) and not self._inbox and not self._results:
            self._alive -= len(self._idle)
            self._idle.clear()

    def _work(self, worker: Worker) -> Body:
        vary, costs = self._machine.vary, self._costs
        rules_ns, of_device_ns = costs.rules_ns, costs.rules_ns + costs.device_rules_ns
        if costs.worker_ns:
            yield vary(costs.worker_ns)
        while True:
            event = worker.event
            assert event is not None
            yield vary(of_device_ns if event.device.path.startswith(DEVICES) else rules_ns)
            if event.action == "add" and event.device.modalias:
                yield from self._load(worker, event.device)
            self._results.append(worker)
            self._process.wake()
            while worker.event is event or worker.event is None:
                yield None
