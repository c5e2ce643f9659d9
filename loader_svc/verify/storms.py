"""Storms: many workers released together on one module. What is no race has to agree exactly, the rest in its order.

Of each row: the calls and their results, the sizes, the bytes as the rule has them, the peak of memory by the law
``N * pages(file) + (late duplicates + 1) * layout``, within 5 % and 1 MiB, in the measurement and in the simulation
alike. Of each group of repetitions: how many duplicates were found late, within a factor. Rows of a chain of modules,
of which not all are at hand, are held against their own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from loader_svc.memory import page_round
from loader_svc.plan import Plan
from loader_svc.verify.agreement import Agreement, Row, number, read_table
from loader_svc.verify.crowd import Crowd, Target, Targets
from loader_svc.verify.files import Files
from loader_svc.verify.kernels import identity_of, policy_of
from modpressure.kernel.counters import Counters
from modpressure.kernel.identity import KernelIdentity

COLUMNS: Final = (
    *("kernel", "module", "compressed", "N", "smp", "rep", "modcount", "failed_becoming", "failed_load"),
    *("invalid_becoming_bytes", "invalid_mod_bytes", "separate_copies", "files_per_worker", "ok", "eexist", "ebusy"),
    *("other", "vmallocused_before_kb", "vmallocused_peak_kb", "total_mod_size", "total_text_size"),
    *("failed_kreads", "failed_decompress"),
)

PEAK_SHARE: Final = 0.05
PEAK_BYTES: Final = 1 << 20
SPLIT_FACTOR: Final = 3.0
SPLIT_CALLS: Final = 2.0
SPLIT_SHARE: Final = 0.05
"""A mean of late duplicates agrees with another one within this factor, this many calls and this share of all."""

Group = tuple[str, str, str, int, str, int]


@dataclass(slots=True)
class _Simulated:
    counters: Counters
    errnos: dict[str, int]
    peak_bytes: int


def verify_storms(table: Path, directories: Sequence[Path], identity: KernelIdentity) -> Agreement:
    """Repeat every storm of a table in virtual time and compare. NotFound, BadRequest."""
    rows = read_table(table, COLUMNS)
    agreement = Agreement()
    with Files(directories) as files:
        targets: dict[str, Targets] = {}
        late: dict[Group, tuple[list[int], list[int]]] = {}
        for row in rows:
            kernel = row["kernel"]
            if kernel not in targets:
                targets[kernel] = Targets(files, identity_of(kernel, identity))
            if number(row, "files_per_worker") > 1:
                agreement.add(_where(row), _chain_differences(row, rows))
                continue
            target = targets[kernel].find(row["module"], suffix=_suffix(row, identity_of(kernel, identity)))
            if target is None:
                agreement.add(_where(row), [f"not run, there is no file of {row['module']} or of what it needs"])
                continue
            plan = targets[kernel].plan(target)
            simulated = _simulate(row, target, targets[kernel], identity_of(kernel, identity))
            agreement.add(_where(row), _differences(row, plan, simulated))
            measured_late, simulated_late = late.setdefault(_group(row), ([], []))
            measured_late.append(number(row, "failed_load"))
            simulated_late.append(simulated.counters.failed_load_modules)
    for group, (measured_late, simulated_late) in late.items():
        where = f"{' '.join(map(str, group[:2]))} N={group[3]}{' packed' * (group[2] != '0')}: late duplicates"
        agreement.add(where, _split_differences(measured_late, simulated_late, workers=group[3]))
    return agreement


def _group(row: Row) -> Group:
    return (
        row["kernel"],
        row["module"],
        row["compressed"],
        number(row, "N"),
        row["separate_copies"],
        number(row, "smp"),
    )


def _where(row: Row) -> str:
    packed, copies = " packed" * (row["compressed"] != "0"), " copies" * (row["separate_copies"] != "0")
    return f"{row['kernel']} {row['module']} N={row['N']}{packed}{copies} repetition {row['rep']}"


def _suffix(row: Row, identity: KernelIdentity) -> str:
    if row["compressed"] == "0":
        return ""
    return {"gzip": ".gz", "xz": ".xz", "zstd": ".zst"}[identity.decompressor_for(None) or "zstd"]


def _simulate(row: Row, target: Target, targets: Targets, identity: KernelIdentity) -> _Simulated:
    crowd = Crowd(
        identity,
        policy_of(row["kernel"]),
        targets.plans,
        cpus=number(row, "smp"),
        seed=number(row, "rep") * 1009 + number(row, "N"),
        separate_copies=row["separate_copies"] != "0",
    )
    crowd.prepare(target)
    held_bytes = crowd.machine.held_bytes
    crowd.release(target, number(row, "N"))
    crowd.machine.run()
    return _Simulated(crowd.machine.counters, dict(crowd.errnos), crowd.machine.peak_bytes - held_bytes)


def _differences(row: Row, plan: Plan, simulated: _Simulated) -> list[str]:
    counters, workers = simulated.counters, number(row, "N")
    is_shared = policy_of(row["kernel"]).share_in_flight and row["separate_copies"] == "0"
    differing = _unequal(
        row,
        ("modcount", counters.modcount),
        ("total_mod_size", counters.total_mod_size),
        ("total_text_size", counters.total_text_size),
        ("failed_kreads", counters.failed_kreads),
        ("failed_decompress", counters.failed_decompress),
    )
    if is_shared and number(row, "eexist"):
        differing += _straggler_differences(row, workers)
    else:
        differing += _result_differences(row, simulated, workers)
    if is_shared:
        # One call works and all others take its result: nothing is left to chance.
        differing += _unlike("simulated results that are not shared", 0, workers - simulated.errnos.get("", 0))
    packed_bytes = plan.version.size_bytes if plan.is_packed else 0
    early_bytes, late_bytes = plan.image_bytes + packed_bytes, 2 * plan.image_bytes + packed_bytes
    differing += _rule(row, "failed_becoming", "invalid_becoming_bytes", early_bytes)
    differing += _rule(row, "failed_load", "invalid_mod_bytes", late_bytes)
    becoming_bytes, mod_bytes = counters.failed_becoming * early_bytes, counters.failed_load_modules * late_bytes
    differing += _unlike("bytes of early duplicates, by the rule", becoming_bytes, counters.invalid_becoming_bytes)
    differing += _unlike("bytes of late duplicates, by the rule", mod_bytes, counters.invalid_mod_bytes)
    if not plan.is_packed:
        readers = 1 if is_shared else workers
        peak_bytes = (number(row, "vmallocused_peak_kb") - number(row, "vmallocused_before_kb")) * 1024
        differing += _peak("measured", peak_bytes, plan, readers, number(row, "failed_load"))
        differing += _peak("simulated", simulated.peak_bytes, plan, readers, counters.failed_load_modules)
    return differing


def _result_differences(row: Row, simulated: _Simulated, workers: int) -> list[str]:
    """Compare the results of the calls, and how many were duplicates."""
    known = {"ok": "", "eexist": "EEXIST", "ebusy": "EBUSY"}
    results = {column: simulated.errnos.get(errno, 0) for column, errno in known.items()}
    results["other"] = workers - sum(results.values())
    counters = simulated.counters
    duplicates = counters.failed_becoming + counters.failed_load_modules
    return [
        *_unequal(row, *results.items()),
        *_unlike("duplicates", number(row, "failed_becoming") + number(row, "failed_load"), duplicates),
    ]


def _straggler_differences(row: Row, workers: int) -> list[str]:
    """Hold a row against itself where some call came after the one that all others shared had ended.

    A straggler finds the module live; others that come while it works share its EEXIST without being counted.
    """
    ok, eexist, becoming = number(row, "ok"), number(row, "eexist"), number(row, "failed_becoming")
    if ok + eexist == workers and 0 < becoming <= eexist and not number(row, "failed_load"):
        return []
    return [f"{ok} and {eexist} results of {workers} calls, {becoming} and {row['failed_load']} duplicates"]


def _unequal(row: Row, *pairs: tuple[str, int]) -> list[str]:
    return [each for column, simulated in pairs for each in _unlike(column, number(row, column), simulated)]


def _unlike(what: str, measured: int, simulated: int) -> list[str]:
    return [] if measured == simulated else [f"{what} measured {measured}, simulated {simulated}"]


def _rule(row: Row, count: str, size: str, each_bytes: int) -> list[str]:
    """Hold a row's bytes against its own count and the length of the file."""
    expected = number(row, count) * each_bytes
    measured = number(row, size)
    return [] if measured == expected else [f"{size} measured {measured}, by the rule {expected}"]


