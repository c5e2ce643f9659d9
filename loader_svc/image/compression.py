"""Unpacking module images: as the kernel does when it is asked to (flag 4), and as a caller does before init_module.

The two differ on bad streams, and the kernel's three decompressors differ from each other. zlib, liblzma and libzstd
decode the data themselves; `gz`, `xz` and `zst` hold what surrounds them.
"""

from collections.abc import Iterator
from pathlib import PurePath
from typing import Final, Literal, Protocol, get_args

from loader_svc.image import gz, xz, zst
from loader_svc.image.buffers import Buffer, byte_view
from loader_svc.image.errors import ImageTooLarge

Algorithm = Literal["gzip", "xz", "zstd"]
"""Named as in /sys/module/compression."""

ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)
SUFFIXES: Final[dict[str, Algorithm]] = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


class _Format(Protocol):
    """What the modules `gz`, `xz` and `zst` have in common."""

    @property
    def MAGIC(self) -> bytes: ...
    def kernel_decompress(self, view: memoryview, limit_bytes: int | None) -> Iterator[bytes]: ...
    def user_decompress(self, view: memoryview, limit_bytes: int | None) -> Iterator[bytes]: ...
    def declared_bytes(self, view: memoryview) -> int | None: ...
    def workspace_bytes(self, view: memoryview) -> int: ...


_FORMATS: Final[dict[Algorithm, _Format]] = {"gzip": gz, "xz": xz, "zstd": zst}


def algorithm_of(name: str, head: Buffer = b"") -> Algorithm | None:
    """Return how a module file is compressed, None for not at all.

    By the first bytes of its content where they are one of the three magics (what libkmod goes by), else by the suffix
    of its name, so that a damaged `.ko.xz` is a damaged xz file and not a damaged ELF file.
    """
    start = bytes(byte_view(head)[:6])
    for algorithm in ALGORITHMS:
        if start.startswith(_FORMATS[algorithm].MAGIC):
            return algorithm
    return SUFFIXES.get(PurePath(name).suffix)


def kernel_decompress(source: Buffer, algorithm: Algorithm, *, limit_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the image that a kernel built with this algorithm makes of a file, in chunks of at most 1 MiB.

    What counts is the sum of all chunks: an error may come after some. Bytes after the end of the stream are ignored.

    - gzip: the header is skipped (of its optional fields the kernel knows the file name only), the data inflated, CRC
      and length never looked at: the trailer may be wrong or missing; a cut in the data is an error.
    - xz: every cut and every corruption is an error, as is any integrity check but CRC32 or none.
    - zstd: a wrong checksum and corrupt data are errors; a cut is not, it yields what the whole blocks before it hold
      (of an incompressible block, every byte before it), which may be nothing.

    Raises ImageError, check `decompress: ...`, errno EINVAL (ENOMEM for a zstd window that no memory could hold), and
    ImageTooLarge if the image or the decoder's own memory would exceed `limit_bytes`.
    """
    return _limited(_FORMATS[algorithm].kernel_decompress(byte_view(source), limit_bytes), limit_bytes)


def user_decompress(source: Buffer, algorithm: Algorithm, *, limit_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the image that a caller unpacks before init_module, in chunks of at most 1 MiB.

    Strict where the kernel is not: whole streams, one or several, checksums right, and nothing but padding after them.
    (libkmod 30 itself is less strict in one case: it takes a zstd stream that ends early for its whole blocks.)

    Raises ImageError, errno EINVAL, and ImageTooLarge, both as `kernel_decompress` does.
    """
    return _limited(_FORMATS[algorithm].user_decompress(byte_view(source), limit_bytes), limit_bytes)


def declared_image_bytes(source: Buffer, algorithm: Algorithm) -> int | None:
    """Return the image size in bytes that a compressed file claims, None if it claims none.

    Costs next to nothing and is a hint only, by far not always true of a damaged file; gzip's is modulo 4 GiB.
    """
    view = byte_view(source)
    if not bytes(view[:6]).startswith(_FORMATS[algorithm].MAGIC):
        return None
    return _FORMATS[algorithm].declared_bytes(view)


def kernel_workspace_bytes(source: Buffer, algorithm: Algorithm) -> int:
    """Return what the kernel's decompressor allocates for itself while it runs, in bytes, not rounded to pages.

    The window or dictionary with the decoder's state; 0 where the header is such that nothing would be allocated.
    """
    view = byte_view(source)
    if not bytes(view[:6]).startswith(_FORMATS[algorithm].MAGIC):
        return 0
    return _FORMATS[algorithm].workspace_bytes(view)


def _limited(chunks: Iterator[bytes], limit_bytes: int | None) -> Iterator[bytes]:
    total_bytes = 0
    for chunk in chunks:
        total_bytes += len(chunk)
        if limit_bytes is not None and total_bytes > limit_bytes:
            raise ImageTooLarge("the decompressed image", limit_bytes)
        if chunk:
            yield chunk
