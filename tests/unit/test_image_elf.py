import io
import mmap
import pickle
import struct

import pytest
from elftools.elf.elffile import ELFFile

from loader_svc.image import ImageError, ImageTooLarge, read_elf

WRITE, ALLOC, EXEC = 1, 2, 4
NULL, PROGBITS, SYMTAB, RELA, NOBITS = 0, 1, 2, 4, 8


def check_of(image, **options):
    with pytest.raises(ImageError) as raised:
        read_elf(image, **options)
    assert raised.value.errno == "ENOEXEC"
    return raised.value.check


def set_section(builder, name, **values):
    for key, value in values.items():
        setattr(builder.section(name), key, value)
    return builder.bytes()


def test_a_right_image_is_read_from_any_buffer(make_module, tmp_path):
    image = make_module("tiny").bytes()
    path = tmp_path / "tiny.ko"
    path.write_bytes(image)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for buffer in (image, bytearray(image), memoryview(image), mapped):
            elf = read_elf(buffer)
            assert elf.this_module_name == elf.info_name == "tiny"
            assert [elf.section_name(i) for i in (1, 2, 3)] == [b".text", b".modinfo", b".gnu.linkonce.this_module"]
            assert elf.this_module_bytes == 896
            elf.release()


def test_views_of_other_shapes_are_read_as_bytes(make_module):
    image = make_module("tiny").bytes()
    doubled = bytes(byte for byte in image for _ in range(2))
    assert read_elf(memoryview(image + bytes(-len(image) % 8)).cast("Q")).info_name == "tiny"
    assert read_elf(memoryview(doubled)[::2]).info_name == "tiny"


@pytest.mark.parametrize("length", [0, 1, 63])
def test_less_than_a_header_is_refused_for_its_length(length):
    assert check_of(b"\x7fELF".ljust(64, b"\0")[:length]) == "elf: len"


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("e_type", 2, "elf: e_type"),
        ("e_type", 3, "elf: e_type"),
        ("e_machine", 183, "elf: e_machine"),
        ("e_shentsize", 40, "elf: e_shentsize"),
        ("e_shoff", 1 << 63, "elf: e_shoff"),
        ("e_shoff", (1 << 64) - 1, "elf: e_shoff"),
        ("e_shnum", 0, "elf: e_shstrndx"),
        ("e_shnum", 65535, "elf: e_shoff"),
        ("e_shstrndx", 0, "elf: e_shstrndx"),
        ("e_shstrndx", 65535, "elf: e_shstrndx"),
    ],
)
def test_header_fields_are_checked_and_named(make_module, field, value, check):
    builder = make_module()
    builder.header[field] = value
    with pytest.raises(ImageError) as raised:
        read_elf(builder.bytes())
    assert raised.value.check == check
    if field != "e_shnum":
        assert raised.value.value == str(value)
        assert str(value) in str(raised.value)


def test_a_section_table_just_at_the_end_is_outside(make_module):
    image = make_module().bytes()
    builder = make_module()
    builder.header["e_shoff"] = len(image)
    assert check_of(builder.bytes()) == "elf: e_shoff"


def test_not_elf_is_refused_by_its_magic():
    assert check_of(bytes(64)) == "elf: magic"
    assert check_of(b"#!/bin/sh\n" * 10) == "elf: magic"


def test_the_earlier_of_two_faults_is_the_one_reported(make_module):
    builder = make_module()
    builder.header = {"e_type": 3, "e_machine": 3, "e_shentsize": 1, "e_shstrndx": 0}
    assert check_of(builder.bytes()) == "elf: e_type"
    del builder.header["e_type"]
    assert check_of(builder.bytes()) == "elf: e_machine"
    del builder.header["e_machine"]
    assert check_of(builder.bytes()) == "elf: e_shentsize"
    del builder.header["e_shentsize"]
    assert check_of(builder.bytes()) == "elf: e_shstrndx"


