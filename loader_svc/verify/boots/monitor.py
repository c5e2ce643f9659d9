"""Devices that are born without a MODALIAS: nothing is loaded for them, but udev has an event for each to handle.

What lists devices lists only those with a MODALIAS after a boot, but ``udevadm monitor`` saw all of them in one boot.
They are the same on each machine of a recording, as far as the modules that make them are loaded there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from loader_svc.boot.device import Device
from loader_svc.verify.boots.recorded import unpacked

_EVENT: Final = re.compile(r"^KERNEL\[[\d.]+\] add +(\S+) \(\S+\)\n((?:.+\n)*)", re.MULTILINE)
_SENT_ANYWAY: Final = re.compile(r"/module/([^/]+)|/bus/[^/]+/drivers/[^/]+")
"""What a simulated kernel sends by itself."""


def monitored(directory: Path) -> str:
    """Return what ``udevadm monitor`` printed in a boot; empty if there is no such file. BadRequest."""
    path = next(iter(sorted((directory / "uevents").glob("udev-monitor-*.txt.gz"))), None)
    return unpacked(path) if path is not None else ""


def born_unnamed(text: str, known: Collection[str]) -> Iterator[Device]:
    """Yield the devices that appeared besides those known, by their paths.

    Which module made one that has no device with a MODALIAS above it, is taken from the next event of a module: that
    comes when its init has returned.
    """
    waiting: list[Device] = []
    seen = set(known)
    for path, body in _EVENT.findall(text):
        sent = _SENT_ANYWAY.fullmatch(path)
        if sent is not None:
            if sent[1]:
                yield from (_made_by(device, sent[1]) for device in waiting)
                waiting = []
        elif path not in seen:
            seen.add(path)
            waiting.append(_device(path, body))


def _made_by(device: Device, module: str) -> Device:
    has_parent = device.path.startswith("/devices/") and not device.path.startswith("/devices/virtual/")
    return Device(
        device.path,
        device_id=device.device_id,
        node=device.node,
        is_born=True,
        born_of="" if has_parent else module,
    )


def _device(path: str, body: str) -> Device:
    values = dict(line.partition("=")[::2] for line in body.splitlines())
    subsystem = values.get("SUBSYSTEM", "")
    if "MAJOR" in values:
        device_id = f"{'b' if subsystem == 'block' else 'c'}{values['MAJOR']}:{values.get('MINOR', '0')}"
    elif "IFINDEX" in values:
        device_id = f"n{values['IFINDEX']}"
    else:
        device_id = f"+{subsystem}:{path.rpartition('/')[2]}"
    return Device(path, device_id=device_id, node=values.get("DEVNAME", "").removeprefix("/dev/"))
