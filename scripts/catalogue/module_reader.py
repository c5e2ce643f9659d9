"""Read the facts of a real module file with pyelftools and struct; no part of the program itself is used to read them.

Used by ``extract_catalogue.py``. Whatever a module has that the facts could not describe is an error here, with the
name of the module, not a fact silently dropped.
"""

from __future__ import annotations

import io
import struct
from collections import Counter
from dataclasses import dataclass

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

from loader_svc.catalogue.module_facts import Export, Import, ModuleFacts, Parameter, Section, SymbolGroup

SIGNATURE_MAGIC = b"~Module signature appended~\n"
RELOCATIONS = {1: "64", 2: "PC32", 4: "PLT32", 10: "32", 11: "32S", 24: "PC64"}
BINDS = {0: "LOCAL", 1: "GLOBAL", 2: "WEAK"}
TYPES = {0: "NOTYPE", 1: "OBJECT", 2: "FUNC", 3: "SECTION", 4: "FILE", 6: "TLS"}
SPECIAL_SECTIONS = {0xFFF1: "ABS", 0xFFF2: "COMMON"}
FLAG_LETTERS = (
    (SH_FLAGS.SHF_WRITE, "W"),
    (SH_FLAGS.SHF_ALLOC, "A"),
    (SH_FLAGS.SHF_EXECINSTR, "X"),
    (SH_FLAGS.SHF_MERGE, "M"),
    (SH_FLAGS.SHF_STRINGS, "S"),
    (SH_FLAGS.SHF_INFO_LINK, "I"),
    (SH_FLAGS.SHF_LINK_ORDER, "L"),
)


class UnknownShape(Exception):
    """A module has something that the facts have no words for."""


@dataclass(frozen=True)
class Symbol:
    """An entry of the symbol table."""

    name: str
    bind: str
    type: str
    section: int
    value: int


@dataclass(frozen=True)
class Shared:
    """What every module of one kernel has alike, as one module shows it."""

    struct_module_bytes: int
    init_offset: int
    exit_offset: int
    orc_header: str
    comment: str
    notes: tuple[tuple[str, bytes], ...]


def split_signature(image: bytes) -> tuple[bytes, bytes]:
    """Return the image without its signature, and the signature's DER; empty if unsigned (kernel/module/signing.c)."""
    if not image.endswith(SIGNATURE_MAGIC):
        return image, b""
    trailer = len(image) - len(SIGNATURE_MAGIC) - 12
    length = struct.unpack_from(">I", image, trailer + 8)[0]
    return image[: trailer - length], image[trailer - length : trailer]


