"""Recording this machine: its devices from /sys, with their modaliases, and which of them modules brought to life."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from loader_svc.boot.device import Device, trigger_order
from loader_svc.boot.machine import Machine
from modpressure.errors import NotFound

MAX_UEVENT_BYTES: Final = 65536
"""Longest uevent file: sysfs gives a page, or a little more."""

_PER_CPU: Final = (
    (re.compile(r"(/devices/system/cpu/cpu)(\d+)"), "{cpu}", 10),
    (re.compile(r"(/devices/system/machinecheck/machinecheck)(\d+)"), "{cpu}", 10),
    (re.compile(r"(/devices/system/clockevents/clockevent)(\d+)"), "{cpu}", 10),
    (re.compile(r"(/devices/virtual/thermal/cooling_device)(\d+)"), "{cpu}", 10),
    (re.compile(r"(/devices/virtual/(?:cpuid/cpu|msr/msr))(\d+)"), "{cpu}", 10),
    (re.compile(r"(/devices/LNXSYSTM:00/.*/LNXCPU:)([0-9a-f]{2,3})"), "{cpu:02x}", 16),
)
"""What there is one of for each CPU."""

_SUBSYSTEMS: Final = ("bus", "bus/*/drivers", "module")


class _Found(NamedTuple):
    device: Device
    has_module: bool
    """Whether its driver is that of a loadable module."""


def record_machine(sys: Path = Path("/sys"), *, name: str = "", cpus: int = 0, memory_bytes: int = 0) -> Machine:
    """Describe the machine whose sysfs is mounted at ``sys``. NotFound if there is none.

    ``cpus`` and ``memory_bytes`` are those of the running machine if 0. A device is taken as born while modules load if
    a directory above it has a driver of a loadable module; what such a module makes elsewhere (a platform device, for
    example) can't be told from what was there before.
    """
    if not (sys / "devices").is_dir():
        raise NotFound(f"there is no directory {str(sys / 'devices')!r}", field="sys")
    found = list(_devices(sys))
    with_module = {each.device.path for each in found if each.has_module}
    devices = [
        replace(each.device, is_born=any(above in with_module for above in _above(each.device.path))) for each in found
    ]
    count = cpus or len(_numbered(sys / "devices/system/cpu", "cpu")) or os.cpu_count() or 1
    return Machine(
        name=name or os.uname().nodename,
        cpus=count,
        memory_bytes=memory_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        devices=tuple(_templates(devices, count)),
        subsystems=tuple(_subsystems(sys)),
        description=f"recorded from {sys} under Linux {os.uname().release}",
    )


def _devices(sys: Path) -> Iterator[_Found]:
    for directory, subdirectories, files in os.walk(sys / "devices"):
        subdirectories.sort()
        if "uevent" not in files:
            continue
        path = Path(directory)
        if not (path / "subsystem").is_symlink():
            continue  # no device: udevadm does not find it either
        values = dict(line.partition("=")[::2] for line in _text(path / "uevent").splitlines())
        module = _driver_module(sys, path)
        device = Device(
            "/" + str(path.relative_to(sys)),
            modalias=values.get("MODALIAS", "") or _text(path / "modalias").strip(),
            device_id=_device_id(path, values),
            node=values.get("DEVNAME", ""),
            driver=module,
        )
        yield _Found(device, bool(module))


def _text(path: Path) -> str:
    """Return what a file of sysfs says; empty if it says nothing."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_UEVENT_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _driver_module(sys: Path, path: Path) -> str:
    """Return the loadable module that a device's driver is from; empty if there is none."""
    try:
        module = os.path.basename(os.readlink(path / "driver" / "module"))
    except OSError:
        return ""
    # What is built in has a directory too, if it has parameters, but no state.
    return module if (sys / "module" / module / "initstate").exists() else ""


def _device_id(path: Path, values: dict[str, str]) -> str:
    """Return the id that udev gives a device (``sd_device_get_device_id``, systemd 252)."""
    try:
        subsystem = os.path.basename(os.readlink(path / "subsystem"))
    except OSError:
        return ""
    if "MAJOR" in values:
        return f"{'b' if subsystem == 'block' else 'c'}{values['MAJOR']}:{values.get('MINOR', '0')}"
    if "IFINDEX" in values:
        return f"n{values['IFINDEX']}"
    return f"+{subsystem}:{path.name}"


def _subsystems(sys: Path) -> Iterator[str]:
    """Yield what ``udevadm trigger --type=subsystems`` finds: modules, buses and their drivers."""
    paths = set()
    for pattern in _SUBSYSTEMS:
        for path in sys.glob(f"{pattern}/*"):
            is_loaded = path.parent.name == "module" and (path / "initstate").exists()
            if path.is_dir() and not is_loaded and (pattern != "module" or (path / "uevent").exists()):
                paths.add("/" + str(path.relative_to(sys)))
    yield from sorted(paths, key=lambda path: path.split("/"))


def _numbered(directory: Path, prefix: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if re.fullmatch(prefix + r"\d+", name)]
    except OSError:
        return []


def _above(path: str) -> Iterator[str]:
    at = path.rfind("/")
    while at > 0:
        path = path[:at]
        yield path
        at = path.rfind("/")


def _templates(devices: Iterable[Device], cpus: int) -> list[Device]:
    """Put one template in the place of devices that there are of for each CPU, equal but for the number."""
    listed = trigger_order(devices)
    groups: dict[Device, dict[int, Device]] = defaultdict(dict)
    readings = {device: _reading(device) for device in listed}
    for device, reading in readings.items():
        if reading is not None:
            template, number = reading
            groups[template][number] = device
    found: dict[Device, None] = {}
    for device, reading in readings.items():
        is_whole = reading is not None and sorted(groups[reading[0]]) == list(range(cpus))
        found[reading[0] if reading is not None and is_whole else device] = None
    return list(found)


def _reading(device: Device) -> tuple[Device, int] | None:
    """Return the template that a device may be of, and its CPU; None if its kind is not one for each CPU."""
    for pattern, form, base in _PER_CPU:
        match = pattern.fullmatch(device.path)
        if match is not None:
            name = device.path.rsplit("/", 1)[-1]
            template = match[1] + form
            device_id = device.device_id.replace(f":{name}", ":" + template.rsplit("/", 1)[-1])
            return replace(device, path=template, device_id=device_id), int(match[2], base)
    return None
