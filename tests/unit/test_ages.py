"""Ages, by a wall clock that is put forward and back, and one that is wrong from the start."""

from __future__ import annotations

import random

import pytest

from stats_svc.ages import STEP_NS, Ages
from stats_svc.rows import ClockGap

HOUR_NS = 3600 * 10**9
DAY_NS = 24 * HOUR_NS
START_NS = 20_000 * DAY_NS


class Clocks:
    """A wall clock and a steady one."""

    def __init__(self) -> None:
        self.wall_ns = START_NS
        self.steady_ns = 5 * HOUR_NS

    def ages(self) -> Ages:
        return Ages(lambda: self.wall_ns, lambda: self.steady_ns)

    def run(self, ns: int) -> None:
        self.wall_ns += ns
        self.steady_ns += ns


def test_with_a_clock_that_goes_right_an_age_is_a_difference() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    for _ in range(3):
        clocks.run(7 * DAY_NS)
        assert ages.before_ns(DAY_NS) == clocks.wall_ns - DAY_NS
    # As when it is set by a time server.
    clocks.wall_ns += STEP_NS // 2
    assert ages.before_ns(DAY_NS) == clocks.wall_ns - DAY_NS


def test_a_clock_that_is_put_forward_makes_nothing_older() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.run(2 * HOUR_NS)
    clocks.wall_ns += 3650 * DAY_NS
    later_ns = clocks.wall_ns
    ages.before_ns(HOUR_NS)
    clocks.run(HOUR_NS)
    # It is three hours old, whatever the clock says, and what was stored since is an hour old.
    assert ages.before_ns(3 * HOUR_NS) == stored_ns
    assert ages.before_ns(4 * HOUR_NS) == stored_ns - HOUR_NS
    assert ages.before_ns(HOUR_NS) == later_ns
    clocks.wall_ns += DAY_NS
    assert ages.before_ns(3 * HOUR_NS) == stored_ns
    clocks.run(30 * DAY_NS)
    # In time it is as if nothing had been.
    assert ages.before_ns(DAY_NS) == clocks.wall_ns - DAY_NS


def test_many_small_steps_of_a_clock_make_nothing_older() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.run(HOUR_NS)
    for _ in range(3000):
        clocks.wall_ns += STEP_NS // 2
        ages.look()
    assert stored_ns - STEP_NS <= ages.before_ns(HOUR_NS) <= stored_ns


def test_a_clock_that_is_put_back_makes_nothing_older() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.wall_ns -= 5 * HOUR_NS
    clocks.run(HOUR_NS)
    assert ages.before_ns(HOUR_NS) <= stored_ns
    clocks.wall_ns += 5 * HOUR_NS
    assert ages.before_ns(HOUR_NS + 1) < stored_ns


def test_who_starts_when_all_looks_too_old_counts_from_then_on() -> None:
    clocks = Clocks()
    newest_ns = clocks.wall_ns
    clocks.wall_ns += 40 * DAY_NS
    ages = clocks.ages()
    ages.found(newest_ns)
    assert ages.before_ns(30 * DAY_NS) == newest_ns - 30 * DAY_NS
    clocks.run(10 * DAY_NS)
    assert ages.before_ns(30 * DAY_NS) == newest_ns - 20 * DAY_NS
    clocks.run(21 * DAY_NS)
    assert ages.before_ns(30 * DAY_NS) == clocks.wall_ns - 30 * DAY_NS
    # Where not all of it does, the clock is believed, but not about what must not be forgotten too early.
    assert ages.before_ns(50 * DAY_NS) == clocks.wall_ns - 50 * DAY_NS
    assert ages.before_ns(50 * DAY_NS, surely=True) == clocks.wall_ns - 90 * DAY_NS


@pytest.mark.parametrize("remembered", [3, 100])
@pytest.mark.parametrize("seed", range(20))
def test_starts_by_clocks_that_differ_make_nothing_surely_older(
    monkeypatch: pytest.MonkeyPatch, seed: int, remembered: int
) -> None:
    monkeypatch.setattr("stats_svc.ages._REMEMBERED", remembered)
    dice = random.Random(seed)
    clocks = Clocks()
    ages = clocks.ages()
    gaps: tuple[ClockGap, ...] = ()
    commit_time_ns = 0
    stored: list[tuple[int, int]] = []
    for _ in range(60):
        clocks.run(dice.randrange(6 * HOUR_NS))
        if dice.random() < 0.7:
            clocks.wall_ns += dice.randrange(-40 * HOUR_NS, 40 * HOUR_NS)
        if dice.random() < 0.5:
            # Killed, or another one takes over.
            ages = clocks.ages()
            ages.found(commit_time_ns, gaps)
        for age_ns in (HOUR_NS, DAY_NS, 7 * DAY_NS):
            before_ns = ages.before_ns(age_ns, surely=True)
            for wall_ns, steady_ns in stored:
                assert wall_ns >= before_ns or clocks.steady_ns - steady_ns >= age_ns - STEP_NS
        if dice.random() < 0.7:
            ages.look()
            commit_time_ns, gaps = clocks.wall_ns, ages.gaps
            stored.append((clocks.wall_ns, clocks.steady_ns))


