"""What modules export: a module's own names need versions and must be free; who else's there are.

Sources: ``check_export_symbol_versions``, ``verify_exported_symbols``, ``find_symbol`` in kernel/module/main.c, Linux
6.12.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from loader_svc.image import ElfImage
from loader_svc.image.symbols import Export
from loader_svc.steps import Failure
from modpressure.kernel.identity import ExportedSymbol, KernelIdentity


class Exporter(NamedTuple):
    """A symbol that a module in the list exports."""

    symbol: ExportedSymbol
    owner: str
    is_initialising: bool = False
    """Whether the owner's init function has not returned yet."""
    is_proprietary: bool = False


class Exporters(Protocol):
    """The modules in the list that are formed, as far as others link to them."""

    def find(self, name: str) -> Exporter | None:
        """Return who exports a symbol, or None."""
        ...


class Nobody:
    """No module that exports anything."""

    def find(self, name: str) -> Exporter | None:
        """Find nothing."""
        return None


def versions_failure(elf: ElfImage, identity: KernelIdentity) -> Failure | None:
    """Look for the versions that a table of exports needs, unless modules are let in by force."""
    if not identity.modversions or identity.module_force_load:
        return None
    for suffix in ("", "_gpl"):
        table = elf.find_section(f"__ksymtab{suffix}".encode())
        if table and elf.sections[table].sh_size and not elf.find_section(f"__kcrctab{suffix}".encode()):
            return Failure("ENOEXEC", "exports: versions", f"__kcrctab{suffix}")
    return None


def taken_failure(exports: Iterable[Export], identity: KernelIdentity, others: Exporters) -> Failure | None:
    """Return why the exports can't be: the first one whose name the kernel or another module exports already."""
    own = identity.symbols or {}
    for export in exports:
        if export.name in own or others.find(export.name):
            return Failure("ENOEXEC", "exports: taken", export.name)
    return None


def as_exported(export: Export) -> ExportedSymbol:
    """Return an export as others link to it."""
    return ExportedSymbol(export.crc, export.gpl_only, export.namespace)
