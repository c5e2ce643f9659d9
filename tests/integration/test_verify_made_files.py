"""Files made from the measured ones, each with the fault that its case names, and what the rules say comes of it."""

import csv
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from loader_svc.init_results import InitResults
from loader_svc.steps import CallSpec, Ending
from loader_svc.verify import Agreement, verify_failures
from loader_svc.verify.agreement import DELTA_COLUMNS, errno_number
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.identity_files import load_identity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_4

Edit = Callable[[bytearray], None]

SHT_NOBITS, SHT_SYMTAB = 8, 2


def put(fields: str, at: int, *values: int) -> Edit:
    return lambda image: struct.pack_into(fields, image, at, *values)


def section(image: bytes, wanted: int | bytes) -> int:
    """Return where a section's header is: the first of a type, or of a name."""
    table, count, names = *struct.unpack_from("<Q", image, 40), *struct.unpack_from("<HH", image, 60)
    strings = struct.unpack_from("<Q", image, table + 64 * names + 24)[0]
    for header in range(table, table + 64 * count, 64):
        name, kind = struct.unpack_from("<II", image, header)
        start = strings + name
        if wanted in (kind, image[start : image.index(b"\0", start)]):
            return header
    raise AssertionError(wanted)


def of_section(wanted: int | bytes, offset: int, value: int) -> Edit:
    return lambda image: struct.pack_into("<Q", image, section(image, wanted) + offset, value)


def symbol_section(index: int, value: int) -> Edit:
    def edit(image: bytearray) -> None:
        start, size = struct.unpack_from("<QQ", image, section(image, SHT_SYMTAB) + 24)
        struct.pack_into("<H", image, start + 24 * index % size + 6, value)

    return edit


def replaced(old: bytes, new: bytes) -> Edit:
    def edit(image: bytearray) -> None:
        assert old in image
        image[:] = image.replace(old, new)

    return edit


BECOMING, LOAD, LIVE = "becoming", "load", "live"


def of_header(wanted: int | bytes, offset: int, value: int) -> Edit:
    return lambda image: struct.pack_into("<I", image, section(image, wanted) + offset, value)


def second(name: bytes) -> Edit:
    """Give a section that nothing needs the name of another one."""

    def edit(image: bytearray) -> None:
        image[(at := section(image, b".comment")) : at + 4] = image[(it := section(image, name)) : it + 4]

    return edit


def second_symtab(image: bytearray) -> None:
    at = section(image, b".comment")
    struct.pack_into("<I", image, at + 4, SHT_SYMTAB)
    struct.pack_into("<I", image, at + 40, 1)


def unterminated_names(image: bytearray) -> None:
    header = section(image, b".shstrtab")
    start, size = struct.unpack_from("<QQ", image, header + 24)
    image[start + size - 1] = ord("x")


NAMES, MODULE = b".shstrtab", b".gnu.linkonce.this_module"

