"""Storms: many workers released together on one module. What is no race has to agree exactly, the rest in its order.

Of each row: the calls and their results, the sizes, the bytes as the rule has them, the peak of memory by the law
``N * pages(file) + (late duplicates + 1) * layout``, within 5 % and 1 MiB, in the measurement and in the simulation
alike. Of each group of repetitions: whether as many duplicates were found late as in the simulation, whose runs differ
from each other as real ones do (``crowd.Pace``). Rows of a chain of modules, of which not all are at hand, are held
against their own arithmetic.

The law takes it that all workers meet. Where a module loads faster than workers are released they do not, and the law
is the most that can be held; how much less that may be, the simulation tells. And a measured peak has what the workers
themselves take of the vmalloc area, their kernel stacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from loader_svc.init_results import InitResults
from loader_svc.memory import page_round
from loader_svc.plan import Plan
from loader_svc.verify.agreement import MAX_CPUS, MAX_WORKERS, Agreement, Row, bounded, number, read_table
from loader_svc.verify.chains import chain_differences
from loader_svc.verify.crowd import Crowd, Target, Targets
from loader_svc.verify.files import Files
from loader_svc.verify.kernels import identity_of, policy_of
from loader_svc.verify.ranks import rank_chance
from loader_svc.verify.sharing import shared_differences
from modpressure.kernel.counters import Counters
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Outcome

COLUMNS: Final = (
    *("kernel", "module", "compressed", "N", "smp", "rep", "modcount", "failed_becoming", "failed_load"),
    *("invalid_becoming_bytes", "invalid_mod_bytes", "separate_copies", "files_per_worker", "ok", "eexist", "ebusy"),
    *("other", "vmallocused_before_kb", "vmallocused_peak_kb", "total_mod_size", "total_text_size"),
    *("failed_kreads", "failed_decompress"),
)

PEAK_SHARE: Final = 0.05
PEAK_BYTES: Final = 1 << 20
KERNEL_STACK_BYTES: Final = 16 << 10
"""A worker's kernel stack, which VmallocUsed counts (THREAD_SIZE, arch/x86/include/asm/page_64_types.h, Linux 6.12)."""

RUNS: Final = 48
"""How often a storm with a race in it is simulated."""

SPLIT_CHANCE: Final = 1e-4
"""Repetitions whose late duplicates would be found as far off by less than this chance are of another race."""

Group = tuple[str, str, str, int, str, int]

_RESULTS: Final = {"ok": "", "eexist": "EEXIST", "ebusy": "EBUSY"}


@dataclass(slots=True)
class _Simulated:
    counters: Counters
    errnos: dict[str, int]
    peak_bytes: int
    met: int
    """How many met: the one that loaded the module, and who waited for it."""
    met_late: int
    """How many of those who waited did so with a layout of their own."""


@dataclass(slots=True)
class _Storm:
    """A group of repetitions: what the workers load, and simulations of it."""

    plan: Plan
    workers: int
    is_shared: bool
    """Whether calls in flight share results: no race then, and one loader's worth of memory."""
    runs: list[_Simulated]

    def law_bytes(self, readers: int, late: int) -> int:
        """Return what so many readers hold, so many of them late, besides the one that loads it."""
        return readers * page_round(self.plan.version.size_bytes) + (late + 1) * self.plan.layout_bytes

    @property
    def readers(self) -> int:
        """How many hold the file if all workers meet."""
        return 1 if self.is_shared else self.workers

    @property
    def least_share(self) -> float:
        """The smallest part of what the law says that a simulated run came to."""
        return min(run.peak_bytes / self.law_bytes(self.readers, _late(run)) for run in self.runs)


