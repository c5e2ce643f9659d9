"""The tree built from the catalogue, judged by what is not ours (binutils, kmod, xz) and by the simulated kernel."""

import io
import lzma
import multiprocessing
import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import zstandard
from elftools.elf.elffile import ELFFile

from loader_svc.catalogue import CatalogueError, catalogue_identity, catalogue_modules, catalogue_tree
from loader_svc.catalogue import build as build_module
from loader_svc.image import describe
from loader_svc.steps import CallSpec
from loader_svc.trees import open_tree
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.kernel.identity_text import parse_identity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_5
from modpressure.kernel.symvers import parse_symvers

VARIANTS = ("plain", "xz", "zst")
AREAS = ("text", "data", "rodata", "ro_after_init", "init_text", "init_data", "init_rodata")

needs_kmod = pytest.mark.skipif(
    shutil.which("depmod") is None, reason="no depmod (Debian package kmod) on this machine"
)
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils) on this machine")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("catalogue-cache")


@pytest.fixture(scope="module", params=VARIANTS)
def tree(request, cache):
    """The variant's name and its tree."""
    return request.param, catalogue_tree(request.param, cache)


@pytest.fixture(scope="module")
def plain(cache):
    return catalogue_tree("plain", cache)


def run(*command, **more):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", **more)


