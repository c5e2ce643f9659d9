"""The published tables simulated, and each figure beside the one that came out.

The machines are bundled ones; costs are the bundled ones, the same for all tables. What is printed of a simulation is
the mean over seeds, with the least and the greatest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from loader_svc.boot import BootSpec
from loader_svc.boot.machine_file import machine_of
from loader_svc.published.figures import GRAPH_BYTES, Boot, Figures, Graph, Stress, published_figures
from loader_svc.published.stress import peak_bytes
from loader_svc.sweep.finished import Finished
from loader_svc.sweep.point import Point, grid
from loader_svc.sweep.side_by_side import Row, Table, spread_text
from loader_svc.sweep.summary import QUANTITIES, Series, Spread, Summary
from loader_svc.sweep.whatif import Run
from modpressure.kernel.policy import POLICIES

TOTAL_WITHIN: Final = 0.2
"""Share by which totals and wasted bytes may differ."""

MODULE_FACTOR: Final = 3
MODULE_LEAST: Final = 20
"""A module that was a duplicate more often than this is held to the factor above; below, chance has its say."""

LATE_SHARE: Final = 1 / 3
SLOPE_WITHIN: Final = 0.25
R_SQUARED: Final = 0.98
RATIO: Final = 2.0
RATIO_WITHIN: Final = 0.2
"""How near to 2 the slopes of v6.3 and v6.4 have to be to each other; as published they are 1.8."""


STORMS: Final = 3
"""Seeds of the stress test: what it holds at once hardly differs between them."""


Peak = Callable[[Stress, str, int, Any], int]
"""Most bytes that the stress test holds at once, under a policy, with a seed and costs."""


def compare(run: Run, seeds: int, costs: Any = None, *, peak: Peak = peak_bytes) -> list[Table]:
    """Simulate every published table with as many seeds, and hold the figures against each other.

    ``costs`` are the bundled ones if None; ``peak`` simulates the stress test.
    """
    figures = published_figures()
    points: dict[str, list[Point]] = {
        boot.policy + boot.machine: _points(costs, boot.machine, [boot.cpus], [boot.policy], seeds)
        for boot in (figures.late, figures.early, figures.shared)
    }
    graph = figures.graph
    points["graph"] = _points(costs, graph.machine, graph.cpus, list(graph.bounds), seeds)
    done = iter(run([point for each in points.values() for point in each]))

    def stress_peak(policy: str, seed: int) -> int:
        return peak(figures.stress, policy, seed, costs)

    late, early, shared, drawn = ([next(done) for _ in each] for each in points.values())
    return [
        _late(figures.late, late),
        _early(figures.early, early),
        _graph(graph, drawn),
        _shared(figures.shared, shared),
        _stress(figures.stress, drawn, stress_peak, min(seeds, STORMS)),
        _implied(figures, late),
    ]


def _points(costs: Any, machine: str, cpus: Sequence[int], policies: Sequence[str], seeds: int) -> list[Point]:
    spec = BootSpec(machine_of(machine), costs=costs)
    kernels = [POLICIES[name] for name in policies]
    return list(grid(spec, cpus=cpus, policies=kernels, remedies=[None], seeds=range(1, seeds + 1)))


def _late(boot: Boot, done: list[Finished]) -> Table:
    load = Spread.of([each.load for each in done])
    rows = [
        *_sizes(boot, done),
        _within("duplicates at load", boot.load, load),
        _within("wasted bytes", boot.wasted_bytes, Spread.of([each.wasted_bytes for each in done])),
        *_modules(boot, done, bounded=True),
    ]
    return Table(boot.title, rows)


def _early(boot: Boot, done: list[Finished]) -> Table:
    total = Spread.of([each.becoming + each.load for each in done])
    late = sum(each.load for each in done) / max(1, sum(each.becoming + each.load for each in done))
    rows = [
        *_sizes(boot, done),
        _shown("duplicates at becoming", boot.becoming, Spread.of([each.becoming for each in done])),
        _shown("duplicates at load", boot.load, Spread.of([each.load for each in done])),
        _within("both", boot.becoming + boot.load, total),
        Row(
            "share found at load",
            f"{boot.load / (boot.becoming + boot.load):.2f}",
            f"{late:.2f}",
            f"below {LATE_SHARE:.2f}",
            late < LATE_SHARE,
        ),
        _shown("wasted bytes", boot.wasted_bytes, Spread.of([each.wasted_bytes for each in done])),
        *_modules(boot, done, bounded=False),
    ]
    return Table(boot.title, rows)


def _shared(boot: Boot, done: list[Finished]) -> Table:
    def none(what: str, value: Callable[[Finished], int]) -> Row:
        spread = Spread.of([value(each) for each in done])
        return Row(what, "0", spread_text(spread), "0 with every seed", spread.high == 0)

    rows = [
        _shown("modules loaded", boot.modules, Spread.of([each.modules for each in done])),
        none("failed on kread", lambda each: each.failed_kreads),
        none("duplicates at becoming", lambda each: each.becoming),
        none("duplicates at load", lambda each: each.load),
        none("wasted bytes", lambda each: each.wasted_bytes),
    ]
    return Table(boot.title, rows)


def _graph(graph: Graph, done: list[Finished]) -> Table:
    summary = Summary.of(done)
    waste = QUANTITIES["waste"]
    assert GRAPH_BYTES == 1 << 30, "the unit of waste"
    rows, slopes = [], {}
    for policy, bounds in graph.bounds.items():
        series = Series(done[0].machine, policy, "none")
        spreads = summary.spreads(series, waste)
        for cpus, (low, high) in zip(graph.cpus, bounds, strict=True):
            rows.append(Row(f"{policy}, {cpus} CPUs, GiB", _range(low, high), spread_text(spreads[cpus], 2)))
        fit, read = summary.fit(series, waste), graph.fit(policy)
        assert fit is not None
        slopes[policy] = fit.slope
        slope = Row(f"{policy}, GiB for each CPU", f"{read.slope:.4f}", f"{fit.slope:.4f}")
        rows.append(slope.within(SLOPE_WITHIN, read.slope, fit.slope))
        rows.append(
            Row(
                f"{policy}, R² of the line",
                f"{read.r_squared:.3f}",
                f"{fit.r_squared:.3f}",
                f"above {R_SQUARED}",
                fit.r_squared > R_SQUARED,
            )
        )
    ratio = slopes["v6.3"] / slopes["v6.4"] if slopes["v6.4"] else float("inf")
    as_read = graph.fit("v6.3").slope / graph.fit("v6.4").slope
    rows.append(
        Row(
            "v6.3 over v6.4",
            f"{as_read:.2f}",
            f"{ratio:.2f}",
            f"within {RATIO_WITHIN:.0%} of {RATIO:g}",
            abs(ratio - RATIO) <= RATIO_WITHIN * RATIO,
        )
    )
    return Table(graph.title, rows)


def _stress(stress: Stress, drawn: list[Finished], peak: Callable[[str, int], int], seeds: int) -> Table:
    """Hold the stress test's memory against that of the boots of the graph: how many CPUs have as much."""
    summary, held = Summary.of(drawn), QUANTITIES["held"]
    rows = []
    for policy, used_kib in stress.used_kib.items():
        peaks = [peak(policy, seed) / GRAPH_BYTES for seed in range(1, seeds + 1)]
        fit = summary.fit(Series(drawn[0].machine, policy, "none"), held)
        assert fit is not None
        cpus = Spread.of([(peak - fit.intercept) / fit.slope for peak in peaks])
        used = f"{used_kib * 1024 / GRAPH_BYTES:.2f} with all else"
        rows += [
            Row(f"{policy}, most memory at once, GiB", used, spread_text(Spread.of(peaks), 2)),
            Row(f"{policy}, as a boot of so many CPUs", str(stress.as_cpus), spread_text(cpus)),
        ]
    return Table(f"the stress test: {stress.title}", rows)