def test_class_and_encoding_are_not_looked_at(make_module):
    image = bytearray(make_module().bytes())
    image[4:16] = b"\1\2" + bytes(range(10))
    assert read_elf(image).info_name == "tiny"


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        (24, 1 << 40, "elf: shstrtab_range"),  # sh_offset
        (24, (1 << 64) - 1, "elf: shstrtab_range"),
        (32, 0, "elf: shstrtab_empty"),  # sh_size
        (32, 1, None),  # the first byte of a name table is its NUL; all names but "" are outside then
        (32, 2, "elf: shstrtab_nul"),
    ],
)
def test_the_section_name_table_is_checked(make_module, field, value, check):
    image = bytearray(make_module().bytes())
    struct.pack_into("<Q", image, len(image) - 64 + field, value)
    assert check_of(image) == (check or "elf: sh_name")


@pytest.mark.parametrize(("field", "width"), [(4, "I"), (16, "Q"), (32, "Q")])
def test_section_0_must_be_null(make_module, field, width):
    image = bytearray(make_module().bytes())
    table = struct.unpack_from("<Q", image, 40)[0]
    struct.pack_into("<" + width, image, table + field, 1)
    assert check_of(image) == "elf: section_0"


def test_sections_must_lie_within_the_image(make_module):
    for offset, size in ((1 << 40, 1), (0, 1 << 40), ((1 << 64) - 1, 2), ((1 << 64) - 4096, 8192)):
        assert check_of(set_section(make_module(), ".text", offset=offset, size=size)) == "elf: section_range"


def test_null_and_nobits_sections_may_be_anywhere_and_of_any_name(make_module, make_section):
    outside = {"offset": 1 << 50, "size": 1 << 50, "name_offset": 1 << 31, "flags": 0}
    extra = [make_section(".a", type=NULL, **outside), make_section(".b", type=NOBITS, **outside)]
    elf = read_elf(make_module("tiny", *extra).bytes())
    assert elf.info_name == "tiny"
    assert elf.section_name(4) == b""


def test_only_allocated_sections_need_a_name_within_the_table(make_module, make_section):
    far = make_section(".far", b"x", name_offset=5000)
    assert read_elf(make_module("tiny", far).bytes()).info_name == "tiny"
    far.flags = ALLOC
    assert check_of(make_module("tiny", far).bytes()) == "elf: sh_name"


def test_the_symbol_tables_link_is_checked_before_its_range(make_module):
    builder = make_module()
    assert check_of(set_section(builder, ".symtab", link=99, offset=1 << 40)) == "elf: sh_link"


def test_counts_are_checked_in_the_kernels_order(make_module, make_section):
    double = make_section(".modinfo", b"name=x\0", ALLOC)
    builder = make_module("tiny", double)
    assert check_of(builder.bytes()) == "elf: modinfo_count"
    builder.sections = [s for s in builder.sections if s.type != SYMTAB]
    assert check_of(builder.bytes()) == "elf: modinfo_count"
    builder.sections.remove(double)
    assert check_of(builder.bytes()) == "elf: symtab_count"
    builder = make_module()
    builder.sections.append(make_section(".symtab2", bytes(24), type=SYMTAB, link=1))
    assert check_of(builder.bytes()) == "elf: symtab_count"
    builder = make_module()
    builder.sections.remove(builder.section(".gnu.linkonce.this_module"))
    assert check_of(builder.bytes()) == "elf: this_module_count"


def test_struct_module_must_be_allocated_and_of_the_kernels_size(make_module):
    assert check_of(set_section(make_module(), ".gnu.linkonce.this_module", flags=WRITE)) == "elf: this_module_alloc"
    image = make_module().bytes()
    assert read_elf(image, this_module_bytes=896).this_module_bytes == 896
    assert check_of(image, this_module_bytes=1280) == "elf: this_module_size"


def test_a_nobits_struct_module_is_none_at_all(make_module):
    builder = make_module()
    assert check_of(set_section(builder, ".gnu.linkonce.this_module", type=NOBITS)) == "elf: this_module_count"


def test_the_modinfo_name_and_the_name_inside_struct_module_are_two_things(make_module):
    builder = make_module("inner")
    builder.section(".modinfo").data = b"license=GPL\0name=outer\0name=late\0"
    elf = read_elf(builder.bytes())
    assert (elf.info_name, elf.this_module_name) == ("outer", "inner")
    builder.section(".modinfo").data = b"license=GPL\0"
    assert read_elf(builder.bytes()).info_name == "inner"


