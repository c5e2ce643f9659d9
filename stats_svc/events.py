"""Reading events back out of their segments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Final

from modpressure.v1 import ledger_service_pb2, stats_service_pb2
from modpressure.v1.call_pb2 import Event
from stats_svc.group import SEGMENT_EVENTS
from stats_svc.rows import LedgerStore, SegmentKind, StoredSegment

FIRST_SEGMENTS: Final = 4
MAX_SEGMENTS: Final = 256
"""Segments that one query returns: few at first, for each may hold thousands of events, and more if they hold few."""

MAX_SCANNED_EVENTS: Final = 50_000
"""Events that are looked at for one page: with a rare filter a page ends before it is full."""

MAX_PAGE_BYTES: Final = (4 << 20) - (64 << 10)
"""Most bytes of events on a page, unless a single one has more: gRPC's clients take 4 MiB if nobody says otherwise."""

_FRAME_BYTES: Final = 5
"""What an event takes on a page besides itself: its tag and its length."""

_CACHED_SEGMENTS: Final = 8


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are wanted; what is empty admits all."""

    module: str = ""
    outcomes: frozenset[int] = frozenset()
    """Numbers of ``modpressure.v1.Outcome``; if there are any, only calls are wanted."""

    def admits(self, event: Event) -> bool:
        """Return whether ``event`` is wanted."""
        if event.HasField("call"):
            call = event.call
            return (not self.outcomes or call.outcome in self.outcomes) and self.module in ("", call.module)
        return not self.outcomes and self.module in ("", event.unload.module)


@dataclass(frozen=True, slots=True)
class EventPage:
    """Some events, and the id of the last that was looked at; 0 if there are no more."""

    events: list[Event]
    last_event_id: int


class EventLog:
    """The events of all systems. Every method blocks, may run in any thread, and raises StoreError."""

    def __init__(self, store: LedgerStore) -> None:
        self._store = store
        self._cache: OrderedDict[tuple[str, int, int], list[Event]] = OrderedDict()
        self._lock = Lock()

    def page(
        self, system: str, wanted: EventFilter, *, limit: int, newest: bool, after_event_id: int, before_event_id: int
    ) -> EventPage:
        """Return at most ``limit`` events between two ids, both excluded; a ``before_event_id`` of 0 bounds nothing."""
        events: list[Event] = []
        size_bytes = 0
        found = self._events(system, newest=newest, after_event_id=after_event_id, before=before_event_id)
        last_event_id = 0
        for scanned, event in enumerate(found, 1):
            if wanted.admits(event):
                size_bytes += event.ByteSize() + _FRAME_BYTES
                if events and size_bytes > MAX_PAGE_BYTES:
                    return EventPage(events, last_event_id)
                events.append(event)
            last_event_id = event.event_id
            if len(events) >= limit or scanned >= MAX_SCANNED_EVENTS:
                return EventPage(events, last_event_id)
        return EventPage(events, 0)

    def find(self, system: str, instance_id: str, call_ids: Collection[int]) -> dict[int, int]:
        """Return the event of each of some calls of a loader process, as far as it may ask for that again.

        What it says was answered is not looked at: after days of work that may be millions of events. Calls that were
        recorded in bulk are not found.
        """
        found: dict[int, int] = {}
        missing = set(call_ids)
        first_segment = self._store.first_segment(instance_id)
        for segment in self._segments(system, SegmentKind.EVENTS, newest=True, after_event_id=0, before=0):
            if not missing or segment.number < first_segment:
                break
            for event in self._decoded(system, segment):
                ended = event.call if event.HasField("call") else event.unload
                if ended.instance_id == instance_id and ended.call_id in missing:
                    found[ended.call_id] = event.event_id
            missing.difference_update(found)
        return found

    def _events(self, system: str, *, newest: bool, after_event_id: int, before: int) -> Iterator[Event]:
        for segment in self._segments(system, None, newest=newest, after_event_id=after_event_id, before=before):
            events = self._decoded(system, segment)
            for event in reversed(events) if newest else events:
                if event.event_id > after_event_id and (not before or event.event_id < before):
                    yield event

    def _segments(
        self, system: str, kind: SegmentKind | None, *, newest: bool, after_event_id: int, before: int
    ) -> Iterator[StoredSegment]:
        limit = FIRST_SEGMENTS
        while True:
            segments = self._store.segments(
                system,
                after_event_id=after_event_id,
                before_event_id=before or None,
                kind=kind,
                newest=newest,
                limit=limit,
            )
            yield from segments
            if len(segments) < limit:
                return
            if newest:
                before = segments[-1].first_event_id
            else:
                after_event_id = segments[-1].last_event_id
            # Segments of quiet times hold an event or two.
            if sum(segment.last_event_id - segment.first_event_id + 1 for segment in segments) < SEGMENT_EVENTS:
                limit = min(4 * limit, MAX_SEGMENTS)

    def _decoded(self, system: str, segment: StoredSegment) -> list[Event]:
        """Return a segment's events, oldest first; they are shared and must not be changed."""
        # Numbers may come again when those of the newest segments are gone; no other commit has had this time.
        key = (system, segment.number, segment.commit_time_ns)
        with self._lock:
            events = self._cache.get(key)
            if events is not None:
                self._cache.move_to_end(key)
                return events
        events = decode(system, segment)
        with self._lock:
            self._cache[key] = events
            while len(self._cache) > _CACHED_SEGMENTS:
                self._cache.popitem(last=False)
        return events


def decode(system: str, segment: StoredSegment) -> list[Event]:
    """Return the events of a segment, oldest first and complete."""
    events: list[Event] = []
    if segment.kind == SegmentKind.EVENTS:
        events.extend(stats_service_pb2.ListEventsResponse.FromString(segment.encoded).events)
    else:
        for call in ledger_service_pb2.RecordCalls.FromString(segment.encoded).calls:
            event = Event(call=call)
            event.call.instance_id = segment.instance_id
            event.call.loader = segment.loader
            events.append(event)
    for event_id, event in enumerate(events, segment.first_event_id):
        event.event_id = event_id
        event.commit_time.FromNanoseconds(segment.commit_time_ns)
        ended = event.call if event.HasField("call") else event.unload
        ended.system = system
        ended.event_id = event_id
    return events
