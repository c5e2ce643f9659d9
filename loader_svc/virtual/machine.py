"""The virtual driver: one simulated machine in one process, its calls carried through the one pipeline in virtual time.

Files are planned for real, once each; memory is only counted, and time passes only where the costs or the init results
say so. The same calls with the same seed come to the same end, always.

What waits does so as in Linux 6.12 (kernel/module/main.c): all who wait for a name are on one queue (``module_wq``),
whichever name it is, and each end of a load wakes all of them to look again; a module is live some time before the end
of its load, so that some leave when another module's load ends.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, Final

from loader_svc.checks.exports import Exporter
from loader_svc.checks.linkage import OWNER_PATIENCE_SECONDS
from loader_svc.checks.parameters import arguments
from loader_svc.init_results import InitResults
from loader_svc.plan import Plans
from loader_svc.steps import (
    Admit,
    Allocate,
    CallSpec,
    CheckName,
    Decompress,
    Ending,
    EnterGate,
    Failure,
    Finish,
    Free,
    Init,
    Inspect,
    Link,
    Read,
    ReserveName,
    Unpack,
)
from loader_svc.virtual.areas import Areas
from loader_svc.virtual.call import Record, VirtualCall
from loader_svc.virtual.call_counts import CallCounts, EndingTag
from loader_svc.virtual.clock import Clock
from loader_svc.virtual.costs import NO_COSTS, Costs, draw
from loader_svc.virtual.cpus import Cpus, Task
from loader_svc.virtual.files import Loadable, VirtualFile
from loader_svc.virtual.finite_memory import FiniteMemory
from loader_svc.virtual.locks import Lock
from loader_svc.virtual.page_cache import PageCache
from loader_svc.virtual.route import Node
from loader_svc.virtual.wait_queue import ForeseeingQueue, WaitQueue
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.gate import Gate
from modpressure.kernel.identity import ANY, KernelIdentity
from modpressure.kernel.links import Links, unloading
from modpressure.kernel.modules_list import PROCEED, Answer, ModulesList, State, Verdict
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.system_memory import Amounts

__all__ = ["IMAGE_LIMIT_BYTES", "VirtualCall", "VirtualFile", "VirtualMachine"]

IMAGE_LIMIT_BYTES: Final = 1 << 30
GC_THRESHOLD: Final = 1_000_000
"""Objects made, less those that went, after which cycles are looked for while a machine runs."""

FREE_FLUSHES: Final = 2
"""Flushes of all TLBs when a layout is freed: one for the core, one for the init part (``free_module``,
kernel/module/main.c, Linux 6.3)."""

_INTERRUPTED: Final = Answer(Verdict.INTERRUPTED, "EINTR", waited=True)


class _Later:
    """Stands for an answer that comes later."""


_ASLEEP: Final = _Later()
"""The call sleeps: its answer comes when somebody wakes it."""

_OWING: Final = _Later()
"""The call has to spend what it owes; then it goes on with what ``_then`` returns."""


class VirtualMachine:
    """A machine that modules are loaded into."""

    __slots__ = (
        "_carry_outs",
        "_flush_cpus",
        "_init_results",
        "_known",
        "_known_kinds",
        "_least",
        "_list_ns",
        "_loadables",
        "_plans",
        "_probed_at_ns",
        "_queue",
        "_random",
        "_spread",
        "areas",
        "calls_in_flight",
        "clock",
        "costs",
        "counts",
        "cpus",
        "dice",
        "gate",
        "identity",
        "links",
        "list_lock",
        "memory",
        "modules",
        "on_live",
        "page_cache",
        "record",
    )

    def __init__(
        self,
        identity: KernelIdentity = ANY,
        *,
        init_results: InitResults | None = None,
        plans: Plans | None = None,
        cpus: int | None = None,
        costs: Costs = NO_COSTS,
        seed: int = 0,
        limits: Amounts | None = None,
    ) -> None:
        """``plans`` may be shared with other machines of the same identity; ``cpus`` None means as many as needed.

        All chance is drawn from ``seed``.
        ``limits`` are what the machine has of memory; None for as much as is asked.
        """
        self.identity = identity
        self.costs = costs
        self.clock = Clock()
        self.dice = Random(seed)
        self._random = self.dice.random
        self.cpus = self._make_cpus(cpus)
        self._list_ns = costs.list_lock_ns
        self.counts = CallCounts()
        self.modules: ModulesList[VirtualCall] = ModulesList()
        self.gate: Gate[VirtualCall] = Gate()
        self.links: Links[VirtualCall] = Links()
        self._flush_cpus = cpus or 0
        self.areas = Areas(self.clock, self._purge_ns())
        self.calls_in_flight = 0
        self.on_live: Callable[[str], None] | None = None
        """Called with a module's name when its init has returned, at the moment at which it goes live."""
        self.record: Record | None = None
        """Is told each call that has ended, in the order of their ends."""
        self.list_lock = Lock()
        """The mutex of the modules list (``module_mutex``)."""
        self._queue = self._make_queue()
        """Who waits for any name."""
        self._init_results = init_results or InitResults()
        self._plans = plans or Plans(IMAGE_LIMIT_BYTES, identity)
        self._loadables: dict[tuple[VirtualFile, CallSpec], Loadable] = {}
        self._known: dict[int, Loadable] = {}
        """The same by the identity of a specification that they keep alive: equal ones take longer to find."""
        self.page_cache = PageCache(costs)
        self._probed_at_ns = 0
        """When all that init functions left to be done asynchronously will be done."""
        self._least = 1 - costs.jitter
        self._spread = 2 * costs.jitter
        self._carry_outs: dict[type, tuple[Callable[[VirtualCall], Any], bool]] = {
            EnterGate: (self._enter_gate, True),
            CheckName: (self._check_name, True),
            ReserveName: (self._reserve_name, True),
            Read: (self._read if costs.first_read_from_disk else self.areas.read, True),
            Decompress: (self.areas.decompress, True),
            Allocate: (self.areas.allocate, False),
            Link: (self._link, False),
            Init: (self._init, True),
            Finish: (self._finish, False),
        }
        """How each step is carried out, and whether the time that the steps before it took must have passed by then:
        so for all that others can see, or that depends on what others do. (Allocating comes right behind a look into
        the list, which takes next to nothing.)"""

        self.memory = None if limits is None else FiniteMemory(limits)
        """What is taken of the machine's memory, where that is finite."""
        self._known_kinds: tuple[type, ...] = (Admit, Unpack, Inspect, Free)
        """The steps whose answers are known, so that they need not be carried out one by one."""
        if self.memory is not None:
            self._known_kinds = (Admit, Unpack)
            # Whether there is room depends on what others do, for every step that allocates or frees.
            self._carry_outs |= {Inspect: (self._inspect, True), Free: (self._free_now, True)}
            for kind in (Read, Decompress, Inspect, Allocate, Free, Finish):
                self._carry_outs[kind] = (partial(self._within_limits, self._carry_outs[kind][0]), True)

    def _purge_ns(self) -> int:
        """Return how long all TLBs are being flushed when a layout is freed, in ns."""
        return FREE_FLUSHES * (self.costs.flush_ns + self._flush_cpus * self.costs.flush_ns_per_cpu)

    def _make_cpus(self, cpus: int | None) -> Cpus:
        return Cpus(self.clock, cpus, self.costs.slice_ns, is_patient=True)

    def _make_queue(self) -> WaitQueue:
        if not self.costs.list_lock_ns:
            # Who finds what it waited for may come to its end without spending anything.
            return WaitQueue(self.cpus, self.costs)
        return ForeseeingQueue(
            self.cpus,
            self.costs,
            self.clock,
            look=self.modules.look_again,
            look_in_vain=lambda calls: self.list_lock.take(self.clock.now_ns, self._list_ns * calls),
            advance=self.advance,
        )

    # --- what can be asked of it ---

    def begin(self, call: VirtualCall, at_ns: int | None = None) -> VirtualCall:
        """Have a call begin on a CPU of its own turn, now or at a time; ``run`` carries it on."""
        at_ns = self.clock.now_ns if at_ns is None else at_ns
        self.clock.send(at_ns, self.cpus.enter, partial(self._alone, call))
        return call

    def _alone(self, call: VirtualCall) -> int | None:
        """Be the task of a call that no process makes."""
        if call._task is None:
            self.start(call, partial(self._alone, call))
        if call.ending is not None:
            return None
        spent_ns = self.advance(call)
        return spent_ns if call.ending is None else spent_ns or None

    def call(self, call: VirtualCall) -> Ending:
        """Make one call and carry everything on until nothing is left to do; return what became of the call."""
        self.begin(call)
        self.run()
        assert call.ending is not None, "a call on its own waits for nobody"
        return call.ending

    def run(self) -> None:
        """Carry every call on to its end."""
        thresholds = gc.get_threshold()
        # A simulation makes very many objects and no cycles of them: looking for some would take a third of its time.
        gc.set_threshold(max(thresholds[0], GC_THRESHOLD), *thresholds[1:])
        try:
            self.clock.run()
        finally:
            gc.set_threshold(*thresholds)

    def interrupt(self, call: VirtualCall, at_ns: int) -> None:
        """Send whoever makes a call a signal at a time; nothing happens if the call does not wait then."""
        self.clock.send(at_ns, self._interrupt, call)

    def remove(self, name: str, *, forced: bool = False) -> str:
        """Unload a module as delete_module does, at once; return the errno, empty for success."""
        errno = self.begin_removal(name, forced=forced)
        if not errno:
            self.end_removal(name)
        return errno

    def begin_removal(self, name: str, *, forced: bool = False) -> str:
        """Have a module be going, as long as its exit function takes; return the errno, empty for success.

        After a success ``end_removal`` is due.
        """
        if not self.identity.module_unload:
            return "ENOSYS"
        answer = unloading(self.modules, self.links, name, forced=forced and self.identity.module_force_unload)
        if answer.verdict is not Verdict.PROCEED:
            return answer.errno
        self.modules.go(name)
        return ""

    def end_removal(self, name: str) -> None:
        """Take a module out of the list that is going, and wake who waits."""
        going = self.modules.get(name)
        assert going is not None
        assert going.state is State.GOING
        self.areas.unload(going.core_bytes)
        if self.memory is not None:
            self.memory.unload(going.owner)
        self.links.drop(name)
        self.modules.remove(name)
        self._time_looks()
        self._queue.wake()
        self.counts.add_unload()

    @property
    def waiting(self) -> int:
        """How many calls wait: for a name, in the gate, or for a module that they need."""
        return len(self._queue) + self.gate.waiting + self.links.waiting

    def find(self, name: str) -> Exporter | None:
        """Return which module in the list exports a symbol, or None: this machine's Exporters."""
        found = self.links.find(name)
        if found is None:
            return None
        entry = self.modules.get(found.owner)
        assert entry is not None
        return Exporter(found.symbol, found.owner, entry.state is State.COMING, found.is_proprietary)

    def vary(self, cost_ns: int) -> int:
        """Return a cost with chance in it, in ns."""
        return int(cost_ns * (self._least + self._spread * self.dice.random())) if self._spread else cost_ns

    # --- carrying calls on ---

    def start(self, call: VirtualCall, task: Task) -> None:
        """Begin a call on behalf of a task that has a CPU: from now on ``advance`` is what the task is to do."""
        call.begun_ns = self.clock.now_ns
        call._task = task
        spec = call.spec
        known = self._known.get(id(spec))
        if known is not None and known.spec is spec and known.file is call.file:
            loadable = known
        else:
            loadable = self._loadable(call)
        call.loadable = loadable
        call._node = loadable.first
        self.calls_in_flight += 1

    def _loadable(self, call: VirtualCall) -> Loadable:
        """Return what a call loads, found out once for all calls that are alike."""
        key = (call.file, call.spec)
        loadable = self._loadables.get(key)
        if loadable is None:
            loadable = Loadable(
                call.file, self._plans, call.spec, self.costs, self._flush_cpus, knows=self._known_kinds
            )
            self._loadables[key] = loadable
            self._known[id(loadable.spec)] = loadable
        return loadable

    def advance(self, call: VirtualCall) -> int | None:
        """Take a call through its next steps; return how long that keeps the CPU busy, in ns, or None if it sleeps.

        A call that sleeps has its task entered on the CPUs when it is woken. When it has ended, ``call.ending`` is set,
        and what is returned, 0 mostly, is the last that it spends.
        """
        then = call._then
        if then is not None:
            call._then = None
            answer = then(call)
        else:
            answer = call._answer
            call._answer = None
        ending: Ending | None = None
        while answer is not _OWING:
            if answer is _ASLEEP:
                return None
            node = call._node
            node = node.on_latest if answer is node.latest else node.after(answer)
            call._node = node
            if node.cost_ns:
                call._owed_ns += node.cost_ns
            carry_out = node.carry_out or self._fit(node, call.loadable)
            if node.is_exact and call._owed_ns:
                if node.is_end and self.record is None and call.on_end is None and not call.restarts:
                    # Nobody looks at the moment at which it ends, so that need not be an event.
                    ending = node.ending
                else:
                    call._then = carry_out
                break
            answer = carry_out(call)
        spent_ns = call._owed_ns
        if not spent_ns:
            return 0
        call._owed_ns = 0
        if self._spread:
            random = self._random
            spent_ns = int(spent_ns * (self._least + self._spread * random())) or 1
        if ending is not None:
            call.ending = ending
            call.ended_ns = self.clock.now_ns + spent_ns
            self.calls_in_flight -= 1
        return spent_ns

    def _fit(self, node: Node, loadable: Loadable) -> Callable[[VirtualCall], Any]:
        """Note of a step on a way how it is carried out."""
        node.tag = EndingTag(node, loadable)
        if node.step is not None:
            carry_out, node.is_exact = self._carry_outs[type(node.step)]
        else:
            assert not node.held.size_bytes
            carry_out, node.is_exact = self._end if node.freed is None else self._free_and_end, True
        node.carry_out = carry_out
        node.is_end = node.step is None and node.freed is None
        return carry_out

    def _resume(self, call: VirtualCall, answer: Any, delay_ns: int = 0) -> None:
        """Have a call that slept go on with an answer."""
        if call._wait in ("gate", "list", "owner"):
            self._note_wait(call, delay_ns)
        call._wait = ""
        call._answer = answer
        assert call._task is not None
        self.cpus.enter(call._task, delay_ns)

    def _sleep(self, call: VirtualCall, what: str) -> _Later:
        call._wait = what
        call._slept_ns = self.clock.now_ns
        return _ASLEEP

    def _free_and_end(self, call: VirtualCall) -> Any:
        self._free_now(call)
        return self._once_paid(call, self._end)

    def _end(self, call: VirtualCall) -> Any:
        """End a call, once all that it took has passed."""
        ending = call._node.ending
        assert ending is not None
        if call.restarts and ending.check == "signal":
            call._earlier_peak_bytes = call.peak_held_bytes
            call._node = call.loadable.first
            return None
        call.ending = ending
        call.ended_ns = self.clock.now_ns
        self.calls_in_flight -= 1
        if call.on_end is not None:
            call.on_end(call)
        if self.record is not None:
            self.record(call)
        return _OWING

    def _interrupt(self, call: VirtualCall) -> None:
        if call._wait == "gate":
            if self.gate.interrupt(call):
                self._resume(call, _INTERRUPTED)
        elif call._wait == "list":
            if self._queue.discard(call):
                call._then = None
                self._resume(call, _INTERRUPTED)
            else:
                # Woken already: it ends should it have to sleep again.
                call._is_signalled = True
        elif call._wait == "owner":
            self._give_up(call, self.links.awaited_by(call))

    # --- steps of the list and the gate ---

    def _enter_gate(self, call: VirtualCall) -> Any:
        answer = self.gate.enter(call.spec.inode, call)
        return self._sleep(call, "gate") if answer is None else answer

    def _lock_list(self, call: VirtualCall) -> None:
        """Have a call take the list's mutex, and owe what waiting for it and holding it takes.

        What it does under the mutex it does at once, not when its turn comes: turns come in the order in which the
        calls come, so each of them finds what it would find then.
        """
        hold_ns = self._list_ns
        if hold_ns:
            # As list_lock.take would, but without a call.
            lock, now_ns = self.list_lock, self.clock.now_ns
            free_at_ns = lock.free_at_ns
            if free_at_ns <= now_ns:
                lock.free_at_ns = now_ns + hold_ns
                call._owed_ns += hold_ns
            else:
                lock.free_at_ns = free_at_ns + hold_ns
                lock.waited_ns += free_at_ns - now_ns
                call._owed_ns += hold_ns + free_at_ns - now_ns

    def _time_looks(self) -> None:
        """Note for how long a look holds the mutex, now that the list has another length."""
        costs = self.costs
        self._list_ns = costs.list_lock_ns + int(costs.list_lock_ns_per_module * len(self.modules))

    def _check_name(self, call: VirtualCall) -> Any:
        self._lock_list(call)
        answer = self.modules.look(call.loadable.module)
        return self._sleep_for_name(call) if answer is None else answer

    def _reserve_name(self, call: VirtualCall) -> Any:
        self._lock_list(call)
        module = call.loadable.module
        answer = self.modules.look(module)
        if answer is None:
            return self._sleep_for_name(call)
        if answer is PROCEED:
            self.modules.reserve(module, call)
            self._time_looks()
        return answer

    def _sleep_for_name(self, call: VirtualCall) -> _Later:
        self._queue.add(call)
        call._then = self._look_again
        call._wait = "list"
        call._slept_ns = self.clock.now_ns
        return _ASLEEP

    def _look_again(self, call: VirtualCall) -> Any:
        self._lock_list(call)
        answer = self.modules.look_again(call.loadable.module)
        if answer is None:
            if not call._is_signalled:
                self._queue.add(call)
                call._then = self._look_again
                return _ASLEEP
            answer = _INTERRUPTED
        self._note_wait(call, 0)
        return answer

    def _note_wait(self, call: VirtualCall, delay_ns: int) -> None:
        """Note that a wait for another call ends in so many ns."""
        call._wait = ""
        call._waits += 1
        call.wait_ns += self.clock.now_ns + delay_ns - call._slept_ns

    # --- steps with files and memory ---

    def _within_limits(self, carry_out: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        """Carry a step out if there is room for what it allocates."""
        step = call._node.step
        assert self.memory is not None
        assert step is not None
        failure = self.memory.before(call, step)
        if failure is None:
            return carry_out(call)
        call._owed_ns += self.costs.syscall_ns
        return failure

    def _inspect(self, call: VirtualCall) -> Any:
        call._owed_ns += call.loadable.inspect_ns
        return call.loadable.inspected

    def _free_now(self, call: VirtualCall) -> None:
        freed = call._node.freed
        if freed is not None:
            self.areas.free(call, freed)

    def _read(self, call: VirtualCall) -> Any:
        """Read a file; wait for the disk where no call has read it before, or for the call that reads it now."""
        failure = self.areas.read(call)
        loadable, now_ns = call.loadable, self.clock.now_ns
        if failure is not None or not self.page_cache.is_cold or not loadable.is_finit:
            return failure
        cached_at_ns = self.page_cache.cached_at_ns(call.file, loadable.plan.version.size_bytes, now_ns)
        if cached_at_ns <= now_ns:
            return None
        self.clock.at(cached_at_ns, partial(self._resume, call, None))
        return self._sleep(call, "disk")

    # --- steps with others ---

    def _link(self, call: VirtualCall) -> Any:
        """Spend what linking takes, and then link: what the others see of it is one moment, at its end."""
        call._owed_ns += call.loadable.link_ns
        return self._once_paid(call, self._link_now)

    @staticmethod
    def _once_paid(call: VirtualCall, then: Callable[[VirtualCall], Any]) -> Any:
        """Do something once the time that a call owes has passed."""
        if not call._owed_ns:
            return then(call)
        call._then = then
        return _OWING

    def _link_now(self, call: VirtualCall) -> Any:
        loadable = call.loadable
        linkage = loadable.plan.linkage
        assert linkage is not None
        failure = linkage.failure_before_symbols(self.links.percpu_bytes)
        if failure:
            return failure
        resolution = linkage.resolve(self, call._given_up)
        owner = resolution.awaits
        if owner:
            call._then = self._link_now
            self.links.wait(owner, call)
            patience_ns = OWNER_PATIENCE_SECONDS * 10**9
            self.clock.at(self.clock.now_ns + patience_ns, partial(self._lose_patience, call, owner, call._waits))
            return self._sleep(call, "owner")
        failure = resolution.failure or linkage.failure_after_symbols(call.spec, self)
        if failure:
            return failure
        self.links.form(loadable.module, linkage.formation(resolution))
        self.modules.come(loadable.module)
        return None

    def _lose_patience(self, call: VirtualCall, owner: str, wait: int) -> None:
        """End a wait for the owner of a symbol, if it is still the one that was meant."""
        if call._wait == "owner" and call._waits == wait:
            self._give_up(call, owner)

    def _give_up(self, call: VirtualCall, owner: str) -> None:
        self.links.interrupt(call)
        call._given_up |= {owner}
        self._resume(call, None)

    def _init(self, call: VirtualCall) -> Any:
        if call._node.freed is not None:
            self.areas.free(call, call._node.freed)
        name = call.loadable.module
        result = self._init_results.of(name, arguments(call.spec.parameters), self._is_live, lambda: self.dice)
        answer = Failure(result.errno, "init") if result.errno else None
        if result.duration_ns:
            # Measured from outside: it may well have slept most of the time.
            self.clock.at(self.clock.now_ns + result.duration_ns, partial(self._resume, call, answer))
            return self._sleep(call, "init")
        call._owed_ns += draw(self.costs.init_duration(name), self.dice)
        return answer

    def _begin_probes(self, module: str) -> None:
        """Begin what the init function of a module leaves to be done by others."""
        left = self.costs.async_probe.get(module)
        if left is not None:
            self._probed_at_ns = max(self._probed_at_ns, self.clock.now_ns + draw(left, self.dice))

    def _synchronize(self, then: Callable[[VirtualCall], Any], call: VirtualCall) -> Any:
        """Wait until nothing is left to be done asynchronously, by whomever it was begun."""
        if self._probed_at_ns <= self.clock.now_ns:
            return then(call)
        call._then = partial(self._synchronize, then)
        assert call._task is not None
        self.clock.at(self._probed_at_ns, partial(self.cpus.enter, call._task))
        return _ASLEEP

    def _is_live(self, name: str) -> bool:
        found = self.modules.get(name)
        return found is not None and found.state is State.LIVE

    # --- the end ---

    def _finish(self, call: VirtualCall) -> Any:
        freed = call._node.freed
        if freed is not None:
            self.areas.free(call, freed)
        return self._finish_freed(call)

    def _finish_freed(self, call: VirtualCall) -> Any:
        if call._node.tag.is_reserved:
            return self._once_paid(call, self._begin_end)
        # Nobody sees when it is counted; the gate opens when all that the call takes has passed.
        self.counts.add(call)
        return self._once_paid(call, self._open_gate) if call.loadable.is_gated else None

    def _begin_end(self, call: VirtualCall) -> Any:
        """End a load: from here on who looks finds the module live or gone, though nobody is woken yet."""
        self._lock_list(call)
        loadable = call.loadable
        if call._node.tag.ending.outcome is Outcome.LIVE:
            self.modules.live(loadable.module, loadable.core_bytes)
            if self.on_live is not None:
                self.on_live(loadable.module)
            call._owed_ns += loadable.tail_ns
            if self.costs.async_probe:
                self._begin_probes(loadable.module)
                return self._once_paid(call, partial(self._synchronize, self._wake_others))
        else:
            self.links.drop(loadable.module)
            self.modules.remove(loadable.module)
            self._time_looks()
        return self._once_paid(call, self._wake_others)

    def _wake_others(self, call: VirtualCall) -> Any:
        self.counts.add(call)
        call._owed_ns += self._queue.wake()
        delay_ns = self.costs.wake_latency_ns
        for waiting in self.links.wake(call.loadable.module):
            delay_ns += self.costs.wake_ns
            self._resume(waiting, None, delay_ns)
        return self._open_gate(call)

    def _open_gate(self, call: VirtualCall) -> None:
        delay_ns = self.costs.wake_latency_ns
        for waiting, answer in self.gate.leave(call, call._node.tag.ending.errno):
            delay_ns += self.costs.wake_ns
            self._resume(waiting, answer, delay_ns)

    # --- what is counted ---

    @property
    def counters(self) -> Counters:
        """What the kernel has counted so far."""
        return self.counts.counters

    @property
    def failed_modules(self) -> list[FailedModule]:
        """The names that were duplicates at least once, newest first."""
        return self.counts.failed_modules

    def reset_counters(self) -> None:
        """Begin to count anew: calls and peaks. Modules stay, and so do the names that were duplicates."""
        self.counts.reset()
        self.areas.reset_peaks()
