"""How many workers a machine of finite memory bears: storms of more and more of them, until a call finds no room.

Each storm is a machine of its own in virtual time, on which the module's dependencies are loaded first; then all
workers load the module once, together. Which call comes first is chance, so the number is one for each seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from loader_svc.boot import TreeSource
from loader_svc.boot.files import ALGORITHMS, BootFile, opened
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec, Ending
from loader_svc.virtual.costs import Costs, default_costs
from loader_svc.virtual.finite_memory import Refusal
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES, VirtualCall, VirtualMachine
from modpressure.errors import BadRequest, OverLimit
from modpressure.kernel.identity import ANY, KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall
from modpressure.kernel.policy import Policy
from modpressure.kernel.system_memory import Amounts

KMOD_WITH_KERNEL_DECOMPRESSION = 34


@dataclass(frozen=True, slots=True)
class LimitSpec:
    """What is asked: a module, who loads it, and what the machine has."""

    module: str
    """Name or alias of one module."""

    limits: Amounts
    workers: int
    """The most that are tried."""

    policy: Policy
    tree: TreeSource = field(default_factory=TreeSource)
    packing: str | None = None
    """How the files are packed: a suffix such as ``zst``, empty for plain, None for as in the tree."""

    kmod: int = 30
    cpus: int | None = None
    """None for one for each worker."""

    separate_copies: bool = False
    """Whether each worker has a file, an inode, of its own."""

    costs: Costs = field(default_factory=default_costs)
    identity: KernelIdentity = ANY


@dataclass(frozen=True, slots=True)
class StormEnd:
    """What a storm of so many workers came to."""

    workers: int
    errnos: Counter[str]
    refusal: Refusal | None
    """The first call that found no room."""

    peak: Amounts


@dataclass(frozen=True, slots=True)
class Trial:
    """What one seed says."""

    seed: int
    full: StormEnd
    """The storm of all workers."""

    first: StormEnd | None
    """The storm that fails, while that of one worker less does not; None if that of all workers bears it."""


class LimitSearch:
    """Runs storms of one spec."""

    def __init__(self, spec: LimitSpec) -> None:
        """Open the tree and find the module. TreeError, NotFound, BadRequest."""
        self._spec = spec
        self._tree = opened(spec.tree)
        names = self._tree.resolve_alias(spec.module)
        if len(names) != 1:
            raise BadRequest(f"{spec.module!r} stands for {len(names)} modules; name one", field="module")
        [self._module] = names
        steps = [step.module for step in self._tree.load_order(self._module) if step.kind == "insmod"]
        self._needed = [name for name in steps if name != self._module]
        self._plans = Plans(IMAGE_LIMIT_BYTES, spec.identity)
        self._files: dict[str, BootFile] = {}

    def trial(self, seed: int, on_storm: Callable[[int], None] = lambda workers: None) -> Trial:
        """Find where one seed fails first; ``on_storm`` is called with the workers of each storm before it is run.

        OverLimit if there is not even room for what the module needs, BadRequest if it can't be loaded at all.
        """

        def storm(workers: int) -> StormEnd:
            on_storm(workers)
            return self._storm(workers, seed)

        full = storm(self._spec.workers)
        if full.refusal is None:
            if not full.errnos[""]:
                raise BadRequest(f"{self._module} can't be loaded at all: {', '.join(full.errnos)}", field="module")
            return Trial(seed, full, None)
        # A storm of no workers bears it.
        bears, fails = 0, full
        while fails.workers - bears > 1:
            tried = storm((bears + fails.workers) // 2)
            if tried.refusal is None:
                bears = tried.workers
            else:
                fails = tried
        return Trial(seed, full, fails)

    def _storm(self, workers: int, seed: int) -> StormEnd:
        spec = self._spec
        machine = VirtualMachine(
            spec.identity,
            plans=self._plans,
            cpus=spec.cpus or workers,
            costs=spec.costs,
            seed=seed,
            limits=spec.limits,
        )
        assert machine.memory is not None
        for name in self._needed:
            ending = machine.call(self._call(name, 0))
            if ending.errno == "ENOMEM":
                raise OverLimit(f"there is no room for {name}, which {self._module} needs: {ending.value}")
        errnos: Counter[str] = Counter()
        for worker in range(workers):
            call = self._call(self._module, worker)
            call.on_end = partial(_count, errnos)
            machine.begin(call, machine.clock.now_ns + worker * spec.costs.wake_ns)
        machine.run()
        return StormEnd(workers, errnos, machine.memory.first_refusal, machine.memory.peak)

    def _call(self, name: str, worker: int) -> VirtualCall:
        spec = self._spec
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = BootFile(self._tree, name, spec.packing, 1.0, None)
        syscall, flags = Syscall.FINIT_MODULE, 0
        if file.packing:
            by_kernel = spec.kmod >= KMOD_WITH_KERNEL_DECOMPRESSION
            if by_kernel and ALGORITHMS[file.packing] in spec.identity.decompressors:
                flags = MODULE_INIT_COMPRESSED_FILE
            else:
                syscall = Syscall.INIT_MODULE
        inode = f"{file.path}:{worker}" if spec.separate_copies else file.path
        return VirtualCall(CallSpec(name, inode, spec.policy, syscall, flags), file)


def _count(errnos: Counter[str], call: VirtualCall) -> None:
    ending: Ending | None = call.ending
    assert ending is not None
    errnos[ending.errno] += 1