class RealModule:
    """One file of a kernel package."""

    def __init__(self, name: str, path: str, origin: str, image: bytes) -> None:
        self.name, self.path, self.origin, self.plain_bytes = name, path, origin, len(image)
        self.image, self.signature = split_signature(image)
        elf = ELFFile(io.BytesIO(self.image))
        if elf["e_machine"] != "EM_X86_64" or elf["e_type"] != "ET_REL":
            raise UnknownShape(f"{name}: no x86-64 module")
        self.sections = [(section.name, section.header) for section in elf.iter_sections()]
        self.by_name = {section: index for index, (section, _) in reversed(list(enumerate(self.sections)))}
        if len(self.by_name) != len(self.sections):
            doubles = [s for s, n in Counter(s for s, _ in self.sections).items() if n > 1]
            raise UnknownShape(f"{name}: two sections of one name: {doubles}")
        self.symbols = list(self._symbols())

    def contents(self, section: str) -> bytes:
        """Return what the file holds of a section; nothing if there is none of that name."""
        if section not in self.by_name:
            return b""
        header = self.sections[self.by_name[section]][1]
        return self.image[header["sh_offset"] : header["sh_offset"] + header["sh_size"]]

    def _symbols(self):
        strings = self.contents(".strtab")
        for name, info, _, section, value, _size in struct.iter_unpack("<IBBHQQ", self.contents(".symtab")):
            text = strings[name : strings.index(b"\0", name)].decode("ascii")
            yield Symbol(text, BINDS[info >> 4], TYPES[info & 15], section, value)

    def relocations(self, section: str) -> list[tuple[int, int, int, int]]:
        """Offset, type, symbol and addend of all against ``section``."""
        return [
            (offset, info & 0xFFFFFFFF, info >> 32, addend)
            for offset, info, addend in struct.iter_unpack("<QQq", self.contents(".rela" + section))
        ]

    def section_name(self, index: int) -> str:
        """Return the name of what ``st_shndx`` says."""
        return SPECIAL_SECTIONS[index] if index in SPECIAL_SECTIONS else self.sections[index][0]

    # --- facts -------------------------------------------------------------------------------------------------

    def facts(self, xz_bytes: int, zst_bytes: int) -> ModuleFacts:
        """Return all facts. `UnknownShape` if that would leave something out."""
        imports = self.imports()
        exports = self.exports()
        parameters = self.parameters()
        return ModuleFacts(
            name=self.name,
            path=self.path,
            origin=self.origin,
            plain_bytes=self.plain_bytes,
            xz_bytes=xz_bytes,
            zst_bytes=zst_bytes,
            layout_bytes=self.layout(),
            signature_bytes=self.signature_numbers(),
            fill=(0, 0),
            info=self.info(),
            imports=imports,
            exports=exports,
            parameters=parameters,
            entries=tuple(entry_points(self)),
            sections=self.section_lines(),
            symbols=self.groups(exports, parameters),
        )

    def info(self) -> tuple[tuple[str, str], ...]:
        """Read ``.modinfo``."""
        contents = self.contents(".modinfo").decode("latin-1")
        words = contents.split("\0")
        if words.pop() or "" in words or any("=" not in word for word in words):
            raise UnknownShape(f"{self.name}: .modinfo is not a row of key=value strings")
        return tuple((key, value) for key, _, value in (word.partition("=") for word in words))

    def imports(self) -> tuple[Import, ...]:
        """Return the undefined symbols by name."""
        versioned = {name for name, _ in self.versions()}
        undefined = {s.name: s for s in self.symbols[1:] if not s.section}
        extra = versioned - set(undefined) - {"module_layout"}
        if extra:
            raise UnknownShape(f"{self.name}: __versions has entries of nothing that is wanted: {extra}")
        return tuple(Import(n, undefined[n].bind == "WEAK", n in versioned) for n in sorted(undefined))

    def versions(self) -> list[tuple[str, int]]:
        """Read ``__versions``: names and CRCs."""
        contents = self.contents("__versions")
        return [
            (contents[at + 8 : at + 64].rstrip(b"\0").decode("ascii"), struct.unpack_from("<Q", contents, at)[0])
            for at in range(0, len(contents), 64)
        ]

    def exports(self) -> tuple[Export, ...]:
        """Read the tables of exports."""
        crcs = {}
        for symbol in self.symbols:
            if symbol.name.startswith("__crc_"):
                table = self.contents(self.section_name(symbol.section))
                crcs[symbol.name[6:]] = struct.unpack_from("<I", table, symbol.value)[0]
        found = {}
        for table in ("__ksymtab", "__ksymtab_gpl"):
            entries = self.relocations(table)
            if len(entries) * 4 != len(self.contents(table)):
                raise UnknownShape(f"{self.name}: {table} is not three relocations an entry")
            for entry in range(0, len(entries), 3):
                given = self.symbols[entries[entry][2]]
                space = self.symbols[entries[entry + 2][2]]
                strings = self.contents("__ksymtab_strings")
                namespace = strings[space.value : strings.index(b"\0", space.value)].decode("ascii")
                found[given.name] = Export(
                    given.name,
                    crcs[given.name],
                    self.section_name(given.section),
                    given.type,
                    given.bind,
                    table.endswith("_gpl"),
                    namespace,
                )
        strings_bytes = sum(len(e.name) + 1 + len(e.namespace) + 1 for e in found.values())
        if strings_bytes != len(self.contents("__ksymtab_strings")):
            raise UnknownShape(f"{self.name}: __ksymtab_strings is not its exports' names and namespaces")
        return tuple(found[name] for name in sorted(found))

    def parameters(self) -> tuple[Parameter, ...]:
        """Read ``__param``."""
        table = self.contents("__param")
        pointers = {offset: (symbol, addend) for offset, _, symbol, addend in self.relocations("__param")}
        found = []
        for at in range(0, len(table), 40):
            permissions, level, flags = struct.unpack_from("<HbB", table, at + 24)
            name_place = self._place(*pointers[at])
            contents = self.contents(name_place[0])
            name = contents[name_place[1] : contents.index(b"\0", name_place[1])].decode("ascii")
            if self.symbols[pointers[at + 8][0]].name != "__this_module":
                raise UnknownShape(f"{self.name}: parameter {name} belongs to another module")
            ops, argument = (
                self._target(*pointers[where]) if where in pointers else "" for where in (at + 16, at + 32)
            )
            found.append(Parameter(name, ops, permissions, level, flags, name_place, argument))
        return tuple(found)

    def _place(self, symbol: int, addend: int) -> tuple[str, int]:
        target = self.symbols[symbol]
        return self.section_name(target.section), target.value + addend

    def _target(self, symbol: int, addend: int) -> str:
        """Tell what a pointer points to: an imported symbol, or a place."""
        target = self.symbols[symbol]
        if not target.section:
            return target.name
        section, offset = self._place(symbol, addend)
        return f"{section}+{offset}"

    def section_lines(self) -> tuple[Section, ...]:
        """Read the section table."""
        with_symbol = {s.section for s in self.symbols if s.type == "SECTION"}
        lines = []
        for index, (name, header) in enumerate(self.sections[1:], 1):
            kind = header["sh_type"]
            if kind == "SHT_RELA":
                if (
                    lines[-1].name != name.removeprefix(".rela")
                    or self.sections[header["sh_info"]][0] != lines[-1].name
                ):
                    raise UnknownShape(f"{self.name}: {name} does not follow its section")
                if header["sh_flags"] != SH_FLAGS.SHF_INFO_LINK or header["sh_addralign"] != 8:
                    raise UnknownShape(f"{self.name}: {name} has unusual flags or alignment")
                continue
            flags = header["sh_flags"]
            letters = "".join(letter for bit, letter in FLAG_LETTERS if flags & bit)
            if flags & ~sum(bit for bit, _ in FLAG_LETTERS):
                raise UnknownShape(f"{self.name}: {name} has flags {flags:#x}")
            kinds = Counter(RELOCATIONS[kind] for _, kind, _, _ in self.relocations(name))
            link = self.sections[header["sh_link"]][0] if flags & SH_FLAGS.SHF_LINK_ORDER else ""
            lines.append(
                Section(
                    name=name,
                    type=kind.removeprefix("SHT_"),
                    flags=letters or "-",
                    size_bytes=header["sh_size"],
                    align_bytes=header["sh_addralign"],
                    entsize_bytes=header["sh_entsize"],
                    address=header["sh_addr"],
                    link=link,
                    has_symbol=index in with_symbol,
                    relocations=tuple(sorted(kinds.items(), key=lambda item: -item[1])),
                )
            )
        return tuple(lines)

    def groups(self, exports: tuple[Export, ...], parameters: tuple[Parameter, ...]) -> tuple[SymbolGroup, ...]:
        """Count the symbols that no other fact names."""
        named = Counter()
        for export in exports:
            table = "_gpl" if export.gpl_only else ""
            named[export.name, export.bind, export.type, export.section] += 1
            named["__ksymtab_" + export.name, "LOCAL", "NOTYPE", "__ksymtab" + table] += 1
            named["__crc_" + export.name, "LOCAL", "NOTYPE", "__kcrctab" + table] += 1
            for prefix in ("__kstrtab_", "__kstrtabns_"):
                named[prefix + export.name, "LOCAL", "NOTYPE", "__ksymtab_strings"] += 1
        for name, section in entry_points(self):
            named[name, "GLOBAL", "OBJECT" if name == "__this_module" else "FUNC", section] += 1
        for parameter in parameters:
            named["__param_" + parameter.name, "LOCAL", "OBJECT", "__param"] += 1
            named["__param_str_" + parameter.name, "LOCAL", "OBJECT", parameter.name_place[0]] += 1
        counts, name_bytes = Counter(), Counter()
        for symbol in self.symbols[1:]:
            if not symbol.section or symbol.type == "SECTION":
                continue
            if not symbol.name:
                raise UnknownShape(f"{self.name}: a symbol of section {symbol.section} has no name")
            section = self.section_name(symbol.section)
            key = (symbol.name, symbol.bind, symbol.type, section)
            if named[key] > 0:
                named[key] -= 1
                continue
            counts[symbol.bind, symbol.type, section] += 1
            name_bytes[symbol.bind, symbol.type, section] += len(symbol.name) + 1
        missing = [key for key, count in named.items() if count]
        if missing:
            raise UnknownShape(f"{self.name}: expected symbols are not there: {missing[:3]}")
        return tuple(SymbolGroup(*key, counts[key], name_bytes[key]) for key in sorted(counts))

    def signature_numbers(self) -> tuple[int, int] | None:
        """Lengths of r and s, at the end of the signature (RFC 3279, ECDSA-Sig-Value); None for any other."""
        if not self.signature:
            return None
        for total in range(8, 140):  # OCTET STRING, SEQUENCE, INTEGER r, INTEGER s, all with short lengths
            tail = self.signature[-total - 2 :]
            if tail[0] == 4 and tail[1] == total and tail[2] == 0x30 and tail[3] == total - 2 and tail[4] == 2:
                first = tail[5]
                if tail[6 + first] == 2 and tail[7 + first] == total - 2 - 4 - first:
                    return first, tail[7 + first]
        return None

    # --- the layout, by the kernel's rules (6.12, kernel/module/main.c and kallsyms.c) --------------------------------

    def layout(self) -> tuple[int, ...]:
        """Work out the seven sizes."""
        sections = [(name, h["sh_type"], h["sh_flags"], h["sh_size"], h["sh_addralign"]) for name, h in self.sections]
        core = self.core_symbols(sections)
        return layout_of(sections, *core)

    def core_symbols(self, sections) -> tuple[int, int]:
        """How many symbols stay after init, and the bytes of their names."""
        stay = {
            index
            for index, (name, _, flags, _, _) in enumerate(sections)
            if (flags & SH_FLAGS.SHF_ALLOC and name not in (".modinfo", "__versions") and not name.startswith(".init"))
            or name == ".data..percpu"
        }
        names = [s.name for s in self.symbols[1:] if s.name and s.section in stay]
        return 1 + len(names), 1 + sum(len(name) + 1 for name in names)


