"""Remedies in udev and libkmod."""

from __future__ import annotations

from dataclasses import replace

from loader_svc.boot import BootSpec


class RequestOnce:
    """A cache in udev: events with a MODALIAS that was asked for already wait for that, and ask for nothing."""

    name = "request-once"
    sentence = "udev asks once for each distinct MODALIAS, later events with it wait for that"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such a udev."""
        return replace(spec, userland=replace(spec.userland, one_request_per_modalias=True))


class ModuleLock:
    """A lock in libkmod: who wants to load a module that is being loaded waits, and looks at its state again."""

    name = "libkmod-lock"
    sentence = "libkmod holds a lock while it loads a module, and looks at its state again behind it"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such a libkmod."""
        return replace(spec, userland=replace(spec.userland, locks_modules=True))


class Workers:
    """Fewer workers of udev (``udev.children_max=`` on the kernel's command line)."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"workers:{workers}"
        self.sentence = f"udev has {workers} workers at most"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with that many workers; the same if there are no more of them anyway."""
        machine = spec.machine
        fewer = replace(spec.userland, udev_workers=self.workers)
        return (
            replace(spec, userland=fewer)
            if self.workers < spec.userland.workers(machine.cpus, machine.memory_bytes)
            else spec
        )


class Blacklisted:
    """Modules on a blacklist: no alias leads to them. What they did is then not done at all."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self.name = f"blacklist:{','.join(modules)}"
        self.sentence = f"{' and '.join(modules)} on a blacklist: not loaded, and not there"

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with such a configuration."""
        return replace(spec, modules=replace(spec.modules, blacklist=spec.modules.blacklist | {*self.modules}))
