"""Loader processes, and the stream that each has at present."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from modpressure.v1 import ledger_service_pb2 as pb

if TYPE_CHECKING:
    from stats_svc.system import System

MAX_UNREAD_RESULTS: Final = 20_000
"""Answers that a loader may leave unread before nothing more is read from it."""


class Session:
    """One stream of a loader: what waits to be sent to it."""

    def __init__(self, instance: Instance, *, strict: bool) -> None:
        self.instance = instance
        self.strict = strict
        """Whether a gap in the sequence is an error. It is not if the instance was loaded from the store: batches
        without durable effect may have been answered before that."""

        self.closed = False
        self._applied_sequence = instance.applied_sequence
        self.waiting: set[int] = set()
        """Calls whose operation was asked on this stream and waits for another call."""

        self._messages: deque[pb.ResultBatch] = deque()
        self._error: Exception | None = None
        self._finished = False
        self._unread_results = 0
        self._filled = asyncio.Event()
        self._read = asyncio.Event()

    def deliver(self, results: pb.ResultBatch) -> None:
        """Have ``results`` sent."""
        if self.closed:
            return
        # Who is only woken in a group has no batch in it.
        self._applied_sequence = max(self._applied_sequence, results.applied_sequence)
        results.applied_sequence = self._applied_sequence
        last = self._messages[-1] if self._messages else None
        # Who reads slowly gets fewer, longer messages. What is released was answered in a message before.
        if last is not None and not last.released_call_ids:
            last.MergeFrom(results)
        else:
            self._messages.append(results)
        self._unread_results += len(results.results)
        self._filled.set()

    def finish(self) -> None:
        """Have a last message sent after all others."""
        self.deliver(pb.ResultBatch())
        self._finished = True
        self._filled.set()

    async def next_results(self) -> pb.ResultBatch | None:
        """Return the next message to send, once there is one, None after the last.

        What the stream was closed with is raised.
        """
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._finished:
                return None
            self._filled.clear()
            await self._filled.wait()
        message = self._messages.popleft()
        self._unread_results -= len(message.results)
        self._read.set()
        return message

    async def drained(self) -> None:
        """Return when the loader has read enough to be listened to."""
        while self._unread_results > MAX_UNREAD_RESULTS and not self.closed:
            self._read.clear()
            await self._read.wait()

    def close(self, error: Exception) -> None:
        """End the stream with ``error``; what is not yet sent is dropped."""
        if self.closed:
            return
        self.closed = True
        self._error = error
        self._messages.clear()
        self._filled.set()
        self._read.set()


@dataclass(slots=True, eq=False)
class Instance:
    """A loader process, new at each of its starts."""

    id: str
    loader: str
    applied_sequence: int = 0
    last_seen_ns: int = 0
    restored: bool = False
    """Whether it was loaded from the store: then what it was told before that may not be known here."""

    session: Session | None = None
    away_since: float | None = None
    """When its last stream ended, by the ledger's clock; None while it has one, or has nothing to lose."""

    held_bytes: int = 0
    waits: dict[int, System] = field(default_factory=dict)
    """Calls that wait, and their system."""

    interrupted: set[int] = field(default_factory=set)
    """Calls whose wait was ended by a signal: asked again, they get the same answer."""
