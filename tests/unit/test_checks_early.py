"""Signature policy, blacklist, versions, vermagic, livepatch: each one's errno, and which comes first."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loader_svc.checks.early import early_failure, signature_failure
from loader_svc.image import ElfImage, SignatureVerdict, read_elf
from modpressure.kernel.identity import ANY, ExportedSymbol, KernelIdentity

MAGIC = "6.12.1 SMP preempt mod_unload modversions "
KERNEL = replace(
    ANY, release="6.12.1", vermagic=MAGIC, module_force_load=False, symbols={"module_layout": ExportedSymbol(0x1234)}
)

Make = Callable[..., Any]


@pytest.fixture
def image(make_module: Make, make_section: Make) -> Callable[..., ElfImage]:
    def make(*tags: tuple[str, str], layout_crc: int | None = 0x1234) -> ElfImage:
        extra = []
        if layout_crc is not None:
            extra.append(make_section("__versions", struct.pack("<Q56s", layout_crc, b"module_layout"), 2))
        return read_elf(make_module("tiny", *extra, tags=tags).bytes())

    return make


def errno_and_check(elf: ElfImage, identity: KernelIdentity, flags: int = 0) -> tuple[str, str] | None:
    failure = early_failure(elf, identity, flags)
    return failure and (failure.errno, failure.check)


def test_a_module_for_this_kernel_passes(image: Make) -> None:
    assert early_failure(image(("vermagic", MAGIC)), KERNEL, 0) is None


def test_the_permissive_kernel_takes_anything(image: Make) -> None:
    for elf in (image(), image(layout_crc=None), image(("vermagic", "x"), ("livepatch", "Y"), layout_crc=7)):
        assert early_failure(elf, ANY, 0) is None


@pytest.mark.parametrize(
    ("tags", "crc", "flags", "changes", "expected"),
    [
        # One after the other each check's own reason is taken away, and the next one speaks.
        ([("vermagic", "bad"), ("livepatch", "Y")], 1, 0, {"blacklist": frozenset({"tiny"})}, ("EPERM", "blacklist")),
        ([("vermagic", "bad"), ("livepatch", "Y")], 1, 0, {}, ("ENOEXEC", "modversions")),
        ([("vermagic", "bad"), ("livepatch", "Y")], 0x1234, 0, {}, ("ENOEXEC", "vermagic")),
        ([("vermagic", MAGIC), ("livepatch", "Y")], 0x1234, 0, {"livepatch": False}, ("ENOEXEC", "livepatch")),
        ([("vermagic", MAGIC), ("livepatch", "Y")], 0x1234, 0, {}, None),
        # The release counts only where there are no versions.
        ([("vermagic", MAGIC.replace("6.12.1", "5.0"))], 0x1234, 0, {}, None),
        ([("vermagic", MAGIC.replace("6.12.1", "5.0"))], None, 0, {"modversions": False}, ("ENOEXEC", "vermagic")),
        ([("vermagic", MAGIC)], None, 0, {"modversions": False}, None),
        ([("vermagic", MAGIC.rstrip())], 0x1234, 0, {}, ("ENOEXEC", "vermagic")),
        # Without versions, or with flag 1, only force helps.
        ([("vermagic", MAGIC)], None, 0, {}, ("ENOEXEC", "modversions")),
        ([("vermagic", MAGIC)], None, 0, {"module_force_load": True}, None),
        ([("vermagic", MAGIC)], 1, 1, {}, ("ENOEXEC", "modversions")),
        ([("vermagic", MAGIC)], 1, 1, {"module_force_load": True}, None),
        # Without vermagic, or with flag 2, likewise.
        ([], 0x1234, 0, {}, ("ENOEXEC", "vermagic")),
        ([], 0x1234, 0, {"module_force_load": True}, None),
        ([("vermagic", "bad")], 0x1234, 2, {}, ("ENOEXEC", "vermagic")),
        ([("vermagic", "bad")], 0x1234, 2, {"module_force_load": True}, None),
    ],
)
def test_the_first_check_that_fails_decides(
    image: Make,
    tags: list[tuple[str, str]],
    crc: int | None,
    flags: int,
    changes: dict[str, Any],
    expected: tuple[str, str] | None,
) -> None:
    assert errno_and_check(image(*tags, layout_crc=crc), replace(KERNEL, **changes), flags) == expected


def test_the_value_that_offended_is_named(image: Make) -> None:
    failure = early_failure(image(("vermagic", "2.4.0 SMP "), layout_crc=0x1234), KERNEL, 0)
    assert failure is not None
    assert failure.value == "2.4.0 SMP "


def test_an_identity_without_release_compares_all_but_the_release(image: Make) -> None:
    rest = "SMP preempt mod_unload modversions "
    strict = replace(ANY, vermagic=rest, module_force_load=False)
    assert early_failure(image(("vermagic", f"6.1.0-37-amd64 {rest}")), strict, 0) is None
    assert errno_and_check(image(("vermagic", "6.1.0-37-amd64 SMP ")), strict) == ("ENOEXEC", "vermagic")


def test_the_blacklist_goes_by_modinfos_name(make_module: Make) -> None:
    builder = make_module("tiny")
    builder.section(".modinfo").data = b"license=GPL\0name=other\0"
    elf = read_elf(builder.bytes())
    kernel = replace(ANY, blacklist=frozenset({"other"}))
    assert errno_and_check(elf, kernel) == ("EPERM", "blacklist")
    assert early_failure(elf, replace(ANY, blacklist=frozenset({"tiny"})), 0) is None


@pytest.mark.parametrize(
    ("verdict", "forced", "trusted", "errno"),
    [
        (SignatureVerdict("unsigned"), False, True, None),
        (SignatureVerdict("unsigned"), True, True, "EKEYREJECTED"),
        (SignatureVerdict("unknown key"), True, True, None),
        (SignatureVerdict("unknown key"), True, False, "EKEYREJECTED"),
        (SignatureVerdict("unsupported"), True, True, "EKEYREJECTED"),
        (SignatureVerdict("malformed", "EBADMSG", "signature: length", "1"), False, True, "EBADMSG"),
    ],
)
def test_signatures_matter_where_they_are_required(
    verdict: SignatureVerdict, forced: bool, trusted: bool, errno: str | None
) -> None:
    failure = signature_failure(verdict, replace(ANY, module_sig_force=forced, trust_signatures=trusted))
    assert (failure and failure.errno) == errno
