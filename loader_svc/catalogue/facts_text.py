"""The text that holds facts: one noun per line, indented lines below the heading they belong to.

::

    module cryptd
    path kernel/crypto/cryptd.ko
    origin linux-image-6.12.117+deb12-amd64-unsigned 6.12.117-1~deb12u1
    lengths 58952 15920 19412          plain, .xz, .zst; bytes
    layout 6597 752 ...                the seven sizes before rounding to pages, in the kernel's order; bytes
    signature 49 49                    lengths of the two numbers of its ECDSA signature; bytes
    fill 812 20000                     of 65,536 bytes of contents: how many are noise, how many are table rows
    info
     alias=crypto-cryptd               .modinfo, in its order; backslash escapes as in Python
    imports
     crypto_register_template          "weak", "nocrc" may follow
    exports
     cryptd_alloc_aead 0x3e1b9b5c .text FUNC GLOBAL gpl    "ns=NAME" may follow
    params
     cryptd_max_cpu_qlen ops perm level flags name-section+offset argument
    entries
     init_module .init.text            and cleanup_module, __this_module
    sections
     .text PROGBITS AX 6597 16 sym PLT32=190,PC32=52       "sym": has a section symbol; then its relocations
    symbols
     LOCAL FUNC .text 84 2301                              count, bytes of their names with their NULs
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from loader_svc.catalogue.module_facts import (
    Export,
    Import,
    KernelFacts,
    KernelSymbol,
    ModuleFacts,
    Parameter,
    Section,
    SymbolGroup,
)


class FactsError(ValueError):
    """A line of the catalogue's text that can't be understood."""


def render_module(facts: ModuleFacts) -> str:
    """Write the text that `parse_module` reads."""
    return "".join(f"{line}\n" for line in _module_lines(facts))


def _module_lines(facts: ModuleFacts) -> Iterator[str]:
    yield f"module {facts.name}"
    yield f"path {facts.path}"
    yield f"origin {facts.origin}"
    yield f"lengths {facts.plain_bytes} {facts.xz_bytes} {facts.zst_bytes}"
    yield f"layout {' '.join(map(str, facts.layout_bytes))}"
    if facts.signature_bytes:
        yield f"signature {facts.signature_bytes[0]} {facts.signature_bytes[1]}"
    yield f"fill {facts.fill[0]} {facts.fill[1]}"
    yield from _block("info", (f"{key}={_escaped(value)}" for key, value in facts.info))
    yield from _block("imports", (_import_line(wanted) for wanted in facts.imports))
    yield from _block("exports", (_export_line(given) for given in facts.exports))
    yield from _block("params", (_parameter_line(parameter) for parameter in facts.parameters))
    yield from _block("entries", (f"{name} {section}" for name, section in facts.entries))
    yield from _block("sections", (_section_line(section) for section in facts.sections))
    yield from _block("symbols", (f"{g.bind} {g.type} {g.section} {g.count} {g.name_bytes}" for g in facts.symbols))


def _block(heading: str, lines: Iterable[str]) -> Iterator[str]:
    for place, line in enumerate(lines):
        if not place:
            yield heading
        yield f" {line}"


def _import_line(wanted: Import) -> str:
    return wanted.name + " weak" * wanted.weak + " nocrc" * (not wanted.versioned)


def _export_line(given: Export) -> str:
    line = f"{given.name} {given.crc:#010x} {given.section} {given.type} {given.bind}" + " gpl" * given.gpl_only
    return f"{line} ns={given.namespace}" if given.namespace else line


def _parameter_line(p: Parameter) -> str:
    section, offset = p.name_place
    return f"{p.name} {p.ops} {p.permissions:#o} {p.level} {p.flags} {section}+{offset} {p.argument or '-'}"


def _section_line(section: Section) -> str:
    parts = [section.name, section.type, section.flags, str(section.size_bytes), str(section.align_bytes)]
    if section.has_symbol:
        parts.append("sym")
    if section.entsize_bytes:
        parts.append(f"entsize={section.entsize_bytes}")
    if section.address:
        parts.append(f"address={section.address:#x}")
    if section.link:
        parts.append(f"link={section.link}")
    if section.relocations:
        parts.append("rela:" + ",".join(f"{kind}={count}" for kind, count in section.relocations))
    return " ".join(parts)


def _escaped(value: str) -> str:
    # Values are what modinfo's bytes are in latin-1, so that every byte survives.
    return value.encode("unicode_escape").decode("ascii")


def _unescaped(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape") if "\\" in text else text


def _blocks(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """For each heading its own words and the indented lines below it."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    below: list[str] = []
    for line in text.splitlines():
        if line.startswith(" "):
            below.append(line[1:])
        elif line:
            heading, *words = line.split(" ")
            below = []
            found[heading] = (words, below)
    return found


