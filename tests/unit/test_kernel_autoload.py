"""request_module's places and merged names, in a time of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modpressure.kernel.autoload import (
    BUSY_TIMEOUT_NS,
    MAX_CONCURRENT,
    MAX_NAME_BYTES,
    REMEMBER_NS,
    Autoload,
    return_value,
)
from modpressure.kernel.modules_list import PROCEED, Answer, Verdict

WAITED = Answer(Verdict.PROCEED, waited=True)
ETIME = Answer(Verdict.FAILED, "ETIME", waited=True)


def full() -> Autoload[int]:
    autoload: Autoload[int] = Autoload()
    for caller in range(MAX_CONCURRENT):
        assert autoload.request(f"m{caller}", caller, 0) == PROCEED
    return autoload


def test_fifty_run_and_the_next_get_their_places_in_turn() -> None:
    autoload = full()
    assert MAX_CONCURRENT == 50
    assert [autoload.request("late", caller, 10) for caller in (100, 101)] == [None, None]
    assert autoload.request("late", 100, 11) is None
    assert (autoload.in_flight, autoload.waiting) == (52, 2)
    assert autoload.finish(7, "", 0, 20) == [(100, WAITED)]
    assert autoload.finish(7, "", 0, 21) == []
    assert autoload.drop(8, 22) == [(101, WAITED)]
    assert autoload.next_expiry_ns is None


def test_after_five_seconds_without_a_place_it_is_etime() -> None:
    autoload = full()
    autoload.request("a", 100, 10)
    autoload.request("b", 101, 20)
    assert autoload.next_expiry_ns == 10 + BUSY_TIMEOUT_NS == 10 + 5_000_000_000
    assert autoload.expire(9 + BUSY_TIMEOUT_NS) == []
    # A place that becomes free too late is the next one's.
    assert autoload.finish(0, "", 0, 10 + BUSY_TIMEOUT_NS) == [(100, ETIME), (101, WAITED)]


def test_equal_names_run_as_often_as_asked_where_they_are_not_merged() -> None:
    autoload: Autoload[int] = Autoload()
    assert [autoload.request("xfs", caller, 0) for caller in range(3)] == [PROCEED] * 3


def test_equal_names_share_one_result_and_for_sixty_seconds_after() -> None:
    autoload: Autoload[int] = Autoload()
    assert autoload.request("fs-xfs", 1, 0, merge=True) == PROCEED
    assert autoload.request("fs-xfs", 2, 5, merge=True) is None
    assert autoload.request("fs_xfs", 3, 5, merge=True) == PROCEED  # another name, letter by letter
    shared = Answer(Verdict.SHARED, exit_status=1)
    assert autoload.finish(1, "", 1, 10) == [(2, shared._replace(waited=True))]
    assert autoload.in_flight == 1
    assert autoload.request("fs-xfs", 4, 9 + REMEMBER_NS, merge=True) == shared
    assert autoload.request("fs-xfs", 5, 10 + REMEMBER_NS, merge=True) == PROCEED


def test_who_waits_for_a_result_keeps_its_place() -> None:
    autoload: Autoload[int] = Autoload(max_concurrent=2)
    autoload.request("xfs", 1, 0, merge=True)
    assert autoload.request("xfs", 2, 0, merge=True) is None
    assert autoload.request("kvm", 3, 0, merge=True) is None
    assert autoload.request("xfs", 4, 0, merge=True) is None
    told = autoload.finish(1, "", 0, 1)
    shared = Answer(Verdict.SHARED, waited=True)
    assert told == [(2, shared), (3, WAITED), (4, shared)]


def test_if_the_one_that_works_is_gone_the_first_that_waits_works() -> None:
    autoload: Autoload[int] = Autoload()
    autoload.request("xfs", 1, 0, merge=True)
    autoload.request("xfs", 2, 0, merge=True)
    autoload.request("xfs", 3, 0, merge=True)
    assert autoload.drop(1, 1) == [(2, WAITED)]
    assert autoload.drop(3, 2) == []
    assert autoload.finish(2, "", 0, 3) == []
    assert autoload.in_flight == 0


def test_a_name_that_is_too_long_is_refused_and_takes_no_place() -> None:
    autoload: Autoload[int] = Autoload()
    assert autoload.request("x" * MAX_NAME_BYTES, 1, 0) == PROCEED
    assert autoload.request("x" * 56, 2, 0) == Answer(Verdict.FAILED, "ENAMETOOLONG")
    assert autoload.in_flight == 1


def test_what_is_restored_holds_a_place() -> None:
    autoload: Autoload[int] = Autoload(max_concurrent=1)
    autoload.restore("xfs", 1, merge=True)
    autoload.restore("xfs", 1, merge=True)
    autoload.restore("kvm", 2)
    assert autoload.request("nvme", 3, 0) is None
    assert autoload.request("xfs", 1, 0, merge=True) == PROCEED
    assert autoload.finish(2, "", 0, 1) == []
    assert autoload.finish(1, "", 0, 2) == [(3, WAITED)]


@pytest.mark.parametrize(("errno", "status", "value"), [("", 0, 0), ("", 1, 256), ("ETIME", 0, -62)])
def test_what_request_module_returns(errno: str, status: int, value: int) -> None:
    assert return_value(errno, status) == value


class Requests(RuleBasedStateMachine):
    """Any sequence of requests, ends, losses and time."""

    def __init__(self) -> None:
        super().__init__()
        self.autoload: Autoload[int] = Autoload(max_concurrent=3)
        self.now_ns = 0
        self.asked = 0
        self.running: dict[int, str] = {}
        self.waiting: dict[int, tuple[str, bool]] = {}

    def take(self, told: list[tuple[int, Answer]]) -> None:
        for caller, answer in told:
            name, _ = self.waiting.pop(caller)
            assert answer.waited
            if answer.verdict is Verdict.PROCEED:
                self.running[caller] = name

    @rule(name=st.sampled_from(["a", "b"]), merge=st.booleans())
    def ask(self, name: str, merge: bool) -> None:
        self.asked += 1
        answer = self.autoload.request(name, self.asked, self.now_ns, merge=merge)
        if answer is None:
            self.waiting[self.asked] = (name, merge)
        elif answer.verdict is Verdict.PROCEED:
            self.running[self.asked] = name

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            caller = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[caller]
            self.take(self.autoload.finish(caller, "", 0, self.now_ns))

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        callers = sorted([*self.running, *self.waiting])
        if callers:
            caller = data.draw(st.sampled_from(callers))
            self.running.pop(caller, None)
            self.waiting.pop(caller, None)
            self.take(self.autoload.drop(caller, self.now_ns))

    @rule(seconds=st.integers(1, 70))
    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * 10**9
        self.take(self.autoload.expire(self.now_ns))

    @invariant()
    def places_are_kept_and_nobody_is_forgotten(self) -> None:
        assert len(self.running) <= 3
        assert self.autoload.in_flight == len(self.running) + len(self.waiting)
        assert self.autoload.waiting == len(self.waiting)
        assert set(self.autoload.callers()) == {*self.running, *self.waiting}
        # Somebody who works is there for whoever waits.
        assert self.running or not self.waiting


TestRequests = Requests.TestCase