def verify_storms(
    table: Path, directories: Sequence[Path], identity: KernelIdentity, init_results: InitResults | None = None
) -> Agreement:
    """Repeat every storm of a table in virtual time and compare. NotFound, BadRequest."""
    rows = read_table(table, COLUMNS)
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        if number(row, "files_per_worker") <= 1:
            groups.setdefault(_group(row), []).append(row)
    agreement = Agreement()
    with Files(directories) as files:
        for group, repetitions in groups.items():
            kernel = identity_of(group[0], identity)
            storm = _simulate_all(repetitions, Targets(files, kernel, init_results or InitResults()), kernel)
            for place, row in enumerate(repetitions):
                if storm is None:
                    agreement.add(_where(row), [f"not run, there is no file of {row['module']} or of what it needs"])
                else:
                    agreement.add(_where(row), _differences(row, storm, storm.runs[place % len(storm.runs)]))
            if storm is not None:
                where = _where(repetitions[0]).rpartition(" repetition")[0]
                agreement.add(f"{where}: late duplicates", _split_differences(repetitions, storm))
    for row in rows:
        if number(row, "files_per_worker") > 1:
            agreement.add(_where(row), chain_differences(row, rows))
    return agreement


def _simulate_all(repetitions: Sequence[Row], targets: Targets, identity: KernelIdentity) -> _Storm | None:
    """Simulate a storm, as often as it has to be; None if its files are not at hand."""
    row = repetitions[0]
    target = targets.find(row["module"], suffix=_suffix(row, identity))
    if target is None:
        return None
    is_shared = policy_of(row["kernel"]).share_in_flight and row["separate_copies"] == "0"
    count = len(repetitions) if is_shared else RUNS
    runs = [_simulate(row, target, targets, identity, seed) for seed in range(count)]
    return _Storm(targets.plan(target), number(row, "N"), is_shared, runs)


def _group(row: Row) -> Group:
    return (
        row["kernel"],
        row["module"],
        row["compressed"],
        bounded(row, "N", MAX_WORKERS),
        row["separate_copies"],
        bounded(row, "smp", MAX_CPUS),
    )


def _where(row: Row) -> str:
    packed, copies = " packed" * (row["compressed"] != "0"), " copies" * (row["separate_copies"] != "0")
    return f"{row['kernel']} {row['module']} N={row['N']}{packed}{copies} repetition {row['rep']}"


def _suffix(row: Row, identity: KernelIdentity) -> str:
    if row["compressed"] == "0":
        return ""
    return {"gzip": ".gz", "xz": ".xz", "zstd": ".zst"}[identity.decompressor_for(None) or "zstd"]


def _simulate(row: Row, target: Target, targets: Targets, identity: KernelIdentity, seed: int) -> _Simulated:
    crowd = Crowd(
        targets,
        identity,
        policy_of(row["kernel"]),
        cpus=number(row, "smp"),
        seed=seed * 1009 + number(row, "N"),
        separate_copies=row["separate_copies"] != "0",
    )
    crowd.prepare(target)
    held_bytes = crowd.machine.areas.held_bytes
    crowd.release(target, number(row, "N"))
    crowd.machine.run()
    return _Simulated(
        crowd.machine.counters,
        dict(crowd.errnos),
        crowd.machine.areas.peak_bytes - held_bytes,
        met=1 + crowd.waited.total(),
        met_late=crowd.waited[Outcome.LOAD],
    )


def _late(run: _Simulated) -> int:
    return run.counters.failed_load_modules


