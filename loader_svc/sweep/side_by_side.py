"""What real machines came to and what simulated boots come to, figure by figure, each with what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from loader_svc.sweep.summary import Spread


class Row(NamedTuple):
    """One figure, real and simulated."""

    what: str
    real: str
    simulated: str
    bound: str = ""
    """What is asked of it; empty if it is shown only."""

    agrees: bool = True

    def bounded(self, bound: str, *, agrees: bool) -> Self:
        """Return it with something asked of it."""
        return self._replace(bound=bound, agrees=agrees)

    def within(self, share: float, real: float, simulated: float) -> Self:
        """Return it with a share asked of it by which the simulated value may be off the real one."""
        return self.bounded(f"within {share:.0%}", agrees=abs(simulated - real) <= share * abs(real))

    def document(self, real: str) -> dict[str, Any]:
        """Return it as JSON's types; ``real`` is what the real figure is called."""
        return {"what": self.what, real: self.real, **dict(zip(self._fields[2:], self[2:], strict=True))}

    def texts(self) -> tuple[str, ...]:
        """Return it as a line to be printed."""
        return self.what, self.real, self.simulated, self.bound, "" if self.agrees else "DIFFERS"


@dataclass(frozen=True, slots=True)
class Table:
    """Figures that belong together."""

    title: str
    rows: list[Row]

    @property
    def agrees(self) -> bool:
        """Whether every figure is within its bound."""
        return all(row.agrees for row in self.rows)


def agreed(tables: Iterable[Table]) -> tuple[int, int]:
    """Return how many figures that have a bound agree, and how many have one."""
    bounded = [row.agrees for table in tables for row in table.rows if row.bound]
    return sum(bounded), len(bounded)


def number_text(value: float) -> str:
    """Return a mean: in whole numbers where it is large."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def spread_text(spread: Spread, digits: int = 0) -> str:
    """Return the mean with the least and the greatest, or the one value that all are."""
    if spread.low == spread.high:
        return f"{spread.mean:.{digits}f}"
    mean = f"{spread.mean:.{digits}f}" if digits else number_text(spread.mean)
    return f"{mean} [{spread.low:.{digits}f} .. {spread.high:.{digits}f}]"
