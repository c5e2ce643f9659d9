"""How old what is stored is, though its time was told by a clock that may be put forward.

What was stored is as old as the wall clock says, but for what that has gained on a steady clock since: a clock that is
put forward makes nothing older. Nor does a long time in which nothing was stored: whoever starts after it can't tell it
from a clock that is wrong. So where all would be too old at once, its age is counted from the start on; and of what
must not be forgotten too early only such time counts as somebody saw pass. Both are gaps in the wall clock's time; a
clock that is put back closes them.

They are stored for whoever starts next, in the transaction of the first commit whose time is a later one. So whatever
is stored, what is known of the clock that said when is stored, too; and who starts finds the time of the last commit.
Any other time that is stored may be from a file, or from a clock that was put back since.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from stats_svc.rows import ClockGap

STEP_NS: Final = 60_000_000_000
"""What the wall clock may gain on the steady one before it is taken to be put forward."""

_REMEMBERED: Final = 100


def _holds(outer: ClockGap, inner: ClockGap) -> bool:
    """Return whether one gap has all of another of its kind in it."""
    return outer.is_sure == inner.is_sure and outer.begin_ns <= inner.begin_ns and inner.end_ns <= outer.end_ns


def boot_clock_ns() -> int:
    """Return the time since boot, in which the machine slept included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Ages:
    """Judges the age of what is stored. To be used from one thread at a time."""

    def __init__(
        self,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        steady_clock_ns: Callable[[], int] = boot_clock_ns,
    ) -> None:
        self._wall_clock_ns = wall_clock_ns
        self._steady_clock_ns = steady_clock_ns
        self._ahead_ns = wall_clock_ns() - steady_clock_ns()
        """How far the wall clock was ahead of the steady one when it was last put forward or back, or at first."""

        self._gaps: list[ClockGap] = []
        """In their order."""

    def found(self, commit_time_ns: int, gaps: Iterable[ClockGap] = ()) -> None:
        """Note at a start the time of the last commit, 0 if there is none, and what is known of the clocks before."""
        now_ns = self.look()
        for gap in gaps:
            # A clock that says less was put back meanwhile, or is another machine's.
            end_ns = min(gap.end_ns, now_ns)
            if gap.begin_ns < end_ns:
                self._note(ClockGap(gap.begin_ns, end_ns, gap.is_sure))
        if 0 < commit_time_ns < now_ns - STEP_NS:
            self._note(ClockGap(commit_time_ns, now_ns, is_sure=False))

    @property
    def gaps(self) -> tuple[ClockGap, ...]:
        """What whoever starts next has to know, as of the last look."""
        return tuple(self._gaps)

    def before_ns(self, age_ns: int, *, surely: bool = False) -> int:
        """Return the time of the wall clock before which what was stored is older than an age.

        Of a time in which nobody looked it is believed that it passed, unless all from before it would be too old for
        that alone; ``surely`` believes it of no such time.
        """
        at_ns = self.look() - age_ns
        for gap in reversed(self._gaps):
            gap_ns = gap.end_ns - gap.begin_ns
            if at_ns < gap.end_ns and (surely or gap.is_sure or gap_ns >= age_ns):
                at_ns -= gap_ns
        return at_ns

    def look(self) -> int:
        """Notice if the wall clock was put forward or back; return what it says."""
        now_ns = self._wall_clock_ns()
        ahead_ns = now_ns - self._steady_clock_ns()
        gained_ns = ahead_ns - self._ahead_ns
        if abs(gained_ns) <= STEP_NS:
            # It stays what it was: many small steps come to a large one.
            return now_ns
        if gained_ns > 0:
            self._note(ClockGap(now_ns - gained_ns, now_ns, is_sure=True))
        else:
            self._close(-gained_ns)
        self._ahead_ns = ahead_ns
        return now_ns

    def _note(self, gap: ClockGap) -> None:
        if any(_holds(known, gap) for known in self._gaps):
            return
        # Whoever starts again and again with nothing stored meanwhile finds the same gap each time, only longer.
        self._gaps = sorted([*(known for known in self._gaps if not _holds(gap, known)), gap])
        if len(self._gaps) > _REMEMBERED:
            self._join_nearest()

    def _join_nearest(self) -> None:
        """Make two gaps one. What is between them seems not to have passed, either: that makes nothing older."""
        gaps = self._gaps
        at = min(range(1, len(gaps)), key=lambda number: gaps[number].begin_ns - gaps[number - 1].end_ns)
        one, other = gaps[at - 1 : at + 1]
        is_sure = one.is_sure or other.is_sure
        gaps[at - 1 : at + 1] = [ClockGap(one.begin_ns, max(one.end_ns, other.end_ns), is_sure)]

    def _close(self, lost_ns: int) -> None:
        """Take so much from the newest gaps: what was stored before is judged as it was, though the clock says less."""
        while lost_ns > 0 and self._gaps:
            gap = self._gaps.pop()
            left_ns = gap.end_ns - gap.begin_ns - lost_ns
            lost_ns = -left_ns
            if left_ns > 0:
                self._gaps.append(ClockGap(gap.begin_ns, gap.begin_ns + left_ns, gap.is_sure))
