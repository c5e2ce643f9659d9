"""Fixtures of the unit tests."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest

WRITE, ALLOC, EXEC = 1, 2, 4
NULL, PROGBITS, SYMTAB, STRTAB, RELA, NOBITS = 0, 1, 2, 3, 4, 8


@dataclass
class Section:
    """A section to be written; `size` says otherwise than the data's length where it is set."""

    name: str
    data: bytes = b""
    flags: int = 0
    type: int = PROGBITS
    align: int = 1
    size: int | None = None
    link: int = 0
    info: int = 0
    offset: int | None = None
    name_offset: int | None = None
    addr: int = 0


@dataclass
class ModuleBuilder:
    """Writes small module images, right by default and wrong wherever a test says so."""

    sections: list[Section] = field(default_factory=list)
    symbols: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, index of section, binding."""
    header: dict[str, int] = field(default_factory=dict)
    """Fields of the ELF header to overwrite: e_type, e_machine, e_shoff, e_shentsize, e_shnum, e_shstrndx."""

    def index(self, name: str) -> int:
        """Return the index that a section will have."""
        return next(i for i, section in enumerate(self.sections, 1) if section.name == name)

    def section(self, name: str) -> Section:
        """Return a section added before."""
        return next(section for section in self.sections if section.name == name)

    def add(self, section: Section) -> int:
        """Add a section and return its index."""
        self.sections.append(section)
        return len(self.sections)

    def bytes(self) -> bytes:
        """Return the image: header, sections, symbol table, its strings, section names, section table."""
        strings = b"\0"
        table = bytes(24)
        for name, section_index, binding in self.symbols:
            table += struct.pack("<IBBHQQ", len(strings) if name else 0, binding << 4, 0, section_index, 0, 0)
            strings += name.encode() + b"\0" if name else b""
        written = [Section("", type=NULL), *(replace(section) for section in self.sections)]
        for section in written:
            if section.type == SYMTAB and not section.data:
                section.data, section.link = table, section.link or len(self.sections) + 1
        written.append(Section(".strtab", strings, type=STRTAB))
        written.append(Section(".shstrtab", type=STRTAB))
        names = b"\0"
        for section in written:
            if section.name and section.name_offset is None:
                section.name_offset = len(names)
                names += section.name.encode() + b"\0"
        written[-1].data = names
        image = bytearray(64)
        headers = bytearray()
        for section in written:
            align = section.align if 1 <= section.align <= 4096 else 1
            image += bytes(-len(image) % align)
            offset = len(image) if section.offset is None else section.offset
            size = len(section.data) if section.size is None else section.size
            if section.type != NOBITS:
                image += section.data
            headers += struct.pack(
                "<IIQQQQIIQQ", section.name_offset or 0, section.type, section.flags, section.addr,
                0 if section.type == NULL else offset, size, section.link, section.info, section.align,
                24 if section.type in (SYMTAB, RELA) else 0,
            )  # fmt: skip
        image += bytes(-len(image) % 8)
        fields = {
            "e_type": 1, "e_machine": 62, "e_shoff": len(image), "e_shentsize": 64,
            "e_shnum": len(written), "e_shstrndx": len(written) - 1, **self.header,
        }  # fmt: skip
        image += headers
        image[:64] = struct.pack(
            "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", fields["e_type"], fields["e_machine"], 1, 0, 0, fields["e_shoff"],
            0, 64, 0, 0, fields["e_shentsize"], fields["e_shnum"], fields["e_shstrndx"],
        )  # fmt: skip
        return bytes(image)


def modinfo(tags: Iterable[tuple[str, str]]) -> bytes:
    """Return the content of a `.modinfo` section."""
    return b"".join(f"{tag}={value}".encode() + b"\0" for tag, value in tags)


@pytest.fixture
def make_module() -> Callable[..., ModuleBuilder]:
    """A function that returns a builder with all that a module must have, and `extra` sections before the symbols."""

    def make(name: str = "tiny", *extra: Section, tags: Iterable[tuple[str, str]] = ()) -> ModuleBuilder:
        this_module = bytes(24) + name.encode().ljust(56, b"\0") + bytes(816)
        builder = ModuleBuilder()
        builder.add(Section(".text", b"\xc3" * 32, ALLOC | EXEC, align=16))
        builder.add(Section(".modinfo", modinfo([("license", "GPL"), *tags, ("name", name)]), ALLOC))
        builder.add(Section(".gnu.linkonce.this_module", this_module, ALLOC | WRITE, align=64))
        for section in extra:
            builder.add(section)
        builder.add(Section(".symtab", type=SYMTAB, align=8))
        builder.symbols = [("", 1, 0), ("init_module", 1, 1), ("printk", 0, 1)]
        return builder

    return make


@pytest.fixture
def make_section() -> type[Section]:
    """The class of a builder's sections."""
    return Section