def layout_by_arithmetic(image: bytes) -> tuple[int, ...]:
    """The seven sizes, unrounded, from pyelftools' reading and section 1 of the kernel's rules."""
    elf = ELFFile(io.BytesIO(image))
    size, stays = dict.fromkeys(AREAS, 0), set()

    def place(area, length, align):
        size[area] = -(-size[area] // max(align, 1)) * max(align, 1) + length

    for index, section in enumerate(elf.iter_sections()):
        flags = section["sh_flags"]
        if not flags & 2 or section.name in (".modinfo", "__versions"):
            continue
        if section.name == ".data..percpu":
            stays.add(index)
            continue
        init = section.name.startswith(".init")
        if not init:
            stays.add(index)
        area = "text" if flags & 4 else "data" if flags & 1 else "rodata"
        if not init and section.name in ("__jump_table", ".data..ro_after_init"):
            area = "ro_after_init"
        place("init_" + area if init else area, section["sh_size"], section["sh_addralign"])
    symtab = elf.get_section_by_name(".symtab")
    strtab = elf.get_section(symtab["sh_link"])
    names = [b""]
    strings = strtab.data()
    for symbol in symtab.iter_symbols():
        at = symbol["st_name"]
        if at and symbol["st_shndx"] in stays:
            names.append(strings[at : strings.index(b"\0", at)])
    place("init_data", symtab["sh_size"], symtab["sh_addralign"])
    place("data", 25 * len(names) + sum(len(name) + 1 for name in names), symtab["sh_addralign"])
    place("init_data", strtab["sh_size"], strtab["sh_addralign"])
    place("init_data", 32 + symtab["sh_size"] // 24, 8)
    return tuple(size.values())


def test_layouts_and_lengths_are_those_of_the_real_modules(plain):
    """The figures in the facts were taken from the real files by the extraction, with code of its own."""
    wrong = {}
    for name, facts in catalogue_modules().items():
        image = (plain / facts.path).read_bytes()
        if (found := layout_by_arithmetic(image)) != facts.layout_bytes or len(image) != facts.plain_bytes:
            wrong[name] = (found, facts.layout_bytes, len(image), facts.plain_bytes)
    assert wrong == {}


def test_our_own_reader_agrees(tree):
    _, root = tree
    wrong = {}
    for name, facts in catalogue_modules().items():
        (path,) = root.glob(facts.path + "*")
        found = describe(path)
        if found.problem or found.name != name or found.layout.unrounded != facts.layout_bytes:
            wrong[name] = (found.problem, found.name, found.layout)
    assert wrong == {}


@pytest.mark.parametrize("variant", ["xz", "zst"])
def test_compressed_lengths_are_within_5_percent_of_the_real_ones(cache, variant):
    root = catalogue_tree(variant, cache)
    far = {}
    for name, facts in catalogue_modules().items():
        real = facts.xz_bytes if variant == "xz" else facts.zst_bytes
        ratio = (root / f"{facts.path}.{variant}").stat().st_size / real
        if not 0.95 <= ratio <= 1.05:
            far[name] = round(ratio, 3)
    assert far == {}


def test_compressed_files_hold_the_plain_ones(cache, plain):
    for facts in list(catalogue_modules().values())[::9]:
        image = (plain / facts.path).read_bytes()
        packed = (catalogue_tree("xz", cache) / f"{facts.path}.xz").read_bytes()
        assert packed[6:8] == bytes((0, lzma.CHECK_CRC32))  # stream flags, the only check that the kernel knows
        assert lzma.decompress(packed) == image
        packed = (catalogue_tree("zst", cache) / f"{facts.path}.zst").read_bytes()
        assert zstandard.ZstdDecompressor().decompress(packed) == image


@needs_readelf
def test_readelf_has_nothing_to_complain_about(plain):
    complaints = {}
    for facts in catalogue_modules().values():
        done = run("readelf", "-a", "-W", plain / facts.path)
        if done.returncode or done.stderr:
            complaints[facts.name] = done.stderr[:300]
    assert complaints == {}


@needs_kmod
def test_indexes_are_what_depmod_writes(tree, tmp_path):
    _, root = tree
    copy = tmp_path / "lib" / "modules" / root.name
    shutil.copytree(root, copy)
    for file in (*copy.glob("modules.*.bin"), *(copy / f"modules.{n}" for n in ("dep", "alias", "softdep", "symbols"))):
        file.unlink()
    done = run("depmod", "-b", tmp_path, root.name)
    assert (done.returncode, done.stderr) == (0, "")
    for file in sorted(copy.glob("modules.*")):
        ours, depmods = (root / file.name).read_bytes(), file.read_bytes()
        if file.name == "modules.symbols":  # in the order of a hash table
            ours, depmods = (sorted(text.splitlines()) for text in (ours, depmods))
        assert ours == depmods, file.name
    assert {file.name for file in root.glob("modules.*")} == {file.name for file in copy.glob("modules.*")}


@needs_kmod
def test_modprobe_and_our_resolver_agree_on_every_module(plain, tmp_path):
    root = plain
    base, ours = root.parents[2], open_tree(root, modprobe_dirs=[], cache_dir=tmp_path / "cache")
    (tmp_path / "none").mkdir()
    kmod = ("modprobe", "-d", base, "-S", root.name, "-C", tmp_path / "none")
    names = sorted(catalogue_modules())
    assert sorted(ours.names()) == names
    different = {}
    for name in names:
        done = run(*kmod, "--show-depends", name)
        assert (done.returncode, done.stderr) == (0, ""), name
        paths = [line.split()[1] for line in done.stdout.splitlines()]
        expected = [str(root / line.split()[1]) for line in ours.show_depends(name)]
        if [os.path.realpath(path) for path in paths] != [os.path.realpath(path) for path in expected]:
            different[name] = (paths, expected)
    assert different == {}


@needs_kmod
def test_a_cpu_asks_for_the_modules_of_the_model(plain):
    alias = "cpu:type:x86,ven0002fam000Fmod006B:feature:,0081,0089,0093,0094,0099,00A8,00C2,0125,0128"
    done = run("modprobe", "-d", plain.parents[2], "-S", plain.name, "--resolve-alias", alias)
    found = done.stdout.split()
    for name in ("aesni_intel", "sha1_ssse3", "sha256_ssse3", "ghash_clmulni_intel", "polyval_clmulni", "crc32_pclmul"):
        assert name in found
    assert found.index("aesni_intel") < found.index("sha1_ssse3") < found.index("ghash_clmulni_intel")


@needs_kmod
def test_modinfo_reads_what_the_facts_say(plain):
    for name in ("cryptd", "xfs", "virtio_net", "kvm", "t10_pi"):
        facts = catalogue_modules()[name]
        for key, expected in (
            ("name", name),
            ("license", "\n".join(facts.values("license"))),
            ("vermagic", catalogue_identity().vermagic),
            ("depends", ",".join(facts.depends)),
            ("alias", "\n".join(facts.aliases)),
            ("signer", "Build time autogenerated kernel key"),
        ):
            done = run("modinfo", "-F", key, plain / facts.path)
            assert done.stdout.rstrip("\n") == expected.rstrip("\n"), (name, key)


def test_all_modules_load_under_the_catalogues_kernel(tree):
    variant, root = tree
    identity = catalogue_identity()
    machine, seen, ends = VirtualMachine(identity), set(), {}
    for line in (root / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        for file in [*reversed(needed.split()), path]:
            if file in seen:
                continue
            seen.add(file)
            name = Path(file).name.partition(".")[0].replace("-", "_")
            spec = CallSpec(name, file, V6_5, Syscall.FINIT_MODULE, 0 if variant == "plain" else 4)
            ending = machine.call(VirtualCall(spec, VirtualFile(file, partial(os.open, root / file, os.O_RDONLY))))
            if ending.errno:
                ends[name] = (ending.errno, ending.check, ending.value)
    assert ends == {}
    assert machine.counters.modcount == len(catalogue_modules())


def test_identity_is_beside_the_tree_and_says_what_the_modules_say(plain):
    base = plain.parents[2]
    text = (base / "identity.toml").read_text()
    tomllib.loads(text)
    identity, symvers = parse_identity(text)
    with (base / symvers).open() as lines:
        symbols = parse_symvers(lines)
    assert (identity.release, identity.vermagic) == (plain.name, catalogue_identity().vermagic)
    assert symbols == catalogue_identity().symbols
    with (base / symvers).open() as lines:
        assert "cryptd_alloc_aead" in parse_symvers(lines, where="kernel/crypto/cryptd")


def test_a_tree_is_built_once_and_found_again(cache, plain):
    before = (plain / "modules.dep").stat().st_mtime_ns
    assert catalogue_tree("plain", cache) == plain
    assert (plain / "modules.dep").stat().st_mtime_ns == before


def test_two_builds_are_equal(plain, tmp_path):
    again = catalogue_tree("plain", tmp_path)
    assert again != plain
    files = [path.relative_to(plain) for path in sorted(plain.rglob("*")) if path.is_file()]
    assert files == [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    assert [path for path in files if (plain / path).read_bytes() != (again / path).read_bytes()] == []


def test_many_processes_at_once_get_one_whole_tree(tmp_path):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        roots = list(pool.map(catalogue_tree, ["zst"] * 4, [tmp_path] * 4))
    assert len(set(roots)) == 1
    assert len(list(roots[0].rglob("*.ko.zst"))) == len(catalogue_modules())
    left = [path.name for path in (tmp_path / "catalogue").iterdir() if not path.name.endswith(".lock")]
    assert left == [roots[0].parents[2].name]


def test_a_build_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    def no_space(tree):
        raise OSError(28, "No space left on device", str(tree))

    monkeypatch.setattr(build_module, "write_indexes", no_space)
    with pytest.raises(CatalogueError, match="No space left on device"):
        catalogue_tree("plain", tmp_path)
    assert [path.name for path in (tmp_path / "catalogue").iterdir() if not path.name.endswith(".lock")] == []
    monkeypatch.undo()
    assert catalogue_tree("plain", tmp_path).is_dir()


def test_a_process_killed_while_building_blocks_nobody(tmp_path):
    """The lock dies with its holder, and what it left behind is not taken for a tree."""
    script = (
        "import os, signal, sys; from pathlib import Path; import loader_svc.catalogue.build as b\n"
        "b.write_indexes = lambda tree: os.kill(os.getpid(), signal.SIGKILL)\n"
        "b.catalogue_tree('plain', Path(sys.argv[1]))\n"
    )
    assert run(sys.executable, "-c", script, tmp_path).returncode == -9
    assert not list(tmp_path.glob("catalogue/[!.]*"))
    root = catalogue_tree("plain", tmp_path)
    assert (root / "modules.dep").is_file()


def test_bad_wishes_get_one_sentence(tmp_path):
    with pytest.raises(CatalogueError, match=r"no variant 'gz'; it has plain, xz, zst$"):
        catalogue_tree("gz", tmp_path)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(CatalogueError, match=str(in_the_way)):
        catalogue_tree("plain", in_the_way)
