"""Reading a module's ELF image with the kernel's own checks in the kernel's own order.

Source of every rule: elf_validity_cache_copy() in kernel/module/main.c, Linux 6.12. A library made for good ELF files
checks other things in another order, so it could not tell at which check the kernel refuses a broken one, and that is
what is simulated here. What the kernel does not check (class, data encoding, entry sizes) is not checked either.

One difference: where the kernel would read memory outside of the image (names and strings whose offsets it does not
check), here is a NUL.
"""

import struct
from functools import cached_property
from typing import Final, NamedTuple

from loader_svc.image.buffers import Buffer, byte_view
from loader_svc.image.errors import ImageError, quoted
from loader_svc.image.modinfo import UNTERMINATED_BYTES, Modinfo, Parameter, text
from loader_svc.image.param_limits import parameter_limits
from loader_svc.image.symbols import Export, Import, SymbolTable, read_exports, read_versions

ET_REL: Final = 1
EM_X86_64: Final = 62
SHN_UNDEF: Final = 0
SHT_NULL: Final = 0
SHT_SYMTAB: Final = 2
SHT_NOBITS: Final = 8
SHF_WRITE: Final = 0x1
SHF_ALLOC: Final = 0x2
SHF_EXECINSTR: Final = 0x4

THIS_MODULE: Final = b".gnu.linkonce.this_module"
NAME_OFFSET_BYTES: Final = 24
"""Where struct module holds its name on x86-64: after `state` and the list node."""
MODULE_NAME_LEN: Final = 64 - 8

SECTION_NAME_BYTES: Final = 256
"""Longest section name kept; far more than any that means something to the kernel."""

_EHDR: Final = struct.Struct("<4s12xHHIQQQIHHHHHH")
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")


class SectionHeader(NamedTuple):
    """One entry of the section table, fields as in the file (Elf64_Shdr)."""

    sh_name: int
    sh_type: int
    sh_flags: int
    sh_addr: int
    sh_offset: int
    sh_size: int
    sh_link: int
    sh_info: int
    sh_addralign: int
    sh_entsize: int


