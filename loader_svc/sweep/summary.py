"""Finished points put together: the spread over seeds, and the straight line through what grows with the CPUs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from loader_svc.sweep.finished import Finished


class Quantity(NamedTuple):
    """Something that a boot is measured by."""

    label: str
    unit: str
    value: Callable[[Finished], float]
    """The value in that unit."""


_GIB: Final = 1 << 30

QUANTITIES: Final = {
    "waste": Quantity("Wasted virtual memory", "GiB", lambda point: point.wasted_bytes / _GIB),
    "duplicates": Quantity("Duplicates", "calls", lambda point: point.becoming + point.load),
    "late": Quantity("Duplicates found at load", "calls", lambda point: point.load),
    "peak": Quantity("Peak of file copies", "GiB", lambda point: point.peak_copy_bytes / _GIB),
    "held": Quantity("Peak of all that is held", "GiB", lambda point: point.peak_held_bytes / _GIB),
    "time": Quantity("Time until all is handled", "s", lambda point: point.duration_ns / 1e9),
}
"""What a plot can show, by the word that asks for it."""


class Series(NamedTuple):
    """What is the same along one line of a plot."""

    machine: str
    policy: str
    remedy: str


class Spread(NamedTuple):
    """The values that some boots came to which differ in nothing but the seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the mean, least and greatest of at least one value."""
        return cls(statistics.fmean(values), min(values), max(values))


class Reference(NamedTuple):
    """What something else came to, to be shown beside a sweep."""

    label: str
    points: tuple[tuple[int, float, float], ...]
    """CPUs, and the least and most that is known of the value."""


class Fit(NamedTuple):
    """The line of least squares through all boots of a series, each one a point of its own."""

    slope: float
    """Growth for each CPU, in the quantity's unit."""

    intercept: float
    r_squared: float
    """Share of the variance that the line explains: 1 for a straight line."""

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Self | None:
        """Return the line through pairs of CPUs and a value; None for fewer than three different numbers of CPUs."""
        cpus, values = [x for x, _ in points], [y for _, y in points]
        if len(set(cpus)) < 3:
            return None
        line = statistics.linear_regression(cpus, values)
        mean = statistics.fmean(values)
        around = sum((value - mean) ** 2 for value in values)
        left = sum((value - line.slope * x - line.intercept) ** 2 for x, value in points)
        # Values that are all the same lie on a line, whatever rounding leaves.
        return cls(line.slope, line.intercept, 1 - left / around if around else 1.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """Finished points by series and number of CPUs, both in the order in which they came up."""

    points: dict[Series, dict[int, list[Finished]]]

    @classmethod
    def of(cls, points: Iterable[Finished]) -> Self:
        """Sort finished points; those of one series are put into the order of their CPUs and seeds."""
        sorted_: dict[Series, dict[int, list[Finished]]] = {}
        for point in points:
            series = Series(point.machine, point.policy, point.remedy)
            sorted_.setdefault(series, {}).setdefault(point.cpus, []).append(point)
        return cls(
            {
                series: {cpus: sorted(by_cpus[cpus], key=lambda each: each.seed) for cpus in sorted(by_cpus)}
                for series, by_cpus in sorted_.items()
            }
        )

    def spreads(self, series: Series, quantity: Quantity) -> dict[int, Spread]:
        """Return the spread of a quantity over seeds, by number of CPUs."""
        return {
            cpus: Spread.of([quantity.value(point) for point in points]) for cpus, points in self.points[series].items()
        }

    def fit(self, series: Series, quantity: Quantity) -> Fit | None:
        """Return the line of a quantity against CPUs; None for fewer than three different numbers of CPUs."""
        return Fit.of(
            [(cpus, quantity.value(point)) for cpus, points in self.points[series].items() for point in points]
        )

    def name(self, series: Series) -> str:
        """Return what tells a series from the others, such as ``v6.4`` where only the policies differ."""
        parts = [
            value
            for place, value in enumerate(series)
            if len({other[place] for other in self.points}) > 1 and value != "none"
        ]
        return " ".join(parts) or series.policy