def test_an_unterminated_last_modinfo_string_runs_on_into_what_follows(make_module):
    builder = make_module("inner")
    builder.section(".modinfo").data = b"name=ab" + b"cd\0"
    builder.section(".modinfo").size = 7
    assert read_elf(builder.bytes()).info_name == "abcd"


def test_a_file_without_modinfo_has_no_tags(make_module):
    builder = make_module("tiny")
    builder.sections.remove(builder.section(".modinfo"))
    builder.symbols = []
    elf = read_elf(builder.bytes())
    assert (elf.info_name, elf.vermagic, elf.license, elf.depends) == ("tiny", None, None, ())
    assert elf.modinfo.tags == {}


def test_a_livepatch_tag_counts_whatever_its_value(make_module):
    assert read_elf(make_module("tiny", tags=[("livepatch", "")]).bytes()).is_livepatch
    assert not read_elf(make_module("tiny", tags=[("livepatches", "Y")]).bytes()).is_livepatch


def test_modinfo_is_read_in_file_order(make_module):
    tags = [
        ("alias", "b"), ("alias", "a"), ("depends", "one,two"), ("softdep", "pre: x post: y"), ("import_ns", "DMA"),
        ("vermagic", "6.12 SMP "), ("parm", "ms:how long: in ms"), ("parmtype", "ms:int"), ("parmtype", "late:bool"),
    ]  # fmt: skip
    elf = read_elf(make_module("tiny", tags=tags).bytes())
    assert elf.aliases == ("b", "a")
    assert elf.depends == ("one", "two")
    assert elf.softdeps == ("pre: x post: y",)
    assert elf.import_ns == ("DMA",)
    assert elf.vermagic == "6.12 SMP "
    assert [parameter[:3] for parameter in elf.parameters] == [("ms", "int", "how long: in ms"), ("late", "bool", "")]


def test_names_that_are_no_text_become_text(make_module):
    builder = make_module("tiny")
    builder.section(".modinfo").data = b"name=\xff\xfe\x00\xe9=\xff\x00=\x00==\x00no_value\x00"
    elf = read_elf(builder.bytes())
    assert elf.info_name == "\\xff\\xfe"
    assert elf.modinfo.tags == {"name": ["\\xff\\xfe"], "\\xe9": ["\\xff"], "": ["", "="], "no_value": [""]}
    elf.info_name.encode()


def test_imports_are_the_undefined_symbols_with_their_binding_and_version(make_module, make_section):
    versions = struct.pack("<Q56s", 0x1234, b"printk") + struct.pack("<Q56s", 0x9999, b"printk")
    builder = make_module("tiny", make_section("__versions", versions, ALLOC))
    builder.symbols += [("maybe", 0, 2), ("defined", 1, 1), ("", 0, 1)]
    elf = read_elf(builder.bytes())
    assert elf.imports == (("printk", "global", 0x1234), ("maybe", "weak", None))
    assert elf.versions == {"printk": 0x1234}


def exporting(make_module, make_section, *, relocated):
    strings = b"\0first\0second\0SPACE\0"
    builder = make_module("tiny", make_section("__ksymtab_strings", strings, ALLOC))
    at = builder.index("__ksymtab_strings")
    symtab = builder.sections.pop()
    table = builder.add(make_section("__ksymtab", bytes(24), ALLOC))
    gpl = builder.add(make_section("__ksymtab_gpl", bytes(12), ALLOC))
    builder.add(make_section("__kcrctab", struct.pack("<2I", 0xAAAA, 0xBBBB), ALLOC))
    builder.add(make_section("__kcrctab_gpl", struct.pack("<I", 0xCCCC), ALLOC))
    builder.symbols.append(("", at, 0))
    index = len(builder.symbols)
    if relocated:
        entries = [(4, 1), (8, 0), (16, 7), (20, 14)]
        rela = b"".join(struct.pack("<QQq", offset, index << 32 | 2, addend) for offset, addend in entries)
        builder.add(make_section(".rela__ksymtab", rela, type=RELA, info=table))
        rela = struct.pack("<QQq", 4, index << 32 | 2, 7)
        builder.add(make_section(".rela__ksymtab_gpl", rela, type=RELA, info=gpl))
    else:
        builder.symbols += [("__ksymtab_first", table, 0), ("__ksymtab_third", gpl, 0)]
    builder.sections.append(symtab)
    return builder


