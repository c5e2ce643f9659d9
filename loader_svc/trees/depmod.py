"""Index a tree from its files alone: what depmod would write into ``modules.*``.

The rules are those of kmod 30's depmod: which of several files of a name counts, the order of the modules, who depends
on whom through symbols, and the order of a module's dependencies. That order decides in which order modprobe loads
them, so it is followed to the tie. Where depmod gives up (a cycle) or goes by the order of a directory's entries, the
result here is the same for every copy of a tree.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loader_svc.trees.confine import open_inside
from loader_svc.trees.errors import TreeError
from loader_svc.trees.facts import NO_FACTS, ModuleFacts, facts_of
from loader_svc.trees.index import TreeIndex
from loader_svc.trees.names import compression, module_name
from loader_svc.trees.scan import ModuleFile, Scan
from loader_svc.trees.texts import builtin_aliases, builtin_names

_HASH_BUCKETS = 512
_UINT32 = 0xFFFFFFFF


def index_files(scan: Scan) -> TreeIndex:
    """Read every module file of ``scan`` and work out the index. Files that are no modules count by their name only."""
    files = _in_order(_chosen(scan.files), scan.texts.get("modules.order", b""))
    facts = _read_all(scan.root, files)
    names = [module_name(file.path) for file in files]
    owners: dict[bytes, int] = {}
    for place, fact in enumerate(facts):
        owners.update(dict.fromkeys(fact.exports, place))
    wanted = [_wanted(fact, place, owners) for place, fact in enumerate(facts)]
    patterns, pattern_modules = builtin_aliases(scan.texts.get("modules.builtin.modinfo", b""))
    return TreeIndex(
        paths=[file.path for file in files],
        sizes_bytes=[file.size_bytes for file in files],
        depends=_all_needed(wanted),
        alias_patterns=[alias for fact in facts for alias in fact.aliases],
        alias_modules=[name for name, fact in zip(names, facts, strict=True) for _ in fact.aliases],
        symbols=[symbol.decode("utf-8", "surrogateescape") for symbol in owners],
        symbol_modules=[names[place] for place in owners.values()],
        softdeps=[
            f"softdep {name} {softdep}" for name, fact in zip(names, facts, strict=True) for softdep in fact.softdeps
        ],
        builtin=builtin_names(scan.texts.get("modules.builtin", b"")),
        builtin_alias_patterns=patterns,
        builtin_alias_modules=pattern_modules,
        outside=sorted(scan.outside),
    )


def _chosen(files: dict[str, ModuleFile]) -> list[ModuleFile]:
    """One file for each name: one below ``updates`` before others, a file before a link, else the first by path."""
    best: dict[str, tuple[bool, bool, str]] = {}
    for path, file in files.items():
        name = module_name(path)
        rank = (not path.startswith("updates/"), file.is_link, path)
        if name and (name not in best or rank < best[name]):
            best[name] = rank
    return [files[path] for _, _, path in best.values()]


def _in_order(files: list[ModuleFile], order: bytes) -> list[ModuleFile]:
    """Sort as ``modules.order`` does, the others behind; these, and all without that text, as depmod's hash does."""
    hashed = sorted(files, key=lambda file: _hash_place(os.fsencode(module_name(file.path))))
    if not order.endswith(b"\n"):  # depmod takes a text cut short for a broken one
        return hashed
    places = {line: place for place, line in enumerate(order.decode("utf-8", "surrogateescape").split("\n")[:-1])}
    return sorted(hashed, key=lambda file: places.get(_order_key(file.path), len(order)))


def _order_key(path: str) -> str:
    """Say how ``modules.order`` would call ``path``: without the suffix of its compression."""
    return path[: path.rfind("/") + 1 + len(module_name(path)) + len(".ko")]


def _hash_place(name: bytes) -> tuple[int, bytes]:
    """Where depmod's hash table of names has ``name``: its bucket, in which names are sorted.

    The function is Paul Hsieh's SuperFastHash on 512 buckets. With no ``modules.order``, this is the modules' order.
    """
    value = len(name)
    whole = len(name) & ~3
    for at in range(0, whole, 4):
        value = (value + int.from_bytes(name[at : at + 2], "little")) & _UINT32
        mixed = (int.from_bytes(name[at + 2 : at + 4], "little") << 11) ^ value
        value = ((value << 16) ^ mixed) & _UINT32
        value = (value + (value >> 11)) & _UINT32
    rest = name[whole:]
    if len(rest) == 3:
        value = (value + int.from_bytes(rest[:2], "little")) & _UINT32
        value ^= value << 16
        value = (value ^ (_signed(rest[2]) << 18)) & _UINT32
        value += value >> 11
    elif len(rest) == 2:
        value = (value + int.from_bytes(rest, "little")) & _UINT32
        value = (value ^ (value << 11)) & _UINT32
        value += value >> 17
    elif rest:
        value = (value + _signed(rest[0])) & _UINT32
        value = (value ^ (value << 10)) & _UINT32
        value += value >> 1
    for left, right in ((3, 5), (4, 17), (25, 6)):
        value = (value ^ (value << left)) & _UINT32
        value = (value + (value >> right)) & _UINT32
    return value % _HASH_BUCKETS, name


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _read_all(root: Path, files: list[ModuleFile]) -> list[ModuleFacts]:
    """Read the facts of all files, in the same order."""
    directory = str(root)

    def read(file: ModuleFile) -> ModuleFacts:
        packing = compression(file.path) or ""
        if not file.is_link:
            return facts_of(f"{directory}/{file.path}", packing)
        try:
            fd = open_inside(root, file.path)
        except TreeError:
            return NO_FACTS
        try:
            return facts_of(fd, packing)
        finally:
            os.close(fd)

    # Unpacking is most of the work where there is any, and runs without the interpreter's lock; the rest doesn't.
    if not any(compression(file.path) for file in files):
        return [read(file) for file in files]
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="index") as pool:
        return list(pool.map(read, files))


def _wanted(facts: ModuleFacts, own_place: int, owners: dict[bytes, int]) -> list[int]:
    """Places of the other modules that give what this one wants, each once, in the order of first mention."""
    # PowerPC's functions have a dot in front that the exported name lacks.
    found = dict.fromkeys([owners.get(name[1:] if name[0] == ord(".") else name) for name in facts.imports])
    found.pop(None, None)
    found.pop(own_place, None)
    return [place for place in found if place is not None]


def _all_needed(wanted: list[list[int]]) -> list[list[int]]:
    """For each module everything it needs, directly or not, by topological order: who is needed comes behind."""
    ranks = _topological_ranks(wanted)
    needed: list[set[int]] = [set() for _ in wanted]
    for place in sorted(range(len(wanted)), key=ranks.__getitem__, reverse=True):
        for other in wanted[place]:
            needed[place].add(other)
            needed[place] |= needed[other]
        needed[place].discard(place)  # of a cycle
    return [sorted(places, key=ranks.__getitem__) for places in needed]


def _topological_ranks(wanted: list[list[int]]) -> list[int]:
    """Rank of each module, lower than the ranks of all that it needs; modules of cycles come last, in their order."""
    users = [0] * len(wanted)
    for line in wanted:
        for place in line:
            users[place] += 1
    free = [place for place, count in enumerate(users) if not count]
    ranks = [-1] * len(wanted)
    rank = 0
    while free:
        place = free.pop()
        ranks[place] = rank
        rank += 1
        for other in wanted[place]:
            users[other] -= 1
            if not users[other]:
                free.append(other)
    for place, known in enumerate(ranks):
        if known < 0:
            ranks[place] = rank
            rank += 1
    return ranks
