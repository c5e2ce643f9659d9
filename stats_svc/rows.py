"""What is stored, and what a group of operations changes of it.

Plain data between the ledger, which knows no SQL, and the store, which knows no rules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeAlias

from modpressure.errors import ModpressureError
from modpressure.kernel.counters import Counters, FailedModule
from modpressure.kernel.requesters import Requester, Tally
from modpressure.kernel.system_memory import NOTHING, Amounts, Holding
from modpressure.v1 import ledger_service_pb2, stats_service_pb2


class StoreError(ModpressureError):
    """The database can't be used at present; the sentence names it."""


class StandingBy(StoreError):
    """Another stats_svc writes to the database; this one may do so when that is gone."""

    def __init__(self, sentence: str, address: str = "", *, is_alive: bool = False) -> None:
        """Say so; ``address`` is where that one is reached, empty if that is not known."""
        super().__init__(sentence)
        self.address = address
        self.is_alive = is_alive
        """Whether it was seen to do something."""


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
    limits: Amounts | None = None
    """What its memory has, 0 where there is no limit; None if there is none at all."""

    peak_taken: Amounts = NOTHING
    """The most that was taken of that."""


@dataclass(frozen=True, slots=True)
class HeldRow:
    """What a call, or the module that it left live, holds of its system's memory."""

    system: str
    instance_id: str
    call_id: int
    holding: Holding


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

    formation: bytes = b""
    """A serialized ``modpressure.v1.Formation``: its links; empty if it has none."""


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """A loader process, as far as recognising its batches needs it."""

    instance_id: str
    loader: str
    applied_sequence: int
    last_seen_ns: int
    fence: int = 0
    """Number of ``stats_svc.session.Fence``."""

    nothing_before: bool = False
    """Whether it asks again nothing that was committed before this is. Not stored."""


ClaimKey: TypeAlias = tuple[str, str]
"""A system and a client's request id."""


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A client's request that is carried out once."""

    system: str
    request_id: str
    digest: bytes
    instance_id: str
    call_id: int
    """The call that holds the claim; the empty instance and 0 if nobody does."""

    settled: bool
    record: bytes
    """A serialized ``modpressure.v1.ClaimRecord``."""


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

    uses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What modules that were formed use, if anything."""

    unused: set[str] = field(default_factory=set)
    """Modules that used others and were removed, whatever became of their names since."""

    segments: list[Segment] = field(default_factory=list)
    held: dict[tuple[str, int], Holding | None] = field(default_factory=dict)
    """By instance and call, what is held of the system's memory as it is now, None for nothing any more."""

    peak_taken: Amounts | None = None
    """The most that was taken of it, if something was taken."""

    requesters: defaultdict[Requester, Tally] = field(default_factory=lambda: defaultdict(Tally))
    """What is added to requesters."""

    claims: dict[str, ClaimRow] = field(default_factory=dict)
    """By request id, claims as they are now."""

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


@dataclass(frozen=True, slots=True, order=True)
class ClockGap:
    """A time of the wall clock that did not pass, or may not have."""

    begin_ns: int
    end_ns: int
    is_sure: bool


@dataclass(slots=True)
class Commit:
    """All that is committed together: steps in order, and how far each loader's batches have been applied."""

    time_ns: int
    steps: list[Changes]
    instances: list[InstanceRow]
    clock_gaps: Sequence[ClockGap] | None = None
    """All of the clocks that told this time and the earlier ones, None if they are those that are stored."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which events need not be kept: those that are too many or too old, once they are settled."""

    events: int
    """How many of each system's newest are kept; 0 for all."""

    before_ns: int
    """What was committed before then is too old; 0 for nothing."""

    settled_ns: int
    """What was committed since then is kept in any case."""


@dataclass(slots=True)
class Snapshot:
    """All that the ledger keeps in memory, as it is stored."""

    systems: list[SystemRow]
    modules: list[ModuleRow]
    """Oldest first."""

    instances: list[InstanceRow]
    """Those that are not fenced."""

    held: list[HeldRow] = field(default_factory=list)
    requesters: dict[str, list[Requester]] = field(default_factory=dict)
    """By system, those that it tells apart."""

    claims: list[ClaimRow] = field(default_factory=list)
    """Those that are held."""

    commit_time_ns: int = 0
    """Of the last commit."""

    clock_gaps: list[ClockGap] = field(default_factory=list)
    """Of the clocks that told this time and the earlier ones."""


@dataclass(slots=True)
class SystemSnapshot:
    """What the ledger keeps in memory of one system, as it is stored."""

    row: SystemRow
    modules: list[ModuleRow]
    """Oldest first."""

    held: list[HeldRow]
    requesters: list[Requester]


class LedgerStore(Protocol):
    """What the ledger needs of a store. Each method blocks, runs in one thread at a time, and raises StoreError."""

    def load(self) -> Snapshot:
        """Return everything that is kept in memory, having shown that the database can be written to.

        StandingBy while another process writes to it.
        """

    def commit(self, commit: Commit) -> None:
        """Store all of it in one transaction, durably, or nothing. StandingBy if another process has taken over."""

    def begin_import(self) -> str:
        """Return the key of a system that nobody sees before ``show_imported``."""

    def import_rows(self, key: str, batches: Sequence[Any]) -> None:
        """Add rows of a file to a system that is being imported, in one short transaction.

        BadRequest if they contradict each other, StoreError if the database was lost since it was begun.
        """

    def imported(self, key: str, system: str) -> SystemSnapshot:
        """Return what there is of a system that is being imported, as if it were called so."""

    def show_imported(self, key: str, system: str) -> None:
        """Call it ``system`` from now on, in place of what there is of that."""

    def give_import_up(self, key: str) -> None:
        """Have what is there of it taken away; nothing happens if it is shown."""

    def ping(self) -> None:
        """Return if the database answers and this process may write to it, which is thereby heard of."""

    @property
    def leads_for_certain(self) -> bool:
        """Whether no other process can have written to the database since this one last did."""

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
        """Return the least number of a segment with what a loader process may ask again; 0 if it is not known."""

    def instance(self, instance_id: str) -> InstanceRow | None:
        """Return a loader process, also one that is fenced; None if it is not known."""

    def find_claims(self, keys: Collection[ClaimKey]) -> dict[ClaimKey, ClaimRow]:
        """Return those of some claims that are stored."""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A name that was a duplicate, and its place in the list: the newest name has the highest."""

    position: int
    module: FailedModule
