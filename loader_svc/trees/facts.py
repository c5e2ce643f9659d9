"""What a module file says about its place among the others: symbols given and wanted, aliases, soft dependencies.

A section reader for indexing and nothing else, made to be fast: a whole distribution kernel has 4,000 files and two
million symbols. What counts as given and as wanted is what depmod of kmod 30 takes: given are the names behind
``__crc_`` symbols, or the words of ``__ksymtab_strings`` if there is no such symbol; wanted is every undefined symbol,
then every entry of ``__versions`` that is not one of them.
"""

from __future__ import annotations

import io
import lzma
import mmap
import os
import re
import struct
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import NamedTuple

import zstandard

MAX_IMAGE_BYTES = 256 << 20
"""Longest image that is unpacked to be indexed; the largest of Debian has some 20 MiB."""

MAX_SECTION_BYTES = 64 << 20
"""Longest section that is read; the symbols of a module with all its debugging information are below 10 MiB."""

_VERSION_BYTES = 64  # struct modversion_info: an unsigned long, and the name in the rest
_SPARC = (2, 43)  # EM_SPARC, EM_SPARCV9
_STT_REGISTER = 13  # on sparc: undefined, but no symbol that another module could give
_NATIVE_ORDER = "<" if sys.byteorder == "little" else ">"
_CRC = re.compile(rb"__crc_")
_SECTION_NAMES = re.compile(rb"(\.modinfo|\.symtab|\.strtab|__ksymtab_strings|__versions)\0")


class _Class(NamedTuple):
    """Where the fields are in one of ELF's two classes (elf(5)); bytes, but ``section`` as struct has it."""

    header: str
    header_bytes: int
    section: str
    section_bytes: int
    symbol_bytes: int
    symbol_info_at: int
    symbol_section_at: int
    crc_bytes: int


