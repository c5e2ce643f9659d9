"""The symbols of a module: its table, what it imports, what it exports, and the CRCs of both.

Layout of the tables: Elf64_Sym; struct modversion_info (include/linux/module.h); struct kernel_symbol with 32-bit
relative references (include/linux/export.h, x86 has HAVE_ARCH_PREL32_RELOCATIONS); Linux 6.12.
"""

import struct
from collections.abc import Sequence
from itertools import repeat
from operator import add
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from loader_svc.image.errors import ImageTooLarge
from loader_svc.image.modinfo import text

if TYPE_CHECKING:
    from loader_svc.image.elf import ElfImage

SYMBOL_BYTES: Final = 24
STB_LOCAL: Final = 0
STB_GLOBAL: Final = 1
STB_WEAK: Final = 2
SHT_RELA: Final = 4

SYMBOL_NAME_BYTES: Final = 512
"""The kernel's KSYM_NAME_LEN: longest symbol name kept."""

_NAME_AND_SECTION: Final = struct.Struct("<I2xH16x")
_NAME_INFO_SECTION: Final = struct.Struct("<IBxH16x")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_VERSION: Final = struct.Struct("<Q56s")
_RELA: Final = struct.Struct("<QIIq")  # r_offset, type, symbol index, r_addend
_KERNEL_SYMBOL_BYTES: Final = 12  # three 32-bit references: value, name, namespace
_NAME_REFERENCE: Final = 4
_NAMESPACE_REFERENCE: Final = 8

_NUL: Final = b"\0"


class Import(NamedTuple):
    """A symbol that somebody else has to export; `crc` is the version it was built against, None without one."""

    name: str
    binding: Literal["local", "global", "weak"]
    crc: int | None


class Export(NamedTuple):
    """A symbol that the module exports; `crc` is None in modules built without symbol versions."""

    name: str
    gpl_only: bool
    namespace: str
    crc: int | None


class SymbolTable:
    """The one symbol table of an image with the string table that belongs to it.

    The kernel checks neither the string table's place nor the names' offsets (6.12): a name outside the image is empty.
    """

    def __init__(self, view: memoryview, offset: int, size: int, strings_offset: int, strings_size: int) -> None:
        self._view = view
        self._entries: Final = view[offset : offset + size - size % SYMBOL_BYTES]
        self._strings_offset: Final = strings_offset
        self._strings = bytes(view[strings_offset : strings_offset + strings_size])
        self._strings_are_whole = self._strings.endswith(_NUL)

    def __len__(self) -> int:
        """Return how many symbols there are, the null symbol included."""
        return len(self._entries) // SYMBOL_BYTES

    def names_in_sections(self, wanted: bytes | bytearray) -> list[int]:
        """Return the name offsets of the symbols, past the first, that have a name and a wanted section.

        `wanted` has one byte for each of the 65536 section indices, nonzero where a symbol counts. Called for every
        layout, on up to some ten thousand symbols.
        """
        entries = self._entries[SYMBOL_BYTES:]
        return [name for name, section in _NAME_AND_SECTION.iter_unpack(entries) if wanted[section] and name]

    def all_names(self) -> list[int]:
        """Return the name offsets of all symbols, the first included."""
        return [name for name, _ in _NAME_AND_SECTION.iter_unpack(self._entries)]

    def names_bytes(self, names: Sequence[int]) -> int:
        """Return the sum of strlen + 1 over names given by offset; equal to what the kernel would copy."""
        if not names:
            return 0
        self._extend_to(max(names))
        ends = list(map(self._strings.find, repeat(_NUL), names, map(add, names, repeat(SYMBOL_NAME_BYTES))))
        if min(ends) >= 0:
            return sum(ends) - sum(names) + len(names)
        # Longer strings, or none: without a bound every symbol could search the whole table for its end.
        total = 0
        end = -1
        for name in sorted(names):
            if name > end:
                end = self._strings.find(_NUL, name)
                if end < 0:
                    end = name  # beyond the image
            total += end - name + 1
        return total

    def _extend_to(self, offset: int) -> None:
        """Make a string table that does not end in a NUL, or ends before `offset`, run on as the kernel would."""
        if not self._strings_are_whole or offset >= len(self._strings):
            self._strings = bytes(self._view[self._strings_offset :]) + _NUL
            self._strings_are_whole = True

    def name(self, offset: int) -> bytes:
        """Return the name at an offset into the strings, at most `SYMBOL_NAME_BYTES` of it."""
        self._extend_to(offset)
        end = self._strings.find(_NUL, offset, offset + SYMBOL_NAME_BYTES)
        return self._strings[offset : end if end >= 0 else offset + SYMBOL_NAME_BYTES]

    def symbol(self, index: int) -> tuple[int, int, int, int, int, int] | None:
        """Return the fields of one Elf64_Sym (name, info, other, shndx, value, size), None if there is none."""
        if not 0 <= index < len(self):
            return None
        fields: tuple[int, int, int, int, int, int] = _SYMBOL.unpack_from(self._entries, index * SYMBOL_BYTES)
        return fields

    def defined_in(self, section: int) -> list[tuple[bytes, int]]:
        """Return name and value of every named symbol that a section defines, by value."""
        found = [
            (value, name)
            for name, _, _, shndx, value, _ in _SYMBOL.iter_unpack(self._entries)
            if shndx == section and name
        ]
        return [(self.name(name), value) for value, name in sorted(found)]

    def imports(self, versions: dict[str, int]) -> tuple[Import, ...]:
        """Return the undefined, named symbols in table order.

        Raises ImageTooLarge where names overlap so much that together they exceed four times the image.
        """
        bindings: dict[int, Literal["local", "global", "weak"]] = {STB_LOCAL: "local", STB_WEAK: "weak"}
        undefined = [
            (name, info >> 4)
            for name, info, section in _NAME_INFO_SECTION.iter_unpack(self._entries[SYMBOL_BYTES:])
            if not section and name
        ]
        budget_bytes = 4 * len(self._view) + 65536
        if self.names_bytes([name for name, _ in undefined]) > budget_bytes:
            raise ImageTooLarge("the names of imported symbols", budget_bytes)
        names = [text(self.name(name)) for name, _ in undefined]
        return tuple(
            Import(name, bindings.get(binding, "global"), versions.get(name))
            for name, (_, binding) in zip(names, undefined, strict=True)
        )


