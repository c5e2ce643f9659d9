"""Bytes wherever they are: read into memory, mapped, or a part of either."""

import mmap

Buffer = bytes | bytearray | memoryview | mmap.mmap
"""What an image may be handed over as (collections.abc.Buffer needs Python 3.12)."""


def byte_view(buffer: Buffer) -> memoryview:
    """Return a flat view of single bytes over `buffer`, without copying (only a strided memoryview is copied).

    While the view lives, a bytearray cannot be resized and a mapping cannot be closed.
    """
    view = memoryview(buffer)
    if view.ndim == 1 and view.format == "B" and view.c_contiguous:
        return view
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
