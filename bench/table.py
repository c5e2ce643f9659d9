"""One table for all benchmarks: each row is a ratio, measured several times in one run, against a bound."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: ``ratios`` to a peer or limit of the same run, and the bound that their median is held to."""

    name: str
    ratios: list[float]
    bound: float
    sense: Literal["at least", "at most"]
    peer: str
    figures: str = field(default="")
    """What the ratio came from, in units; for reading only."""

    @property
    def median(self) -> float:
        """The ratio to quote."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half of the distance between the least and the greatest ratio."""
        return (max(self.ratios) - min(self.ratios)) / 2

    @property
    def missed(self) -> bool:
        """Whether the bound is missed by more than the spread: what noise can't explain."""
        if self.sense == "at least":
            return self.median + self.spread < self.bound
        return self.median - self.spread > self.bound


def table(rows: Iterable[Row]) -> str:
    """Return the table as text."""
    lines = [f"{'what':44} {'ratio':>7} {'spread':>8} {'bound':>14}  {'':6} against"]
    for row in rows:
        verdict = "MISSED" if row.missed else "ok"
        spread = f"±{row.spread:.2f}"
        bound = f"{row.sense} {row.bound:g}"
        lines.append(f"{row.name:44} {row.median:7.2f} {spread:>8} {bound:>14}  {verdict:6} {row.peer}")
        if row.figures:
            lines.append(f"{'':4}{row.figures}")
    return "\n".join(lines)
