"""A module file from facts: an ELF64 relocatable object that kernel, kmod and binutils take for a module.

Its sections, their sizes, alignments and order, its symbols and the lengths of their names are the real module's, and
so are its memory layout and its length; what lies in code and data means nothing.
"""

from __future__ import annotations

import hashlib
import struct

from loader_svc.catalogue.facts_text import render_module
from loader_svc.catalogue.fill import fill
from loader_svc.catalogue.identity import Identity
from loader_svc.catalogue.module_facts import ModuleFacts, Section
from loader_svc.catalogue.pkcs7 import signature
from loader_svc.catalogue.relocations import ENTRY, Relocation, Relocator, packed
from loader_svc.catalogue.strings import StringTable
from loader_svc.catalogue.symbol_table import SYMBOL, FactsContradiction, SymbolTable, symbol_table

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr, elf(5)
_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)
_ET_REL, _EM_X86_64, _EV_CURRENT = 1, 62, 1
_TYPES = {"PROGBITS": 1, "SYMTAB": 2, "STRTAB": 3, "RELA": 4, "NOTE": 7, "NOBITS": 8}
_FLAGS = {"W": 0x1, "A": 0x2, "X": 0x4, "M": 0x10, "S": 0x20, "I": 0x40, "L": 0x80, "-": 0}
_THIS_MODULE = ".gnu.linkonce.this_module"
_NAME_OFFSET = 24  # of the name in struct module, include/linux/module.h
_NAME_BYTES = 56  # MODULE_NAME_LEN
_BTF_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header, include/uapi/linux/btf.h
_BTF_MAGIC = 0xEB9F


def module_image(facts: ModuleFacts, identity: Identity) -> bytes:
    """Build the file. `FactsContradiction` if the facts don't fit together."""
    return _ObjectFile(facts, identity).image()