def _differences(row: Row, storm: _Storm, simulated: _Simulated) -> list[str]:
    counters, plan = simulated.counters, storm.plan
    differing = _unequal(
        row,
        ("modcount", counters.modcount),
        ("total_mod_size", counters.total_mod_size),
        ("total_text_size", counters.total_text_size),
        ("failed_kreads", counters.failed_kreads),
        ("failed_decompress", counters.failed_decompress),
    )
    results = _results(simulated.errnos)
    duplicates = (counters.failed_becoming, counters.failed_load_modules)
    measured = {column: number(row, column) for column in results}
    measured_duplicates = (number(row, "failed_becoming"), number(row, "failed_load"))
    if storm.is_shared:
        # One call works and all others take its result: nothing is left to chance but who comes too late for that.
        differing += shared_differences("measured", measured, measured_duplicates, storm.workers)
        differing += shared_differences("simulated", results, duplicates, storm.workers)
    else:
        differing += _unequal(row, *results.items())
        differing += _unlike("duplicates", sum(measured_duplicates), sum(duplicates))
    packed_bytes = plan.version.size_bytes if plan.is_packed else 0
    early_bytes, late_bytes = plan.image_bytes + packed_bytes, 2 * plan.image_bytes + packed_bytes
    differing += _rule(row, "failed_becoming", "invalid_becoming_bytes", early_bytes)
    differing += _rule(row, "failed_load", "invalid_mod_bytes", late_bytes)
    becoming_bytes, mod_bytes = counters.failed_becoming * early_bytes, counters.failed_load_modules * late_bytes
    differing += _unlike("bytes of early duplicates, by the rule", becoming_bytes, counters.invalid_becoming_bytes)
    differing += _unlike("bytes of late duplicates, by the rule", mod_bytes, counters.invalid_mod_bytes)
    if not plan.is_packed:
        differing += _peak_differences(row, storm, simulated)
    return differing


def _peak_differences(row: Row, storm: _Storm, simulated: _Simulated) -> list[str]:
    measured_bytes = (number(row, "vmallocused_peak_kb") - number(row, "vmallocused_before_kb")) * 1024
    law_bytes = storm.law_bytes(storm.readers, number(row, "failed_load"))
    with_stacks_bytes = law_bytes + storm.workers * KERNEL_STACK_BYTES
    late = _late(simulated)
    fewest_bytes, most_bytes = storm.law_bytes(simulated.met, simulated.met_late), storm.law_bytes(storm.readers, late)
    return [
        *_peak("measured", measured_bytes, int(storm.least_share * law_bytes), with_stacks_bytes),
        *_peak("simulated", simulated.peak_bytes, min(fewest_bytes, most_bytes), most_bytes),
    ]


def _results(errnos: Mapping[str, int]) -> dict[str, int]:
    """Return how many calls ended how, in the words of the table's columns."""
    results = {column: errnos.get(errno, 0) for column, errno in _RESULTS.items()}
    results["other"] = sum(errnos.values()) - sum(results.values())
    return results


def _unequal(row: Row, *pairs: tuple[str, int]) -> list[str]:
    return [each for column, simulated in pairs for each in _unlike(column, number(row, column), simulated)]


def _unlike(what: str, measured: int, simulated: int) -> list[str]:
    return [] if measured == simulated else [f"{what} measured {measured}, simulated {simulated}"]


def _rule(row: Row, count: str, size: str, each_bytes: int) -> list[str]:
    """Hold a row's bytes against its own count and the length of the file."""
    expected = number(row, count) * each_bytes
    measured = number(row, size)
    return [] if measured == expected else [f"{size} measured {measured}, by the rule {expected}"]


def _peak(which: str, peak_bytes: int, least_bytes: int, most_bytes: int) -> list[str]:
    """Say if a peak is beyond bounds by more than it may; the bounds are one where all workers meet."""
    short = peak_bytes < least_bytes * (1 - PEAK_SHARE) - PEAK_BYTES
    if not short and peak_bytes <= most_bytes * (1 + PEAK_SHARE) + PEAK_BYTES:
        return []
    return [f"{which} peak {peak_bytes} bytes, by the law {least_bytes if short else most_bytes}"]


def _split_differences(repetitions: Sequence[Row], storm: _Storm) -> list[str]:
    """Compare how many duplicates were late in some repetitions with how many are in simulated runs."""
    measured = [number(row, "failed_load") for row in repetitions]
    simulated = [_late(run) for run in storm.runs]
    chance = rank_chance(measured, simulated)
    if chance >= SPLIT_CHANCE:
        return []
    counts = ", ".join(map(str, sorted(measured)))
    least, middle, most = min(simulated), median(simulated), max(simulated)
    return [f"measured {counts}; simulated {least} to {most}, half of them below {middle:g}; chance {chance:.1e}"]
