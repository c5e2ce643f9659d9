"""Damaged module files, and whole calls on them: a kernel's errno or a clear refusal each, no memory held after."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Callable
from typing import Final

import zstandard

from fuzz.pulse import STUCK_SECONDS
from fuzz.tally import Tally
from loader_svc.catalogue import catalogue_identity, catalogue_tree
from loader_svc.trees import open_tree
from modpressure.identity_files import load_identity
from tests.integration.test_call_mutations import load_all

NAME: Final = "files"
"""This target's name among the RPCs."""

BLOCK: Final = 1000
"""Files between two looks at whether to go on."""

_SEEDS: Final = ("minix", "crc_itu_t", "mbcache", "crypto_engine")
"""Small modules of the catalogue: without imports, with exports, with parameters."""


def _packed() -> list[bytes]:
    """Return the seeds, plain and in each of the formats that the kernel or its caller unpacks."""
    tree = open_tree(catalogue_tree("plain"))
    files: list[bytes] = []
    for name in _SEEDS:
        with os.fdopen(tree.open_file(name), "rb") as opened:
            image = opened.read()
        xz = lzma.compress(image, check=lzma.CHECK_CRC32, preset=0)
        files += [image, image, gzip.compress(image, 1, mtime=0), xz, zstandard.ZstdCompressor(level=1).compress(image)]
    return files


def fuzz(count: int, seed: int, stopped: Callable[[], bool] = lambda: False) -> Tally:
    """Load ``count`` damaged files, by turns into a kernel that takes any module and into the catalogue's.

    Each block has a seed of its own. No more than the first once it is ``stopped``.
    """
    tally = Tally(NAME)
    packed, identities = _packed(), (load_identity("any"), catalogue_identity())
    for number, begun in enumerate(range(0, count, BLOCK)):
        if number and stopped():
            break
        block_seed = seed + number
        try:
            results, longest_seconds = load_all(packed, min(BLOCK, count - begun), block_seed, identities[number % 2])
        except AssertionError as error:
            tally.crashes += 1
            tally.found(f"{error} ({error.__cause__!r})")
            continue
        tally.messages += results.total()
        tally.parsed += results.total()
        tally.statuses += results
        if longest_seconds > STUCK_SECONDS:
            tally.hangs += 1
            tally.found(f"a file of seed {block_seed} took {longest_seconds:.0f} s")
    return tally
