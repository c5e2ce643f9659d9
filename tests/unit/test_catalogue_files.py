"""Module files built from facts, read back with pyelftools and plain arithmetic."""

import io
import struct
from dataclasses import replace

import pytest
from elftools.elf.elffile import ELFFile

from loader_svc.catalogue import catalogue_modules
from loader_svc.catalogue.fill import fill, noise
from loader_svc.catalogue.identity import Identity
from loader_svc.catalogue.module_facts import SymbolGroup
from loader_svc.catalogue.object_file import module_image
from loader_svc.catalogue.packed import catalogue
from loader_svc.catalogue.pkcs7 import signature
from loader_svc.catalogue.strings import StringTable, add_made_up, lengths
from loader_svc.catalogue.symbol_table import FactsContradiction

MODULES = ("irqbypass", "cryptd", "hid", "crc32_pclmul", "t10_pi", "polyval_clmulni", "virtio_net")
TRAILER = b"~Module signature appended~\n"


@pytest.fixture(scope="module")
def identity():
    return Identity(catalogue().kernel, catalogue())


@pytest.fixture(params=MODULES)
def built(request, identity):
    """Facts, file and its ELF reader."""
    facts = catalogue_modules()[request.param]
    image = module_image(facts, identity)
    return facts, image, ELFFile(io.BytesIO(image))


def test_file_is_as_long_as_the_real_one(built):
    facts, image, _ = built
    assert len(image) == facts.plain_bytes


def test_sections_are_those_of_the_facts(built):
    facts, _, elf = built
    expected = []
    for section in facts.sections:
        expected.append((section.name, section.size_bytes, section.align_bytes))
        if section.relocations:
            expected.append((".rela" + section.name, 24 * section.relocation_count, 8))
    found = [(s.name, s["sh_size"], s["sh_addralign"]) for s in elf.iter_sections()]
    assert found == [("", 0, 0), *expected]


