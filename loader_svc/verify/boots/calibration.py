"""What things cost on a recorded machine, taken from its boots with two CPUs and from no others.

Two CPUs on two cores of the host never wait for a core. They do wait for each other, and workers for a CPU; so of what
a step took with one module, the least that any boot saw is taken for what it takes without waiting. What no trace shows
is as bundled, times the factor by which the emulated machine is slower where both are known.
"""

from __future__ import annotations

import errno as errnos
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Final

from loader_svc.verify.boots.fit import Long, Start, Steps
from loader_svc.verify.boots.recorded import CALIBRATION_CPUS, RecordedBoot, Recording
from loader_svc.verify.boots.spans import Load, Spans, by_module, spans_of
from loader_svc.virtual.costs import Costs, default_costs
from modpressure.errors import BadRequest

SHORT: Final = 0.1
"""The share of steps between two calls of a worker that is taken for what lies between them at least."""

ASYNC_NS: Final = 20_000_000
"""A load that takes longer from the end of its init to its own waits for what was left to be done asynchronously."""

LONG_NS: Final = 5_000_000
"""A step that never took less had others want its CPU meanwhile, in each boot."""

_SCALED: Final = (
    *("alias_ns", "name_ns", "exec_ns", "event_ns", "trigger_ns"),
    *("list_lock_ns", "wake_ns", "wake_latency_ns", "free_page_ns", "remove_ns"),
)
"""Costs that no trace shows."""

_INCLUDED: Final = (
    *("allocate_lock_ns", "page_ns", "page_lock_ns"),  # in what reading and laying out take
    *("import_ns", "symbol_ns"),  # in what relocations take, which grow with them
)
"""Costs that are part of others here."""

_DECOMPRESSION: Final = ("zstd_ns_per_byte", "xz_ns_per_byte", "gzip_ns_per_byte")


@dataclass(frozen=True)
class Calibration:
    """What the boots with two CPUs tell."""

    costs: Costs
    failing: Mapping[str, Mapping[str, str]]
    """The errnos of init functions that fail, by CPU model and module."""
    steps: Steps
    """The links and init functions that take long: what ``fit`` goes by."""
    asked: Mapping[str, Sequence[str]]
    """What the kernel asks modprobe for, by the module whose init it follows."""
    start: Start
    """How the boots started: what ``fit`` goes by."""
    boots: tuple[RecordedBoot, ...]


def calibrating_boots(recording: Recording) -> tuple[RecordedBoot, ...]:
    """Return the boots that costs can be taken from. BadRequest if there is none."""
    boots = recording.calibrating
    if not boots:
        raise BadRequest(
            f"{recording.directory} has no boot with {CALIBRATION_CPUS} CPUs and a trace: --calibrate DIR names one"
        )
    return boots


def calibrated(
    recording: Recording, relocations: Callable[[str], int], born_of: Callable[[str], str], base: Costs | None = None
) -> Calibration:
    """Return what a directory's boots with two CPUs tell. BadRequest if there is none with a trace.

    ``relocations`` gives a module's number of them, ``born_of`` the module that makes the device of a modalias (empty
    for none); ``base`` has what decompressing takes, the bundled costs if None.
    """
    boots = calibrating_boots(recording)
    base = default_costs() if base is None else base
    traces = [spans_of(recording.trace(boot)) for boot in boots]
    loads = by_module(traces)
    failing: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for boot, trace in zip(boots, traces, strict=True):
        for load in trace.loads:
            if load.errno:
                name = errnos.errorcode.get(-load.errno, "EIO")
                failing[boot.setting.cpu_model][load.module] = name
    least = {module: _least(each) for module, each in loads.items()}
    costs = _costs(traces, least, relocations, base)
    return Calibration(
        costs=replace(costs, source=_sources(costs, base, recording, boots)),
        failing=dict(failing),
        steps={
            **_long("link", loads, lambda load: load.linked_ns - load.formed_ns if load.linked_ns else 0),
            **_long("init", loads, lambda load: load.inited_ns - load.init_ns if load.init_ns else 0),
        },
        asked=_asked(traces, born_of),
        start=Start.middle(Start.of(trace.forks_ns[1:], trace.calls_ns) for trace in traces),
        boots=boots,
    )


