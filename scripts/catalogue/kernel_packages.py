"""Debian's kernel packages, unpacked: modules, their order, what is built in, and what the kernel exports."""

from __future__ import annotations

import lzma
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from module_reader import RealModule

from loader_svc.catalogue.module_facts import KernelSymbol, ModuleFacts
from loader_svc.catalogue.packing import pack

CONFIG = (  # what modpressure/kernel/identity_text.py looks at
    "KALLSYMS",
    "KALLSYMS_ALL",
    "LIVEPATCH",
    "MODULES",
    "MODULE_ALLOW_MISSING_NAMESPACE_IMPORTS",
    "MODULE_COMPRESS_XZ",
    "MODULE_DECOMPRESS",
    "MODULE_FORCE_LOAD",
    "MODULE_SIG",
    "MODULE_SIG_FORCE",
    "MODULE_UNLOAD",
    "MODVERSIONS",
    "PREEMPT_BUILD",
    "SMP",
    "STRICT_MODULE_RWX",
)


@dataclass(frozen=True)
class KernelPackages:
    """An image package and the headers that belong to it, unpacked below ``root``."""

    image: str
    version: str
    root: Path

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.image} {self.version}"

    @cached_property
    def release(self) -> str:
        """What ``uname -r`` prints under this kernel."""
        return self.modules.name

    @property
    def modules(self) -> Path:
        """Directory of the module tree: below /usr from Debian 13 on."""
        return next(path for top in ("lib", "usr/lib") for path in (self.root / top / "modules").glob("*"))

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Module files by the module's name."""
        files = self.modules.glob("kernel/**/*.ko*")
        return {path.name.partition(".ko")[0].replace("-", "_"): path for path in files}

    @cached_property
    def order(self) -> list[str]:
        """Lines of ``modules.order``."""
        return (self.modules / "modules.order").read_text().splitlines()

    @cached_property
    def builtin(self) -> list[str]:
        """Lines of ``modules.builtin``."""
        return (self.modules / "modules.builtin").read_text().splitlines()

    @property
    def symvers_file(self) -> Path:
        """What the kernel and its modules export, from the headers."""
        return next((self.root / "usr/src").glob("linux-headers-*/Module.symvers"))

    @property
    def config_file(self) -> Path:
        """The whole configuration."""
        return self.root / "boot" / f"config-{self.release}"

    @cached_property
    def symvers(self) -> dict[str, tuple[str, KernelSymbol]]:
        """For each exported symbol who has it (``vmlinux`` or a module's name), and the symbol."""
        found = {}
        for line in self.symvers_file.read_text().splitlines():
            crc, name, owner, kind, *namespace = line.split("\t")
            symbol = KernelSymbol(name, int(crc, 16), kind == "EXPORT_SYMBOL_GPL", (namespace or [""])[0])
            found[name] = (owner.rpartition("/")[2].replace("-", "_"), symbol)
        return found

    def config(self) -> Iterator[str]:
        """Read the configuration as far as loading modules looks at it."""
        text = self.config_file.read_text().splitlines()
        for option in CONFIG:
            value = next((line.partition("=")[2] for line in text if line.startswith(f"CONFIG_{option}=")), "n")
            yield f"CONFIG_{option}={value}"

    @cache  # noqa: B019
    def read(self, name: str) -> tuple[RealModule, ModuleFacts]:
        """Read a module's file and its facts. Lengths that no file shows are measured by packing as a build does."""
        file = self.paths[name]
        stored = file.read_bytes()
        image = lzma.decompress(stored) if file.suffix == ".xz" else stored
        path = str(file.relative_to(self.modules)).partition(".ko")[0] + ".ko"
        module = RealModule(name, path, self.origin, image)
        xz_bytes = len(stored) if file.suffix == ".xz" else len(pack_xz(image))
        return module, module.facts(xz_bytes, len(pack(image, "zst")))


def pack_xz(image: bytes) -> bytes:
    """As a kernel's build does (scripts/Makefile.modinst, 6.12): ``xz --check=crc32 --lzma2=dict=1MiB``."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]
    return lzma.compress(image, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


def unpack(image: str, directory: Path, apt_options: Sequence[str] = ()) -> KernelPackages:
    """Download an image package and its headers with apt's own client, unless they are there, and unpack them."""
    headers = image.replace("linux-image-", "linux-headers-").removesuffix("-unsigned")
    directory.mkdir(parents=True, exist_ok=True)
    files = {}
    for package in (image, headers):
        if not list(directory.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", *apt_options, "download", package], cwd=directory, check=True)
        (files[package],) = directory.glob(f"{package}_*.deb")
    root = directory / image
    if not root.exists():
        for package, file in files.items():
            subprocess.run(["dpkg-deb", "-x", file, directory / f"{image}.part"], check=True)
            print(f"unpacked {package}")
        (directory / f"{image}.part").rename(root)
    version = subprocess.run(
        ["dpkg-deb", "-f", files[image], "Version"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return KernelPackages(image, version, root)
