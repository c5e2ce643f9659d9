import pytest

from loader_svc.image import ImageError, LayoutConfig, MemoryType, plan_layout, read_elf

WRITE, ALLOC, EXEC, RO_AFTER_INIT = 1, 2, 4, 0x200000
NULL, NOBITS = 0, 8
T = MemoryType
THIS_MODULE_BYTES = 896
PLAIN = LayoutConfig(kallsyms=False)


def sizes(builder, config=PLAIN):
    return dict(zip(T, plan_layout(read_elf(builder.bytes()), config).unrounded, strict=True))


@pytest.fixture
def module(make_module, make_section):
    """A function that returns a module with extra sections of (name, size, flags[, more])."""

    def make(*sections, tags=(), **more):
        extra = [make_section(name, bytes(size), flags, **more) for name, size, flags in sections]
        return make_module("tiny", *extra, tags=tags)

    return make


def test_sections_go_by_their_flags_and_the_start_of_their_names(module):
    got = sizes(
        module(
            (".text.hot", 7, ALLOC | EXEC),
            (".rodata", 100, ALLOC),
            (".data", 50, ALLOC | WRITE),
            (".data..ro_after_init", 30, ALLOC | WRITE),
            (".init.text", 11, ALLOC | EXEC),
            (".init.data", 12, ALLOC | WRITE),
            (".init.rodata", 13, ALLOC),
            (".comment", 1000, 0),
        )
    )
    assert got == {
        T.TEXT: 32 + 7, T.DATA: THIS_MODULE_BYTES + 50, T.RODATA: 100, T.RO_AFTER_INIT: 30,
        T.INIT_TEXT: 11, T.INIT_DATA: 12, T.INIT_RODATA: 13,
    }  # fmt: skip


def test_modinfo_and_versions_are_never_placed_unless_versions_are_ignored(module):
    builder = module(("__versions", 64, ALLOC))
    assert sizes(builder)[T.RODATA] == 0
    assert sizes(builder, LayoutConfig(kallsyms=False, ignore_modversions=True))[T.RODATA] == 64


def test_a_jump_table_is_read_only_after_init(module):
    assert sizes(module(("__jump_table", 48, ALLOC | WRITE)))[T.RO_AFTER_INIT] == 48
    assert sizes(module(("__jump_table", 48, ALLOC)))[T.RODATA] == 48  # pass 2 comes first


def test_only_the_first_section_of_a_name_is_special(module):
    got = sizes(module(("__jump_table", 48, ALLOC | WRITE), ("__jump_table", 24, ALLOC | WRITE)))
    assert (got[T.RO_AFTER_INIT], got[T.DATA]) == (48, THIS_MODULE_BYTES + 24)


def test_the_private_flag_set_in_a_file_counts(module):
    got = sizes(module((".data.x", 8, ALLOC | WRITE | RO_AFTER_INIT), (".init.x", 4, ALLOC | WRITE | RO_AFTER_INIT)))
    assert (got[T.RO_AFTER_INIT], got[T.INIT_DATA]) == (8, 4)


def test_percpu_data_are_reserved_elsewhere(module):
    builder = module((".data..percpu", 5600, ALLOC | WRITE), align=8192)
    layout = plan_layout(read_elf(builder.bytes()), PLAIN)
    assert layout.unrounded[T.DATA] == THIS_MODULE_BYTES
    assert (layout.percpu_bytes, layout.percpu_align_bytes) == (5600, 4096)
    assert plan_layout(read_elf(module().bytes()), PLAIN).percpu_bytes == 0


def test_exit_sections_are_init_only_where_modules_cannot_be_unloaded(module):
    builder = module((".exit.text", 9, ALLOC | EXEC))
    assert sizes(builder)[T.TEXT] == 32 + 9
    got = sizes(builder, LayoutConfig(kallsyms=False, module_unload=False))
    assert (got[T.TEXT], got[T.INIT_TEXT]) == (32, 9)


