"""How old what is stored is, though its time was told by a clock that may be put forward.

What was stored is as old as the wall clock says, but for what that has gained on a steady clock since: a clock that is
put forward makes nothing older. Nor does a long time in which nothing was stored: whoever starts after it can't tell it
from a clock that is wrong. So where all would be too old at once, its age is counted from the start on. Both are gaps
in the wall clock's time, which are stored for whoever starts next; a clock that is put back closes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from stats_svc.rows import ClockGap

STEP_NS: Final = 60_000_000_000
"""What the wall clock may gain on the steady one, between two looks, before it is taken to be put forward."""

_REMEMBERED: Final = 100


def _length_ns(gap: ClockGap) -> int:
    return gap.end_ns - gap.begin_ns


def _holds(outer: ClockGap, inner: ClockGap) -> bool:
    """Return whether one gap has all of another of its kind in it."""
    return outer.is_sure == inner.is_sure and outer.begin_ns <= inner.begin_ns and inner.end_ns <= outer.end_ns


def boot_clock_ns() -> int:
    """Return the time since boot, in which the machine slept included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Ages:
    """Judges the age of what is stored. To be used from one thread at a time, and looked at every minute or oftener."""

    def __init__(
        self,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        steady_clock_ns: Callable[[], int] = boot_clock_ns,
    ) -> None:
        self._wall_clock_ns = wall_clock_ns
        self._steady_clock_ns = steady_clock_ns
        self._ahead_ns = wall_clock_ns() - steady_clock_ns()
        """How far the wall clock is ahead of the steady one."""

        self._gaps: list[ClockGap] = []
        """In their order."""

    def found(self, newest_ns: int, gaps: Iterable[ClockGap] = ()) -> None:
        """Note at a start when the newest of what there is was stored, and what is known of the clock that said so."""
        now_ns = self.look()
        for gap in gaps:
            # A clock that says less was put back meanwhile, or is another machine's.
            end_ns = min(gap.end_ns, now_ns)
            if gap.begin_ns < end_ns:
                self._note(ClockGap(gap.begin_ns, end_ns, gap.is_sure))
        if 0 < newest_ns < now_ns - STEP_NS:
            self._note(ClockGap(newest_ns, now_ns, is_sure=False))

    @property
    def gaps(self) -> tuple[ClockGap, ...]:
        """What whoever starts next has to know, as far as it was noticed."""
        return tuple(self._gaps)

    def before_ns(self, age_ns: int) -> int:
        """Return the time of the wall clock before which what was stored is older than an age."""
        at_ns = self.look() - age_ns
        for gap in reversed(self._gaps):
            gap_ns = gap.end_ns - gap.begin_ns
            if at_ns < gap.end_ns and (gap.is_sure or gap_ns >= age_ns):
                at_ns -= gap_ns
        return at_ns

    def look(self) -> int:
        """Notice if the wall clock was put forward or back; return what it says."""
        now_ns = self._wall_clock_ns()
        ahead_ns = now_ns - self._steady_clock_ns()
        gained_ns = ahead_ns - self._ahead_ns
        if gained_ns > STEP_NS:
            self._note(ClockGap(now_ns - gained_ns, now_ns, is_sure=True))
        elif gained_ns < -STEP_NS:
            self._close(-gained_ns)
        self._ahead_ns = ahead_ns
        return now_ns

    def _note(self, gap: ClockGap) -> None:
        if any(_holds(known, gap) for known in self._gaps):
            return
        # Whoever starts again and again with nothing stored meanwhile finds the same gap each time, only longer.
        gaps = [*(known for known in self._gaps if not _holds(gap, known)), gap]
        # Where there are too many, the shortest matter least.
        self._gaps = sorted(sorted(gaps, key=_length_ns)[-_REMEMBERED:])

    def _close(self, lost_ns: int) -> None:
        """Take so much from the newest gaps: what was stored before is judged as it was, though the clock says less."""
        while lost_ns > 0 and self._gaps:
            gap = self._gaps.pop()
            left_ns = gap.end_ns - gap.begin_ns - lost_ns
            lost_ns = -left_ns
            if left_ns > 0:
                self._gaps.append(ClockGap(gap.begin_ns, gap.begin_ns + left_ns, gap.is_sure))
