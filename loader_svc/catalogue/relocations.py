"""Relocations of a module: as many of each type as in the real one, each at a place of its own, none out of bounds.

The kernel wants the bytes that it relocates to be zero (arch/x86/kernel/module.c, 6.12), so contents are cleared there.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loader_svc.catalogue.module_facts import ModuleFacts, Section
from loader_svc.catalogue.symbol_table import FactsContradiction, SymbolTable

ENTRY = struct.Struct("<QQq")  # Elf64_Rela, elf(5)
TYPES = {"64": 1, "PC32": 2, "PLT32": 4, "32": 10, "32S": 11, "PC64": 24}  # System V ABI, AMD64 supplement
_WIDTHS_BYTES = {"64": 8, "PC64": 8}
_ADDEND_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Relocation:
    """One whose place and target are known."""

    offset: int
    type: str
    symbol: int
    addend: int = 0


def packed(relocations: Sequence[Relocation]) -> bytes:
    """Contents of a ``.rela`` section."""
    return b"".join(
        ENTRY.pack(entry.offset, entry.symbol << 32 | TYPES[entry.type], entry.addend) for entry in relocations
    )


class Relocator:
    """Makes relocations against the sections of one module."""

    def __init__(self, facts: ModuleFacts, symbols: SymbolTable) -> None:
        self._name = facts.name
        self._imports = [symbols.named[wanted.name] for wanted in facts.imports if wanted.versioned]
        self._kept: dict[str, list[tuple[int, int]]] = {}
        for parameter in facts.parameters:
            name, offset = parameter.name_place
            self._kept.setdefault(name, []).append((offset, offset + len(parameter.name) + 1))
        placed = [s for s in facts.sections if s.has_symbol and "A" in s.flags and s.size_bytes]
        self._code = [(symbols.of_section[s.name][0], s.size_bytes) for s in placed if "X" in s.flags]
        self._data = [(symbols.of_section[s.name][0], s.size_bytes) for s in placed if "X" not in s.flags]

    def relocate(self, section: Section, contents: bytearray) -> bytes:
        """Spread the section's relocations over its ``contents``, which are cleared there; contents of its ``.rela``.

        `FactsContradiction` if they have no room.
        """
        types = _spread(section.relocations)
        widths = [_WIDTHS_BYTES.get(kind, 4) for kind in types]
        offsets = self._offsets(section, widths)
        if section.name in self._kept:
            offsets = self._around(section, offsets, widths)
        for offset, width in zip(offsets, widths, strict=True):
            contents[offset : offset + width] = bytes(width)
        count = len(types)
        targets = self._targets(section, types)
        entries = array("Q", bytes(ENTRY.size * count))
        entries[0::3] = array("Q", offsets)
        entries[1::3] = array("Q", [target[0] << 32 | TYPES[kind] for target, kind in zip(targets, types, strict=True)])
        entries[2::3] = array("Q", [target[1] & _ADDEND_MASK for target in targets])
        if sys.byteorder == "big":
            entries.byteswap()
        return entries.tobytes()

    def _offsets(self, section: Section, widths: list[int]) -> list[int]:
        """Places in ascending order, evenly spread, at multiples of 8 or 4 where all are that wide in data."""
        count = len(widths)
        slack = section.size_bytes - sum(widths)
        if slack < 0:
            raise FactsContradiction(f"{self._name}: {count} relocations have no room in {section.name}")
        unit = 1 if "X" in section.flags or section.align_bytes < 4 else min(widths)
        steps = slack // unit
        before = accumulate(widths[:-1], initial=0)
        return [start + unit * (steps * place // count) for place, start in enumerate(before)]

    def _around(self, section: Section, offsets: list[int], widths: list[int]) -> list[int]:
        """Move relocations behind the parameters' names where they would lie in one."""
        kept = sorted(self._kept[section.name])
        for wanted in (offsets, [0] * len(offsets)):  # where evenly spread ones don't fit, close together ones may
            moved: list[int] = []
            free, following = 0, iter(kept)
            start, end = next(following, (section.size_bytes, section.size_bytes))
            for offset, width in zip(wanted, widths, strict=True):
                at = max(free, offset)
                while at + width > start:
                    at = max(at, end)
                    if start == section.size_bytes:
                        break
                    start, end = next(following, (section.size_bytes, section.size_bytes))
                moved.append(at)
                free = at + width
            if free <= section.size_bytes:
                return moved
        raise FactsContradiction(f"{self._name}: relocations have no room beside the names in {section.name}")

    def _targets(self, section: Section, types: list[str]) -> list[tuple[int, int]]:
        """Symbol and addend of each: calls go to imports, code refers to data, and everything else to code."""
        calls, data, code = self._imports, self._data or self._code, self._code or self._data
        count = len(types)
        in_code = "X" in section.flags
        near = self._spot(data if in_code else code, count, -4 if in_code else 0)
        if not in_code or not calls:
            return [near(place) for place in range(count)]
        return [
            (calls[place * len(calls) // count], -4) if kind == "PLT32" else near(place)
            for place, kind in enumerate(types)
        ]

    @staticmethod
    def _spot(sections: list[tuple[int, int]], count: int, bias: int) -> Callable[[int], tuple[int, int]]:
        """Make a function from a relocation's place among ``count`` to a spot in one of ``sections``."""
        if not sections:
            return lambda place: (0, 0)

        def spot(place: int) -> tuple[int, int]:
            symbol, size_bytes = sections[place * len(sections) // count]
            return symbol, place * 8 % size_bytes + bias

        return spot


def _spread(counts: tuple[tuple[str, int], ...]) -> list[str]:
    """All types as often as they are, each evenly among the others."""
    if len(counts) == 1:
        return [counts[0][0]] * counts[0][1]
    spread = [((place + 0.5) / count, kind) for kind, count in counts for place in range(count)]
    return [kind for _, kind in sorted(spread)]
