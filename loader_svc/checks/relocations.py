"""Relocations: of a type that x86-64 modules have, onto bytes that are still zero, in range.

Sources: ``apply_relocations`` in kernel/module/main.c, ``__write_relocate_add`` in arch/x86/kernel/module.c, Linux
6.12. The kernel trusts the offsets and the symbols' indices; here one outside of its table is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Final

from loader_svc.checks.symbols import SHN_LIVEPATCH, SHN_UNDEF
from loader_svc.image import ElfImage
from loader_svc.image.elf import SHF_ALLOC, SHT_NOBITS
from loader_svc.image.errors import quoted
from loader_svc.image.symbols import SHT_RELA, SYMBOL_BYTES
from loader_svc.steps import Failure
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_MODVERSIONS

SHT_REL: Final = 9
SHF_RELA_LIVEPATCH: Final = 0x00100000
"""Left to the patching of the kernel, later."""

RELA_BYTES: Final = 24

_U64: Final = (1 << 64) - 1

_NONE: Final = 0
_WIDTHS: Final = {1: 8, 2: 4, 4: 4, 10: 4, 11: 4, 24: 8}
"""Bytes written by R_X86_64_64, _PC32, _PLT32, _32, _32S and _PC64."""

_UNSIGNED_32: Final = 10
_SIGNED_32: Final = 11

_NEAR: Final = 1 << 30
"""How far from 0 and from the last GiB of addresses, where modules are, a 32-bit reference reaches in any case."""


def relocations_failure(elf: ElfImage, identity: KernelIdentity, flags: int) -> Failure | None:
    """Return the first relocation that the kernel can't apply; None if it applies all."""
    for index in _sections(elf, identity, flags):
        section = elf.sections[index]
        if section.sh_type == SHT_REL:
            return Failure("ENOEXEC", "relocations: rel", quoted(elf.section_name(index)))
        failure = _section_failure(elf, index, section.sh_info)
        if failure is not None:
            return failure
    return None


def count(elf: ElfImage, identity: KernelIdentity, flags: int) -> int:
    """Return how many relocations the kernel goes through."""
    return sum(elf.sections[index].sh_size // RELA_BYTES for index in _sections(elf, identity, flags))


def _sections(elf: ElfImage, identity: KernelIdentity, flags: int) -> Iterator[int]:
    """Yield the sections with relocations that the kernel goes through."""
    for index, section in enumerate(elf.sections):
        target = section.sh_info
        if index == 0 or section.sh_type not in (SHT_REL, SHT_RELA) or target >= len(elf.sections):
            continue
        if _is_placed(elf, target, identity, flags) and not section.sh_flags & SHF_RELA_LIVEPATCH:
            yield index


def _is_placed(elf: ElfImage, index: int, identity: KernelIdentity, flags: int) -> bool:
    """Whether a section has a place in the module's memory by now.

    A per-CPU section has none: its contents are copied to the per-CPU memory from the file as they are.
    """
    if index in (elf.index_percpu, elf.index_info) or (
        index == elf.index_versions and not flags & MODULE_INIT_IGNORE_MODVERSIONS
    ):
        return False
    if identity.kallsyms and index in (elf.index_symtab, elf.index_strtab):
        return True
    return index != 0 and bool(elf.sections[index].sh_flags & SHF_ALLOC)


def _section_failure(elf: ElfImage, index: int, target: int) -> Failure | None:
    data = elf.section_data(index)
    data = data[: len(data) - len(data) % RELA_BYTES]
    if not len(data):
        return None
    # Whole columns at a time: large modules have hundreds of thousands of relocations, and nearly all are right.
    offsets = data.cast("Q")[0::3].tolist()
    kinds = data.cast("I")[2::6].tolist()
    symbols = data.cast("I")[3::6].tolist()
    addends = data.cast("q")[2::3].tolist()
    if _all_right(elf, target, offsets, set(kinds), symbols) and -_NEAR <= min(addends) <= max(addends) < _NEAR:
        return None
    return _first_failure(elf, target, offsets, kinds, symbols, addends)


def _all_right(elf: ElfImage, target: int, offsets: list[int], kinds: set[int], symbols: list[int]) -> bool:
    """Whether it is plain at a glance that nothing is wrong."""
    if not kinds <= _WIDTHS.keys() or _UNSIGNED_32 in kinds or max(symbols) * SYMBOL_BYTES >= _symtab_bytes(elf):
        return False
    width = max(_WIDTHS[kind] for kind in kinds)
    if max(offsets) + width > elf.sections[target].sh_size:
        return False
    content = elf.section_data(target)
    if elf.sections[target].sh_type == SHT_NOBITS:
        return True
    if max(offsets) + width > len(content) or len(offsets) < 2:
        return False
    columns = itemgetter(*offsets)
    return not any(any(columns(content[place:])) for place in range(width))


def _first_failure(
    elf: ElfImage, target: int, offsets: list[int], kinds: list[int], symbols: list[int], addends: list[int]
) -> Failure | None:
    content = elf.section_data(target)
    size_bytes, symtab_bytes = elf.sections[target].sh_size, _symtab_bytes(elf)
    for offset, kind, symbol, addend in zip(offsets, kinds, symbols, addends, strict=True):
        if symbol * SYMBOL_BYTES >= symtab_bytes:
            return Failure("ENOEXEC", "relocations: symbol", str(symbol))
        if kind == _NONE:
            continue
        width = _WIDTHS.get(kind)
        if width is None:
            return Failure("ENOEXEC", "relocations: type", str(kind))
        if offset + width > size_bytes:
            return Failure("ENOEXEC", "relocations: offset", str(offset))
        if kind in (_UNSIGNED_32, _SIGNED_32) and _overflows(elf, kind, symbol, addend):
            return Failure("ENOEXEC", "relocations: overflow", str(kind))
        if any(content[offset : offset + width]):
            return Failure("ENOEXEC", "relocations: target", str(offset))
    return None


def _symtab_bytes(elf: ElfImage) -> int:
    size_bytes = elf.sections[elf.index_symtab].sh_size
    return size_bytes - size_bytes % SYMBOL_BYTES


def _overflows(elf: ElfImage, kind: int, index: int, addend: int) -> bool:
    """Whether a 32-bit reference can't hold the address it is to have, wherever the module's memory is.

    Symbols of the module are in the last GiB, beyond 32 bits without a sign. Absolute and per-CPU ones are what their
    values say. Where the kernel's own are is not known here; a weak one may be nowhere, which is 0.
    """
    symbol = elf.symbols.symbol(index)
    if symbol is None or symbol[3] in (SHN_UNDEF, SHN_LIVEPATCH):
        return False
    value = (symbol[4] + addend) & _U64
    if value >= 1 << 63:
        value -= 1 << 64
    is_own = symbol[3] < len(elf.sections) and symbol[3] != elf.index_percpu
    if kind == _UNSIGNED_32:
        return is_own or not 0 <= value < 1 << 32
    return not -(_NEAR if is_own else 1 << 31) <= value < 1 << 31
