"""How much a result hangs on the costs: the same boots with each figure halved, and doubled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from loader_svc.boot.simulate import simulate_boot
from loader_svc.boot.spec import BootSpec
from loader_svc.boot.spread import Spread
from loader_svc.virtual.costs import KINDS, MAX_NS, Costs

FACTORS: Final = (0.5, 2.0)
"""A figure that is an estimate may well be off by that."""

INIT: Final = "init"
"""All durations of init functions together: the table, and ``init_ns`` for modules that it does not have."""

STANDARD_ERRORS: Final = 3.0
"""Means that are nearer to each other, measured by the error of their difference, may differ by chance alone."""

_NOT_SCALED: Final = frozenset({"jitter", "init_ns"})


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared, over some seeds."""

    duplicates: Spread
    wasted_bytes: Spread
    duration_ns: Spread

    def change(self, base: Figures, figure: str) -> float:
        """Return by which share a figure's mean is more than in another one; 0 where that has none."""
        before: float = getattr(base, figure).mean
        mine: float = getattr(self, figure).mean
        return mine / before - 1 if before else 0.0

    def is_beyond_chance(self, base: Figures, figure: str, seeds: int) -> bool:
        """Whether a figure differs from another one by more than as many seeds let it differ by chance.

        Of one seed nothing can be said: then all that differs counts.
        """
        mine, its = getattr(self, figure), getattr(base, figure)
        error = math.sqrt((mine.deviation**2 + its.deviation**2) / seeds)
        difference: float = abs(mine.mean - its.mean)
        return difference > STANDARD_ERRORS * error


COMPARED: Final = tuple(field.name for field in fields(Figures))


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one cost does to a boot."""

    cost: str
    source: str
    """Where the figure is from; empty if nothing is said."""

    halved: Figures
    doubled: Figures

    def effect(self, base: Figures, seeds: int) -> float:
        """Return by which share a figure changes at most, changes that may be chance left out."""
        return max(
            abs(figures.change(base, name)) if figures.is_beyond_chance(base, name, seeds) else 0.0
            for figures in (self.halved, self.doubled)
            for name in COMPARED
        )


def scaled(costs: Costs) -> Iterator[tuple[str, float, Costs]]:
    """Yield each cost that is not 0 by its name, with a factor, and the costs with that one changed."""
    for name, kind in KINDS.items():
        value = getattr(costs, name)
        if name in _NOT_SCALED or kind == "bool" or not value:
            continue
        for factor in FACTORS:
            yield name, factor, replace(costs, **{name: _times(value, factor, is_whole=kind != "float")})
    for factor in FACTORS:
        inits = {module: _times(value, factor) for module, value in costs.init.items()}
        yield INIT, factor, replace(costs, init=inits, init_ns=_times(costs.init_ns, factor))


def _times(value: Any, factor: float, *, is_whole: bool = True) -> Any:
    if isinstance(value, tuple):
        return tuple(min(int(each * factor), MAX_NS) for each in value)
    return min(max(int(value * factor), 1 if value else 0), MAX_NS) if is_whole else value * factor


def boot_figures(spec: BootSpec, seed: int) -> tuple[int, int, int]:
    """Boot once; return duplicates, wasted bytes and duration. For a process of its own."""
    result = simulate_boot(spec, seed)
    return result.duplicates, result.wasted_bytes, result.duration_ns


def sensitivities(spec: BootSpec, seeds: range, executor: Executor) -> tuple[Figures, list[Sensitivity]]:
    """Return what a boot comes to over some seeds, and what each cost does to that, the greatest effect first.

    What chance alone may do counts as no effect.
    """
    costs = spec.costs or spec.machine.own_costs()
    variants: dict[tuple[str, float], BootSpec] = {("", 1.0): spec}
    for name, factor, changed in scaled(costs):
        variants[name, factor] = replace(spec, costs=changed)
    futures = {key: [executor.submit(boot_figures, each, seed) for seed in seeds] for key, each in variants.items()}
    figures = {}
    for key, running in futures.items():
        columns = zip(*(future.result() for future in running), strict=True)
        figures[key] = Figures(*(Spread.of(column) for column in columns))
    base = figures["", 1.0]
    names = dict.fromkeys(name for name, _ in variants if name)
    halving, doubling = FACTORS
    found = [
        Sensitivity(name, costs.source.get(name, ""), figures[name, halving], figures[name, doubling]) for name in names
    ]
    return base, sorted(found, key=lambda each: (-each.effect(base, len(seeds)), each.cost))
