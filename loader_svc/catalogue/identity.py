"""The kernel that the catalogue's modules are loaded into: release, vermagic, and a CRC for every symbol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from loader_svc.catalogue.module_facts import KernelFacts, ModuleFacts
from modpressure.kernel.identity import ExportedSymbol, KernelIdentity
from modpressure.kernel.identity_text import identity_of_config, render_identity
from modpressure.kernel.symvers import KERNEL

SYMVERS = "Module.symvers"
_OWN = "modpressure"


def release_of(kernel_release: str) -> str:
    """Make a release of our own: ``6.12.117-modpressure`` from ``6.12.117+deb12-amd64``.

    As long as Debian's, by luck, so that vermagic and notes keep their lengths.
    """
    return f"{kernel_release.partition('+')[0].partition('-')[0]}-{_OWN}"


class Identity:
    """What the catalogue's modules are checked against when they are loaded."""

    def __init__(self, kernel: KernelFacts, modules: Mapping[str, ModuleFacts]) -> None:
        self.kernel = kernel
        self._modules = modules
        self.release = release_of(kernel.release)
        """What ``uname -r`` would say."""
        self.vermagic = f"{self.release} {kernel.vermagic} "
        """What ``vermagic=`` of a module must be. With a blank at its end, as a kernel has it."""

    @cached_property
    def _exports(self) -> dict[str, tuple[str, ExportedSymbol]]:
        """All symbols that can be had, and who gives them."""
        found = {s.name: (KERNEL, ExportedSymbol(s.crc, s.gpl_only, s.namespace)) for s in self.kernel.symbols}
        for facts in self._modules.values():
            owner = facts.path.removesuffix(".ko")
            found.update((e.name, (owner, ExportedSymbol(e.crc, e.gpl_only, e.namespace))) for e in facts.exports)
        return found

    def crc(self, symbol: str) -> int:
        """Return the CRC of an exported symbol. KeyError if nobody exports it."""
        return self._exports[symbol][1].crc or 0

    def kernel_identity(self) -> KernelIdentity:
        """Return what the simulation takes. Unlike a real kernel, it unpacks all that the catalogue is packed with."""
        identity = identity_of_config(self.kernel.config, release=self.release, name="catalogue")
        return replace(
            identity,
            vermagic=self.vermagic,
            decompressors=("xz", "zstd", "gzip"),
            this_module_bytes=self.kernel.struct_module_bytes,
            symbols={name: given for name, (owner, given) in self._exports.items() if owner == KERNEL},
        )

    def toml(self) -> str:
        """Return the identity as a text; the symbols are in ``Module.symvers`` beside it."""
        return render_identity(self.kernel_identity(), symvers=SYMVERS)

    def symvers(self) -> str:
        """Return ``Module.symvers``: CRC, symbol, who gives it, how, namespace (Documentation/kbuild/modules.rst)."""
        lines = []
        for name, (owner, given) in sorted(self._exports.items()):
            kind = "EXPORT_SYMBOL_GPL" if given.gpl_only else "EXPORT_SYMBOL"
            lines.append(f"{given.crc or 0:#010x}\t{name}\t{owner}\t{kind}\t{given.namespace}\n")
        return "".join(lines)
