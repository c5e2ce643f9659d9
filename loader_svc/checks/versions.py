"""Versions of symbols: what a module was built against, compared with what there is (kernel/module/version.c)."""

from __future__ import annotations

from dataclasses import dataclass

from loader_svc.image import ElfImage
from loader_svc.steps import Failure
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_MODVERSIONS


@dataclass(frozen=True, slots=True)
class Versions:
    """A module's ``__versions``, as a kernel uses it."""

    crcs: dict[str, int]
    has_table: bool
    """False without the section, with flag 1, and in a kernel built without MODVERSIONS."""

    matter: bool
    """Whether the kernel is built with MODVERSIONS."""

    may_force: bool
    """Whether a module without versions is loaded all the same (MODULE_FORCE_LOAD)."""

    @classmethod
    def of(cls, elf: ElfImage, identity: KernelIdentity, flags: int) -> Versions:
        """Return the versions of an image; a call with flag 1 makes as if there were none."""
        ignored = bool(flags & MODULE_INIT_IGNORE_MODVERSIONS)
        has_table = identity.modversions and bool(elf.index_versions) and not ignored
        return cls(elf.versions if has_table else {}, has_table, identity.modversions, identity.module_force_load)

    @property
    def of_layout(self) -> int:
        """The version of ``module_layout`` that the module was built with; 0 if it names none."""
        return self.crcs.get("module_layout", 0)

    def failure(self, name: str, crc: int | None) -> Failure | None:
        """Return why a symbol with version ``crc`` is not the one that the module was built with; None if it is."""
        if not self.matter or crc is None:
            return None
        if not self.has_table:
            return None if self.may_force else Failure("EINVAL", "symbols: version", name)
        # No entry for a symbol is the sign of a broken toolchain, and let go.
        wanted = self.crcs.get(name, crc)
        return None if wanted == crc else Failure("EINVAL", "symbols: version", f"{name} {wanted:#010x}")
