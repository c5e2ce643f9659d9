"""The symbol table of a module, and its strings, from facts."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from loader_svc.catalogue.module_facts import ModuleFacts
from loader_svc.catalogue.strings import StringTable, add_made_up, lengths

SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym, elf(5)
_BINDS = {"LOCAL": 0, "GLOBAL": 1, "WEAK": 2}
_TYPES = {"NOTYPE": 0, "OBJECT": 1, "FUNC": 2, "SECTION": 3, "FILE": 4, "TLS": 6}
_SPECIAL = {"ABS": 0xFFF1, "COMMON": 0xFFF2}
_FUNCTION_ALIGN_BYTES = 16
_PARAMETER_BYTES = 40  # struct kernel_param, include/linux/moduleparam.h


class FactsContradiction(ValueError):
    """Facts of a module that no file can have together."""


@dataclass(frozen=True, slots=True)
class SymbolTable:
    """Contents of ``.symtab`` and ``.strtab``, and where in the table what relocations need is."""

    symbols: bytes
    strings: bytes
    locals: int
    """How many entries are local, which all come first (``sh_info``)."""
    named: dict[str, int]
    """Places of the symbols that have a name of their own."""
    of_section: dict[str, tuple[int, int]]
    """For each section a symbol in it, and that one's value: the section symbol where there is one."""


@dataclass(slots=True)
class _Entry:
    name: str
    bind: str
    type: str
    section: str
    value: int = 0
    size_bytes: int = 0


@dataclass(slots=True)
class _Draft:
    local: list[_Entry] = field(default_factory=list)
    other: list[_Entry] = field(default_factory=list)

    def add(self, entry: _Entry) -> None:
        (self.local if entry.bind == "LOCAL" else self.other).append(entry)


def symbol_table(facts: ModuleFacts, section_index: dict[str, int]) -> SymbolTable:
    """Make the table. ``section_index`` says where in the section table each section is.

    `FactsContradiction` if the symbols or their names don't have the lengths that the section table says.
    """
    draft = _Draft()
    for section in facts.sections:
        if section.has_symbol:
            draft.add(_Entry("", "LOCAL", "SECTION", section.name))
    _add_exports(draft, facts)
    for place, parameter in enumerate(facts.parameters):
        at = place * _PARAMETER_BYTES
        draft.add(_Entry("__param_" + parameter.name, "LOCAL", "OBJECT", "__param", at, _PARAMETER_BYTES))
        section_name, offset = parameter.name_place
        name_bytes = len(parameter.name) + 1
        draft.add(_Entry("__param_str_" + parameter.name, "LOCAL", "OBJECT", section_name, offset, name_bytes))
    for name, section_name in facts.entries:
        size = facts.section_by_name[section_name].size_bytes
        draft.add(_Entry(name, "GLOBAL", "OBJECT" if name == "__this_module" else "FUNC", section_name, 0, size))
    for wanted in facts.imports:
        draft.add(_Entry(wanted.name, "WEAK" if wanted.weak else "GLOBAL", "NOTYPE", ""))
    names = [entry.name for entry in (*draft.local, *draft.other)]
    strings = StringTable(names)
    made_up = _made_up_entries(facts)
    table_bytes = facts.section_by_name[".strtab"].size_bytes
    try:
        offsets = add_made_up(strings, [length for _, length in made_up], table_bytes, facts.name)
        contents = strings.contents(table_bytes)
    except ValueError as error:
        raise FactsContradiction(f"{facts.name}: {error}") from error

    packed = {"LOCAL": bytearray(), "": bytearray()}
    named: dict[str, int] = {}
    of_section: dict[str, tuple[int, int]] = {}
    local_count = 1 + len(draft.local) + sum(entry.bind == "LOCAL" for entry, _ in made_up)
    for entries, first in ((draft.local, 1), (draft.other, local_count)):
        for place, entry in enumerate(entries, first):
            if entry.section:
                of_section.setdefault(entry.section, (place, entry.value))
            if entry.name:
                named[entry.name] = place
            part = packed["LOCAL" if entry.bind == "LOCAL" else ""]
            part += _packed(entry, strings.offset(entry.name), section_index)
    for (entry, _), offset in zip(made_up, offsets, strict=True):
        part = packed["LOCAL" if entry.bind == "LOCAL" else ""]
        place = len(part) // SYMBOL.size + (1 if entry.bind == "LOCAL" else local_count)
        of_section.setdefault(entry.section, (place, entry.value))
        part += _packed(entry, offset, section_index)
    symbols = bytes(SYMBOL.size) + packed["LOCAL"] + packed[""]
    if len(symbols) != facts.section_by_name[".symtab"].size_bytes:
        raise FactsContradiction(
            f"{facts.name}: the symbols take {len(symbols)} bytes,"
            f" the symbol table has {facts.section_by_name['.symtab'].size_bytes}"
        )
    return SymbolTable(symbols, contents, local_count, named, of_section)


def _add_exports(draft: _Draft, facts: ModuleFacts) -> None:
    """Add the exported symbols, and those that the kernel's build puts beside each (linux/export-internal.h)."""
    counts = {".": 0, "_gpl": 0}
    strings_at = 0
    for place, given in enumerate(facts.exports):
        size = facts.section_by_name[given.section].size_bytes if given.section in facts.section_by_name else 0
        step = size // len(facts.exports)
        draft.add(_Entry(given.name, given.bind, given.type, given.section, place * step, step))
        table = "_gpl" if given.gpl_only else ""
        number = counts[table or "."]
        counts[table or "."] += 1
        draft.add(_Entry("__ksymtab_" + given.name, "LOCAL", "NOTYPE", "__ksymtab" + table, 12 * number))
        draft.add(_Entry("__crc_" + given.name, "LOCAL", "NOTYPE", "__kcrctab" + table, 4 * number))
        draft.add(_Entry("__kstrtab_" + given.name, "LOCAL", "NOTYPE", "__ksymtab_strings", strings_at))
        strings_at += len(given.name) + 1
        draft.add(_Entry("__kstrtabns_" + given.name, "LOCAL", "NOTYPE", "__ksymtab_strings", strings_at))
        strings_at += len(given.namespace) + 1


def _made_up_entries(facts: ModuleFacts) -> list[tuple[_Entry, int]]:
    """Make the symbols that are only counted, and the lengths of the names they get."""
    entries = []
    for group in facts.symbols:
        section = facts.section_by_name.get(group.section)
        step = section.size_bytes // group.count if section else 0
        align = _FUNCTION_ALIGN_BYTES if step >= _FUNCTION_ALIGN_BYTES and group.type == "FUNC" else 1
        for place, length in enumerate(lengths(group.count, group.name_bytes)):
            value = place * step // align * align
            entries.append((_Entry("", group.bind, group.type, group.section, value, step), length))
    return entries


def _packed(entry: _Entry, name_offset: int, section_index: dict[str, int]) -> bytes:
    index = _SPECIAL.get(entry.section, 0) or section_index.get(entry.section, 0)
    info = _BINDS[entry.bind] << 4 | _TYPES[entry.type]
    return SYMBOL.pack(name_offset, info, 0, index, entry.value, entry.size_bytes)
