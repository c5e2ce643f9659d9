"""Systems that nobody sees, in SQL: those that are being imported, and those on their way out.

Each has a key and no name. What is imported gets its rows step by step and its name at the end, in one stroke with
which the system that had the name so far loses it. What has lost its name is taken away in steps, as is what a process
left behind that ended in the middle of an import.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from stats_svc import schema

STEP_ROWS: Final = 500
STEP_SEGMENTS: Final = 64
"""What one step takes away: some milliseconds, in which nothing else is committed."""

_systems = schema.systems.c
_name = sa.update(schema.systems).where(_systems.id == sa.bindparam("the_key"), _systems.name == "")
_unseen = sa.select(_systems.id).where(_systems.name == "").limit(sa.bindparam("most"))
_parts: Final = [table for table in schema.metadata.sorted_tables if "system" in table.c]


def new_key() -> str:
    """Return a key for a new system. It is nothing that a user can call one."""
    return f"#{uuid.uuid4().hex}"


def hide(connection: Connection, name: str) -> None:
    """Take its name from a system, if there is one that is called so."""
    connection.execute(sa.update(schema.systems).where(_systems.name == name).values(name=""))


def show(connection: Connection, key: str, name: str) -> bool:
    """Give a system a name that no other has; return whether it was there."""
    return connection.execute(_name.values(name=name), {"the_key": key}).rowcount == 1


def sweep(connection: Connection, spared: Collection[str]) -> bool:
    """Take something away of what nobody sees, but of those keys; return whether there may be more."""
    keys = connection.scalars(_unseen, {"most": len(spared) + 1})
    key = next((key for key in keys if key not in spared), None)
    if key is None:
        return False
    for table in _parts:
        most = STEP_SEGMENTS if table is schema.event_segments else STEP_ROWS
        columns = [column for column in table.primary_key.columns if column.name != "system"]
        is_of_system = table.c.system == key
        query = sa.select(*(columns or [table.c.system])).where(is_of_system).limit(most)
        rows = connection.execute(query).all()
        if not rows:
            continue
        one = sa.delete(table).where(is_of_system, *(c == sa.bindparam(f"the_{c.name}") for c in columns))
        if columns:
            connection.execute(one, [{f"the_{name}": value for name, value in row._mapping.items()} for row in rows])
        else:
            connection.execute(one)
        return True
    connection.execute(sa.delete(schema.systems).where(_systems.id == key))
    return True
