"""Loader processes, and the stream that each has at present."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from modpressure.v1 import ledger_service_pb2 as pb

if TYPE_CHECKING:
    from stats_svc.system import System

Caller: TypeAlias = tuple[str, int]
"""A call: instance id and call id."""

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Longest message to a loader, which takes 16 MiB, unless a single answer is longer."""

MAX_UNREAD_RESULTS: Final = 20_000
"""Answers that a loader may leave unread before nothing more is read from it."""


MAX_UNREAD_BYTES: Final = 32 << 20
"""Length of those, likewise."""


_FRAME_BYTES: Final = 8
"""What a message within a message takes besides itself: its tag and its length."""


MAX_INTERRUPTED: Final = 10_000
"""Calls of a loader of which it is remembered that their wait was ended by a signal."""


class Fence(IntEnum):
    """Why nothing more is accepted of a loader process."""

    NONE = 0
    LEASE_ENDED = 1
    """It was away for longer than its lease, or ended its stream itself."""

    REPLACED = 2
    """A newer process has its loader's name."""


class Session:
    """One stream of a loader: what waits to be sent to it."""

    def __init__(self, instance: Instance, *, strict: bool, heartbeats: bool = False, heard_at: float = 0) -> None:
        self.instance = instance
        self.heartbeats = heartbeats
        """Whether the loader says often that it is there, so that silence means something."""

        self.heard_at = heard_at
        """When it was last heard, by the ledger's clock."""

        self.served = 0
        """Batches of it that are being taken in: meanwhile it is not listened to, and its silence is not its own."""

        self.strict = strict
        """Whether a gap in the sequence is an error. It is not if the instance was loaded from the store: batches
        without durable effect may have been answered before that."""

        self.closed = False
        self._applied_sequence = instance.applied_sequence
        self.waiting: set[int] = set()
        """Calls whose operation was asked on this stream and waits for another call."""

        self._messages: deque[tuple[pb.ResultBatch, int]] = deque()
        """Each with its length, about."""

        self._error: Exception | None = None
        self._finished = False
        self._unread_results = self._unread_bytes = 0
        self._filled = asyncio.Event()
        self._read = asyncio.Event()

    def deliver(self, results: pb.ResultBatch) -> None:
        """Have ``results`` sent."""
        if self.closed:
            return
        self._unread_results += len(results.results)
        # Who is only woken in a group has no batch in it.
        applied_sequence = max(self._applied_sequence, results.applied_sequence)
        size_bytes = results.ByteSize()
        if size_bytes > MAX_MESSAGE_BYTES:
            # What is applied is said last: until then the loader asks nothing that could have these answers forgotten.
            for answers, part_bytes in _split(results):
                answers.applied_sequence = self._applied_sequence
                self._messages.append((answers, part_bytes))
                self._unread_bytes += part_bytes
            del results.results[:]
            size_bytes = results.ByteSize()
        self._unread_bytes += size_bytes
        self._applied_sequence = results.applied_sequence = applied_sequence
        last, last_bytes = self._messages[-1] if self._messages else (None, 0)
        # Who reads slowly gets fewer, longer messages. What is released was answered in a message before.
        if last is not None and not last.released_call_ids and last_bytes + size_bytes <= MAX_MESSAGE_BYTES:
            last.MergeFrom(results)
            self._messages[-1] = (last, last_bytes + size_bytes)
        else:
            self._messages.append((results, size_bytes))
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
        message, size_bytes = self._messages.popleft()
        self._unread_results -= len(message.results)
        self._unread_bytes -= size_bytes
        self._read.set()
        return message

    async def drained(self) -> None:
        """Return when the loader has read enough to be listened to."""
        while not self.closed and (self._unread_results > MAX_UNREAD_RESULTS or self._unread_bytes > MAX_UNREAD_BYTES):
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


def _split(results: pb.ResultBatch) -> Iterator[tuple[pb.ResultBatch, int]]:
    """Yield the answers of a message in messages that are not too long, and how long each is."""
    part, part_bytes = pb.ResultBatch(), 0
    for result in results.results:
        size_bytes = result.ByteSize() + _FRAME_BYTES
        if part.results and part_bytes + size_bytes > MAX_MESSAGE_BYTES:
            yield part, part_bytes
            part, part_bytes = pb.ResultBatch(), 0
        part.results.append(result)
        part_bytes += size_bytes
    yield part, part_bytes


@dataclass(slots=True, eq=False)
class Instance:
    """A loader process, new at each of its starts."""

    id: str
    loader: str
    applied_sequence: int = 0
    last_seen_ns: int = 0
    """When its fence was committed, or the last batch that it had not sent before: what that did it may ask again."""

    has_news: bool = True
    """Whether that is to be set by the next commit."""

    nothing_before: bool = True
    """Whether it was answered all that it had asked before its last batch; until the next commit."""

    restored: bool = False
    """Whether it was loaded from the store: then what it was told before that may not be known here."""

    session: Session | None = None
    away_since: float | None = None
    """When its last stream ended, by the ledger's clock; None while it has one, and when its lease is over."""

    fence: Fence = Fence.NONE
    former: tuple[str, ...] = ()
    """Ids that the same process had before."""

    patterns: tuple[str, ...] | None = None
    """Which systems the token is for that it showed last; None if it has shown none since it was loaded from the store.
    Who shows one for fewer can't be it, nor take its place."""

    held_bytes: int = 0
    calls: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Calls that have not ended, as far as they have asked something: system and module of each, if that was said."""

    requests: dict[int, str] = field(default_factory=dict)
    """Requests that have not ended and that it holds a claim or a place for, or waits for one; and their system."""

    waits: dict[int, System] = field(default_factory=dict)
    """Calls that wait, and their system."""

    interrupted: dict[int, None] = field(default_factory=dict)
    """Calls whose wait was ended by a signal: asked again, they get the same answer. The last some thousand, for one
    that asks nothing more is never heard of again."""

    @property
    def silent_since(self) -> float | None:
        """When it was last heard, by the ledger's clock; None if its silence means nothing."""
        session = self.session
        if self.fence:
            return None
        if session is None:
            return self.away_since
        return session.heard_at if session.heartbeats and not session.served else None
