"""What the three decompressors share: how much at a time, and how they refuse."""

from typing import Final

from loader_svc.image.errors import ImageError

CHUNK_BYTES: Final = 1 << 20
"""Longest piece of output at a time."""
INPUT_BYTES: Final = 1 << 16
"""Input handed to a decoder at a time: small beside the output, so that what it copies of it does not matter."""


def refused(check: str, value: object, reason: str, errno: str = "EINVAL") -> ImageError:
    """Return the error of a decompressor's check."""
    return ImageError(errno, f"decompress: {check}", value, reason)


def check_magic(view: memoryview, magic: bytes, algorithm: str) -> None:
    """Raise ImageError unless the view starts with `magic`."""
    if view[: len(magic)] != magic:
        raise refused("magic", bytes(view[: len(magic)]).hex(" "), f"not {algorithm} data")


def skip_zeros(view: memoryview, start: int) -> int:
    """Return where the zeros that begin at `start` end."""
    while piece := bytes(view[start : start + INPUT_BYTES]):
        rest = piece.lstrip(b"\0")
        start += len(piece) - len(rest)
        if rest:
            break
    return start
