"""Loader processes in SQL: how far each has come in its stream, and whether nothing more is accepted of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from stats_svc import schema
from stats_svc.rows import InstanceRow
from stats_svc.writes import Write

STEP_INSTANCES: Final = 500
"""Loader processes that one step forgets, in a transaction for which others wait."""

_STORED: Final = ("instance_id", "loader", "applied_sequence", "last_seen_ns", "fence")
_INSTANCES = schema.instances.c
_row = sa.select(*(_INSTANCES[name] for name in _STORED))
_one = _row.where(_INSTANCES.instance_id == sa.bindparam("the_instance"))
_first_segment: Final = sa.select(_INSTANCES.first_segment).where(
    _INSTANCES.instance_id == sa.bindparam("the_instance")
)
# Who comes back and owns a module must hear that its lease has ended, and not that nothing is known of it.
_over = (
    sa.select(_INSTANCES.instance_id)
    .where(
        _INSTANCES.fence != 0,
        _INSTANCES.last_seen_ns < sa.bindparam("before_ns"),
        _INSTANCES.instance_id.not_in(sa.select(schema.modules.c.instance_id)),
        _INSTANCES.instance_id.not_in(sa.select(schema.held_memory.c.instance_id)),
    )
    .limit(STEP_INSTANCES)
)
_remove = sa.delete(schema.instances).where(_INSTANCES.instance_id == sa.bindparam("the_instance"))


def load(connection: Connection) -> list[InstanceRow]:
    """Return those of which something may yet come."""
    return [InstanceRow(*row) for row in connection.execute(_row.where(_INSTANCES.fence == 0))]


def find(connection: Connection, instance_id: str) -> InstanceRow | None:
    """Return one, None if it is not known."""
    row = connection.execute(_one, {"the_instance": instance_id}).one_or_none()
    return None if row is None else InstanceRow(*row)


def put(connection: Connection, statement: Write, rows: Iterable[InstanceRow], first_segment: int) -> None:
    """Store some. What those may ask again that have ``nothing_before`` left its events from ``first_segment`` on."""
    # Only ever later: of the others nothing is said.
    stored = [
        {name: getattr(row, name) for name in _STORED} | {"first_segment": first_segment if row.nothing_before else 0}
        for row in rows
    ]
    statement.execute(connection, stored)


def first_segment(connection: Connection, instance_id: str) -> int:
    """Return the least number of a segment with what one may ask again; 0 if it is not known."""
    return connection.scalar(_first_segment, {"the_instance": instance_id}) or 0


def prune(connection: Connection, before_ns: int) -> bool:
    """Forget some that were fenced before a time, and own neither modules nor memory; return whether more may be."""
    ids = connection.scalars(_over, {"before_ns": before_ns}).all()
    if ids:
        connection.execute(_remove, [{"the_instance": instance_id} for instance_id in ids])
    return len(ids) == STEP_INSTANCES
