"""The machine that was recorded: its devices in their order, what its inits fail with, and what its kernel asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from loader_svc.boot.device import Device
from loader_svc.boot.machine import Machine, ModuleInit
from loader_svc.boot.spec import BootSpec, ModuleConfig, TreeSource
from loader_svc.boot.userland import KMODS, Userland
from loader_svc.verify.boots.monitor import born_unnamed
from loader_svc.verify.boots.recorded import STANDARD_UDEV, Recording, Setting
from loader_svc.virtual.costs import Costs
from loader_svc.virtual.host import LATENCY_NS, SLICE_NS, WAKE_NS, scaled_ns
from modpressure.errors import BadRequest

HOST_CPUS: Final = 2
"""Cores of the host that the recorded guests had, as their README says: virtual CPUs are threads there."""

HOST_TICK_NS: Final = 4_000_000
"""The host has the QEMU of Debian 12, which has Linux 6.1, with CONFIG_HZ=250."""

TICK_NS: Final = 1_000_000
"""A tick of the guest (CONFIG_HZ=1000 in its config-boot): tasks are preempted at ticks."""


def slice_ns(cpus: int) -> int:
    """Return how long a guest's CPU stays with a task while others wait, in ns.

    ``base_slice_ns``, 0.75 ms of one CPU (kernel/sched/fair.c, Linux 6.12), up to the next tick.
    """
    return -(-scaled_ns(750_000, cpus) // TICK_NS) * TICK_NS


_PLATFORM: Final = re.compile(r"/devices/platform/([^/.]+)(?:\.[^/]*)?")
_MAKERS: Final = {"ipmi_bmc": "ipmi_si", "intel_rapl_msr": "intel_rapl_common"}
"""Modules that make a platform device of another name in their init: ``ipmi_register_smi`` is called by ipmi_si
(drivers/char/ipmi/ipmi_msghandler.c, Linux 6.12), ``rapl_init`` adds one (drivers/powercap/intel_rapl_common.c)."""


def recorded_machine(
    recording: Recording,
    setting: Setting,
    *,
    failing: Mapping[str, str],
    asked: Mapping[str, Sequence[str]],
    monitor: str = "",
) -> Machine:
    """Return the machine of some boots. NotFound, BadRequest.

    ``failing`` are the errnos of init functions that fail on it, ``asked`` what its kernel asks modprobe for when a
    module's init has run, ``monitor`` what ``udevadm monitor`` printed of devices that have no MODALIAS.
    """
    devices = list(_devices(recording, setting))
    devices += born_unnamed(monitor, {*(device.path for device in devices), *_subsystems(recording, setting)})
    return Machine(
        name=setting.machine,
        cpus=setting.cpus,
        memory_bytes=setting.memory_bytes,
        devices=tuple(devices),
        subsystems=_subsystems(recording, setting),
        inits=tuple(ModuleInit(module, errno) for module, errno in sorted(failing.items())),
        host_cpus=HOST_CPUS,
        autoload=tuple((module, tuple(names)) for module, names in asked.items()),
        description=f"recorded in {recording.directory.name}",
    )


def recorded_spec(
    recording: Recording, setting: Setting, machine: Machine, tree: Path, modprobe_dirs: Iterable[Path], costs: Costs
) -> BootSpec:
    """Return what was booted, on a machine, from a tree. BadRequest for a libkmod that is not known."""
    if setting.kmod not in KMODS:
        raise BadRequest(f"{recording.directory}: kmod {setting.kmod} is none of {', '.join(map(str, KMODS))}")
    return BootSpec(
        machine,
        tree=TreeSource(tree, tuple(modprobe_dirs)),
        policy=setting.policy,
        userland=Userland(kmod=setting.kmod),
        modules=ModuleConfig(compression=setting.compression),
        costs=replace(
            costs,
            slice_ns=slice_ns(setting.cpus),
            host_latency_ns=scaled_ns(LATENCY_NS, HOST_CPUS),
            host_slice_ns=scaled_ns(SLICE_NS, HOST_CPUS),
            host_tick_ns=HOST_TICK_NS,
            host_wake_ns=scaled_ns(WAKE_NS, HOST_CPUS),
        ),
    )


def _devices(recording: Recording, setting: Setting) -> Iterator[Device]:
    before = _modaliases(recording.lines("modalias", setting))
    after = _modaliases(recording.lines("modalias-after", setting))
    for path in _below_sys(recording.lines("trigger-devices", setting)):
        yield Device(path, before.get(path, ""))
    for path, modalias in after.items():
        if path not in before:
            yield Device(path, modalias, is_born=True, born_of=_maker(path))


def _subsystems(recording: Recording, setting: Setting) -> tuple[str, ...]:
    return tuple(_below_sys(recording.lines("trigger-subsystems", setting)))


def _maker(path: str) -> str:
    """Return which module makes a platform device that has no device above it; empty for any other."""
    match = _PLATFORM.fullmatch(path)
    return _MAKERS.get(match[1], match[1]) if match else ""


def _below_sys(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line.removeprefix("/sys")


def _modaliases(lines: Iterable[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        path, _, modalias = line.partition(" ")
        found[path.removeprefix("/sys")] = modalias
    return found


def has_modprobe_dir(recording: Recording) -> bool:
    """Whether the configuration of its boots was recorded."""
    return (recording.directory / "env" / "modprobe.d").is_dir()


def write_modprobe_dir(recording: Recording, setting: Setting, directory: Path) -> Path | None:
    """Write the configuration of some boots below a directory; return where, None if there is none. OSError.

    The userland with another udev than Debian 12's had no systemd.conf and no soft dependencies, as the README says.
    """
    recorded = recording.directory / "env" / "modprobe.d"
    if not recorded.is_dir() or setting.udev == STANDARD_UDEV:
        return recorded if recorded.is_dir() else None
    directory.mkdir(exist_ok=True)
    for path in sorted(recorded.glob("*.conf")):
        if path.name != "systemd.conf":
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            text = "".join(line for line in lines if not line.startswith("softdep "))
            (directory / path.name).write_text(text, encoding="utf-8")
    return directory
