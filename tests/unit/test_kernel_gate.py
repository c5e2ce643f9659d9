"""The gate of Linux 6.5 and later: kernel-semantics.md section 2.1."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modpressure.kernel.gate import Gate
from modpressure.kernel.modules_list import PROCEED, Answer, Verdict


def shared(errno: str) -> Answer:
    return Answer(Verdict.SHARED, errno, waited=True)


def test_calls_in_flight_on_one_inode_share_the_first_ones_result() -> None:
    gate: Gate[str] = Gate()
    assert gate.enter("inode 7", "a") == PROCEED
    assert gate.enter("inode 7", "b") is gate.enter("inode 7", "c") is None
    assert gate.waiting == 2
    assert gate.leave("a", "") == [("b", shared("")), ("c", shared(""))]
    assert gate.waiting == 0


def test_a_failure_is_shared_as_well() -> None:
    gate: Gate[str] = Gate()
    gate.enter("inode 7", "a")
    gate.enter("inode 7", "b")
    assert gate.leave("a", "ENOEXEC") == [("b", shared("ENOEXEC"))]


def test_other_inodes_do_not_meet() -> None:
    gate: Gate[str] = Gate()
    assert gate.enter("inode 7", "a") == gate.enter("inode 8", "b") == PROCEED
    assert gate.leave("a", "") == []


def test_who_comes_after_the_end_works_by_itself() -> None:
    gate: Gate[str] = Gate()
    gate.enter("inode 7", "a")
    gate.leave("a", "")
    assert gate.enter("inode 7", "b") == PROCEED


def test_a_call_without_a_gate_may_leave() -> None:
    gate: Gate[str] = Gate()
    gate.enter("inode 7", "a")
    gate.enter("inode 7", "b")
    assert gate.leave("b", "") == gate.leave("c", "") == []
    assert gate.leave("a", "") == [("b", shared(""))]
    assert gate.leave("a", "") == []


def test_asking_again_changes_nothing() -> None:
    gate: Gate[str] = Gate()
    assert gate.enter("inode 7", "a") == gate.enter("inode 7", "a") == PROCEED
    assert gate.enter("inode 7", "b") is gate.enter("inode 7", "b") is None
    assert gate.leave("a", "") == [("b", shared(""))]


def test_an_interrupted_wait_is_over_at_once() -> None:
    gate: Gate[str] = Gate()
    gate.enter("inode 7", "a")
    gate.enter("inode 7", "b")
    gate.enter("inode 7", "c")
    assert gate.interrupt("b")
    assert not gate.interrupt("b")
    assert not gate.interrupt("a")
    assert gate.leave("a", "") == [("c", shared(""))]


class GateMachine(RuleBasedStateMachine):
    """Calls that enter, leave and are interrupted in any order, beside a model that is plain to see."""

    INODES = st.sampled_from(["7", "8"])

    def __init__(self) -> None:
        super().__init__()
        self.gate: Gate[int] = Gate()
        self.calls = 0
        self.holders: dict[str, int] = {}
        self.waiting: dict[int, str] = {}

    @rule(inode=INODES)
    def enter(self, inode: str) -> None:
        self.calls += 1
        answer = self.gate.enter(inode, self.calls)
        if inode in self.holders:
            assert answer is None
            self.waiting[self.calls] = inode
        else:
            assert answer == PROCEED
            self.holders[inode] = self.calls

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.gate.interrupt(caller)
        del self.waiting[caller]

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), errno=st.sampled_from(["", "EEXIST"]))
    def leave(self, data: st.DataObject, errno: str) -> None:
        inode = data.draw(st.sampled_from(sorted(self.holders)))
        woken = self.gate.leave(self.holders.pop(inode), errno)
        assert woken == [(caller, shared(errno)) for caller, of in self.waiting.items() if of == inode]
        for caller, _ in woken:
            del self.waiting[caller]

    @invariant()
    def agrees(self) -> None:
        assert self.gate.waiting == len(self.waiting)
        assert set(self.waiting.values()) <= set(self.holders)

    def teardown(self) -> None:
        for caller in list(self.holders.values()):
            self.gate.leave(caller, "")
        assert self.gate.waiting == 0
        # No inode is held for ever: each can be entered anew.
        for inode in ("7", "8"):
            self.calls += 1
            assert self.gate.enter(inode, self.calls) == PROCEED


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_who_asks_for_another_gate_while_it_waits_has_given_the_first_up() -> None:
    gate = Gate[str]()
    gate.enter("a", "holder of a")
    gate.enter("b", "holder of b")
    assert gate.enter("a", "waiter") is None
    assert gate.enter("b", "waiter") is None
    assert gate.waiting == 1
    assert gate.leave("holder of a", "") == []
    assert [waiter for waiter, _ in gate.leave("holder of b", "")] == ["waiter"]
    assert gate.waiting == 0


def test_who_waits_and_enters_a_free_gate_waits_no_more() -> None:
    gate = Gate[str]()
    gate.enter("a", "holder of a")
    assert gate.enter("a", "waiter") is None
    assert gate.enter("b", "waiter") == PROCEED
    assert gate.waiting == 0
    assert gate.leave("holder of a", "") == []
    assert gate.held == {"waiter": "b"}
