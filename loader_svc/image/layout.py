"""Where a module's sections go: the seven memory areas, their sizes, and the place of every section in them.

Source: layout_and_allocate(), __layout_sections() and move_module() in kernel/module/main.c, layout_symtab() in
kernel/module/kallsyms.c, module_enforce_rwx_sections() in kernel/module/strict_rwx.c; Linux 6.12, x86-64. Sizes are
computed as there, in unsigned 32-bit arithmetic, wrap-around and odd alignments included.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

from loader_svc.image.elf import SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS, ElfImage
from loader_svc.image.errors import ImageError, quoted
from loader_svc.image.symbols import SYMBOL_BYTES
from modpressure.kernel.system_memory import MODULE_AREA_BYTES

SHF_RO_AFTER_INIT: Final = 0x00200000
MOD_KALLSYMS_BYTES: Final = 32
_U32: Final = 0xFFFFFFFF


class MemoryType(IntEnum):
    """The kernel's enum mod_mem_type, also the order of allocation."""

    TEXT = 0
    DATA = 1
    RODATA = 2
    RO_AFTER_INIT = 3
    INIT_TEXT = 4
    INIT_DATA = 5
    INIT_RODATA = 6


_TYPES: Final = tuple(MemoryType)
_CORE: Final = slice(0, 4)
_INIT: Final = slice(4, 7)


@dataclass(frozen=True, slots=True)
class LayoutConfig:
    """The switches of a kernel, and of a call, that change a layout; the defaults are Debian's.

    `kallsyms`, `kallsyms_all`, `module_unload` and `strict_rwx` are CONFIG_KALLSYMS, _KALLSYMS_ALL, _MODULE_UNLOAD and
    _STRICT_MODULE_RWX; `ignore_modversions` is flag 1 of the call; `page_bytes` a power of two.
    """

    kallsyms: bool = True
    kallsyms_all: bool = True
    module_unload: bool = True
    ignore_modversions: bool = False
    strict_rwx: bool = True
    page_bytes: int = 4096


DEBIAN: Final = LayoutConfig()
"""Debian's kernels 12 and 13 (and the measured ones), a call without flags."""


