"""The first moments of a program, in which it imports what it needs: they are long."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# What gRPC's core prints by itself is no line of a log, nor a sentence for a user; it is read when grpc is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@contextmanager
def starting() -> Iterator[None]:
    """Have Ctrl-C end the process at once while the block runs: exit status 130, and no stack trace of an import.

    For what needs no end in order yet. Where interrupts are ignored, as in a job of a shell's background, they stay so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
