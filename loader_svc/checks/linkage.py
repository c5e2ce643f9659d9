"""What happens to a module between its place in the list and its init function, in the kernel's order.

Source: ``load_module`` after ``add_unformed_module`` in kernel/module/main.c, Linux 6.12. What the file alone decides
is found out once, by ``Linkage.of``; what depends on the modules that are live, and on the call, with every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loader_svc.checks import exports, relocations
from loader_svc.checks.exports import Exporters
from loader_svc.checks.licence import is_proprietary
from loader_svc.checks.parameters import parameters_failure
from loader_svc.checks.symbols import Resolution, Resolver, wants_of
from loader_svc.checks.versions import Versions
from loader_svc.image import ElfImage, Layout
from loader_svc.image.modinfo import Parameter
from loader_svc.image.symbols import Export
from loader_svc.steps import CallSpec, Failure
from modpressure.kernel.identity import ExportedSymbol, KernelIdentity
from modpressure.kernel.links import Formation

PERCPU_UNIT_BYTES: Final = 32 << 10
"""Largest per-CPU allocation (PCPU_MIN_UNIT_SIZE)."""

STATIC_CALL_SITE_BYTES: Final = 8
"""``struct static_call_site`` (include/linux/static_call_types.h, Linux 6.12): two offsets of 32 bits."""

OWNER_PATIENCE_SECONDS: Final = 30
"""How long a module waits for one that it needs and that is still initialising (``resolve_symbol_wait``)."""


@dataclass(frozen=True, slots=True)
class Linkage:
    """What a module brings to, and needs from, the others."""

    identity: KernelIdentity
    percpu_bytes: int
    percpu_align_bytes: int
    exports: tuple[Export, ...]
    parameters: tuple[Parameter, ...]
    resolver: Resolver
    versions_failure: Failure | None
    relocations_failure: Failure | None
    can_be_unloaded: bool
    """False for a module with an init function and no exit function."""

    exported: Mapping[str, ExportedSymbol]
    """The exports as others link to them, by name."""

    imports: int = 0
    """How many symbols it imports."""

    symbols: int = 0
    """How many symbols its own table has."""

    relocations: int = 0
    """How many relocations are applied to it."""

    static_calls: int = 0
    """How many calls in its code the kernel makes direct ones (``.static_call_sites``)."""

    @classmethod
    def of(cls, elf: ElfImage, layout: Layout, identity: KernelIdentity, flags: int) -> Linkage:
        """Find out what an image that could be laid out says. ImageTooLarge where names overlap without end."""
        versions = Versions.of(elf, identity, flags)
        wants = wants_of(elf)
        resolver = Resolver(wants, versions, identity, elf.import_ns, proprietary=is_proprietary(elf))
        names = bytes(elf.section_data(elf.index_strtab))
        return cls(
            identity,
            layout.percpu_bytes if elf.index_percpu else 0,
            layout.percpu_align_bytes,
            elf.exports,
            elf.parameters,
            resolver,
            exports.versions_failure(elf, identity),
            relocations.relocations_failure(elf, identity, flags),
            b"\0init_module\0" not in names or b"cleanup_module\0" in names,
            {export.name: exports.as_exported(export) for export in elf.exports},
            len(wants),
            len(elf.symbols),
            relocations.count(elf, identity, flags),
            elf.sections[elf.find_section(b".static_call_sites")].sh_size // STATIC_CALL_SITE_BYTES,
        )

    def formation(self, resolution: Resolution) -> Formation:
        """Return what the module, its imports resolved, is to the others once it is formed."""
        return Formation(
            self.exported,
            resolution.uses,
            resolution.is_proprietary,
            not self.can_be_unloaded,
            self.percpu_bytes,
        )

    @property
    def foreign(self) -> tuple[str, ...]:
        """The symbols that it wants and that the kernel is not known to export."""
        return self.resolver.foreign

    def percpu_failure(self, taken_bytes: int) -> Failure | None:
        """Return why there is no per-CPU memory for the module, where others have taken ``taken_bytes``."""
        size_bytes, align_bytes, reserve_bytes = (
            self.percpu_bytes,
            self.percpu_align_bytes,
            self.identity.percpu_reserve_bytes,
        )
        if not size_bytes:
            return None
        too_large = size_bytes > PERCPU_UNIT_BYTES or taken_bytes + size_bytes > reserve_bytes
        if not self.identity.smp or too_large or align_bytes & (align_bytes - 1):
            return Failure("ENOMEM", "percpu", str(size_bytes))
        return None

    def resolve(self, others: Exporters, given_up: frozenset[str] = frozenset()) -> Resolution:
        """Resolve the imports against the kernel and the modules ``others``."""
        return self.resolver.resolve(others, given_up=given_up)

    def failure_before_symbols(self, percpu_taken_bytes: int = 0) -> Failure | None:
        """Return what fails before the imports are resolved: per-CPU room, versions of the exports."""
        return self.percpu_failure(percpu_taken_bytes) or self.versions_failure

    def failure_before_forming(self, spec: CallSpec, others: Exporters) -> Failure | None:
        """Return what fails once the imports are resolved: relocations, arguments, exports."""
        if self.relocations_failure:
            return self.relocations_failure
        if spec.caller.are_parameters_unmapped:
            return Failure("EFAULT", "parameters: address")
        return exports.taken_failure(self.exports, self.identity, others)

    def failure_after_forming(self, spec: CallSpec) -> Failure | None:
        """Return what fails once others can link to the module: parameters."""
        return parameters_failure(spec.parameters, self.parameters)

    def failure_after_symbols(self, spec: CallSpec, others: Exporters) -> Failure | None:
        """Return what fails once the imports are resolved, before and after others can link to it."""
        return self.failure_before_forming(spec, others) or self.failure_after_forming(spec)
