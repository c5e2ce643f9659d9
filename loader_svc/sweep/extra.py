"""Libraries that only sweeps need, and that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from modpressure.errors import ModpressureError

_WHAT_FOR: Final = {"distributed": "a dask cluster", "matplotlib": "a plot", "pyarrow": "a Parquet file"}


@contextmanager
def needed(library: str) -> Iterator[None]:
    """Import a library of the extra ``sweep`` in this block; ModpressureError says how to get it if it is missing."""
    try:
        yield
    except ImportError:
        raise ModpressureError(
            f"{_WHAT_FOR[library]} needs {library}, which is not installed: pip install 'modpressure[sweep]'"
        ) from None
