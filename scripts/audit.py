"""Ask for known vulnerabilities of what is locked, by pip-audit: ``python scripts/audit.py``.

Exits 0 if none is known, 1 if one is, 2 if that could not be found out for every package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = "requirements.lock"


def main() -> int:
    """Audit the lock and say what came out."""
    # The lock has hashes and all that is needed: nothing is to be resolved or installed.
    command = ["-r", LOCK, "--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    ended = subprocess.run(
        [sys.executable, "-m", "pip_audit", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        packages = json.loads(ended.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"pip-audit could not reach its service: {last}", file=sys.stderr)
        return 2
    audited = [package for package in packages if "skip_reason" not in package]
    found = [(package, vulnerability) for package in audited for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    if found:
        return 1
    if len(audited) < len(packages):
        missing = len(packages) - len(audited)
        print(
            f"pip-audit's service answered nothing about {missing} of {len(packages)} packages; run it where the "
            "package index tells of vulnerabilities",
            file=sys.stderr,
        )
        return 2
    print(f"no vulnerability is known of {len(audited)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
