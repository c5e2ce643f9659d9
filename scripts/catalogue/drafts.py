"""Facts on their way into the catalogue: adapted to the kernel that all its modules share, and made to agree."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from elftools.elf.constants import SH_FLAGS
from kernel_packages import KernelPackages
from module_reader import Shared, layout_of

from loader_svc.catalogue.module_facts import Export, Import, KernelSymbol, ModuleFacts, Section
from loader_svc.catalogue.strings import StringTable

THIS_MODULE = ".gnu.linkonce.this_module"
SIGNATURE_NUMBERS = (49, 49)
SIGNATURE_BYTES = 264  # of such a signature, as the main kernel's modules have it

MODELLED_EXPORTS = {
    "sha1_generic": ("crypto_sha1_finup", "crypto_sha1_update", "sha1_zero_message_hash"),
    "polyval_generic": ("polyval_mul_non4k", "polyval_update_non4k"),
    "polyval_clmulni": (),
}
MODELLED_IMPORTS = {"polyval_clmulni": ("polyval_mul_non4k", "polyval_update_non4k")}
MODELLED_FILES = {"polyval_generic": "polyval-generic", "polyval_clmulni": "polyval-clmulni"}
MODELLED_WORDS = {
    "sha1_generic": (("sha512", "sha1"), ("SHA-512 and SHA-384 Secure Hash Algorithms", "SHA1 Secure Hash Algorithm")),
    "polyval_generic": (("ghash", "polyval"), ("GHASH", "POLYVAL")),
    "polyval_clmulni": (("ghash", "polyval"), ("GHASH", "POLYVAL")),
}


@dataclass(frozen=True)
class Draft:
    """Facts on their way, and what the layout needs besides: how many symbols stay, and the bytes of their names."""

    facts: ModuleFacts
    core_count: int
    core_name_bytes: int
    exact: bool = True
    """Whether the file is one of the main kernel's, whose length must come out."""


def read(kernel: KernelPackages, name: str) -> Draft:
    """Read a module of a package."""
    module, facts = kernel.read(name)
    sections = [
        (section, h["sh_type"], h["sh_flags"], h["sh_size"], h["sh_addralign"]) for section, h in module.sections
    ]
    return Draft(facts, *module.core_symbols(sections))


def adapted(draft: Draft, signature_bytes: int, shared: Shared) -> Draft:
    """Make of another kernel's module what it were, built for the main one, as far as all its modules are alike."""
    sizes = {THIS_MODULE: shared.struct_module_bytes}
    sizes |= {name: len(contents) for name, contents in shared.notes if name == ".note.Linux"}
    sections = tuple(
        replace(section, size_bytes=sizes.get(section.name, section.size_bytes)) for section in draft.facts.sections
    )
    facts = replace(
        draft.facts,
        origin=f"{draft.facts.origin}, adapted",
        sections=sections,
        signature_bytes=SIGNATURE_NUMBERS,
        # A signature is noise, so both compressed lengths lose what it loses.
        xz_bytes=draft.facts.xz_bytes - signature_bytes + SIGNATURE_BYTES,
        zst_bytes=draft.facts.zst_bytes - signature_bytes + SIGNATURE_BYTES,
    )
    return replace(draft, facts=facts, exact=False)


def modelled_on(draft: Draft, name: str) -> Draft:
    """Make a module that no package has, in the likeness of one that a package has."""
    base = draft.facts
    words = MODELLED_WORDS[name]

    def renamed(text: str) -> str:
        for old, new in words:
            text = text.replace(old, new)
        return text

    info = tuple((key, renamed(value)) for key, value in base.info if "384" not in value)
    info = tuple((key, name if key == "name" else value) for key, value in info)
    facts = replace(
        base,
        name=name,
        path=f"{base.path.rpartition('/')[0]}/{MODELLED_FILES.get(name, name)}.ko",
        origin=f"modelled on {base.name} of {base.origin.removesuffix(', adapted')}",
        info=info,
        signature_bytes=SIGNATURE_NUMBERS,
    )
    draft = with_exports(replace(draft, facts=facts, exact=False), MODELLED_EXPORTS[name])
    imports = {i.name: i for i in (*facts.imports, *(Import(n) for n in MODELLED_IMPORTS.get(name, ())))}
    grown = {".symtab": 24 * (len(imports) - len(facts.imports))}
    grown[".strtab"] = sum(len(n) + 1 for n in MODELLED_IMPORTS.get(name, ()))
    facts = replace(draft.facts, imports=tuple(imports[n] for n in sorted(imports)))
    return replace(draft, facts=resized(facts, grown))


