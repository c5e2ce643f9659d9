"""Look for what must not be in the repository; each hit is one line, FILE:LINE: why: text.

Run as ``python scripts/check_words.py``, in a git work tree; exits 1 if there is a hit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

# "[.]" for a dot, so that this file is not a hit of its own.
_RULES: Final = (
    (
        # Which index or mirror packages come from is for each machine's own configuration to say.
        "host name of a package registry",
        re.compile(
            r"\b(pypi[.]org|pythonhosted[.]org|(proxy|sum)[.]golang[.]org|crates[.]io|npmjs[.](org|com)"
            r"|(docker|ghcr|quay|gcr)[.]io|(deb|security|snapshot)[.]debian[.]org)\b"
        ),
        (),
    ),
    (
        "path that only one machine has",
        re.compile(r"(?<![\w.$})*-])/(work|root|home/\w+|Users/\w+|tmp/scratch)/"),
        (),
    ),
    (
        # A clone stands alone: only tests, which then skip, and the Makefile may look beside it.
        "mention of what lies beside the repository",
        re.compile(r"[.][.]/shared\b"),
        ("tests/", "Makefile"),
    ),
)


def tracked_files(root: Path) -> list[str]:
    """Return the files that git tracks under ``root``, relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    return [name for name in listed.stdout.decode().split("\0") if name]


def hits(root: Path, name: str) -> Iterator[str]:
    """Yield a line for each hit in the file ``name`` under ``root``; links and what is no text are passed over."""
    path = root / name
    if path.is_symlink() or not path.is_file():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        for why, pattern, allowed in _RULES:
            if pattern.search(line) and not name.startswith(allowed):
                yield f"{name}:{number}: {why}: {line.strip()[:120]}"


def main() -> int:
    """Check all tracked files; print the hits and return the exit code."""
    found = [hit for name in tracked_files(ROOT) for hit in hits(ROOT, name)]
    for hit in found:
        print(hit)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
