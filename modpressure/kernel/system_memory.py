"""A system's memory, where it is finite: what its calls and modules take, and which allocation finds no room.

What is taken where follows from the allocations of kernel/module/main.c, fs/kernel_read_file.c and
kernel/module/decompress.c (Linux 6.12):

- the file, or init_module's copy: vmalloc, so address space of the vmalloc area first, then pages;
- the decompressed image: pages one by one, then vmap, so pages first, then address space of the vmalloc area;
- the layout: each of its types, in the enum's order, address space of the module area first, then pages. A type that
  finds no room takes the ones before it with it.

Each area of address space has a guard page behind it, which is no memory (``__get_vm_area_node``, mm/vmalloc.c). Nobody
waits for memory: what does not fit fails. Not modelled: holes between areas, reclaim, the kernel's small allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, Generic, Literal, NamedTuple

from modpressure.kernel.modules_list import Caller

PAGE_BYTES: Final = 4096

GUARD_BYTES: Final = PAGE_BYTES
"""Address space behind each area that nothing may be in."""

MODULE_AREA_BYTES: Final = 1520 << 20
"""Module area of x86-64 without KASLR: from the 512 MiB of the kernel's image to 16 MiB below the top
(MODULES_LEN, arch/x86/include/asm/pgtable_64_types.h; Documentation/arch/x86/x86_64/mm.rst)."""

KASLR_MODULE_AREA_BYTES: Final = 1008 << 20
"""The same with CONFIG_RANDOMIZE_BASE, where the image has 1 GiB."""

VMALLOC_BYTES: Final = 32 << 40
"""The vmalloc area of x86-64 with four levels of page tables (VMALLOC_SIZE_TB_L4, same header)."""

CORE_TYPES: Final = 4
"""The first four of the seven types of a layout stay; the others go after init."""


class MemoryArea(Enum):
    """What an allocation may find full, in the words of an event's check."""

    PAGES = "pages"
    VMALLOC = "vmalloc area"
    MODULES = "module area"


class Part(IntEnum):
    """What a call allocates at once. The numbers are those of ``modpressure.v1.MemoryPart``."""

    FILE = 1
    IMAGE = 2
    LAYOUT = 3


Freed = Literal["file", "image", "init", "all"]
"""What a call gives back: the packed ``file``, every copy of the ``image``, the ``init`` types, or ``all``."""


class Amounts(NamedTuple):
    """Bytes of memory, and of two areas of address space."""

    memory_bytes: int = 0
    vmalloc_bytes: int = 0
    module_area_bytes: int = 0

    def plus(self, other: Amounts) -> Amounts:
        """Return the sums."""
        return Amounts(*(mine + others for mine, others in zip(self, other, strict=True)))

    def minus(self, other: Amounts) -> Amounts:
        """Return the differences."""
        return Amounts(*(mine - others for mine, others in zip(self, other, strict=True)))

    def most(self, other: Amounts) -> Amounts:
        """Return the greater of each."""
        return Amounts(*map(max, self, other))


NOTHING: Final = Amounts()


