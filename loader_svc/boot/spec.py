"""What is booted, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from loader_svc.boot.machine import Machine
from loader_svc.boot.userland import STANDARD, Userland
from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.costs import Costs
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.identity import ANY, KernelIdentity
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import DEFAULT_POLICY, Policy
from modpressure.kernel.report import ReportFormat, report
from modpressure.kernel.system_memory import Amounts

COMPRESSIONS: Final = ("", "gz", "xz", "zst")


@dataclass(frozen=True, slots=True)
class TreeSource:
    """Where the modules are; opened once in each process that simulates."""

    root: Path | None = None
    """A tree of modules; None for the bundled catalogue."""

    modprobe_dirs: tuple[Path, ...] = ()
    """Directories or files of configuration (modprobe.d(5)); the host's own are not taken unasked."""

    kernel_command_line: str = ""
    """What of it matters to modules: ``modprobe.blacklist=``, ``MODULE.PARAMETER=``."""


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """What is changed about modules besides the tree and its configuration."""

    blacklist: frozenset[str] = frozenset()
    """Names that ``blacklist`` lines are added for."""

    builtin: frozenset[str] = frozenset()
    """Modules taken as built into the kernel: there from the beginning, no file, nothing to load."""

    merged: tuple[tuple[str, str], ...] = ()
    """Modules taken as part of another one's file: name, and the name of the one that has it."""

    compression: str | None = None
    """What the files are taken as packed with: "" for plain, ``gz``, ``xz``, ``zst``; None as they are in the tree."""


CATALOGUE: Final = TreeSource()
UNCHANGED: Final = ModuleConfig()


@dataclass(frozen=True, slots=True)
class BootSpec:
    """A boot to simulate. Can be pickled, so that sweeps may run it in other processes."""

    machine: Machine
    tree: TreeSource = CATALOGUE
    policy: Policy = DEFAULT_POLICY
    userland: Userland = STANDARD
    modules: ModuleConfig = UNCHANGED
    costs: Costs | None = None
    """What things take; None for the bundled costs."""

    identity: KernelIdentity = ANY
    """The kernel that the modules are loaded into."""

    limits: Amounts | None = None
    """How much memory the kernel has for modules, 0 for no limit; None for as much as they want."""

    merges_requests: bool = False
    """Whether the kernel merges its own requests of equal names (CONFIG_MODULE_DEBUG_AUTOLOAD_DUPS)."""


@dataclass(frozen=True, slots=True)
class BootCall:
    """One finit_module or init_module of a boot, as it ended."""

    module: str
    worker: str
    """Who made it: ``udev-1`` and so on, ``modprobe`` for what the kernel asked for, or a trace's worker."""

    syscall: Syscall
    flags: int
    outcome: Outcome
    errno: str
    begun_ns: int
    ended_ns: int
    is_duplicate: bool = False
    waited: bool = False
    """Whether it had to wait for another call, in the gate or for the name."""

    image_bytes: int = 0
    compressed_bytes: int = 0
    """Length of the compressed file if the kernel decompressed it, else 0."""

    mod_bytes: int = 0
    text_bytes: int = 0
    wait_ns: int = 0
    peak_held_bytes: int = 0
    """Most memory that the call held at once."""

    check: str = ""
    """The check that ended it, such as ``duplicate``; empty where none did."""

    file: str = ""
    """Path of the file in its tree."""

    @classmethod
    def of(cls, call: VirtualCall) -> Self:
        """Return a call that has ended."""
        ending, spec = call.ending, call.spec
        loadable = None if call.plan is None else call.loadable
        assert ending is not None
        return cls(
            module=ending.module,
            worker=call.worker,
            syscall=spec.syscall,
            flags=spec.flags,
            outcome=ending.outcome,
            errno=ending.errno,
            begun_ns=call.begun_ns,
            ended_ns=call.ended_ns,
            is_duplicate=ending.duplicate,
            waited=call.waited,
            image_bytes=loadable.image_bytes if loadable else 0,
            compressed_bytes=loadable.compressed_bytes if loadable else 0,
            mod_bytes=loadable.core_bytes + loadable.init_bytes if loadable else 0,
            text_bytes=loadable.text_bytes if loadable else 0,
            wait_ns=call.wait_ns,
            peak_held_bytes=call.peak_held_bytes,
            check=ending.check,
            file=call.path,
        )


class Shortfall(NamedTuple):
    """A call that memory did not suffice for."""

    module: str
    at_ns: int
    """When the call ended, since the first trigger; the pause between initramfs and root file system is left out."""
    area: str
    """What was full: ``pages``, ``vmalloc area`` or ``module area``."""


@dataclass(frozen=True, slots=True)
class BootResult:
    """What a boot came to. Times are simulated; sizes are bytes."""

    counters: Counters
    failed_modules: tuple[FailedModule, ...]
    """The modules that were duplicates, with their numbers by stage; newest name first, as the kernel lists them."""

    duration_ns: int
    """From the first trigger until udev has nothing left to do, as ``udevadm settle`` would wait."""

    workers: int
    """How many workers udevd started."""

    loaded: tuple[str, ...]
    """The modules that are live in the end, in the order in which they came."""

    peak_copy_bytes: int
    """Most bytes that copies of files had at one time: from the read on until they were freed."""

    peak_held_bytes: int
    """Most memory that module loading had at one time: copies, decompressed images, layouts, live modules."""

    finit_calls: int
    init_calls: int
    gate_joins: int
    """Calls that took the result of one in flight."""

    init_failures: dict[str, int]
    """How many times the init function of a module ran and failed; the kernel counts these nowhere."""

    duplicates_waited: int = 0
    """Duplicates that found the name being loaded and waited; the others found it live."""

    autoloads: int = 0
    """Modules that the kernel itself asked for (request_module)."""

    autoloads_failed: int = 0
    """Those of them that found no place for a modprobe in time (ETIME)."""

    shortages: int = 0
    """Calls that failed as memory ran out (ENOMEM)."""

    first_shortage: Shortfall | None = None
    """The first of them; None if memory sufficed."""

    lost: tuple[str, ...] = ()
    """Modules that are missing in the end as they, or what they need, found no room: a boot with any has failed."""

    events: int = 0
    """Uevents that udev handled."""

    @property
    def duplicates(self) -> int:
        """Calls that failed since the name was in the list."""
        return self.counters.duplicates

    @property
    def wasted_bytes(self) -> int:
        """What the kernel calls ``Virtual mem wasted bytes``."""
        return self.counters.virtual_mem_wasted_bytes

    def report(self, report_format: ReportFormat = ReportFormat.MAINLINE, *, kernel_buffer: bool = False) -> str:
        """Return the text of the kernel's report."""
        return report(report_format, self.counters, self.failed_modules, kernel_buffer=kernel_buffer)
