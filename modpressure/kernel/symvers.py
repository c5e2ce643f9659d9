"""Module.symvers: what a kernel and its modules export, as the kernel's build writes it.

A line has the CRC, the symbol, where it is (``vmlinux`` or a module's path), the kind of export and, from Linux 5.4 on,
a namespace, separated by tabs (Documentation/kbuild/modules.rst).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from modpressure.kernel.identity import ExportedSymbol

KERNEL: Final = "vmlinux"
"""What stands for the kernel itself where a module's path would be."""

_KINDS: Final = {"EXPORT_SYMBOL": False, "EXPORT_SYMBOL_GPL": True}
_UNUSED_SUFFIX: Final = "_FUTURE"


class SymversError(ValueError):
    """A text that is no Module.symvers; one sentence that names the line."""


def parse_symvers(lines: Iterable[str], *, where: str = KERNEL) -> dict[str, ExportedSymbol]:
    """Return the symbols that ``where`` exports. SymversError for a line that can't be understood.

    A CRC of 0 in every line is what a build without symbol versions writes: then no symbol has one.
    """
    symbols = {name: symbol for name, place, symbol in _entries(lines) if place == where}
    if not any(symbol.crc for symbol in symbols.values()):
        return {name: symbol._replace(crc=None) for name, symbol in symbols.items()}
    return symbols


def render_symvers(symbols: Mapping[str, ExportedSymbol]) -> str:
    """Return the text that ``parse_symvers`` reads, for symbols of the kernel itself."""
    return "".join(
        f"{symbol.crc or 0:#010x}\t{name}\t{KERNEL}\t{'EXPORT_SYMBOL_GPL' if symbol.gpl_only else 'EXPORT_SYMBOL'}"
        f"\t{symbol.namespace}\n"
        for name, symbol in symbols.items()
    )


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, str, ExportedSymbol]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.rstrip("\n").split("\t")
        try:
            crc, name, place, kind, *rest = fields
            gpl_only = _KINDS[kind.removesuffix(_UNUSED_SUFFIX)]
            symbol = ExportedSymbol(int(crc, 16), gpl_only, rest[0] if rest else "")
        except (ValueError, KeyError):
            raise SymversError(f"line {number} of the symbol versions can't be read: {line.strip()[:120]!r}") from None
        yield name, place, symbol
