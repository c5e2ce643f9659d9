"""xz files: the .xz file format 1.2, and what the kernel accepts of it (lib/xz/xz_dec_stream.c, Linux 6.12)."""

import lzma
import zlib
from collections.abc import Generator, Iterator
from typing import Final

from loader_svc.image.chunks import CHUNK_BYTES, INPUT_BYTES, check_magic, refused, skip_zeros
from loader_svc.image.errors import ImageTooLarge

MAGIC: Final = b"\xfd7zXZ\x00"
ALWAYS_ALLOWED_DICTIONARY_BYTES: Final = 1 << 26
"""Dictionary that a stream may have whatever the limit on its output (that of `xz -9`)."""

_FOOTER_MAGIC: Final = b"YZ"
_HEADER_BYTES: Final = 12
_FOOTER_BYTES: Final = 12
_CHECK_CRC32: Final = 1
_FILTER_LZMA2: Final = 0x21
_LARGEST_DICTIONARY: Final = 39
_KERNEL_BCJ_FILTERS: Final = frozenset((4, 5, 7, 8, 9, 0xA, 0xB))
"""x86, PowerPC, ARM, ARM-Thumb, SPARC, ARM64, RISC-V (a kernel has those that its CONFIG_XZ_DEC_ options name)."""


def kernel_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield what a kernel unpacks: the first stream, which must be whole and right and use what the kernel knows."""
    check_magic(view, MAGIC, "xz")
    _refuse_kernel_options(view)
    _refuse_oversize(view, limit_bytes)
    yield from _stream(view, 0, limit_bytes)


def user_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield the streams one after the other; zeros, a multiple of four, may stand between and after them."""
    _refuse_oversize(view, limit_bytes)
    start = 0
    while True:
        check_magic(view[start:], MAGIC, "xz")
        start = yield from _stream(view, start, limit_bytes)
        padded = skip_zeros(view, start)
        start = padded - (padded - start) % 4
        if start == len(view):
            return


def declared_bytes(view: memoryview) -> int | None:
    """Return the image size that the index at the end of the file adds up to, None if there is no index there."""
    blocks = _index(view)
    return None if blocks is None else sum(uncompressed for _, uncompressed in blocks)


def workspace_bytes(view: memoryview) -> int:
    """Return the largest dictionary that the block headers ask for, as far as they are found without decoding."""
    return max((_dictionary_bytes(block) for block in _block_headers(view)), default=0)


