"""A machine to boot: its CPUs, memory and devices, and what the init functions of its modules come to."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from loader_svc.boot.device import Device, expanded, trigger_order
from loader_svc.virtual.costs import Costs, default_costs
from modpressure.errors import BadRequest

MAX_CPUS: Final = 1 << 16
"""More than any kernel is built for (NR_CPUS on x86-64 is 8192 at most)."""

MAX_INIT_NS: Final = 10**12
"""Longest init function that is taken on; 1000 s."""

MIN_MEMORY_BYTES: Final = 16 << 20
MAX_MEMORY_BYTES: Final = 1 << 50


class MachineError(BadRequest):
    """A description of a machine makes no sense; one sentence that names the value."""


@dataclass(frozen=True, slots=True)
class ModuleInit:
    """What the init function of one module comes to on this machine."""

    module: str
    errno: str = ""
    """What it fails with, such as ``ENODEV``; empty for success."""

    duration_ns: int | None = None
    """Median of how long it takes; None as the costs have it."""

    is_asleep: bool = False
    """Whether it waits for its device meanwhile, and needs no CPU."""


@dataclass(frozen=True)
class Machine:
    """A description of a machine. Devices may be templates, so that ``cpus`` can be changed."""

    name: str
    cpus: int
    memory_bytes: int
    devices: tuple[Device, ...] = ()
    """Those that are there when udev starts, and those born later; in any order."""

    subsystems: tuple[str, ...] = ()
    """Paths below /sys that are triggered before the devices: subsystems, drivers and modules."""

    inits: tuple[ModuleInit, ...] = ()
    host_cpus: int | None = None
    """How many real CPUs the CPUs share, for a guest on an overcommitted host; None if each has its own."""

    file_factor: float = 1.0
    """How many times longer the modules' files are than those in the tree: more than 1 for files with debugging
    information. What is laid out of a file does not change."""

    file_bytes: tuple[tuple[str, int], ...] = ()
    """Lengths of single modules' files, by module, where the tree's are not meant."""

    builtin: tuple[str, ...] = ()
    """Modules of the tree that this machine's kernel has built in, or does without: nothing to load."""

    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """What modules of this machine's kernel depend on besides what the tree says, in loading order: module, names."""

    autoload: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """What the kernel itself asks modprobe for while a module's init runs (request_module): module, names."""

    initramfs: tuple[str, ...] = ()
    """The modules that its initramfs has, whatever they depend on among them: it boots in two stages then, with these,
    and once more with all that its root file system has. Empty: all is there at once."""

    costs: tuple[tuple[str, Any], ...] = ()
    """Costs that differ on this machine from the bundled ones, by name: say, what a page takes that the host of a guest
    has to back first. Costs that are told for a boot replace them all."""

    description: str = ""

    def __post_init__(self) -> None:
        """MachineError names the first value that makes no sense."""
        try:
            self.own_costs()
        except (BadRequest, TypeError) as error:
            what = error.sentence if isinstance(error, BadRequest) else f"there is no such cost: {dict(self.costs)}"
            raise MachineError(f"costs: {what}", field="costs") from None
        if not self.name:
            raise MachineError("the machine has no name", field="name")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise MachineError(f"cpus {self.cpus} is not between 1 and {MAX_CPUS}", field="cpus")
        if self.host_cpus is not None and not 1 <= self.host_cpus <= MAX_CPUS:
            raise MachineError(f"host_cpus {self.host_cpus} is not between 1 and {MAX_CPUS}", field="host_cpus")
        if not MIN_MEMORY_BYTES <= self.memory_bytes <= MAX_MEMORY_BYTES:
            raise MachineError(
                f"memory_bytes {self.memory_bytes} is not between {MIN_MEMORY_BYTES} and {MAX_MEMORY_BYTES}",
                field="memory_bytes",
            )
        if not 0.01 <= self.file_factor <= 1000:  # what is no number is not in between either
            raise MachineError(f"file_factor {self.file_factor} is not between 0.01 and 1000", field="file_factor")
        for device in self.devices:
            if device.born_of and not device.is_born:
                raise MachineError(f"{device.path} has born_of {device.born_of!r} but is there from the beginning")
        for init in self.inits:
            if init.errno and not hasattr(errno, init.errno):
                raise MachineError(f"init.{init.module}: there is no errno {init.errno!r}", field="init")
            if init.duration_ns is not None and not 0 <= init.duration_ns <= MAX_INIT_NS:
                raise MachineError(
                    f"init.{init.module}: duration_ns {init.duration_ns} is not between 0 and {MAX_INIT_NS}",
                    field="init",
                )

    def own_costs(self) -> Costs:
        """Return the bundled costs as they are on this machine."""
        return replace(default_costs(), **dict(self.costs))

    def with_cpus(self, cpus: int) -> Machine:
        """Return the same machine with another number of CPUs. MachineError."""
        return self if cpus == self.cpus else replace(self, cpus=cpus)

    @cached_property
    def triggered(self) -> tuple[Device, ...]:
        """The devices that ``udevadm trigger --type=devices`` finds, in its order, one for each CPU where it is so."""
        return tuple(trigger_order(expanded((device for device in self.devices if not device.is_born), self.cpus)))

    @cached_property
    def born(self) -> tuple[Device, ...]:
        """The devices that appear later, one for each CPU where it is so."""
        return tuple(expanded((device for device in self.devices if device.is_born), self.cpus))

    def modaliases(self) -> Sequence[str]:
        """List the distinct modaliases of all its devices, in no order that matters."""
        return list(dict.fromkeys(device.modalias for device in (*self.triggered, *self.born) if device.modalias))

    def __getstate__(self) -> dict[str, object]:
        """Leave out what follows from the rest: a machine of thousands of CPUs is a few kilobytes that way."""
        return {name: value for name, value in self.__dict__.items() if name not in ("triggered", "born")}
