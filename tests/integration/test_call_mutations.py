"""Whole calls on damaged files: a kernel's errno or a clear refusal each, no exception, no memory held, none for long.

``make mutations`` does the same for 100,000 of them, and holds the time and memory that they take against their limits.
"""

from __future__ import annotations

import gzip
import lzma
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import zstandard

from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.errors import OverLimit
from modpressure.identity_files import load_identity
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_4

COUNT = 2000
SEED = 20240611
LIMIT_BYTES = 64 << 20
LONGEST_SECONDS = 1
ABSURD = (0, 1, 2, 3, 7, 8, 0xFF, 0xFFF1, 0xFFF2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 1)


PACKERS: tuple[Callable[[bytes], bytes], ...] = (
    partial(gzip.compress, compresslevel=1, mtime=0),
    partial(lzma.compress, check=lzma.CHECK_CRC32, preset=0),
    zstandard.ZstdCompressor(level=1, write_checksum=True).compress,
)
PACKED_BYTES = 20_000
"""Longest image that is packed here: packing takes longer than all that is tested."""


def mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[tuple[bytes, Syscall, int]]:
    """Yield damaged files with the call and the flags that they are loaded with.

    Flipped bits, cuts, spliced parts, absurd fields in headers; some of it packed, twice or thrice, and damaged again.
    """
    chance = random.Random(seed)
    for _ in range(count):
        image = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            if len(image) > 64:
                damage(image, chance, seeds)
        if len(image) < PACKED_BYTES and chance.random() < 0.3:
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                image = bytearray(chance.choice(PACKERS)(bytes(image)))
            if chance.random() < 0.3:
                image[chance.randrange(len(image))] ^= 1 << chance.randrange(8)
        syscall = Syscall.INIT_MODULE if chance.random() < 0.1 else Syscall.FINIT_MODULE
        is_packed = not image.startswith(b"\x7fELF")
        yield bytes(image), syscall, chance.choice((4, 4, 4, 7, 0)) if is_packed else chance.choice((0, 0, 1, 2, 3))


def damage(image: bytearray, chance: random.Random, seeds: list[bytes]) -> None:
    kind = chance.randrange(7)
    if kind == 0:
        image[chance.randrange(len(image))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del image[chance.randrange(len(image)) :]
    elif kind == 2:
        other = chance.choice(seeds)
        at, length = chance.randrange(len(image)), chance.randrange(1, 4096)
        start = chance.randrange(len(other))
        image[at : at + length] = other[start : start + length]
    elif kind == 3:
        form, at = chance.choice([("<H", 16), ("<H", 18), ("<H", 58), ("<H", 60), ("<H", 62), ("<Q", 40)])
        struct.pack_into(form, image, at, chance.choice(ABSURD) & ((1 << 8 * struct.calcsize(form)) - 1))
    else:
        field(image, chance, kind)


def field(image: bytearray, chance: random.Random, kind: int) -> None:
    """Overwrite a field of a section's header, a symbol or a relocation."""
    table, count = int.from_bytes(image[40:48], "little"), int.from_bytes(image[60:62], "little")
    if not count or table + 64 * count > len(image):
        return
    header = table + 64 * chance.randrange(count)
    value = chance.choice(ABSURD) if chance.random() < 0.7 else chance.randrange(len(image))
    fields = [("<I", 0), ("<I", 4), ("<Q", 8), ("<Q", 24), ("<Q", 32), ("<I", 40), ("<I", 44), ("<Q", 48)]
    form, at = chance.choice(fields)
    if kind > 4:
        offset, size = struct.unpack_from("<QQ", image, header + 24)
        if size < 24 or offset + size > len(image):
            return
        header = offset + 24 * chance.randrange(size // 24)
        form, at = chance.choice([("<I", 0), ("<H", 6), ("<Q", 8), ("<I", 8), ("<I", 12), ("<Q", 0)])
    struct.pack_into(form, image, header + at, value & ((1 << 8 * struct.calcsize(form)) - 1))


def load_all(seeds: list[bytes], count: int, seed: int, identity: KernelIdentity) -> tuple[Counter[str], float]:
    """Load every mutation, each on its own machine; return the results by errno and check, the longest CPU time."""
    results: Counter[str] = Counter()
    longest = 0.0
    for number, (content, syscall, flags) in enumerate(mutations(seeds, count, seed)):
        descriptor = os.memfd_create("mutation")
        try:
            os.write(descriptor, content)
            machine = VirtualMachine(identity, plans=Plans(LIMIT_BYTES, identity))
            spec = CallSpec("mutation", "inode", V6_4, syscall, flags, parameters="ms=1")
            begun = time.process_time()
            try:
                ending = machine.call(VirtualCall(spec, VirtualFile("mutation", partial(os.dup, descriptor))))
            except OverLimit as refusal:
                results[f"refused: {str(refusal)[:20]}"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"mutation {number} of seed {seed}") from error
            finally:
                longest = max(longest, time.process_time() - begun)
            results[f"{ending.errno or 'OK'} {ending.check}"] += 1
            counters = machine.counters
            assert counters.calls == 1, number
            assert bool(ending.errno) == (ending.outcome is not Outcome.LIVE), number
            if ending.outcome is Outcome.LIVE and (errno := machine.remove(ending.module, forced=True)):
                # It may have lost its exit function, and then stays where the kernel does not force.
                assert errno == "EBUSY" and not identity.module_force_unload, number
                continue
            assert machine.areas.held_bytes == 0, number
            assert not len(machine.modules), number
        finally:
            os.close(descriptor)
    return results, longest


def seeds_in(directory: Path) -> list[bytes]:
    names = ["orc_slow.ko", "orc_dep.ko", "orc_percpu.ko", "orc_exp2.ko", "minix.ko", "minix.ko.zst", "minix.ko.xz"]
    return [(directory / name).read_bytes() for name in [*names, "minix.ko.gz"]]


@pytest.mark.parametrize("kernel", ["any", "measured-6.12"])
def test_every_damaged_file_gets_an_errno_or_a_refusal(shared_dir: Path, kernel: str) -> None:
    seeds = seeds_in(shared_dir / "data" / "golden" / "bad-inputs")
    results, _ = load_all(seeds, COUNT, SEED, load_identity(kernel))
    assert results.total() == COUNT
    # Not all for one and the same reason, or the mutations would test nothing.
    assert len(results) > 20


if __name__ == "__main__":
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kernel in ("any", "measured-6.12"):
        found, slowest = load_all(seeds_in(Path(sys.argv[2])), int(sys.argv[1]), SEED, load_identity(kernel))
        sys.stdout.write(f"{kernel}: {found.total()} calls, the longest took {slowest:.3f} s of the CPU\n")
        sys.stdout.writelines(f"  {count:7} {result}\n" for result, count in found.most_common())
        if slowest >= LONGEST_SECONDS:
            sys.exit(f"a call took {slowest:.3f} s, the limit is {LONGEST_SECONDS} s")
    taken_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    sys.stdout.write(f"most memory beyond what the program itself takes: {taken_mib:.0f} MiB\n")
    # A file, its image and a copy of either while it is handed on.
    if taken_mib * 1024 * 1024 >= 3 * LIMIT_BYTES:
        sys.exit(f"that is more than three times the image limit of {LIMIT_BYTES >> 20} MiB")
