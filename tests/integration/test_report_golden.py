"""Texts of /sys/kernel/debug/modules/stats as real kernels printed them, rebuilt from what they say.

Read here by a few lines of this test's own, so that a mistake in the project's reader can't hide one in its writer.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.report import mainline

# The order of the first rows: read_file_mod_stats, kernel/module/stats.c. The twelfth is their sum.
ROWS = (
    "modcount", "failed_kreads", "failed_decompress", "failed_becoming", "failed_load_modules", "total_mod_size",
    "total_text_size", "invalid_kread_bytes", "invalid_decompress_bytes", "invalid_becoming_bytes",
    "invalid_mod_bytes",
)  # fmt: skip


@pytest.fixture(scope="session")
def texts(shared_dir: Path) -> dict[str, str]:
    found = {path.name: path.read_text() for path in sorted((shared_dir / "data/golden/stats").glob("*.txt"))}
    assert len(found) >= 90
    return found


def rebuilt(text: str) -> tuple[str, str]:
    """Return the text that follows from the counters and rows of ``text``, and the part of a row that it ends with."""
    preamble, _, rows = text.partition("Duplicate failed modules:\n")
    values = [int(line.split("\t")[1]) for line in preamble.splitlines()]
    counters = Counters(**dict(zip(ROWS, values, strict=False)))
    failed = []
    for name, count, reason in re.findall(r"^ *(\S+)\t *(\d+)\t *(Becoming & Load|Becoming|Load)$", rows, re.MULTILINE):
        becoming = {"Becoming": int(count), "Load": 0}.get(reason, 1)
        failed.append(FailedModule(name, becoming, int(count) - becoming))
    cut = "" if text.endswith("\n") else rows.rpartition("\n")[2]
    if cut:
        # Any name that goes on as this one: the buffer takes no more of it.
        name, tab, _ = cut.partition("\t")
        failed.append(FailedModule(name.strip() if tab else name.strip() + "x" * (25 - len(name)), becoming_count=1))
    return mainline(counters, failed, kernel_buffer=True), cut


def test_every_text_is_rebuilt_to_the_byte(texts: dict[str, str]) -> None:
    differing = [name for name, text in texts.items() if rebuilt(text)[0] != text]
    assert differing == []


def test_some_of_them_are_cut_in_the_middle_of_a_row(texts: dict[str, str]) -> None:
    cut = {name: part for name, text in texts.items() if (part := rebuilt(text)[1])}
    assert len(cut) >= 2
    assert any("\t" not in part for part in cut.values())
