"""The store: systems, modules lists, counters, events and what recognises a batch, in SQL.

The engine is synchronous, and used from one writer thread and a few reading ones: a group of operations then costs one
hop to a thread, while aiosqlite would make one for every statement.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

import sqlalchemy as sa
import zstandard
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Row

from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from stats_svc import schema
from stats_svc.database import Database
from stats_svc.rows import (
    Changes,
    Commit,
    FailedRow,
    InstanceRow,
    ModuleRow,
    Segment,
    SegmentKind,
    Snapshot,
    StoredSegment,
    StoreError,
    SystemDelta,
    SystemRow,
)
from stats_svc.statements import Statements

FORGET_INSTANCES_SECONDS: Final = 7 * 24 * 3600
"""How long a loader process may be away before its place in its stream is forgotten."""

_ZSTD_LEVEL: Final = 1
"""Events shrink to a quarter, in less time than writing the rest would take; higher levels gain next to nothing."""

_MODULE_COLUMNS: Final = tuple(column.name for column in schema.modules.columns)


class SqlStore:
    """All that stats_svc keeps, behind ``rows.LedgerStore`` and a few queries. Every method blocks.

    ``load``, ``commit`` and ``ping`` are for one thread at a time, the queries for any. All raise StoreError.
    """

    def __init__(self, location: str) -> None:
        """Open the database at ``location``, a path or an SQLAlchemy URL, creating what is missing."""
        self._database = Database(location)
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        insert: Any = sqlite.insert if self._database.is_sqlite else postgresql.insert
        self._statements = Statements(insert)
        self._next_segment = 1
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

    def ping(self) -> None:
        """Return if the database answers."""
        self._database.ping()

    # --- for the ledger's thread ---

    def load(self) -> Snapshot:
        """Return everything that is kept in memory, having shown that the database can be written to."""
        self._database.check_writer()
        now_ns = time.time_ns()
        forgotten = schema.instances.c.last_seen_ns < now_ns - FORGET_INSTANCES_SECONDS * 1_000_000_000
        with self._database.errors(), self._database.writer.begin() as connection:
            connection.execute(sa.update(schema.about).values(opened_time_ns=now_ns))
            connection.execute(sa.delete(schema.instances).where(forgotten))
            systems = connection.execute(sa.select(schema.systems)).all()
            modules = connection.execute(sa.select(schema.modules).order_by(schema.modules.c.position)).all()
            instances = connection.execute(sa.select(schema.instances)).all()
            newest = connection.scalars(self._statements.newest_segments).all()
        # Segments may be gone, by a reset, that an instance is still compared with.
        self._next_segment = 1 + max([0, *(n for n in newest if n), *(row.first_segment for row in instances)])
        return Snapshot(
            systems=[_system_row(row) for row in systems],
            modules=[ModuleRow(*row) for row in modules],
            instances=[
                InstanceRow(row.instance_id, row.loader, row.applied_sequence, row.last_seen_ns) for row in instances
            ],
        )

    def commit(self, commit: Commit) -> None:
        """Store all of it in one transaction, durably, or nothing."""
        self._database.check_writer()
        with self._database.errors(), self._database.writer.begin() as connection:
            for step in commit.steps:
                self._admin(connection, step, commit.time_ns)
                if step.deltas:
                    self._add(connection, step.deltas, commit.time_ns)
            if commit.instances:
                first_segment = self._next_segment
                rows = [{**asdict(instance), "first_segment": first_segment} for instance in commit.instances]
                _execute(connection, self._statements.put_instance, rows)

    def _admin(self, connection: Connection, step: Changes, now_ns: int) -> None:
        if step.create is not None:
            connection.execute(sa.insert(schema.systems), _system_values(step.create))
        if step.reset is not None:
            system, reset_time_ns = step.reset
            self._clear(connection, system)
            zero = dict.fromkeys((*COUNTER_NAMES, "peak_held_bytes"), 0)
            changed = sa.update(schema.systems).where(schema.systems.c.id == system)
            connection.execute(
                changed.values(**zero, next_event_id=1, reset_time_ns=reset_time_ns, update_time_ns=now_ns)
            )
        if step.delete:
            self._clear(connection, step.delete)
            connection.execute(sa.delete(schema.systems).where(schema.systems.c.id == step.delete))

    def _clear(self, connection: Connection, system: str) -> None:
        for table in (schema.event_segments, schema.failed_modules, schema.modules):
            connection.execute(sa.delete(table).where(table.c.system == system))

    def _add(self, connection: Connection, deltas: dict[str, SystemDelta], now_ns: int) -> None:
        statements = self._statements
        added = connection.execute(
            statements.add_to_system, [_delta_values(system, delta, now_ns) for system, delta in deltas.items()]
        )
        if added.rowcount != len(deltas):
            raise StoreError(f"{self.name}: a system is gone that this process had not deleted")
        gone, put, failed, segments = [], [], [], []
        for system, delta in deltas.items():
            for name, row in delta.modules.items():
                if row is None:
                    gone.append({"the_system": system, "the_name": name})
                else:
                    put.append(dict(zip(_MODULE_COLUMNS, _fields(row), strict=True)))
            failed += [
                {"system": system, "position": position, **asdict(failures)}
                for position, failures in enumerate(delta.failed.values(), delta.first_event_id)
            ]
            segments += [self._segment_values(system, segment, now_ns) for segment in delta.segments]
        _execute(connection, statements.remove_module, gone)
        _execute(connection, statements.put_module, put)
        _execute(connection, statements.add_failed, failed)
        _execute(connection, statements.put_segment, segments)

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

    # --- queries ---

    def system(self, system: str) -> SystemRow | None:
        """Return a system with the number of its live modules, None if there is none of that id."""
        with self._database.errors(), self._database.reader.connect() as connection:
            return self._system(connection, system)

    def _system(self, connection: Connection, system: str) -> SystemRow | None:
        row = connection.execute(self._statements.system, {"the_system": system}).one_or_none()
        return None if row is None else _system_row(row)

    def systems(self, *, after_id: str, limit: int) -> list[SystemRow]:
        """Return systems whose ids come after ``after_id``, by id."""
        table = schema.systems
        query = sa.select(table).where(table.c.id > after_id).order_by(table.c.id).limit(limit)
        with self._database.errors(), self._database.reader.connect() as connection:
            return [_system_row(row) for row in connection.execute(query)]

    def report(self, system: str) -> tuple[SystemRow, list[FailedRow]] | None:
        """Return a system and all its failed modules, newest first, at one point in time; None if there is none."""
        with self._database.errors(), self._database.reader.connect() as connection:
            row = self._system(connection, system)
            return None if row is None else (row, _failed(connection, system, None, None))

    def failed_modules(self, system: str, *, before_position: int | None, limit: int) -> list[FailedRow]:
        """Return failed modules, newest first, from before a position in the list."""
        with self._database.errors(), self._database.reader.connect() as connection:
            return _failed(connection, system, before_position, limit)

    def modules(self, system: str, *, before_position: int | None, limit: int) -> list[ModuleRow]:
        """Return entries of the modules list, newest first, that were inserted before a position."""
        table = schema.modules
        query = sa.select(table).where(table.c.system == system).order_by(table.c.position.desc()).limit(limit)
        if before_position is not None:
            query = query.where(table.c.position < before_position)
        with self._database.errors(), self._database.reader.connect() as connection:
            return [ModuleRow(*row) for row in connection.execute(query)]

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
        ).where(table.c.system == system, table.c.last_event_id > after_event_id)
        if before_event_id is not None:
            query = query.where(table.c.first_event_id < before_event_id)
        if kind is not None:
            query = query.where(table.c.kind == int(kind))
        order = table.c.last_event_id.desc() if newest else table.c.last_event_id
        with self._database.errors(), self._database.reader.connect() as connection:
            rows = connection.execute(query.order_by(order).limit(limit)).all()
        return [StoredSegment(*row[:-1], encoded=zstandard.decompress(row[-1])) for row in rows]

    def first_segment(self, instance_id: str) -> int:
        """Return the least number of a segment that may hold an event of a loader process; 0 if it is not known."""
        table = schema.instances
        query = sa.select(table.c.first_segment).where(table.c.instance_id == instance_id)
        with self._database.errors(), self._database.reader.connect() as connection:
            return connection.scalar(query) or 0


def _execute(connection: Connection, statement: Any, parameters: Iterable[dict[str, Any]]) -> None:
    rows = list(parameters)
    if rows:
        connection.execute(statement, rows)


def _fields(row: ModuleRow) -> tuple[Any, ...]:
    return (
        row.system,
        row.name,
        row.state,
        row.instance_id,
        row.call_id,
        row.loader,
        row.core_bytes,
        row.position,
    )


def _delta_values(system: str, delta: SystemDelta, now_ns: int) -> dict[str, Any]:
    counters = delta.counters
    values: dict[str, Any] = {f"add_{name}": getattr(counters, name) for name in COUNTER_NAMES}
    values.update(the_system=system, events=delta.events, peak=delta.peak_held_bytes, now_ns=now_ns)
    return values


def _system_values(system: SystemRow) -> dict[str, Any]:
    values = asdict(system)
    values.update(values.pop("counters"))
    del values["live_modules"]
    return values


def _system_row(row: Row[Any]) -> SystemRow:
    values = dict(row._mapping)
    counters = Counters(**{name: values.pop(name) for name in COUNTER_NAMES})
    return SystemRow(**values, counters=counters)


def _failed(connection: Connection, system: str, before_position: int | None, limit: int | None) -> list[FailedRow]:
    table = schema.failed_modules
    query = sa.select(table).where(table.c.system == system).order_by(table.c.position.desc()).limit(limit)
    if before_position is not None:
        query = query.where(table.c.position < before_position)
    return [
        FailedRow(row.position, FailedModule(row.module, row.becoming_count, row.load_count, row.wasted_bytes))
        for row in connection.execute(query)
    ]
