"""Claims in SQL: clients' requests that are carried out once, who carries them out, and what came of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from stats_svc import schema
from stats_svc.rows import ClaimKey, ClaimRow, SystemDelta
from stats_svc.writes import Write

MAX_KEYS: Final = 500
"""Claims that one statement asks for: SQLite takes so many parameters, and more would not be quicker."""

STEP_CLAIMS: Final = 500
"""Claims that one step forgets, in a transaction for which others wait."""

_CLAIMS = schema.claims
_held = sa.select(_CLAIMS).where(_CLAIMS.c.instance_id != "", _CLAIMS.c.system.in_(schema.seen_keys))
_old = (
    sa.select(_CLAIMS.c.system, _CLAIMS.c.request_id)
    .where(_CLAIMS.c.update_time_ns < sa.bindparam("before_ns"), _CLAIMS.c.instance_id == "")
    .order_by(_CLAIMS.c.update_time_ns)
    .limit(STEP_CLAIMS)
)
_remove = sa.delete(_CLAIMS).where(
    _CLAIMS.c.system == sa.bindparam("the_system"), _CLAIMS.c.request_id == sa.bindparam("the_id")
)


def load(connection: Connection, names: Mapping[str, str]) -> list[ClaimRow]:
    """Return the claims that are held in the systems that users see; ``names`` has their names by their keys."""
    return [_row(names[row.system], row) for row in connection.execute(_held)]


def find(connection: Connection, keys: Collection[ClaimKey]) -> dict[ClaimKey, ClaimRow]:
    """Return those of some claims that there are."""
    found: dict[ClaimKey, ClaimRow] = {}
    wanted = list(keys)
    for start in range(0, len(wanted), MAX_KEYS):
        some = wanted[start : start + MAX_KEYS]
        by_system: dict[str, list[str]] = {}
        for system, request_id in some:
            by_system.setdefault(system, []).append(request_id)
        for system, request_ids in by_system.items():
            is_of_system = _CLAIMS.c.system == schema.key_of(system)
            query = sa.select(_CLAIMS).where(is_of_system, _CLAIMS.c.request_id.in_(request_ids))
            found.update({(system, row.request_id): _row(system, row) for row in connection.execute(query)})
    return found


def commit(connection: Connection, deltas: Mapping[str, SystemDelta], put: Write, now_ns: int) -> None:
    """Store claims as they are now, by the keys of their systems; ``put`` inserts or overwrites a row."""
    rows = [
        {
            "system": system,
            "request_id": row.request_id,
            "digest": row.digest,
            "instance_id": row.instance_id,
            "call_id": row.call_id,
            "settled": int(row.settled),
            "record": row.record,
            "update_time_ns": now_ns,
        }
        for system, delta in deltas.items()
        for row in delta.claims.values()
    ]
    if rows:
        put.execute(connection, rows)


def prune(connection: Connection, before_ns: int) -> bool:
    """Forget some claims that nobody holds and that last changed before a time; return whether there may be more."""
    rows = connection.execute(_old, {"before_ns": before_ns}).all()
    if rows:
        connection.execute(_remove, [{"the_system": row.system, "the_id": row.request_id} for row in rows])
    return len(rows) == STEP_CLAIMS


def _row(system: str, row: Row[Any]) -> ClaimRow:
    return ClaimRow(
        system, row.request_id, row.digest, row.instance_id, row.call_id, bool(row.settled), bytes(row.record)
    )
