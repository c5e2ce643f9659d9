"""zstd files: RFC 8878, and what the kernel makes of them (kernel/module/decompress.c, Linux 6.12)."""

from collections.abc import Generator, Iterator
from typing import Final

import zstandard

from loader_svc.image.chunks import CHUNK_BYTES, INPUT_BYTES, check_magic, refused
from loader_svc.image.errors import ImageTooLarge

MAGIC: Final = b"\x28\xb5\x2f\xfd"
LARGEST_WINDOW_BYTES: Final = (1 << 27) + 1
"""Largest window of a decoder that was told no other (ZSTD_MAXWINDOWSIZE_DEFAULT), the kernel's included."""

_SKIPPABLE_MAGICS: Final = range(0x184D2A50, 0x184D2A60)
_SKIPPABLE_HEADER_BYTES: Final = 8
_PAGE_BYTES: Final = 4096
_BLOCK_BYTES: Final = 1 << 17
_BLOCK_RLE: Final = 1
_BLOCK_HEADER_BYTES: Final = 3
_NO_MACHINE_BYTES: Final = 1 << 40
_WRAPPING_WINDOW_BYTES: Final = (1 << 64) - (1 << 31)


def kernel_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield what a kernel unpacks: the first frame, as many whole blocks (or bytes of a raw one) as there are.

    The kernel stops when a page of output is not filled, without asking why: input that ends early is no error.
    """
    del limit_bytes  # the window is bounded by itself
    check_magic(view, MAGIC, "zstd")
    _check_frame_header(view)
    yield from _frame(view)


def user_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield the frames one after the other, each whole; skippable frames are skipped."""
    del limit_bytes
    start = 0
    while True:
        rest = view[start:]
        if start and int.from_bytes(rest[:4], "little") in _SKIPPABLE_MAGICS:
            size_bytes = _SKIPPABLE_HEADER_BYTES + int.from_bytes(rest[4:8], "little")
        else:
            check_magic(rest, MAGIC, "zstd")
            _check_frame_header(rest)
            size_bytes = (yield from _frame(rest)) or len(rest) + 1
        if size_bytes > len(rest):
            raise refused("zstd end", len(view), "the frame ends early")
        start += size_bytes
        if start == len(view):
            return


def declared_bytes(view: memoryview) -> int | None:
    """Return the content size in the first frame's header, None if it names none."""
    try:
        size = zstandard.get_frame_parameters(view).content_size
    except zstandard.ZstdError:
        return None
    return None if size == zstandard.CONTENTSIZE_UNKNOWN else size


def workspace_bytes(view: memoryview) -> int:
    """Return what the kernel's ZSTD_estimateDStreamSize() says of the first frame, 0 if it is not reached.

    The context is that of this machine's libzstd, some KiB off at most; one block of input; a window, with a block and
    some room to over-copy.
    """
    try:
        window = zstandard.get_frame_parameters(view).window_size
    except zstandard.ZstdError:
        return 0
    block = min(window, _BLOCK_BYTES)
    return int(zstandard.estimate_decompression_context_size()) + block + window + block + 64


def _check_frame_header(view: memoryview) -> None:
    try:
        header = zstandard.get_frame_parameters(view)
    except zstandard.ZstdError as error:
        raise refused("zstd header", bytes(view[:18]).hex(" "), str(error)) from None
    window = header.window_size
    if window <= LARGEST_WINDOW_BYTES:
        return
    if _NO_MACHINE_BYTES <= window <= _WRAPPING_WINDOW_BYTES:
        # A frame in one segment may claim any size; the kernel allocates as much before the decoder has a say.
        raise refused("zstd window", window, "no memory for it", errno="ENOMEM")
    # Content that fits into the first page is unpacked straight into it and needs no window.
    if header.content_size > _PAGE_BYTES or not _is_whole(view):
        raise refused("zstd window", window, f"the largest is {LARGEST_WINDOW_BYTES}")


def _frame(view: memoryview) -> Generator[bytes, None, int | None]:
    """Yield what can be decoded of the frame that `view` starts with; return its length, None if it is cut.

    Blocks are fed so few at a time that their output fits into a chunk: four bytes of block may be 128 KiB of image.
    """
    decoder = zstandard.ZstdDecompressor().decompressobj()
    start = 0
    try:
        for end in _feeding_points(view):
            yield decoder.decompress(view[start:end])
            start = end
            if decoder.eof:
                return end
    except zstandard.ZstdError as error:
        raise refused("zstd data", error, "corrupt") from None
    except MemoryError:
        raise ImageTooLarge("the window of the zstd frame", LARGEST_WINDOW_BYTES) from None
    return None


def _feeding_points(view: memoryview) -> Iterator[int]:
    """Yield where to stop feeding a decoder, up to the end of the frame or of the input, going by the block headers.

    Whatever is wrong with a block is the decoder's to find.
    """
    start = end = output_bytes = 0
    has_last = False
    for end, is_last in _block_ends(view):
        has_last = is_last
        output_bytes += _BLOCK_BYTES
        if output_bytes > CHUNK_BYTES - _BLOCK_BYTES or end - start > INPUT_BYTES:
            yield min(end, len(view))
            start, output_bytes = end, 0
    # After the last block its checksum; else what there is of a block header.
    yield min(end + _checksum_bytes(view), len(view)) if has_last else len(view)


def _is_whole(view: memoryview) -> bool:
    """Return whether the frame that `view` starts with is all there."""
    return any(is_last and end + _checksum_bytes(view) <= len(view) for end, is_last in _block_ends(view))


def _checksum_bytes(view: memoryview) -> int:
    return 4 if zstandard.get_frame_parameters(view).has_checksum else 0


def _block_ends(view: memoryview) -> Iterator[tuple[int, bool]]:
    """Yield the end of every block of a frame, and whether it is the last, for the block headers that are in `view`."""
    at = zstandard.frame_header_size(view)
    is_last = False
    while not is_last and at + _BLOCK_HEADER_BYTES <= len(view):
        block = int.from_bytes(view[at : at + _BLOCK_HEADER_BYTES], "little")
        is_last = bool(block & 1)
        at += _BLOCK_HEADER_BYTES + (1 if block >> 1 & 3 == _BLOCK_RLE else block >> 3)
        yield at, is_last
