"""The store: systems, modules lists, counters, events and what recognises a batch, in SQL.

The engine is synchronous, and used from one writer thread and a few reading ones: a group of operations then costs one
hop to a thread, while aiosqlite would make one for every statement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa
import zstandard
from sqlalchemy.engine import Connection, Row

from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.requesters import Requester, Tally
from stats_svc import (
    claim_rows,
    clock_rows,
    event_rows,
    instance_rows,
    memory_rows,
    requester_rows,
    schema,
    system_file,
    unseen,
)
from stats_svc.database import Database
from stats_svc.leadership import DEFAULT_LEAD_SECONDS
from stats_svc.rows import (
    Changes,
    ClaimKey,
    ClaimRow,
    Commit,
    FailedRow,
    InstanceRow,
    ModuleRow,
    Retention,
    Segment,
    SegmentKind,
    Snapshot,
    StoredSegment,
    StoreError,
    SystemDelta,
    SystemRow,
    SystemSnapshot,
)
from stats_svc.statements import Statements
from stats_svc.system_file import FileRows

_ZSTD_LEVEL: Final = 1
"""Events shrink to a quarter, in less time than writing the rest would take; higher levels gain next to nothing."""

_LOAD_ROWS: Final = 1000
"""Rows that are fetched at once when all is loaded."""

_MODULE_COLUMNS: Final = tuple(column.name for column in schema.modules.columns)


class SqlStore:
    """All that stats_svc keeps, behind ``rows.LedgerStore`` and a few queries. Every method blocks.

    ``load``, ``commit`` and ``ping`` are for one thread at a time, the queries for any. All raise StoreError.
    """

    def __init__(self, location: str, *, lead_seconds: float = DEFAULT_LEAD_SECONDS) -> None:
        """Open the database at ``location``, a path or an SQLAlchemy URL, creating what is missing.

        ``lead_seconds`` is how long whoever leads over PostgreSQL may be silent before another takes over.
        """
        self._database = Database(location, lead_seconds)
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        # Each costs a tenth of a second to import, and a process that was killed is to be back soon.
        insert: Any
        if self._database.is_sqlite:
            from sqlalchemy.dialects.sqlite import insert
        else:
            from sqlalchemy.dialects.postgresql import insert
        self._statements = Statements(insert, self._database.writer.dialect)
        self._next_segment = 1
        self._keys: dict[str, str] = {}
        """By the names of the systems that users see, their keys."""

        self._imported: set[str] = set()
        """Keys of systems that are being imported."""

        try:
            self._database.open()
        except StoreError:
            self._database.close()
            raise

    @property
    def name(self) -> str:
        """What sentences call the database."""
        return self._database.name

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def reached_at(self, address: str) -> None:
        """Tell those who stand by, with the next commit, where this process is reached."""
        if self._database.leadership is not None:
            self._database.leadership.address = address

    @property
    def leader_id(self) -> str:
        """Who leads, as only those know it who can read the database; empty if nobody does or nobody else could."""
        leadership = self._database.leadership
        return "" if leadership is None else leadership.leader_id

    @property
    def leads_for_certain(self) -> bool:
        """Whether no other process can have written to the database since this one last did. For any thread."""
        leadership = self._database.leadership
        return leadership is None or leadership.is_certain

    def ping(self) -> None:
        """Return if the database answers and this process may write to it, which is thereby heard of."""
        self._database.ping()

    # --- for the ledger's thread ---

    def load(self) -> Snapshot:
        """Return everything that is kept in memory, having shown that the database can be written to.

        StandingBy while another process writes to it.
        """
        self._database.check_writer()
        now_ns = time.time_ns()
        with self._database.writing() as connection:
            if self._database.leadership is not None:
                self._database.leadership.take(connection)
            connection.execute(sa.update(schema.about).values(opened_time_ns=now_ns))
            return self._snapshot(connection)

    def _snapshot(self, connection: Connection) -> Snapshot:
        # Row by row: while all of them were made what they are here, PostgreSQL would see a transaction that is idle.
        connection.execution_options(yield_per=_LOAD_ROWS)
        newest = connection.scalars(self._statements.newest_segments).all()
        # Segments may be gone, by a reset, that an instance is still compared with.
        compared = connection.scalar(sa.select(sa.func.max(schema.instances.c.first_segment)))
        self._next_segment = 1 + max([0, compared or 0, *(n for n in newest if n)])
        # Whatever was being imported is not: its rows may have been taken for left behind meanwhile.
        self._imported.clear()
        self._keys = {}
        systems = []
        for row in connection.execute(self._statements.systems):
            self._keys[row.name] = row.id
            systems.append(_system_row(row))
        names = {key: name for name, key in self._keys.items()}
        modules = schema.modules
        query = sa.select(modules).where(modules.c.system.in_(schema.seen_keys)).order_by(modules.c.position)
        return Snapshot(
            systems=systems,
            modules=[_module_row(names[row.system], row) for row in connection.execute(query)],
            instances=instance_rows.load(connection),
            held=memory_rows.load(connection, schema.seen_keys, names),
            requesters=requester_rows.known(connection, schema.seen_keys, names),
            claims=claim_rows.load(connection, names),
            commit_time_ns=connection.scalars(sa.select(schema.about.c.commit_time_ns)).one(),
            clock_gaps=clock_rows.load(connection),
        )

    # --- systems on their way in and out ---

    def begin_import(self) -> str:
        """Return the key of a system that nobody sees before ``show_imported``."""
        key = unseen.new_key()
        self._imported.add(key)
        return key

    def import_rows(self, key: str, batches: Sequence[FileRows]) -> None:
        """Add rows of a file to a system that is being imported.

        BadRequest if they contradict each other, StoreError if the database was lost since it was begun.
        """
        first_segment = self._next_segment

        def work(connection: Connection) -> None:
            self._next_segment = first_segment
            for table, rows in batches:
                for row in rows:
                    row["id" if table is schema.systems else "system"] = key
                    if table is schema.event_segments:
                        row["number"] = self._next_segment
                        self._next_segment += 1
                system_file.insert(connection, table, rows)

        self._check_imported(key)
        self._database.write(work)

    def imported(self, key: str, system: str) -> SystemSnapshot:
        """Return what there is of a system that is being imported, as if it were called so."""
        names, keys = {key: system}, schema.key_alone(key)
        table = schema.modules
        modules = sa.select(table).where(table.c.system == key).order_by(table.c.position)
        query = sa.select(schema.systems, *memory_rows.LIMIT_COLUMNS).select_from(memory_rows.with_limits)
        with self._database.reading() as connection:
            row = _system_row(connection.execute(query.where(schema.systems.c.id == key)).one())
            row.id = system
            return SystemSnapshot(
                row,
                [_module_row(system, module) for module in connection.execute(modules)],
                memory_rows.load(connection, keys, names),
                requester_rows.known(connection, keys, names).get(system, []),
            )

    def show_imported(self, key: str, system: str) -> None:
        """Call it ``system`` from now on, in place of what there is of that."""

        def work(connection: Connection) -> None:
            unseen.hide(connection, system)
            if not unseen.show(connection, key, system):
                raise StoreError(f"{self.name}: what was imported is gone")

        self._check_imported(key)
        self._database.write(work)
        self._keys[system] = key
        self._imported.discard(key)

    def _check_imported(self, key: str) -> None:
        if key not in self._imported:
            raise StoreError(f"{self.name} was away while the system was imported")

    def give_import_up(self, key: str) -> None:
        """Have what is there of it swept; nothing happens if it is shown. For any thread."""
        self._imported.discard(key)

    def sweep(self) -> bool:
        """Take something away of the systems that nobody sees any more; return whether there may be more."""
        more = False

        def work(connection: Connection) -> None:
            nonlocal more
            more = unseen.sweep(connection, self._imported)

        self._database.write(work)
        return more

    # --- commits ---

    def commit(self, commit: Commit) -> None:
        """Store all of it in one transaction, durably, or nothing. StandingBy if another process has taken over."""
        first_segment = self._next_segment

        def work(connection: Connection) -> None:
            self._next_segment = first_segment
            self._commit(connection, commit)

        self._database.write(work)

    def _commit(self, connection: Connection, commit: Commit) -> None:
        first_segment = self._next_segment
        for step in commit.steps:
            self._admin(connection, step, commit.time_ns)
            if step.deltas:
                self._add(connection, step.deltas, commit.time_ns)
        self._statements.note_time.execute(connection, [{"now_ns": commit.time_ns}])
        if commit.clock_gaps is not None:
            clock_rows.keep(connection, commit.clock_gaps)
        if commit.instances:
            instance_rows.put(connection, self._statements.put_instance, commit.instances, first_segment)

    def _admin(self, connection: Connection, step: Changes, now_ns: int) -> None:
        if step.create is not None:
            self._create(connection, step.create)
        if step.reset is not None:
            system, reset_time_ns = step.reset
            row = self._system(connection, system)
            if row is None:
                raise self._gone()
            unseen.hide(connection, system)
            anew = SystemRow(system, row.policy, row.create_time_ns, reset_time_ns, now_ns, limits=row.limits)
            self._create(connection, anew)
        if step.delete:
            unseen.hide(connection, step.delete)
            self._keys.pop(step.delete, None)

    def _create(self, connection: Connection, system: SystemRow) -> None:
        key = self._keys[system.id] = unseen.new_key()
        connection.execute(sa.insert(schema.systems), _system_values(key, system))
        memory_rows.create(connection, key, system)

    def _add(self, connection: Connection, by_name: dict[str, SystemDelta], now_ns: int) -> None:
        statements = self._statements
        try:
            deltas = {self._keys[name]: delta for name, delta in by_name.items()}
        except KeyError:
            raise self._gone() from None
        added = statements.add_to_system.execute(
            connection, [_delta_values(system, delta, now_ns) for system, delta in deltas.items()]
        )
        if added != len(deltas):
            raise self._gone()
        gone, put, failed, segments, unused, uses = [], [], [], [], [], []
        for system, delta in deltas.items():
            for name, row in delta.modules.items():
                if row is None:
                    gone.append({"the_system": system, "the_name": name})
                else:
                    put.append(dict(zip(_MODULE_COLUMNS, _fields(system, row), strict=True)))
            failed += [
                {"system": system, "position": position, **asdict(failures)}
                for position, failures in enumerate(delta.failed.values(), delta.first_event_id)
            ]
            segments += [self._segment_values(system, segment, now_ns) for segment in delta.segments]
            unused += [{"the_system": system, "the_name": name} for name in delta.unused]
            uses += [
                {"system": system, "name": name, "used": used} for name, names in delta.uses.items() for used in names
            ]
        for write, rows in (
            (statements.remove_module, gone),
            (statements.put_module, put),
            (statements.remove_uses, unused),
            (statements.put_uses, uses),
            (statements.add_failed, failed),
            (statements.put_segment, segments),
            (statements.add_requester, requester_rows.values_of(deltas)),
        ):
            if rows:
                write.execute(connection, rows)
        memory_rows.commit(connection, deltas, statements.put_held)
        claim_rows.commit(connection, deltas, statements.put_claim, now_ns)

    def _gone(self) -> StoreError:
        return StoreError(f"{self.name}: a system is gone that this process had not deleted")

    def _segment_values(self, system: str, segment: Segment, now_ns: int) -> dict[str, Any]:
        number = self._next_segment
        self._next_segment += 1
        return {
            "system": system,
            "number": number,
            "last_event_id": segment.first_event_id + segment.count - 1,
            "first_event_id": segment.first_event_id,
            "commit_time_ns": now_ns,
            "kind": int(segment.kind),
            "instance_id": segment.instance_id,
            "loader": segment.loader,
            "events": self._compressor.compress(segment.encode()),
        }

    def prune_claims(self, before_ns: int) -> bool:
        """Forget some claims that nobody holds and that last changed before a time; return whether more may be."""
        return self._step(lambda connection: claim_rows.prune(connection, before_ns))

    def prune_instances(self, before_ns: int) -> bool:
        """Forget some loader processes that were fenced before a time and own nothing; return whether more may be."""
        return self._step(lambda connection: instance_rows.prune(connection, before_ns))

    def prune_events(self, retention: Retention) -> bool:
        """Take some events away that need not be kept; return whether there may be more."""
        return self._step(lambda connection: event_rows.prune(connection, retention))

    def shrink(self) -> bool:
        """Give room back that is free; return whether there may be more."""
        return self._database.shrink()

    def _step(self, prune: Callable[[Connection], bool]) -> bool:
        """Do a step in a transaction; return what it returns: whether there may be more to do."""
        more = False

        def work(connection: Connection) -> None:
            nonlocal more
            more = prune(connection)

        self._database.write(work)
        return more

    # --- queries ---

    def export_system(self, system: str) -> Generator[bytes, None, None]:
        """Yield a system as a file, at one point in time; nothing if there is none of that id."""
        with self._database.reading() as connection:
            if self._system(connection, system) is not None:
                yield from system_file.write(connection, system, time.time_ns())

    def system(self, system: str) -> SystemRow | None:
        """Return a system with the number of its live modules, None if there is none of that id."""
        with self._database.reading() as connection:
            return self._system(connection, system)

    def stats(self, system: str) -> tuple[SystemRow, dict[Requester, Tally]] | None:
        """Return a system and what its requesters came to, at one point in time; None if there is none of that id."""
        with self._database.reading() as connection:
            row = self._system(connection, system)
            return None if row is None else (row, requester_rows.tallies(connection, system))

    def _system(self, connection: Connection, system: str) -> SystemRow | None:
        row = connection.execute(self._statements.system, {"the_system": system}).one_or_none()
        return None if row is None else _system_row(row)

    def systems(self, *, after_id: str, limit: int) -> list[SystemRow]:
        """Return systems whose ids come after ``after_id``, by id."""
        name = schema.systems.c.name
        query = self._statements.systems.where(name > after_id).order_by(name).limit(limit)
        with self._database.reading() as connection:
            return [_system_row(row) for row in connection.execute(query)]

    def report(self, system: str) -> tuple[SystemRow, list[FailedRow]] | None:
        """Return a system and all its failed modules, newest first, at one point in time; None if there is none."""
        with self._database.reading() as connection:
            row = self._system(connection, system)
            return None if row is None else (row, _failed(connection, system, None, None))

    def failed_modules(self, system: str, *, before_position: int | None, limit: int) -> list[FailedRow]:
        """Return failed modules, newest first, from before a position in the list."""
        with self._database.reading() as connection:
            return _failed(connection, system, before_position, limit)

    def modules(self, system: str, *, before_position: int | None, limit: int) -> list[ModuleRow]:
        """Return entries of the modules list, newest first, that were inserted before a position."""
        table = schema.modules
        query = (
            sa.select(table)
            .where(table.c.system == schema.key_of(system))
            .order_by(table.c.position.desc())
            .limit(limit)
        )
        if before_position is not None:
            query = query.where(table.c.position < before_position)
        with self._database.reading() as connection:
            return [_module_row(system, row) for row in connection.execute(query)]

    def users(self, system: str, names: Sequence[str]) -> dict[str, list[str]]:
        """Return for each of some modules that is used which modules use it, newest first."""
        uses, modules = schema.module_uses, schema.modules
        query = (
            sa.select(uses.c.used, uses.c.name)
            .join(modules, (modules.c.system == uses.c.system) & (modules.c.name == uses.c.name))
            .where(uses.c.system == schema.key_of(system), uses.c.used.in_(names))
            .order_by(modules.c.position.desc())
        )
        found: dict[str, list[str]] = {}
        with self._database.reading() as connection:
            for used, name in connection.execute(query):
                found.setdefault(used, []).append(name)
        return found

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
        table = schema.event_segments
        query = sa.select(
            table.c.number,
            table.c.kind,
            table.c.first_event_id,
            table.c.last_event_id,
            table.c.commit_time_ns,
            table.c.instance_id,
            table.c.loader,
            table.c.events,
        ).where(table.c.system == schema.key_of(system), table.c.last_event_id > after_event_id)
        if before_event_id is not None:
            query = query.where(table.c.first_event_id < before_event_id)
        if kind is not None:
            query = query.where(table.c.kind == int(kind))
        order = table.c.last_event_id.desc() if newest else table.c.last_event_id
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(order).limit(limit)).all()
        return [StoredSegment(*row[:-1], encoded=zstandard.decompress(row[-1])) for row in rows]

    def find_claims(self, keys: Collection[ClaimKey]) -> dict[ClaimKey, ClaimRow]:
        """Return those of some claims that are stored."""
        with self._database.reading() as connection:
            return claim_rows.find(connection, keys)

    def oldest_event_id(self, system: str) -> int:
        """Return the id of the oldest event that is kept, 0 if there is none."""
        table = schema.event_segments
        query = (
            sa.select(table.c.first_event_id)
            .where(table.c.system == schema.key_of(system))
            .order_by(table.c.last_event_id)
            .limit(1)
        )
        with self._database.reading() as connection:
            return connection.scalar(query) or 0

    def first_segment(self, instance_id: str) -> int:
        """Return the least number of a segment with what a loader process may ask again; 0 if it is not known."""
        with self._database.reading() as connection:
            return instance_rows.first_segment(connection, instance_id)

    def instance(self, instance_id: str) -> InstanceRow | None:
        """Return a loader process, also one that is fenced; None if it is not known."""
        with self._database.reading() as connection:
            return instance_rows.find(connection, instance_id)


def _fields(key: str, row: ModuleRow) -> tuple[Any, ...]:
    return (
        key,
        row.name,
        row.state,
        row.instance_id,
        row.call_id,
        row.loader,
        row.core_bytes,
        row.position,
        row.formation or None,
    )


def _module_row(system: str, row: Row[Any]) -> ModuleRow:
    return ModuleRow(**{**row._mapping, "system": system, "formation": row.formation or b""})


def _delta_values(system: str, delta: SystemDelta, now_ns: int) -> dict[str, Any]:
    counters = delta.counters
    values: dict[str, Any] = {f"add_{name}": getattr(counters, name) for name in COUNTER_NAMES}
    values.update(the_system=system, events=delta.events, peak=delta.peak_held_bytes, now_ns=now_ns)
    return values


def _system_values(key: str, system: SystemRow) -> dict[str, Any]:
    values = asdict(system)
    values["id"], values["name"] = key, system.id
    values.update(values.pop("counters"))
    for name in ("live_modules", "limits", "peak_taken"):
        del values[name]
    return values


def _system_row(row: Row[Any]) -> SystemRow:
    values = dict(row._mapping)
    values["id"] = values.pop("name")
    counters = Counters(**{name: values.pop(name) for name in COUNTER_NAMES})
    limits, peak_taken = memory_rows.take_amounts(values)
    return SystemRow(**values, counters=counters, limits=limits, peak_taken=peak_taken)


def _failed(connection: Connection, system: str, before_position: int | None, limit: int | None) -> list[FailedRow]:
    table = schema.failed_modules
    query = (
        sa.select(table).where(table.c.system == schema.key_of(system)).order_by(table.c.position.desc()).limit(limit)
    )
    if before_position is not None:
        query = query.where(table.c.position < before_position)
    return [
        FailedRow(row.position, FailedModule(row.module, row.becoming_count, row.load_count, row.wasted_bytes))
        for row in connection.execute(query)
    ]
