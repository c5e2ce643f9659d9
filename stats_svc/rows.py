"""What is stored, and what a group of operations changes of it.

Plain data between the ledger, which knows no SQL, and the store, which knows no rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from modpressure.errors import ModpressureError
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.v1 import ledger_service_pb2, stats_service_pb2


class StoreError(ModpressureError):
    """The database can't be used at present; the sentence names it."""


@dataclass(slots=True)
class SystemRow:
    """A simulated machine. Times are nanoseconds since 1970 UTC, 0 for never."""

    id: str
    policy: int
    """Number of ``modpressure.v1.Policy``."""

    create_time_ns: int
    reset_time_ns: int = 0
    update_time_ns: int = 0
    next_event_id: int = 1
    peak_held_bytes: int = 0
    live_modules: int = 0
    """Counted when read, not stored."""

    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """An entry of a system's modules list."""

    system: str
    name: str
    state: int
    """Number of ``modpressure.v1.LoadedModule.State``."""

    instance_id: str
    call_id: int
    """The call that inserted it, which owns it."""

    loader: str
    core_bytes: int
    position: int
    """Grows with each insertion into the system's list: the newest has the highest."""


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """A loader process, as far as recognising its batches needs it."""

    instance_id: str
    loader: str
    applied_sequence: int
    last_seen_ns: int


class SegmentKind(IntEnum):
    """What the bytes of a segment are."""

    EVENTS = 1
    """A ``ListEventsResponse`` whose events lack their id, their commit time and their system."""

    CALLS = 2
    """A ``RecordCalls`` whose calls lack, besides, their instance and their loader."""


@dataclass(slots=True)
class Segment:
    """Events of a system that follow one another and are committed together.

    Their ids count up from ``first_event_id``. A row for each event would cost more than all the rest of a commit.
    """

    kind: SegmentKind
    first_event_id: int
    count: int = 0
    instance_id: str = ""
    loader: str = ""
    events: stats_service_pb2.ListEventsResponse = field(default_factory=stats_service_pb2.ListEventsResponse)
    records: list[ledger_service_pb2.RecordCalls] = field(default_factory=list)

    def encode(self) -> bytes:
        """Return the bytes to store."""
        if self.kind is SegmentKind.EVENTS:
            return self.events.SerializeToString()
        # Messages that are concatenated read as one whose repeated fields are concatenated (protobuf.dev/encoding).
        return b"".join(record.SerializeToString() for record in self.records)


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """A segment as it is read back."""

    number: int
    """Unique; grows with each segment of whatever system."""

    kind: int
    first_event_id: int
    last_event_id: int
    commit_time_ns: int
    instance_id: str
    loader: str
    encoded: bytes


@dataclass(slots=True)
class SystemDelta:
    """What is to be added to one system."""

    counters: Counters = field(default_factory=Counters)
    events: int = 0
    peak_held_bytes: int = 0
    """The peak as it is now; the stored one only ever rises."""

    first_event_id: int = 0
    """The first of these events; it places the names of ``failed`` after all that failed before."""

    failed: dict[str, FailedModule] = field(default_factory=dict)
    """Failures as a duplicate to be added to a name's, in the order in which the names first failed."""

    modules: dict[str, ModuleRow | None] = field(default_factory=dict)
    """Entries of the modules list as they are now, None for one that is gone."""

    segments: list[Segment] = field(default_factory=list)

    def add(self, counters: Counters, failed: dict[str, FailedModule]) -> None:
        """Add what some calls count."""
        self.counters.add(counters)
        for name, failures in failed.items():
            known = self.failed.get(name)
            if known is None:
                self.failed[name] = failures
            else:
                known.add(failures)


@dataclass(slots=True)
class Changes:
    """One step of a commit: at most one of create, reset and delete, and after it what was added to systems."""

    create: SystemRow | None = None
    reset: tuple[str, int] | None = None
    """A system, and the time of its reset."""

    delete: str = ""
    deltas: dict[str, SystemDelta] = field(default_factory=dict)


@dataclass(slots=True)
class Commit:
    """All that is committed together: steps in order, and how far each loader's batches have been applied."""

    time_ns: int
    steps: list[Changes]
    instances: list[InstanceRow]


@dataclass(slots=True)
class Snapshot:
    """All that the ledger keeps in memory, as it is stored."""

    systems: list[SystemRow]
    modules: list[ModuleRow]
    """Oldest first."""

    instances: list[InstanceRow]


class LedgerStore(Protocol):
    """What the ledger needs of a store. Each method blocks, runs in one thread at a time, and raises StoreError."""

    def load(self) -> Snapshot:
        """Return everything that is kept in memory, having shown that the database can be written to."""

    def commit(self, commit: Commit) -> None:
        """Store all of it in one transaction, durably, or nothing."""

    def ping(self) -> None:
        """Return if the database answers."""

    def segments(
        self,
        system: str,
        *,
        after_event_id: int = 0,
        before_event_id: int | None = None,
        kind: SegmentKind | None = None,
        newest: bool,
        limit: int,
    ) -> Sequence[StoredSegment]:
        """Return segments with an event in the open interval, in order of their ids or, if ``newest``, against it.

        Only those of ``kind`` if it is given. The numbers of a system's segments grow with the ids of their events.
        """

    def first_segment(self, instance_id: str) -> int:
        """Return the least number of a segment that may hold an event of a loader process; 0 if it is not known."""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A name that was a duplicate, and its place in the list: the newest name has the highest."""

    position: int
    module: FailedModule
