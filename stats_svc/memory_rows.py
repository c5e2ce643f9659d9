"""Finite memory in SQL: the limits of systems, and what their calls and modules hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from modpressure.kernel.system_memory import Amounts, Holding
from stats_svc import schema
from stats_svc.rows import HeldRow, SystemDelta, SystemRow
from stats_svc.writes import Write

_LIMITS = schema.memory_limits
_HELD = schema.held_memory
_HELD_COLUMNS = tuple(column.name for column in _HELD.columns)
LIMIT_COLUMNS = tuple(column for column in _LIMITS.columns if column.name != "system")
"""What a query of systems may take along from the row of limits that a system may have."""

with_limits = schema.systems.outerjoin(_LIMITS, _LIMITS.c.system == schema.systems.c.id)
"""Systems, each with its limits if it has any."""

_remove = sa.delete(_HELD).where(
    _HELD.c.system == sa.bindparam("the_system"),
    _HELD.c.instance_id == sa.bindparam("the_instance"),
    _HELD.c.call_id == sa.bindparam("the_call"),
)
_set_peak = (
    sa.update(_LIMITS)
    .where(_LIMITS.c.system == sa.bindparam("the_system"))
    .values(
        peak_memory_bytes=sa.bindparam("memory"),
        peak_vmalloc_bytes=sa.bindparam("vmalloc"),
        peak_module_area_bytes=sa.bindparam("module_area"),
    )
)


def take_amounts(values: dict[str, Any]) -> tuple[Amounts | None, Amounts]:
    """Take the limits of a system, if any, and the most that was taken of them, out of a row's values."""
    amounts = [values.pop(column.name) for column in LIMIT_COLUMNS]
    if amounts[0] is None:
        return None, Amounts()
    return Amounts(*amounts[:3]), Amounts(*amounts[3:])


def create(connection: Connection, key: str, system: SystemRow) -> None:
    """Store the limits of a new system, if it has any."""
    if system.limits is not None:
        connection.execute(sa.insert(_LIMITS).values((key, *system.limits, *system.peak_taken)))


def load(connection: Connection, keys: sa.Select[tuple[str]], names: Mapping[str, str]) -> list[HeldRow]:
    """Return all that is held of the systems whose keys a query finds; ``names`` has their names by their keys."""
    return [
        HeldRow(names[row.system], row.instance_id, row.call_id, Holding(*row[3:]))
        for row in connection.execute(sa.select(_HELD).where(_HELD.c.system.in_(keys)))
    ]


def commit(connection: Connection, deltas: Mapping[str, SystemDelta], put: Write) -> None:
    """Store what some systems' calls hold now, and the peaks; ``put`` inserts or overwrites a row."""
    rows, gone, peaks = [], [], []
    for system, delta in deltas.items():
        for (instance_id, call_id), holding in delta.held.items():
            if holding is None:
                gone.append({"the_system": system, "the_instance": instance_id, "the_call": call_id})
            else:
                values = (system, instance_id, call_id, *astuple(holding))
                rows.append(dict(zip(_HELD_COLUMNS, values, strict=True)))
        if delta.peak_taken is not None:
            peaks.append(_peak_values(system, delta.peak_taken))
    if gone:
        connection.execute(_remove, gone)
    if rows:
        put.execute(connection, rows)
    if peaks:
        connection.execute(_set_peak, peaks)


def _peak_values(system: str, peak: Amounts) -> dict[str, Any]:
    return {
        "the_system": system,
        "memory": peak.memory_bytes,
        "vmalloc": peak.vmalloc_bytes,
        "module_area": peak.module_area_bytes,
    }
