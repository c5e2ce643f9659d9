"""Texts of /sys/kernel/debug/modules/stats: read, rebuilt from what they say, and compared byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loader_svc.verify.agreement import Agreement, read_text
from modpressure.errors import BadRequest
from modpressure.kernel.report_text import ReportTextError, parse_mainline


def verify_stats(paths: Sequence[Path]) -> Agreement:
    """Rebuild each text, of files or of all files ``*.txt`` in directories. NotFound, BadRequest."""
    agreement = Agreement()
    files = [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    if not files:
        raise BadRequest(f"there is no text in {', '.join(map(str, paths))}")
    for file in files:
        measured = read_text(file)
        try:
            rebuilt = parse_mainline(measured).render()
        except ReportTextError as error:
            agreement.add(file.name, [str(error)])
            continue
        agreement.add(file.name, [] if rebuilt == measured else [_first_difference(measured, rebuilt)])
    return agreement


def _first_difference(measured: str, rebuilt: str) -> str:
    pairs = zip(measured, rebuilt, strict=False)
    at = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(measured), len(rebuilt)))
    return f"at byte {at} measured {measured[at : at + 40]!r}, rebuilt {rebuilt[at : at + 40]!r}"
