"""The validity check against measured calls on broken files, and against another reader on good ones."""

import csv
import io
import shutil
import subprocess

import pytest
from elftools.elf.elffile import ELFFile

from loader_svc.image import ImageError, describe, plan_layout, read_elf, strip_signature

EXPECTED = {
    "b63": "elf: len",
    "b64": "elf: e_shoff",
    "onebyte": "elf: len",
    "half.ko": "elf: e_shoff",
    "minus1.ko": "elf: e_shoff",
    "random": "elf: magic",
    "busybox.elf": "elf: e_type",
    "et_dyn.ko": "elf: e_type",
    "wrong_machine.ko": "elf: e_machine",
    "bad_shentsize.ko": "elf: e_shentsize",
    "shoff_eq_len.ko": "elf: e_shoff",
    "no_symtab.ko": "elf: symtab_count",
    "no_this_module.ko": "elf: this_module_count",
    "this_module_wrong_size.ko": "elf: this_module_size",
    "wx_section.ko": "wx",
    "minix.ko.zst": "elf: magic",
    "minix.ko.xz": "elf: magic",
}
"""Where each file is refused; what was measured is that it is, with ENOEXEC."""
SIGNATURE_TAGS = {"sig_id", "signer", "sig_key", "sig_hashalgo", "signature"}
"""What modinfo shows of a signature as if they were tags."""
CHECKED_LATER = {"bad_modlayout_crc.ko", "wrong_vermagic.ko", "bad_reloc.ko"}


@pytest.fixture(scope="module")
def inputs(shared_dir):
    return shared_dir / "data" / "golden" / "bad-inputs"


@pytest.fixture(scope="module")
def calls(shared_dir, inputs):
    """The measured calls of whole files without flag 4, whose file is at hand and not empty."""
    with (shared_dir / "data" / "golden" / "failures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["file"] = inputs / row["path"].removeprefix("/t/")
    return [
        row
        for row in rows
        if row["op"] in ("finit", "init") and row["flags"] == "0" and row["file"].is_file() and row["file_bytes"] != "0"
    ]


def test_files_that_a_kernel_refuses_are_refused_and_the_check_is_named(calls, inputs):
    size = read_elf((inputs / "minix.ko").read_bytes()).this_module_bytes
    seen = set()
    for row in calls:
        name = row["file"].name
        image = row["file"].read_bytes()
        try:
            layout = plan_layout(read_elf(image, this_module_bytes=size))
        except ImageError as error:
            assert (row["errno_name"], error.errno, row["d_failed_becoming"]) == ("ENOEXEC", "ENOEXEC", "1"), name
            assert error.check == EXPECTED[name], name
            seen.add(name)
        else:
            assert row["errno_name"] != "ENOEXEC" or name in CHECKED_LATER, name
            if row["errno_name"] == "OK":
                assert row["d_total_mod_size"] == str(layout.total_bytes), name
                assert row["d_total_text_size"] == str(layout.text_bytes), name
    assert seen == {name for name in EXPECTED if any(row["file"].name == name for row in calls)}
    assert len(seen) > 10


def test_names_that_differ_are_told_apart(inputs):
    facts = describe(inputs / "modinfo_name_differs.ko")
    assert (facts.name, facts.info_name) == ("minix", "minux")
    facts = describe(inputs / "no_name_tag.ko")
    assert (facts.name, facts.info_name) == ("minix", "minix")
    assert describe(inputs / "no_vermagic_tag.ko").vermagic is None
    assert describe(inputs / "no_modinfo_section.ko").modinfo == ()


def test_pyelftools_sees_the_same_sections_and_symbols(golden_modules):
    for path in golden_modules[::5]:
        image = path.read_bytes()
        elf, other = read_elf(image), ELFFile(io.BytesIO(image))
        assert [(elf.section_name(i).decode(), *s[1:6]) for i, s in enumerate(elf.sections)] == [
            (s.name, elf.sections[i].sh_type, s["sh_flags"], s["sh_addr"], s["sh_offset"], s["sh_size"])
            for i, s in enumerate(other.iter_sections())
        ], path.name
        undefined = [
            (s.name, s["st_info"]["bind"].removeprefix("STB_").lower())
            for s in other.get_section_by_name(".symtab").iter_symbols()
            if s["st_shndx"] == "SHN_UNDEF" and s.name
        ]
        assert [(symbol.name, symbol.binding) for symbol in elf.imports] == undefined, path.name


def test_exports_are_those_that_the_symbol_table_names(golden_modules, boot_tree):
    exporting = 0
    for path in [*golden_modules, *sorted(boot_tree.rglob("*.ko"))][::4]:
        image = path.read_bytes()
        exports = read_elf(image).exports
        names = {
            s.name.removeprefix("__ksymtab_")
            for s in ELFFile(io.BytesIO(image)).get_section_by_name(".symtab").iter_symbols()
            if s.name.startswith("__ksymtab_")
        }
        assert {export.name for export in exports} == names, path.name
        exporting += bool(names)
    assert exporting > 20


def test_the_crcs_of_exports_are_those_that_importers_were_built_against(boot_tree):
    exports, imports = {}, {}
    for path in boot_tree.rglob("*.ko"):
        elf = read_elf(path.read_bytes())
        exports |= {export.name: export.crc for export in elf.exports}
        imports |= {symbol.name: symbol.crc for symbol in elf.imports}
    shared = exports.keys() & imports.keys()
    assert len(shared) > 300
    assert {name: exports[name] for name in shared} == {name: imports[name] for name in shared}


def test_modinfo_agrees_with_kmod(golden_modules):
    if shutil.which("modinfo") is None:
        pytest.skip("no modinfo (kmod) on this machine")
    for path in golden_modules[::10]:
        said = subprocess.run(["modinfo", "-0", str(path)], capture_output=True, check=True).stdout
        lines = [line.decode("utf-8", "backslashreplace") for line in said.split(b"\0") if line]
        pairs = [line.split("=", 1) for line in lines if not line.startswith(("filename:", "parm:"))]
        expected = sorted((tag, value.strip()) for tag, value in pairs if tag not in SIGNATURE_TAGS)
        image = path.read_bytes()
        verdict = strip_signature(image)[1]
        assert (verdict.kind == "unknown key") == (["sig_id", "PKCS#7"] in pairs), path.name
        elf = read_elf(image)
        tags = elf.modinfo.tags.items()
        pairs = [(tag, value.strip()) for tag, values in tags for value in values if tag not in ("parm", "parmtype")]
        assert sorted(pairs) == expected, path.name
        versions = subprocess.run(
            ["modprobe", "--dump-modversions", str(path)], capture_output=True, text=True, check=True
        ).stdout
        dumped = [line.split() for line in versions.splitlines()]
        assert {name: int(crc, 16) for crc, name in dumped} == elf.versions, path.name