class Placement(NamedTuple):
    """One section's place: what to copy from the image to where; `is_nobits` sections are zeroes and not copied."""

    section: int
    memory_type: MemoryType
    destination_offset_bytes: int
    source_offset_bytes: int
    size_bytes: int
    is_nobits: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The seven areas of a module, all sizes in bytes, both tuples indexed by MemoryType.

    `unrounded` is what the sections take, `rounded` what is allocated: whole pages, 0 for an area that does not exist.
    The totals are those the kernel counts, of rounded sizes.
    """

    unrounded: tuple[int, ...]
    rounded: tuple[int, ...]
    placements: tuple[Placement, ...] = field(repr=False)
    percpu_bytes: int
    percpu_align_bytes: int
    core_symbols: int
    core_bytes: int
    init_bytes: int
    total_bytes: int
    text_bytes: int


def plan_layout(elf: ElfImage, config: LayoutConfig = DEBIAN) -> Layout:
    """Compute the layout of an image.

    Raises ImageError: ENOEXEC, check `wx`, for a section that is writable and executable; ENOMEM, check `layout: size`,
    for areas that an empty module area could not hold. One more stands for what a kernel would not survive and no
    compiler produces: ENOEXEC, check `layout: source`, for a section to copy that is not in the image.
    """
    if config.strict_rwx:
        _refuse_writable_code(elf)
    sections = elf.sections
    flags = [section.sh_flags for section in sections]
    # Index 0 stands for "not found" and has its flag cleared just as well.
    versions = 0 if config.ignore_modversions else elf.index_versions
    for index in (versions, elf.index_info, elf.index_percpu):
        flags[index] &= ~SHF_ALLOC
    for name in (b".data..ro_after_init", b"__jump_table"):
        index = elf.find_section(name, flags)
        if index:
            flags[index] |= SHF_RO_AFTER_INIT

    sizes = [0] * len(_TYPES)
    placed: dict[int, tuple[MemoryType, int]] = {}

    def place(index: int, memory_type: MemoryType) -> None:
        section = sections[index]
        offset = _align(sizes[memory_type], section.sh_addralign or 1)
        sizes[memory_type] = (offset + section.sh_size) & _U32
        placed[index] = (memory_type, offset)

    # The kernel makes five passes over all sections, twice. Each area is filled by one of them only, in the order of
    # the section table, so one pass that knows each section's area does the same.
    initial = (b".init",) if config.module_unload else (b".init", b".exit")
    for index, flag in enumerate(flags):
        if not flag & SHF_ALLOC:
            continue
        in_init = elf.section_name(index).startswith(initial)
        if flag & SHF_EXECINSTR:
            area = MemoryType.INIT_TEXT if in_init else MemoryType.TEXT
        elif not flag & SHF_WRITE:
            area = MemoryType.INIT_RODATA if in_init else MemoryType.RODATA
        elif in_init:
            area = MemoryType.INIT_DATA
        else:
            area = MemoryType.RO_AFTER_INIT if flag & SHF_RO_AFTER_INIT else MemoryType.DATA
        place(index, area)

    core_symbols = 0
    if config.kallsyms:
        symtab = sections[elf.index_symtab]
        flags[elf.index_symtab] |= SHF_ALLOC
        place(elf.index_symtab, MemoryType.INIT_DATA)
        core_symbols, strings_bytes = _core_symbols(elf, flags, placed, config)
        data = _align(sizes[MemoryType.DATA], symtab.sh_addralign or 1)
        sizes[MemoryType.DATA] = (data + core_symbols * (SYMBOL_BYTES + 1) + strings_bytes) & _U32
        place(elf.index_strtab, MemoryType.INIT_DATA)
        kallsyms = _align(sizes[MemoryType.INIT_DATA], 8) + MOD_KALLSYMS_BYTES
        sizes[MemoryType.INIT_DATA] = (kallsyms + symtab.sh_size // SYMBOL_BYTES) & _U32

    page_mask = config.page_bytes - 1
    rounded = tuple((size + page_mask) & ~page_mask for size in sizes)
    _refuse_oversize(rounded)
    percpu = sections[elf.index_percpu]
    return Layout(
        unrounded=tuple(sizes),
        rounded=rounded,
        placements=_placements(elf, placed, rounded),
        percpu_bytes=percpu.sh_size,
        percpu_align_bytes=min(percpu.sh_addralign, config.page_bytes) if elf.index_percpu else 0,
        core_symbols=core_symbols,
        core_bytes=sum(rounded[_CORE]),
        init_bytes=sum(rounded[_INIT]),
        total_bytes=sum(rounded),
        text_bytes=rounded[MemoryType.TEXT] + rounded[MemoryType.INIT_TEXT],
    )


def _refuse_writable_code(elf: ElfImage) -> None:
    for index, section in enumerate(elf.sections):
        if section.sh_flags & (SHF_WRITE | SHF_EXECINSTR) == SHF_WRITE | SHF_EXECINSTR:
            raise ImageError("ENOEXEC", "wx", quoted(elf.section_name(index)), "a section is writable and executable")


def _align(size: int, alignment: int) -> int:
    """Return ALIGN() of an unsigned int: the alignment is cut to 32 bits and need not be a power of two."""
    mask = (alignment & _U32) - 1
    return (size + mask) & ~mask & _U32


def _core_symbols(
    elf: ElfImage, flags: list[int], placed: dict[int, tuple[MemoryType, int]], config: LayoutConfig
) -> tuple[int, int]:
    """Return how many symbols stay after init, and the bytes of their names with a NUL each."""
    symbols = elf.symbols
    if not len(symbols):
        return 0, 0
    if elf.is_livepatch:
        names = symbols.all_names()
        return len(names), symbols.names_bytes(names)
    required = SHF_ALLOC if config.kallsyms_all else SHF_ALLOC | SHF_EXECINSTR
    counts = bytearray(1 << 16)
    for index, (area, _) in placed.items():
        if area < MemoryType.INIT_TEXT and flags[index] & required == required:
            counts[index] = 1
    if config.kallsyms_all:
        counts[elf.index_percpu] = 1
    counts[0] = 0  # SHN_UNDEF
    names = symbols.names_in_sections(counts)
    first = symbols.symbol(0)
    assert first is not None
    names.append(first[0])
    return len(names), symbols.names_bytes(names)


def _refuse_oversize(rounded: tuple[int, ...]) -> None:
    left = MODULE_AREA_BYTES
    for memory_type, size in zip(_TYPES, rounded, strict=True):
        left -= size
        if left < 0:
            raise ImageError("ENOMEM", "layout: size", size, f"no room for {memory_type.name} in the module area")


def _placements(
    elf: ElfImage, placed: dict[int, tuple[MemoryType, int]], rounded: tuple[int, ...]
) -> tuple[Placement, ...]:
    """Return the placements in section order, all safe to copy."""
    placements = []
    for index in sorted(placed):
        memory_type, offset = placed[index]
        section = elf.sections[index]
        is_nobits = section.sh_type == SHT_NOBITS
        size = section.sh_size
        if size and not is_nobits:
            if section.sh_offset + size > elf.image_bytes:
                where = f"{section.sh_offset}+{size}"
                raise ImageError("ENOEXEC", "layout: source", where, f"section {index} is not in the image")
            if offset + size > rounded[memory_type]:
                raise ImageError("ENOMEM", "layout: size", size, f"section {index} wraps around in 32 bits")
        placements.append(Placement(index, memory_type, offset, section.sh_offset, size, is_nobits))
    return tuple(placements)