def parse_module(text: str) -> ModuleFacts:
    """Read the text of one module. `FactsError` names a text that isn't one."""
    blocks = _blocks(text)
    try:
        numbers = {name: tuple(map(int, blocks[name][0])) for name in ("lengths", "layout", "fill")}
        signature = tuple(map(int, blocks["signature"][0])) if "signature" in blocks else None
        plain_bytes, xz_bytes, zst_bytes = numbers["lengths"]
        noise, rows = numbers["fill"]
        return ModuleFacts(
            name=blocks["module"][0][0],
            path=blocks["path"][0][0],
            origin=" ".join(blocks["origin"][0]),
            plain_bytes=plain_bytes,
            xz_bytes=xz_bytes,
            zst_bytes=zst_bytes,
            layout_bytes=numbers["layout"],
            signature_bytes=(signature[0], signature[1]) if signature else None,
            fill=(noise, rows),
            info=tuple(_info(line) for line in _lines(blocks, "info")),
            imports=tuple(_import(line) for line in _lines(blocks, "imports")),
            exports=tuple(_export(line) for line in _lines(blocks, "exports")),
            parameters=tuple(_parameter(line) for line in _lines(blocks, "params")),
            entries=tuple(_pair(line) for line in _lines(blocks, "entries")),
            sections=tuple(_section(line) for line in _lines(blocks, "sections")),
            symbols=tuple(_group(line) for line in _lines(blocks, "symbols")),
        )
    except (KeyError, ValueError, IndexError, UnicodeError) as error:
        raise FactsError(f"the facts that begin with {text[:60]!r} can't be read: {error}") from error


def _lines(blocks: dict[str, tuple[list[str], list[str]]], heading: str) -> list[str]:
    return blocks[heading][1] if heading in blocks else []


def _info(line: str) -> tuple[str, str]:
    key, _, value = line.partition("=")
    return key, _unescaped(value)


def _pair(line: str) -> tuple[str, str]:
    name, section = line.split(" ")
    return name, section


def _import(line: str) -> Import:
    name, *rest = line.split(" ")
    return Import(name, "weak" in rest, "nocrc" not in rest)


def _export(line: str) -> Export:
    name, crc, section, kind, bind, *rest = line.split(" ")
    namespace = next((word[3:] for word in rest if word.startswith("ns=")), "")
    return Export(name, int(crc, 16), section, kind, bind, "gpl" in rest, namespace)


def _parameter(line: str) -> Parameter:
    name, ops, permissions, level, flags, name_place, argument = line.split(" ")
    section, _, offset = name_place.rpartition("+")
    place = (section, int(offset))
    return Parameter(name, ops, int(permissions, 8), int(level), int(flags), place, argument.removeprefix("-"))


def _section(line: str) -> Section:
    name, kind, flags, size, align, *rest = line.split(" ")
    values = dict(word.split("=", 1) for word in rest if "=" in word and not word.startswith("rela:"))
    relocations = next((word[5:] for word in rest if word.startswith("rela:")), "")
    return Section(
        name=name,
        type=kind,
        flags=flags,
        size_bytes=int(size),
        align_bytes=int(align),
        entsize_bytes=int(values.get("entsize", "0")),
        address=int(values.get("address", "0"), 16),
        link=values.get("link", ""),
        has_symbol="sym" in rest,
        relocations=tuple(
            (kind, int(count)) for kind, _, count in (word.partition("=") for word in relocations.split(",") if word)
        ),
    )


def _group(line: str) -> SymbolGroup:
    bind, kind, section, count, name_bytes = line.split(" ")
    return SymbolGroup(bind, kind, section, int(count), int(name_bytes))


def render_kernel(facts: KernelFacts) -> str:
    """Write the text that `parse_kernel` reads."""
    lines = [
        f"kernel {facts.release}",
        f"vermagic {facts.vermagic}",
        f"struct_module {facts.struct_module_bytes} {facts.init_offset} {facts.exit_offset}",
        f"orc_header {facts.orc_header}",
        f"comment {facts.comment}",
        f"signer {facts.signer_serial} {facts.signer}",
        *_block("origins", facts.origins),
        *_block("notes", (f"{name} {contents}" for name, contents in facts.notes)),
        *_block("config", facts.config),
        *_block("order", facts.order),
        *_block("builtin", facts.builtin),
        *_block("kernel-exports", (_kernel_symbol_line(symbol) for symbol in facts.symbols)),
    ]
    return "".join(f"{line}\n" for line in lines)


def _kernel_symbol_line(symbol: KernelSymbol) -> str:
    line = f"{symbol.name} {symbol.crc:#010x}" + " gpl" * symbol.gpl_only
    return f"{line} ns={symbol.namespace}" if symbol.namespace else line


def parse_kernel(text: str) -> KernelFacts:
    """Read the text that all modules share. `FactsError` names a text that isn't one."""
    blocks = _blocks(text)
    try:
        struct_module_bytes, init_offset, exit_offset = map(int, blocks["struct_module"][0])
        return KernelFacts(
            release=blocks["kernel"][0][0],
            vermagic=" ".join(blocks["vermagic"][0]),
            origins=tuple(_lines(blocks, "origins")),
            struct_module_bytes=struct_module_bytes,
            init_offset=init_offset,
            exit_offset=exit_offset,
            orc_header=blocks["orc_header"][0][0],
            comment=" ".join(blocks["comment"][0]),
            signer=" ".join(blocks["signer"][0][1:]),
            signer_serial=blocks["signer"][0][0],
            notes=tuple((name, contents) for name, _, contents in (n.partition(" ") for n in _lines(blocks, "notes"))),
            config=tuple(_lines(blocks, "config")),
            order=tuple(_lines(blocks, "order")),
            builtin=tuple(_lines(blocks, "builtin")),
            symbols=tuple(_kernel_symbol(line) for line in _lines(blocks, "kernel-exports")),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise FactsError(f"the facts of the kernel can't be read: {error}") from error


def _kernel_symbol(line: str) -> KernelSymbol:
    name, crc, *rest = line.split(" ")
    namespace = next((word[3:] for word in rest if word.startswith("ns=")), "")
    return KernelSymbol(name, int(crc, 16), "gpl" in rest, namespace)
