"""Write ``modpressure/identities/debian-*``, the kernels of Debian's releases, from their packages.

    python scripts/extract_identities.py [--packages DIR] [NAME...]

Downloads for each an image package and its headers (some 75 MB and 110 MB, kept in DIR) from the release's own
archive, with apt's client and lists of its own: nothing of the system is changed. From the image come the switches
(``/boot/config-RELEASE``) and the size of ``struct module`` (any module's ``.gnu.linkonce.this_module``, the same in
all of them), from the headers' ``Module.symvers`` what the kernel itself exports; what its modules export comes from
them when they are loaded.

Writes also ``tests/unit/identities/``: what a few of the image's own modules, which import from the kernel alone, say
of the kernel that they were built for. They are the tests' second witness, not read from ``Module.symvers``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "catalogue")]

from kernel_packages import KernelPackages, unpack  # noqa: E402
from module_reader import RealModule, shared_facts  # noqa: E402

from modpressure.identity_files import identity_from, save_identity  # noqa: E402

FOLDER = ROOT / "modpressure" / "identities"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
EVERY_NTH_MODULE = 100
WITNESSES = ROOT / "tests" / "unit" / "identities"
WITNESS_MODULES = ("minix", "loop", "squashfs", "pcspkr", "efivarfs", "binfmt_misc", "pvpanic")


@dataclass(frozen=True)
class Source:
    """Where an identity is from: a release of Debian, and the kernel of it."""

    suite: str
    image: str


SOURCES = {
    "debian-12": Source("bookworm", "linux-image-6.1.0-56-amd64-unsigned"),
    "debian-13": Source("trixie", "linux-image-6.12.118+deb13-amd64-unsigned"),
}


def main() -> None:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path.home() / ".cache" / "modpressure-packages")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"{', '.join(SOURCES)}; by default all of them")
    arguments = parser.parse_args()
    for name in arguments.names or SOURCES:
        if name not in SOURCES:
            raise SystemExit(f"there is no source for {name!r}, only for {', '.join(SOURCES)}")
        source = SOURCES[name]
        options = apt_options(source.suite, arguments.packages.absolute() / "apt" / source.suite)
        write(name, unpack(source.image, arguments.packages, options))


def apt_options(suite: str, folder: Path) -> list[str]:
    """Make package lists of one release below ``folder``, and return the options that have apt read only those."""
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    archives = {"Debian": suite, "Debian-Security": f"{suite}-security"}
    lines = [
        f"deb [signed-by={KEYRING}] {uri} {archives[label]} main\n" for label, uri in mirrors() if label in archives
    ]
    sources.write_text("".join(lines))
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": folder / "cache",
    }
    options = [f"--option={key}={value}" for key, value in settings.items()]
    subprocess.run(["apt-get", *options, "update"], check=True)
    return options


def mirrors() -> list[tuple[str, str]]:
    """Find where this system has Debian's packages from: label and address of each archive."""
    wanted = ["--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    done = subprocess.run(["apt-get", "indextargets", *wanted], check=True, capture_output=True, text=True)
    found = sorted({(label, uri) for label, _, uri in (line.partition(" ") for line in done.stdout.splitlines())})
    if not found:
        raise SystemExit("apt knows no archive of Debian's here (apt-get update)")
    return found


def write(name: str, kernel: KernelPackages) -> None:
    """Write the two texts of an identity."""
    made = identity_from(kernel.config_file, kernel.symvers_file, release=kernel.release, name=name)
    symbols = dict(sorted((made.symbols or {}).items()))
    identity = replace(made, this_module_bytes=struct_module_bytes(kernel), symbols=symbols)
    path = FOLDER / f"{name}.toml"
    save_identity(identity, path)
    _, _, facts = path.read_text().partition("\n")  # behind the heading that every identity has
    headers = kernel.image.replace("-image-", "-headers-").removesuffix("-unsigned")
    path.write_text(
        f"# The kernel of {kernel.origin},\n"
        f"# and what it exports itself, by {headers} {kernel.version}.\n"
        f"# Made by: python scripts/extract_identities.py {name}\n"
        f'origins = ["{kernel.origin}", "{headers} {kernel.version}"]\n{facts}'
    )
    heading = f"# What modules of {kernel.origin} say.\n# Made by: python scripts/extract_identities.py {name}\n"
    WITNESSES.mkdir(exist_ok=True)
    (WITNESSES / path.name).write_text(heading + "".join(witness(kernel, each) for each in WITNESS_MODULES))
    print(f"{name}: {kernel.release}, {len(symbols)} symbols, struct module of {identity.this_module_bytes} bytes")


def struct_module_bytes(kernel: KernelPackages) -> int:
    """Return the size that modules of a kernel agree on. SystemExit if they don't."""
    sizes = {shared_facts(module).struct_module_bytes for module in some_modules(kernel)}
    if len(sizes) != 1:
        raise SystemExit(f"modules of {kernel.origin} have a struct module of {sorted(sizes)} bytes")
    return sizes.pop()


def some_modules(kernel: KernelPackages) -> Iterator[RealModule]:
    """Read every hundredth module of a kernel."""
    for name in sorted(kernel.paths)[::EVERY_NTH_MODULE]:
        yield read_module(kernel, name)


def read_module(kernel: KernelPackages, name: str) -> RealModule:
    """Read one module, packed or not."""
    path = kernel.paths[name]
    stored = path.read_bytes()
    return RealModule(name, path.name, kernel.origin, lzma.decompress(stored) if path.suffix == ".xz" else stored)


def witness(kernel: KernelPackages, name: str) -> str:
    """Return a table of TOML: a module's own words, and the CRC that it holds of each symbol (``__versions``)."""
    module = read_module(kernel, name)
    tags = [tag.decode("latin-1").partition("=") for tag in module.contents(".modinfo").split(b"\0")]
    lines = [f"\n[{name}]", f"struct_module_bytes = {len(module.contents('.gnu.linkonce.this_module'))}"]
    lines += [
        f"{key} = {json.dumps([value for tag, _, value in tags if tag == key])}"
        for key in ("license", "vermagic", "import_ns")
    ]
    versions = sorted(
        (symbol.rstrip(b"\0").decode("ascii"), crc)
        for crc, symbol in struct.iter_unpack("<Q56s", module.contents("__versions"))
    )
    lines += [f"\n[{name}.crcs]", *(f"{symbol} = {crc:#010x}" for symbol, crc in versions)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