MADE: list[tuple[str, str, tuple[Edit, ...], str, str, str]] = [
    # name, made from, edits, errno, where, the check that says so; roughly in the order of the checks
    ("magic", "minix", (put("<I", 0, 0x46CC457F),), "ENOEXEC", BECOMING, "elf: magic"),
    ("shnum0", "minix", (put("<H", 60, 0),), "ENOEXEC", BECOMING, "elf: e_shstrndx"),
    ("shnum_high", "minix", (put("<H", 60, 0xFFFF),), "ENOEXEC", BECOMING, "elf: e_shoff"),
    ("shoff_wraps", "minix", (put("<Q", 40, 2**64 - 64),), "ENOEXEC", BECOMING, "elf: e_shoff"),
    ("shstrndx0", "minix", (put("<H", 62, 0),), "ENOEXEC", BECOMING, "elf: e_shstrndx"),
    ("shstrndx_high", "minix", (put("<H", 62, 999),), "ENOEXEC", BECOMING, "elf: e_shstrndx"),
    ("names_out", "minix", (of_section(NAMES, 24, 1 << 40),), "ENOEXEC", BECOMING, "elf: shstrtab_range"),
    ("names_empty", "minix", (of_section(NAMES, 32, 0),), "ENOEXEC", BECOMING, "elf: shstrtab_empty"),
    ("names_open", "minix", (unterminated_names,), "ENOEXEC", BECOMING, "elf: shstrtab_nul"),
    ("section0", "minix", (of_header(0, 4, 1),), "ENOEXEC", BECOMING, "elf: section_0"),
    ("section0_size", "minix", (of_section(0, 32, 1),), "ENOEXEC", BECOMING, "elf: section_0"),
    ("no_link", "minix", (of_header(SHT_SYMTAB, 40, 0),), "ENOEXEC", BECOMING, "elf: sh_link"),
    ("link_high", "minix", (of_header(SHT_SYMTAB, 40, 55),), "ENOEXEC", BECOMING, "elf: sh_link"),
    ("range", "minix", (of_section(b".text", 24, 1 << 40),), "ENOEXEC", BECOMING, "elf: section_range"),
    ("range_wraps", "minix", (of_section(b".text", 32, 2**64 - 1),), "ENOEXEC", BECOMING, "elf: section_range"),
    ("unneeded_out", "minix", (of_section(b".comment", 24, 1 << 40),), "ENOEXEC", BECOMING, "elf: section_range"),
    ("nobits_anywhere", "minix", (of_section(b".bss", 24, 1 << 40),), "", LIVE, ""),
    ("name_out", "minix", (of_header(b".text", 0, 1 << 20),), "ENOEXEC", BECOMING, "elf: sh_name"),
    ("two_modinfos", "minix", (second(b".modinfo"),), "ENOEXEC", BECOMING, "elf: modinfo_count"),
    ("two_symtabs", "minix", (second_symtab,), "ENOEXEC", BECOMING, "elf: symtab_count"),
    ("two_modules", "minix", (second(MODULE),), "ENOEXEC", BECOMING, "elf: this_module_count"),
    ("module_nobits", "minix", (of_header(MODULE, 4, SHT_NOBITS),), "ENOEXEC", BECOMING, "elf: this_module_count"),
    ("module_unallocated", "minix", (of_section(MODULE, 8, 1),), "ENOEXEC", BECOMING, "elf: this_module_alloc"),
    ("vermagic_and_blacklist", "orc_exp2", (replaced(b"SMP preempt", b"SMP preempX"),), "EPERM", BECOMING, "blacklist"),
    ("wx_and_vermagic", "minix", (of_section(b".text", 8, 7), replaced(b"SMP preempt", b"SMP preempX")), "ENOEXEC",
     BECOMING, "vermagic"),
    ("wx_unallocated", "minix", (of_section(b".comment", 8, 5),), "ENOEXEC", BECOMING, "wx"),
    ("huge_bss", "minix", (of_section(b".bss", 32, 1600 << 20),), "ENOMEM", BECOMING, "layout: size"),
    ("percpu", "orc_percpu", (of_header(b".data..percpu", 4, SHT_NOBITS), of_section(b".data..percpu", 32, 1 << 16)),
     "ENOMEM", LOAD, "percpu"),
    ("common", "minix", (symbol_section(-1, 0xFFF2),), "ENOEXEC", LOAD, "symbols: common"),
    ("bad_index", "minix", (symbol_section(-1, 0x7777),), "ENOEXEC", LOAD, "symbols: section"),
    ("common_and_unknown", "minix", (symbol_section(1, 0xFFF2), replaced(b"_printk\0", b"_prantk\0")), "ENOENT", LOAD,
     "symbols: unknown"),
    ("dup_export", "orc_exp2", (replaced(b"exported_symbo2", b"exported_symbol"), replaced(b"exp2\0", b"exp3\0")),
     "ENOEXEC", LOAD, "exports: taken"),
    ("renamed", "orc_exp2", (replaced(b"exp2\0", b"exp4\0"),), "", LIVE, ""),
]  # fmt: skip


class Case:
    """Builds a script and the table of what it must come to."""

    def __init__(self, directory: Path, golden: Path) -> None:
        self.directory = directory
        self.golden = golden
        self.lines: list[str] = []
        self.rows: list[dict[str, object]] = []

    def add(self, kernel: str, name: str, content: bytes, flags: int, errno: str, **deltas: int) -> None:
        (self.directory / name).write_bytes(content)
        self.line(kernel, f"finit /t/{name} {flags}", errno, **deltas)

    def line(self, kernel: str, line: str, errno: str, **deltas: int) -> None:
        case = f"case{len(self.lines)}"
        self.lines.append(f"{case} {line}")
        operation, path = line.split()[:2]
        row: dict[str, object] = {"kernel": kernel, "case": case, "op": operation, "path": path}
        row["errno"] = errno_number(errno)
        self.rows.append(row | {column: deltas.get(name, 0) for column, name in DELTA_COLUMNS.items()})

    def verify(self) -> Agreement:
        script, table = self.directory / "made.script", self.directory / "made.csv"
        script.write_text("\n".join(self.lines) + "\n")
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["kernel", "case", "op", "path", "errno", *DELTA_COLUMNS])
            writer.writeheader()
            writer.writerows(self.rows)
        directories = [self.directory, self.golden / "bad-inputs", self.golden / "ko" / "extra"]
        identity = load_identity("measured-6.12")
        return verify_failures(script, table, directories, InitResults(), identity)


