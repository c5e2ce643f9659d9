"""Many workers on one simulated machine, with costs that put their calls into an order like a real one.

Which of two calls comes first is a race on a real machine and chance here, by a seed. The costs are in proportion only:
reading, decompressing and copying by the byte, linking long enough that everybody else has read the file meanwhile.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from loader_svc.image import ImageProblem, describe
from loader_svc.local import IMAGE_LIMIT_BYTES, LocalCall, LocalMachine
from loader_svc.plan import Plan, Plans
from loader_svc.steps import Allocate as AllocateStep
from loader_svc.steps import CallSpec, Decompress, Link, Read, Step
from loader_svc.verify.files import Files, ScriptFile
from modpressure.errors import BadRequest
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import Policy

READ_NS_PER_BYTE: Final = 3.0
DECOMPRESS_NS_PER_BYTE: Final = 10.0
ALLOCATE_NS_PER_BYTE: Final = 2.0
LINK_NS_PER_BYTE: Final = 500.0
JITTER: Final = 0.35
"""Share by which a cost may be less or more, each time anew."""

SLICE_NS: Final = 12_000_000

WAKE_NS: Final = 200_000
"""How much later each worker starts than the one before it: releasing many at once takes its time, too."""


class Costs:
    """What steps cost, with some chance in it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, step: Step, call: LocalCall) -> int:
        """Return the CPU time of a step, in ns."""
        plan = call.plan
        if plan is None:
            return 0
        cost = 0.0
        if isinstance(step, Read):
            cost = READ_NS_PER_BYTE * plan.version.size_bytes
        elif isinstance(step, Decompress):
            cost = DECOMPRESS_NS_PER_BYTE * plan.unpacked_bytes
        elif isinstance(step, AllocateStep):
            cost = ALLOCATE_NS_PER_BYTE * plan.layout_bytes
        elif isinstance(step, Link):
            return int(LINK_NS_PER_BYTE * plan.image_bytes)
        return int(cost * self._random.uniform(1 - JITTER, 1 + JITTER))


@dataclass(frozen=True, slots=True)
class Target:
    """A module that workers load, and the modules that have to be there before."""

    file: ScriptFile
    flags: int
    dependencies: tuple[ScriptFile, ...]


class Crowd:
    """Workers on one machine; every worker makes one call at a time."""

    def __init__(
        self, identity: KernelIdentity, policy: Policy, plans: Plans, *, cpus: int, seed: int, separate_copies: bool
    ) -> None:
        """``separate_copies`` gives every worker a file of its own."""
        self.machine = LocalMachine(identity, plans=plans, cpus=cpus, slice_ns=SLICE_NS, cost=Costs(seed))
        self.errnos: Counter[str] = Counter()
        self._policy = policy
        self._separate_copies = separate_copies

    def prepare(self, target: Target) -> None:
        """Load what the target needs; what that took is not counted."""
        for file in target.dependencies:
            ending = self.machine.call(self._call(file, 0, 0))
            if ending.errno:
                raise BadRequest(f"{file.path.name} can't be loaded first: {ending.errno} ({ending.check})")
        self.machine.counters = type(self.machine.counters)()
        self.machine.peak_bytes = self.machine.held_bytes

    def release(self, target: Target, workers: int) -> None:
        """Have workers begin a call each, together."""
        for worker in range(workers):
            self.begin(target, worker, self.machine.clock.now_ns + worker * WAKE_NS)

    def begin(self, target: Target, worker: int, at_ns: int | None = None) -> LocalCall:
        """Have a worker begin a call, now if no time is given."""
        call = self._call(target.file, target.flags, worker)
        call.on_end = self._ended
        return self.machine.begin(call, at_ns)

    def _call(self, file: ScriptFile, flags: int, worker: int) -> LocalCall:
        inode = f"{file.inode}:{worker}" if self._separate_copies else file.inode
        name = PurePosixPath(file.path.name).name.partition(".")[0]
        spec = CallSpec(name, inode, self._policy, Syscall.FINIT_MODULE, flags)
        return LocalCall(spec, str(file.path), file.open)

    def _ended(self, call: LocalCall) -> None:
        assert call.ending is not None
        self.errnos[call.ending.errno] += 1


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

    def _ended(self, call: LocalCall) -> None:
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

    def __init__(self, files: Files, identity: KernelIdentity) -> None:
        self._files = files
        self._identity = identity
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
