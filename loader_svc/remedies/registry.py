"""All remedies that there are: those of this package, and a user's own.

A user's own come from entry points of the group ``modpressure.remedies``: the entry point's name is the remedy's, its
object is a `Remedy` or a class that makes one without arguments. ``docs/sweep.md`` has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from loader_svc.boot import BootSpec
from loader_svc.boot.files import files_of
from loader_svc.remedies.files import (
    COMPRESSIONS,
    Compression,
    KernelDecompresses,
    LibkmodDecompresses,
    Merged,
    compression_of,
)
from loader_svc.remedies.kernel import BuiltIn, EarlyCheck, NewerKernel, SharedResults
from loader_svc.remedies.remedy import Remedy, RemedyError, applied
from loader_svc.remedies.userland import Blacklisted, ModuleLock, RequestOnce, Workers
from loader_svc.trees.names import checked_name

GROUP: Final = "modpressure.remedies"
FEW_WORKERS: Final = 16
"""What ``workers`` stands for where no number is given: the part of udev's own limit that does not grow with the CPUs
(src/udev/udevd.c, systemd 252)."""

_PLAIN: Final[dict[str, Callable[[], Remedy]]] = {
    each.name: each
    for each in (
        NewerKernel,
        EarlyCheck,
        SharedResults,
        RequestOnce,
        ModuleLock,
        KernelDecompresses,
        LibkmodDecompresses,
    )
}


class Combined:
    """Several remedies together, one after the other."""

    def __init__(self, *remedies: Remedy) -> None:
        self._remedies = remedies
        self.name = "+".join(remedy.name for remedy in remedies)
        self.sentence = "; ".join(remedy.sentence for remedy in remedies)

    def apply(self, spec: BootSpec) -> BootSpec:
        """Return the boot with all of them."""
        for remedy in self._remedies:
            spec = applied(remedy, spec)
        return spec


def remedy_named(text: str) -> Remedy:
    """Return the remedy that a text means: ``request-once``, ``workers:8``, ``builtin:kvm,nvme``, or some with ``+``.

    RemedyError names what is unknown.
    """
    parts = [_single(part.strip()) for part in text.split("+")]
    return parts[0] if len(parts) == 1 else Combined(*parts)


def own_remedies() -> list[Remedy]:
    """Return the remedies of a user's entry points, by name. RemedyError if one can't be had."""
    return [_load(point) for point in sorted(entry_points(group=GROUP), key=lambda each: each.name)]


def usual_remedies(spec: BootSpec, worst: str) -> list[Remedy]:
    """Return the remedies that are worth a look for a boot.

    ``worst`` is the module that wastes most in it, empty for none. RemedyError if a user's own can't be had.
    """
    found: list[Remedy] = [
        NewerKernel(),
        EarlyCheck(),
        SharedResults(),
        RequestOnce(),
        ModuleLock(),
        Workers(FEW_WORKERS),
    ]
    if worst:
        found += [BuiltIn(worst), Blacklisted(*_asked_for(spec, worst)), Merged(worst)]
    packed = compression_of(spec)
    if packed:
        found += [Compression("plain"), KernelDecompresses(), LibkmodDecompresses()]
        found += [Compression(word) for word, kind in COMPRESSIONS.items() if kind not in ("", "gz", packed)]
    else:
        found += [
            Combined(Compression("zst"), KernelDecompresses()),
            Combined(Compression("zst"), LibkmodDecompresses()),
        ]
    return [*found, *own_remedies()]


def _asked_for(spec: BootSpec, module: str) -> list[str]:
    """Return the modules that the machine's aliases lead to, and that bring a module along.

    A blacklist keeps aliases from leading to a module, but not its users from needing it.
    """
    kmod = files_of(spec).kmod
    entries = [entry for modalias in spec.machine.modaliases() for entry in kmod.plan(modalias).entries]
    found = [entry.module for entry in entries if module in (each.module for each in entry.insertions)]
    return list(dict.fromkeys([module, *found]))


def _single(text: str) -> Remedy:
    word, _, argument = text.partition(":")
    if word in _PLAIN and not argument:
        return _PLAIN[word]()
    modules = [checked_name(each.strip()) for each in argument.split(",")] if argument else []
    if word in ("builtin", "blacklist") and modules:
        return (BuiltIn if word == "builtin" else Blacklisted)(*modules)
    if word == "merge" and len(modules) == 1:
        return Merged(modules[0])
    if word == "files" and argument in COMPRESSIONS:
        return Compression(argument)
    if word == "workers":
        if not argument:
            return Workers(FEW_WORKERS)
        if argument.isascii() and argument.isdigit() and int(argument):
            return Workers(int(argument))
    for point in entry_points(group=GROUP, name=text):
        return _load(point)
    known = [
        *_PLAIN,
        "workers:N",
        "builtin:MODULE",
        "blacklist:MODULE",
        "merge:MODULE",
        f"files:{'|'.join(COMPRESSIONS)}",
    ]
    known += [point.name for point in entry_points(group=GROUP)]
    raise RemedyError(f"there is no remedy {text!r}; there are {', '.join(known)}")


def _load(point: EntryPoint) -> Remedy:
    try:
        found = point.load()
        remedy = found() if isinstance(found, type) else found
    except Exception as error:
        why = " ".join(str(error).split()) or "no more is known"
        raise RemedyError(
            f"remedy {point.name!r} ({point.value}) can't be had: {type(error).__name__}: {why}"
        ) from error
    if not isinstance(remedy, Remedy):
        raise RemedyError(f"remedy {point.name!r} ({point.value}) lacks a name, a sentence or apply()")
    return remedy
