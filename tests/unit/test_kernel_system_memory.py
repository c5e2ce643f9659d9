"""Finite memory: what is taken where, in which order, and that it is all given back. kernel-semantics.md section 5."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modpressure.kernel.system_memory import (
    Allocation,
    Amounts,
    Freed,
    Holding,
    MemoryArea,
    Part,
    Shortage,
    SystemMemory,
)

PAGE = 4096


def file(size_bytes: int) -> Allocation:
    return Allocation(Part.FILE, (size_bytes,))


def image(size_bytes: int) -> Allocation:
    return Allocation(Part.IMAGE, (size_bytes,))


def layout(*sizes: int) -> Allocation:
    return Allocation(Part.LAYOUT, sizes)


def test_a_file_takes_pages_and_one_more_of_address_space() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts())
    assert memory.take("a", file(PAGE + 1)) is None
    assert memory.taken == Amounts(2 * PAGE, 3 * PAGE, 0)


def test_a_layout_takes_the_module_area_with_a_guard_page_for_each_type() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts())
    assert memory.take("a", layout(PAGE, 2 * PAGE, 0, 0, PAGE, PAGE, 0)) is None
    assert memory.taken == Amounts(5 * PAGE, 0, 9 * PAGE)
    memory.live("a")
    assert memory.taken == Amounts(3 * PAGE, 0, 5 * PAGE)
    assert memory.unload("a")
    assert memory.taken == Amounts()
    assert memory.peak == Amounts(5 * PAGE, 0, 9 * PAGE)


def test_the_file_is_first_refused_by_address_space_and_the_image_by_pages() -> None:
    full = Amounts(memory_bytes=PAGE, vmalloc_bytes=PAGE)
    memory: SystemMemory[str] = SystemMemory(full)
    assert memory.take("a", file(2 * PAGE)) == Shortage(MemoryArea.VMALLOC, 3 * PAGE, PAGE)
    assert memory.take("a", image(2 * PAGE)) == Shortage(MemoryArea.PAGES, 2 * PAGE, PAGE)
    # Pages for the image there are, but no place to map them.
    assert memory.take("a", image(PAGE)) == Shortage(MemoryArea.VMALLOC, 2 * PAGE, PAGE)
    assert memory.taken == Amounts()
    assert memory.in_flight == 0


def test_what_fills_exactly_fits() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts(2 * PAGE, 3 * PAGE, 0))
    assert memory.take("a", file(2 * PAGE)) is None
    assert memory.take("b", file(1)) == Shortage(MemoryArea.VMALLOC, 2 * PAGE, 0)


def test_the_type_that_finds_no_room_is_named_and_those_before_it_are_freed() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts(module_area_bytes=7 * PAGE))
    shortage = memory.take("a", layout(PAGE, PAGE, 3 * PAGE, 0, 0, PAGE, 0))
    assert shortage == Shortage(MemoryArea.MODULES, 4 * PAGE, 3 * PAGE)
    assert (shortage.check, shortage.value) == ("memory: module area", f"{4 * PAGE} bytes asked, {3 * PAGE} left")
    assert memory.taken == Amounts()
    assert memory.peak == Amounts(2 * PAGE, 0, 4 * PAGE)
    # The same call may well hold its file meanwhile, and keeps it.
    assert memory.take("a", file(PAGE)) is None
    assert memory.take("a", layout(8 * PAGE)) is not None
    assert memory.holding("a") == Holding(file_bytes=PAGE)


def test_the_packed_file_stays_until_the_call_goes_on() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts())
    memory.take("a", file(PAGE))
    memory.take("a", image(4 * PAGE))
    assert memory.taken.memory_bytes == 5 * PAGE
    assert memory.settle("a")
    assert memory.taken == Amounts(4 * PAGE, 5 * PAGE, 0)
    assert not memory.settle("a")
    memory.take("b", file(PAGE))
    assert not memory.settle("b"), "the only copy of a plain file"


def test_asking_again_takes_nothing_more() -> None:
    memory: SystemMemory[str] = SystemMemory(Amounts())
    for allocation in (file(PAGE), image(PAGE), layout(PAGE, 0, 0, 0, PAGE)):
        memory.take("a", allocation)
        taken = memory.taken
        memory.take("a", allocation)
        assert memory.taken == taken


class Machine(RuleBasedStateMachine):
    """Calls that take and give at random, against an account of each allocation."""

    LIMITS = Amounts(40 * PAGE, 50 * PAGE, 45 * PAGE)
    callers = st.integers(1, 5)
    sizes = st.integers(0, 20 * PAGE)

    def __init__(self) -> None:
        super().__init__()
        self.memory: SystemMemory[int] = SystemMemory(self.LIMITS)
        self.live: set[int] = set()
        self.copies: dict[tuple[int, Part], int] = {}
        self.layouts: dict[int, list[int]] = {}

    def pages(self, size_bytes: int) -> int:
        return (size_bytes + PAGE - 1) // PAGE

    def expected(self) -> Amounts:
        copies = list(self.copies.values())
        types = [pages for layout in self.layouts.values() for pages in layout if pages]
        return Amounts(
            PAGE * (sum(copies) + sum(types)), PAGE * (sum(copies) + len(copies)), PAGE * (sum(types) + len(types))
        )

    @rule(caller=callers, part=st.sampled_from([Part.FILE, Part.IMAGE]), size_bytes=st.integers(1, 20 * PAGE))
    def copy(self, caller: int, part: Part, size_bytes: int) -> None:
        if caller in self.live:
            return
        before, had = self.memory.taken, (caller, part) in self.copies
        shortage = self.memory.take(caller, Allocation(part, (size_bytes,)))
        if shortage:
            assert not had
            assert shortage.asked_bytes > shortage.left_bytes >= 0
            assert self.memory.taken == before
        elif not had:
            self.copies[caller, part] = self.pages(size_bytes)

    @rule(caller=callers, sizes=st.lists(sizes, min_size=7, max_size=7))
    def lay_out(self, caller: int, sizes: list[int]) -> None:
        if caller in self.live:
            return
        before, had = self.memory.taken, any(self.layouts.get(caller, ()))
        shortage = self.memory.take(caller, layout(*sizes))
        if shortage:
            assert not had
            assert self.memory.taken == before
        elif not had:
            self.layouts[caller] = [self.pages(size) for size in sizes]

    @rule(caller=callers, freed=st.sampled_from(["file", "image", "init", "all"]))
    def give(self, caller: int, freed: Freed) -> None:
        if caller in self.live:
            return
        self.memory.give(caller, freed)
        if freed != "init":
            self.copies.pop((caller, Part.FILE), None)
        if freed in ("image", "all"):
            self.copies.pop((caller, Part.IMAGE), None)
        if freed == "init" and caller in self.layouts:
            self.layouts[caller][4:] = [0, 0, 0]
        if freed == "all":
            self.layouts.pop(caller, None)

    @rule(caller=callers)
    def end_live(self, caller: int) -> None:
        if caller in self.live or self.memory.holding(caller) is None:
            return
        self.memory.live(caller)
        self.live.add(caller)
        for part in Part:
            self.copies.pop((caller, part), None)
        if caller in self.layouts:
            self.layouts[caller][4:] = [0, 0, 0]

    @rule(caller=callers)
    def unload(self, caller: int) -> None:
        assert self.memory.unload(caller) == (caller in self.live)
        if caller in self.live:
            self.live.discard(caller)
            self.layouts.pop(caller, None)

    @invariant()
    def never_more_than_the_limit(self) -> None:
        for taken, peak, limit in zip(self.memory.taken, self.memory.peak, self.LIMITS, strict=True):
            assert 0 <= taken <= peak <= limit

    @invariant()
    def every_allocation_is_accounted_for(self) -> None:
        assert self.memory.taken == self.expected()

    def teardown(self) -> None:
        for caller in list(self.live):
            self.memory.unload(caller)
        for caller in self.memory.callers():
            self.memory.give(caller, "all")
        assert self.memory.taken == Amounts()
        assert self.memory.in_flight == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
