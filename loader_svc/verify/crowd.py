"""Many workers on one simulated machine, with costs that put their calls into an order like a real one.

Which of two calls comes first is a race on a real machine and chance here, by a seed. Runs on one real machine differ
far more than their calls do among each other (with 64 workers on xfs, 1 and 51 of 63 duplicates were late in two of
five runs), so each run draws its pace, too.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from random import Random
from typing import Final

from loader_svc.image import ImageProblem, describe
from loader_svc.init_results import InitResults
from loader_svc.plan import Plan, Plans
from loader_svc.steps import CallSpec
from loader_svc.verify.files import Files, ScriptFile
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES, VirtualCall, VirtualFile, VirtualMachine
from modpressure.errors import BadRequest
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import Policy

MEASURED_COSTS: Final = Costs(
    read_cached_ns_per_byte=3.0,
    zstd_ns_per_byte=8.0,
    xz_ns_per_byte=8.0,
    gzip_ns_per_byte=8.0,
    copy_ns_per_byte=2.0,
    link_ns=5_000_000,
    symbol_ns=20_000,
    relocation_ns=30_000,
)
"""What things take on an emulated CPU, as far as the measured storms tell: a load of xfs by itself takes two seconds
there, nearly all of them relocations, and everybody else has read the file meanwhile. Only proportions matter here."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What is the same for all calls of one run, and another in the next."""

    slice_ns: int
    """How long a CPU stays with one call while others want it."""

    wake_ns: int
    """How much later each worker starts than the one before it: releasing many at once takes its time, too."""

    jitter: float
    """Share by which a cost may be less or more, each time anew."""

    @classmethod
    def drawn(cls, seed: int) -> Pace:
        """Draw a pace; each figure is as likely below the geometric mean of its bounds as above.

        The bounds are such that the late duplicates of the measured storms, from 2 workers to 255, are neither rare nor
        all there is.
        """
        dice = Random(seed)

        def between(least: float, most: float) -> float:
            return math.exp(dice.uniform(math.log(least), math.log(most)))

        return cls(
            slice_ns=int(between(2_000_000, 60_000_000)),
            wake_ns=int(between(10_000, 8_000_000)),
            jitter=between(0.15, 0.9),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A module that workers load, and the modules that have to be there before."""

    file: ScriptFile
    flags: int
    dependencies: tuple[ScriptFile, ...]


class Crowd:
    """Workers on one machine; every worker makes one call at a time."""

    def __init__(
        self, targets: Targets, identity: KernelIdentity, policy: Policy, *, cpus: int, seed: int, separate_copies: bool
    ) -> None:
        """``separate_copies`` gives every worker a file of its own."""
        self._pace = Pace.drawn(seed)
        costs = replace(MEASURED_COSTS, slice_ns=self._pace.slice_ns, jitter=self._pace.jitter)
        self.machine = VirtualMachine(
            identity, init_results=targets.init_results, plans=targets.plans, cpus=cpus, costs=costs, seed=seed
        )
        self.errnos: Counter[str] = Counter()
        self.waited: Counter[Outcome] = Counter()
        """How many calls waited for another one, by what became of them."""
        self._policy = policy
        self._files: dict[ScriptFile, VirtualFile] = {}
        self._separate_copies = separate_copies

    def prepare(self, target: Target) -> None:
        """Load what the target needs; what that took is not counted."""
        for file in target.dependencies:
            ending = self.machine.call(self._call(file, 0, 0))
            if ending.errno:
                raise BadRequest(f"{file.path.name} can't be loaded first: {ending.errno} ({ending.check})")
        self.machine.reset_counters()

    def release(self, target: Target, workers: int) -> None:
        """Have workers begin a call each, together."""
        for worker in range(workers):
            self.begin(target, worker, self.machine.clock.now_ns + worker * self._pace.wake_ns)

    def begin(self, target: Target, worker: int, at_ns: int | None = None) -> VirtualCall:
        """Have a worker begin a call, now if no time is given."""
        call = self._call(target.file, target.flags, worker)
        call.on_end = self._ended
        return self.machine.begin(call, at_ns)

    def _call(self, file: ScriptFile, flags: int, worker: int) -> VirtualCall:
        inode = f"{file.inode}:{worker}" if self._separate_copies else file.inode
        name = PurePosixPath(file.path.name).name.partition(".")[0]
        spec = CallSpec(name, inode, self._policy, Syscall.FINIT_MODULE, flags)
        known = self._files.get(file)
        if known is None:
            known = self._files[file] = VirtualFile(str(file.path), file.open)
        return VirtualCall(spec, known)

    def _ended(self, call: VirtualCall) -> None:
        assert call.ending is not None
        self.errnos[call.ending.errno] += 1
        if call.wait_ns:
            self.waited[call.ending.outcome] += 1


class Repeater:
    """The loop of a stress worker: load until that succeeds, unload, and so on."""

    def __init__(self, crowd: Crowd, target: Target, module: str, worker: int, operations: int) -> None:
        self._crowd = crowd
        self._target = target
        self._module = module
        self._worker = worker
        self._left = operations
        self._count = crowd._ended

    def begin(self) -> None:
        """Begin with the first call."""
        call = self._crowd.begin(self._target, self._worker)
        call.on_end = self._ended

    def _ended(self, call: VirtualCall) -> None:
        self._count(call)
        assert call.ending is not None
        if not call.ending.errno:
            self._left -= 1
            self._crowd.machine.remove(self._module)
        if self._left:
            machine = self._crowd.machine
            machine.clock.at(machine.clock.now_ns, self.begin)


class Targets:
    """Finds what a table of measurements calls a module, and what that depends on."""

    def __init__(self, files: Files, identity: KernelIdentity, init_results: InitResults) -> None:
        self._files = files
        self._identity = identity
        self.init_results = init_results
        self.plans = Plans(IMAGE_LIMIT_BYTES, identity)

    def find(self, module: str, *, suffix: str = "") -> Target | None:
        """Return a module's file (``suffix`` for packed ones, which the kernel unpacks); None if it is not at hand."""
        file = self._files.find(f"{module}.ko{suffix}")
        if file is None:
            return None
        needed = self._dependencies(file.path)
        if needed is None:
            return None
        return Target(file, 4 if suffix else 0, needed)

    def _dependencies(self, path: Path, above: frozenset[Path] = frozenset()) -> tuple[ScriptFile, ...] | None:
        """Return what has to be loaded before a file, in order; None if not all of it is at hand."""
        if path in above:
            return None
        try:
            facts = describe(path)
        except (ImageProblem, OSError):
            return None
        found: list[ScriptFile] = []
        for name in facts.depends:
            file = self._files.find(f"{name}.ko") or self._files.find(f"{name.replace('_', '-')}.ko")
            below = self._dependencies(file.path, above | {path}) if file is not None else None
            if file is None or below is None:
                return None
            found += [each for each in (*below, file) if each not in found]
        return tuple(found)

    def plan(self, target: Target) -> Plan:
        """Return what becomes of a target's file."""
        algorithm = self._identity.decompressor_for(None) if target.flags else None
        descriptor = target.file.open()
        with open(descriptor, "rb"):
            return self.plans.of(
                descriptor,
                str(target.file.path),
                algorithm,  # type: ignore[arg-type]
                by_kernel=True,
                flags=target.flags,
            )