def test_whoever_starts_next_judges_as_if_nothing_had_happened() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.run(HOUR_NS)
    clocks.wall_ns += 40 * DAY_NS
    ages.look()
    clocks.run(HOUR_NS)
    # Something is stored now and then, so that the newest looks as it should.
    after = clocks.ages()
    after.found(clocks.wall_ns, ages.gaps)
    assert after.before_ns(2 * HOUR_NS) == ages.before_ns(2 * HOUR_NS) == stored_ns
    # Again, and what is known is not known twice.
    after.found(clocks.wall_ns, ages.gaps)
    assert after.gaps == ages.gaps

    # Nobody looks for long, and then all is counted from the start on, for whoever starts after that, too.
    newest_ns = clocks.wall_ns
    clocks.run(40 * DAY_NS)
    late = clocks.ages()
    late.found(newest_ns, after.gaps)
    clocks.run(DAY_NS)
    later = clocks.ages()
    later.found(clocks.wall_ns, late.gaps)
    assert later.before_ns(30 * DAY_NS) == late.before_ns(30 * DAY_NS) < newest_ns - 28 * DAY_NS


def test_many_starts_after_the_last_thing_was_stored_are_one_gap_and_forget_none() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.wall_ns += 40 * DAY_NS
    ages.look()
    clocks.run(DAY_NS)
    newest_ns = clocks.wall_ns
    for _ in range(200):
        clocks.run(2 * STEP_NS)
        after = clocks.ages()
        after.found(newest_ns, ages.gaps)
        ages = after
    assert len(ages.gaps) == 2
    assert ages.before_ns(30 * DAY_NS) == clocks.wall_ns - 70 * DAY_NS < stored_ns

    # Nor do short times without work before as many starts drive out what the clock was put forward by.
    for _ in range(200):
        newest_ns = clocks.wall_ns
        clocks.run(2 * STEP_NS)
        after = clocks.ages()
        after.found(newest_ns, ages.gaps)
        ages = after
    assert ages.before_ns(30 * DAY_NS) == clocks.wall_ns - 70 * DAY_NS < stored_ns


def test_a_clock_that_is_put_right_again_is_believed() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    for ahead_ns in (3650 * DAY_NS, 5 * HOUR_NS):
        clocks.wall_ns += ahead_ns
        ages.look()
        clocks.run(DAY_NS)
    assert ages.before_ns(2 * DAY_NS + 1) == START_NS - 1
    # Put back in two steps, of which the first takes the newest gap and some of the other.
    for back_ns in (10 * HOUR_NS, 3650 * DAY_NS - 5 * HOUR_NS):
        clocks.wall_ns -= back_ns
        # What was stored before is as old as it was.
        assert ages.before_ns(2 * DAY_NS + 1) == START_NS - 1
    assert ages.gaps == ()
    clocks.run(30 * DAY_NS)
    assert ages.before_ns(DAY_NS) == clocks.wall_ns - DAY_NS


def test_who_starts_with_a_clock_that_was_put_right_meanwhile_believes_it_from_then_on() -> None:
    clocks = Clocks()
    ages = clocks.ages()
    stored_ns = clocks.wall_ns
    clocks.wall_ns += 3650 * DAY_NS
    ages.look()
    clocks.wall_ns -= 3650 * DAY_NS
    clocks.run(DAY_NS)
    after = clocks.ages()
    after.found(stored_ns + 3650 * DAY_NS, ages.gaps)
    # How much of this day is real can't be known.
    assert after.before_ns(DAY_NS) <= stored_ns
    clocks.run(2 * DAY_NS)
    assert after.before_ns(DAY_NS) == clocks.wall_ns - DAY_NS
    # Nor has another machine's gap, whose clock goes wrong, anything to say here.
    clocks.wall_ns = stored_ns - DAY_NS
    other = clocks.ages()
    other.found(stored_ns, ages.gaps)
    assert other.gaps == ()
