"""The kernels of Debian's releases, held against what modules of the same image packages say of them.

``identities/`` has those modules' own words, their size of ``struct module`` and the CRCs in their ``__versions``;
what the identities export is from the headers' ``Module.symvers``. Modules with just these words are loaded.
"""

import os
import struct
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loader_svc.steps import CallSpec
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.identity_files import PACKAGED, load_identity
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_5

Module = dict[str, Any]
Load = Callable[..., tuple[str, str, str] | None]
DEBIAN = [name for name in PACKAGED if name.startswith("debian-")]
MODULES = {name: tomllib.loads((Path(__file__).parent / "identities" / f"{name}.toml").read_text()) for name in DEBIAN}
CASES = [pytest.param(release, name, id=f"{release}-{name}") for release in DEBIAN for name in MODULES[release]]

ALLOC, GLOBAL = 2, 1
UNUSED_BYTES = 80
"""Of a struct module behind its state, list head and name (include/linux/module.h, Linux 6.1 and 6.12, x86-64)."""


@pytest.fixture
def load(make_module: Callable[..., Any], make_section: Callable[..., Any], tmp_path: Path) -> Load:
    """A function that loads a module with given words, and returns errno, check and value, or None for success."""

    def load(kernel: str | KernelIdentity, name: str, module: Module) -> tuple[str, str, str] | None:
        versions = b"".join(struct.pack("<Q56s", crc, symbol.encode()) for symbol, crc in module["crcs"].items())
        words = [(tag, value) for tag in ("vermagic", "import_ns") for value in module[tag]]
        builder = make_module(name, make_section("__versions", versions, ALLOC), tags=words)
        (licence,) = module["license"]
        info = builder.section(".modinfo")
        info.data = info.data.replace(b"license=GPL\0", f"license={licence}\0".encode())
        this_module = builder.section(".gnu.linkonce.this_module")
        this_module.data = this_module.data[:UNUSED_BYTES].ljust(module["struct_module_bytes"], b"\0")
        imports = [symbol for symbol in module["crcs"] if symbol != "module_layout"]
        imports += module.get("without_version", [])
        builder.symbols = [("", 1, 0), *((symbol, 0, GLOBAL) for symbol in imports)]
        path = tmp_path / f"{name}.ko"
        path.write_bytes(builder.bytes())
        machine = VirtualMachine(load_identity(kernel) if isinstance(kernel, str) else kernel)
        spec = CallSpec(name, str(path), V6_5, Syscall.FINIT_MODULE)
        ending = machine.call(VirtualCall(spec, VirtualFile(str(path), partial(os.open, path, os.O_RDONLY))))
        return (ending.errno, ending.check, ending.value) if ending.errno else None

    return load


@pytest.mark.parametrize("release", DEBIAN)
def test_the_modules_were_built_for_this_kernel(release: str) -> None:
    identity = load_identity(release)
    for name, module in MODULES[release].items():
        assert module["vermagic"] == [identity.vermagic], name
        assert module["struct_module_bytes"] == identity.this_module_bytes, name
    assert identity.vermagic == f"{identity.release} SMP preempt mod_unload modversions "


@pytest.mark.parametrize(("release", "name"), CASES)
def test_what_a_module_of_the_image_imports_is_there_in_its_version(load: Load, release: str, name: str) -> None:
    module = MODULES[release][name]
    assert len(module["crcs"]) > 3
    assert load(release, name, module) is None


@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_wrong_version_of_any_one_import_is_refused(load: Load, release: str, name: str) -> None:
    module = MODULES[release][name]
    for symbol, crc in list(module["crcs"].items())[::20]:
        changed = {**module, "crcs": {**module["crcs"], symbol: crc ^ 1}}
        expected = ("ENOEXEC", "modversions") if symbol == "module_layout" else ("EINVAL", "symbols: version")
        ending = load(release, name, changed)
        assert ending is not None
        assert ending[:2] == expected, (symbol, ending)


@pytest.mark.parametrize("release", DEBIAN)
def test_an_import_that_nobody_exports_is_unknown(load: Load, release: str) -> None:
    module = {**MODULES[release]["loop"], "without_version": ["modpressure_has_no_such_symbol"]}
    assert load(release, "loop", module) == ("ENOENT", "symbols: unknown", "modpressure_has_no_such_symbol")


@pytest.mark.parametrize("release", DEBIAN)
def test_what_is_for_gpl_or_in_a_namespace_is_so_there(load: Load, release: str) -> None:
    efivarfs = MODULES[release]["efivarfs"]
    ending = load(release, "efivarfs", {**efivarfs, "import_ns": []})
    assert ending is not None
    assert ending[:2] == ("EINVAL", "symbols: namespace")
    ending = load(release, "loop", {**MODULES[release]["loop"], "license": ["Proprietary"]})
    assert ending is not None
    assert ending[:2] == ("ENOENT", "symbols: GPL-only")


@pytest.mark.parametrize(("release", "other"), [DEBIAN, DEBIAN[::-1]])
def test_a_module_of_another_release_is_refused(load: Load, release: str, other: str) -> None:
    identity, module = load_identity(release), MODULES[other]["pcspkr"]
    size_bytes = str(module["struct_module_bytes"])
    assert load(identity, "pcspkr", module) == ("ENOEXEC", "elf: this_module_size", size_bytes)
    same_size = {**module, "struct_module_bytes": identity.this_module_bytes}
    ending = load(identity, "pcspkr", same_size)
    assert ending is not None
    assert ending[:2] == ("ENOEXEC", "modversions")
