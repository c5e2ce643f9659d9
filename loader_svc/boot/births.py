"""Devices that come and go while modules load, and what the kernel says of them.

A device that is not there from the beginning appears when the init of the module that is bound to its nearest ancestor
with a modalias has returned, or at once where that module was there before the ancestor. A module's own uevent comes
when it is live (``do_init_module``, kernel/module/main.c, Linux 6.12), those of its driver and its devices before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from loader_svc.boot.device import Device, trigger_order
from loader_svc.boot.kmod import Kmod
from loader_svc.boot.machine import Machine

UNBOUND: Final = frozenset({"", "acpi", "cpu", "dmi", "input"})
"""What modaliases begin with whose devices get no driver by them: matched in other ways, or by handlers."""


class Change(NamedTuple):
    """A uevent that the kernel sends."""

    action: str
    device: Device


class _Waiting(NamedTuple):
    """A device that is not there yet."""

    device: Device
    module: str
    """Whose init brings it to life."""
    parent: str
    """The device above it that has to be there before; empty for none that is not there from the beginning."""


class Births:
    """Which devices there are, and which wait for what. One for each boot."""

    def __init__(self, machine: Machine, kmod: Kmod) -> None:
        self._kmod = kmod
        self._live: set[str] = set()
        self._of_module: defaultdict[str, list[_Waiting]] = defaultdict(list)
        self._of_parent: defaultdict[str, list[_Waiting]] = defaultdict(list)
        self._bound: defaultdict[str, list[Device]] = defaultdict(list)
        self._dying: defaultdict[str, list[Device]] = defaultdict(list)
        born = {device.path: device for device in machine.born}
        with_modalias = {device.path: device for device in (*machine.triggered, *machine.born) if device.modalias}
        makers: dict[str, str] = {}
        for device in trigger_order(machine.born):
            maker = makers[device.path] = self._maker(device, with_modalias, makers)
            parent = next((above for above in _above(device.path) if above in born), "")
            waiting = _Waiting(device, maker, parent)
            if parent:
                self._of_parent[parent].append(waiting)
            else:
                self._of_module[maker].append(waiting)
        for device in machine.triggered:
            if device.dies_with:
                self._dying[device.dies_with].append(device)
            if module := self._driver(device):
                self._bound[module].append(device)

    def live(self, module: str) -> Iterator[Change]:
        """Yield what the kernel says when the init of a module has returned and the module is live.

        Nothing for a module that was live before.
        """
        if module in self._live:
            return
        self._live.add(module)
        bound = self._bound.pop(module, ())
        for device in bound:
            yield Change("bind", device)
        if bound:
            bus = bound[0].modalias.partition(":")[0]
            yield Change("add", Device(f"/bus/{bus}/drivers/{module}"))
        for waiting in self._of_module.pop(module, ()):
            yield from self._appear(waiting.device)
        for device in self._dying.pop(module, ()):
            yield Change("remove", device)
        yield Change("add", Device(f"/module/{module}"))

    def makers(self) -> dict[str, str]:
        """Return the module that brings each device to life that has not appeared, by the device's modalias."""
        found = {each.device.modalias: module for module, waiting in self._of_module.items() for each in waiting}
        for table in self._of_parent.values():
            found |= {waiting.device.modalias: waiting.module for waiting in table}
        return found

    @property
    def unborn(self) -> list[Device]:
        """The devices that have not appeared."""
        tables = (*self._of_module.values(), *self._of_parent.values())
        return [waiting.device for table in tables for waiting in table]

    def _appear(self, device: Device) -> Iterator[Change]:
        todo = [device]
        while todo:
            device = todo.pop()
            yield Change("add", device)
            if device.dies_with:
                self._dying[device.dies_with].append(device)
            module = self._driver(device)
            if module in self._live:
                yield Change("bind", device)
            elif module:
                self._bound[module].append(device)
            for waiting in reversed(self._of_parent.pop(device.path, [])):
                if waiting.module in self._live:
                    todo.append(waiting.device)
                else:
                    self._of_module[waiting.module].append(waiting)

    def _maker(self, device: Device, with_modalias: dict[str, Device], makers: dict[str, str]) -> str:
        """Return the module whose init brings a device to life; empty if nothing tells."""
        if device.born_of:
            return device.born_of
        above = next((with_modalias[path] for path in _above(device.path) if path in with_modalias), None)
        if above is None:
            return ""
        # What has no driver by its modalias was made by a module that looks after it itself.
        return above.driver or self._first_module(above.modalias) or makers.get(above.path, "")

    def _driver(self, device: Device) -> str:
        """Return the module whose driver a device gets by its modalias; empty for none."""
        if device.modalias.partition(":")[0] in UNBOUND:
            return ""
        return device.driver or self._first_module(device.modalias)

    def _first_module(self, modalias: str) -> str:
        return next((entry.module for entry in self._kmod.plan(modalias).entries if entry.insertions), "")


def _above(path: str) -> Iterable[str]:
    """Yield the directories above a path, nearest first."""
    at = path.rfind("/")
    while at > 0:
        path = path[:at]
        yield path
        at = path.rfind("/")
