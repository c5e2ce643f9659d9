"""What the loads of a recorded boot took, step by step, as its trace has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from loader_svc.verify.boots.recorded import TraceEvent

UDEVD = "systemd-udevd"
MODPROBE = "modprobe"


@dataclass(slots=True)
class Load:
    """One load that went as far as its init function. Times are of the guest's clock, in ns."""

    module: str
    begun_ns: int = 0
    read_ns: int = 0
    """When its file had been read."""
    laid_out_ns: int = 0
    formed_ns: int = 0
    """When its name was in the list."""
    linked_ns: int = 0
    """When it had been linked, and its copy was freed."""
    init_ns: int = 0
    inited_ns: int = 0
    live_ns: int = 0
    """When it was counted, having woken the others; 0 if its init failed."""
    layout_bytes: int = 0
    file_bytes: int = 0
    errno: int = 0
    """What its init returned, negative; 0 for success."""


@dataclass(slots=True)
class Spans:
    """What one trace tells of costs."""

    loads: list[Load] = field(default_factory=list)
    """In the order in which their inits returned."""
    frees_ns: list[tuple[str, int]] = field(default_factory=list)
    """What freeing the layout of a duplicate took, and of which module it was."""
    between_ns: list[int] = field(default_factory=list)
    """From the end of a worker's call to the beginning of its next one."""
    forks_ns: list[int] = field(default_factory=list)
    """When udevd forked, the first time for itself."""
    calls_ns: list[int] = field(default_factory=list)
    """When calls began."""
    asked: dict[str, list[str]] = field(default_factory=dict)
    """What the kernel asked modprobe for, by the module whose init it was in, or that had made a device last."""


def spans_of(events: Iterable[TraceEvent]) -> Spans:
    """Read a trace."""
    spans = Spans()
    loads: dict[int, Load] = {}
    last: dict[int, tuple[str, int]] = {}
    inited: list[str] = []
    for event in events:
        kind, pid, at_ns = event.event, event.pid, event.at_ns
        if kind == "fork":
            if event.command == UDEVD:
                spans.forks_ns.append(at_ns)
            continue
        if kind == "module_request":
            load = loads.get(pid)
            asking = load.module if load is not None else (inited[-1] if inited else "")
            if asking:
                spans.asked.setdefault(asking, []).append(event.module)
            continue
        before = last.get(pid)
        last[pid] = (kind, at_ns)
        if kind in ("FIN", "INIMOD", "INI"):
            spans.calls_ns.append(at_ns)
            if before is not None and before[0] == "EXIT" and event.command != MODPROBE:
                spans.between_ns.append(at_ns - before[1])
            loads[pid] = Load(event.module, begun_ns=at_ns)
            continue
        load = loads.get(pid)
        if load is None:
            continue
        if kind == "READ":
            load.read_ns = at_ns
            load.file_bytes = _value(event.details, "len")
        elif kind == "ALLOC":
            load.laid_out_ns = at_ns
            load.layout_bytes = _value(event.details, "total")
        elif kind == "FORMED":
            load.formed_ns = at_ns
        elif kind == "FREECOPY":
            load.linked_ns = at_ns
            if before is not None and before[0] == "DUP" and load.layout_bytes:
                spans.frees_ns.append((event.module, at_ns - before[1]))
        elif kind == "INIT":
            load.init_ns = at_ns
        elif kind == "INITRET":
            load.inited_ns = at_ns
            load.errno = _value(event.details, "ret")
            spans.loads.append(load)
            inited.append(load.module)
        elif kind == "LIVE":
            load.live_ns = at_ns
        elif kind == "EXIT":
            del loads[pid]
    return spans


def _value(details: str, name: str) -> int:
    for part in details.split():
        key, _, value = part.partition("=")
        if key == name:
            return int(value)
    return 0


def by_module(spans: Iterable[Spans]) -> dict[str, list[Load]]:
    """Return the loads of all traces by module."""
    found: defaultdict[str, list[Load]] = defaultdict(list)
    for each in spans:
        for load in each.loads:
            found[load.module].append(load)
    return dict(found)