def test_alignment_counts_for_empty_sections_and_for_nobits(module, make_section):
    builder = module((".rodata", 10, ALLOC), (".rodata.empty", 0, ALLOC))
    builder.section(".rodata.empty").align = 64
    builder.section(".rodata").align = 0
    assert sizes(builder)[T.RODATA] == 64
    builder = module((".data", 1, ALLOC | WRITE), (".bss", 0, ALLOC | WRITE))
    bss = builder.section(".bss")
    bss.type, bss.size, bss.align = NOBITS, 5000, 32
    elf = read_elf(builder.bytes())
    layout = plan_layout(elf, PLAIN)
    assert layout.unrounded[T.DATA] == 928 + 5000
    index = builder.index(".bss")
    placement = next(p for p in layout.placements if p.section == index)
    assert placement == (index, T.DATA, 928, elf.sections[index].sh_offset, 5000, True)


def test_writable_code_is_refused_allocated_or_not(module):
    for flags in (WRITE | EXEC | ALLOC, WRITE | EXEC):
        elf = read_elf(module((".evil", 1, flags)).bytes())
        with pytest.raises(ImageError) as raised:
            plan_layout(elf)
        assert (raised.value.errno, raised.value.check, raised.value.value) == ("ENOEXEC", "wx", ".evil")
        plan_layout(elf, LayoutConfig(strict_rwx=False))


