"""gzip files: RFC 1952, and what the kernel makes of them (kernel/module/decompress.c, Linux 6.12)."""

import zlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Final

from loader_svc.image.chunks import CHUNK_BYTES, INPUT_BYTES, check_magic, refused, skip_zeros

if TYPE_CHECKING:
    from zlib import _Decompress

MAGIC: Final = b"\x1f\x8b\x08"
_HEADER_BYTES: Final = 10
_TRAILER_BYTES: Final = 8
_FNAME: Final = 0x08
_WORKSPACE_BYTES: Final = 9544 + (1 << 15)  # struct inflate_workspace: the decoder's state and its 32 KiB window


def kernel_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield what a kernel inflates: all up to the end of the deflate data, whatever the trailer says or lacks."""
    del limit_bytes  # the window is 32 KiB always
    start = _kernel_header_bytes(view)
    if not start:
        raise refused("magic", bytes(view[:3]).hex(" "), "no gzip header")
    yield from _inflated(zlib.decompressobj(-zlib.MAX_WBITS), view, start)


def user_decompress(view: memoryview, limit_bytes: int | None) -> Iterator[bytes]:
    """Yield the members one after the other, CRCs and lengths checked; zeros may follow."""
    del limit_bytes
    start = 0
    while True:
        check_magic(view[start:], MAGIC, "gzip")
        start = yield from _inflated(zlib.decompressobj(zlib.MAX_WBITS | 16), view, start)
        start = skip_zeros(view, start)
        if start == len(view):
            return


def declared_bytes(view: memoryview) -> int | None:
    """Return the length in the trailer: modulo 4 GiB, and the last member's alone."""
    return int.from_bytes(view[-4:], "little") if len(view) >= _HEADER_BYTES + _TRAILER_BYTES else None


def workspace_bytes(view: memoryview) -> int:
    """Return what zlib_inflate_workspacesize() of the kernel says, 0 if it is not reached."""
    return _WORKSPACE_BYTES if _kernel_header_bytes(view) else 0


def _kernel_header_bytes(view: memoryview) -> int:
    """Return the length of the header as the kernel sees it, 0 for none; of optional fields it knows the name."""
    if len(view) < _HEADER_BYTES or bytes(view[:3]) != MAGIC:
        return 0
    if not view[3] & _FNAME:
        return _HEADER_BYTES
    for start in range(_HEADER_BYTES, len(view), INPUT_BYTES):
        end = bytes(view[start : start + INPUT_BYTES]).find(b"\0")
        if end >= 0:
            return start + end + 1
    return 0


def _inflated(decoder: "_Decompress", view: memoryview, start: int) -> Generator[bytes, None, int]:
    """Yield the output of one zlib stream that starts at `start`; return where it ended."""
    try:
        for at in range(start, len(view), INPUT_BYTES):
            pending: bytes | memoryview = view[at : at + INPUT_BYTES]
            while pending and not decoder.eof:
                yield decoder.decompress(pending, CHUNK_BYTES)
                pending = decoder.unconsumed_tail
            if decoder.eof:
                return min(at + INPUT_BYTES, len(view)) - len(decoder.unused_data)
        # All input is in; what did not fit into the last chunk is still to come.
        while not decoder.eof and (chunk := decoder.decompress(b"", CHUNK_BYTES)):
            yield chunk
    except zlib.error as error:
        raise refused("gzip data", error, "corrupt") from None
    if not decoder.eof:
        raise refused("gzip end", len(view), "the data end early")
    return len(view)
