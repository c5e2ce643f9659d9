"""Letting go of old events, in SQL.

What a loader process did in its last commit may be asked for again, however long ago that was: an answer may have got
lost. Its events are how it is recognised, so they stay until the process is fenced: then nothing more is accepted of
it. They are found by their time, which is exactly that of the commit.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from stats_svc import schema
from stats_svc.rows import Retention

STEP_SEGMENTS: Final = 64
STEP_SYSTEMS: Final = 8
"""Of how many systems one step takes how many segments away: some milliseconds, in which nothing else is committed."""

_MAX_EVENT_ID: Final = 2**63 - 1

_systems = schema.systems.c
_segments = schema.event_segments.c
_last_seen = sa.select(schema.instances.c.last_seen_ns).where(schema.instances.c.fence == 0)
_remove = sa.delete(schema.event_segments).where(
    _segments.system == sa.bindparam("the_system"), _segments.last_event_id == sa.bindparam("the_last_event_id")
)


class _Old:
    """What finds the segments that are old for one reason and need not be kept.

    One statement looks at all systems, once into the segments of each: a look that finds nothing is soon over, however
    many there are. It asks each for its first such segment, which neither database turns into a join.
    """

    def __init__(self, *is_old: sa.ColumnElement[bool]) -> None:
        """Find those that are old by a condition on segments and their systems."""
        old = (
            sa.select(_segments.last_event_id)
            .where(
                *(_segments.system == _systems.id, *is_old),
                *(_segments.commit_time_ns < sa.bindparam("settled_ns"), _segments.commit_time_ns.not_in(_last_seen)),
            )
            .order_by(_segments.last_event_id)
        )
        first = old.limit(1).correlate(schema.systems).scalar_subquery()
        self._due = sa.select(_systems.id).where(_systems.name != "", first.is_not(None)).limit(STEP_SYSTEMS)
        self._of_one = old.where(_systems.id == sa.bindparam("the_system")).limit(STEP_SEGMENTS)

    def prune(self, connection: Connection, **values: int) -> bool:
        """Take some away; return whether there may be more."""
        due = connection.scalars(self._due, values).all()
        more = len(due) == STEP_SYSTEMS
        for system in due:
            ids = connection.scalars(self._of_one, {"the_system": system, **values}).all()
            connection.execute(_remove, [{"the_system": system, "the_last_event_id": last_id} for last_id in ids])
            more = more or len(ids) == STEP_SEGMENTS
        return more


_by_number = _Old(_segments.last_event_id < _systems.next_event_id - sa.bindparam("events"))

_each = schema.event_segments.alias()
_first_kept = (
    sa.select(_each.c.last_event_id)
    .where(_each.c.system == _systems.id)
    .order_by(_each.c.last_event_id)
    .offset(sa.bindparam("passed"))
    .limit(1)
    .correlate(schema.systems)
    .scalar_subquery()
)
_by_age = _Old(
    # Times have no index, so only the first of each system are looked at.
    _segments.last_event_id < sa.func.coalesce(_first_kept, _MAX_EVENT_ID),
    _segments.commit_time_ns < sa.bindparam("before_ns"),
)


def prune(connection: Connection, retention: Retention) -> bool:
    """Take the oldest segments away that need not be kept, of some systems some; return whether there may be more."""
    more = False
    if retention.events:
        more = _by_number.prune(connection, settled_ns=retention.settled_ns, events=retention.events)
    if retention.before_ns:
        # What is needed is passed by, and must not keep the rest from being found.
        needed = connection.scalar(sa.select(sa.func.count()).select_from(_last_seen.distinct().subquery())) or 0
        values = {"before_ns": retention.before_ns, "passed": STEP_SEGMENTS + needed}
        more = _by_age.prune(connection, settled_ns=retention.settled_ns, **values) or more
    return more
