"""How much a module's parameters take: elements of an array, bytes of a string; what ``__param`` says of them.

Sources: ``struct kernel_param``, ``kparam_array`` and ``kparam_string`` in include/linux/moduleparam.h, Linux 6.12,
x86-64. Modinfo has the type of an array's elements only, and no length of a string. The entries of ``__param`` are all
relocations: to the name, to the operations, which are ``param_array_ops`` of an array and ``param_ops_string`` of a
string, and to the description of either, which begins with the limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, Final

from loader_svc.image.symbols import SHT_RELA

if TYPE_CHECKING:
    from loader_svc.image.elf import ElfImage

PARAM_BYTES: Final = 40
_NAME: Final = 0
_OPS: Final = 16
_DESCRIPTION: Final = 32
"""Offsets of the fields ``name``, ``ops`` and ``arr`` or ``str`` in an entry."""

_LIMITED_OPS: Final = frozenset({b"param_array_ops", b"param_ops_string"})
_RELA: Final = Struct("<QIIq")
_LIMIT_BYTES: Final = 4
_LONGEST_NAME: Final = 256

MAX_LIMIT: Final = 1 << 16
"""A limit beyond is none: it was not read from a description, or is longer than any text for it."""

_MOST_ENTRIES: Final = 10_000

Target = tuple[int, int]
"""A relocation's symbol and addend."""


def parameter_limits(elf: ElfImage) -> dict[str, int]:
    """Return by name how many elements each array takes at most, and how many bytes, its NUL included, each string.

    What is not to be found is left out.
    """
    targets = _relocations(elf)
    limits: dict[str, int] = {}
    for base in sorted({offset - offset % PARAM_BYTES for offset in targets}):
        ops, name, limit = (targets.get(base + field) for field in (_OPS, _NAME, _DESCRIPTION))
        if ops is None or name is None or limit is None or not _is_limited(elf, ops):
            continue
        most = int.from_bytes(_at(elf, limit)[:_LIMIT_BYTES], "little")
        text = _at(elf, name).partition(b"\0")[0]
        if 0 < most <= MAX_LIMIT and text.isascii():
            limits[text.decode()] = most
    return limits


def _is_limited(elf: ElfImage, ops: Target) -> bool:
    symbol = elf.symbols.symbol(ops[0])
    return symbol is not None and elf.symbols.name(symbol[0]) in _LIMITED_OPS


def _relocations(elf: ElfImage) -> Mapping[int, Target]:
    """Return the relocations of ``__param`` by their offsets."""
    index = elf.find_section(b"__param")
    section = next((i for i, s in enumerate(elf.sections) if s.sh_type == SHT_RELA and index and s.sh_info == index), 0)
    if not section:
        return {}
    data = elf.section_data(section)[: _MOST_ENTRIES * 3 * _RELA.size]
    data = data[: len(data) - len(data) % _RELA.size]
    return {offset: (symbol, addend) for offset, _, symbol, addend in _RELA.iter_unpack(data)}


def _at(elf: ElfImage, target: Target) -> bytes:
    """Return what the image has where a relocation points to, as much as a name may take; empty for nowhere."""
    symbol = elf.symbols.symbol(target[0])
    if symbol is None or not 0 < symbol[3] < len(elf.sections):
        return b""
    offset = symbol[4] + target[1]
    if offset < 0:
        return b""
    return bytes(elf.section_data(symbol[3])[offset : offset + _LONGEST_NAME])
