"""Measuring what can be measured of the cost model on the machine at hand.

Each figure is the median of several rounds, so that one that was interrupted does not count. What only a kernel could
measure of itself, such as its locks, stays as it was.
"""

from __future__ import annotations

import gc
import lzma
import mmap
import os
import platform
import shutil
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import zstandard

from loader_svc.image import ImageProblem, user_decompress
from loader_svc.trees import ModuleTree
from loader_svc.virtual.costs import KINDS, Costs, default_costs
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES
from loader_svc.virtual.storm import ALGORITHMS
from modpressure.errors import BadRequest

ROUNDS: Final = 9
LOOPS: Final = 2000
RUNS: Final = 16
SAMPLE_BYTES: Final = 4 << 20
PAGES: Final = 4096
"""Pages that are mapped to learn what one takes."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One figure that was measured."""

    name: str
    value: float
    how: str


def calibrate(tree: ModuleTree, directory: Path, base: Costs | None = None) -> Costs:
    """Return costs with all that could be measured, and for the rest those of ``base``, the bundled ones if None.

    Modules are taken from ``tree``; ``directory`` is where a file may be written for a moment. What can't be measured
    here (no modprobe, say) is left. OSError if nothing can be written, BadRequest for a tree without modules.
    """
    base = default_costs() if base is None else base
    where = f"{platform.machine()}, {platform.system()} {platform.release()}, {time.strftime('%Y-%m-%d')}"
    found = _measurements(tree, directory)
    values: dict[str, Any] = {
        each.name: round(each.value, 4) if KINDS[each.name] == "float" else max(round(each.value), 0) for each in found
    }
    source = {name: f"default: {text.removeprefix('default: ')}" for name, text in base.source.items()}
    source |= {each.name: f"measured by modpressure calibrate: {each.how}; {where}" for each in found}
    return replace(base, **values, source=source)


def _measurements(tree: ModuleTree, directory: Path) -> list[Measurement]:
    sample = _sample(tree)
    path = directory / "modpressure-calibrate.tmp"
    try:
        path.write_bytes(sample)
        found = [
            Measurement("syscall_ns", _per_loop(os.getppid), "getppid(2) in a loop, less the loop"),
            Measurement("open_ns", _per_loop(partial(_open_close, path)), "open(2) and close(2) in a loop"),
            Measurement("read_cached_ns_per_byte", _read_ns(path, len(sample)), "preadv(2) into touched memory"),
        ]
    finally:
        path.unlink(missing_ok=True)
    copy_ns = _copy_ns(sample)
    page_ns, free_page_ns = _page_ns()
    found += [
        Measurement("copy_user_ns_per_byte", copy_ns, "memcpy"),
        Measurement("copy_ns_per_byte", 2 * copy_ns, "twice the memcpy: cleared, then copied"),
        Measurement("page_ns", page_ns, f"mmap(2) of {PAGES} anonymous pages, populated and so cleared"),
        Measurement("free_page_ns", free_page_ns, f"munmap(2) of {PAGES} such pages"),
    ]
    packers: tuple[tuple[str, Callable[[bytes], bytes], Callable[[bytes], bytes]], ...] = (
        ("zstd", zstandard.ZstdCompressor(level=3).compress, _unzstd),
        ("xz", partial(lzma.compress, check=lzma.CHECK_CRC32, preset=6), lzma.decompress),
        ("gzip", zlib.compress, zlib.decompress),
    )
    for name, pack, unpack in packers:
        packed = pack(sample)
        ns = _median(partial(unpack, packed), rounds=3) / len(sample)
        found.append(Measurement(f"{name}_ns_per_byte", ns, f"{name} of {len(sample)} bytes of modules"))
    modprobe = shutil.which("modprobe")
    if modprobe is not None and Path(f"/lib/modules/{platform.release()}/modules.alias.bin").exists():
        found.append(
            Measurement("alias_ns", _alias_ns(modprobe), "modprobe -R of an alias that there is not, less its start")
        )
    if Path("/sys/kernel").is_dir():
        state = _small_file()
        if state is not None:
            found.append(
                Measurement("initstate_ns", _per_loop(partial(_open_read_close, state)), f"reading {state} in a loop")
            )
    true = shutil.which("true")
    if true is not None:
        found.append(Measurement("exec_ns", _run_ns(true), f"posix_spawn(3) of {true} and its end"))
    return found


