"""A group of operations: what they change, and what is answered once that is committed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.rows import Changes, Segment, SegmentKind, SystemDelta, SystemRow
from stats_svc.session import Session

if TYPE_CHECKING:
    from stats_svc.claims import Claims

SEGMENT_EVENTS: Final = 2000
"""Events after which another segment is begun: reading one event means reading its segment."""

OPERATION_BYTES: Final = 1024
"""Memory that an operation takes, or a call or module that it records, besides what it says: its event, its answer, and
what it changes, about."""


class Group:
    """Gathers while the group before is being committed."""

    def __init__(self) -> None:
        self.results: dict[Session, pb.ResultBatch] = {}
        """Answers by the stream that asked; each stream hears of its group even if nothing is answered."""

        self.told_bytes: Counter[Session] = Counter()
        """Of what answers tell that is longer than what was asked: records and symbols, by the stream that asked."""

        self.released: list[tuple[str, int]] = []
        """Instance and call of live modules that were removed."""

        self.fenced: list[str] = []
        """Loader processes that are over: kept in memory until this is committed."""

        self.unheld: list[tuple[Claims, str]] = []
        """Claims that nobody holds any more: kept in memory until this is committed."""

        self.deleted_systems: list[str] = []
        self.touched: set[str] = set()
        """Systems of which something that is watched has changed."""

        self.size_bytes = 0
        """Memory that it takes, about."""

        self.steps = [Changes()]
        """What is to be committed."""

        self.durable = False
        """Whether anything of it is to be committed."""

        self.imports: list[Callable[[], None]] = []
        """Work for the writer once this is committed, which commits by itself."""

        self._followers: list[asyncio.Future[None]] = []

    def weigh(self, count: int, message_bytes: int = 0) -> None:
        """Note that it holds so many more operations, calls or modules, and what they say."""
        self.size_bytes += count * OPERATION_BYTES + message_bytes

    def results_of(self, session: Session) -> pb.ResultBatch:
        """Return the message to which answers for ``session`` are added."""
        results = self.results.get(session)
        if results is None:
            results = self.results[session] = pb.ResultBatch()
        return results

    def delta(self, system: str) -> SystemDelta:
        """Return what is added to ``system``, to be added to."""
        deltas = self.steps[-1].deltas
        delta = deltas.get(system)
        if delta is None:
            delta = deltas[system] = SystemDelta()
            self.durable = True
            self.touched.add(system)
        return delta

    def segment(
        self, delta: SystemDelta, kind: SegmentKind, event_id: int, *, instance_id: str = "", loader: str = ""
    ) -> Segment:
        """Return the segment that the event ``event_id`` goes into; to be added to."""
        if delta.segments:
            last = delta.segments[-1]
            if (
                last.count < SEGMENT_EVENTS
                and last.kind is kind
                and last.instance_id == instance_id
                and last.loader == loader
            ):
                return last
        segment = Segment(kind, event_id, instance_id=instance_id, loader=loader)
        delta.segments.append(segment)
        return segment

    def create(self, system: SystemRow) -> None:
        """Add the creation of a system, after all that came before it."""
        self._step(Changes(create=system), system.id)

    def reset(self, system: str, time_ns: int) -> None:
        """Add the reset of a system, after all that came before it."""
        self._step(Changes(reset=(system, time_ns)), system)

    def delete(self, system: str) -> None:
        """Add the deletion of a system, after all that came before it."""
        self._step(Changes(delete=system), system)
        self.deleted_systems.append(system)

    def _step(self, step: Changes, system: str) -> None:
        self.steps.append(step)
        self.durable = True
        self.touched.add(system)

    def follow(self) -> asyncio.Future[None]:
        """Return a future that is done when this group is, or fails with it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._followers.append(future)
        return future

    def done(self, error: Exception | None = None) -> None:
        """Tell who follows that it is committed, or why it is not."""
        for future in self._followers:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
