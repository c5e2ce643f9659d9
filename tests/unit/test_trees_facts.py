"""Symbols, aliases and soft dependencies of module files, against an independent ELF reader."""

import gzip
import lzma
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from elftools.elf.elffile import ELFFile

from loader_svc.trees.facts import NO_FACTS, ModuleFacts, facts_of, image_facts

GIVES = ("one", "two_with_a_longer_name")
WANTS = ("printk", "other")


def elf(elf_class: int, order: str) -> bytes:
    """A relocatable file of the class (1: 32 bits, 2: 64) and byte order with all the sections that are read."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in ("local", *WANTS))
    symbol = {1: "IIIBBH", 2: "IBBHQQ"}[elf_class]
    symbols = bytes(struct.calcsize(order + symbol))
    for name, home in [("local", 1), *((name, 0) for name in WANTS)]:
        at = strings.index(name.encode())
        fields = (at, 0, 0, 0x10, 0, home) if elf_class == 1 else (at, 0x10, 0, home, 0, 0)
        symbols += struct.pack(order + symbol, *fields)
    contents = {
        "": b"",
        ".rela.modinfo": b"not this one",
        ".modinfo": b"\0license=GPL\0alias=pci:v*\0\0alias=usb:\xff\0softdep=pre: x\0alias\0",
        "__ksymtab_strings": b"\0".join(name.encode() for name in GIVES),
        "__versions": b"".join(
            struct.pack(order + {1: "I60s", 2: "Q56s"}[elf_class], 1, name) for name in (b"printk", b"module_layout")
        ),
        ".symtab": symbols,
        ".strtab": strings,
    }
    contents[".shstrtab"] = b"\0" + b"".join(name.encode() + b"\0" for name in [*contents, ".shstrtab"] if name)
    header_bytes = {1: 52, 2: 64}[elf_class]
    image, table = bytes(header_bytes), b""
    for name, content in contents.items():
        at = contents[".shstrtab"].index(b"\0" + name.encode() + b"\0") + 1 if name else 0
        layout = {1: "IIIIIIIIII", 2: "IIQQQQIIQQ"}[elf_class]
        table += struct.pack(order + layout, at, 1, 0, 0, len(image), len(content), 0, 0, 1, 0)
        image += content
    ident = b"\x7fELF" + bytes([elf_class, 1 if order == "<" else 2, 1]) + bytes(9)
    header = struct.pack(
        order + {1: "HHIIIIIHHHHHH", 2: "HHIQQQIHHHHHH"}[elf_class],
        *(
            1,
            62,
            1,
            0,
            0,
            len(image),
            0,
            header_bytes,
            0,
            0,
            len(table) // len(contents),
            len(contents),
            len(contents) - 1,
        ),
    )
    return ident + header + image[header_bytes:] + table


@pytest.mark.parametrize("elf_class", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_class_and_byte_order_is_read(elf_class: int, order: str) -> None:
    facts = image_facts(elf(elf_class, order))
    assert facts == ModuleFacts(
        exports=tuple(name.encode() for name in GIVES),
        imports=(b"printk", b"other", b"module_layout"),
        aliases=("pci:v*", "usb:\udcff", ""),
        softdeps=("pre: x",),
    )


def test_symbols_agree_with_another_reader_on_real_modules(shared_dir: Path) -> None:
    checked = 0
    for path in sorted((shared_dir / "data" / "golden" / "ko").rglob("*.ko")):
        if path.stat().st_size > 300_000:  # the other reader is slow
            continue
        facts = facts_of(str(path), "")
        with path.open("rb") as file:
            reader = ELFFile(file)
            symbols = list(reader.get_section_by_name(".symtab").iter_symbols())
            wanted = {symbol.name for symbol in symbols[1:] if symbol["st_shndx"] == "SHN_UNDEF"} - {""}
            given = {symbol.name[len("__crc_") :] for symbol in symbols if symbol.name.startswith("__crc_")}
            section = reader.get_section_by_name("__ksymtab_strings")
            words = set() if section is None else {word.decode() for word in section.data().split(b"\0") if word}
            tags = reader.get_section_by_name(".modinfo")
            info = [] if tags is None else tags.data().decode().split("\0")
        imports = {name.decode() for name in facts.imports}
        assert wanted <= imports, path
        assert imports - wanted <= {"module_layout"}, path
        assert {name.decode() for name in facts.exports} == (given or words), path
        assert list(facts.aliases) == [tag[len("alias=") :] for tag in info if tag.startswith("alias=")], path
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("packing", ["gz", "xz", "zst"])
def test_packed_files_say_the_same_in_every_way_of_packing(tmp_path: Path, packing: str) -> None:
    image = elf(2, "<")
    pack: Callable[[bytes], bytes] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[packing]
    path = tmp_path / f"x.ko.{packing}"
    path.write_bytes(pack(image))
    assert facts_of(str(path), packing) == image_facts(image)
    path.write_bytes(pack(image)[:-30])
    facts_of(str(path), packing)
    path.write_bytes(image)
    assert facts_of(str(path), packing) == NO_FACTS


def test_what_is_no_module_has_no_facts(tmp_path: Path) -> None:
    path = tmp_path / "x.ko"
    assert facts_of(str(path), "") == NO_FACTS
    for content in (b"", b"\x7fELF", b"\x7fELF\2\1\1", bytes(5000), b"#!/bin/sh\n", elf(2, "<")[:-1]):
        path.write_bytes(content)
        assert facts_of(str(path), "") == NO_FACTS
    os.unlink(path)
    os.mkfifo(path)
    assert facts_of(str(path), "") == NO_FACTS


def test_damaged_modules_never_raise() -> None:
    seed = 7
    chance = random.Random(seed)
    images = [elf(elf_class, order) for elf_class in (1, 2) for order in "<>"]
    for _ in range(4000):
        image = bytearray(chance.choice(images))
        for _ in range(chance.randrange(1, 6)):
            # Mostly the header, the tables of symbols and of sections: there numbers are that lead elsewhere.
            at = chance.choice(
                [chance.randrange(64), chance.randrange(len(image)), chance.randrange(len(image) // 2, len(image))]
            )
            image[at] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        cut = chance.choice([len(image), chance.randrange(len(image))])
        assert isinstance(image_facts(bytes(image[:cut])), ModuleFacts), f"seed {seed}"


def test_the_golden_bad_inputs_never_raise(shared_dir: Path) -> None:
    for path in sorted((shared_dir / "data" / "golden" / "bad-inputs").iterdir()):
        for packing in ("", "gz", "xz", "zst"):
            assert isinstance(facts_of(str(path), packing), ModuleFacts), path
