"""The calls of a recorded boot, one by one, as far as their order and results are no race.

Which of two workers calls first is chance, and so is what a duplicate finds. What is none: which modules are called at
all and which get live, how each is handed over (system call, flags), how long its image is and what it lays out, what
its init fails with, and the order in which one worker goes through its list.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from loader_svc.boot.files import files_of
from loader_svc.boot.simulate import simulate_boot
from loader_svc.boot.spec import BootCall, BootSpec
from loader_svc.verify.agreement import Agreement, errno_number, errno_word
from loader_svc.verify.boots.recorded import RecordedBoot, Recording
from modpressure.errors import BadRequest
from modpressure.kernel.outcome import Outcome, Syscall

PACKED_WITHIN: Final = 0.01
"""Share by which a packed file may differ in length: versions of an encoder do not pack to the same bytes."""

_SYSCALLS: Final = {"finit": Syscall.FINIT_MODULE, "init": Syscall.INIT_MODULE}


@dataclass(slots=True)
class _Expected:
    """What is to be expected of the calls for one module."""

    syscall: Syscall
    flags: int
    image_bytes: int
    compressed_bytes: int
    mod_bytes: int
    is_live: bool = False
    init_errno: str = ""


@dataclass(slots=True)
class _Order:
    """In which order one worker calls for modules."""

    place: dict[str, int] = field(default_factory=dict)
    """Where a module is in the list of each MODALIAS that leads to it, if that is the same for all of them."""
    lists: dict[str, frozenset[str]] = field(default_factory=dict)
    """The MODALIASes that lead to a module: modules with the same ones have an order among them."""

    def differences(self, calls: Sequence[tuple[int, str]], failing: set[str]) -> dict[int, str]:
        """Return what is wrong with the order of one worker's calls, each with its number, by number.

        Modules whose init fails may be called for again by a later event.
        """
        found: dict[int, str] = {}
        last: dict[frozenset[str], str] = {}
        for at, module in calls:
            group = self.lists.get(module)
            if group is None or module in failing:
                continue
            before = last.get(group)
            if before is not None and self.place[before] > self.place[module]:
                found[at] = f"called behind {before} by the same worker, before it in the simulation"
            last[group] = module
        return found


def compare_calls(recording: Recording, boot: RecordedBoot, spec: BootSpec, seed: int) -> Agreement:
    """Hold each call of a recorded boot against a simulated boot. NotFound, BadRequest for a broken table."""
    simulated: list[BootCall] = []
    simulate_boot(spec, seed, record=simulated.append)
    expected = _expected(simulated)
    order = _order(spec)
    agreement = Agreement()
    rows = recording.calls(boot)
    failing = {module for module, each in expected.items() if each.init_errno}
    by_worker: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
    for at, row in enumerate(rows):
        if row["comm"] != "modprobe":
            by_worker[row["pid"]].append((at, row["mod"]))
    disordered: dict[int, str] = {}
    for calls in by_worker.values():
        disordered |= order.differences(calls, failing)
    for at, row in enumerate(rows):
        try:
            differing = _differences(row, expected.get(row["mod"]))
        except (ValueError, KeyError):
            raise BadRequest(f"{recording.calls_path(boot)}, call {at + 1}: {row} is no call") from None
        if at in disordered:
            differing.append(disordered[at])
        agreement.add(f"{boot.name}, call {at + 1}, {row['mod']} by {row['pid']}", differing)
    _add_sets(agreement, boot, rows, expected)
    return agreement


def _expected(calls: Iterable[BootCall]) -> dict[str, _Expected]:
    found: dict[str, _Expected] = {}
    for call in calls:
        each = found.get(call.module)
        if each is None:
            each = found[call.module] = _Expected(
                call.syscall, call.flags, call.image_bytes, call.compressed_bytes, call.mod_bytes
            )
        if call.outcome is Outcome.LIVE:
            each.is_live = True
        elif call.outcome is Outcome.INIT:
            each.init_errno = call.errno
    return found


def _order(spec: BootSpec) -> _Order:
    kmod = files_of(spec).kmod
    lists: defaultdict[str, set[str]] = defaultdict(set)
    places: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for modalias in spec.machine.modaliases():
        plan = tuple(dict.fromkeys(each.module for entry in kmod.plan(modalias).entries for each in entry.insertions))
        for module in plan:
            lists[module].add(modalias)
            places[module].add(plan)
    order = _Order()
    for module, plans in places.items():
        if len(plans) == 1:
            order.place[module] = next(iter(plans)).index(module)
            order.lists[module] = frozenset(lists[module])
    return order


def _differences(row: Mapping[str, str], expected: _Expected | None) -> list[str]:
    if expected is None:
        return ["not called for in the simulation"]
    pairs = [
        ("system call", _SYSCALLS[row["sys"]].name.lower(), expected.syscall.name.lower()),
        ("flags", int(row["flags"] or 0), expected.flags),
    ]
    if row["len"]:
        pairs.append(("image bytes", int(row["len"]), expected.image_bytes))
    if row["mem"]:
        pairs.append(("laid out bytes", int(row["mem"]), expected.mod_bytes))
    if row["initret"]:
        pairs.append(("init", errno_word(-int(row["initret"])), errno_word(errno_number(expected.init_errno))))
    differing = [f"{what} recorded {real}, simulated {virtual}" for what, real, virtual in pairs if real != virtual]
    compressed_bytes = int(row["clen"] or 0)
    # What took another call's result has read nothing.
    if row["len"] and abs(compressed_bytes - expected.compressed_bytes) > PACKED_WITHIN * compressed_bytes:
        differing.append(f"compressed bytes recorded {compressed_bytes}, simulated {expected.compressed_bytes}")
    return differing


def _add_sets(
    agreement: Agreement, boot: RecordedBoot, rows: Sequence[Mapping[str, str]], expected: Mapping[str, _Expected]
) -> None:
    called = {row["mod"] for row in rows}
    live = {row["mod"] for row in rows if row["ret"] == "0" and row["role"] == "lead"}
    for what, real, virtual in (
        ("modules called for", called, set(expected)),
        ("modules live", live, {module for module, each in expected.items() if each.is_live}),
    ):
        differing = [f"only recorded: {', '.join(sorted(real - virtual))}"] if real - virtual else []
        differing += [f"only simulated: {', '.join(sorted(virtual - real))}"] if virtual - real else []
        agreement.add(f"{boot.name}, {what}", differing)
