"""The kernel that modules are loaded into, as far as loading goes: what it was built with, and what it exports.

The switches are those of section "what in the configuration matters" of kernel/module/ (Linux 6.12): each one changes a
check, a layout or an errno. Nothing else of a kernel's configuration is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple


class ExportedSymbol(NamedTuple):
    """A symbol that modules can link to."""

    crc: int | None
    """Its version; None from a kernel or module built without symbol versions."""

    gpl_only: bool = False
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class KernelIdentity:
    """What a kernel is, to a module. The defaults are permissive: any well-formed module is taken."""

    name: str = "any"

    release: str = ""
    """As ``uname -r`` prints it; empty where any will do."""

    vermagic: str | None = None
    """What a module's ``vermagic=`` has to be; None accepts any. Where ``release`` is empty this has no first word."""

    kallsyms: bool = True
    kallsyms_all: bool = True
    module_unload: bool = True
    strict_module_rwx: bool = True
    modversions: bool = True
    module_force_load: bool = True
    module_force_unload: bool = True
    allow_missing_namespace_imports: bool = False
    livepatch: bool = True
    module_sig: bool = True
    module_sig_force: bool = False
    smp: bool = True
    merges_autoloads: bool = False
    """MODULE_DEBUG_AUTOLOAD_DUPS: equal requests of the kernel itself share one modprobe."""

    trust_signatures: bool = True
    """Whether a well-formed signature is taken for one by a key that the kernel knows; no key is at hand to check."""

    decompressors: tuple[str, ...] = ("gzip", "xz", "zstd")
    """What finit_module with flag 4 unpacks. A real kernel has one, or none."""

    blacklist: frozenset[str] = frozenset()
    """``module_blacklist=`` of the kernel's command line: names as in the modules."""

    page_bytes: int = 4096

    this_module_bytes: int | None = None
    """Size of struct module, which follows from the configuration; None accepts any."""

    percpu_reserve_bytes: int = 8192
    """Room for the static per-CPU variables of all modules (PERCPU_MODULE_RESERVE, include/linux/percpu.h)."""

    symbols: Mapping[str, ExportedSymbol] | None = field(default=None, repr=False)
    """What the kernel itself exports, without its modules; None lets every import resolve."""

    def decompressor_for(self, algorithm: str | None) -> str | None:
        """Return what unpacks a file that looks packed with ``algorithm`` (None: not packed); None if nothing does.

        A kernel with one decompressor hands it whatever it is given. One with several, which there is not, takes the
        one that fits.
        """
        if algorithm in self.decompressors:
            return algorithm
        return self.decompressors[0] if self.decompressors else None


ANY: Final = KernelIdentity()
"""Takes every well-formed module, whatever kernel it was built for."""
