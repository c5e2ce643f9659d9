"""Compressing modules as a kernel's build does, so that the kernel can decompress them itself."""

from __future__ import annotations

import lzma
from typing import Literal

import zstandard

Variant = Literal["plain", "xz", "zst"]

SUFFIXES: dict[Variant, str] = {"plain": "", "xz": ".xz", "zst": ".zst"}

# The kernel's decompressor knows no other check, and its build takes this dictionary (scripts/Makefile.modinst, 6.12).
# A faster preset than the kernel's build takes: contents are made so that their length comes out right with this one.
_XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 3, "dict_size": 1 << 20}]


def pack(image: bytes, variant: Variant) -> bytes:
    """Compress ``image``: as ``xz --check=crc32 --lzma2=preset=3,dict=1MiB`` or as ``zstd`` does, or not at all."""
    if variant == "xz":
        return lzma.compress(image, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=_XZ_FILTERS)
    if variant == "zst":
        return zstandard.ZstdCompressor(level=3, write_checksum=True, write_content_size=True).compress(image)
    return image
