"""Debian's kernels against modules of the very packages that they are from, where these are in the cache."""

import lzma
import os
import struct
import tomllib
from functools import partial
from importlib import resources
from pathlib import Path

import platformdirs
import pytest

from loader_svc.image import describe
from loader_svc.steps import CallSpec
from loader_svc.trees import open_tree
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.identity_files import load_identity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_5

EVERY_NTH = 100


@pytest.fixture(scope="module", params=["debian-12", "debian-13"])
def kernel(request, tmp_path_factory):
    """An identity, and the tree of the package that it is from."""
    text = (resources.files("modpressure.identities") / f"{request.param}.toml").read_text()
    package, version = tomllib.loads(text)["origins"][0].split()
    told = os.environ.get("MODPRESSURE_CACHE_DIR")
    cache = Path(told) if told else platformdirs.user_cache_path("modpressure")
    roots = list(cache.glob(f"debian/{package}_{version}/lib/modules/*"))
    if not roots:
        pytest.skip(f"{package} {version} is not in the cache (modpressure modules fetch-debian PACKAGE puts it there)")
    return load_identity(request.param), open_tree(
        roots[0], modprobe_dirs=[], cache_dir=tmp_path_factory.mktemp(request.param)
    )


def load(machine, name, path, flags=0):
    spec = CallSpec(name, str(path), V6_5, Syscall.FINIT_MODULE, flags)
    ending = machine.call(VirtualCall(spec, VirtualFile(str(path), partial(os.open, path, os.O_RDONLY))))
    return (ending.errno, ending.check, ending.value) if ending.errno else None


def test_modules_load_with_what_they_need(kernel):
    """Every hundredth, with all its dependencies: decompressed by the kernel itself where it can."""
    identity, tree = kernel
    machine, ends = VirtualMachine(identity), {}
    for name in tree.names()[::EVERY_NTH]:
        for each in [*reversed(tree.depends(name)), name]:
            if each not in ends:
                file = tree.root / tree.module(each).path
                ends[each] = load(machine, each, file, 4 if file.suffix == ".xz" else 0)
    assert {name: end for name, end in ends.items() if end} == {}
    assert machine.counters.modcount == len(ends) > 40


def test_a_changed_import_is_refused(kernel, tmp_path):
    identity, tree = kernel
    file = tree.root / tree.module("minix").path
    image = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    changed = tmp_path / "minix.ko"
    changed.write_bytes(image)
    assert load(VirtualMachine(identity), "minix", changed) is None
    tried = 0
    for symbol in sorted({each.name for each in describe(file).imports} & identity.symbols.keys()):
        entry = struct.pack("<Q56s", identity.symbols[symbol].crc, symbol.encode())
        assert image.count(entry) == 1, symbol
        wrong = struct.pack("<Q56s", identity.symbols[symbol].crc ^ 1, symbol.encode())
        changed.write_bytes(image.replace(entry, wrong))
        errno, check, value = load(VirtualMachine(identity), "minix", changed)
        assert (errno, check, value.split()[0]) == ("EINVAL", "symbols: version", symbol)
        old, new = f"\0{symbol}\0".encode(), f"\0{'?' * len(symbol)}\0".encode()
        if image.count(old) == 2:  # in __versions, and behind it among the strings, not as the end of a longer one
            changed.write_bytes(new.join(image.rsplit(old, 1)))
            errno, check, value = load(VirtualMachine(identity), "minix", changed)
            # The value may be another symbol's name, which is the end of this one's string.
            assert (errno, check, set(value)) == ("ENOENT", "symbols: unknown", {"?"})
            tried += 1
    assert tried > 10
