"""How old what is stored is, though its time was told by a clock that may be put forward.

What was stored is as old as the wall clock says, but for what that has gained on a steady clock since: a clock that is
put forward makes nothing older. Nor does a long time in which nothing was stored: whoever starts after it can't tell it
from a clock that is wrong. So where all would be too old at once, its age is counted from the start on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

STEP_NS: Final = 60_000_000_000
"""What the wall clock may gain on the steady one, between two looks, before it is taken to be put forward."""

_REMEMBERED: Final = 100


@dataclass(frozen=True, slots=True)
class _Gap:
    """A time of the wall clock that did not pass, or may not have."""

    begin_ns: int
    end_ns: int
    is_sure: bool


def boot_clock_ns() -> int:
    """Return the time since boot, in which the machine slept included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Ages:
    """Judges the age of what is stored. To be used from one thread, and looked at every minute or oftener."""

    def __init__(
        self,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        steady_clock_ns: Callable[[], int] = boot_clock_ns,
    ) -> None:
        self._wall_clock_ns = wall_clock_ns
        self._steady_clock_ns = steady_clock_ns
        self._ahead_ns = wall_clock_ns() - steady_clock_ns()
        """How far the wall clock is ahead of the steady one."""

        self._gaps: deque[_Gap] = deque(maxlen=_REMEMBERED)
        """In their order."""

    def found(self, newest_ns: int) -> None:
        """Note when the newest of what there is was stored, by the wall clock, at the time of a start."""
        now_ns = self._look()
        if 0 < newest_ns < now_ns - STEP_NS:
            self._gaps.append(_Gap(newest_ns, now_ns, is_sure=False))

    def before_ns(self, age_ns: int) -> int:
        """Return the time of the wall clock before which what was stored is older than an age."""
        at_ns = self._look() - age_ns
        for gap in reversed(self._gaps):
            gap_ns = gap.end_ns - gap.begin_ns
            if at_ns < gap.end_ns and (gap.is_sure or gap_ns >= age_ns):
                at_ns -= gap_ns
        return at_ns

    def _look(self) -> int:
        """Notice if the wall clock was put forward; return what it says."""
        now_ns = self._wall_clock_ns()
        ahead_ns = now_ns - self._steady_clock_ns()
        gained_ns = ahead_ns - self._ahead_ns
        if gained_ns > STEP_NS:
            self._gaps.append(_Gap(now_ns - gained_ns, now_ns, is_sure=True))
        self._ahead_ns = ahead_ns
        return now_ns