def test_exports_are_named_by_the_relocations_of_their_tables(make_module, make_section):
    elf = read_elf(exporting(make_module, make_section, relocated=True).bytes())
    assert elf.exports == (
        ("first", False, "", 0xAAAA),
        ("second", False, "SPACE", 0xBBBB),
        ("second", True, "", 0xCCCC),
    )


def test_exports_without_relocations_are_named_by_symbols(make_module, make_section):
    elf = read_elf(exporting(make_module, make_section, relocated=False).bytes())
    assert elf.exports == (("first", False, "", 0xAAAA), ("third", True, "", 0xCCCC))


def test_overlapping_symbol_names_do_not_take_more_than_a_few_times_the_image(make_module):
    builder = make_module("tiny")
    symtab = builder.section(".symtab")
    count = 20_000
    symtab.data = bytes(24) + b"".join(struct.pack("<IBBHQQ", 1 + i % 7, 1 << 4, 0, 0, 0, 0) for i in range(count))
    symtab.link = len(builder.sections) + 1
    builder.symbols = [("x" * 5000, 1, 1)]
    builder.sections.append(type(symtab)(".strings", b"\0" + b"x" * 5000 + b"\0", type=3))
    with pytest.raises(ImageTooLarge, match="imported symbols"):
        _ = read_elf(builder.bytes()).imports


def test_many_symbols_in_a_string_table_without_an_end_are_summed_up_in_one_pass(make_module):
    """Every symbol searching a megabyte for its NUL would take minutes; the test's time limit is the judge."""
    builder = make_module("tiny")
    symtab = builder.section(".symtab")
    count = 300_000
    symtab.data = bytes(24) + b"".join(struct.pack("<IBBHQQ", 1 + i, 1 << 4, 0, 1, 0, 0) for i in range(count))
    symtab.link = len(builder.sections) + 1
    builder.sections.append(type(symtab)(".strings", b"\0" + b"x" * 4_000_000, type=3, size=4_000_000))
    elf = read_elf(builder.bytes())
    names = elf.symbols.all_names()
    end = elf.view.tobytes().index(b"\0", elf.sections[elf.index_strtab].sh_offset + 1)
    last = end - elf.sections[elf.index_strtab].sh_offset
    assert elf.symbols.names_bytes(names) == 1 + sum(last - 1 - i + 1 for i in range(count))


def test_sixty_thousand_sections_without_a_name_ending_are_read(make_module, make_section):
    builder = make_module("tiny")
    symtab = builder.sections.pop()
    builder.sections += [make_section("", b"", ALLOC, name_offset=1) for _ in range(60_000)]
    builder.sections.append(symtab)
    elf = read_elf(builder.bytes())
    assert len(elf.sections) == 60_000 + 7


def test_values_in_errors_are_short_and_printable(make_module):
    with pytest.raises(ImageError) as raised:
        read_elf(b"\n\x1b[m" + bytes(60))
    assert raised.value.value == "\\x0a\\x1b[m"
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (copied.errno, copied.check, copied.value, str(copied)) == (
        "ENOEXEC", "elf: magic", "\\x0a\\x1b[m", str(raised.value)
    )  # fmt: skip
    too_large = pickle.loads(pickle.dumps(ImageTooLarge("the image", 7)))
    assert (too_large.what, too_large.limit_bytes) == ("the image", 7)


def test_pyelftools_reads_the_same(make_module, make_section):
    image = exporting(make_module, make_section, relocated=True).bytes()
    elf, other = read_elf(image), ELFFile(io.BytesIO(image))
    assert [elf.section_name(i).decode() for i in range(len(elf.sections))] == [s.name for s in other.iter_sections()]
    for mine, theirs in zip(elf.sections, other.iter_sections(), strict=True):
        assert (mine.sh_offset, mine.sh_size, mine.sh_flags, mine.sh_addralign) == (
            theirs["sh_offset"], theirs["sh_size"], theirs["sh_flags"], theirs["sh_addralign"]
        )  # fmt: skip
    symbols = other.get_section_by_name(".symtab").iter_symbols()
    undefined = [s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s.name]
    assert [symbol.name for symbol in elf.imports] == undefined
