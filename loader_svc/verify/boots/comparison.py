"""What recorded boots came to, and what the same boots come to in virtual time, figure by figure.

A race has no single outcome: what is held against the mean of the recorded boots is the mean over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from loader_svc.boot.userland import children_max
from loader_svc.sweep.finished import Finished
from loader_svc.sweep.side_by_side import Row, Table, number_text, spread_text
from loader_svc.sweep.summary import Fit, Spread
from loader_svc.verify.boots.recorded import RecordedBoot, Setting

WITHIN: Final = 0.2
"""Share by which duplicates and wasted bytes may differ in the mean."""

WITHIN_CALLS: Final = 8
"""What duplicates may differ by in any case."""

PEAK_WITHIN: Final = 0.05
PEAK_FROM_CPUS: Final = 4
"""The peak of file copies is a law from as many CPUs on: one copy of the largest module for each CPU."""

SHARED_MOST: Final = 2
"""Duplicates that a boot may have in which calls in flight share their result."""


@dataclass(frozen=True, slots=True)
class BootsTable(Table):
    """The figures of boots that are repetitions of each other, or of a line through several."""

    boots: tuple[str, ...]
    modules: list[Row]
    """Duplicates of each module; shown only."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "title": self.title,
            "boots": list(self.boots),
            "rows": [row.document("recorded") for row in self.rows],
            "modules": [{"module": row.what, "recorded": row.real, "simulated": row.simulated} for row in self.modules],
        }


def compared(setting: Setting, boots: Sequence[RecordedBoot], done: Sequence[Finished]) -> BootsTable:
    """Hold some recorded boots against as many simulated ones as there are."""
    figures = _Figures(boots, done)
    rows = [
        *_duplicates(setting, figures),
        *_peak(setting, figures),
        _workers(setting, figures),
        figures.exact("modules loaded", "modcount", lambda each: each.modules),
        figures.exact("total module size", "total_mod_size", lambda each: each.total_mod_size),
        figures.exact("total text size", "total_text_size", lambda each: each.total_text_size),
        figures.shown("finit_module calls", "finit_calls", lambda each: each.finit_calls),
        figures.shown("init_module calls", "init_calls", lambda each: each.init_calls),
        figures.shown("calls that shared a result", "gate_joins", lambda each: each.gate_joins),
        figures.shown("failed inits", "init_failures", lambda each: each.failed_inits),
        _row(
            "seconds", [boot.settle_seconds for boot in boots], Spread.of([each.duration_ns / 1e9 for each in done]), 1
        ),
    ]
    return BootsTable(str(setting), rows, tuple(boot.name for boot in boots), _modules(boots, done))


class _Figures:
    """The same figure of recorded and of simulated boots."""

    def __init__(self, boots: Sequence[RecordedBoot], done: Sequence[Finished]) -> None:
        self.boots = boots
        self.done = done

    def shown(self, what: str, column: str, value: Callable[[Finished], float]) -> Row:
        """Return a figure that has no bound."""
        return _row(what, *self._of(column, value))

    def exact(self, what: str, column: str, value: Callable[[Finished], float]) -> Row:
        """Return a figure that is no race."""
        recorded, spread = self._of(column, value)
        agrees = spread.low == spread.high and set(recorded) == {spread.low}
        return _row(what, recorded, spread).bounded("exact", agrees=agrees)

    def near(self, what: str, column: str, value: Callable[[Finished], float], *, calls: bool) -> Row:
        """Return a figure whose mean has to be near the recorded one."""
        recorded, spread = self._of(column, value)
        least, most = bounds(recorded, calls=calls)
        bound = f"{number_text(least)} to {number_text(most)}"
        return _row(what, recorded, spread).bounded(bound, agrees=least <= spread.mean <= most)

    def _of(self, column: str, value: Callable[[Finished], float]) -> tuple[list[int], Spread]:
        recorded = [boot.total if column == "duplicates" else boot.figures[column] for boot in self.boots]
        return recorded, Spread.of([value(each) for each in self.done])


def bounds(recorded: Sequence[float], *, calls: bool) -> tuple[float, float]:
    """Return what a mean has to be between: 20 % around the recorded one, 8 calls, or the recorded spread.

    The widest of them counts; ``calls`` says whether the figure is a number of calls.
    """
    mean = fmean(recorded)
    off = max(WITHIN * mean, WITHIN_CALLS if calls else 0)
    return max(0.0, min(mean - off, *recorded)), max(mean + off, *recorded)


