"""What a loader has to ask of stats_svc and has not sent yet."""

from __future__ import annotations

from typing import Final

from modpressure.fair import FairQueue
from modpressure.v1 import ledger_service_pb2 as pb

MAX_BATCH_OPERATIONS: Final = 200
"""Enough to share what a message and a commit cost; more would only have others wait longer for the next batch."""

MAX_BATCH_BYTES: Final = 8 << 20
"""Operations are no longer than some hundred bytes, but for the exports of a module; a message may have 16 MiB."""

_size_of: Final = pb.Operation.ByteSize


class Outbox(FairQueue[pb.Operation]):
    """Operations by the flow that asks, so that a client with a thousand calls does not hold up one with a single call.

    Never more than one for each call and its signal: a call asks nothing new before it is answered.
    """

    def take(self) -> list[pb.Operation]:
        """Remove and return what one batch holds, in turn."""
        if len(self) <= MAX_BATCH_OPERATIONS:
            everything = self.items()
            if sum(map(_size_of, everything)) <= MAX_BATCH_BYTES:
                # Nobody has to wait for a turn.
                self.clear()
                return everything
        taken: list[pb.Operation] = []
        size_bytes = 0
        while self and len(taken) < MAX_BATCH_OPERATIONS and size_bytes < MAX_BATCH_BYTES:
            operation = self.pop()
            size_bytes += operation.ByteSize()
            taken.append(operation)
        return taken
