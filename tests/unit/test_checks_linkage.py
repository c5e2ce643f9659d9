"""From the place in the list to the init function: symbols, relocations, exports, parameters, per-CPU room."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from loader_svc.checks.exports import Exporter
from loader_svc.checks.linkage import Linkage
from loader_svc.image import plan_layout, read_elf
from loader_svc.steps import Caller, CallSpec, Failure
from modpressure.kernel.identity import ANY, ExportedSymbol, KernelIdentity
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_5

Make = Callable[..., Any]

ALLOC, WRITE = 2, 1
RELA = 4
KERNEL = replace(
    ANY,
    module_force_load=False,
    symbols={
        "module_layout": ExportedSymbol(1),
        "printk": ExportedSymbol(0x11),
        "for_gpl": ExportedSymbol(0x22, gpl_only=True),
        "spaced": ExportedSymbol(0x33, namespace="NS"),
    },
)
SPEC = CallSpec("tiny", "inode", V6_5, Syscall.FINIT_MODULE)


@dataclass
class Live:
    """Exports of live modules."""

    exported: dict[str, Exporter] = field(default_factory=dict)

    def find(self, name: str) -> Exporter | None:
        return self.exported.get(name)


@dataclass
class Tiny:
    """What the module of a test has; linked by ``failure``."""

    make_module: Make
    make_section: Make
    wants: list[tuple[str, int]] = field(default_factory=list)
    """Undefined symbols: name, binding (1 global, 2 weak)."""
    crcs: dict[str, int] = field(default_factory=lambda: {"printk": 0x11, "for_gpl": 0x22, "spaced": 0x33})
    tags: list[tuple[str, str]] = field(default_factory=list)
    licence: str = "GPL"
    others: list[tuple[str, int, int]] = field(default_factory=list)
    sections: list[Any] = field(default_factory=list)

    def image(self) -> bytes:
        versions = b"".join(struct.pack("<Q56s", crc, name.encode()) for name, crc in self.crcs.items())
        extra = [*self.sections, self.make_section("__versions", versions, ALLOC)] if self.crcs else self.sections
        builder = self.make_module("tiny", *extra, tags=self.tags)
        info = builder.section(".modinfo")
        info.data = info.data.replace(b"license=GPL\0", f"license={self.licence}\0".encode() if self.licence else b"")
        builder.symbols = [("", 1, 0), *((name, 0, binding) for name, binding in self.wants), *self.others]
        return bytes(builder.bytes())

    def linkage(self, identity: KernelIdentity = KERNEL, flags: int = 0) -> Linkage:
        elf = read_elf(self.image())
        return Linkage.of(elf, plan_layout(elf), identity, flags)

    def failure(
        self, identity: KernelIdentity = KERNEL, live: Live | None = None, flags: int = 0, spec: CallSpec = SPEC
    ) -> Failure | None:
        live, linkage = live or Live(), self.linkage(identity, flags)
        return (
            linkage.failure_before_symbols()
            or linkage.resolve(live).failure
            or linkage.failure_after_symbols(spec, live)
        )

    def says(self, *arguments: Any, **named: Any) -> tuple[str, str] | None:
        failure = self.failure(*arguments, **named)
        return failure and (failure.errno, failure.check)


@pytest.fixture
def tiny(make_module: Make, make_section: Make) -> Tiny:
    return Tiny(make_module, make_section)


@pytest.mark.parametrize(("data", "expected"), [(b"", 0), (bytes(24), 3), (bytes(31), 3)])
def test_calls_that_are_made_direct_ones_are_counted(tiny: Tiny, data: bytes, expected: int) -> None:
    tiny.sections.append(tiny.make_section(".static_call_sites", data, ALLOC | WRITE))
    assert tiny.linkage().static_calls == expected


def test_a_module_without_static_calls_has_none(tiny: Tiny) -> None:
    assert tiny.linkage().static_calls == 0


# --- symbols ---


def test_symbols_of_the_kernel_resolve(tiny: Tiny) -> None:
    tiny.wants = [("printk", 1), ("for_gpl", 1), ("_GLOBAL_OFFSET_TABLE_", 1), ("absent", 2)]
    assert tiny.failure() is None


@pytest.mark.parametrize(
    ("wants", "changes", "expected"),
    [
        ([("absent", 1)], {}, ("ENOENT", "symbols: unknown")),
        ([("for_gpl", 1)], {"licence": "Proprietary"}, ("ENOENT", "symbols: GPL-only")),
        ([("for_gpl", 2)], {"licence": "Proprietary"}, None),
        ([("for_gpl", 1)], {"licence": ""}, ("ENOENT", "symbols: GPL-only")),
        ([("for_gpl", 1)], {"licence": "Dual BSD/GPL"}, None),
        ([("printk", 1)], {"licence": "Proprietary"}, None),
        ([("printk", 1)], {"crcs": {"printk": 0x99}}, ("EINVAL", "symbols: version")),
        ([("printk", 1)], {"crcs": {"other": 1}}, None),
        ([("spaced", 1)], {}, ("EINVAL", "symbols: namespace")),
        ([("spaced", 1)], {"tags": [("import_ns", "NS")]}, None),
        ([("spaced", 1)], {"tags": [("import_ns", "NSX")]}, ("EINVAL", "symbols: namespace")),
        # The last error wins.
        ([("absent", 1), ("spaced", 1)], {}, ("EINVAL", "symbols: namespace")),
        ([("spaced", 1), ("absent", 1), ("printk", 1)], {}, ("ENOENT", "symbols: unknown")),
        ([], {"others": [("c", 0xFFF2, 1)]}, ("ENOEXEC", "symbols: common")),
        ([], {"others": [("__gnu_lto_slim", 0xFFF2, 1)]}, None),
        ([], {"others": [("a", 0xFFF1, 1)]}, None),
        ([], {"others": [("b", 0x1234, 1)]}, ("ENOEXEC", "symbols: section")),
        ([("absent", 1)], {"others": [("c", 0xFFF2, 1)]}, ("ENOEXEC", "symbols: common")),
    ],
)
def test_symbols_that_do_not_resolve(
    tiny: Tiny, wants: list[tuple[str, int]], changes: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    tiny.wants = wants
    assert replace(tiny, **changes).says() == expected


def test_flag_1_needs_force_for_every_symbol(tiny: Tiny) -> None:
    tiny.wants, tiny.crcs = [("printk", 1)], {"printk": 0x99}
    assert tiny.says(flags=1) == ("EINVAL", "symbols: version")
    assert tiny.says(replace(KERNEL, module_force_load=True), flags=1) is None
    assert tiny.says(replace(KERNEL, modversions=False)) is None


def test_a_kernel_of_unknown_symbols_resolves_all_but_what_no_kernel_would(tiny: Tiny) -> None:
    tiny.wants = [("absent", 1)]
    assert tiny.says(ANY) is None
    tiny.others = [("c", 0xFFF2, 1)]
    assert tiny.says(ANY) == ("ENOEXEC", "symbols: common")


def test_symbols_of_live_modules_resolve_and_are_used(tiny: Tiny) -> None:
    tiny.wants = [("theirs", 1), ("printk", 1), ("more", 1)]
    live = Live({"theirs": Exporter(ExportedSymbol(5), "a"), "more": Exporter(ExportedSymbol(None), "b")})
    assert tiny.linkage().resolve(live).uses == ("a", "b")
    tiny.crcs |= {"theirs": 6}
    assert tiny.says(live=live) == ("EINVAL", "symbols: version")
    assert tiny.says() == ("ENOENT", "symbols: unknown")


def test_an_owner_that_still_initialises_is_waited_for_and_then_given_up(tiny: Tiny) -> None:
    tiny.wants = [("theirs", 1)]
    live = Live({"theirs": Exporter(ExportedSymbol(None), "a", is_initialising=True)})
    resolver = tiny.linkage()
    assert resolver.resolve(live).awaits == "a"
    failure = resolver.resolve(live, frozenset({"a"})).failure
    assert failure is not None
    assert (failure.errno, failure.value) == ("EBUSY", "theirs of a")


def test_being_proprietary_is_inherited_and_keeps_from_gpl_only_symbols(tiny: Tiny) -> None:
    live = Live({"theirs": Exporter(ExportedSymbol(None), "a", is_proprietary=True)})
    tiny.wants = [("theirs", 1)]
    assert tiny.linkage().resolve(live).is_proprietary
    tiny.wants = [("theirs", 1), ("for_gpl", 1)]
    assert tiny.says(live=live) == ("ENOENT", "symbols: GPL-only")
    tiny.wants = [("for_gpl", 1), ("theirs", 1)]
    assert tiny.says(live=live) == ("ENOENT", "symbols: proprietary")


# --- relocations ---


def rela(offset: int, kind: int, symbol: int = 1, addend: int = 0) -> bytes:
    return struct.pack("<QIIq", offset, kind, symbol, addend)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (rela(0, 2), None),
        (rela(0, 1) + rela(8, 2) + rela(12, 4) + rela(16, 11) + rela(20, 24), None),
        (rela(0, 0), None),
        (rela(0, 200), "relocations: type"),
        (rela(0, 2) + rela(4, 3), "relocations: type"),
        (rela(32, 2), "relocations: target"),
        (rela(0, 2) + rela(29, 2), "relocations: target"),
        (rela(61, 2), "relocations: offset"),
        (rela(2**64 - 2, 2), "relocations: offset"),
        (rela(0, 2, symbol=999), "relocations: symbol"),
        (rela(0, 10, symbol=3), "relocations: overflow"),
        (rela(0, 10, symbol=2), None),
        (rela(0, 11) + rela(4, 11, addend=-4), None),
        (rela(0, 11) + rela(4, 11, symbol=3, addend=2**31), "relocations: overflow"),
        (rela(0, 11) + rela(4, 11, symbol=3, addend=-(2**40)), "relocations: overflow"),
        (rela(0, 11) + rela(4, 2, symbol=3, addend=2**40), None),
        (rela(0, 11) + rela(4, 10, symbol=4, addend=1), None),
        (rela(0, 11) + rela(4, 10, symbol=4, addend=-1), "relocations: overflow"),
        (rela(0, 11) + rela(4, 11, symbol=4, addend=-1), None),
        (b"", None),
    ],
)
def test_relocations(tiny: Tiny, make_section: Make, content: bytes, expected: str | None) -> None:
    tiny.wants, tiny.others = [("printk", 1)], [("here", 1, 1), ("absolute", 0xFFF1, 1)]
    # Section 4, after .text, .modinfo and this_module: 32 bytes of zeros, then 32 of ones.
    tiny.sections = [
        make_section(".rodata", bytes(32) + b"\1" * 32, ALLOC),
        make_section(".rela.rodata", content, 0, RELA, info=4),
    ]
    failure = tiny.failure()
    assert (failure and failure.check) == expected
    if failure:
        assert failure.errno == "ENOEXEC"


def test_what_is_per_cpu_is_copied_and_not_relocated(tiny: Tiny, make_section: Make) -> None:
    tiny.sections = [
        make_section(".data..percpu", b"\1" * 32, ALLOC | 1),
        make_section(".rela.data..percpu", rela(0, 200) + rela(0, 1), 0, RELA, info=4),
    ]
    assert tiny.failure() is None


@pytest.mark.parametrize(
    ("kind", "info", "flags", "expected"),
    [
        (RELA, 4, ALLOC, "relocations: type"),
        (RELA, 4, 0, None),  # what has no place in memory is not relocated
        (RELA, 999, ALLOC, None),
        (9, 4, ALLOC, "relocations: rel"),
    ],
)
def test_which_relocation_sections_count(
    tiny: Tiny, make_section: Make, kind: int, info: int, flags: int, expected: str | None
) -> None:
    tiny.sections = [
        make_section(".rodata", bytes(32), flags),
        make_section(".rela.rodata", rela(0, 200), 0, kind, info=info),
    ]
    failure = tiny.failure()
    assert (failure and failure.check) == expected


def test_sections_for_livepatch_are_left_alone(tiny: Tiny, make_section: Make) -> None:
    tiny.sections = [
        make_section(".rodata", bytes(32), ALLOC),
        make_section(".klp.rela", rela(0, 200), 0x00100000, RELA, info=4),
    ]
    assert tiny.failure() is None


# --- the rest ---


def exporting(tiny: Tiny, make_section: Make, *, with_crcs: bool = True) -> None:
    """Let the module export one symbol, ``mine``."""
    tiny.sections = [make_section("__ksymtab", bytes(12), ALLOC)]
    if with_crcs:
        tiny.sections.append(make_section("__kcrctab", bytes(4), ALLOC))
    tiny.others = [("__ksymtab_mine", 4, 0)]


def test_a_name_is_exported_once(tiny: Tiny, make_section: Make) -> None:
    exporting(tiny, make_section)
    assert tiny.failure() is None
    taken = Live({"mine": Exporter(ExportedSymbol(None), "other")})
    assert tiny.says(live=taken) == ("ENOEXEC", "exports: taken")
    own = replace(KERNEL, symbols={**(KERNEL.symbols or {}), "mine": ExportedSymbol(None)})
    assert tiny.says(own) == ("ENOEXEC", "exports: taken")


def test_exports_need_versions_or_force(tiny: Tiny, make_section: Make) -> None:
    exporting(tiny, make_section, with_crcs=False)
    tiny.wants = [("absent", 1)]
    assert tiny.says() == ("ENOEXEC", "exports: versions")
    assert tiny.says(replace(KERNEL, module_force_load=True)) == ("ENOENT", "symbols: unknown")
    assert tiny.says(replace(KERNEL, modversions=False)) == ("ENOENT", "symbols: unknown")


def test_per_cpu_variables_need_room(tiny: Tiny, make_section: Make) -> None:
    tiny.sections = [make_section(".data..percpu", bytes(4096), ALLOC | WRITE, align=8)]
    linkage = tiny.linkage()
    assert linkage.percpu_failure(4096) is None
    full = linkage.percpu_failure(4097)
    assert full == Failure("ENOMEM", "percpu", "4096")
    assert tiny.says(replace(KERNEL, percpu_reserve_bytes=4095)) == ("ENOMEM", "percpu")
    assert tiny.says(replace(KERNEL, smp=False)) == ("ENOMEM", "percpu")


def test_arguments_are_looked_at_after_relocations_and_before_exports(tiny: Tiny, make_section: Make) -> None:
    exporting(tiny, make_section)
    unmapped = replace(SPEC, caller=Caller(are_parameters_unmapped=True))
    taken = Live({"mine": Exporter(ExportedSymbol(None), "other")})
    assert tiny.says(live=taken, spec=unmapped) == ("EFAULT", "parameters: address")
    tiny.sections.append(make_section(".rela.text", rela(0, 200), 0, RELA, info=1))
    assert tiny.says(live=taken, spec=unmapped) == ("ENOEXEC", "relocations: type")


def test_parameters_come_last(tiny: Tiny) -> None:
    tiny.tags = [("parmtype", "ms:int")]
    assert tiny.says(spec=replace(SPEC, parameters="ms=abc")) == ("EINVAL", "parameters")
    assert tiny.says(spec=replace(SPEC, parameters="ms=12 nosuch=1")) is None


def test_a_module_with_init_and_without_exit_stays(tiny: Tiny) -> None:
    assert tiny.linkage().can_be_unloaded
    tiny.others = [("init_module", 1, 1)]
    assert not tiny.linkage().can_be_unloaded
    tiny.others.append(("cleanup_module", 1, 1))
    assert tiny.linkage().can_be_unloaded
