"""The local driver: one simulated machine in one process, its calls carried through the one pipeline in virtual time.

Files are read and planned for real; memory is only counted, and time passes only where the init functions or the given
costs say so. The same calls in the same order come to the same end, always.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from loader_svc.checks import caller as entry
from loader_svc.checks.exports import Exporter, as_exported
from loader_svc.checks.linkage import OWNER_PATIENCE_SECONDS
from loader_svc.checks.parameters import arguments
from loader_svc.clock import DEFAULT_SLICE_NS, Clock, Cpus
from loader_svc.image import Algorithm, algorithm_of
from loader_svc.init_results import InitResults
from loader_svc.memory import page_round
from loader_svc.pipeline import Pipeline, load_module
from loader_svc.plan import Plan, Plans
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
    Inspected,
    Link,
    Read,
    ReserveName,
    Step,
    Unpack,
)
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.gate import Gate
from modpressure.kernel.identity import ANY, ExportedSymbol, KernelIdentity
from modpressure.kernel.modules_list import Answer, ModulesList, State, Verdict
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall

IMAGE_LIMIT_BYTES: Final = 1 << 30
MEMORY_BYTES: Final = 64 << 30
"""Memory of the simulated machine, as far as a single absurd allocation goes."""

_INTERRUPTED: Final = Answer(Verdict.INTERRUPTED, "EINTR", waited=True)


class _Later:
    """Stands for an answer that comes when a wait has ended."""


_LATER: Final = _Later()

Cost = Callable[[Step, "LocalCall"], int]
"""How long a step keeps a CPU busy, in ns."""


def no_cost(step: Step, call: LocalCall) -> int:
    """Let a step take no time."""
    return 0


@dataclass(slots=True, eq=False)
class LocalCall:
    """One call, from its beginning to its end."""

    spec: CallSpec
    path: str
    open: Callable[[], int]
    """Returns a new descriptor, which the machine closes."""

    restarts: bool = False
    """Whether a signal has the system call begin anew (SA_RESTART) where the kernel leaves that open."""

    on_end: Callable[[LocalCall], None] | None = None
    begun_ns: int = 0
    ended_ns: int = 0
    ending: Ending | None = None
    """What became of it; None until then."""

    plan: Plan | None = None
    algorithm: Algorithm | None = None
    held_bytes: int = 0
    _pipeline: Pipeline | None = None
    _answer: Any = None
    _wait: str = ""
    """What it waits for: ``gate``, ``list``, ``owner``, or nothing."""
    _linking: Link | None = None
    _given_up: frozenset[str] = frozenset()
    _waits: int = 0
    _image_held: dict[str, int] = field(default_factory=dict)

    @property
    def planned(self) -> Plan:
        """Its plan, which it has from its admission on."""
        assert self.plan is not None
        return self.plan


@dataclass(slots=True)
class _Loaded:
    """A module in the list that is formed."""

    plan: Plan
    is_proprietary: bool
    uses: tuple[str, ...]
    users: set[str] = field(default_factory=set)


class LocalMachine:
    """A machine that modules are loaded into."""

    def __init__(
        self,
        identity: KernelIdentity = ANY,
        *,
        init_results: InitResults | None = None,
        plans: Plans | None = None,
        cpus: int | None = None,
        slice_ns: int = DEFAULT_SLICE_NS,
        cost: Cost = no_cost,
    ) -> None:
        """``plans`` may be shared with other machines of the same identity; ``cpus`` None means as many as needed.

        ``slice_ns`` is how long a CPU stays with one call while others want it.
        """
        self.identity = identity
        self.clock = Clock()
        self.counters = Counters()
        self.modules: ModulesList[LocalCall] = ModulesList()
        self.gate: Gate[LocalCall] = Gate()
        self.held_bytes = 0
        self.peak_bytes = 0
        self._failed: dict[str, FailedModule] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._exports: dict[str, tuple[str, ExportedSymbol]] = {}
        self._owner_waits: dict[str, list[LocalCall]] = {}
        self._init_results = init_results or InitResults()
        self._plans = plans or Plans(IMAGE_LIMIT_BYTES, identity)
        self._cpus = Cpus(self.clock, cpus, slice_ns)
        self._cost = cost

    # --- what can be asked of it ---

    def begin(self, call: LocalCall, at_ns: int | None = None) -> LocalCall:
        """Have a call begin, now or at a time; ``run`` carries it on."""
        self.clock.at(self.clock.now_ns if at_ns is None else at_ns, partial(self._begin, call))
        return call

    def call(self, call: LocalCall) -> Ending:
        """Make one call and carry everything on until nothing is left to do; return what became of the call."""
        self.begin(call)
        self.run()
        assert call.ending is not None, "a call on its own waits for nobody"
        return call.ending

    def run(self) -> None:
        """Carry every call on to its end."""
        self.clock.run()

    def interrupt(self, call: LocalCall, at_ns: int) -> None:
        """Send whoever makes a call a signal at a time; nothing happens if the call does not wait then."""
        self.clock.at(at_ns, partial(self._interrupt, call))

    def remove(self, name: str, *, forced: bool = False) -> str:
        """Unload a module as delete_module does; return the errno, empty for success."""
        if not self.identity.module_unload:
            return "ENOSYS"
        loaded = self._loaded.get(name)
        if loaded is not None and loaded.users:
            return "EWOULDBLOCK"
        answer = self.modules.unload(name)
        if answer.verdict is not Verdict.PROCEED:
            return answer.errno
        assert loaded is not None
        assert loaded.plan.linkage is not None
        if not loaded.plan.linkage.can_be_unloaded and not forced:
            return "EBUSY"
        assert loaded.plan.layout is not None
        self._hold(-loaded.plan.layout.core_bytes)
        self._drop(name)
        self._wake(self.modules.remove(name))
        self.counters.unloads += 1
        return ""

    @property
    def failed_modules(self) -> list[FailedModule]:
        """The names that were duplicates at least once, newest first."""
        return list(reversed(self._failed.values()))

    def find(self, name: str) -> Exporter | None:
        """Return which module in the list exports a symbol, or None: this machine's Exporters."""
        found = self._exports.get(name)
        if found is None:
            return None
        owner, symbol = found
        entry = self.modules.get(owner)
        assert entry is not None
        return Exporter(symbol, owner, entry.state is State.COMING, self._loaded[owner].is_proprietary)

    # --- carrying calls on ---

    def _begin(self, call: LocalCall) -> None:
        call.begun_ns = self.clock.now_ns
        self._start(call)

    def _start(self, call: LocalCall) -> None:
        call._pipeline, call._answer = load_module(call.spec), None
        self._cpus.enter(partial(self._advance, call))

    def _advance(self, call: LocalCall) -> int | None:
        """Take a call through its next steps, until one takes time (return how much, in ns) or has to wait (None)."""
        assert call._pipeline is not None
        while True:
            if call._linking is not None:
                step: Step = call._linking
            else:
                try:
                    step = call._pipeline.send(call._answer)
                except StopIteration as end:
                    self._end(call, end.value)
                    return None
            call._answer = self._carry_out(call, step)
            if call._answer is _LATER:
                return None
            cost_ns = self._cost(step, call)
            if cost_ns:
                return cost_ns

    def _resume(self, call: LocalCall, answer: Any) -> None:
        call._wait = ""
        call._waits += 1
        call._answer = answer
        self._cpus.enter(partial(self._advance, call))

    def _wake(self, woken: list[tuple[LocalCall, Answer]]) -> None:
        for call, answer in woken:
            self._resume(call, answer)

    def _end(self, call: LocalCall, ending: Ending) -> None:
        assert not call.held_bytes or ending.outcome is Outcome.LIVE
        call._pipeline = None
        call.held_bytes = 0
        if ending.check == "signal" and call.restarts:
            self._start(call)
            return
        call.ending = ending
        call.ended_ns = self.clock.now_ns
        if call.on_end is not None:
            call.on_end(call)

    def _interrupt(self, call: LocalCall) -> None:
        entered = self.gate if call._wait == "gate" else self.modules
        if call._wait in ("gate", "list") and entered.interrupt(call):
            self._resume(call, _INTERRUPTED)
        elif call._wait.startswith("owner "):
            self._give_up(call, call._waits)

    # --- steps ---

    def _carry_out(self, call: LocalCall, step: Step) -> Any:
        match step:
            case EnterGate(inode):
                return self._or_wait(call, "gate", self.gate.enter(inode, call))
            case CheckName(module):
                return self._or_wait(call, "list", self.modules.check(module, call))
            case ReserveName(module):
                return self._or_wait(call, "list", self.modules.reserve(module, call))
            case Admit():
                self._admit(call)
            case Unpack():
                return call.planned.failure_at("decompress")
            case Read():
                return self._read(call)
            case Decompress():
                return self._decompress(call)
            case Inspect():
                return call.planned.failure_at("check") or Inspected(call.planned.module)
            case Allocate():
                return self._allocate(call)
            case Link():
                return self._link(call, step)
            case Init():
                return self._init(call)
            case Free(what):
                self._free(call, what)
            case Finish(ending):
                self._finish(call, ending)
        return None

    @staticmethod
    def _or_wait(call: LocalCall, what: str, answer: Answer | None) -> Any:
        if answer is None:
            call._wait = what
            return _LATER
        return answer

    def _admit(self, call: LocalCall) -> None:
        spec = call.spec
        by_kernel = spec.syscall is Syscall.FINIT_MODULE
        descriptor = call.open()
        try:
            if spec.flags & MODULE_INIT_COMPRESSED_FILE:
                packed = algorithm_of(call.path, _head(descriptor))
                call.algorithm = self.identity.decompressor_for(packed)  # type: ignore[assignment]
            call.plan = self._plans.of(descriptor, call.path, call.algorithm, by_kernel=by_kernel, flags=spec.flags)
        finally:
            os.close(descriptor)

    def _read(self, call: LocalCall) -> Failure | None:
        size_bytes = call.planned.version.size_bytes
        if call.spec.syscall is Syscall.INIT_MODULE:
            failure = entry.copy_failure(call.spec, _length_bytes(call), MEMORY_BYTES)
            size_bytes = _length_bytes(call)
        else:
            failure = entry.read_failure(call.spec, call.planned.failure_at("read"))
        if failure is None:
            self._hold_as(call, "image", page_round(size_bytes))
        return failure

    def _decompress(self, call: LocalCall) -> Failure | None:
        if call.algorithm is None:
            return Failure("EOPNOTSUPP", "decompress: support")
        failure = call.planned.failure_at("decompress")
        if failure is None:
            self._hold_as(call, "unpacked", page_round(call.planned.unpacked_bytes))
            self._hold_as(call, "image", 0)
        return failure

    def _allocate(self, call: LocalCall) -> Failure | None:
        layout = call.planned.layout
        if layout is None:
            return call.planned.failure_at("layout")
        self._hold_as(call, "core", layout.core_bytes)
        self._hold_as(call, "init", layout.init_bytes)
        return None

    def _link(self, call: LocalCall, step: Link) -> Any:
        linkage = call.planned.linkage
        assert linkage is not None
        call._linking = None
        taken_bytes = sum(loaded.plan.linkage.percpu_bytes for loaded in self._loaded.values() if loaded.plan.linkage)
        failure = linkage.failure_before_symbols(taken_bytes)
        if failure:
            return failure
        resolution = linkage.resolve(self, call._given_up)
        if resolution.awaits:
            call._linking = step
            call._wait = f"owner {resolution.awaits}"
            self._owner_waits.setdefault(resolution.awaits, []).append(call)
            patience_ns = OWNER_PATIENCE_SECONDS * 10**9
            self.clock.at(self.clock.now_ns + patience_ns, partial(self._give_up, call, call._waits))
            return _LATER
        failure = resolution.failure or linkage.failure_after_symbols(call.spec, self)
        if failure:
            return failure
        name = call.planned.module
        self._loaded[name] = _Loaded(call.planned, resolution.is_proprietary, resolution.uses)
        for owner in resolution.uses:
            self._loaded[owner].users.add(name)
        for export in linkage.exports:
            self._exports[export.name] = (name, as_exported(export))
        self.modules.come(name)
        return None

    def _give_up(self, call: LocalCall, wait: int) -> None:
        """End a wait for the owner of a symbol, if it is still the one that was meant."""
        if call._waits == wait and call._wait.startswith("owner "):
            owner = call._wait.removeprefix("owner ")
            self._owner_waits[owner].remove(call)
            call._given_up |= {owner}
            self._resume(call, None)

    def _init(self, call: LocalCall) -> Any:
        name = call.planned.module
        result = self._init_results.of(name, arguments(call.spec.parameters), self._is_live)
        answer = Failure(result.errno, "init") if result.errno else None
        if not result.duration_ns:
            return answer
        self.clock.at(self.clock.now_ns + result.duration_ns, partial(self._resume, call, answer))
        return _LATER

    def _is_live(self, name: str) -> bool:
        entry = self.modules.get(name)
        return entry is not None and entry.state is State.LIVE

    # --- memory ---

    def _hold(self, size_bytes: int) -> None:
        self.held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _hold_as(self, call: LocalCall, what: str, size_bytes: int) -> None:
        change = size_bytes - call._image_held.pop(what, 0)
        if size_bytes:
            call._image_held[what] = size_bytes
        call.held_bytes += change
        self._hold(change)

    def _free(self, call: LocalCall, what: str) -> None:
        parts = {"image": ("image", "unpacked"), "init": ("init",), "all": ("image", "unpacked", "core", "init")}
        for part in parts[what]:
            self._hold_as(call, part, 0)

    # --- the end ---

    def _finish(self, call: LocalCall, ending: Ending) -> None:
        self._count(call, ending)
        if ending.outcome is Outcome.LIVE:
            assert call.planned.layout is not None
            # From here on it is the module's memory and no longer the call's.
            call._image_held.pop("core", None)
            self._wake(self.modules.live(ending.module, call.planned.layout.core_bytes))
        elif ending.reserved:
            self._drop(ending.module)
            self._wake(self.modules.remove(ending.module))
        if ending.reserved:
            for waiting in self._owner_waits.pop(ending.module, []):
                self._resume(waiting, None)
        self._wake(self.gate.leave(call, ending.errno))

    def _drop(self, name: str) -> None:
        """Forget what a module exports and uses."""
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            return
        for owner in loaded.uses:
            self._loaded[owner].users.discard(name)
        for symbol in [symbol for symbol, (owner, _) in self._exports.items() if owner == name]:
            del self._exports[symbol]

    def _count(self, call: LocalCall, ending: Ending) -> None:
        plan, layout = call.plan, call.plan.layout if call.plan else None
        image_bytes = plan.image_bytes if plan else 0
        if ending.outcome is Outcome.KREAD:
            image_bytes = _length_bytes(call)
        compressed = plan is not None and call.spec.flags & MODULE_INIT_COMPRESSED_FILE
        wasted_bytes = self.counters.add_call(
            ending.outcome,
            syscall=call.spec.syscall,
            duplicate=ending.duplicate,
            image_bytes=image_bytes,
            compressed_bytes=plan.version.size_bytes if plan and compressed else 0,
            mod_bytes=layout.total_bytes if layout else 0,
            text_bytes=layout.text_bytes if layout else 0,
        )
        if ending.duplicate:
            failed = self._failed.setdefault(ending.module, FailedModule(ending.module))
            failed.becoming_count += ending.outcome is Outcome.BECOMING
            failed.load_count += ending.outcome is Outcome.LOAD
            failed.wasted_bytes += wasted_bytes


def _head(descriptor: int) -> bytes:
    """Return what a file begins with, nothing of what is none."""
    with suppress(OSError):
        return os.pread(descriptor, 6, 0)
    return b""


def _length_bytes(call: LocalCall) -> int:
    """Return the length that init_module is told."""
    told = call.spec.caller.length_bytes
    return call.planned.unpacked_bytes if told is None else told