def entry_points(module: RealModule) -> list[tuple[str, str]]:
    """Return the symbols that every module has, as far as there, and their sections."""
    wanted = ("init_module", "cleanup_module", "__this_module")
    return [(s.name, module.section_name(s.section)) for s in module.symbols if s.name in wanted and s.section]


def layout_of(sections, core_count: int, core_name_bytes: int) -> tuple[int, ...]:
    """Return text, data, rodata, ro_after_init, init_text, init_data, init_rodata; bytes, before rounding to pages."""
    text, data, rodata, ro_after_init, init_text, init_data, init_rodata = range(7)
    write, alloc, execute = SH_FLAGS.SHF_WRITE, SH_FLAGS.SHF_ALLOC, SH_FLAGS.SHF_EXECINSTR
    sizes = [0] * 7

    def place(kind: int, size: int, align: int) -> None:
        sizes[kind] = -(-sizes[kind] // max(align, 1)) * max(align, 1) + size

    for name, _, flags, size, align in sections:
        if not flags & alloc or name in (".modinfo", "__versions", ".data..percpu"):
            continue
        init = name.startswith(".init")
        if flags & execute:
            kind = init_text if init else text
        elif not flags & write:
            kind = init_rodata if init else rodata
        elif name in (".data..ro_after_init", "__jump_table") and not init:
            kind = ro_after_init
        else:
            kind = init_data if init else data
        place(kind, size, align)
    symtab = next(s for s in sections if s[1] == "SHT_SYMTAB")
    strtab = next(s for s in sections if s[0] == ".strtab")
    place(init_data, symtab[3], symtab[4])
    place(data, 24 * core_count + core_name_bytes + core_count, symtab[4])
    place(init_data, strtab[3], strtab[4])
    place(init_data, 32 + symtab[3] // 24, 8)
    return tuple(sizes)


def shared_facts(module: RealModule) -> Shared:
    """Read what a module tells about its kernel."""
    pointers = {
        module.symbols[symbol].name: offset for offset, _, symbol, _ in module.relocations(".gnu.linkonce.this_module")
    }
    comment = module.contents(".comment").split(b"\0")[1].decode("ascii")
    notes = tuple((name, module.contents(name)) for name, header in module.sections if header["sh_type"] == "SHT_NOTE")
    return Shared(
        struct_module_bytes=len(module.contents(".gnu.linkonce.this_module")),
        init_offset=pointers.get("init_module", 0),
        exit_offset=pointers.get("cleanup_module", 0),
        orc_header=module.contents(".orc_header").hex(),
        comment=comment,
        notes=notes,
    )