class Shortage(NamedTuple):
    """An allocation that found no room: ENOMEM."""

    area: MemoryArea
    asked_bytes: int
    """With the guard page, where address space was asked for."""

    left_bytes: int

    @property
    def check(self) -> str:
        """What an event calls it, such as ``memory: module area``."""
        return f"memory: {self.area.value}"

    @property
    def value(self) -> str:
        """What an event says of it."""
        return f"{self.asked_bytes} bytes asked, {self.left_bytes} left"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a step of a call asks for: one size, or the sizes of a layout's types in the enum's order; bytes."""

    part: Part
    sizes: tuple[int, ...]


@dataclass(slots=True)
class Holding:
    """What one call, or the module that it loaded, holds; bytes in whole pages."""

    file_bytes: int = 0
    image_bytes: int = 0
    """Decompressed; of a plain file there is only the one copy."""

    core_bytes: int = 0
    core_areas: int = 0
    """Types of the core that are not empty: each has a guard page."""

    init_bytes: int = 0
    init_areas: int = 0

    @property
    def amounts(self) -> Amounts:
        """What that comes to."""
        copies_bytes, layout_bytes = self.file_bytes + self.image_bytes, self.core_bytes + self.init_bytes
        copies = bool(self.file_bytes) + bool(self.image_bytes)
        areas = self.core_areas + self.init_areas
        return Amounts(
            copies_bytes + layout_bytes, copies_bytes + copies * GUARD_BYTES, layout_bytes + areas * GUARD_BYTES
        )

    def has(self, part: Part) -> bool:
        """Whether a part was taken."""
        return bool(
            {
                Part.FILE: self.file_bytes,
                Part.IMAGE: self.image_bytes,
                Part.LAYOUT: self.core_areas + self.init_areas,
            }[part]
        )


class SystemMemory(Generic[Caller]):
    """What a system has, what is taken of it, and by whom. No limit is ever exceeded."""

    def __init__(self, limits: Amounts, peak: Amounts = NOTHING) -> None:
        """0 is no limit; ``peak`` is the most that was taken before."""
        self.limits = limits
        self.taken = Amounts()
        self.peak = peak
        self._calls: dict[Caller, Holding] = {}
        self._modules: dict[Caller, Holding] = {}

    @property
    def in_flight(self) -> int:
        """How many calls hold something."""
        return len(self._calls)

    def callers(self) -> list[Caller]:
        """Return the calls in flight that hold something."""
        return list(self._calls)

    def holding(self, caller: Caller) -> Holding | None:
        """Return what a call or its module holds, None for nothing."""
        return self._calls.get(caller) or self._modules.get(caller)

    def restore(self, caller: Caller, holding: Holding, *, is_live: bool) -> None:
        """Put back what was stored of a call in flight, or of a live module."""
        (self._modules if is_live else self._calls)[caller] = holding
        self._add(holding.amounts)

    def take(self, caller: Caller, allocation: Allocation) -> Shortage | None:
        """Allocate a part for a call in flight; return what it found full, having kept nothing of that part then.

        Asking again for what the call holds takes nothing more, so that a lost answer can be asked for again.
        """
        holding = self._calls.get(caller) or Holding()
        if holding.has(allocation.part):
            return None
        if allocation.part is Part.LAYOUT:
            shortage = self._take_layout(holding, allocation.sizes)
        else:
            shortage = self._take_copy(holding, allocation.part, page_round(sum(allocation.sizes)))
        if shortage is None and any(holding.amounts):
            self._calls[caller] = holding
        return shortage

    def _take_copy(self, holding: Holding, part: Part, size_bytes: int) -> Shortage | None:
        if not size_bytes:
            return None
        pages, space = Amounts(memory_bytes=size_bytes), Amounts(vmalloc_bytes=size_bytes + GUARD_BYTES)
        first, second = (space, pages) if part is Part.FILE else (pages, space)
        shortage = self._claim(first)
        if shortage:
            return shortage
        shortage = self._claim(second)
        if shortage:
            self.taken = self.taken.minus(first)
            return shortage
        if part is Part.FILE:
            holding.file_bytes = size_bytes
        else:
            holding.image_bytes = size_bytes
        return None

    def _take_layout(self, holding: Holding, sizes: Sequence[int]) -> Shortage | None:
        before = self.taken
        for memory_type, size in enumerate(sizes):
            size_bytes = page_round(size)
            if not size_bytes:
                continue
            shortage = self._claim(Amounts(module_area_bytes=size_bytes + GUARD_BYTES)) or self._claim(
                Amounts(memory_bytes=size_bytes)
            )
            if shortage:
                self.taken = before
                holding.core_bytes = holding.core_areas = holding.init_bytes = holding.init_areas = 0
                return shortage
            if memory_type < CORE_TYPES:
                holding.core_bytes += size_bytes
                holding.core_areas += 1
            else:
                holding.init_bytes += size_bytes
                holding.init_areas += 1
        return None

    def _claim(self, amounts: Amounts) -> Shortage | None:
        for area, asked, taken, limit in zip(MemoryArea, amounts, self.taken, self.limits, strict=True):
            if asked and limit and taken + asked > limit:
                return Shortage(area, asked, limit - taken)
        self._add(amounts)
        return None

    def _add(self, amounts: Amounts) -> None:
        self.taken = self.taken.plus(amounts)
        self.peak = self.peak.most(self.taken)

    def give(self, caller: Caller, freed: Freed) -> bool:
        """Free something of a call in flight; return whether it held any of it."""
        holding = self._calls.get(caller)
        if holding is None:
            return False
        before = holding.amounts
        if freed in ("file", "image", "all"):
            holding.file_bytes = 0
        if freed in ("image", "all"):
            holding.image_bytes = 0
        if freed in ("init", "all"):
            holding.init_bytes = holding.init_areas = 0
        if freed == "all":
            holding.core_bytes = holding.core_areas = 0
        after = holding.amounts
        self.taken = self.taken.minus(before.minus(after))
        if not any(after):
            del self._calls[caller]
        return before != after

    def settle(self, caller: Caller) -> bool:
        """Free the packed file of a call that goes on after decompression; return whether there was one.

        While the image is being decompressed both are there.
        """
        holding = self._calls.get(caller)
        return holding is not None and bool(holding.image_bytes) and self.give(caller, "file")

    def live(self, caller: Caller) -> None:
        """Make the core of a call's layout its module's, which stays; all else is freed."""
        holding = self._calls.pop(caller, None)
        if holding is None:
            return
        core = Holding(core_bytes=holding.core_bytes, core_areas=holding.core_areas)
        self.taken = self.taken.minus(holding.amounts.minus(core.amounts))
        self._modules[caller] = core

    def unload(self, caller: Caller) -> bool:
        """Free the core of the module that a call loaded; return whether it held any."""
        holding = self._modules.pop(caller, None)
        if holding is None:
            return False
        self.taken = self.taken.minus(holding.amounts)
        return True


def page_round(size_bytes: int) -> int:
    """Round a size up to whole pages of the simulated machine."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