class ElfImage:
    """A module image that passed the kernel's validity check, and what can be read out of it.

    Only the section table is read at once; all else when first asked for. Keeps a view of the buffer it was made from
    until `release`.
    """

    def __init__(
        self, view: memoryview, sections: list[SectionHeader], shstrndx: int, indices: tuple[int, ...]
    ) -> None:
        self.view = view
        self.sections: Final = sections
        self.index_info, self.index_symtab, self.index_this_module = indices
        """Section indices, 0 if there is none (only possible for `.modinfo`)."""
        self.index_strtab: Final = sections[self.index_symtab].sh_link
        names = sections[shstrndx]
        self._secstrings_offset: Final = names.sh_offset
        self._secstrings: Final = bytes(view[names.sh_offset : names.sh_offset + names.sh_size])
        self._has_names_outside: Final = any(section.sh_name >= names.sh_size for section in sections)
        self.index_versions: Final = self.find_section(b"__versions")
        self.index_percpu: Final = self.find_section(b".data..percpu")

    def release(self) -> None:
        """Let go of the buffer; facts not read until now can't be read any more (ValueError)."""
        self.view.release()

    @property
    def image_bytes(self) -> int:
        """Length of the image, as all checks saw it."""
        return len(self.view)

    # Sections

    def section_name(self, index: int) -> bytes:
        """Return a section's name, at most `SECTION_NAME_BYTES` of it."""
        return _string_at(self._secstrings, self._secstrings_offset, self.view, self.sections[index].sh_name)

    def find_section(self, name: bytes, flags: list[int] | None = None) -> int:
        """Return the index of the first section of that name with SHF_ALLOC, else 0 (find_sec() of the kernel).

        `flags` stands in for the flags in the file, for callers that have changed some.
        """
        wanted = name + b"\0"
        strings = self._secstrings
        if wanted not in strings and not self._has_names_outside:
            return 0
        for index, section in enumerate(self.sections):
            allocated = (section.sh_flags if flags is None else flags[index]) & SHF_ALLOC
            if not allocated or index == 0:
                continue
            if strings.startswith(wanted, section.sh_name) or (
                section.sh_name >= len(strings) and self.section_name(index) == name
            ):
                return index
        return 0

    def section_data(self, index: int) -> memoryview:
        """Return a section's bytes in the file, as far as the file has them; empty for NOBITS."""
        section = self.sections[index]
        if section.sh_type == SHT_NOBITS:
            return self.view[:0]
        return self.view[section.sh_offset : section.sh_offset + section.sh_size]

    # Names and modinfo

    @cached_property
    def modinfo(self) -> Modinfo:
        """The `.modinfo` strings; none if there is no such section."""
        if not self.index_info:
            return Modinfo(b"")
        section = self.sections[self.index_info]
        end = section.sh_offset + section.sh_size
        data = bytes(self.view[section.sh_offset : end])
        if not data.endswith(b"\0"):
            # Nothing makes the last string end with the section: the kernel reads on to the next NUL.
            data += bytes(self.view[end : end + UNTERMINATED_BYTES]).partition(b"\0")[0]
        return Modinfo(data)

    @cached_property
    def this_module_name(self) -> str:
        """The name inside struct module: what the modules list, the duplicate check and delete_module go by."""
        data = bytes(self.section_data(self.index_this_module)[NAME_OFFSET_BYTES : NAME_OFFSET_BYTES + MODULE_NAME_LEN])
        return text(data.partition(b"\0")[0])

    @cached_property
    def info_name(self) -> str:
        """The `name=` of modinfo if there is one, else `this_module_name`: what the blacklist and messages go by."""
        name = self.modinfo.get("name")
        return self.this_module_name if name is None else name

    @property
    def this_module_bytes(self) -> int:
        """The size of struct module that this module was built for."""
        return self.sections[self.index_this_module].sh_size

    @property
    def vermagic(self) -> str | None:
        """The `vermagic=` of modinfo, or None."""
        return self.modinfo.get("vermagic")

    @property
    def is_livepatch(self) -> bool:
        """Whether modinfo has a `livepatch=` tag, of whatever value."""
        return self.modinfo.raw(b"livepatch") is not None

    @property
    def license(self) -> str | None:
        """The first `license=` of modinfo (the one the kernel judges by), or None."""
        return self.modinfo.get("license")

    @property
    def depends(self) -> tuple[str, ...]:
        """The modules that `depends=` names."""
        return self.modinfo.depends

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every `alias=`, in file order."""
        return self.modinfo.all("alias")

    @property
    def softdeps(self) -> tuple[str, ...]:
        """Every `softdep=` as written (`pre: a post: b`)."""
        return self.modinfo.all("softdep")

    @property
    def import_ns(self) -> tuple[str, ...]:
        """The symbol namespaces the module imports."""
        return self.modinfo.all("import_ns")

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters that modinfo declares, with the limits of arrays and strings as far as `__param` tells."""
        parameters = self.modinfo.parameters
        if not any(parameter.is_limited for parameter in parameters):
            return parameters
        limits = parameter_limits(self)
        return tuple(p._replace(most=limits.get(p.name)) if p.is_limited else p for p in parameters)

    # Symbols

    @cached_property
    def symbols(self) -> SymbolTable:
        """The symbol table with its strings."""
        symtab = self.sections[self.index_symtab]
        strtab = self.sections[self.index_strtab]
        return SymbolTable(self.view, symtab.sh_offset, symtab.sh_size, strtab.sh_offset, strtab.sh_size)

    @cached_property
    def versions(self) -> dict[str, int]:
        """The CRC of every symbol in `__versions` (`module_layout` among them); of equal names the first counts."""
        return read_versions(self.section_data(self.index_versions)) if self.index_versions else {}

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """The undefined symbols in table order, with the CRC that `__versions` gives them.

        ImageTooLarge if their names overlap so much that they would take many times the image's size.
        """
        return self.symbols.imports(self.versions)

    @cached_property
    def exports(self) -> tuple[Export, ...]:
        """What `__ksymtab` and `__ksymtab_gpl` export, in table order (see `symbols.read_exports`)."""
        return read_exports(self)


def read_elf(image: Buffer, *, this_module_bytes: int | None = None) -> ElfImage:
    """Check an image as the kernel does and return what is in it.

    `image` is what is left after decompression and without a signature. `this_module_bytes` is the size of struct
    module in the kernel that loads it (it follows from that kernel's configuration); None accepts any.

    Raises ImageError with errno ENOEXEC and the check that failed, and nothing else whatever the bytes are.
    """
    view = byte_view(image)
    length = len(view)
    if length < _EHDR.size:
        raise _refused("len", length, "an ELF header has 64 bytes")
    magic, e_type, e_machine, _, _, _, e_shoff, _, _, _, _, e_shentsize, e_shnum, e_shstrndx = _EHDR.unpack_from(view)
    if magic != b"\x7fELF":
        raise _refused("magic", quoted(magic), "not an ELF file")
    if e_type != ET_REL:
        raise _refused("e_type", e_type, "a module is a relocatable file, type 1")
    if e_machine != EM_X86_64:
        raise _refused("e_machine", e_machine, "x86-64 is machine 62")
    if e_shentsize != _SHDR.size:
        raise _refused("e_shentsize", e_shentsize, "a section header has 64 bytes")
    if e_shoff >= length or e_shnum * _SHDR.size > length - e_shoff:
        raise _refused("e_shoff", e_shoff, f"{e_shnum} section headers do not fit into {length} bytes")
    if e_shstrndx == SHN_UNDEF or e_shstrndx >= e_shnum:
        raise _refused("e_shstrndx", e_shstrndx, f"there are {e_shnum} sections")
    table = view[e_shoff : e_shoff + e_shnum * _SHDR.size]
    sections = list(map(SectionHeader._make, _SHDR.iter_unpack(table)))
    _check_section_names(view, sections[e_shstrndx])
    indices = _check_sections(view, sections, sections[e_shstrndx])
    this_module = sections[indices[2]]
    # Not NOBITS: only sections with contents were counted.
    if not this_module.sh_flags & SHF_ALLOC:
        raise _refused("this_module_alloc", hex(this_module.sh_flags), "struct module must be allocated")
    if this_module_bytes is not None and this_module.sh_size != this_module_bytes:
        raise _refused("this_module_size", this_module.sh_size, f"this kernel's struct module has {this_module_bytes}")
    return ElfImage(view, sections, e_shstrndx, indices)


