"""The files beside the modules that kmod reads: ``modules.*``, as depmod of kmod 30 writes them (depmod(8))."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from loader_svc.catalogue.index_file import index_file
from loader_svc.trees.depmod import index_files
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.scan import scan_tree

_DEVICE = re.compile(r"(char|block)-major-([0-9]+)-([0-9]+)")
_DASHES = re.compile(r"-(?![^\[]*\])")


def write_indexes(tree: Path) -> None:
    """Read the modules of ``tree`` and write what depmod would."""
    index = index_files(scan_tree(tree))
    place = {name: number for number, name in enumerate(index.names())}
    dependencies = list(_dependencies(index))
    symbols = list(zip((f"symbol:{symbol}" for symbol in index.symbols), index.symbol_modules, strict=True))
    aliases = list(zip(index.alias_patterns, index.alias_modules, strict=True))

    (tree / "modules.dep").write_text("".join(f"{line}\n" for line in dependencies))
    (tree / "modules.alias").write_text(
        "# Aliases extracted from modules themselves.\n" + "".join(f"alias {p} {m}\n" for p, m in aliases)
    )
    (tree / "modules.softdep").write_text(
        "# Soft dependencies extracted from modules themselves.\n" + "".join(f"{line}\n" for line in index.softdeps)
    )
    (tree / "modules.symbols").write_text(
        "# Aliases for symbols, used by symbol_request().\n" + "".join(f"alias {s} {m}\n" for s, m in symbols)
    )
    (tree / "modules.devname").write_text("".join(_device_nodes(aliases)))
    (tree / "modules.dep.bin").write_bytes(
        index_file((name, line, place[name]) for name, line in zip(index.names(), dependencies, strict=True))
    )
    (tree / "modules.alias.bin").write_bytes(index_file((_DASHES.sub("_", p), m, place[m]) for p, m in aliases))
    (tree / "modules.symbols.bin").write_bytes(index_file((s, m, place[m]) for s, m in symbols))
    (tree / "modules.builtin.bin").write_bytes(index_file((name, "", 0) for name in index.builtin))
    (tree / "modules.builtin.alias.bin").write_bytes(
        index_file(
            (_DASHES.sub("_", pattern), name, 0)
            for pattern, name in zip(index.builtin_alias_patterns, index.builtin_alias_modules, strict=True)
        )
    )


def _dependencies(index: TreeIndex) -> Iterator[str]:
    """Make the lines of ``modules.dep``."""
    for path, needed in zip(index.paths, index.depends, strict=True):
        yield f"{path}:" + "".join(f" {index.paths[other]}" for other in needed)


def _device_nodes(aliases: list[tuple[str, str]]) -> Iterator[str]:
    """Make the lines of ``modules.devname``: modules with a name and a number for a device node."""
    nodes: dict[str, dict[str, str]] = {}
    for pattern, module in aliases:
        device = _DEVICE.fullmatch(pattern)
        if device:
            nodes.setdefault(module, {})["number"] = f"{device[1][0]}{device[2]}:{device[3]}"
        elif pattern.startswith("devname:"):
            nodes.setdefault(module, {})["name"] = pattern.removeprefix("devname:")
    found = [f"{module} {node['name']} {node['number']}\n" for module, node in nodes.items() if len(node) == 2]
    if found:
        yield "# Device nodes to trigger on-demand module loading.\n"
    yield from found
