"""Several boots of one specification: what they have in common, and how far chance takes them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from loader_svc.boot.spec import BootResult


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over several boots."""

    mean: float
    least: float
    most: float
    median: float
    deviation: float = 0.0
    """Standard deviation of a sample; 0 of a single value, of which it says nothing."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of values, at least one."""
        listed = list(values)
        return cls(fmean(listed), min(listed), max(listed), median(listed), stdev(listed) if len(listed) > 1 else 0.0)

    @property
    def is_single(self) -> bool:
        """Whether all values are equal."""
        return self.least == self.most


FIGURES: dict[str, Callable[[BootResult], float]] = {
    "duration_ns": lambda result: result.duration_ns,
    "calls": lambda result: result.finit_calls + result.init_calls,
    "modcount": lambda result: result.counters.modcount,
    "duplicates": lambda result: result.duplicates,
    "failed_becoming": lambda result: result.counters.failed_becoming,
    "failed_load_modules": lambda result: result.counters.failed_load_modules,
    "gate_joins": lambda result: result.gate_joins,
    "wasted_bytes": lambda result: result.wasted_bytes,
    "peak_copy_bytes": lambda result: result.peak_copy_bytes,
    "peak_held_bytes": lambda result: result.peak_held_bytes,
    "workers": lambda result: result.workers,
    "shortages": lambda result: result.shortages,
}
"""What is told of several boots, by name."""


def spreads(results: Sequence[BootResult]) -> dict[str, Spread]:
    """Return the spread of each figure over some boots, at least one."""
    return {name: Spread.of(figure(result) for result in results) for name, figure in FIGURES.items()}


@dataclass(frozen=True, slots=True)
class ModuleSpread:
    """What one module's duplicates came to over several boots."""

    module: str
    becoming: Spread
    load: Spread
    wasted_bytes: Spread


def module_spreads(results: Sequence[BootResult]) -> list[ModuleSpread]:
    """Return the modules that were duplicates in any of some boots, the most wasteful first."""
    tables = [{failed.module: failed for failed in result.failed_modules} for result in results]
    names = dict.fromkeys(name for table in tables for name in table)

    def spread(name: str, figure: str) -> Spread:
        return Spread.of(getattr(table[name], figure) if name in table else 0 for table in tables)

    found = [
        ModuleSpread(name, spread(name, "becoming_count"), spread(name, "load_count"), spread(name, "wasted_bytes"))
        for name in names
    ]
    return sorted(found, key=lambda each: (-each.wasted_bytes.mean, each.module))
