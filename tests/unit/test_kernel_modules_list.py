"""The modules list: kernel-semantics.md section 3."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modpressure.kernel.modules_list import PROCEED, Answer, ModulesList, State, Verdict

EEXIST = Answer(Verdict.DUPLICATE, "EEXIST")
EEXIST_AFTER_WAIT = Answer(Verdict.DUPLICATE, "EEXIST", waited=True)
EBUSY_AFTER_WAIT = Answer(Verdict.DUPLICATE, "EBUSY", waited=True)


def names(modules: ModulesList[str]) -> list[str]:
    return [entry.name for entry in modules]


def test_a_name_that_is_absent_may_be_loaded_by_everyone_until_one_inserts_it() -> None:
    modules: ModulesList[str] = ModulesList()
    assert modules.check("xfs", "a") == modules.check("xfs", "b") == PROCEED
    assert modules.reserve("xfs", "a") == PROCEED
    assert modules.reserve("xfs", "b") is None
    assert modules.check("xfs", "c") is None
    assert modules.waiting == 2


def test_who_waits_for_a_module_that_becomes_live_finds_it_there() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.reserve("xfs", "a")
    modules.check("xfs", "b")
    modules.reserve("xfs", "c")
    assert modules.live("xfs", 4096) == [("b", EEXIST_AFTER_WAIT), ("c", EEXIST_AFTER_WAIT)]
    assert modules.waiting == 0
    assert modules.check("xfs", "d") == modules.reserve("xfs", "d") == EEXIST
    entry = modules.get("xfs")
    assert entry is not None
    assert (entry.state, entry.owner, entry.core_bytes) == (State.LIVE, "a", 4096)


def test_who_waits_for_a_module_that_fails_does_not_take_it_over() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.reserve("xfs", "a")
    modules.reserve("xfs", "b")
    assert modules.remove("xfs") == [("b", EBUSY_AFTER_WAIT)]
    assert modules.get("xfs") is None
    assert modules.reserve("xfs", "c") == PROCEED


def test_who_asks_again_for_a_name_that_is_its_own_gets_it_again_until_it_is_live() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.reserve("xfs", "a")
    assert modules.reserve("xfs", "a") == PROCEED
    modules.come("xfs")
    assert modules.reserve("xfs", "a") == PROCEED
    modules.live("xfs", 0)
    assert modules.reserve("xfs", "a") == EEXIST


def test_a_name_whose_init_runs_is_waited_for_like_one_that_is_unformed() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.reserve("xfs", "a")
    modules.come("xfs")
    assert modules.check("xfs", "b") is None
    assert modules.live("xfs", 0) == [("b", EEXIST_AFTER_WAIT)]


def test_a_module_that_is_going_is_not_waited_for() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.restore("xfs", State.GOING, "a", 4096)
    assert modules.check("xfs", "b") == Answer(Verdict.DUPLICATE, "EBUSY")


def test_asking_again_changes_nothing() -> None:
    modules: ModulesList[str] = ModulesList()
    assert modules.reserve("xfs", "a") == modules.reserve("xfs", "a") == PROCEED
    assert modules.reserve("xfs", "b") is modules.reserve("xfs", "b") is None
    assert modules.waiting == 1
    assert modules.live("xfs", 0) == [("b", EEXIST_AFTER_WAIT)]
    # Its owner asks once more, not knowing: it is a duplicate of its own module by now.
    assert modules.reserve("xfs", "a") == EEXIST


def test_an_interrupted_wait_is_over_at_once_and_nobody_else_notices() -> None:
    modules: ModulesList[str] = ModulesList()
    modules.reserve("xfs", "a")
    modules.check("xfs", "b")
    modules.check("xfs", "c")
    assert modules.interrupt("b")
    assert not modules.interrupt("b")
    assert not modules.interrupt("a")
    assert modules.live("xfs", 0) == [("c", EEXIST_AFTER_WAIT)]


def test_newest_first() -> None:
    modules: ModulesList[str] = ModulesList()
    for name in ("a", "b", "c"):
        modules.reserve(name, name)
        modules.live(name, 0)
    modules.remove("a")
    modules.reserve("a", "x")
    assert names(modules) == ["a", "c", "b"]
    assert len(modules) == 3


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (State.LIVE, PROCEED),
        (State.UNFORMED, Answer(Verdict.FAILED, "ENOENT")),
        (State.COMING, Answer(Verdict.FAILED, "EBUSY")),
        (State.GOING, Answer(Verdict.FAILED, "EBUSY")),
    ],
)
def test_only_a_live_module_can_be_unloaded(state: State, answer: Answer) -> None:
    modules: ModulesList[str] = ModulesList()
    assert modules.unload("xfs") == Answer(Verdict.FAILED, "ENOENT")
    modules.restore("xfs", state, "a", 0)
    assert modules.unload("xfs") == answer
    assert names(modules) == ["xfs"]


class ListMachine(RuleBasedStateMachine):
    """Calls that check, reserve, end and are interrupted in any order, beside a model that is plain to see."""

    MODULES = st.sampled_from(["xfs", "kvm"])

    def __init__(self) -> None:
        super().__init__()
        self.modules: ModulesList[int] = ModulesList()
        self.calls = 0
        self.owners: dict[str, int] = {}
        self.live: set[str] = set()
        self.waiting: dict[int, str] = {}

    def told(self, woken: list[tuple[int, Answer]], name: str, errno: str) -> None:
        assert [caller for caller, _ in woken] == [caller for caller, of in self.waiting.items() if of == name]
        assert all(answer == Answer(Verdict.DUPLICATE, errno, waited=True) for _, answer in woken)
        for caller, _ in woken:
            del self.waiting[caller]

    @rule(name=MODULES, insert=st.booleans())
    def ask(self, name: str, insert: bool) -> None:
        self.calls += 1
        ask = self.modules.reserve if insert else self.modules.check
        answer = ask(name, self.calls)
        if name in self.live:
            assert answer == EEXIST
        elif name in self.owners:
            assert answer is None
            self.waiting[self.calls] = name
        else:
            assert answer == PROCEED
            if insert:
                self.owners[name] = self.calls

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.modules.check(self.waiting[caller], caller) is None

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.modules.interrupt(caller)
        del self.waiting[caller]

    @precondition(lambda self: set(self.owners) - self.live)
    @rule(data=st.data(), succeeds=st.booleans())
    def end(self, data: st.DataObject, succeeds: bool) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.owners) - self.live)))
        if succeeds:
            self.told(self.modules.live(name, 4096), name, "EEXIST")
            self.live.add(name)
        else:
            self.told(self.modules.remove(name), name, "EBUSY")
            del self.owners[name]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        assert self.modules.unload(name) == PROCEED
        assert self.modules.remove(name) == []
        self.live.discard(name)
        del self.owners[name]

    @invariant()
    def agrees(self) -> None:
        assert self.modules.waiting == len(self.waiting)
        assert {entry.name: entry.owner for entry in self.modules} == self.owners
        # Nobody waits for a name that nobody will end.
        assert set(self.waiting.values()) <= set(self.owners) - self.live

    def teardown(self) -> None:
        for name in sorted(set(self.owners) - self.live):
            self.told(self.modules.remove(name), name, "EBUSY")
            del self.owners[name]
        assert self.modules.waiting == 0
        assert {entry.name for entry in self.modules} == self.live


TestListMachine = ListMachine.TestCase
TestListMachine.settings = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_who_waits_for_another_name_waits_for_the_first_no_more() -> None:
    names: ModulesList[str] = ModulesList()
    for name in ("a", "b"):
        names.reserve(name, name)
        assert names.check(name, "waiter") is None
    assert names.waiting == 1
    assert names.remove("a") == []
    assert names.remove("b") == [("waiter", EBUSY_AFTER_WAIT)]
