"""The memory that this process may use: the machine's, or less where a control group says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory, or the least limit of the control groups that this process is in; bytes.

    Reads memory.max of control groups v2, and memory.limit_in_bytes of v1, of the process's own group and of each
    above it (cgroups(7)). ``root`` is where proc and sys are looked for.
    """
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical_bytes, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    for directory, name in _groups(root):
        try:
            text = (directory / name).read_text().strip()
        except OSError:
            continue  # The top group has no limit file, and a container may not see its own path.
        if text.isdecimal():  # v2 says "max" for none, v1 a number beyond all memory
            yield int(text)


def _groups(root: Path) -> Iterator[tuple[Path, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            top, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # Within a container the path may be the host's while the mount begins at the container's own group: both the
        # path below the mount and the mount itself are looked at.
        for part in (group, *group.parents):
            yield top / part, name