def _check_section_names(view: memoryview, names: SectionHeader) -> None:
    if not _within(names, len(view)):
        raise _refused("shstrtab_range", _range(names), f"the image has {len(view)} bytes")
    if names.sh_size == 0:
        raise _refused("shstrtab_empty", 0, "the section name table is empty")
    last = view[names.sh_offset + names.sh_size - 1]
    if last:
        raise _refused("shstrtab_nul", last, "the section name table must end with a NUL")


def _check_sections(view: memoryview, sections: list[SectionHeader], names: SectionHeader) -> tuple[int, int, int]:
    """Check the sections one by one, then their counts; return the indices of modinfo, symtab and this_module."""
    null = sections[0]
    if null.sh_type != SHT_NULL or null.sh_size or null.sh_addr:
        raise _refused("section_0", f"type {null.sh_type} size {null.sh_size} addr {null.sh_addr}", "must be all zero")
    length = len(view)
    strings = bytes(view[names.sh_offset : names.sh_offset + names.sh_size])
    found: dict[bytes, list[int]] = {b".modinfo": [], b".symtab": [], THIS_MODULE: []}
    for index, section in enumerate(sections):
        kind = section.sh_type
        if kind in (SHT_NULL, SHT_NOBITS):
            continue
        if kind == SHT_SYMTAB:
            if section.sh_link == SHN_UNDEF or section.sh_link >= len(sections):
                raise _refused("sh_link", section.sh_link, f"there are {len(sections)} sections")
            found[b".symtab"].append(index)
        if section.sh_offset + section.sh_size > length:
            raise _refused("section_range", _range(section), f"section {index} of an image of {length} bytes")
        name = section.sh_name
        if name < len(strings):
            if strings.startswith(b".gnu.linkonce.this_module\0", name):
                found[THIS_MODULE].append(index)
            elif strings.startswith(b".modinfo\0", name):
                found[b".modinfo"].append(index)
        else:
            outside = _string_at(strings, names.sh_offset, view, name)
            if outside in (THIS_MODULE, b".modinfo"):
                found[outside].append(index)
            if section.sh_flags & SHF_ALLOC:
                raise _refused("sh_name", name, f"section {index}: the name table has {len(strings)} bytes")
    modinfo, symtab, this_module = found.values()
    if len(modinfo) > 1:
        raise _refused("modinfo_count", len(modinfo), "there may be only one .modinfo section")
    if len(symtab) != 1:
        raise _refused("symtab_count", len(symtab), "there must be exactly one symbol table")
    if len(this_module) != 1:
        raise _refused("this_module_count", len(this_module), f"there must be exactly one {text(THIS_MODULE)} section")
    return (modinfo[0] if modinfo else 0), symtab[0], this_module[0]


def _within(section: SectionHeader, length: int) -> bool:
    # Python's integers do not wrap, so a sum beyond 64 bits, which the kernel tests for, is simply too large.
    return section.sh_offset + section.sh_size <= length


def _string_at(strings: bytes, offset: int, view: memoryview, at: int) -> bytes:
    """Return the string `at` bytes into a table that lies at `offset`; past the table, what the image has there."""
    if at < len(strings):
        end = strings.find(b"\0", at, at + SECTION_NAME_BYTES)
        return strings[at : end if end >= 0 else at + SECTION_NAME_BYTES]
    return bytes(view[offset + at : offset + at + SECTION_NAME_BYTES]).partition(b"\0")[0]


def _range(section: SectionHeader) -> str:
    return f"{section.sh_offset}+{section.sh_size}"


def _refused(check: str, value: object, reason: str) -> ImageError:
    return ImageError("ENOEXEC", f"elf: {check}", value, reason)
