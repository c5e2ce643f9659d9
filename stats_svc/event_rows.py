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
"""Segments that one step takes away: some milliseconds, in which nothing else is committed."""

_segments = schema.event_segments.c
_last_events = sa.select(schema.systems.c.id, schema.systems.c.next_event_id).where(schema.systems.c.name != "")
_last_seen = sa.select(schema.instances.c.last_seen_ns).where(schema.instances.c.fence == 0).distinct()
_oldest = (
    sa.select(_segments.last_event_id, _segments.commit_time_ns)
    .where(_segments.system == sa.bindparam("the_system"))
    .order_by(_segments.last_event_id)
    .limit(sa.bindparam("most"))
)
_remove = sa.delete(schema.event_segments).where(
    _segments.system == sa.bindparam("the_system"), _segments.last_event_id == sa.bindparam("the_last_event_id")
)


def prune(connection: Connection, retention: Retention) -> bool:
    """Take the oldest segments away that need not be kept, of each system some; return whether there may be more."""
    needed = set(connection.scalars(_last_seen))
    more = False
    for system, next_event_id in connection.execute(_last_events).all():
        through = next_event_id - 1 - retention.events if retention.events else 0
        # What is needed is passed by, and must not keep the rest from being found.
        found = connection.execute(_oldest, {"the_system": system, "most": STEP_SEGMENTS + len(needed)}).all()
        gone = [
            {"the_system": system, "the_last_event_id": last_event_id}
            for last_event_id, time_ns in found
            if (last_event_id <= through or time_ns < retention.before_ns)
            and time_ns < retention.settled_ns
            and time_ns not in needed
        ][:STEP_SEGMENTS]
        if gone:
            connection.execute(_remove, gone)
        more = more or len(gone) == STEP_SEGMENTS
    return more
