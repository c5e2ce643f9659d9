"""The symbols that a module imports: whether each is there, in that version, for this module to use.

Sources: ``simplify_symbols``, ``resolve_symbol``, ``inherit_taint``, ``verify_namespace_is_imported``, ``ref_module``
in kernel/module/main.c, Linux 6.12. The loop goes on after an error, and the last error wins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from sys import intern
from typing import Final

from loader_svc.checks.exports import Exporter, Exporters, Nobody
from loader_svc.checks.versions import Versions
from loader_svc.image import ElfImage, ImageTooLarge
from loader_svc.image.modinfo import text
from loader_svc.image.symbols import STB_WEAK, SYMBOL_BYTES
from loader_svc.steps import Failure
from modpressure.kernel.identity import KernelIdentity

SHN_UNDEF: Final = 0
SHN_LIVEPATCH: Final = 0xFF20
SHN_ABS: Final = 0xFFF1
SHN_COMMON: Final = 0xFFF2

IGNORED: Final = "_GLOBAL_OFFSET_TABLE_"
"""Old assemblers leave it behind, unreferenced (``ignore_undef_symbol``)."""

LTO_PREFIX: Final = "__gnu_lto"
"""Common symbols of this kind are passed over."""

_SYMBOL: Final = struct.Struct("<IBxH16x")


@dataclass(frozen=True, slots=True)
class Want:
    """A symbol that has to come from elsewhere."""

    name: str
    is_weak: bool


Wants = tuple[Want | Failure, ...]
"""What a module imports, in the order of its symbol table; a failure where a symbol can't even be looked for."""


def wants_of(elf: ElfImage) -> Wants:
    """Return what an image imports. ImageTooLarge where overlapping names exceed many times the image."""
    symtab, table = elf.sections[elf.index_symtab], elf.symbols
    count = len(elf.sections)
    entries = elf.view[symtab.sh_offset : symtab.sh_offset + symtab.sh_size - symtab.sh_size % SYMBOL_BYTES]
    foreign = [
        (name, info, section)
        for name, info, section in _SYMBOL.iter_unpack(entries[SYMBOL_BYTES:])
        if section == SHN_UNDEF or section >= count
    ]
    budget_bytes = 4 * elf.image_bytes + 65536
    if table.names_bytes([name for name, _, _ in foreign]) > budget_bytes:
        raise ImageTooLarge("the names of imported symbols", budget_bytes)
    wants: list[Want | Failure] = []
    for offset, info, section in foreign:
        if section in (SHN_ABS, SHN_LIVEPATCH):
            continue
        name = intern(text(table.name(offset)))
        if section == SHN_UNDEF:
            wants.append(Want(name, info >> 4 == STB_WEAK))
        elif section != SHN_COMMON:
            wants.append(Failure("ENOEXEC", "symbols: section", f"{name} in {section}"))
        elif not name.startswith(LTO_PREFIX):
            wants.append(Failure("ENOEXEC", "symbols: common", name))
    return tuple(wants)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the imports of a module came to."""

    failure: Failure | None = None
    uses: tuple[str, ...] = ()
    """The modules that it uses from now on, so that they can't be unloaded."""

    is_proprietary: bool = False
    """Whether it counts as proprietary by now: a module inherits that from one it uses."""

    awaits: str = ""
    """A module whose init function must end before there is an answer."""


class Resolver:
    """Resolves the imports of one module as far as its file tells."""

    __slots__ = ("_failure", "_identity", "_namespaces", "_proprietary", "_versions", "_wants", "foreign")

    def __init__(
        self,
        wants: Wants,
        versions: Versions,
        identity: KernelIdentity,
        namespaces: Iterable[str],
        *,
        proprietary: bool,
    ) -> None:
        """``namespaces`` are those that the module imports, ``proprietary`` what its licence makes it."""
        self._identity = identity
        self._versions = versions
        self._namespaces = frozenset(namespaces)
        self._proprietary = proprietary
        self._wants = wants
        own = identity.symbols or {}
        self.foreign = tuple(want.name for want in wants if isinstance(want, Want) and want.name not in own)
        """What it wants that the kernel is not known to export."""

        self._failure = next((want for want in reversed(wants) if isinstance(want, Failure)), None)

    def resolve(self, others: Exporters, *, given_up: frozenset[str] = frozenset()) -> Resolution:
        """Resolve against the kernel and the modules ``others``.

        ``awaits`` names the first module to wait for that is not in ``given_up``.
        """
        if self._identity.symbols is None:
            return self._resolve_with_unknown_kernel(others, given_up)
        failure: Failure | None = None
        uses: dict[str, None] = {}
        proprietary = self._proprietary
        uses_gpl_only = False
        for want in self._wants:
            if isinstance(want, Failure):
                failure = want
                continue
            found = self._find(want.name, others)
            if found is None or (found.symbol.gpl_only and proprietary):
                if not want.is_weak and want.name != IGNORED:
                    check = "symbols: unknown" if found is None else "symbols: GPL-only"
                    failure = Failure("ENOENT", check, want.name)
                continue
            uses_gpl_only = uses_gpl_only or found.symbol.gpl_only
            if found.is_proprietary:
                if uses_gpl_only:
                    if not want.is_weak:
                        failure = Failure("ENOENT", "symbols: proprietary", want.name)
                    continue
                proprietary = True
            problem = self._versions.failure(want.name, found.symbol.crc) or self._namespace_failure(want.name, found)
            if problem is None and found.is_initialising:
                if found.owner not in given_up:
                    return Resolution(awaits=found.owner)
                problem = Failure("EBUSY", "symbols: owner", f"{want.name} of {found.owner}")
            if problem is not None:
                failure = problem
            elif found.owner:
                uses[found.owner] = None
        return Resolution(failure, tuple(uses), proprietary)

    def _resolve_with_unknown_kernel(self, others: Exporters, given_up: frozenset[str]) -> Resolution:
        """Resolve where the kernel's own symbols are not known.

        What no module in the list exports, the kernel is taken to, and nothing is held against what one exports; but it
        is used from then on, and its init function has to end first.
        """
        if isinstance(others, Nobody):
            return Resolution(self._failure, (), self._proprietary)
        failure = self._failure
        uses: dict[str, None] = {}
        proprietary = self._proprietary
        for name in self.foreign:
            found = others.find(name)
            if found is None:
                continue
            if not found.is_initialising:
                uses[found.owner] = None
                proprietary = proprietary or found.is_proprietary
            elif found.owner not in given_up:
                return Resolution(awaits=found.owner)
            else:
                failure = Failure("EBUSY", "symbols: owner", f"{name} of {found.owner}")
        return Resolution(failure, tuple(uses), proprietary)

    def _find(self, name: str, others: Exporters) -> Exporter | None:
        symbols = self._identity.symbols
        assert symbols is not None
        own = symbols.get(name)
        return Exporter(own, "") if own is not None else others.find(name)

    def _namespace_failure(self, name: str, found: Exporter) -> Failure | None:
        namespace = found.symbol.namespace
        if not namespace or namespace in self._namespaces or self._identity.allow_missing_namespace_imports:
            return None
        return Failure("EINVAL", "symbols: namespace", f"{name} of {namespace}")
