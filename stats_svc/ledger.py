"""The ledger: the one writer of a stats_svc process.

The operations of all streams are applied in the order in which they arrive, to the state in memory; what they change
gathers in a group, which is committed in one transaction in the writer's thread while the next group gathers. Then,
and not before, the group is answered. A group that changes nothing durable is answered without a commit, but after the
commit of the group before it, whose changes its answers may rest on.

Exactly once: a batch whose sequence was applied before is not applied again. What ended a call is looked up in the
log; whatever else it asks is evaluated once more, which the state machines allow to the same caller.

If a commit fails nothing of its group is answered, all streams end, and the state is loaded again from the store as
soon as that can be written to; loaders then come back and ask again.

A loader whose stream is gone keeps its lease for a while. After that, or at once if it ended its stream by itself, the
names that its calls had reserved are given up, and waiters are told what the kernel tells them when a load fails. A
gate that its call held goes to the first call that waits for it: there is no result to share, so that one works for
itself. Modules that are live stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import structlog

from modpressure.errors import BadRequest, Unavailable
from modpressure.kernel.counters import SIZE_BITS
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.events import EventLog
from stats_svc.group import Group
from stats_svc.names import check_hello
from stats_svc.rows import Commit, InstanceRow, LedgerStore, Snapshot, StoreError, SystemRow
from stats_svc.session import Instance, Session
from stats_svc.state import DEFAULT_POLICY, LedgerState

T = TypeVar("T")

DEFAULT_SYSTEM: Final = "default"

MAX_GROUP_WEIGHT: Final = 20_000
"""Operations and recorded calls that gather before nothing more is read from any stream."""

PING_SECONDS: Final = 5.0
"""How often the database is asked whether it is there."""

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
        on_available: Callable[[bool], None] = lambda available: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Prepare; ``start`` loads.

        ``on_available`` is called with whether the database can be written to, when that changes.
        """
        self._store = store
        self._events = EventLog(store)
        self._lease_seconds = lease_seconds
        self._on_available = on_available
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ledger-writer")
        self._state = LedgerState(Snapshot([], [], []))
        self._group = Group()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._away = "stats_svc is starting"
        """Why nothing is accepted at present, empty if it is."""

        self._sessions: set[Session] = set()
        self._unsaved: dict[str, Instance] = {}
        """Loader processes whose place in their stream is not yet stored as it is."""

        self._undelivered: defaultdict[str, list[int]] = defaultdict(list)
        """Calls whose live module was removed while their loader was away."""

        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._tasks: list[asyncio.Task[None]] = []
        self.held_bytes = 0
        """Memory that the connected loaders hold, as they last said."""

    # --- life ---

    async def start(self) -> None:
        """Load what is stored, and serve. StoreError if the database can't be used."""
        self._take_over(await self._in_writer(self._store.load))
        self._tasks = [asyncio.create_task(self._commit_groups()), asyncio.create_task(self._keep_house())]
        if DEFAULT_SYSTEM not in self._state.systems:
            await self.create_system(DEFAULT_SYSTEM, DEFAULT_POLICY)

    async def stop(self) -> None:
        """Commit and answer what has been asked, end all streams, and stop."""
        with contextlib.suppress(Unavailable):
            await self._flush()
        self._go_away("stats_svc is stopping")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._writer.shutdown)

    @property
    def available(self) -> bool:
        """Whether operations are accepted."""
        return not self._away

    @property
    def loaders(self) -> int:
        """How many loaders are connected."""
        return len(self._sessions)

    def peak_held_bytes(self, system: str) -> int:
        """Return the most that loaders held while ``system`` was in use, 0 if there is no such system."""
        known = self._state.systems.get(system)
        return 0 if known is None else known.peak_held_bytes

    def waiting_calls(self, system: str) -> int:
        """Return how many calls of ``system`` wait for another one, 0 if there is no such system."""
        known = self._state.systems.get(system)
        return 0 if known is None else known.modules.waiting + known.gate.waiting

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work)

    def _take_over(self, snapshot: Snapshot) -> None:
        self._state = LedgerState(snapshot)
        now = self._clock()
        for instance in self._state.instances.values():
            # Until it comes back: what its calls had reserved is stored.
            instance.away_since = now
        self._away = ""
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

    async def connect(self, hello: pb.Hello) -> tuple[Session, pb.Welcome]:
        """Begin a stream; an older one of the same loader process ends.

        BadRequest if the hello makes no sense, Unavailable while the database is away.
        """
        check_hello(hello.instance_id, hello.loader)
        self._check_available()
        instance = self._state.instances.get(hello.instance_id)
        if instance is None:
            instance = Instance(hello.instance_id, hello.loader)
            self._state.instances[instance.id] = instance
            # Stored before it is welcomed, so that a process that is not known is one that is new.
            self._group.durable = True
        else:
            instance.loader = hello.loader
        if instance.session is not None:
            self.disconnect(instance.session, Unavailable("the loader has opened another stream"))
        session = instance.session = Session(instance, strict=not instance.restored)
        instance.away_since = None
        self._unsaved[instance.id] = instance
        self._sessions.add(session)
        self._state.take_gates(instance, hello.gates)
        try:
            # What was applied must be committed before the loader is told so, for it may then forget it.
            await self._flush()
        except BaseException:
            self.disconnect(session)
            raise
        released = None if session.closed else self._undelivered.pop(instance.id, None)
        if released:
            session.deliver(pb.ResultBatch(applied_sequence=instance.applied_sequence, released_call_ids=released))
        _log.info("loader connected", loader=instance.loader, instance_id=instance.id, loaders=self.loaders)
        return session, pb.Welcome(applied_sequence=instance.applied_sequence)

    async def submit(self, session: Session, batch: pb.OperationBatch) -> None:
        """Apply a batch; its answers come out of the session. Returns when the next may come.

        BadRequest if batches are missing before it: then the stream can't go on.
        """
        await session.drained()
        while self._group.weight >= MAX_GROUP_WEIGHT and not session.closed:
            self._room.clear()
            await self._room.wait()
        instance = session.instance
        sequence = batch.sequence
        left_behind: dict[int, int] | None = None
        if sequence <= instance.applied_sequence:
            if sequence < 1:
                raise BadRequest(f"{sequence} is no sequence of a batch; they count from 1", field="sequence")
            left_behind = await self._find_left_behind(instance, batch)
        elif sequence > instance.applied_sequence + 1 and session.strict:
            raise BadRequest(
                f"batch {sequence} follows batch {instance.applied_sequence}: those in between are missing",
                field="sequence",
            )
        if session.closed:
            return
        group = self._group
        instance.applied_sequence = max(sequence, instance.applied_sequence)
        self._unsaved[instance.id] = instance
        others_bytes = self.held_bytes - instance.held_bytes
        instance.held_bytes = _credible(batch.held_bytes)
        self.held_bytes = others_bytes + instance.held_bytes
        group.results_of(session).applied_sequence = instance.applied_sequence
        group.weight += len(batch.operations)
        self._state.apply(
            group,
            session,
            batch.operations,
            now_ns=self._wall_clock_ns(),
            peak_held_bytes=others_bytes + max(_credible(batch.peak_held_bytes), instance.held_bytes),
            left_behind=left_behind,
        )
        self._filled.set()

    async def _find_left_behind(self, instance: Instance, batch: pb.OperationBatch) -> dict[int, int]:
        """Return which calls of a batch that was applied before have ended, and the events that they left."""
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

        try:
            return await asyncio.to_thread(find)
        except StoreError as error:
            raise Unavailable(error.sentence) from error

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
        instance.away_since = self._clock()
        _log.info("loader disconnected", loader=instance.loader, instance_id=instance.id, loaders=self.loaders)
        if graceful:
            self._expire(instance)

    def expire_leases(self) -> None:
        """Take from each loader that has been away for longer than its lease what its calls held."""
        now = self._clock()
        for instance in self._state.instances.values():
            if instance.away_since is not None and now - instance.away_since >= self._lease_seconds:
                self._expire(instance)

    def _expire(self, instance: Instance) -> None:
        instance.away_since = None
        if self._state.expire(self._group, instance):
            _log.warning("lease ended", loader=instance.loader, instance_id=instance.id)
            self._filled.set()

    # --- systems ---

    async def create_system(self, system_id: str, policy: int) -> SystemRow:
        """Create a system and return it once it is committed. BadRequest, AlreadyExists, Unavailable."""
        self._check_available()
        system = self._state.create_system(self._group, system_id, policy, self._wall_clock_ns())
        row = system.row()
        await self._flush()
        return row

    async def reset_system(self, system_id: str) -> SystemRow:
        """Reset a system and return it once that is committed. NotFound, NotNow, Unavailable."""
        self._check_available()
        row = self._state.reset_system(self._group, system_id, self._wall_clock_ns()).row()
        await self._flush()
        return row

    async def delete_system(self, system_id: str) -> None:
        """Delete a system; return once that is committed. NotFound, NotNow, Unavailable."""
        self._check_available()
        self._state.delete_system(self._group, system_id)
        await self._flush()

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
                if group.durable:
                    await self._commit(group)
                self._answer(group)
            except Exception as error:
                await self._recover(group, error)

    async def _commit(self, group: Group) -> None:
        now_ns = self._wall_clock_ns()
        instances = [InstanceRow(i.id, i.loader, i.applied_sequence, now_ns) for i in self._unsaved.values()]
        self._unsaved.clear()
        commit = Commit(now_ns, group.steps, instances)
        await self._in_writer(lambda: self._store.commit(commit))

    def _answer(self, group: Group) -> None:
        for instance_id, call_id in group.released:
            instance = self._state.instances.get(instance_id)
            if instance is None:
                continue
            if instance.session is None:
                self._undelivered[instance_id].append(call_id)
            else:
                group.results_of(instance.session).released_call_ids.append(call_id)
        if group.deleted_systems:
            for session in self._sessions:
                group.results_of(session).deleted_systems.extend(group.deleted_systems)
        for session, results in group.results.items():
            session.deliver(results)
        group.done()
        for system in group.touched:
            for event in self._watchers.get(system, ()):
                event.set()

    async def _recover(self, group: Group, error: Exception) -> None:
        """Drop what is not committed, wait until the database can be used, and begin again from what it holds."""
        if not isinstance(error, StoreError):
            _log.error("commit failed", exc_info=error)
        sentence = error.sentence if isinstance(error, StoreError) else "the store failed"
        away = f"the database is away: {sentence}"
        group.done(Unavailable(away))
        self._go_away(away)
        _log.error("database away", reason=sentence)
        delay_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                snapshot = await self._in_writer(self._store.load)
            except StoreError as again:
                self._away = f"the database is away: {again.sentence}"
            except Exception as again:
                _log.error("database still away", exc_info=again)
            else:
                break
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, _MAX_RETRY_SECONDS)
        self._take_over(snapshot)
        _log.info("database back")

    async def _keep_house(self) -> None:
        """End leases, and notice a database that goes away while nobody writes."""
        pause_seconds = min(max(self._lease_seconds / 10, 0.05), 1.0)
        pinged = self._clock()
        while True:
            await asyncio.sleep(pause_seconds)
            if self._away:
                continue
            self.expire_leases()
            if self._clock() - pinged >= PING_SECONDS:
                pinged = self._clock()
                await self._ping()

    async def _ping(self) -> None:
        try:
            await self._in_writer(self._store.ping)
        except StoreError as error:
            _log.warning("database does not answer", reason=error.sentence)
            # A commit of nothing much: it fails as any other would, and takes the same way back.
            self._group.durable = True
            self._filled.set()


def _credible(size_bytes: int) -> int:
    """Return what a loader says that it holds, if that makes sense: a sum of nonsense could not be stored."""
    return min(max(size_bytes, 0), (1 << SIZE_BITS) - 1)