def _stream(view: memoryview, start: int, limit_bytes: int | None) -> Generator[bytes, None, int]:
    """Yield the output of one stream that starts at `start`; return where it ended."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_decoder_bytes(view[start:], limit_bytes))
    at = start
    try:
        while not decoder.eof:
            piece: bytes | memoryview = view[at : at + INPUT_BYTES] if decoder.needs_input else b""
            if decoder.needs_input and not piece:
                raise refused("xz end", len(view), "the stream ends early")
            at += len(piece)
            yield decoder.decompress(piece, CHUNK_BYTES)
    except lzma.LZMAError as error:
        if "Memory usage limit" in str(error):
            raise ImageTooLarge("the dictionary of the xz stream", limit_bytes or 0) from None
        raise refused("xz data", error, "corrupt") from None
    except MemoryError:
        raise refused("xz dictionary", workspace_bytes(view), "no memory for it") from None
    return at - len(decoder.unused_data)


def _decoder_bytes(view: memoryview, limit_bytes: int | None) -> int | None:
    """Return the memory that liblzma may use: a dictionary that exceeds the limit on the output serves nobody."""
    if limit_bytes is None:
        return None
    allowed = max(limit_bytes, ALWAYS_ALLOWED_DICTIONARY_BYTES)
    if workspace_bytes(view) > allowed:
        raise ImageTooLarge("the dictionary of the xz stream", allowed)
    return allowed + (1 << 20)


def _refuse_oversize(view: memoryview, limit_bytes: int | None) -> None:
    """Refuse at once what says of itself that it exceeds the limit: xz is too slow to decode up to it for nothing."""
    if limit_bytes is not None and (declared_bytes(view) or 0) > limit_bytes:
        raise ImageTooLarge("the decompressed image", limit_bytes)


def _refuse_kernel_options(view: memoryview) -> None:
    check = view[7] if len(view) > 7 else 0
    if check > _CHECK_CRC32:
        raise refused("xz check", check, "the kernel knows the integrity checks none (0) and CRC32 (1)")
    for block in _block_headers(view):
        filters = _filters(block)
        if not filters:
            continue  # damaged: left to the decoder
        *others, (last, properties) = filters
        if last != _FILTER_LZMA2 or len(properties) != 1 or len(others) > 1:
            chain = "+".join(f"{kind:#x}" for kind, _ in filters)
            raise refused("xz filter", chain, "the kernel knows LZMA2, alone or after one BCJ filter")
        if properties[0] > _LARGEST_DICTIONARY:
            raise refused("xz dictionary", properties[0], "the kernel's largest is 39 (3 GiB)")
        for kind, bcj_properties in others:
            if kind not in _KERNEL_BCJ_FILTERS or bcj_properties:
                raise refused("xz filter", f"{kind:#x}", "not a BCJ filter that the kernel knows")


def _index(view: memoryview) -> list[tuple[int, int]] | None:
    """Return unpadded and uncompressed size of each block by the index; None unless the file is one sound stream."""
    if len(view) < _HEADER_BYTES + _FOOTER_BYTES or bytes(view[-2:]) != _FOOTER_MAGIC:
        return None
    index_bytes = (int.from_bytes(view[-8:-4], "little") + 1) * 4
    start = len(view) - _FOOTER_BYTES - index_bytes
    if start < _HEADER_BYTES or view[start] != 0:
        return None
    index = bytes(view[start : len(view) - _FOOTER_BYTES])
    if zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little"):
        return None
    index = index[1:-4]
    count, at = _vli(index, 0)
    if count is None or count > len(index) // 2:
        return None
    blocks = []
    for _ in range(count):
        unpadded, at = _vli(index, at)
        uncompressed, at = _vli(index, at)
        if not unpadded or uncompressed is None:
            return None
        blocks.append((unpadded, uncompressed))
    packed = sum(-(-unpadded // 4) * 4 for unpadded, _ in blocks)
    return blocks if _HEADER_BYTES + packed == start else None


def _block_headers(view: memoryview) -> Iterator[bytes]:
    """Yield the block headers that can be found: by the index if there is a sound one, else the first."""
    start = _HEADER_BYTES
    for unpadded, _ in _index(view) or [(0, 0)]:
        if start >= len(view) or view[start] == 0:  # no block: the index follows
            return
        yield bytes(view[start : start + (view[start] + 1) * 4])
        start += -(-unpadded // 4) * 4


def _filters(header: bytes) -> list[tuple[int, bytes]]:
    """Return id and properties of the filters that a block header lists; none if it is damaged."""
    if len(header) < 8:
        return []
    at = 2
    for present in (header[1] & 0x40, header[1] & 0x80):  # compressed size, uncompressed size
        if present:
            at = _vli(header, at)[1]
    filters = []
    for _ in range((header[1] & 3) + 1):
        kind, at = _vli(header, at)
        size, at = _vli(header, at)
        if kind is None or size is None or at + size > len(header):
            return []
        filters.append((kind, header[at : at + size]))
        at += size
    return filters


def _dictionary_bytes(header: bytes) -> int:
    for kind, properties in _filters(header):
        if kind == _FILTER_LZMA2 and len(properties) == 1 and properties[0] <= 40:
            bits = properties[0]
            return (1 << 32) - 1 if bits == 40 else (2 | bits & 1) << (bits // 2 + 11)
    return 0


def _vli(data: bytes, at: int) -> tuple[int | None, int]:
    """Return a variable-length integer and where it ends; None for one that is cut or too long."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            return None, at
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    return None, at
