"""Whole calls on damaged files: a kernel's errno or a clear refusal each, no exception, no memory held, none for long.

``python tests/integration/test_call_mutations.py COUNT DIR`` does the same for as many mutations as one likes.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from loader_svc.local import LocalCall, LocalMachine
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from modpressure.errors import OverLimit
from modpressure.identity_files import load_identity
from modpressure.kernel.identity import KernelIdentity
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_4

COUNT = 2000
SEED = 20240611
LIMIT_BYTES = 64 << 20
ABSURD = (0, 1, 2, 3, 7, 8, 0xFF, 0xFFF1, 0xFFF2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 1)


def mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield damaged files: flipped bits, cuts, spliced parts, absurd fields in headers."""
    chance = random.Random(seed)
    for _ in range(count):
        image = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            if len(image) > 64:
                damage(image, chance, seeds)
        yield bytes(image)


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
    form, at = chance.choice([("<I", 0), ("<I", 4), ("<Q", 8), ("<Q", 24), ("<Q", 32), ("<I", 40), ("<I", 44)])
    if kind > 4:
        offset, size = struct.unpack_from("<QQ", image, header + 24)
        if size < 24 or offset + size > len(image):
            return
        header = offset + 24 * chance.randrange(size // 24)
        form, at = chance.choice([("<I", 0), ("<H", 6), ("<Q", 8), ("<I", 8), ("<I", 12), ("<Q", 0)])
    struct.pack_into(form, image, header + at, value & ((1 << 8 * struct.calcsize(form)) - 1))


def load_all(seeds: list[bytes], count: int, seed: int, identity: KernelIdentity) -> tuple[Counter[str], float]:
    """Load every mutation, each on a machine of its own; return the results by errno and check, the longest time."""
    results: Counter[str] = Counter()
    longest = 0.0
    for number, content in enumerate(mutations(seeds, count, seed)):
        descriptor = os.memfd_create("mutation")
        try:
            os.write(descriptor, content)
            machine = LocalMachine(identity, plans=Plans(LIMIT_BYTES, identity))
            flags = 4 * (not content.startswith(b"\x7fELF"))
            spec = CallSpec("mutation", "inode", V6_4, Syscall.FINIT_MODULE, flags, parameters="ms=1")
            begun = time.perf_counter()
            try:
                ending = machine.call(LocalCall(spec, "mutation", partial(os.dup, descriptor)))
            except OverLimit as refusal:
                results[f"refused: {str(refusal)[:20]}"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"mutation {number} of seed {seed}") from error
            finally:
                longest = max(longest, time.perf_counter() - begun)
            results[f"{ending.errno or 'OK'} {ending.check}"] += 1
            counters = machine.counters
            assert counters.calls == 1, number
            assert bool(ending.errno) == (ending.outcome is not Outcome.LIVE), number
            if ending.outcome is Outcome.LIVE:
                assert not machine.remove(ending.module, forced=True), number
            assert machine.held_bytes == 0, number
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
    for kernel in ("any", "measured-6.12"):
        found, slowest = load_all(seeds_in(Path(sys.argv[2])), int(sys.argv[1]), SEED, load_identity(kernel))
        sys.stdout.write(f"{kernel}: {found.total()} calls, the longest took {slowest:.3f} s\n")
        sys.stdout.writelines(f"  {count:7} {result}\n" for result, count in found.most_common())