@pytest.fixture
def case(tmp_path: Path, shared_dir: Path) -> Case:
    return Case(tmp_path, shared_dir / "data" / "golden")


@pytest.fixture
def good(shared_dir: Path) -> Callable[[str], bytes]:
    return lambda name: (shared_dir / "data" / "golden" / "bad-inputs" / name).read_bytes()


def late(size: int) -> dict[str, int]:
    return {"failed_load_modules": 1, "invalid_mod_bytes": 2 * size}


def early(size: int) -> dict[str, int]:
    return {"failed_becoming": 1, "invalid_becoming_bytes": size}


ORC_EXP = {"modcount": 1, "total_mod_size": 16384, "total_text_size": 4096}
MINIX = {"modcount": 1, "total_mod_size": 69632, "total_text_size": 28672}


@pytest.mark.parametrize("kernel", ["A", "B"])
def test_faults_in_the_image(case: Case, good: Callable[[str], bytes], kernel: str) -> None:
    case.line(kernel, "finit /t/orc_exp.ko", "", **ORC_EXP)
    for name, original, edits, errno, where, _ in MADE:
        image = made(good(f"{original}.ko"), edits)
        live = {"minix": MINIX, "orc_exp2": ORC_EXP}.get(original, {})
        deltas = {BECOMING: early(len(image)), LOAD: late(len(image)), LIVE: live}[where]
        case.add(kernel, f"{name}.ko", image, 0, errno, **deltas)
        if original == "minix" and where == LIVE:
            case.line(kernel, "del minix", "")
    assert case.verify().differences == []


def test_each_fault_names_its_check(good: Callable[[str], bytes], tmp_path: Path, shared_dir: Path) -> None:
    machine = VirtualMachine(load_identity("measured-6.12"))

    def load(path: Path) -> Ending:
        spec = CallSpec(path.stem, str(path), V6_4, Syscall.FINIT_MODULE)
        return machine.call(VirtualCall(spec, VirtualFile(str(path), partial(os.open, path, os.O_RDONLY))))

    assert not load(shared_dir / "data" / "golden" / "ko" / "extra" / "orc_exp.ko").errno
    for name, original, edits, errno, where, check in MADE:
        path = tmp_path / f"{name}.ko"
        path.write_bytes(made(good(f"{original}.ko"), edits))
        ending = load(path)
        assert (ending.errno, ending.outcome.word, ending.check) == (errno, where, check), name
        assert bool(ending.value) == bool(errno), name
        if where == LIVE:
            assert not machine.remove(ending.module)


def made(image: bytes, edits: tuple[Edit, ...]) -> bytes:
    edited = bytearray(image)
    for edit in edits:
        edit(edited)
    return bytes(edited)


def test_faults_in_zstd_streams(case: Case, good: Callable[[str], bytes]) -> None:
    packed = good("minix.ko.zst")
    for length in (4, 8):
        size = {"failed_decompress": 1, "invalid_decompress_bytes": length}
        case.add("A", f"cut{length}.zst", packed[:length], 4, "EINVAL", **size)
    for length in (9, 20, 3000):
        # The header is whole and no block is: an image of no bytes.
        case.add("A", f"cut{length}.zst", packed[:length], 4, "ENOEXEC", **early(length))
    for number, behind in enumerate((bytes(70), packed, b"\x50\x2a\x4d\x18" + bytes(4))):
        case.add("A", f"behind{number}.zst", packed + behind, 4, "", **MINIX)
        case.line("A", "del minix", "")
    skippable = b"\x50\x2a\x4d\x18" + bytes(4) + packed
    size = {"failed_decompress": 1, "invalid_decompress_bytes": len(skippable)}
    case.add("A", "skippable.zst", skippable, 4, "EINVAL", **size)
    assert case.verify().differences == []


