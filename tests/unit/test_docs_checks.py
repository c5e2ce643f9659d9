"""docs/checks.md has every check that an event may name."""

import re
from pathlib import Path

import loader_svc

ROOT = Path(loader_svc.__file__).parents[1]

PATTERNS = {
    # What the source says, and what is before that in an event.
    r'Failure\(\s*"E[A-Z]+", "([^"]+)"': "",
    r'Failure\((?:result\.)?errno, "([^"]+)"': "",
    r'ImageError\(\s*"E[A-Z]+", "([^"]+)"': "",
    r'\b_refused\("([^"]+)"': "elf: ",
    r'\brefused\("([^"]+)"': "decompress: ",
    r'_malformed\("([^"]+)"': "signature: ",
    r'Ending\([\w.]+, [\w.]+, "([^"]+)"': "",
    r'check = "(symbols: [^"]+)"(?: if .* else "(symbols: [^"]+)")?': "",
    r'"(\w+)" if duplicate else "(\w+)"': "",
}
NOT_IN_EVENTS = {"kread"}
"""What only describing a file says, without a call."""


def named_in_source() -> set[str]:
    found = set()
    for directory in ("checks", "image", "virtual"):
        for path in (ROOT / "loader_svc" / directory).glob("*.py"):
            found |= named_in(path)
    for name in ("live", "pipeline", "plan"):
        found |= named_in(ROOT / "loader_svc" / f"{name}.py")
    return found - NOT_IN_EVENTS


def named_in(path: Path) -> set[str]:
    text = path.read_text()
    return {
        prefix + name
        for pattern, prefix in PATTERNS.items()
        for groups in re.findall(pattern, text)
        for name in ([groups] if isinstance(groups, str) else groups)
        if name
    }


def test_every_check_is_documented_and_every_documented_one_is_there() -> None:
    text = (ROOT / "docs" / "checks.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    documented = {name for row in rows for name in re.findall("`([^`]+)`", row[1])}
    named = named_in_source()
    assert len(named) > 60
    assert named - {"simulation"} == documented - {"kread: regular file"}
    assert "kread: regular file" in documented
