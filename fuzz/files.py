"""Damaged module files, and whole calls on them: a kernel's errno or a clear refusal each, no memory held after."""

from __future__ import annotations

import gzip
import lzma
import os
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


def fuzz(count: int, seed: int) -> Tally:
    """Load ``count`` damaged files, half of them into a kernel that takes any module, half into the catalogue's."""
    tally = Tally(NAME)
    for number, identity in enumerate((load_identity("any"), catalogue_identity())):
        try:
            results, longest_seconds = load_all(_packed(), count // 2, seed + number, identity)
        except AssertionError as error:
            tally.crashes += 1
            tally.found(f"{error} ({error.__cause__!r})")
            continue
        tally.messages += results.total()
        tally.parsed += results.total()
        tally.statuses += results
        tally.hangs += longest_seconds > STUCK_SECONDS
    return tally
