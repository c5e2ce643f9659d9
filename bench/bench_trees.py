"""Indexing a whole Debian kernel's tree, from its files alone and from the cache, against depmod on the same files.

Both read every module file and work out who needs whom; depmod also writes its texts, the index its cache. Two trees if
apt knows them: one with plain files, one with packed ones, where unpacking is nearly all there is to it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.table import Row, table
from loader_svc.trees import open_tree
from loader_svc.trees.debian import DebianKernel, DebianUnavailable, fetch_debian, kernel_packages
from loader_svc.trees.names import compression

ROUNDS = {"plain": 5, "packed": 3}
FILES_BOUND = 6.0
CACHE_BOUND = 1.0


def run() -> list[Row]:
    """Measure; no rows, and a line that says why, where there is no depmod or no Debian kernel to be had."""
    depmod = shutil.which("depmod", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if depmod is None:
        print("trees: skipped, depmod is not installed", file=sys.stderr)
        return []
    try:
        return [row for kind, kernel in _kernels().items() for row in _measure(kind, kernel, depmod)]
    except DebianUnavailable as error:
        print(f"trees: skipped, {error}", file=sys.stderr)
        return []


def _kernels() -> dict[str, DebianKernel]:
    """Return the newest kernel with plain and the newest with packed files, of the two newest series."""
    found: dict[str, DebianKernel] = {}
    seen: set[str] = set()
    for package in kernel_packages():
        series = ".".join(package.removeprefix("linux-image-").split(".")[:2])
        if series in seen or len(seen) == 2:
            continue
        seen.add(series)
        kernel = fetch_debian(package)
        file = next(path for path in kernel.root.rglob("*.ko*") if compression(path.name) is not None)
        found.setdefault("packed" if compression(file.name) else "plain", kernel)
    return found


def _measure(kind: str, kernel: DebianKernel, depmod: str) -> list[Row]:
    """Time depmod and both ways of opening the tree, round by round."""
    times: dict[str, list[float]] = {"depmod": [], "files": [], "cache": []}
    # Beside the package, so that depmod's copy of the tree is of links and both read the same files.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=kernel.root.parents[4]) as work:
        copy = Path(work) / "lib" / "modules" / kernel.root.name
        shutil.copytree(kernel.root, copy, copy_function=os.link)
        command = [depmod, "-b", work, kernel.root.name]
        subprocess.run(command, check=True)  # reads the files into memory, for both
        for number in range(ROUNDS[kind]):
            begun = time.perf_counter()
            subprocess.run(command, check=True)
            times["depmod"].append(time.perf_counter() - begun)
            for what in ("files", "cache"):
                begun = time.perf_counter()
                tree = open_tree(kernel.root, cache_dir=Path(work) / f"cache-{number}")
                times[what].append(time.perf_counter() - begun)
    median = {what: statistics.median(values) for what, values in times.items()}
    peer = f"depmod, {len(tree.names())} {kind} files"
    figures = ", ".join(f"{what} {value:.3f} s" for what, value in median.items()) + f" ({kernel.package})"
    ratios = {
        what: [own / peer_s for own, peer_s in zip(times[what], times["depmod"], strict=True)]
        for what in ("files", "cache")
    }
    return [
        Row(f"index a tree, {kind}, from its files alone", ratios["files"], FILES_BOUND, "at most", peer, figures),
        Row(f"open a tree, {kind}, from the cache", ratios["cache"], CACHE_BOUND, "at most", peer),
    ]


if __name__ == "__main__":
    print(table(run()))
