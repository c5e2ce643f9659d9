"""The ledger: the one writer of a stats_svc process.

The operations of all streams are applied in the order in which they arrive, to the state in memory; what they change
gathers in a group, which is committed in one transaction in the writer's thread while the next group gathers. Then,
and not before, the group is answered. A group that changes nothing durable is answered without a commit, but after the
commit of the group before it, whose changes its answers may rest on.

Exactly once: a batch whose sequence was applied before is not applied again. What ended a call is looked up in the
log; whatever else it asks is evaluated once more, which the state machines allow to the same caller.

If a commit fails nothing of its group is answered, all streams end, and the state is loaded again from the store as
soon as that can be written to; loaders then come back and ask again.

A loader that is silent, or whose stream is gone, keeps its lease for a while. After that, at once if it ended its
stream by itself or if a newer process has its name, the names that its calls had reserved are given up, and waiters are
told what the kernel tells them when a load fails. A gate that its call held goes to the first call that waits for it:
there is no result to share, so that one works for itself. Its calls are logged as abandoned; live modules stay.
From then on nothing more is accepted of that process, which is stored: it can neither repeat nor overtake what came
after it. Time in which this process itself did not run is nobody's silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import structlog

from modpressure.access import systems_of
from modpressure.errors import BadRequest, Forbidden, LeaseEnded, ModpressureError, Replaced, Unavailable, shown
from modpressure.kernel.counters import SIZE_BITS
from modpressure.kernel.system_memory import Amounts
from modpressure.tokens import ALL, covers, is_for
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.ages import Ages
from stats_svc.events import EventLog
from stats_svc.group import Group
from stats_svc.names import check_hello, is_request_id
from stats_svc.rows import (
    ClaimKey,
    ClaimRow,
    ClockGap,
    Commit,
    InstanceRow,
    LedgerStore,
    Snapshot,
    StandingBy,
    StoreError,
    SystemRow,
    SystemSnapshot,
)
from stats_svc.session import Fence, Instance, Session
from stats_svc.state import LedgerState, LeftBehind
from stats_svc.system import System
from stats_svc.systems import DEFAULT_POLICY, DEFAULT_SYSTEM, Systems, check_imported

T = TypeVar("T")
R = TypeVar("R")

MAX_GROUP_BYTES: Final = 20 << 20
"""How much gathers, as ``Group.weigh`` has it, before nothing more is read from any stream."""

PING_SECONDS: Final = 1.0
"""How often the database is asked whether it is there, and those who stand by hear that this process is."""

STAND_BY_SECONDS: Final = 0.25
"""How often a process that stands by looks whether it is to lead."""

MIN_PAUSE_SECONDS: Final = 0.01
MAX_PAUSE_SECONDS: Final = PING_SECONDS / 4
"""How often leases are looked at, if none ends before."""

_FIRST_RETRY_SECONDS: Final = 0.1
_MAX_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class Ledger:
    """Applies, commits and answers the operations of all loaders. To be used from one event loop."""

    def __init__(
        self,
        store: LedgerStore,
        *,
        lease_seconds: float = 10.0,
        system_limit: int = 0,
        on_available: Callable[[bool], None] = lambda available: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        ages: Ages | None = None,
    ) -> None:
        """Prepare; ``start`` loads.

        Systems are created up to ``system_limit``; 0 is no limit. ``on_available`` is called with whether the database
        can be written to, when that changes. ``ages`` judges what is old, by these clocks if it is not given.
        """
        self._store = store
        self._events = EventLog(store)
        self._lease_seconds = lease_seconds
        self._system_limit = system_limit
        self._on_available = on_available
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._ages = ages or Ages(wall_clock_ns, self._clock_ns)
        self._stored_gaps: tuple[ClockGap, ...] = ()
        """What the store knows of them."""

        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._state = LedgerState(Snapshot([], [], []), self._clock_ns, system_limit=system_limit)
        self._expiry: asyncio.TimerHandle | None = None
        """Where a request of the kernel waits for a place: when it is looked at again."""

        self._group = Group()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._away = "stats_svc is starting"
        """Why nothing is accepted at present, empty if it is."""

        self.leader_address = ""
        """Where the process is reached that writes to the store instead of this one; empty if none is known to."""

        self._sessions: set[Session] = set()
        self._unsaved: dict[str, Instance] = {}
        """Loader processes whose place in their stream is not yet stored as it is."""

        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: StoreError | None = None
        """Why the database could not be written to when it was last asked, beside any commit."""

        self.held_bytes = 0
        """Memory that the connected loaders hold, as they last said."""

    # --- life ---

    async def start(self) -> None:
        """Load what is stored, and serve. StoreError if the database can't be used."""
        snapshot = await self._load_first()
        works = (self._commit_groups(), self._keep_leases(), self._keep_pinging())
        self._tasks = [asyncio.create_task(work) for work in works]
        if snapshot is None:
            self._tasks.append(asyncio.create_task(self._lead_later()))
        else:
            await self._lead(snapshot)

    async def _load_first(self) -> Snapshot | None:
        """Return what is stored, None if another process writes to the store and is well.

        One that was killed a moment ago looks the same at first; so this waits until it is either.
        """
        while True:
            try:
                return await self._in_writer(self._store.load)
            except StandingBy as error:
                if error.is_alive:
                    self._stand_by(error)
                    return None
            await asyncio.sleep(STAND_BY_SECONDS)

    def _stand_by(self, error: StandingBy) -> None:
        if self.leader_address != error.address:
            _log.info("standing by", leader=error.address)
        self._away, self.leader_address = error.sentence, error.address
        self._on_available(False)

    async def _lead_later(self) -> None:
        await self._lead(await self._load_when_possible())
        _log.info("leading")

    async def _lead(self, snapshot: Snapshot) -> None:
        self._take_over(snapshot)
        if DEFAULT_SYSTEM not in self._state.systems:
            await self.create_system(DEFAULT_SYSTEM, DEFAULT_POLICY)

    async def stop(self, grace_seconds: float | None = None) -> bool:
        """Commit and answer what has been asked, end all streams, and stop; all that within a grace, if there is one.

        Return whether the writer's thread has ended. If not, the database keeps it waiting, and what was asked is not
        answered: it may have been committed or not, which the next process sees.
        """
        loop = asyncio.get_running_loop()
        due = None if grace_seconds is None else loop.time() + grace_seconds
        # With the place of each loader in its stream, so that the next process finds no gap.
        self._group.durable = self._group.durable or bool(self._unsaved)
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout_at(due):
                await self._flush()
        self._go_away("stats_svc is stopping")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout_at(due):
                await asyncio.to_thread(self._writer.shutdown)
        except TimeoutError:
            return False
        return True

    @property
    def available(self) -> bool:
        """Whether operations are accepted."""
        return not self._away

    @property
    def loaders(self) -> int:
        """How many loaders are connected."""
        return len(self._sessions)

    def _known(self, system: str) -> System | None:
        """Return a system; None if there is no such one, or if what is in memory need not be what is stored."""
        return None if self._away else self._state.systems.get(system)

    def peak_held_bytes(self, system: str) -> int:
        """Return the most that loaders held while ``system`` was in use, 0 if there is no such system."""
        known = self._known(system)
        return 0 if known is None else known.peak_held_bytes

    def module_requests(self, system: str) -> tuple[int, int]:
        """Return how many requests of ``system``'s kernel are in flight, and how many of them wait; 0 if it is gone."""
        known = self._known(system)
        return (0, 0) if known is None else (known.autoload.in_flight, known.autoload.waiting)

    def waiting_calls(self, system: str) -> int:
        """Return how many calls of ``system`` wait for another one, 0 if there is no such system."""
        known = self._known(system)
        return 0 if known is None else known.waiting

    def memory_taken(self, system: str) -> tuple[Amounts, Amounts] | None:
        """Return what is taken of a system's memory and the most that was; None where it is not finite, or unknown."""
        known = self._known(system)
        return None if known is None or known.memory is None else known.memory.amounts

    async def in_writer(self, work: Callable[[], T]) -> T:
        """Do ``work`` between commits, where nothing else writes. StoreError while nothing can be written."""
        if self._away:
            raise StoreError(self._away)
        return await self._in_writer(work)

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _take_over(self, snapshot: Snapshot) -> None:
        self._state = LedgerState(snapshot, self._clock_ns, system_limit=self._system_limit)
        self._ages.found(snapshot.commit_time_ns, snapshot.clock_gaps)
        self._stored_gaps = tuple(snapshot.clock_gaps)
        now = self._clock()
        for instance in self._state.instances.values():
            # Until it comes back: what its calls had reserved is stored.
            instance.away_since = now
        self._away = self.leader_address = ""
        self._failure = None
        self._on_available(True)

    def _go_away(self, sentence: str) -> None:
        self._away = sentence
        for session in self._sessions:
            session.close(Unavailable(sentence))
        self._sessions.clear()
        self.held_bytes = 0
        group, self._group = self._group, Group()
        group.done(Unavailable(sentence))
        self._unsaved.clear()
        self._room.set()
        self._on_available(False)

    # --- streams ---

    async def connect(self, hello: pb.Hello, patterns: tuple[str, ...] = (ALL,)) -> tuple[Session, pb.Welcome]:
        """Begin a stream of who may use the systems of some patterns; an older one of the same loader process ends.

        BadRequest if the hello makes no sense, Forbidden if it is in the name of a process that may use more systems,
        LeaseEnded if nothing more is accepted of it, Replaced if another process has its name, Unavailable while the
        database is away.
        """
        check_hello(hello)
        self._check_available()
        if hello.instance_id not in self._state.instances:
            await self._check_not_over(hello.instance_id)
        instance = self._state.instances.get(hello.instance_id)
        if instance is not None and instance.fence:
            raise _refusal(instance.id, instance.loader, instance.fence)
        if (hello.welcomed and instance is None) or (
            instance is not None and hello.committed_sequence > instance.applied_sequence
        ):
            raise LeaseEnded(
                f"process {hello.instance_id} of loader {hello.loader!r} has done more than is known of it: this is"
                " another database, or an older copy; it has to begin as a new instance"
            )
        if instance is not None:
            self._state.check_hello(instance, hello)
        others = [
            other
            for other in self._state.instances.values()
            if other.loader == hello.loader and other.fence is Fence.NONE and other is not instance
        ]
        for one in [*others, *([instance] if instance is not None else [])]:
            self._check_covered(one, patterns, is_same=one is instance)
        for other in others:
            self._fence(other, Fence.REPLACED)
        is_known = instance is not None
        if instance is None:
            instance = Instance(hello.instance_id, hello.loader)
            self._state.instances[instance.id] = instance
            # Stored before it is welcomed, so that a process that is not known is one that is new.
            self._group.durable = True
        else:
            instance.loader = hello.loader
        if instance.session is not None:
            self.disconnect(instance.session, Unavailable("the loader has opened another stream"))
        instance.patterns = patterns
        session = instance.session = Session(
            instance, strict=not instance.restored, heartbeats=hello.heartbeats, heard_at=self._clock()
        )
        instance.away_since = None
        self._state.inherit(instance, hello.former_instance_ids)
        self._unsaved[instance.id] = instance
        self._sessions.add(session)
        if is_known:
            # What one has in flight that is new here was asked of another database.
            self._state.take_calls(instance, (call for call in hello.calls if is_for(patterns, call.system)))
            self._state.take_requests(instance, (held for held in hello.requests if is_for(patterns, held.system)))
        session.served += 1
        try:
            # What was applied must be committed before the loader is told so, for it may then forget it.
            await self._flush()
        except BaseException:
            self.disconnect(session)
            raise
        finally:
            session.served -= 1
            self.hear(session)
        released = self._state.released_of(instance, hello.live_call_ids)
        if released:
            session.deliver(pb.ResultBatch(applied_sequence=instance.applied_sequence, released_call_ids=released))
        _log.info("loader connected", loader=instance.loader, instance_id=instance.id, loaders=self.loaders)
        lease_seconds = self._lease_seconds
        return session, pb.Welcome(
            applied_sequence=instance.applied_sequence, lease_seconds=lease_seconds, heartbeats=lease_seconds > 0
        )

    def _check_covered(self, one: Instance, patterns: tuple[str, ...], *, is_same: bool) -> None:
        """Return if who may use the systems of some patterns may go on as a loader process, or take its place.

        Forbidden if not: what its calls hold elsewhere would be given back. Where it has shown no token since a start,
        it is the same if it holds nothing elsewhere; until its lease ends nobody takes its place who may not use all.
        """
        if one.patterns is not None:
            may = covers(patterns, one.patterns)
        elif is_same:
            may = all(is_for(patterns, system) for system in self._state.systems_held_by(one))
        else:
            may = ALL in patterns
        if not may:
            raise Forbidden(
                f"the token is for fewer systems than that of process {one.id}, which is loader {one.loader!r}",
                field="loader",
            )

    async def _check_not_over(self, instance_id: str) -> None:
        """Return if a loader process that is not in memory is none that is fenced: those are stored, and forgotten."""
        try:
            row = await asyncio.to_thread(self._store.instance, instance_id)
        except StoreError as error:
            raise Unavailable(error.sentence) from error
        self._check_available()
        if row is not None and row.fence:
            raise _refusal(row.instance_id, row.loader, Fence(row.fence))

    def hear(self, session: Session) -> None:
        """Note that a loader is there."""
        session.heard_at = self._clock()

    def allow(self, session: Session, patterns: tuple[str, ...]) -> None:
        """Note for which systems the token of a loader is now, which may change while its stream stands.

        LeaseEnded if its calls hold anything elsewhere: they could neither go on nor end, and others would wait for it.
        """
        instance = session.instance
        if patterns == instance.patterns or session.closed:
            return
        elsewhere = [s for s in sorted(self._state.systems_held_by(instance)) if not is_for(patterns, s)]
        if elsewhere:
            self._fence(instance, Fence.LEASE_ENDED)
            raise LeaseEnded(
                f"the token of process {instance.id} of loader {instance.loader!r} is no longer for system"
                f" {elsewhere[0]!r}, in which it has calls; it has to begin as a new instance"
            )
        instance.patterns = patterns

    async def submit(self, session: Session, batch: pb.OperationBatch) -> None:
        """Apply a batch; its answers come out of the session. Returns when the next may come.

        What it asks of systems that the loader's token is not for is refused, each operation by itself.
        BadRequest if batches are missing before it: then the stream can't go on.
        """
        session.served += 1
        try:
            await self._submit(session, batch)
        finally:
            session.served -= 1
            self.hear(session)

    async def _submit(self, session: Session, batch: pb.OperationBatch) -> None:
        await session.drained()
        while self._group.size_bytes >= MAX_GROUP_BYTES and not session.closed:
            self._room.clear()
            await self._room.wait()
        instance = session.instance
        sequence = batch.sequence
        batch, refused = _part(batch, instance.patterns or ())
        left_behind: LeftBehind | None = None
        if sequence <= instance.applied_sequence:
            if sequence < 1:
                raise BadRequest(f"{sequence} is no sequence of a batch; they count from 1", field="sequence")
            left_behind = await self._find_left_behind(instance, batch)
        elif sequence > instance.applied_sequence + 1 and session.strict:
            raise BadRequest(
                f"batch {sequence} follows batch {instance.applied_sequence}: those in between are missing",
                field="sequence",
            )
        async with self._found_claims(batch) as stored_claims:
            if not session.closed:
                self._apply(session, batch, left_behind, stored_claims)
                self._group.results_of(session).results.extend(refused)

    def _apply(
        self,
        session: Session,
        batch: pb.OperationBatch,
        left_behind: LeftBehind | None,
        stored_claims: dict[ClaimKey, ClaimRow] | None,
    ) -> None:
        group, instance, sequence = self._group, session.instance, batch.sequence
        if sequence > instance.applied_sequence:
            instance.applied_sequence, instance.has_news = sequence, True
            instance.nothing_before |= batch.answered_sequence >= sequence - 1
        self._unsaved[instance.id] = instance
        others_bytes = self.held_bytes - instance.held_bytes
        instance.held_bytes = _credible(batch.held_bytes)
        self.held_bytes = others_bytes + instance.held_bytes
        group.results_of(session).applied_sequence = instance.applied_sequence
        group.weigh(len(batch.operations), batch.ByteSize())
        self._state.apply(
            group,
            session,
            batch.operations,
            now_ns=self._wall_clock_ns(),
            peak_held_bytes=others_bytes + max(_credible(batch.peak_held_bytes), instance.held_bytes),
            left_behind=left_behind,
            stored_claims=stored_claims,
        )
        self._filled.set()
        self._await_expiry()

    async def _find_left_behind(self, instance: Instance, batch: pb.OperationBatch) -> LeftBehind:
        """Return what is left of a batch that was applied before."""
        await self._flush()
        calls: defaultdict[str, set[int]] = defaultdict(set)
        for operation in batch.operations:
            if operation.system in self._state.systems:
                calls[operation.system].add(operation.call_id)

        def find() -> dict[int, int]:
            found: dict[int, int] = {}
            for system, call_ids in calls.items():
                found.update(self._events.find(system, instance.id, call_ids))
            return found

        is_last = batch.sequence == instance.applied_sequence
        try:
            return LeftBehind(await asyncio.to_thread(find), is_last)
        except StoreError as error:
            raise Unavailable(error.sentence) from error

    @contextlib.asynccontextmanager
    async def _found_claims(self, batch: pb.OperationBatch) -> AsyncIterator[dict[ClaimKey, ClaimRow] | None]:
        """Look up what is stored of the claims of a batch, None if it has none; nothing is overlooked meanwhile."""
        if not batch.has_claims:
            yield None
            return
        wanted: defaultdict[str, list[str]] = defaultdict(list)
        for operation in batch.operations:
            # What is no id is refused when it is applied; the store must not be asked for it.
            if operation.HasField("claim_request") and is_request_id(operation.claim_request.request_id):
                wanted[operation.system].append(operation.claim_request.request_id)
        kept = [
            (name, self._state.systems[name].claims, ids) for name, ids in wanted.items() if name in self._state.systems
        ]
        for _, claims, ids in kept:
            claims.keep(ids)
        try:
            try:
                keys = [(name, request_id) for name, _, ids in kept for request_id in ids]
                found = await asyncio.to_thread(self._store.find_claims, keys)
            except StoreError as error:
                raise Unavailable(error.sentence) from error
            # A system that was reset meanwhile remembers none of them.
            now = self._state.systems
            same = {name for name, claims, _ in kept if name in now and now[name].claims is claims}
            yield {key: row for key, row in found.items() if key[0] in same}
        finally:
            for _, claims, ids in kept:
                claims.let_go(ids)

    async def finish(self, session: Session) -> None:
        """Answer what the loader has asked, after which it asks no more; what still waits is not answered."""
        await self._flush()
        session.finish()

    def disconnect(self, session: Session, error: Exception | None = None, *, graceful: bool = False) -> None:
        """End a stream. The loader's lease begins to run, or is over if the loader ended the stream itself."""
        session.close(error or Unavailable("the stream has ended"))
        if session not in self._sessions:
            return
        self._sessions.discard(session)
        instance = session.instance
        self.held_bytes -= instance.held_bytes
        instance.held_bytes = 0
        instance.session = None
        self._state.disinherit(instance)
        instance.away_since = session.heard_at if session.heartbeats and not session.served else self._clock()
        _log.info("loader disconnected", loader=instance.loader, instance_id=instance.id, loaders=self.loaders)
        if graceful and not instance.fence:
            self._fence(instance, Fence.LEASE_ENDED)

    def expire_leases(self) -> None:
        """Take from each loader that has been away or silent for longer than its lease what its calls held."""
        now = self._clock()
        for instance in list(self._state.instances.values()):
            since = instance.silent_since
            if since is not None and now - since >= self._lease_seconds:
                self._fence(instance, Fence.LEASE_ENDED)

    def _next_lease_end(self) -> float:
        """When the next lease ends if its loader stays silent, by the ledger's clock."""
        silences = [i.silent_since for i in self._state.instances.values() if i.silent_since is not None]
        return min(silences, default=self._clock()) + self._lease_seconds

    def excuse(self, seconds: float) -> None:
        """Lengthen all leases by a time in which this process did not run."""
        for instance in self._state.instances.values():
            if instance.session is not None:
                instance.session.heard_at += seconds
            if instance.away_since is not None:
                instance.away_since += seconds

    def _clock_ns(self) -> int:
        return int(self._clock() * 1e9)

    def _await_expiry(self) -> None:
        if self._expiry is None and (due_ns := self._state.systems.next_expiry_ns) is not None:
            delay_seconds = max(0, due_ns - self._clock_ns()) / 1e9
            self._expiry = asyncio.get_running_loop().call_later(delay_seconds, self.expire_requests)

    def expire_requests(self) -> None:
        """Answer the requests of the kernel that have waited for a place for too long."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if not self._away:
            self._state.expire_requests(self._group)
            self._filled.set()
            self._await_expiry()

    def _fence(self, instance: Instance, fence: Fence) -> None:
        """Accept nothing more of a loader process, and take from it what its calls held."""
        instance.fence = fence
        if instance.session is not None:
            self.disconnect(instance.session, _refusal(instance.id, instance.loader, fence))
        instance.away_since = None
        abandoned = self._state.expire(self._group, instance)
        _log.log(
            logging.WARNING if abandoned else logging.INFO,
            "lease ended",
            loader=instance.loader,
            instance_id=instance.id,
            reason=fence.name.lower(),
            abandoned_calls=abandoned,
        )
        # Also where it held nothing: a restart must not forget it.
        instance.has_news = True
        self._unsaved[instance.id] = instance
        self._group.fenced.append(instance.id)
        self._group.durable = True
        self._filled.set()

    # --- systems ---

    async def create_system(self, system_id: str, policy: int, limits: Amounts | None = None) -> SystemRow:
        """Create a system and return it once it is committed. BadRequest, AlreadyExists, OverLimit, Unavailable."""
        self._check_available()
        system = self._state.systems.create(self._group, system_id, policy, self._wall_clock_ns(), limits)
        row = system.row()
        await self._flush()
        return row

    async def reset_system(self, system_id: str) -> SystemRow:
        """Reset a system and return it once that is committed. NotFound, NotNow, Unavailable."""
        self._check_available()
        row = self._state.systems.reset(self._group, system_id, self._wall_clock_ns()).row()
        await self._flush()
        return row

    async def delete_system(self, system_id: str) -> None:
        """Delete a system; return once that is committed. NotFound, NotNow, Unavailable."""
        self._check_available()
        self._state.systems.delete(self._group, system_id)
        await self._flush()

    async def import_system(self, rows: AsyncIterator[list[T]], system_id: str, *, replace: bool) -> SystemRow:
        """Make a system of the rows of a file, as they come; return it once that is committed.

        They are stored step by step, between commits, and seen by nobody before the last is there: whole or not at all.
        BadRequest, AlreadyExists, NotNow while calls are in flight in what is to be replaced or while it is imported by
        somebody else, OverLimit if there are as many systems as there may be, Overloaded while others are imported,
        Unavailable.
        """
        self._check_available()
        systems = self._state.systems
        systems.begin_import(system_id, replace=replace)
        key = self._store.begin_import()
        try:
            async for some in rows:
                if some:
                    await self._in_import(functools.partial(self._store.import_rows, key, some))
            imported = await self._in_import(functools.partial(self._store.imported, key, system_id))
            check_imported(imported)
        except BaseException:
            self._store.give_import_up(key)
            systems.end_import(system_id)
            raise
        # It goes on when nobody waits for it any more: half of it would be done already.
        await asyncio.shield(asyncio.ensure_future(self._show_imported(systems, key, imported)))
        return imported.row

    async def _in_import(self, work: Callable[[], R]) -> R:
        try:
            return await self.in_writer(work)
        except StoreError as error:
            raise Unavailable(error.sentence) from error

    async def _show_imported(self, systems: Systems, key: str, imported: SystemSnapshot) -> None:
        system_id = imported.row.id
        try:
            self._check_available()
            if systems is not self._state.systems:
                raise Unavailable("the database was away while the system was imported")
            replaced = systems.take_out(system_id)
            self._group.imports.append(lambda: self._store.show_imported(key, system_id))
            # If that fails, all is loaded again.
            await self._flush()
            systems.put_in(self._group, system_id, imported, replaced)
            self._filled.set()
        finally:
            self._store.give_import_up(key)
            systems.end_import(system_id)

    @contextlib.contextmanager
    def watch(self, system: str) -> Iterator[asyncio.Event]:
        """Give an event that is set when something of ``system`` has been committed."""
        event = asyncio.Event()
        watchers = self._watchers[system]
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers:
                del self._watchers[system]

    # --- committing ---

    def _check_available(self) -> None:
        if self._away:
            raise Unavailable(self._away)

    async def _flush(self) -> None:
        """Return when all that was applied so far is committed. Unavailable if that fails."""
        self._check_available()
        committed = self._group.follow()
        self._filled.set()
        await committed

    async def _commit_groups(self) -> None:
        while True:
            await self._filled.wait()
            # Whoever else is ready to run may still join.
            await asyncio.sleep(0)
            self._filled.clear()
            group, self._group = self._group, Group()
            self._room.set()
            try:
                if self._failure is not None:
                    raise self._failure
                # Answers from memory are right only as long as nobody else can have changed what is stored.
                if group.durable or not self._store.leads_for_certain:
                    await self._commit(group)
                for work in group.imports:
                    await self._in_writer(work)
                self._answer(group)
            except Exception as error:
                await self._recover(group, error)

    async def _commit(self, group: Group) -> None:
        now_ns = self._wall_clock_ns()
        instances = []
        for one in self._unsaved.values():
            # What is only asked again, or a stream that is opened, must not have what it is asked about forgotten.
            if one.has_news:
                one.last_seen_ns, one.has_news = now_ns, False
            row = InstanceRow(one.id, one.loader, one.applied_sequence, one.last_seen_ns, one.fence, one.nothing_before)
            one.nothing_before = False
            instances.append(row)
        self._unsaved.clear()
        await self._in_writer(functools.partial(self._store_group, now_ns, group, instances))

    def _store_group(self, now_ns: int, group: Group, instances: list[InstanceRow]) -> None:
        # Later than the time was taken: what the clock was put forward by until then is known now.
        self._ages.look()
        gaps = self._ages.gaps
        has_news = gaps != self._stored_gaps
        self._store.commit(Commit(now_ns, group.steps, instances, gaps if has_news else None))
        self._stored_gaps = gaps

    def _answer(self, group: Group) -> None:
        for instance_id, call_id in group.released:
            instance = self._state.heir_of(instance_id)
            # Who is away says what it holds when it comes back.
            if instance is not None and instance.session is not None:
                group.results_of(instance.session).released_call_ids.append(call_id)
        if group.deleted_systems:
            for session in self._sessions:
                group.results_of(session).deleted_systems.extend(group.deleted_systems)
        for session, results in group.results.items():
            session.deliver(results)
        for claims, request_id in group.unheld:
            claims.let_go([request_id])
        for instance_id in group.fenced:
            # From now on the store says that nothing more is accepted of it.
            self._state.instances.pop(instance_id, None)
        group.done()
        for system in group.touched:
            for event in self._watchers.get(system, ()):
                event.set()

    async def _recover(self, group: Group, error: Exception) -> None:
        """Drop what is not committed, wait until the database can be used, and begin again from what it holds."""
        if not isinstance(error, StoreError):
            _log.error("commit failed", exc_info=error)
        sentence = error.sentence if isinstance(error, StoreError) else "the store failed"
        away = sentence if isinstance(error, StandingBy) else f"the database is away: {sentence}"
        group.done(Unavailable(away))
        self._go_away(away)
        if isinstance(error, StandingBy):
            self._stand_by(error)
        else:
            _log.error("database away", reason=sentence)
        self._take_over(await self._load_when_possible())
        _log.info("database back")

    async def _load_when_possible(self) -> Snapshot:
        """Return what is stored, once this process may write to the store."""
        delay_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                return await self._in_writer(self._store.load)
            except StandingBy as error:
                self._stand_by(error)
                delay_seconds = STAND_BY_SECONDS
            except StoreError as again:
                self._away, self.leader_address = f"the database is away: {again.sentence}", ""
                self._on_available(False)
            except Exception as again:
                _log.error("database still away", exc_info=again)
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, _MAX_RETRY_SECONDS)

    async def _keep_leases(self) -> None:
        """End leases. Nothing else is waited for here: what a pause takes longer is time in which nobody was heard."""
        loop = asyncio.get_running_loop()
        while True:
            slept = loop.time()
            pause_seconds = MAX_PAUSE_SECONDS
            if not self._away:
                pause_seconds = min(max(self._next_lease_end() - self._clock(), MIN_PAUSE_SECONDS), pause_seconds)
            await asyncio.sleep(pause_seconds)
            if (late_seconds := loop.time() - slept - pause_seconds) > self._lease_seconds / 10:
                self.excuse(late_seconds)
            if not self._away:
                self.expire_leases()

    async def _keep_pinging(self) -> None:
        """Notice a database that goes away while nobody writes."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            await self.be_heard()

    async def be_heard(self) -> None:
        """Have those who stand by learn at once that this process leads, if it does, and where it is reached."""
        if self._away:
            return
        try:
            await self._in_writer(self._store.ping)
        except StoreError as error:
            # The next commit fails with it, and takes the way back that any other would.
            self._failure = error
            self._filled.set()


