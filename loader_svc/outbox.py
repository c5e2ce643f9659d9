"""What a loader has to ask of stats_svc and has not sent yet."""

from __future__ import annotations

from typing import Final

from modpressure.fair import FairQueue, Flow
from modpressure.v1 import ledger_service_pb2 as pb

MAX_BATCH_OPERATIONS: Final = 200
"""Enough to share what a message and a commit cost; more would only have others wait longer for the next batch."""

MAX_BATCH_BYTES: Final = 8 << 20
"""Operations are no longer than some hundred bytes, but for the exports of a module; a message may have 16 MiB."""


class Outbox(FairQueue[pb.Operation]):
    """Operations by the flow that asks, so that a client with a thousand calls does not hold up one with a single call.

    Never more than one for each call and its signal: a call asks nothing new before it is answered.
    """

    __slots__ = ("_size_bytes",)

    def __init__(self) -> None:
        super().__init__()
        self._size_bytes = 0

    def take(self) -> list[pb.Operation]:
        """Remove and return what one batch holds, in turn."""
        if len(self) <= MAX_BATCH_OPERATIONS and self._size_bytes <= MAX_BATCH_BYTES:
            # Nobody has to wait for a turn.
            return self.pop_all()
        taken: list[pb.Operation] = []
        size_bytes = 0
        while self and len(taken) < MAX_BATCH_OPERATIONS and size_bytes < MAX_BATCH_BYTES:
            operation = self.pop()
            size_bytes += operation.ByteSize()
            taken.append(operation)
        self._size_bytes -= size_bytes
        return taken

    def put(self, item: pb.Operation, flow: Flow) -> None:
        """Add an operation behind those of the same flow."""
        self._size_bytes += item.ByteSize()
        super().put(item, flow)

    def clear(self) -> None:
        """Drop all operations."""
        self._size_bytes = 0
        super().clear()