def _peak(which: str, peak_bytes: int, plan: Plan, readers: int, late: int) -> list[str]:
    law_bytes = readers * page_round(plan.version.size_bytes) + (late + 1) * plan.layout_bytes
    if abs(peak_bytes - law_bytes) <= PEAK_SHARE * law_bytes + PEAK_BYTES:
        return []
    return [f"{which} peak {peak_bytes} bytes, by the law {law_bytes}"]


def _split_differences(measured: Iterable[int], simulated: Iterable[int], *, workers: int) -> list[str]:
    a, b = fmean(measured), fmean(simulated)
    if max(a, b) <= SPLIT_FACTOR * min(a, b) + SPLIT_CALLS + SPLIT_SHARE * workers:
        return []
    return [f"measured {a:.1f} on average, simulated {b:.1f}"]


def _chain_differences(row: Row, rows: Sequence[Row]) -> list[str]:
    """Hold a row of a chain of modules against its arithmetic and that of the other rows of its kind."""
    workers, modules = number(row, "N"), number(row, "files_per_worker")
    calls = sum(number(row, column) for column in ("ok", "eexist", "ebusy", "other"))
    becoming, late = number(row, "failed_becoming"), number(row, "failed_load")
    differing = []
    if calls != workers * modules:
        differing.append(f"{calls} results of {workers * modules} calls")
    if number(row, "modcount") != modules:
        differing.append(f"modcount {row['modcount']} of {modules} modules")
    differing += [
        f"{column} {row[column]} is not that of the other rows"
        for column in ("total_mod_size", "total_text_size")
        if any(row[column] != other[column] for other in rows if other["module"] == row["module"])
    ]
    early_bytes, late_bytes = number(row, "invalid_becoming_bytes"), number(row, "invalid_mod_bytes")
    if bool(becoming) != bool(early_bytes) or bool(late) != bool(late_bytes) or late_bytes % 2:
        differing.append(f"bytes {early_bytes} and {late_bytes} of {becoming} and {late} duplicates")
    if _is_unshared(row):
        # Every worker but one is a duplicate at every module, so all lengths are in there N - 1 times.
        if becoming + late != calls - number(row, "ok") or number(row, "ok") != modules:
            differing.append(f"{becoming + late} duplicates, {calls - number(row, 'ok')} failures")
        others = {_chain_bytes(other) for other in rows if other["module"] == row["module"] and _is_unshared(other)}
        if len(others - {None}) > 1:
            differing.append(f"the files' lengths come to {_chain_bytes(row)} bytes, elsewhere to other ones")
    elif becoming + late > calls - number(row, "ok"):
        differing.append(f"{becoming + late} duplicates counted, {calls - number(row, 'ok')} calls failed")
    return differing


def _is_unshared(row: Row) -> bool:
    return not policy_of(row["kernel"]).share_in_flight or row["separate_copies"] != "0"


def _chain_bytes(row: Row) -> float | None:
    """Return the sum of the lengths of a chain's files by what a row says was wasted; None where that was nothing."""
    workers = number(row, "N")
    if workers < 2:
        return None
    return (number(row, "invalid_becoming_bytes") + number(row, "invalid_mod_bytes") / 2) / (workers - 1)