def _part(batch: pb.OperationBatch, patterns: tuple[str, ...]) -> tuple[pb.OperationBatch, list[pb.OperationResult]]:
    """Return what a batch asks of the systems that some patterns name, and the answers to what it asks of others."""
    if ALL in patterns:
        return batch, []
    kept, refused = [], []
    for operation in batch.operations:
        other = next((system for system in systems_of(operation) if not is_for(patterns, system)), None)
        if other is None:
            kept.append(operation)
        elif not operation.HasField("interrupt"):
            # That has no answer of its own.
            refused.append(
                pb.OperationResult(
                    call_id=operation.call_id,
                    verdict=pb.OperationResult.VERDICT_INVALID,
                    forbidden=True,
                    message=f"the loader's token is not for system {shown(other)}",
                )
            )
    if len(kept) == len(batch.operations):
        return batch, []
    part = pb.OperationBatch()
    part.CopyFrom(batch)
    del part.operations[:]
    part.operations.extend(kept)
    return part, refused


def _refusal(instance_id: str, loader: str, fence: Fence) -> ModpressureError:
    """Return why nothing more is accepted of a loader process that is fenced."""
    if fence is Fence.REPLACED:
        return Replaced(
            f"another loader process named {loader!r} has taken the place of process {instance_id}: a name is one"
            " loader's"
        )
    return LeaseEnded(
        f"the lease of process {instance_id} of loader {loader!r} has ended, and what its calls held was given back; it"
        " has to begin as a new instance"
    )


def _credible(size_bytes: int) -> int:
    """Return what a loader says that it holds, if that makes sense: a sum of nonsense could not be stored."""
    return min(max(size_bytes, 0), (1 << SIZE_BITS) - 1)