class _ObjectFile:
    """One file in the making."""

    def __init__(self, facts: ModuleFacts, identity: Identity) -> None:
        self._facts, self._identity = facts, identity
        self._kernel = identity.kernel
        self._table: list[tuple[str, Section]] = []  # a section's own line, or that of the one it relocates
        for section in facts.sections:
            self._table.append((section.name, section))
            if section.relocations:
                self._table.append((".rela" + section.name, section))
        self._index = {name: index for index, (name, _) in enumerate(self._table, 1)}

    def image(self) -> bytes:
        """Put contents, section table and signature together."""
        facts = self._facts
        symbols = symbol_table(facts, self._index)
        contents = self._contents(symbols)
        names = StringTable(name for name, _ in self._table)
        names_bytes = facts.section_by_name[".shstrtab"].size_bytes
        try:
            contents[".shstrtab"] = names.contents(names_bytes)
        except ValueError as error:
            raise FactsContradiction(f"{facts.name}: .shstrtab: {error}") from error

        image = bytearray(_HEADER.size)
        offsets: dict[str, int] = {}
        for name in self._file_order():
            section = self._section(name)
            align = 8 if section is None else max(section.align_bytes, 1)
            image += bytes(-len(image) % align)
            offsets[name] = len(image)
            image += contents[name]
        image += bytes(-len(image) % 8)
        table_offset = len(image)
        image += bytes(_SECTION.size)
        for name, section in self._table:
            image += self._section_header(name, section, names.offset(name), offsets[name], symbols)
        header = (_ET_REL, _EM_X86_64, _EV_CURRENT, 0, 0, table_offset, 0, _HEADER.size, 0, 0, _SECTION.size)
        image[: _HEADER.size] = _HEADER.pack(_IDENT, *header, len(self._table) + 1, self._index[".shstrtab"])
        if facts.signature_bytes:
            serial = bytes.fromhex(self._kernel.signer_serial)
            image += signature(facts.signature_bytes, self._kernel.signer, serial, facts.name)
        return bytes(image)

    def _section(self, name: str) -> Section | None:
        """Return the section of that name; None for one of relocations."""
        return self._facts.section_by_name.get(name)

    def _file_order(self) -> list[str]:
        """Contents in the file come as objcopy writes them: relocations behind all others, then the sections' names."""
        own = [name for name, section in self._table if name == section.name and name != ".shstrtab"]
        relocations = [name for name, section in self._table if name != section.name]
        return [*own, *relocations, ".shstrtab"]

    def _section_header(
        self, name: str, section: Section, name_offset: int, offset: int, symbols: SymbolTable
    ) -> bytes:
        if name != section.name:
            size = section.relocation_count * ENTRY.size
            link, info = self._index[".symtab"], self._index[section.name]
            return _SECTION.pack(name_offset, _TYPES["RELA"], _FLAGS["I"], 0, offset, size, link, info, 8, ENTRY.size)
        link, info, entsize = 0, 0, section.entsize_bytes
        if section.type == "SYMTAB":
            link, info, entsize = self._index[".strtab"], symbols.locals, SYMBOL.size
        elif section.link:
            link = self._index[section.link]
        flags = sum(_FLAGS[letter] for letter in section.flags)
        kind = _TYPES[section.type]
        fields = (section.address, offset, section.size_bytes, link, info, section.align_bytes, entsize)
        return _SECTION.pack(name_offset, kind, flags, *fields)

    # --- contents --------------------------------------------------------------------------------------------------

    def _contents(self, symbols: SymbolTable) -> dict[str, bytes | bytearray]:
        """Make what the file holds of every section, but of ``.shstrtab``."""
        facts = self._facts
        special = self._special_contents(symbols)
        relocations = self._special_relocations(symbols)
        relocator = Relocator(facts, symbols)
        found: dict[str, bytes | bytearray] = {".shstrtab": b""}
        for section in facts.sections:
            name = section.name
            if name == ".shstrtab":
                continue
            if section.type == "NOBITS":
                found[name] = b""
                continue
            if name in special:
                contents = bytearray(special[name])
                if len(contents) != section.size_bytes:
                    raise FactsContradiction(
                        f"{facts.name}: {name} is {section.size_bytes} bytes long, its contents are {len(contents)}"
                    )
            else:
                contents = self._filled(section)
            if name in relocations:
                found[".rela" + name] = packed(relocations[name])
                if len(relocations[name]) != section.relocation_count:
                    raise FactsContradiction(
                        f"{facts.name}: {name} has {section.relocation_count} relocations, not {len(relocations[name])}"
                    )
            elif section.relocations:
                found[".rela" + name] = relocator.relocate(section, contents)
            found[name] = contents
        for parameter in facts.parameters:
            name, offset = parameter.name_place
            text = parameter.name.encode("ascii") + b"\0"
            named = bytearray(found[name])
            named[offset : offset + len(text)] = text
            found[name] = named
        return found

    def _filled(self, section: Section) -> bytearray:
        contents = fill(section.size_bytes, self._facts.fill, self._facts.name, section.name)
        if "S" in section.flags and contents:
            contents[-1] = 0  # the last string's end
        return contents

    def _special_contents(self, symbols: SymbolTable) -> dict[str, bytes]:
        """Contents of the sections that kernel, kmod or binutils read."""
        facts, kernel = self._facts, self._kernel
        sections = facts.section_by_name
        found = {
            ".symtab": symbols.symbols,
            ".strtab": symbols.strings,
            ".modinfo": b"".join(
                f"{key}={self._identity.vermagic if key == 'vermagic' else value}\0".encode("latin-1")
                for key, value in facts.info
            ),
            "__ksymtab_strings": b"".join(
                f"{given.name}\0{given.namespace}\0".encode("ascii") for given in facts.exports
            ),
            "__param": b"".join(
                struct.pack("<24xHbB12x", parameter.permissions, parameter.level, parameter.flags)
                for parameter in facts.parameters
            ),
            ".orc_header": bytes.fromhex(kernel.orc_header),
            _THIS_MODULE: bytes(_NAME_OFFSET)
            + facts.name.encode("ascii").ljust(_NAME_BYTES, b"\0")
            + bytes(kernel.struct_module_bytes - _NAME_OFFSET - _NAME_BYTES),
        }
        for table, gpl_only in (("", False), ("_gpl", True)):
            given = [export for export in facts.exports if export.gpl_only == gpl_only]
            found["__ksymtab" + table] = bytes(12 * len(given))  # three relocations each fill it
            found["__kcrctab" + table] = b"".join(struct.pack("<I", export.crc) for export in given)
        wanted = ["module_layout"] * ("__versions" in sections) + [w.name for w in facts.imports if w.versioned]
        found["__versions"] = b"".join(
            struct.pack("<Q56s", self._identity.crc(name), name.encode("ascii")) for name in wanted
        )
        if ".comment" in sections:
            text = b"\0" + kernel.comment.encode("ascii") + b"\0"
            length = sections[".comment"].size_bytes
            found[".comment"] = (text * (length // len(text) + 1))[:length]
        if ".BTF" in sections:
            found[".BTF"] = self._type_information(sections[".BTF"])
        build_id = hashlib.sha1(render_module(facts).encode(), usedforsecurity=False).hexdigest()
        for name, text_of_note in kernel.notes:
            release = self._identity.release.encode("ascii").hex()
            note = bytes.fromhex(text_of_note.replace("{release}", release).replace("{build_id}", build_id))
            if name in sections and sections[name].size_bytes == len(note):
                found[name] = note
        return {name: contents for name, contents in found.items() if name in sections}

    def _type_information(self, section: Section) -> bytes:
        """BTF that describes no type: a header, and strings that no type has."""
        strings_bytes = section.size_bytes - _BTF_HEADER.size
        header = _BTF_HEADER.pack(_BTF_MAGIC, 1, 0, _BTF_HEADER.size, 0, 0, 0, strings_bytes)
        strings = fill(strings_bytes, self._facts.fill, self._facts.name, section.name)
        strings[:1], strings[-1:] = b"\0", b"\0"
        return header + strings

    def _special_relocations(self, symbols: SymbolTable) -> dict[str, list[Relocation]]:
        """Relocations whose every target counts: of the exports, the parameters and ``struct module``."""
        facts, kernel = self._facts, self._kernel
        found: dict[str, list[Relocation]] = {}
        for given in facts.exports:
            entries = found.setdefault("__ksymtab_gpl" if given.gpl_only else "__ksymtab", [])
            for name in (given.name, "__kstrtab_" + given.name, "__kstrtabns_" + given.name):
                entries.append(Relocation(4 * len(entries), "PC32", symbols.named[name]))
        for place, parameter in enumerate(facts.parameters):
            at = 40 * place
            entries = found.setdefault("__param", [])
            name_section, name_offset = parameter.name_place
            entries.append(self._pointer(at, f"{name_section}+{name_offset}", symbols))
            entries.append(self._pointer(at + 8, "__this_module", symbols))
            entries.append(self._pointer(at + 16, parameter.ops, symbols))
            if parameter.argument:
                entries.append(self._pointer(at + 32, parameter.argument, symbols))
        places = {"init_module": kernel.init_offset, "cleanup_module": kernel.exit_offset}
        found[_THIS_MODULE] = [
            Relocation(places[name], "64", symbols.named[name])
            for name in sorted(symbols.named.keys() & places.keys(), key=places.__getitem__)
        ]
        return {name: entries for name, entries in found.items() if entries}

    def _pointer(self, at: int, target: str, symbols: SymbolTable) -> Relocation:
        """Make a pointer to a symbol with a name, or to a place, written ``SECTION+OFFSET``."""
        if target in symbols.named:
            return Relocation(at, "64", symbols.named[target])
        section, _, offset = target.rpartition("+")
        if section not in symbols.of_section:
            raise FactsContradiction(f"{self._facts.name}: nothing to point to for {target}")
        symbol, value = symbols.of_section[section]
        return Relocation(at, "64", symbol, int(offset) - value)
