"""The binary indexes that kmod looks names up in: tries of names with their values (kmod 30, libkmod-index.c).

A file begins with a magic number, a version and where the root is; all numbers are 32 bits, big-endian. Children come
before their parent. The upper bits of a node's offset say which of its parts follow: a prefix, children, values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

_MAGIC = 0xB007F457
_VERSION = 2 << 16 | 1
_PREFIX, _VALUES, _CHILDREN = 0x80000000, 0x40000000, 0x20000000

Entry = tuple[str, str, int]
"""A name, its value, and the value's priority: values of one name come in its order."""


def index_file(entries: Iterable[Entry]) -> bytes:
    """Write an index. Of values with one name and priority the last one comes first, as depmod writes them."""
    ordered: dict[str, list[tuple[int, str]]] = {}
    for name, value, priority in entries:
        if not name.isascii():
            continue  # kmod has no place for such a name
        values = ordered.setdefault(name, [])
        place = next((i for i, (other, _) in enumerate(values) if other >= priority), len(values))
        values.insert(place, (priority, value))
    out = bytearray(12)
    root = _write(out, sorted(ordered.items()), 0, is_root=True)
    out[:12] = struct.pack(">III", _MAGIC, _VERSION, root)
    return bytes(out)


def _write(
    out: bytearray, names: Sequence[tuple[str, list[tuple[int, str]]]], skip: int, *, is_root: bool = False
) -> int:
    """Write the node of all ``names``, whose first ``skip`` characters lead to it; its offset, with the bits."""
    # The names are sorted: what the first and the last have in common, all have. depmod gives the root no prefix.
    prefix = "" if is_root else _common_prefix(names[0][0], names[-1][0])[skip:]
    depth = skip + len(prefix)
    own = names[0][1] if names and len(names[0][0]) == depth else []
    branches: dict[int, list[tuple[str, list[tuple[int, str]]]]] = {}
    for item in names[1:] if own else names:
        branches.setdefault(ord(item[0][depth]), []).append(item)
    children = {letter: _write(out, branch, depth + 1) for letter, branch in branches.items()}
    offset = len(out)
    if prefix:
        out += prefix.encode("ascii") + b"\0"
        offset |= _PREFIX
    if children:
        first, last = min(children), max(children)
        out += bytes((first, last))
        out += b"".join(struct.pack(">I", children.get(letter, 0)) for letter in range(first, last + 1))
        offset |= _CHILDREN
    if own:
        out += struct.pack(">I", len(own))
        for priority, value in own:
            out += struct.pack(">I", priority) + value.encode() + b"\0"
        offset |= _VALUES
    return offset


def _common_prefix(one: str, other: str) -> str:
    """Return what both begin with."""
    length = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return one[:length]
