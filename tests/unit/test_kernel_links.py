"""The links between modules: kernel-semantics.md section 2, steps 19 and 22."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modpressure.kernel.identity import ExportedSymbol
from modpressure.kernel.links import PLAIN, Formation, Found, Links, unloading
from modpressure.kernel.modules_list import ModulesList

PLAIN_SYMBOL = ExportedSymbol(1)
GPL_SYMBOL = ExportedSymbol(2, gpl_only=True, namespace="NS")


def test_what_a_formed_module_exports_is_found_until_it_is_gone() -> None:
    links: Links[str] = Links()
    links.form("jbd2", Formation({"jbd2_start": GPL_SYMBOL}, is_proprietary=True))
    assert links.find("jbd2_start") == Found("jbd2", GPL_SYMBOL, True)
    assert links.taken(["ext4_new", "jbd2_start"]) == "jbd2_start"
    links.drop("jbd2")
    assert links.find("jbd2_start") is None
    assert links.taken(["jbd2_start"]) == ""
    assert not links.of("jbd2").is_proprietary


def test_users_are_listed_newest_first_and_leave_with_the_module() -> None:
    links: Links[str] = Links()
    links.form("crc16", Formation({"crc16": PLAIN_SYMBOL}))
    links.form("ext4", Formation(uses=("crc16",)))
    links.form("f2fs", Formation(uses=("crc16",)))
    assert links.users("crc16") == ("f2fs", "ext4")
    links.drop("ext4")
    assert links.users("crc16") == ("f2fs",)
    links.drop("f2fs")
    assert links.users("crc16") == ()


def test_a_module_is_formed_once() -> None:
    links: Links[str] = Links()
    links.form("loop", PLAIN)
    with pytest.raises(KeyError):
        links.form("loop", PLAIN)


def test_what_was_never_formed_has_no_links() -> None:
    links: Links[str] = Links()
    links.drop("loop")
    assert links.of("loop") == PLAIN
    assert links.wake("loop") == []
    assert not links.interrupt("a")


def test_who_waits_for_an_init_function_is_woken_in_turn_unless_interrupted() -> None:
    links: Links[str] = Links()
    for caller in ("a", "b", "c"):
        links.wait("jbd2", caller)
    links.wait("mbcache", "d")
    assert links.interrupt("b")
    assert not links.interrupt("b")
    assert links.wake("jbd2") == ["a", "c"]
    assert links.waiting == 1
    assert links.interrupt("d")
    assert links.waiting == 0


def test_room_for_per_cpu_variables_is_given_back() -> None:
    links: Links[str] = Links()
    links.form("a", Formation(percpu_bytes=64))
    links.form("b", Formation(percpu_bytes=8))
    assert links.percpu_bytes == 72
    links.drop("a")
    assert links.percpu_bytes == 8


def test_a_module_is_unloaded_unless_it_is_used_busy_or_permanent() -> None:
    modules: ModulesList[str] = ModulesList()
    links: Links[str] = Links()

    def says(*, forced: bool = False) -> str:
        return unloading(modules, links, "jbd2", forced=forced).errno

    assert says() == "ENOENT"
    modules.reserve("jbd2", "a")
    assert says() == "ENOENT"
    links.form("jbd2", Formation(is_permanent=True))
    modules.come("jbd2")
    assert says() == says(forced=True) == "EBUSY"
    modules.live("jbd2", 4096)
    assert says() == "EBUSY"
    assert says(forced=True) == ""
    links.form("ext4", Formation(uses=("jbd2",)))
    assert says() == says(forced=True) == "EWOULDBLOCK"
    links.drop("ext4")
    assert says(forced=True) == ""


NAMES = st.sampled_from("abcdef")
CALLERS = st.integers(0, 5)


class LinksMachine(RuleBasedStateMachine):
    """Whatever is formed, dropped, awaited and interrupted: nothing is left of a module or a wait that has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.links: Links[int] = Links()
        self.formed: dict[str, tuple[set[str], set[str]]] = {}
        self.waiting: dict[int, str] = {}

    @rule(name=NAMES, count=st.integers(0, 3), uses=st.sets(NAMES), percpu_bytes=st.integers(0, 100))
    def form(self, name: str, count: int, uses: set[str], percpu_bytes: int) -> None:
        if name in self.formed:
            return
        uses &= self.formed.keys()
        exports = {f"{name}{number}" for number in range(count)}
        self.links.form(
            name, Formation(dict.fromkeys(exports, PLAIN_SYMBOL), tuple(sorted(uses)), percpu_bytes=percpu_bytes)
        )
        self.formed[name] = (exports, uses)

    @precondition(lambda self: self.formed)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        unused = sorted(name for name in self.formed if not self.links.users(name))
        name = data.draw(st.sampled_from(unused))
        self.links.drop(name)
        del self.formed[name]

    @rule(caller=CALLERS, owner=NAMES)
    def wait(self, caller: int, owner: str) -> None:
        if caller not in self.waiting:
            self.links.wait(owner, caller)
            self.waiting[caller] = owner

    @rule(caller=CALLERS)
    def interrupt(self, caller: int) -> None:
        assert self.links.interrupt(caller) == (self.waiting.pop(caller, None) is not None)

    @rule(owner=NAMES)
    def wake(self, owner: str) -> None:
        woken = self.links.wake(owner)
        assert sorted(woken) == sorted(caller for caller, awaited in self.waiting.items() if awaited == owner)
        for caller in woken:
            del self.waiting[caller]

    @invariant()
    def agrees(self) -> None:
        assert set(self.links) == set(self.formed)
        assert self.links.waiting == len(self.waiting)
        for name in "abcdef":
            users = {user for user, (_, uses) in self.formed.items() if name in uses}
            assert set(self.links.users(name)) == users
            exports = self.formed.get(name, (set(), set()))[0]
            for number in range(3):
                found = self.links.find(f"{name}{number}")
                assert (found is not None) == (f"{name}{number}" in exports)

    def teardown(self) -> None:
        while self.formed:
            name = next(name for name in self.formed if not self.links.users(name))
            self.links.drop(name)
            del self.formed[name]
        for caller in list(self.waiting):
            self.links.interrupt(caller)
        assert self.links.percpu_bytes == 0
        assert not any(vars(self.links).values())


TestLinksMachine = LinksMachine.TestCase
TestLinksMachine.settings = settings(max_examples=100, deadline=None)
