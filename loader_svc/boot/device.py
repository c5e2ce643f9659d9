"""Devices as sysfs has them: where they are, what they are called, and when they appear."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

CPU: Final = re.compile(r"\{cpu(?::(0?\d*[dxX]?))?\}")
"""What stands for a CPU's number in a template: ``{cpu}``, or with a format as in Python, ``{cpu:02x}``."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device, or a template for one device of each CPU: then its path has ``{cpu}`` in it."""

    path: str
    """Its directory below /sys, which uevents call DEVPATH: ``/devices/...``, or ``/bus/...``, ``/module/...``."""

    modalias: str = ""
    """Empty for a device that no module is asked for by."""

    device_id: str = ""
    """``b8:0``, ``c13:64``, ``n2`` or ``+pci:0000:00:01.0``, as /run/udev/data names it; empty if it is not told."""

    node: str = ""
    """Its device node, such as ``sda``; empty for none."""

    driver: str = ""
    """The module whose driver it gets; empty for the first one that its modalias leads to."""

    born_of: str = ""
    """The module whose init brings it to life, if that is told and it is not there from the beginning."""

    is_born: bool = False
    """Whether it appears only while modules load: with the init of the module bound to its nearest ancestor with a
    modalias, unless ``born_of`` names another one."""

    dies_with: str = ""
    """The module whose init takes it away; empty if it stays."""

    @property
    def is_per_cpu(self) -> bool:
        """Whether it is a template for one device of each CPU."""
        return CPU.search(self.path) is not None

    def of_cpu(self, cpu: int) -> Device:
        """Return the device of one CPU."""

        def number(match: re.Match[str]) -> str:
            return format(cpu, match[1] or "")

        return replace(
            self,
            path=CPU.sub(number, self.path),
            modalias=CPU.sub(number, self.modalias),
            device_id=CPU.sub(number, self.device_id),
            node=CPU.sub(number, self.node),
        )


def expanded(devices: Iterable[Device], cpus: int) -> Iterator[Device]:
    """Yield each device, and one for each of ``cpus`` CPUs where it is a template."""
    for device in devices:
        if device.is_per_cpu:
            for cpu in range(cpus):
                yield device.of_cpu(cpu)
        else:
            yield device


def trigger_order(devices: Iterable[Device]) -> list[Device]:
    """Sort devices as ``udevadm trigger`` goes through them.

    By path, component by component; sound control devices behind the others of their card, md and dm devices last
    (src/libsystemd/sd-device/device-enumerator.c, systemd 252).
    """
    return sorted(devices, key=_place)


PRIORITIZED: Final = ("module", "block", "tpmrm", "net", "tty", "input")
"""What systemd-udev-trigger.service has triggered first (units/systemd-udev-trigger.service.in, systemd 252)."""


def prioritized_order(devices: Iterable[Device], subsystems: Iterable[str] = PRIORITIZED) -> list[Device]:
    """Sort devices as ``udevadm trigger --prioritized-subsystem=...`` goes through them.

    The devices of each of the subsystems in turn, each with those above it, and then all the rest, each group by path
    (``enumerator_sort_devices``, src/libsystemd/sd-device/device-enumerator.c, systemd 252). All of these subsystems
    have a directory of their name above their devices, by which they are told here.
    """
    left = {device.path: device for device in devices}
    order: list[Device] = []
    for subsystem in subsystems:
        part = f"/{subsystem}/"
        group: dict[str, Device] = {}
        for path in [path for path in left if part in path]:
            at = len(path)
            while at > 0:
                found = left.pop(path[:at], None)
                if found is not None:
                    group[found.path] = found
                at = path.rfind("/", 0, at)
        order += trigger_order(group.values())
    return order + trigger_order(left.values())


def _place(device: Device) -> tuple[bool, list[str], bool, list[str]]:
    path = device.path
    parts = path.split("/")
    is_late = "/block/md" in path or "/block/dm-" in path
    for at, part in enumerate(parts):
        if part == "sound" and at + 2 < len(parts):
            # Within one card: what is called controlC… comes after all the rest.
            return is_late, parts[: at + 2], parts[at + 2].startswith("controlC"), parts
    return is_late, parts, False, parts
