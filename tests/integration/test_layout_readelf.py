"""Layouts against an independent reading: binutils' readelf, and the kernel's rules as arithmetic.

``make whole-tree`` does so for all modules of the newest Debian kernel for this machine.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from loader_svc.image import LayoutConfig, MemoryType, algorithm_of, plan_layout, read_elf, user_decompress

pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils) on this machine")

AREAS = [t.name for t in MemoryType]


def by_readelf(path, *, kallsyms=True, kallsyms_all=True, module_unload=True):
    """Return the seven unrounded sizes of a module by readelf's dump of its sections and symbols."""
    dump = subprocess.run(
        ["readelf", "-W", "-S", "-s", "-p", ".modinfo", str(path)],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    ).stdout
    dump, _, modinfo = dump.partition("\nString dump of section")  # it may have lines that look like symbols
    sections = []
    for line in re.findall(r"^ +\[ *\d+\] (.*)$", dump, re.M):
        fields = re.match(
            r"(\S*) +([A-Z_0-9<>a-z:]+) +[0-9a-f]{16} [0-9a-f]+ ([0-9a-f]+) [0-9a-f]+ ([A-Za-z ]*?) +(\d+) ", line
        )
        if fields:
            name, kind, size, flags, link = fields.groups()
            sections.append([name, kind, int(size, 16), flags, int(link), int(line.split()[-1])])
    size = dict.fromkeys(AREAS, 0)
    core = set()

    def up(value, alignment):
        return -(-value // max(alignment, 1)) * max(alignment, 1)

    def place(section, area):
        size[area] = up(size[area], section[5]) + section[2]

    for index, section in enumerate(sections):
        name, _, _, flags, _, _ = section
        if "A" not in flags or name in (".modinfo", "__versions"):
            continue
        if name == ".data..percpu":
            core |= {index} if kallsyms_all else set()
            continue
        init = name.startswith(".init") or (name.startswith(".exit") and not module_unload)
        late = name in (".data..ro_after_init", "__jump_table")
        area = "TEXT" if "X" in flags else "RODATA" if "W" not in flags else "DATA"
        area = "RO_AFTER_INIT" if late and area == "DATA" and not init else area
        place(section, f"INIT_{area}" if init else area)
        if not init and (kallsyms_all or "X" in flags):
            core.add(index)
    if not kallsyms:
        return size
    symtab = next(section for section in sections if section[1] == "SYMTAB")
    symbols = re.findall(r"^ +\d+: \S+ +\S+ (\S+) +\S+ +\S+ +(\S+)(?: (\S*))?.*$", dump, re.M)
    livepatch = "livepatch=" in modinfo
    kept = [
        "" if kind == "SECTION" else name
        for index, (kind, where, name) in enumerate(symbols)
        if index == 0 or livepatch or (kind != "SECTION" and name and where.isdigit() and int(where) in core)
    ]
    place(symtab, "INIT_DATA")
    size["DATA"] = up(size["DATA"], symtab[5]) + 25 * len(kept) + sum(len(name.encode()) + 1 for name in kept)
    place(sections[symtab[4]], "INIT_DATA")
    size["INIT_DATA"] = up(size["INIT_DATA"], 8) + 32 + len(symbols)
    return size


def differing(paths):
    wrong = {}
    for path in paths:
        layout = plan_layout(read_elf(path.read_bytes()))
        got, expected = dict(zip(AREAS, layout.unrounded, strict=True)), by_readelf(path)
        if got != expected:
            wrong[path.name] = {area: (expected[area], got[area]) for area in AREAS if got[area] != expected[area]}
    return wrong


def test_golden_modules_agree_with_readelf(golden_modules):
    assert differing(golden_modules) == {}


def test_other_configurations_agree_with_readelf(golden_modules):
    for path in golden_modules[::4]:
        elf = read_elf(path.read_bytes())
        for switches in ({"kallsyms": False}, {"kallsyms_all": False}, {"module_unload": False}):
            layout = plan_layout(elf, LayoutConfig(**switches))
            assert dict(zip(AREAS, layout.unrounded, strict=True)) == by_readelf(path, **switches), (
                path.name,
                switches,
            )


@pytest.mark.slow
@pytest.mark.timeout(900)  # some 20 MB may have to be downloaded first
def test_all_modules_of_a_debian_kernel_agree_with_readelf(debian_kernel):
    modules = modules_of(debian_kernel.root)
    assert len(modules) > 500
    assert [line for line in map(differing_in, modules) if line] == []


def modules_of(root):
    """Return the module files below a directory, plain and packed."""
    return sorted(path for path in root.rglob("*.ko*") if path.suffix in (".ko", ".gz", ".xz", ".zst"))


def differing_in(path):
    """Say in what the layout of a module differs; empty for nothing."""
    if path.suffix == ".ko":
        return "".join(map(str, differing([path]).items()))
    with tempfile.TemporaryDirectory(prefix="readelf-") as directory:
        copy = Path(directory) / path.stem
        content = path.read_bytes()
        copy.write_bytes(b"".join(user_decompress(content, algorithm_of(path.name, content))))
        return "".join(map(str, differing([copy]).items()))


def main(root):
    modules = modules_of(Path(root))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        lines = [line for line in pool.map(differing_in, modules, chunksize=20) if line]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{len(modules) - len(lines)} of {len(modules)} agree\n")
    return bool(lines) or not modules


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
