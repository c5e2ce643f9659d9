"""What is remembered of a file."""

from __future__ import annotations

import os
from pathlib import Path

from loader_svc.plan import FileVersion


def version_of(path: Path) -> FileVersion:
    fd = os.open(path, os.O_RDONLY)
    try:
        return FileVersion.of(fd)
    finally:
        os.close(fd)


def test_other_bytes_with_the_old_time_are_another_version(tmp_path: Path) -> None:
    path = tmp_path / "x.ko"
    path.write_bytes(b"a" * 100)
    before, status = version_of(path), path.stat()
    with path.open("r+b") as file:
        file.write(b"b" * 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert version_of(path) != before
