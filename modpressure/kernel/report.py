"""The text reports of /sys/kernel/debug/modules/, byte for byte.

``mainline`` is what ``read_file_mod_stats`` prints (kernel/module/stats.c, Linux 6.12); ``rfc`` is the layout of the
first patch series (March 2023), whose two kread rows showed the mod bytes as it was first posted (``rfc-as-posted``).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from modpressure.kernel.counters import Counters, FailedModule

KERNEL_BUFFER_BYTES = 1024
"""The kernel's buffer without any failed module (``MAX_PREAMBLE``)."""

KERNEL_BUFFER_ROW_BYTES = 64
"""What it adds for each failure (``MAX_BYTES_PER_MOD``), though a row takes 68 bytes or more."""

KERNEL_BUFFER_MAX_FAILURES = 112
"""The failures that it adds room for; rows stop before this one (``MAX_FAILED_MOD_PRINT``)."""


class ReportFormat(IntEnum):
    """Which text. The numbers are those of ``modpressure.v1.ReportFormat``."""

    RFC = 1
    RFC_AS_POSTED = 2
    MAINLINE = 3

    @property
    def word(self) -> str:
        """The name as people write it, such as ``rfc-as-posted``."""
        return self.name.lower().replace("_", "-")


def _row(label: str, value: int) -> str:
    return f"{label:>25}\t{value}\n"


def _average(total: int, count: int) -> int:
    """Round up, as the kernel's DIV_ROUND_UP does."""
    return -(-total // count)


def _averages(rows: Iterable[tuple[str, int, int]]) -> str:
    return "".join(_row(label, _average(total, count)) for label, total, count in rows if total and count)


def failed_row(module: FailedModule) -> str:
    """Return the row of the mainline report that says how often, and where, a name was a duplicate."""
    return f"{module.module:>25}\t{module.count:>15}\t{module.reason:>25}\n"


def rfc(counters: Counters, failed: Iterable[FailedModule], *, as_posted: bool = False) -> str:
    """Return the report of the first patch series; ``failed`` is newest name first."""
    kread_bytes = counters.invalid_mod_image_bytes if as_posted else counters.invalid_kread_bytes
    text = (
        _row("Modules loaded", counters.modcount)
        + _row("Total module size", counters.total_mod_size)
        + _row("Total mod text size", counters.total_text_size)
        + _row("Failed kread bytes", kread_bytes)
        + _row("Failed kmod bytes", counters.invalid_mod_image_bytes)
        + _row("Invalid kread bytes", kread_bytes)
        + _row("Invalid decompress bytes", counters.invalid_decompress_bytes)
        + _row("Invalid mod bytes", counters.invalid_mod_image_bytes)
        + _averages(
            (
                ("Average mod size", counters.total_mod_size, counters.modcount),
                ("Average mod text size", counters.total_text_size, counters.modcount),
            )
        )
    )
    names = "".join(f"{module.module:>25}\n" for module in failed)
    return text + ("Failed modules:\n" + names if names else "")


def mainline(counters: Counters, failed: Iterable[FailedModule], *, kernel_buffer: bool = False) -> str:
    """Return the report of Linux 6.4 and later; ``failed`` is newest name first.

    With ``kernel_buffer`` the text is cut where the kernel's buffer ends, possibly within a row, and the rows stop
    before the 112th; else all of it is returned.
    """
    text = (
        _row("Mods ever loaded", counters.modcount)
        + _row("Mods failed on kread", counters.failed_kreads)
        + _row("Mods failed on decompress", counters.failed_decompress)
        + _row("Mods failed on becoming", counters.failed_becoming)
        + _row("Mods failed on load", counters.failed_load_modules)
        + _row("Total module size", counters.total_mod_size)
        + _row("Total mod text size", counters.total_text_size)
        + _row("Failed kread bytes", counters.invalid_kread_bytes)
        + _row("Failed decompress bytes", counters.invalid_decompress_bytes)
        + _row("Failed becoming bytes", counters.invalid_becoming_bytes)
        + _row("Failed kmod bytes", counters.invalid_mod_bytes)
        + _row("Virtual mem wasted bytes", counters.virtual_mem_wasted_bytes)
        + _averages(
            (
                ("Average mod size", counters.total_mod_size, counters.modcount),
                ("Average mod text size", counters.total_text_size, counters.modcount),
                ("Avg fail kread bytes", counters.invalid_kread_bytes, counters.failed_kreads),
                ("Avg fail becoming bytes", counters.invalid_becoming_bytes, counters.failed_becoming),
                ("Avg fail decomp bytes", counters.invalid_decompress_bytes, counters.failed_decompress),
                ("Average fail load bytes", counters.invalid_mod_bytes, counters.failed_load_modules),
            )
        )
    )
    rows = [failed_row(module) for module in failed]
    if kernel_buffer:
        del rows[KERNEL_BUFFER_MAX_FAILURES - 1 :]
    if rows:
        header = f"{'Module-name':>25}\t{'How-many-times':>15}\t{'Reason':>25}\n"
        text += "Duplicate failed modules:\n" + header + "".join(rows)
    if not kernel_buffer:
        return text
    failures = min(counters.failed_becoming + counters.failed_load_modules, KERNEL_BUFFER_MAX_FAILURES)
    size = KERNEL_BUFFER_BYTES + KERNEL_BUFFER_ROW_BYTES * failures
    # Module names are ASCII, so characters are bytes.
    return text[: size - 1]


def report(
    report_format: ReportFormat, counters: Counters, failed: Iterable[FailedModule], *, kernel_buffer: bool = False
) -> str:
    """Return the text of one format; ``kernel_buffer`` matters to ``mainline`` alone."""
    if report_format is ReportFormat.MAINLINE:
        return mainline(counters, failed, kernel_buffer=kernel_buffer)
    return rfc(counters, failed, as_posted=report_format is ReportFormat.RFC_AS_POSTED)
