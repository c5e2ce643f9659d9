"""Requesters in SQL: what the calls of each came to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from modpressure.kernel.requesters import Requester, Tally
from stats_svc import schema
from stats_svc.rows import SystemDelta

_TABLE = schema.requesters
_known = sa.select(_TABLE.c.system, _TABLE.c.origin, _TABLE.c.requester)
_tallies = sa.select(_TABLE.c.origin, _TABLE.c.requester, _TABLE.c.calls, _TABLE.c.failures, _TABLE.c.wasted_bytes)


def known(connection: Connection, keys: sa.Select[tuple[str]], names: Mapping[str, str]) -> dict[str, list[Requester]]:
    """Return, by their names, the requesters that the systems tell apart whose keys a query finds.

    ``names`` has the names by the keys.
    """
    found: defaultdict[str, list[Requester]] = defaultdict(list)
    for row in connection.execute(_known.where(_TABLE.c.system.in_(keys))):
        found[names[row.system]].append(Requester(row.origin, row.requester))
    return found


def tallies(connection: Connection, system: str) -> dict[Requester, Tally]:
    """Return what the calls of each requester of a system came to."""
    rows = connection.execute(_tallies.where(_TABLE.c.system == schema.key_of(system)))
    return {Requester(*row[:2]): Tally(*row[2:]) for row in rows}


def values_of(deltas: Mapping[str, SystemDelta]) -> list[dict[str, Any]]:
    """Return what is to be added to each requester, as the values of rows."""
    return [
        {
            "system": system,
            "origin": requester.origin,
            "requester": requester.label,
            "calls": tally.calls,
            "failures": tally.failures,
            "wasted_bytes": tally.wasted_bytes,
        }
        for system, delta in deltas.items()
        for requester, tally in delta.requesters.items()
    ]
