"""Read ``modules.*``, the texts that depmod and the kernel's build leave in a tree (depmod(8), modules.dep(5)).

Lines that are no such lines are passed over: a damaged text makes modules unknown, never an error.
"""

from __future__ import annotations

import os

from loader_svc.trees.confine import target_inside
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.names import module_name
from loader_svc.trees.scan import Scan


def index_texts(scan: Scan) -> TreeIndex:
    """Make the index that the texts of ``scan`` give, as libkmod reads them: a module is what ``modules.dep`` lists."""
    lines: dict[str, tuple[str, list[str]]] = {}
    for line in _lines(scan.texts.get("modules.dep", b"")):
        path, colon, needed = line.partition(":")
        if colon and module_name(path):
            lines.setdefault(module_name(path), (path, needed.split()))
    places = {name: place for place, name in enumerate(lines)}
    sizes = {path: _size(scan, path) for path, _ in lines.values()}
    depends = []
    for _, others in lines.values():
        # libkmod drops a whole line in which a file is missing.
        known = [places.get(module_name(path), -1) for path in others]
        complete = all(place >= 0 and sizes.get(path, -1) >= 0 for place, path in zip(known, others, strict=True))
        depends.append(known if complete else [])
    aliases = _aliases(scan.texts.get("modules.alias", b""))
    symbols = [alias for alias in _aliases(scan.texts.get("modules.symbols", b"")) if alias[0].startswith("symbol:")]
    patterns, pattern_modules = builtin_aliases(scan.texts.get("modules.builtin.modinfo", b""))
    return TreeIndex(
        paths=list(sizes),
        sizes_bytes=list(sizes.values()),
        depends=depends,
        alias_patterns=[pattern for pattern, _ in aliases],
        alias_modules=[name for _, name in aliases],
        symbols=[symbol.removeprefix("symbol:") for symbol, _ in symbols],
        symbol_modules=[name for _, name in symbols],
        softdeps=_lines(scan.texts.get("modules.softdep", b"")),
        builtin=builtin_names(scan.texts.get("modules.builtin", b"")),
        builtin_alias_patterns=patterns,
        builtin_alias_modules=pattern_modules,
        outside=sorted({*scan.outside, *_outside(scan, list(sizes))}),
    )


def builtin_names(text: bytes) -> list[str]:
    """Names in ``modules.builtin``: one path on each line."""
    return list(dict.fromkeys(module_name(line) for line in _lines(text) if line[:1].isascii() and line[:1].isalpha()))


def builtin_aliases(text: bytes) -> tuple[list[str], list[str]]:
    """Alias patterns and their modules in ``modules.builtin.modinfo``: ``MODULE.KEY=VALUE``, each ended by a NUL."""
    patterns, modules = [], []
    for word in text.decode("utf-8", "surrogateescape").split("\0"):
        module, _, tag = word.partition(".")
        if module and tag.startswith("alias=") and len(tag) > len("alias="):
            patterns.append(tag[len("alias=") :])
            modules.append(module)
    return patterns, modules


def _lines(text: bytes) -> list[str]:
    """Split a text into lines, without comments and empty ones."""
    lines = text.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
    return [line for line in lines if line and line[0] != "#"]


def _aliases(text: bytes) -> list[tuple[str, str]]:
    """Pattern and module of each line ``alias PATTERN MODULE``; a pattern may have blanks, a module's name has none."""
    found = []
    for line in _lines(text):
        if line.startswith("alias "):
            pattern, _, module = line[len("alias ") :].rpartition(" ")
            if pattern and module:
                found.append((pattern, module))
    return found


def _size(scan: Scan, path: str) -> int:
    """Length of the file ``path``; -1 if there is none, or none that can be seen."""
    if path in scan.files:
        return scan.files[path].size_bytes
    try:
        return os.stat(os.path.join(scan.root, path)).st_size
    except (OSError, ValueError):
        return -1


def _outside(scan: Scan, paths: list[str]) -> list[str]:
    """Those of ``paths`` that lead out of the tree, be it by themselves or by a link."""
    root = os.path.realpath(scan.root)
    strange = [path for path in paths if path not in scan.files]
    return [path for path in strange if path.startswith("/") or target_inside(root, os.path.join(root, path)) is None]