def test_symbols_are_those_of_the_facts(built):
    facts, _, elf = built
    symbols = list(elf.get_section_by_name(".symtab").iter_symbols())
    undefined = {s.name for s in symbols[1:] if s["st_shndx"] == "SHN_UNDEF"}
    assert undefined == {wanted.name for wanted in facts.imports}
    names = {s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF"}
    for export in facts.exports:
        assert {export.name, f"__crc_{export.name}", f"__ksymtab_{export.name}", f"__kstrtab_{export.name}"} <= names
    local = [s["st_info"]["bind"] == "STB_LOCAL" for s in symbols]
    assert local.index(False) == elf.get_section_by_name(".symtab")["sh_info"]
    assert not any(local[local.index(False) :])
    sections = [s.name for s in elf.iter_sections()]
    for group in facts.symbols:
        kinds = [
            len(s.name) + 1
            for s in symbols
            if isinstance(s["st_shndx"], int)
            and (sections[s["st_shndx"]], s["st_info"]["bind"][4:], s["st_info"]["type"][4:])
            == (group.section, group.bind, group.type)
        ]
        assert len(kinds) >= group.count
        assert sum(kinds) >= group.name_bytes


def test_relocations_lie_in_their_sections_apart_on_zeros_and_point_to_symbols(built):
    _, image, elf = built
    widths = {1: 8, 24: 8, 2: 4, 4: 4, 10: 4, 11: 4}
    count = elf.get_section_by_name(".symtab").num_symbols()
    seen = 0
    for section in elf.iter_sections():
        if section["sh_type"] != "SHT_RELA":
            continue
        target = elf.get_section(section["sh_info"])
        data, free = target.data(), 0
        for entry in sorted(section.iter_relocations(), key=lambda entry: entry["r_offset"]):
            offset, width = entry["r_offset"], widths[entry["r_info_type"]]
            assert free <= offset <= target["sh_size"] - width, (target.name, offset)
            assert not any(data[offset : offset + width]), (target.name, offset)
            assert 0 < entry["r_info_sym"] < count
            free, seen = offset + width, seen + 1
    assert seen > 50
    assert image


def test_struct_module_and_modinfo_name_the_module(built, identity):
    facts, _, elf = built
    this_module = elf.get_section_by_name(".gnu.linkonce.this_module").data()
    assert len(this_module) == identity.kernel.struct_module_bytes
    assert this_module[24:80].rstrip(b"\0").decode() == facts.name
    words = elf.get_section_by_name(".modinfo").data().decode("latin-1").split("\0")
    assert f"name={facts.name}" in words
    assert f"vermagic={identity.vermagic}" in words


def test_versions_and_exports_have_the_crcs_of_the_identity(built, identity):
    facts, _, elf = built
    versions = elf.get_section_by_name("__versions").data()
    found = {
        versions[at + 8 : at + 64].rstrip(b"\0").decode(): struct.unpack_from("<Q", versions, at)[0]
        for at in range(0, len(versions), 64)
    }
    assert found == {name: identity.crc(name) for name in found}
    assert "module_layout" in found
    symbols = {s.name: s for s in elf.get_section_by_name(".symtab").iter_symbols()}
    for export in facts.exports:
        symbol = symbols[f"__crc_{export.name}"]
        table = elf.get_section(symbol["st_shndx"]).data()
        assert struct.unpack_from("<I", table, symbol["st_value"])[0] == export.crc


def test_parameters_have_their_names_where_their_pointers_lead(identity):
    facts = catalogue_modules()["hid"]
    elf = ELFFile(io.BytesIO(module_image(facts, identity)))
    symbols = elf.get_section_by_name(".symtab")
    names = []
    for entry in elf.get_section_by_name(".rela__param").iter_relocations():
        if entry["r_offset"] % 40 == 0:
            symbol = symbols.get_symbol(entry["r_info_sym"])
            data = elf.get_section(symbol["st_shndx"]).data()
            at = symbol["st_value"] + entry["r_addend"]
            names.append(data[at : data.index(b"\0", at)].decode())
    assert names == [parameter.name for parameter in facts.parameters]
    assert names


def test_the_same_facts_give_the_same_bytes_and_others_do_not(identity):
    facts = catalogue_modules()["irqbypass"]
    image = module_image(facts, identity)
    assert module_image(replace(facts), identity) == image
    other = module_image(replace(facts, fill=(facts.fill[0] + 500, facts.fill[1])), identity)
    assert len(other) == len(image)
    assert other != image


@pytest.mark.parametrize(
    "change",
    [
        {"symbols": ()},
        {"symbols": (SymbolGroup("LOCAL", "FUNC", ".text", 1, 10),)},
        {"imports": ()},
        {"info": (("license", "GPL"),)},
    ],
    ids=["no symbols", "few symbols", "no imports", "other modinfo"],
)
def test_facts_that_do_not_fit_together_are_refused(identity, change):
    with pytest.raises(FactsContradiction, match="irqbypass"):
        module_image(replace(catalogue_modules()["irqbypass"], **change), identity)


@pytest.mark.parametrize("numbers", [(49, 49), (48, 49), (47, 48), (48, 48)])
def test_signature_is_well_formed_der_with_a_right_trailer(numbers):
    found = signature(numbers, "a signer", b"\x11\x22", "seed")
    assert found.endswith(TRAILER)
    kind, length = struct.unpack_from(">2xB5xI", found, len(found) - len(TRAILER) - 12)
    assert kind == 2  # PKEY_ID_PKCS7
    message = found[: -len(TRAILER) - 12]
    assert len(message) == length
    numbers_found = list(primitives(innermost_octets(message), 0x02))
    assert tuple(len(value) for value in numbers_found) == numbers
    for value in numbers_found:
        assert value[0] < 0x80  # positive
        assert value[0] or value[1] >= 0x80  # as short as can be


def innermost_octets(message: bytes) -> bytes:
    """The last octet string, which holds the two numbers."""
    return list(primitives(message, 0x04))[-1]


def primitives(der: bytes, wanted: int):
    """All values of a tag, inside of what is constructed."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        assert at + length <= len(der)
        value, at = der[at : at + length], at + length
        if tag == wanted:
            yield value
        if tag & 0x20:
            yield from primitives(value, wanted)


def test_string_table_shares_tails_and_fills_up():
    table = StringTable(["abc", "bc", "c", "xbc", "abc"])
    contents = table.contents(20)
    assert len(contents) == 20
    for name in ("abc", "bc", "c", "xbc", ""):
        at = table.offset(name)
        assert contents[at : contents.index(b"\0", at)].decode() == name
    assert len(table) == 1 + len("abc\0xbc\0")
    with pytest.raises(ValueError, match="the string table has 5"):
        table.contents(5)


@pytest.mark.parametrize(("count", "name_bytes", "room"), [(5, 100, 200), (99, 2000, 1200), (99, 2000, 400), (3, 6, 7)])
def test_made_up_names_have_the_lengths_wanted_and_no_more_room_than_there_is(count, name_bytes, room):
    table = StringTable()
    wanted = lengths(count, name_bytes)
    assert sum(wanted) + count == name_bytes
    offsets = add_made_up(table, wanted, room, "word")
    contents = table.contents(room)
    assert [contents.index(b"\0", at) - at for at in offsets] == wanted


def test_made_up_names_without_room_are_refused():
    with pytest.raises(ValueError, match="no room"):
        add_made_up(StringTable(), [50, 50], 40, "word")


def test_fill_has_the_shares_asked_for():
    assert fill(1000, (0, 0), "seed") == bytes(1000)
    assert fill(1000, (65536, 0), "seed") == noise(1000, "seed", "noise")
    mixed = fill(4096, (16384, 16384), "seed")
    assert len(mixed) == 4096
    assert mixed[2048:] == bytes(2048)
    assert any(mixed[1024:2048])
    assert fill(4096, (16384, 16384), "seed") == mixed
    assert fill(4096, (16384, 16384), "other") != mixed
    assert len(fill(3, (60000, 60000), "seed")) == 3
