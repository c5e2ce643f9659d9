"""Gaps in the wall clock's time in SQL."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from stats_svc import schema
from stats_svc.rows import ClockGap

_GAPS = schema.clock_gaps.c


def load(connection: Connection) -> list[ClockGap]:
    """Return them in their order."""
    rows = connection.execute(sa.select(_GAPS.begin_ns, _GAPS.end_ns, _GAPS.is_sure).order_by(_GAPS.position))
    return [ClockGap(row.begin_ns, row.end_ns, bool(row.is_sure)) for row in rows]


def keep(connection: Connection, gaps: Sequence[ClockGap]) -> None:
    """Have these, in their order, in place of those that are there."""
    connection.execute(sa.delete(schema.clock_gaps))
    rows = [
        {"position": position, "begin_ns": gap.begin_ns, "end_ns": gap.end_ns, "is_sure": int(gap.is_sure)}
        for position, gap in enumerate(gaps)
    ]
    if rows:
        connection.execute(sa.insert(schema.clock_gaps), rows)
