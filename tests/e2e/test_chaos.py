"""``make chaos`` finds what it is there to find; that there is nothing else to find it says itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mutant", "faults"),
    # Those that it takes, so that it does not take long; among all others they come less often.
    [
        ("early_answer", ("full disk", "kill stats_svc")),
        ("no_sequence_check", ("cut loader-stats_svc", "cut in answer loader-stats_svc")),
    ],
)
def test_a_mutant_is_caught(mutant: str, faults: tuple[str, ...], tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "chaos", "--database", "sqlite", "--rounds", "100", "--stop-at-first"),
            *("--seed", "1", "--evidence", str(tmp_path / "evidence")),
            *(text for fault in faults for text in ("--fault", fault)),
            *("--stats-command", f"{sys.executable} -m tests.mutants.{mutant}"),
        ],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    # What was lost may be asked for again, what is there twice may have been answered once, and where an event was lost
    # another one may have its place: then what was answered is not what is there.
    found = re.search(r"^(wrong|lost|doubled) [1-9]\d*$", ended.stdout, re.MULTILINE)
    assert found, ended.stdout + ended.stderr
    evidence = "".join(file.read_text() for file in (tmp_path / "evidence").iterdir())
    assert f"\n{found[1]}: " in evidence
