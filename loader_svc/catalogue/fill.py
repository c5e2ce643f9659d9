"""Bytes that stand for a module's code and data: no meaning, the right length, and as compressible as the real ones.

Three kinds of bytes are mixed. Noise costs every compressor its full length. Rows of tables, three bytes that change
slowly beside one that doesn't, cost xz about a third of their length, but zstd, which looks for longer matches, nearly
all of it. Zeros cost nothing. With the shares of the first two chosen well, both compressed lengths come out as a real
module's.
"""

from __future__ import annotations

import hashlib

SHARES = 65536
"""What the shares of noise and rows are parts of."""

_ROW_BYTES = 4
_RUN_ROWS = 16


def noise(length_bytes: int, *seed: str) -> bytes:
    """Pseudo-random bytes, the same for the same ``seed`` on every machine (SHAKE-128, FIPS 202)."""
    return hashlib.shake_128("\0".join(seed).encode()).digest(length_bytes)


def fill(length_bytes: int, shares: tuple[int, int], *seed: str) -> bytearray:
    """Make contents: ``shares`` of 65,536 say how much of it is noise and how much is rows; the rest is zeros."""
    noise_bytes = min(length_bytes * shares[0] // SHARES, length_bytes)
    row_bytes = min(length_bytes * shares[1] // SHARES, length_bytes - noise_bytes) // _ROW_BYTES * _ROW_BYTES
    contents = bytearray(noise(noise_bytes, *seed, "noise"))
    contents += _rows(row_bytes // _ROW_BYTES, *seed)
    contents += bytes(length_bytes - len(contents))
    return contents


def _rows(count: int, *seed: str) -> bytearray:
    """``count`` rows of four bytes; three of them stay as they are for a run of rows."""
    runs = -(-count // _RUN_ROWS)
    rows = bytearray(count * _ROW_BYTES)
    for column in range(_ROW_BYTES - 1):
        slow = bytearray(runs * _RUN_ROWS)
        values = noise(runs, *seed, f"column {column}")
        for row in range(_RUN_ROWS):
            slow[row::_RUN_ROWS] = values
        rows[column::_ROW_BYTES] = slow[:count]
    rows[_ROW_BYTES - 1 :: _ROW_BYTES] = noise(count, *seed, "last column")
    return rows
