"""What processes take as time goes by, and whether it grows.

Growth is the slope of Theil and Sen (the median of the slopes between all pairs of samples) times the time that was
looked at: a step, such as an allocator makes when it takes another arena, or a single high sample moves it little; what
grows all the time moves all pairs. The first part of a life is left out, in which caches fill.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

WARM_UP: Final = 1 / 3
"""Part of a life that is left out."""

FEWEST_SAMPLES: Final = 8
_MOST_SAMPLES: Final = 240
"""Samples between whose pairs slopes are taken; of more, every so manieth."""


class Sample(NamedTuple):
    """One look at a process, or at a file."""

    seconds: float
    value: float


def growth(samples: Sequence[Sample]) -> float | None:
    """Return by how much the value has grown after the warm-up; None if there are too few samples to tell."""
    used = samples[round(len(samples) * WARM_UP) :]
    if len(used) < FEWEST_SAMPLES:
        return None
    thinned = used[:: max(1, len(used) // _MOST_SAMPLES)]
    slopes = [
        (later.value - earlier.value) / (later.seconds - earlier.seconds)
        for number, earlier in enumerate(thinned)
        for later in thinned[number + 1 :]
        if later.seconds > earlier.seconds
    ]
    return statistics.median(slopes) * (used[-1].seconds - used[0].seconds)


@dataclass
class Life:
    """One process from its start to its end."""

    pid: int
    resident_bytes: list[Sample] = field(default_factory=list)
    open_files: list[Sample] = field(default_factory=list)

    def look(self, seconds: float) -> bool:
        """Take a sample; return False if the process is gone."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return False
        self.resident_bytes.append(Sample(seconds, pages * os.sysconf("SC_PAGESIZE")))
        self.open_files.append(Sample(seconds, files))
        return True


@dataclass(frozen=True, slots=True)
class Trend:
    """How something went: its middle value, its greatest, by how much it grew and by how much it may have grown."""

    name: str
    median: float
    greatest: float
    grown: float | None
    bound: float

    @property
    def flat(self) -> bool:
        """Whether it has grown by no more than it may; of too few samples nothing can be said."""
        return self.grown is None or self.grown <= self.bound


def trend(name: str, lives: Sequence[Sequence[Sample]], *, share: float, least: float) -> Trend:
    """Return the trend of several lives of processes of one kind: that of the middle one.

    It may grow by ``share`` of the median, or by ``least`` if that is more.
    """
    values = [sample.value for life in lives for sample in life]
    median = statistics.median(values) if values else 0.0
    grown = [found for life in lives if (found := growth(life)) is not None]
    middle = statistics.median(grown) if grown else None
    return Trend(name, median, max(values, default=0.0), middle, max(share * median, least))