def is_shared(setting: Setting, boots: Sequence[RecordedBoot]) -> bool:
    """Whether calls in flight share their result: they do not where images come by init_module."""
    return setting.policy.share_in_flight and not any(boot.figures["init_calls"] for boot in boots)


def _duplicates(setting: Setting, figures: _Figures) -> list[Row]:
    def total(each: Finished) -> int:
        return each.becoming + each.load

    if is_shared(setting, figures.boots):
        row = figures.shown("duplicates", "duplicates", total)
        most = max(total(each) for each in figures.done)
        return [
            row.bounded(f"at most {SHARED_MOST} a boot", agrees=most <= SHARED_MOST),
            figures.shown("duplicates at load", "failed_load_modules", lambda each: each.load),
            figures.shown("wasted bytes", "wasted_bytes", lambda each: each.wasted_bytes),
        ]
    return [
        figures.near("duplicates", "duplicates", total, calls=True),
        figures.near("duplicates at load", "failed_load_modules", lambda each: each.load, calls=True),
        figures.near("wasted bytes", "wasted_bytes", lambda each: each.wasted_bytes, calls=False),
    ]


def _workers(setting: Setting, figures: _Figures) -> Row:
    """Hold workers against each other: as many as udev may have are no race, fewer are one between forks and work."""

    def workers(each: Finished) -> int:
        return each.workers

    most = children_max(setting.cpus, setting.memory_bytes)
    if all(boot.figures["workers"] == most for boot in figures.boots):
        return figures.exact("workers", "workers", workers)
    return figures.near("workers", "workers", workers, calls=False)


def _peak(setting: Setting, figures: _Figures) -> list[Row]:
    row = figures.shown("peak of file copies", "peak_copy_bytes", lambda each: each.peak_copy_bytes)
    if setting.cpus < PEAK_FROM_CPUS or setting.policy.share_in_flight:
        return [row]
    recorded = fmean(boot.figures["peak_copy_bytes"] for boot in figures.boots)
    simulated = fmean(each.peak_copy_bytes for each in figures.done)
    return [row.within(PEAK_WITHIN, recorded, simulated)]


def _modules(boots: Sequence[RecordedBoot], done: Sequence[Finished]) -> list[Row]:
    """Return the duplicates of each module that had any, most first; nothing where they were not recorded."""
    tables = [boot.duplicates for boot in boots if boot.duplicates is not None]
    if not tables:
        return []
    names = {name for table in tables for name, count in table.items() if count}
    names |= {name for each in done for name in each.duplicates}
    rows = []
    for name in names:
        recorded = [table.get(name, 0) for table in tables]
        spread = Spread.of([sum(each.duplicates.get(name, (0, 0, 0))[:2]) for each in done])
        rows.append((-fmean(recorded), -spread.mean, _row(name, recorded, spread)))
    return [row for _, _, row in sorted(rows)]


def lines(compared_boots: Mapping[Setting, tuple[Sequence[RecordedBoot], Sequence[Finished]]]) -> list[BootsTable]:
    """Hold the lines in the number of CPUs against each other, where there are enough of them to tell."""
    groups: defaultdict[tuple[str, ...], list[Setting]] = defaultdict(list)
    for setting, (boots, _) in compared_boots.items():
        if not is_shared(setting, boots):
            groups[setting.line].append(setting)
    tables = []
    for line, settings in groups.items():
        recorded = [(each.cpus, float(boot.total)) for each in settings for boot in compared_boots[each][0]]
        simulated = [
            (each.cpus, float(boot.becoming + boot.load)) for each in settings for boot in compared_boots[each][1]
        ]
        real, virtual = Fit.of(recorded), Fit.of(simulated)
        if real is None or virtual is None:
            continue
        slope = Row("duplicates for each CPU", f"{real.slope:.1f}", f"{virtual.slope:.1f}")
        rows = [
            slope.within(WITHIN, real.slope, virtual.slope),
            Row("R² of the line", f"{real.r_squared:.3f}", f"{virtual.r_squared:.3f}"),
        ]
        cpus = ", ".join(str(count) for count in sorted({setting.cpus for setting in settings}))
        names = tuple(boot.name for each in settings for boot in compared_boots[each][0])
        tables.append(BootsTable(f"line through {cpus} CPUs, {', '.join(line)}", rows, names, []))
    return tables


def _row(what: str, recorded: Sequence[float], spread: Spread, digits: int = 0) -> Row:
    return Row(what, _recorded(recorded, digits), spread_text(spread, digits))


def _recorded(values: Sequence[float], digits: int = 0) -> str:
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}" + (f" ({len(values)} boots)" if len(values) > 1 else "")
    return ", ".join(f"{value:.{digits}f}" for value in values)