def read_versions(section: memoryview) -> dict[str, int]:
    """Return the CRCs by symbol name of a `__versions` section; of equal names the first, as the kernel searches."""
    whole = section[: len(section) - len(section) % _VERSION.size]
    pairs = [(name.partition(_NUL)[0], crc) for crc, name in _VERSION.iter_unpack(whole)]
    return {text(name): crc for name, crc in reversed(pairs)}


def read_exports(elf: "ElfImage") -> tuple[Export, ...]:
    """Return what an image exports, in the order of its two tables.

    Which name an entry has stands in the relocations of its table. Where a table has none, the symbols
    `__ksymtab_NAME` inside it tell, and no namespaces are known.
    """
    exports: list[Export] = []
    for suffix, gpl_only in ((b"", False), (b"_gpl", True)):
        table = elf.find_section(b"__ksymtab" + suffix)
        if not table:
            continue
        count = len(elf.section_data(table)) // _KERNEL_SYMBOL_BYTES
        crcs = _crcs(elf, elf.find_section(b"__kcrctab" + suffix), count)
        names, namespaces = _named_by_relocations(elf, table, count)
        if not names:
            names = {
                value // _KERNEL_SYMBOL_BYTES: text(name.removeprefix(b"__ksymtab_"))
                for name, value in elf.symbols.defined_in(table)
                if name.startswith(b"__ksymtab_")
            }
        exports += [
            Export(names[slot], gpl_only, namespaces.get(slot, ""), crcs[slot] if slot < len(crcs) else None)
            for slot in sorted(names)
        ]
    return tuple(exports)


def _crcs(elf: "ElfImage", section: int, count: int) -> list[int]:
    if not section:
        return []
    data = elf.section_data(section)
    held = min(count, len(data) // 4)
    return list(struct.unpack(f"<{held}I", data[: held * 4]))


def _named_by_relocations(elf: "ElfImage", table: int, count: int) -> tuple[dict[int, str], dict[int, str]]:
    """Return name and namespace by slot of an export table."""
    names: dict[int, str] = {}
    namespaces: dict[int, str] = {}
    budget_bytes = limit_bytes = 4 * elf.image_bytes + 65536
    for index, section in enumerate(elf.sections):
        if section.sh_type != SHT_RELA or section.sh_info != table:
            continue
        data = elf.section_data(index)
        for r_offset, _, symbol_index, addend in _RELA.iter_unpack(data[: len(data) - len(data) % _RELA.size]):
            slot, field = divmod(r_offset, _KERNEL_SYMBOL_BYTES)
            if slot >= count or field not in (_NAME_REFERENCE, _NAMESPACE_REFERENCE):
                continue
            symbol = elf.symbols.symbol(symbol_index)
            if symbol is None or symbol[3] >= len(elf.sections):
                continue
            # Relative to the entry itself, whose address the kernel adds again: what remains is symbol + addend.
            start = elf.sections[symbol[3]].sh_offset + symbol[4] + addend
            name = bytes(elf.view[start : start + SYMBOL_NAME_BYTES]).partition(_NUL)[0] if start >= 0 else b""
            budget_bytes -= len(name)
            if budget_bytes < 0:
                raise ImageTooLarge("the names of exported symbols", limit_bytes)
            if name:
                (names if field == _NAME_REFERENCE else namespaces)[slot] = text(name)
    return names, namespaces
