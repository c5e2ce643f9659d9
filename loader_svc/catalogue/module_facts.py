"""Facts of a module: everything that decides how it lies in memory and what its loading needs.

They are the section table, how many symbols of which kind each section has and how long their names are, every name
that crosses the module's border, and ``.modinfo``. Nothing of a module's code or data is among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Section:
    """One line of a section table, relocations against it included."""

    name: str
    type: str
    """Name of its ``sh_type`` without ``SHT_``; `REL`/`RELA` sections are no lines of their own."""
    flags: str
    """Letters as readelf prints them, `-` for none."""
    size_bytes: int
    align_bytes: int
    entsize_bytes: int = 0
    address: int = 0
    link: str = ""
    """Name of the section that ``sh_link`` names, for SHF_LINK_ORDER."""
    has_symbol: bool = False
    """Whether the symbol table has a section symbol for it."""
    relocations: tuple[tuple[str, int], ...] = ()
    """Type without ``R_X86_64_``, and how many."""

    @property
    def relocation_count(self) -> int:
        """How many entries the section's ``.rela`` companion has; 0 if there is none."""
        return sum(count for _, count in self.relocations)


@dataclass(frozen=True, slots=True)
class Import:
    """A symbol that the module wants."""

    name: str
    weak: bool = False
    versioned: bool = True
    """Whether ``__versions`` has an entry for it."""


@dataclass(frozen=True, slots=True)
class Export:
    """A symbol that the module gives to others."""

    name: str
    crc: int
    section: str
    type: str
    bind: str = "GLOBAL"
    gpl_only: bool = False
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A ``struct kernel_param`` in section ``__param``. A place is a section and an offset in bytes."""

    name: str
    ops: str
    """What ``ops`` points to: an imported symbol, or a place as `SECTION+OFFSET`."""
    permissions: int
    level: int
    flags: int
    name_place: tuple[str, int]
    argument: str
    """What ``arg`` points to, in the same words; empty for nothing."""


@dataclass(frozen=True, slots=True)
class SymbolGroup:
    """Symbols of one kind that are only counted, not named."""

    bind: str
    type: str
    section: str
    count: int
    name_bytes: int
    """Length of all their names, a NUL each included."""


@dataclass(frozen=True)
class ModuleFacts:
    """What is known of one module."""

    name: str
    path: str
    """Relative to ``/lib/modules/RELEASE``, without a suffix of compression."""
    origin: str
    """Debian package and version that it was taken from, or what it is modelled on."""
    plain_bytes: int
    xz_bytes: int
    zst_bytes: int
    layout_bytes: tuple[int, ...]
    """The seven sizes that the kernel lays out, before rounding to pages, in its own order (enum mod_mem_type)."""
    signature_bytes: tuple[int, int] | None
    """Lengths of the signature's two numbers; None for an unsigned file."""
    fill: tuple[int, int]
    """Of 65,536 bytes of contents: how many are noise, and how many are rows of tables."""
    info: tuple[tuple[str, str], ...]
    imports: tuple[Import, ...]
    exports: tuple[Export, ...]
    parameters: tuple[Parameter, ...]
    entries: tuple[tuple[str, str], ...]
    """Which of `init_module`, `cleanup_module` and `__this_module` there are, and in which section."""
    sections: tuple[Section, ...]
    symbols: tuple[SymbolGroup, ...]

    def values(self, key: str) -> tuple[str, ...]:
        """Return all values of ``key`` in ``.modinfo``, in order."""
        return tuple(value for name, value in self.info if name == key)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Patterns that modprobe finds the module by."""
        return self.values("alias")

    @property
    def softdeps(self) -> tuple[str, ...]:
        """Lines as modprobe.d(5) has them, without the module's name."""
        return self.values("softdep")

    @property
    def depends(self) -> tuple[str, ...]:
        """Modules that give symbols to this one, as ``.modinfo`` says."""
        return tuple(name for value in self.values("depends") for name in value.split(",") if name)

    @property
    def license(self) -> str:
        """The first licence; empty if there is none."""
        return next(iter(self.values("license")), "")

    @cached_property
    def section_by_name(self) -> dict[str, Section]:
        """Sections, the first of each name."""
        found: dict[str, Section] = {}
        for section in self.sections:
            found.setdefault(section.name, section)
        return found


@dataclass(frozen=True, slots=True)
class KernelSymbol:
    """A symbol that modules of the catalogue want and none of them gives: the kernel image does."""

    name: str
    crc: int
    gpl_only: bool = False
    namespace: str = ""


@dataclass(frozen=True)
class KernelFacts:
    """What the modules have in common, and the kernel that they are loaded into."""

    release: str
    """Release of the kernel whose packages the facts were taken from."""
    vermagic: str
    """What follows the release in ``vermagic=``."""
    origins: tuple[str, ...]
    struct_module_bytes: int
    init_offset: int
    """Where ``struct module`` has its pointer to the init function, in bytes."""
    exit_offset: int
    orc_header: str
    """Contents of ``.orc_header``, in hex."""
    comment: str
    """The string that ``.comment`` repeats."""
    signer: str
    signer_serial: str
    """In hex."""
    notes: tuple[tuple[str, str], ...]
    """Sections of notes and their contents in hex; ``{release}`` and ``{build_id}`` stand for what differs."""
    config: tuple[str, ...]
    """Lines of the kernel's configuration that matter to loading (kernel-parameters aside)."""
    order: tuple[str, ...]
    """``modules.order``: the paths of all modules of the catalogue."""
    builtin: tuple[str, ...]
    """``modules.builtin``."""
    symbols: tuple[KernelSymbol, ...] = field(repr=False)
