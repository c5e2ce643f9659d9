"""The catalogue's texts: what they say, and that nothing gets lost between text and facts."""

import hashlib
import importlib.util
import lzma
from pathlib import Path

import pytest

from loader_svc.catalogue import CatalogueError, catalogue_identity, catalogue_modules
from loader_svc.catalogue.facts_text import FactsError, parse_kernel, parse_module, render_kernel, render_module
from loader_svc.catalogue.packed import Catalogue, catalogue

ROOT = Path(__file__).resolve().parents[2]
FACTS = ROOT / "loader_svc" / "catalogue" / "facts"

# Per CPU, of the published tables, of the storms: the modules that the measurements and models are about.
# fmt: off
NAMED = [
    "cryptd", "crypto_simd", "aesni_intel", "sha1_generic", "sha1_ssse3", "sha256_ssse3", "sha512_generic",
    "sha512_ssse3", "ghash_clmulni_intel", "polyval_generic", "polyval_clmulni", "crc32c_intel", "crc32_pclmul",
    "crct10dif_common", "crct10dif_pclmul", "irqbypass", "kvm", "kvm_amd", "kvm_intel", "edac_mce_amd",
    "amd64_edac", "powernow_k8", "intel_uncore", "intel_cstate", "rapl", "skx_edac", "isst_if_common",
    "isst_if_mbox_msr", "intel_uncore_frequency", "intel_rapl_common", "evdev", "serio_raw", "nvme",
    "nvme_core", "t10_pi", "crc64", "crc64_rocksoft", "virtio", "virtio_ring", "virtio_pci",
    "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "xfs", "libcrc32c", "sg", "minix", "romfs", "qnx4",
    "qnx6", "efs", "bfs", "omfs", "sysv", "hfs", "adfs",
]
# fmt: on


def test_every_module_that_is_talked_about_is_there():
    assert set(NAMED) - set(catalogue_modules()) == set()


def test_modules_are_parsed_when_asked_for():
    fresh = Catalogue(packed_text())
    assert fresh._parsed == {}
    assert fresh["cryptd"].path == "kernel/crypto/cryptd.ko"
    assert set(fresh._parsed) == {"cryptd"}
    with pytest.raises(KeyError):
        fresh["no_such_module"]


@pytest.mark.parametrize("path", sorted(FACTS.glob("*.txt")), ids=lambda path: path.stem)
def test_text_and_facts_say_the_same(path):
    text = path.read_text(encoding="ascii")
    if path.stem == "kernel":
        assert render_kernel(parse_kernel(text)) == text
    else:
        assert render_module(parse_module(text)) == text
        assert parse_module(text).name == path.stem


def test_what_is_installed_is_what_the_repository_holds():
    texts = [FACTS / "kernel.txt", *sorted(path for path in FACTS.glob("*.txt") if path.stem != "kernel")]
    assert packed_text() == "".join(path.read_text(encoding="ascii") for path in texts), "run python hatch_build.py"


def test_packing_the_same_texts_gives_the_same_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    digests = set()
    for name in ("one", "two"):
        folder = tmp_path / name / "loader_svc" / "catalogue" / "facts"
        folder.mkdir(parents=True)
        for file in ("kernel", "b", "a") if name == "one" else ("a", "b", "kernel"):
            (folder / f"{file}.txt").write_text(f"module {file}\n")
        packed = build.pack_catalogue(tmp_path / name)
        assert lzma.decompress(packed.read_bytes()) == b"module kernel\nmodule a\nmodule b\n"
        digests.add(hashlib.sha256(packed.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_every_import_has_somebody_who_gives_it():
    modules = catalogue_modules()
    given = {
        export.name for facts in modules.values() for export in facts.exports
    } | catalogue_identity().symbols.keys()
    wanted = {(facts.name, symbol.name) for facts in modules.values() for symbol in facts.imports if symbol.versioned}
    assert len(wanted) > 10_000
    assert {pair for pair in wanted if pair[1] not in given} == set()


def test_no_symbol_is_given_twice():
    kernel = set(catalogue_identity().symbols)
    owners: dict[str, str] = {}
    for facts in catalogue_modules().values():
        for export in facts.exports:
            assert export.name not in kernel, f"{export.name} of {facts.name} is the kernel's too"
            assert owners.setdefault(export.name, facts.name) == facts.name
    assert owners["cryptd_alloc_aead"] == "cryptd"


def test_depends_names_the_modules_that_give_what_is_wanted():
    modules = catalogue_modules()
    owners = {export.name: facts.name for facts in modules.values() for export in facts.exports}
    for facts in modules.values():
        needed = {owners[wanted.name] for wanted in facts.imports if wanted.name in owners} - {facts.name}
        assert {name.replace("-", "_") for name in facts.depends} == needed, facts.name


def test_release_is_as_long_as_that_of_the_kernel_the_facts_are_from():
    identity = catalogue_identity()
    assert identity.release.endswith("-modpressure")
    assert len(identity.release) == len(catalogue().kernel.release)
    assert identity.vermagic == f"{identity.release} SMP preempt mod_unload modversions "


@pytest.mark.parametrize(
    "text",
    ["", "module x\n", "module x\nlengths 1 2\nlayout 0\nfill 0 0\n", "module x\nlengths a b c\n"],
)
def test_a_text_that_is_none_is_refused_in_one_sentence(text):
    with pytest.raises(FactsError) as caught:
        parse_module(text)
    assert "\n" not in str(caught.value)


def test_a_damaged_catalogue_is_an_error_of_ours():
    with pytest.raises(CatalogueError, match="kernel"):
        Catalogue("nonsense")
    text = packed_text().replace("\nlengths ", "\nlengths x", 1)
    damaged = Catalogue(text)
    with pytest.raises(CatalogueError, match="can't be read"):
        for name in damaged:
            damaged[name]


def packed_text() -> str:
    return lzma.decompress((FACTS.parent / "catalogue.txt.xz").read_bytes()).decode("ascii")