def _costs(traces: Sequence[Spans], least: Mapping[str, Load], relocations: Callable[[str], int], base: Costs) -> Costs:
    bundled = default_costs()
    values: dict[str, Any] = {name: getattr(base, name) for name in _DECOMPRESSION}
    # --- between calls: one look at initstate, and an open ---
    between_ns = _quantile(sorted(ns for trace in traces for ns in trace.between_ns), SHORT)
    slower = between_ns / (bundled.initstate_ns + bundled.open_ns)
    values |= {name: round(getattr(bundled, name) * slower, 4) for name in _SCALED}
    values |= {name: round(values[name]) for name in _SCALED}
    values["initstate_ns"] = round(bundled.initstate_ns * slower)
    values["open_ns"] = round(bundled.open_ns * slower)
    # --- within a call ---
    entered_ns, byte_ns = _line((each.file_bytes, each.read_ns) for each in least.values() if each.read_ns)
    values["syscall_ns"], values["read_cached_ns_per_byte"] = max(0, round(entered_ns)), max(0.0, round(byte_ns, 4))
    laid_out_ns, byte_ns = _line((each.layout_bytes, each.laid_out_ns) for each in least.values() if each.laid_out_ns)
    values["copy_ns_per_byte"] = max(0.0, round(byte_ns, 4))
    # The early check is in between: what is before it, and what behind it, is told apart as in the bundled costs.
    inspecting = bundled.inspect_ns / (bundled.inspect_ns + AREAS * bundled.allocate_ns)
    values["inspect_ns"] = max(0, round(inspecting * laid_out_ns))
    values["allocate_ns"] = max(0, round((1 - inspecting) / AREAS * laid_out_ns))
    link_ns, relocation_ns = _floor((relocations(module), each.linked_ns) for module, each in least.items())
    values["link_ns"], values["relocation_ns"] = round(link_ns), round(relocation_ns)
    values |= dict.fromkeys(_INCLUDED, 0)
    values["init"] = {module: each.inited_ns for module, each in least.items() if each.inited_ns < LONG_NS}
    values["init_ns"] = round(median(each.inited_ns for each in least.values()))
    values["live_tail_ns"] = round(median(each.live_ns for each in least.values() if each.live_ns))
    values["async_probe"] = _async_probes(traces)
    # --- forks: udevd has a CPU to itself between the closest ones ---
    pauses_ns = sorted(later - sooner for trace in traces for sooner, later in pairwise(trace.forks_ns[1:]))
    values["fork_ns"] = round(_quantile(pauses_ns, SHORT))
    # --- flushes ---
    frees: defaultdict[str, list[int]] = defaultdict(list)
    for trace in traces:
        for module, ns in trace.frees_ns:
            frees[module].append(ns)
    if frees:
        flush_ns = median(min(each) for each in frees.values()) / AREAS
        values["flush_ns"], values["flush_ns_per_cpu"] = 0, round(flush_ns / CALIBRATION_CPUS)
    return replace(base, **values)


AREAS: Final = 6
"""Areas of a layout, as most modules have them, each with a flush when it is freed."""


def _async_probes(traces: Iterable[Spans]) -> dict[str, int]:
    """Return how long what init functions left to others took, by module.

    All loads that end meanwhile wait for it, so a module left something if its own load never ended soon, and at least
    once no other waited already when its init returned. The least of its waits is what that took.
    """
    waits: defaultdict[str, list[int]] = defaultdict(list)
    first: set[str] = set()
    for trace in traces:
        waiting_until_ns = 0
        for load in trace.loads:  # in the order in which their inits returned
            if not load.live_ns:
                continue
            waited_ns = load.live_ns - load.inited_ns
            waits[load.module].append(waited_ns)
            if waited_ns > ASYNC_NS:
                if waiting_until_ns <= load.inited_ns:
                    first.add(load.module)
                waiting_until_ns = max(waiting_until_ns, load.live_ns)
    return {module: min(each) for module, each in sorted(waits.items()) if module in first and min(each) > ASYNC_NS}


def _long(step: str, loads: Mapping[str, Iterable[Load]], took_ns: Callable[[Load], int]) -> Steps:
    """Return what a step takes with the modules with which it takes long."""
    found = {}
    for module, each in loads.items():
        taken = [ns for ns in map(took_ns, each) if ns]
        if taken and min(taken) >= LONG_NS:
            found[step, module] = Long(min(taken), median(taken))
    return found


def _least(loads: Iterable[Load]) -> Load:
    """Return the least that each step took, in the place of the moment at which it ended."""
    loads = list(loads)

    def least(begin: str, end: str) -> int:
        return min(
            (
                getattr(load, end) - getattr(load, begin)
                for load in loads
                if getattr(load, begin) and getattr(load, end)
            ),
            default=0,
        )

    return Load(
        loads[0].module,
        file_bytes=loads[0].file_bytes,
        layout_bytes=max(load.layout_bytes for load in loads),
        read_ns=least("begun_ns", "read_ns"),
        laid_out_ns=least("read_ns", "laid_out_ns"),
        formed_ns=least("laid_out_ns", "formed_ns"),
        linked_ns=least("formed_ns", "linked_ns"),
        inited_ns=least("init_ns", "inited_ns"),
        live_ns=least("inited_ns", "live_ns"),
    )


def _line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return where a line through points begins and how steep it is, by medians: some points may be far off it."""
    points = sorted(points)
    slopes = [
        (upper[1] - lower[1]) / (upper[0] - lower[0])
        for at, lower in enumerate(points)
        for upper in points[at + 1 :]
        if upper[0] > lower[0]
    ]
    if not slopes:
        return (points[0][1] if points else 0.0), 0.0
    slope = max(0.0, median(slopes))
    return median(y - slope * x for x, y in points), slope


def _floor(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return where a line below nearly all points begins and how steep it is.

    Linking takes so long that even the least that any boot saw of it has waited for a CPU, but for a few modules.
    """
    points = sorted(points)
    begin = _quantile(sorted(y for _, y in points), SHORT)
    rest = points[3 * len(points) // 4 :]  # those with most, of which the beginning is a small part
    return begin, max(0.0, _quantile(sorted((y - begin) / x for x, y in rest if x), SHORT))


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0


def _asked(traces: Iterable[Spans], born_of: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Return what the kernel asks for by the module that most boots say it is for."""
    votes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for trace in traces:
        for module, names in trace.asked.items():
            for name in names:
                votes[name][born_of(name) or module] += 1
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, modules in votes.items():
        found[modules.most_common(1)[0][0]].append(name)
    return {module: tuple(names) for module, names in found.items()}


def _sources(costs: Costs, base: Costs, recording: Recording, boots: Sequence[RecordedBoot]) -> dict[str, str]:
    where = f"{len(boots)} boots with {CALIBRATION_CPUS} CPUs in {recording.directory.name}"
    source = dict.fromkeys(_SCALED, f"as bundled, slower by what a look at initstate is slower by in {where}")
    source |= {name: base.source.get(name, "") for name in _DECOMPRESSION}
    return {name: source.get(name, where) for name in costs.source}
