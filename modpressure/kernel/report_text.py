"""Reading the text of /sys/kernel/debug/modules/stats back: the counters in it, its rows, and where it was cut."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.report import failed_row, mainline

_COUNTERS: Final = {
    "Mods ever loaded": "modcount",
    "Mods failed on kread": "failed_kreads",
    "Mods failed on decompress": "failed_decompress",
    "Mods failed on becoming": "failed_becoming",
    "Mods failed on load": "failed_load_modules",
    "Total module size": "total_mod_size",
    "Total mod text size": "total_text_size",
    "Failed kread bytes": "invalid_kread_bytes",
    "Failed decompress bytes": "invalid_decompress_bytes",
    "Failed becoming bytes": "invalid_becoming_bytes",
    "Failed kmod bytes": "invalid_mod_bytes",
}

_HEADING: Final = "Duplicate failed modules:\n"
_ROW: Final = re.compile(r" *(\S+)\t *(\d{1,20})\t *(Becoming & Load|Becoming|Load)\n", re.ASCII)
_CUT: Final = re.compile(r" *\S*(\t *(\d{0,20}|\d{1,20}\t *[A-Za-z& ]*))?", re.ASCII)
_NUMBER: Final = re.compile(r"\d{1,20}", re.ASCII)
"""A 64-bit number has 20 digits at most."""
_NAME_WIDTH: Final = 25
_COUNT_WIDTH: Final = 15


class ReportTextError(ValueError):
    """A text that is no such report; one sentence that names the line."""


@dataclass(frozen=True, slots=True)
class MainlineText:
    """What a text says."""

    counters: Counters
    failed: list[FailedModule] = field(default_factory=list)
    """Its whole rows, in its order."""

    cut: str = ""
    """The beginning of the row that the kernel's buffer cut in two; empty if it did not."""

    def render(self) -> str:
        """Return the text that a kernel with these counters prints."""
        # Of the row that was cut, its beginning is known, and that is all of it that the buffer will hold.
        rest = [_completed(self.cut)] if self.cut else []
        return mainline(self.counters, [*self.failed, *rest], kernel_buffer=True)


def parse_mainline(text: str) -> MainlineText:
    """Read a report of Linux 6.4 and later, as a kernel printed it. ReportTextError if it is none."""
    preamble, heading, rows = text.partition(_HEADING)
    counters = Counters()
    values: dict[str, int] = {}
    for line in preamble.splitlines():
        label, tab, value = line.partition("\t")
        if not tab or not _NUMBER.fullmatch(value):
            raise ReportTextError(f"the line {line[:80]!r} is no row of a report")
        values[label.strip()] = int(value)
    for label, name in _COUNTERS.items():
        if label not in values:
            raise ReportTextError(f"the report lacks the row {label!r}")
        setattr(counters, name, values[label])
    failed, at = [], rows.find("\n") + 1
    while match := _ROW.match(rows, at):
        name, count, reason = match[1], int(match[2]), match[3]
        in_load = {"Becoming": 0, "Load": count}.get(reason, 1)
        failed.append(FailedModule(name, count - in_load, in_load))
        at = match.end()
    cut = rows[at:] if heading else ""
    if not _CUT.fullmatch(cut):
        raise ReportTextError(f"the line {cut.partition(chr(10))[0][:80]!r} is no row of a failed module")
    return MainlineText(counters, failed, cut)


def _completed(cut: str) -> FailedModule:
    """Return a module whose row begins with ``cut``."""
    name, tab, rest = cut.partition("\t")
    if not tab:
        return FailedModule(name.lstrip().ljust(_NAME_WIDTH - (len(name) - len(name.lstrip())), "?"), 1)
    count, tab, _ = rest.partition("\t")
    digits = count.lstrip()
    if not tab:
        # Right-aligned as well: what is missing are its last digits.
        return FailedModule(name.lstrip(), int(digits.ljust(_COUNT_WIDTH - (len(count) - len(digits)), "1") or "1"))
    number = int(digits)
    # The reason may be cut before its first letter: then the blanks before it say which ones it can't be.
    candidates = [FailedModule(name.lstrip(), number - late, late) for late in (0, min(1, number - 1), number)]
    return next((each for each in candidates if failed_row(each).startswith(cut)), candidates[0])
