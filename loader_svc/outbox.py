"""What a loader has to ask of stats_svc and has not sent yet."""

from __future__ import annotations

import sys
from typing import Final

from modpressure.fair import FairQueue
from modpressure.limits import PARSED_FACTOR
from modpressure.parsed_size import shape_of
from modpressure.v1 import ledger_service_pb2 as pb

MAX_BATCH_OPERATIONS: Final = 200
"""Enough to share what a message and a commit cost; more would only have others wait longer for the next batch."""

MAX_BATCH_BYTES: Final = 8 << 20
"""Operations are no longer than some hundred bytes, but for the exports of a module; a message may have 16 MiB."""

ENVELOPE_BYTES: Final = 128
"""What a batch takes besides its operations, at most: its numbers."""

_SHORT_BYTES: Final = 1024
_LENGTHS: Final = 12
_LEAST_BYTES: Final = 256
"""A short operation is counted without a look at it, as more than any takes: this, and that many times its length."""

_FRAME_BYTES: Final = 8
"""What an operation within a batch takes besides itself, at most: its tag and its length."""

_SHAPE: Final = shape_of(pb.Operation.DESCRIPTOR)


def size_of(operation: pb.Operation) -> int:
    """Return how much an operation takes of the longest message, which limits what is parsed, too; bytes, at most."""
    length_bytes = operation.ByteSize()
    if length_bytes <= _SHORT_BYTES:
        return _LEAST_BYTES + _LENGTHS * length_bytes
    parsed_bytes = _SHAPE.parsed_bytes(operation.SerializeToString(), sys.maxsize)
    return max(length_bytes + _FRAME_BYTES, parsed_bytes // PARSED_FACTOR + 1)


class Outbox(FairQueue[pb.Operation]):
    """Operations by the flow that asks, so that a client with a thousand calls does not hold up one with a single call.

    Never more than one for each call and its signal: a call asks nothing new before it is answered.
    """

    def take(self, most_bytes: int = MAX_BATCH_BYTES) -> list[pb.Operation]:
        """Remove and return what one batch holds, in turn: no more than some bytes, or a single one."""
        if len(self) <= MAX_BATCH_OPERATIONS:
            everything = self.items()
            if sum(map(size_of, everything)) <= most_bytes:
                # Nobody has to wait for a turn.
                self.clear()
                return everything
        taken: list[pb.Operation] = []
        size_bytes = 0
        while self and len(taken) < MAX_BATCH_OPERATIONS:
            size_bytes += size_of(self.peek())
            if taken and size_bytes > most_bytes:
                break
            taken.append(self.pop())
        return taken