LARGE: Final = ("kvm", "kvm_intel")


def implied_bytes(figures: Figures) -> tuple[float, float]:
    """Return how long the published files were: kvm and kvm_intel together, and the others in the mean.

    Two equations with two unknowns, as a duplicate found at load counts its image twice, and one found at becoming
    once. In both tables the large two were duplicates equally often, and in the second one at becoming only.
    """
    late, early = figures.late, figures.early
    assert early.becoming_bytes is not None
    often, rarely = late.duplicates[LARGE[0]], early.duplicates[LARGE[0]]
    others_late, others_early = late.load - 2 * often, early.becoming - 2 * rarely
    bytes_late, bytes_early = late.wasted_bytes / 2, early.becoming_bytes
    determinant = often * others_early - rarely * others_late
    large = (bytes_late * others_early - bytes_early * others_late) / determinant
    others = (often * bytes_early - rarely * bytes_late) / determinant
    return large, others


def _implied(figures: Figures, done: list[Finished]) -> Table:
    """Hold the lengths of files that follow from the two tables against those of the simulated machine."""
    large, others = implied_bytes(figures)
    large_bytes = others_bytes = 0.0
    others_count = 0
    for boot in done:
        lengths = {module: wasted / (early + 2 * late) for module, (early, late, wasted) in boot.duplicates.items()}
        large_bytes += sum(lengths.get(module, 0) for module in LARGE)
        for module, (early, late, _) in boot.duplicates.items():
            if module not in LARGE:
                others_bytes += lengths[module] * (early + late)
                others_count += early + late
    rows = [
        Row("kvm and kvm_intel, bytes", f"{large:.0f}", f"{large_bytes / len(done):.0f}"),
        Row("others in the mean, bytes", f"{others:.0f}", f"{others_bytes / max(1, others_count):.0f}"),
    ]
    return Table("lengths of the files, as they follow from the tables", rows)


def _sizes(boot: Boot, done: list[Finished]) -> list[Row]:
    rows = [_shown("modules loaded", boot.modules, Spread.of([each.modules for each in done]))]
    if boot.total_mod_size is not None:
        rows.append(_shown("total module size", boot.total_mod_size, Spread.of([each.total_mod_size for each in done])))
    if boot.total_text_size is not None:
        rows.append(_shown("total text size", boot.total_text_size, Spread.of([each.total_text_size for each in done])))
    return rows


def _modules(boot: Boot, done: list[Finished], *, bounded: bool) -> list[Row]:
    rows = []
    names = dict.fromkeys(boot.duplicates)
    for each in done:
        names |= dict.fromkeys(each.duplicates)
    for name in names:
        published = boot.duplicates.get(name, 0)
        counts = [sum(each.duplicates.get(name, (0, 0, 0))[:2]) for each in done]
        spread = Spread.of(counts)
        row = _shown(name, published, spread)
        if bounded and published > MODULE_LEAST:
            agrees = published / MODULE_FACTOR <= spread.mean <= published * MODULE_FACTOR
            row = row.bounded(f"within a factor of {MODULE_FACTOR}", agrees=agrees)
        rows.append(row)
    return rows


def _shown(what: str, published: int, spread: Spread) -> Row:
    return Row(what, str(published), spread_text(spread))


def _within(what: str, published: int, spread: Spread) -> Row:
    return _shown(what, published, spread).within(TOTAL_WITHIN, published, spread.mean)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