def test_faults_in_xz_streams(case: Case, good: Callable[[str], bytes]) -> None:
    packed, image = good("minix.ko.xz"), good("minix.ko")
    middle = len(packed) // 2
    made = {
        "flipped": packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :],
        "zeroed": packed[:middle] + bytes(64) + packed[middle + 64 :],
        "crc64": lzma.compress(image, check=lzma.CHECK_CRC64),
        "delta": lzma.compress(
            image, check=lzma.CHECK_CRC32, filters=[{"id": lzma.FILTER_DELTA}, {"id": lzma.FILTER_LZMA2}]
        ),
        **{f"cut{length}": packed[:length] for length in (5, 12, 24, 9000, len(packed) - 12)},
    }
    for name, content in made.items():
        size = {"failed_decompress": 1, "invalid_decompress_bytes": len(content)}
        case.add("A-xz", f"{name}.xz", content, 4, "EINVAL", **size)
    x86 = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    for name, content in {
        "nocheck": lzma.compress(image, check=lzma.CHECK_NONE),
        "x86": lzma.compress(image, check=lzma.CHECK_CRC32, filters=x86),
        "twice": packed + packed,
    }.items():
        case.add("A-xz", f"{name}.xz", content, 4, "", **MINIX)
        case.line("A-xz", "del minix", "")
    wrong = lzma.compress(good("wrong_vermagic.ko"), check=lzma.CHECK_CRC32)
    case.add("A-xz", "wrong.xz", wrong, 4, "ENOEXEC", **early(len(image) + len(wrong)))
    assert case.verify().differences == []


def test_faults_in_gzip_streams(case: Case, good: Callable[[str], bytes]) -> None:
    packed, image = good("minix.ko.gz"), good("minix.ko")
    for name, content in {
        "zeros": packed + bytes(70),
        "rubbish": packed + b"rubbish" * 10,
        "members": packed + packed,
        "unnamed": gzip.compress(image),
        "trailerless": packed[:-8],
    }.items():
        case.add("A-gzip", f"{name}.gz", content, 4, "", **MINIX)
        case.line("A-gzip", "del minix", "")
    for name, content in {
        "cut": packed[:-9],
        "endless_name": packed[:10] + b"x" * 99,
        "method": packed[:2] + b"\7" + packed[3:],
        "commented": b"\x1f\x8b\x08\x10" + bytes(6) + b"a comment\0" + packed[10:],
    }.items():
        size = {"failed_decompress": 1, "invalid_decompress_bytes": len(content)}
        case.add("A-gzip", f"{name}.gz", content, 4, "EINVAL", **size)
    assert case.verify().differences == []


@pytest.mark.parametrize("switch", ["modules_disabled", "disable"])
def test_parameters_descriptors_and_what_is_switched_off(case: Case, switch: str) -> None:
    slow = late(7560)
    for parameters, errno in (
        ("ms=abc", "EINVAL"),
        ("ms=", "EINVAL"),
        ("ms", "EINVAL"),
        ("ms=4294967296", "ERANGE"),
        ("ms=99999999999999999999x", "ERANGE"),
        ("ms=abc ms=4294967296", "ERANGE"),
    ):
        case.line("A", f"finit /t/orc_slow.ko 0 {parameters}", errno, **slow)
    live = {"modcount": 1, "total_mod_size": 20480, "total_text_size": 8192}
    for parameters in ("-- ms=abc", "orc_slow.ms=abc", "dyndbg=+p", "async_probe", '"ms=0"', 'ms="0"'):
        case.line("A", f"finit /t/orc_slow.ko 0 {parameters}", "", **live)
        case.line("A", "del orc_slow", "")
    case.line("A", "del orc_slow", "ENOENT")
    case.line("A", "finit_wronly /t/minix.ko", "EBADF")
    case.line("A", "finit_rdwr /t/minix.ko", "ETXTBSY", failed_kreads=1)
    case.line("A", "finit_rdwr /t/empty", "ETXTBSY", failed_kreads=1)
    case.line("A", "finit_nocap /t/minix.ko 8", "EPERM")
    case.line("A", "finit_badfd /t/minix.ko 8", "EINVAL")
    case.line("A", "init /t/empty", "ENOEXEC", failed_kreads=1)
    case.line("A", "init_huge /t/minix.ko", "ENOMEM", failed_kreads=1, invalid_kread_bytes=1 << 40)
    case.line("A", "finit /t/minix.ko 3", "", **(MINIX | {"total_mod_size": 73728}))
    case.lines.append(f"off {switch} x")
    case.line("A", "del minix", "EPERM")
    case.line("A", "init_len0 /t/minix.ko", "EPERM")
    assert case.verify().differences == []


def test_a_file_too_large_to_take_on_does_not_end_the_script(case: Case, good: Callable[[str], bytes]) -> None:
    image = bytearray(good("minix.ko"))
    of_section(b".bss", 32, 1100 << 20)(image)
    case.add("A", "large.ko", bytes(image), 0, "ENOMEM", **early(len(image)))
    case.line("A", "finit /t/minix.ko", "", **MINIX)
    agreement = case.verify()
    assert (agreement.agreed, agreement.total) == (1, 2)
    assert "image limit" in agreement.differences[0]
