"""Pictures of sweeps, for a screen or for paper: no line is told from another by its colour alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Final

from loader_svc.sweep.extra import needed
from loader_svc.sweep.summary import Quantity, Reference, Spread, Summary
from loader_svc.sweep.whatif import By, WhatIf

_STYLES: Final = (
    ("#1f5fa8", "o", "-"),
    ("#b8541a", "s", "--"),
    ("#2f7d4f", "^", "-."),
    ("#7b3f98", "D", ":"),
    ("#444444", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#96741b", "x", (0, (1, 3))),
)
"""Colour, marker and line of a series, taken in turn; the colours differ in their lightness, too."""

_SAVED: Final[dict[By, tuple[str, str, float, str]]] = {
    "bytes": ("Waste", "GiB", 1 << 30, "wasted_bytes"),
    "seconds": ("Time", "s", 1e9, "duration_ns"),
    "peak": ("Peak of all that is held", "GiB", 1 << 30, "peak_held_bytes"),
}
"""What a ranking shows: its name, its unit, how much of the figure that is, and the figure."""

_INCHES: Final = (7.0, 4.6)
_DPI: Final = 160


def against_cpus(
    summary: Summary, quantity: Quantity, title: str, form: str, references: Sequence[Reference] = ()
) -> bytes:
    """Return a picture of a quantity against the number of CPUs, as ``svg`` or ``png``.

    A mark is the mean over seeds, its bar reaches from the least to the greatest; a thin line is the fit. References
    are filled marks without a line. The same points give the same bytes.
    """
    figure, axes = _figure()
    for number, series in enumerate(summary.points):
        colour, marker, line = _STYLES[number % len(_STYLES)]
        spreads = summary.spreads(series, quantity)
        label = summary.name(series)
        fit = summary.fit(series, quantity)
        if fit is not None:
            label += f": {fit.slope:.3g} {quantity.unit} per CPU, R² {fit.r_squared:.3f}"
            ends = [min(spreads), max(spreads)]
            axes.plot(ends, [fit.intercept + fit.slope * cpus for cpus in ends], color=colour, linewidth=0.7, alpha=0.6)
        means = [spread.mean for spread in spreads.values()]
        below = [spread.mean - spread.low for spread in spreads.values()]
        above = [spread.high - spread.mean for spread in spreads.values()]
        axes.errorbar(
            list(spreads),
            means,
            yerr=[below, above],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="white",
            linestyle=line,
            linewidth=1.3,
            capsize=3,
        )
    for number, reference in enumerate(references):
        colour, marker, _ = _STYLES[number % len(_STYLES)]
        cpus = [each for each, _, _ in reference.points]
        middles = [(low + high) / 2 for _, low, high in reference.points]
        reach = [(high - low) / 2 for _, low, high in reference.points]
        axes.errorbar(
            cpus, middles, yerr=reach, label=reference.label, color=colour, marker=marker, markersize=5, linestyle=""
        )
    seeds = max((len(points) for by_cpus in summary.points.values() for points in by_cpus.values()), default=0)
    axes.set_title(title, loc="left")
    axes.set_xlabel(f"CPUs\nmean, least and greatest of {seeds} {'seed' if seeds == 1 else 'seeds'}")
    axes.set_ylabel(f"{quantity.label} ({quantity.unit})")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _bytes(figure, form)


def ranking(result: WhatIf, by: By, title: str, form: str) -> bytes:
    """Return a picture of what remedies save, best on top, as ``svg`` or ``png``.

    A bar is the mean over pairs of boots, the line on it reaches from the least to the greatest; what costs instead of
    saving has another hatch. The same savings give the same bytes.
    """
    what, unit, scale, field = _SAVED[by]
    figure, axes = _figure()
    axes.grid(visible=False, axis="y")
    spreads = [Spread(*(value / scale for value in getattr(saving, field))) for saving in result.savings]
    for place, spread in enumerate(spreads):
        axes.barh(
            place,
            spread.mean,
            xerr=[[spread.mean - spread.low], [spread.high - spread.mean]],
            color="#dfe7f1" if spread.mean >= 0 else "#f3ded2",
            edgecolor="#333333",
            hatch="" if spread.mean >= 0 else "////",
            linewidth=0.8,
            capsize=3,
        )
    axes.set_yticks(range(len(spreads)), [saving.name for saving in result.savings])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_title(title, loc="left")
    seeds = len(result.base)
    pairs = f"mean, least and greatest of {seeds} {'pair' if seeds == 1 else 'pairs'} of boots"
    axes.set_xlabel(f"{what} saved ({unit}); hatched: cost\n{pairs}")
    return _bytes(figure, form)


def _figure() -> tuple[Any, Any]:
    with needed("matplotlib"):
        from matplotlib.figure import Figure
    # A figure of its own, not pyplot's: no window system is asked for, and nothing is kept between pictures.
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _bytes(figure: Any, form: str) -> bytes:
    import matplotlib

    sink = io.BytesIO()
    # Names within an SVG come from random numbers, and it carries the date, unless told otherwise.
    with matplotlib.rc_context({"svg.hashsalt": "modpressure", "svg.fonttype": "none"}):
        figure.savefig(sink, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return sink.getvalue()