_CLASSES = {
    1: _Class("HHIIIIIHHHHHH", 52, "IIIIII", 40, 16, 12, 14, 4),
    2: _Class("HHIQQQIHHHHHH", 64, "IIQQQQ", 64, 24, 4, 6, 8),
}


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What indexing needs to know of one module; all empty for a file that is no module."""

    exports: tuple[bytes, ...] = ()
    imports: tuple[bytes, ...] = ()
    aliases: tuple[str, ...] = ()
    softdeps: tuple[str, ...] = ()


NO_FACTS = ModuleFacts()


class _Malformed(Exception):
    """The file is not an ELF file as kmod wants them."""


def facts_of(file: str | int, compression: str) -> ModuleFacts:
    """Read a module file, by its path or open descriptor, packed as ``compression`` says ("", "gz", "xz", "zst").

    ``NO_FACTS`` if it can't be read or unpacked or is no ELF file. A descriptor is left open.
    """
    try:
        fd = (
            file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        )
    except OSError:
        return NO_FACTS
    try:
        if compression:
            with open(fd, "rb", closefd=False) as packed:
                return image_facts(_unpacked(packed.read(MAX_IMAGE_BYTES), compression))
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as image:
            return image_facts(image)
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
        return NO_FACTS
    finally:
        if fd is not file:
            os.close(fd)


def image_facts(image: bytes | mmap.mmap) -> ModuleFacts:
    """Read an unpacked module image; ``NO_FACTS`` if it is no ELF file."""
    try:
        reader = _Reader(image)
    except (_Malformed, struct.error):
        return NO_FACTS
    info = [word.decode("utf-8", "surrogateescape").partition("=") for word in _words(reader.section(b".modinfo"))]
    return ModuleFacts(
        exports=reader.exports(),
        imports=reader.imports(),
        aliases=tuple(value for key, _, value in info if key == "alias"),
        softdeps=tuple(value for key, _, value in info if key == "softdep"),
    )


def _unpacked(packed: bytes, compression: str) -> bytes:
    """Unpack the image in ``packed``, cut at ``MAX_IMAGE_BYTES``."""
    if compression == "xz":
        return lzma.LZMADecompressor(memlimit=MAX_IMAGE_BYTES).decompress(packed, MAX_IMAGE_BYTES)
    if compression == "gz":
        return zlib.decompressobj(wbits=31).decompress(packed, MAX_IMAGE_BYTES)
    with zstandard.ZstdDecompressor(max_window_size=MAX_IMAGE_BYTES).stream_reader(io.BytesIO(packed)) as reader:
        return reader.read(MAX_IMAGE_BYTES)


def _words(section: bytes) -> list[bytes]:
    """Split a section of strings, which have NULs between them, or several."""
    return [word for word in section.split(b"\0") if word]


class _Reader:
    """The sections of one image."""

    def __init__(self, image: bytes | mmap.mmap) -> None:
        self._image = image
        ident = image[:16]
        if len(ident) < 16 or not ident.startswith(b"\x7fELF") or ident[4] not in _CLASSES or ident[5] not in (1, 2):
            raise _Malformed
        self._class = elf = _CLASSES[ident[4]]
        self._order = "<" if ident[5] == 1 else ">"
        header = struct.unpack_from(self._order + elf.header, image, 16)
        self._machine = header[1]
        self._table_at, entry_bytes, self._count, strings_index = header[5], header[10], header[11], header[12]
        if entry_bytes != elf.section_bytes or self._table_at + self._count * entry_bytes > len(image):
            raise _Malformed
        if not 0 < strings_index < self._count:
            raise _Malformed
        names = self._contents(strings_index)
        if not names or names[-1]:
            raise _Malformed
        self._names = names
        table = self._array("I", image[self._table_at : self._table_at + self._count * entry_bytes])
        # Names may share a tail (".modinfo" that of ".rela.modinfo"): all that matters is what starts at the offset.
        wanted = {match.start(): match[1] for match in _SECTION_NAMES.finditer(names)}
        self._sections: dict[bytes, bytes] = {}
        for index, offset in enumerate(table[:: entry_bytes // 4]):
            if offset in wanted and index and wanted[offset] not in self._sections:
                contents = self._contents(index)
                if contents is not None:
                    self._sections[wanted[offset]] = contents

    def section(self, name: bytes) -> bytes:
        """Contents of the first section of that name that lies within the file; empty if there is none."""
        return self._sections.get(name, b"")

    def exports(self) -> tuple[bytes, ...]:
        """Symbols that the module gives to others."""
        strings, symbols = self.section(b".strtab"), self.section(b".symtab")
        offsets = {match.start() for match in _CRC.finditer(strings)}
        if offsets and symbols and not len(symbols) % self._class.symbol_bytes:
            names = self._array("I", symbols)[:: self._class.symbol_bytes // 4][1:]
            found = [_string(strings, offset + len("__crc_")) for offset in names if offset in offsets]
            if found and max(names) < len(strings):
                return tuple(found)
        return tuple(_words(self.section(b"__ksymtab_strings")))

    def imports(self) -> tuple[bytes, ...]:
        """Symbols that the module wants from others or from the kernel, each once, in the order of first mention."""
        elf, strings, symbols = self._class, self.section(b".strtab"), self.section(b".symtab")
        if not strings or not symbols or len(symbols) % elf.symbol_bytes:
            return ()
        names = self._array("I", symbols)[:: elf.symbol_bytes // 4]
        sections = self._array("H", symbols)[elf.symbol_section_at // 2 :: elf.symbol_bytes // 2]
        undefined = [index for index, section in enumerate(sections) if not section and index]
        if self._machine in _SPARC:
            types = symbols[elf.symbol_info_at :: elf.symbol_bytes]
            undefined = [index for index in undefined if types[index] & 15 != _STT_REGISTER]
        offsets = [names[index] for index in undefined]
        if offsets and max(offsets) >= len(strings):
            return ()
        wanted = dict.fromkeys([_string(strings, offset) for offset in offsets])
        versions = self.section(b"__versions")
        if not len(versions) % _VERSION_BYTES:
            for at in range(elf.crc_bytes, len(versions), _VERSION_BYTES):
                wanted[versions[at : at + _VERSION_BYTES - elf.crc_bytes].partition(b"\0")[0]] = None
        wanted.pop(b"", None)
        return tuple(wanted)

    def _contents(self, index: int) -> bytes | None:
        """Return the bytes of a section; None if it doesn't lie within the file or is longer than any."""
        elf = self._class
        header = struct.unpack_from(self._order + elf.section, self._image, self._table_at + index * elf.section_bytes)
        start, size = header[4], header[5]
        if start + size > len(self._image) or size > MAX_SECTION_BYTES:
            return None
        return self._image[start : start + size]

    def _array(self, kind: str, contents: bytes) -> array[int]:
        """``contents`` as numbers of ``kind`` ("H", "I") in the file's byte order."""
        numbers = array(kind)
        numbers.frombytes(contents[: len(contents) - len(contents) % numbers.itemsize])
        if self._order != _NATIVE_ORDER:
            numbers.byteswap()
        return numbers


def _string(strings: bytes, offset: int) -> bytes:
    """Cut out the string that starts at ``offset`` of a string table; to its end if no NUL follows."""
    end = strings.find(b"\0", offset)
    return strings[offset : end if end >= 0 else len(strings)]