def with_exports(draft: Draft, names: tuple[str, ...]) -> Draft:
    """Give the module other exports: GPL-only functions, and a variable if its name says so."""
    facts = draft.facts
    tables = ("__ksymtab", "__ksymtab_gpl", "__kcrctab", "__kcrctab_gpl", "__ksymtab_strings")
    sections = [section for section in facts.sections if section.name not in tables]
    exports = tuple(
        Export(name, 0, *((".rodata", "OBJECT") if name.endswith("_hash") else (".text", "FUNC")), "GLOBAL", True)
        for name in sorted(names)
    )
    if exports:
        place = next(i for i, section in enumerate(sections) if "X" not in section.flags)
        count = len(exports)
        sections[place:place] = [
            Section("__ksymtab_gpl", "PROGBITS", "A", 12 * count, 4, relocations=(("PC32", 3 * count),)),
            Section("__kcrctab_gpl", "PROGBITS", "A", 4 * count, 4),
            Section("__ksymtab_strings", "PROGBITS", "AMS", 0, 1, entsize_bytes=1),
        ]
    # A symbol of its own, and four of the build, for each export.
    old_bytes, new_bytes = (sum(5 * len(e.name) + 43 for e in group) for group in (facts.exports, exports))
    more = 5 * (len(exports) - len(facts.exports))
    facts = resized(
        replace(facts, exports=exports, sections=tuple(sections)),
        {".symtab": 24 * more, ".strtab": new_bytes - old_bytes},
    )
    return replace(
        draft,
        facts=facts,
        core_count=draft.core_count + more,
        core_name_bytes=draft.core_name_bytes + new_bytes - old_bytes,
    )


def resized(facts: ModuleFacts, grown_bytes: dict[str, int]) -> ModuleFacts:
    """Let sections grow."""
    sections = tuple(
        replace(section, size_bytes=section.size_bytes + grown_bytes.get(section.name, 0)) for section in facts.sections
    )
    return replace(facts, sections=sections)


def with_crcs(draft: Draft, symbols: dict[str, KernelSymbol]) -> Draft:
    """Give every export the CRC that the main kernel knows for the symbol, or else the older one, or a made-up one."""
    exports = tuple(
        replace(given, crc=symbols[given.name].crc if given.name in symbols else zlib.crc32(given.name.encode()))
        for given in draft.facts.exports
    )
    if draft.exact and exports != draft.facts.exports:
        raise SystemExit(f"{draft.facts.name}: its CRCs are not those of Module.symvers")
    return replace(draft, facts=replace(draft.facts, exports=exports))


def with_depends(draft: Draft, owners: dict[str, str], drafts: dict[str, Draft]) -> Draft:
    """Let ``depends=`` name the modules of the catalogue that give what this one wants."""
    facts = draft.facts
    needed = {owners[wanted.name] for wanted in facts.imports if wanted.name in owners} - {facts.name}
    files = {name: drafts[name].facts.path.rpartition("/")[2].removesuffix(".ko") for name in needed}
    said = [name for name in facts.depends if name.replace("-", "_") in needed]
    said += sorted(files[name] for name in needed - {name.replace("-", "_") for name in said})
    info = tuple((key, ",".join(said) if key == "depends" else value) for key, value in facts.info)
    return replace(draft, facts=replace(facts, info=info))


def settled(draft: Draft) -> Draft:
    """Give the sections that texts and tables fill their length, and the layout what follows from that."""
    facts = draft.facts
    # The release of our own kernel has the length of Debian's, so any of the main kernel's vermagics will do.
    vermagic = len("6.12.117-modpressure SMP preempt mod_unload modversions ")
    info_bytes = sum(len(k) + 2 + (vermagic if k == "vermagic" else len(v)) for k, v in facts.info)
    sizes = {
        ".modinfo": info_bytes,
        "__versions": 64 * (1 + sum(wanted.versioned for wanted in facts.imports)),
        "__ksymtab_strings": sum(len(e.name) + len(e.namespace) + 2 for e in facts.exports),
    }
    if not draft.exact:
        names = [n for s in facts.sections for n in (s.name, f".rela{s.name}" if s.relocations else s.name)]
        sizes[".shstrtab"] = len(StringTable(names))
    if draft.exact:
        grown = info_bytes - facts.section_by_name[".modinfo"].size_bytes
        if grown:
            print(f"{facts.name}: depends={','.join(facts.depends)} is {grown} bytes longer")
    sections = tuple(replace(s, size_bytes=sizes.get(s.name, s.size_bytes)) for s in facts.sections)
    if draft.exact:
        changed = {a.name for a, b in zip(facts.sections, sections, strict=True) if a != b} - {".modinfo"}
        if changed:
            raise SystemExit(f"{facts.name}: {changed} are not as long as what they hold")
    flags = {"W": SH_FLAGS.SHF_WRITE, "A": SH_FLAGS.SHF_ALLOC, "X": SH_FLAGS.SHF_EXECINSTR}
    lines = [
        (s.name, f"SHT_{s.type}", sum(flags.get(f, 0) for f in s.flags), s.size_bytes, s.align_bytes) for s in sections
    ]
    layout = layout_of(lines, draft.core_count, draft.core_name_bytes)
    if draft.exact and layout != facts.layout_bytes:
        raise SystemExit(f"{facts.name}: layout {layout} from the facts, {facts.layout_bytes} from the file")
    return replace(draft, facts=replace(facts, sections=sections, layout_bytes=layout))
