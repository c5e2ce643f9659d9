"""Storms in virtual time: the loop of ``loader_svc.storm``, on a simulated machine with any number of CPUs.

Mode repeat is the loop of stress-ng's module stressor: load; after a success count an operation and unload; after a
failure try again at once. A worker whose load fails for another reason than a duplicate ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from loader_svc.image import Algorithm
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from loader_svc.trees import ModuleTree
from loader_svc.virtual.call import Record, VirtualCall
from loader_svc.virtual.costs import Costs, default_costs
from loader_svc.virtual.counted import CountedOrder
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES, VirtualFile, VirtualMachine
from loader_svc.virtual.process import Body, Process
from modpressure.errors import BadRequest
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.identity import ANY, KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall
from modpressure.kernel.policy import DEFAULT_POLICY, Policy

MAX_WORKERS: Final = 100_000
MAX_CPUS: Final = 65_536

PASSING_ERRNOS: Final = frozenset({"", "EEXIST", "EBUSY", "EINTR"})
"""What a worker gets past: these depend on what other calls do at the moment."""

KMOD_WITH_KERNEL_DECOMPRESSION: Final = 34
"""The first libkmod here that hands packed files to the kernel."""

ALGORITHMS: Final[dict[str, Algorithm]] = {"gz": "gzip", "xz": "xz", "zst": "zstd"}


@dataclass(frozen=True, slots=True)
class VirtualStorm:
    """A storm to simulate; fields as those of ``modpressure.v1.Storm``, times in seconds."""

    modules: tuple[str, ...]
    workers: int = 100
    cpus: int = 8
    once: bool = False
    keep_loaded: bool = False
    operations: int = 1
    """Times that each worker goes through the modules, mode repeat; 0 for as many as there is time for."""

    seconds: float | None = None
    """Virtual time after which the workers stop."""

    policy: Policy = DEFAULT_POLICY
    kmod: int = 30
    separate_copies: bool = False
    with_dependencies: bool = True
    costs: Costs = field(default_factory=default_costs)
    identity: KernelIdentity = ANY

    def __post_init__(self) -> None:
        """Check what makes no sense or would never end. BadRequest."""
        if not self.modules:
            raise BadRequest("a storm needs at least one module", field="modules")
        for name, value, most in (("workers", self.workers, MAX_WORKERS), ("cpus", self.cpus, MAX_CPUS)):
            if not 1 <= value <= most:
                raise BadRequest(f"{name} {value} is not between 1 and {most}", field=name)
        if self.operations < 0:
            raise BadRequest(f"operations {self.operations} is less than 0", field="operations")
        if self.seconds is not None and not self.seconds > 0:
            raise BadRequest(f"seconds {self.seconds} is not more than 0", field="seconds")
        if not self.once and self.seconds is None and (not self.operations or self.keep_loaded):
            raise BadRequest(
                "a storm without operations or seconds, or that unloads nothing, never ends", field="seconds"
            )


@dataclass(frozen=True, slots=True)
class VirtualStormResult:
    """What a storm came to. Times are simulated ns, sizes bytes."""

    seed: int
    counters: Counters
    failed_modules: tuple[FailedModule, ...]
    outcomes: dict[tuple[Outcome, str], int]
    """How many calls had which outcome and errno, in the order of both."""

    operations: int
    duration_ns: int
    """From the start to the end of the last worker."""

    peak_held_bytes: int
    peak_copy_bytes: int


def simulate_storm(
    storm: VirtualStorm,
    tree: ModuleTree,
    seed: int,
    *,
    record: Record | None = None,
    files: Callable[[str], VirtualFile | None] | None = None,
) -> VirtualStormResult:
    """Carry a storm out in virtual time and return what it came to; the same storm and seed give the same result.

    ``record`` is told each call of the workers that has ended. ``files`` has other files for the tree's modules by
    name, longer ones, say; None, as a whole or for a module, means the tree's. NotFound for a module that is not in
    the tree; BadRequest where what one depends on can't be loaded.
    """
    return StormRun(storm, tree, seed, files).run(record)


class StormRun:
    """One storm on its way."""

    def __init__(
        self,
        storm: VirtualStorm,
        tree: ModuleTree,
        seed: int,
        other_files: Callable[[str], VirtualFile | None] | None = None,
    ) -> None:
        self._storm = storm
        self._tree = tree
        self._seed = seed
        self.machine = VirtualMachine(
            storm.identity,
            plans=Plans(IMAGE_LIMIT_BYTES, storm.identity),
            cpus=storm.cpus,
            costs=storm.costs,
            seed=seed,
        )
        self._files: dict[str, VirtualFile] = {}
        self._asked: dict[str, tuple[CallSpec, VirtualFile]] = {}
        self._other_files = other_files
        self._outcomes: Counter[tuple[Outcome, str]] = Counter()
        self._operations = 0
        self._stop_ns: int | None = None
        self._ended_ns = 0

    def run(self, record: Record | None) -> VirtualStormResult:
        """Prepare, start all workers together, and sum up."""
        storm, machine = self._storm, self.machine
        if storm.with_dependencies:
            for module in storm.modules:
                self._load_dependencies(module)
        machine.reset_counters()
        held_bytes, begun_ns = machine.areas.held_bytes, machine.clock.now_ns
        if storm.seconds is not None:
            self._stop_ns = begun_ns + int(storm.seconds * 1e9)
        order = CountedOrder(record, machine.counts.calls) if record else None
        if order is not None:
            machine.record = lambda call: order.add(call.number, call)
        delay_ns = 0
        for number in range(storm.workers):
            delay_ns += storm.costs.wake_ns
            Process(machine, self._work(number), delay_ns)
        machine.run()
        if order is not None:
            order.finish()
        return VirtualStormResult(
            self._seed,
            machine.counters,
            tuple(machine.failed_modules),
            dict(sorted(self._outcomes.items())),
            self._operations,
            self._ended_ns - begun_ns,
            machine.areas.peak_bytes - held_bytes,
            machine.areas.peak_copy_bytes,
        )

    def _load_dependencies(self, module: str) -> None:
        for step in self._tree.load_order(module):
            if step.kind != "insmod" or step.module in self._storm.modules or self.machine.modules.get(step.module):
                continue
            ending = self.machine.call(VirtualCall(*self._ask(step.module, 0)))
            if ending.errno not in ("", "EEXIST") and step.required:
                raise BadRequest(
                    f"{step.module}, which {module} needs, can't be loaded: {ending.errno} ({ending.check})"
                )

    def _ask(self, module: str, copy: int) -> tuple[CallSpec, VirtualFile]:
        """Return what libkmod asks of the kernel for a module, and the file."""
        storm, entry = self._storm, self._tree.module(module)
        algorithm = ALGORITHMS.get(entry.compression)
        syscall, flags = Syscall.FINIT_MODULE, 0
        if algorithm is not None:
            if storm.kmod >= KMOD_WITH_KERNEL_DECOMPRESSION and algorithm in storm.identity.decompressors:
                flags = MODULE_INIT_COMPRESSED_FILE
            else:
                syscall = Syscall.INIT_MODULE
        file = self._files.get(entry.name)
        if file is None:
            file = self._other_files(entry.name) if self._other_files is not None else None
            if file is None:
                file = VirtualFile(entry.path, partial(self._tree.open_file, entry.name), algorithm)
            self._files[entry.name] = file
        return CallSpec(entry.name, f"{entry.path}:{copy}", storm.policy, syscall, flags), file

    # --- one worker ---

    def _work(self, number: int) -> Body:
        """Do what one worker does, to its end."""
        storm = self._storm
        worker = f"worker-{number}"
        copy = number + 1 if storm.separate_copies else 0
        done = 0
        while not self._is_over():
            for module in storm.modules:
                if self._is_over() or not (yield from self._load_and_unload(module, worker, copy)):
                    return
            done += 1
            if storm.once or (storm.operations and done >= storm.operations):
                return

    def _is_over(self) -> bool:
        return self._stop_ns is not None and self.machine.clock.now_ns >= self._stop_ns

    def _load_and_unload(self, module: str, worker: str, copy: int) -> Generator[Any, Any, bool]:
        """Load until it succeeds (mode once: once), then unload; return whether the worker is to go on."""
        storm, machine = self._storm, self.machine
        asked = self._asked.get(module)
        if asked is None:
            asked = self._ask(module, copy)
            # What all workers share is kept; what each has for itself would be as much as workers times modules.
            if not copy:
                self._asked[module] = asked
        spec, file = asked
        while True:
            ending = yield VirtualCall(spec, file, worker=worker)
            self._outcomes[ending.outcome, ending.errno] += 1
            self._ended_ns = machine.clock.now_ns
            if storm.once:
                return True
            if not ending.errno:
                self._operations += 1
                if not storm.keep_loaded and not machine.begin_removal(ending.module):
                    yield machine.vary(storm.costs.remove_ns)
                    machine.end_removal(ending.module)
                    self._ended_ns = machine.clock.now_ns
                return True
            if ending.errno not in PASSING_ERRNOS or self._is_over():
                return False
            # Going round takes time, if next to none: else who tries again at once would never let time pass.
            yield 1