def _sample(tree: ModuleTree) -> bytes:
    """Return bytes as modules have them: the largest modules of the tree, as far as that goes."""
    entries = sorted(map(tree.module, tree.names()), key=lambda entry: -(entry.size_bytes or 0))
    content = bytearray()
    for entry in entries:
        with open(tree.open_file(entry.name), "rb") as file:
            image = file.read()
        algorithm = ALGORITHMS.get(entry.compression)
        try:
            chunks = [image] if algorithm is None else user_decompress(image, algorithm, limit_bytes=IMAGE_LIMIT_BYTES)
            content += b"".join(chunks)
        except ImageProblem:
            continue
        if len(content) >= SAMPLE_BYTES:
            break
    if not content:
        raise BadRequest("the module tree has no module to measure with", field="tree")
    return bytes(content[:SAMPLE_BYTES])


def _median(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return how long something takes, in ns; garbage is not collected meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        taken = []
        for _ in range(rounds):
            begun_ns = time.perf_counter_ns()
            work()
            taken.append(time.perf_counter_ns() - begun_ns)
        return statistics.median(taken)
    finally:
        if was_enabled:
            gc.enable()


def _per_loop(work: Callable[[], object]) -> float:
    """Return how long one turn of a loop takes, less an empty turn, in ns."""

    def loop() -> None:
        for _ in range(LOOPS):
            work()

    def empty() -> None:
        for _ in range(LOOPS):
            _nothing()

    return max(_median(loop) - _median(empty), 0) / LOOPS


def _nothing() -> None:
    """Do nothing."""


def _open_close(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _open_read_close(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.read(descriptor, 64)
    os.close(descriptor)


def _small_file() -> Path | None:
    """Return a small file in /sys that everybody may read."""
    names = (*sorted(Path("/sys/module").glob("*/initstate"))[:1], Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return next((path for path in names if os.access(path, os.R_OK)), None)


def _read_ns(path: Path, size_bytes: int) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with mmap.mmap(-1, size_bytes) as memory:
            os.preadv(descriptor, [memory], 0)
            return _median(lambda: os.preadv(descriptor, [memory], 0)) / size_bytes
    finally:
        os.close(descriptor)


def _copy_ns(sample: bytes) -> float:
    target = bytearray(len(sample))

    def copy() -> None:
        target[:] = sample

    return _median(copy) / len(sample)


def _page_ns() -> tuple[float, float]:
    """Return what it takes to get a page and to give it back, in ns: many at once, without a fault for each."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    got, given = [], []
    for _ in range(ROUNDS):
        begun_ns = time.perf_counter_ns()
        memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, flags=flags)
        mapped_ns = time.perf_counter_ns()
        memory.close()
        got.append(mapped_ns - begun_ns)
        given.append(time.perf_counter_ns() - mapped_ns)
    return statistics.median(got) / PAGES, statistics.median(given) / PAGES


def _unzstd(packed: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(packed)


def _alias_ns(modprobe: str) -> float:
    # A text that no table has is looked for in all of them.
    looking_up = _run_ns(modprobe, "-q", "-R", "cpu:type:x86,ven0000fam0000mod0000:feature:,0000")
    return max(looking_up - _run_ns(modprobe, "--version"), 0)


def _run_ns(program: str, *arguments: str) -> float:
    """Return how long a program takes from its start to its end, in ns; what it prints goes nowhere."""
    nowhere = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]

    def run() -> None:
        os.waitpid(os.posix_spawn(program, [program, *arguments], {}, file_actions=nowhere), 0)

    run()
    return _median(run, rounds=RUNS)