def test_kallsyms_adds_core_symbols_to_data_and_all_symbols_to_init_data(module):
    builder = module((".init.text", 4, ALLOC | EXEC), (".data", 4, ALLOC | WRITE), (".note", 4, 0))
    init, data, note = (builder.index(name) for name in (".init.text", ".data", ".note"))
    modinfo = builder.index(".modinfo")
    builder.symbols = [
        ("", 1, 0), ("text", 1, 1), ("data", data, 1), ("gone", init, 0), ("note", note, 0), ("info", modinfo, 0),
        ("undefined", 0, 1), ("absolute", 0xFFF1, 0), ("common", 0xFFF2, 1),
    ]  # fmt: skip
    elf = read_elf(builder.bytes())
    layout = plan_layout(elf)
    strings_bytes = elf.sections[elf.index_strtab].sh_size
    assert layout.core_symbols == 3  # the null symbol, text, data
    assert layout.unrounded[T.DATA] == 904 + 3 * 24 + len("\0text\0data\0") + 3  # 904: 896 + 4, to 8
    assert layout.unrounded[T.INIT_DATA] == -(-(10 * 24 + strings_bytes) // 8) * 8 + 32 + 10
    code_only = plan_layout(elf, LayoutConfig(kallsyms_all=False))
    assert code_only.core_symbols == 2
    assert plan_layout(elf, PLAIN).unrounded[T.INIT_DATA] == 0


def test_percpu_symbols_stay_with_kallsyms_all(module):
    builder = module((".data..percpu", 8, ALLOC | WRITE))
    builder.symbols = [("counter", builder.index(".data..percpu"), 1)]
    elf = read_elf(builder.bytes())
    assert plan_layout(elf).core_symbols == 2
    assert plan_layout(elf, LayoutConfig(kallsyms_all=False)).core_symbols == 1


def test_a_livepatch_keeps_all_symbols(module):
    builder = module(tags=[("livepatch", "Y")])
    elf = read_elf(builder.bytes())
    assert plan_layout(elf).core_symbols == len(elf.symbols) == 4


def test_a_string_table_that_is_also_the_name_table_is_placed_once(module):
    builder = module()
    builder.section(".symtab").link = len(builder.sections) + 2
    layout = plan_layout(read_elf(builder.bytes()))
    assert len({placement.section for placement in layout.placements}) == len(layout.placements)


def test_sizes_are_rounded_one_by_one_and_totals_are_of_rounded_sizes(module):
    builder = module((".init.text", 4097, ALLOC | EXEC), (".rodata", 1, ALLOC))
    layout = plan_layout(read_elf(builder.bytes()), PLAIN)
    assert layout.rounded == (4096, 4096, 4096, 0, 8192, 0, 0)
    assert (layout.core_bytes, layout.init_bytes, layout.total_bytes, layout.text_bytes) == (12288, 8192, 20480, 12288)
    large = plan_layout(read_elf(builder.bytes()), LayoutConfig(kallsyms=False, page_bytes=65536))
    assert large.total_bytes == 4 * 65536


def test_every_placement_can_be_copied_and_none_overlap(module):
    builder = module((".rodata", 100, ALLOC), (".data", 50, ALLOC | WRITE), (".init.data", 12, ALLOC | WRITE), align=16)
    image = builder.bytes()
    layout = plan_layout(read_elf(image))
    ends = {}
    for placement in sorted(layout.placements, key=lambda p: (p.memory_type, p.destination_offset_bytes)):
        assert placement.destination_offset_bytes >= ends.get(placement.memory_type, 0)
        ends[placement.memory_type] = placement.destination_offset_bytes + placement.size_bytes
        assert ends[placement.memory_type] <= layout.rounded[placement.memory_type]
        assert placement.source_offset_bytes + placement.size_bytes <= len(image)


def test_sizes_wrap_around_as_the_kernels_do(module):
    builder = module((".bss", 0, ALLOC | WRITE))
    bss = builder.section(".bss")
    bss.type, bss.size = NOBITS, (1 << 40) + 16
    assert sizes(builder)[T.DATA] == THIS_MODULE_BYTES + 16


@pytest.mark.parametrize(("align", "start"), [(1 << 32, 0), (3, 901), (1 << 63, 0), (10, 902), ((1 << 64) - 1, 1)])
def test_odd_alignments_follow_the_kernels_formula(module, align, start):
    """By hand: ALIGN(901, a) = (901 + a - 1) & ~(a - 1), in unsigned 32-bit arithmetic."""
    builder = module((".data", 5, ALLOC | WRITE), (".bss", 0, ALLOC | WRITE))
    bss = builder.section(".bss")
    bss.type, bss.size, bss.align = NOBITS, 8, align
    layout = plan_layout(read_elf(builder.bytes()), PLAIN)
    assert layout.unrounded[T.DATA] == start + 8


@pytest.mark.parametrize("size", [1520 << 20, (1 << 32) - THIS_MODULE_BYTES - 1])
def test_more_than_the_module_area_or_32_bits_is_no_memory(module, size):
    builder = module((".bss", 0, ALLOC | WRITE))
    bss = builder.section(".bss")
    bss.type, bss.size = NOBITS, size
    with pytest.raises(ImageError, match="ENOMEM") as raised:
        plan_layout(read_elf(builder.bytes()), PLAIN)
    assert raised.value.check == "layout: size"


def test_sections_to_copy_that_wrap_around_or_are_not_there_are_refused(module, make_section):
    builder = module((".bss", 0, ALLOC | WRITE), (".late", 64, ALLOC | WRITE))
    bss = builder.section(".bss")
    bss.type, bss.size = NOBITS, (1 << 32) - THIS_MODULE_BYTES - 32
    with pytest.raises(ImageError) as raised:
        plan_layout(read_elf(builder.bytes()), PLAIN)
    assert (raised.value.errno, raised.value.check) == ("ENOMEM", "layout: size")
    builder = module((".ghost", 0, ALLOC))
    ghost = builder.section(".ghost")
    ghost.type, ghost.offset, ghost.size = NULL, 1 << 40, 64
    builder.sections[builder.index(".ghost") - 1] = ghost
    image = bytearray(builder.bytes())
    with pytest.raises(ImageError) as raised:
        plan_layout(read_elf(patched_offset(image, builder.index(".ghost"), 1 << 40)), PLAIN)
    assert (raised.value.errno, raised.value.check) == ("ENOEXEC", "layout: source")


def patched_offset(image, section, offset):
    table = int.from_bytes(image[40:48], "little")
    at = table + section * 64 + 24
    image[at : at + 8] = offset.to_bytes(8, "little")
    return image
