"""The statements that run at every commit or every look at a system, in SQLAlchemy Core for both databases."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from modpressure.kernel.counters import COUNTER_NAMES
from modpressure.kernel.modules_list import State
from stats_svc import memory_rows, schema
from stats_svc.writes import Write


class Statements:
    """The statements of the busiest paths, built once. ``insert`` is the dialect's own, which knows ON CONFLICT."""

    def __init__(self, insert: Any, dialect: Dialect) -> None:
        def write(statement: Any) -> Write:
            return Write(statement, dialect)

        systems, modules = schema.systems, schema.modules
        failed, instances = schema.failed_modules, schema.instances
        live = (
            sa.select(sa.func.count())
            .select_from(modules)
            .where(modules.c.system == systems.c.id, modules.c.state == int(State.LIVE))
            .scalar_subquery()
            .label("live_modules")
        )
        every = sa.select(systems, *memory_rows.LIMIT_COLUMNS).select_from(memory_rows.with_limits)
        self.systems = every.where(systems.c.name != "")
        self.system = every.add_columns(live).where(systems.c.name == sa.bindparam("the_system"))
        segments = schema.event_segments
        # One look at the end of each system's segments; a maximum over all of them would read them all.
        self.newest_segments = sa.select(
            sa.select(segments.c.number)
            .where(segments.c.system == systems.c.id)
            .order_by(segments.c.last_event_id.desc())
            .limit(1)
            .scalar_subquery()
        ).select_from(systems)
        peak = sa.bindparam("peak", type_=sa.BigInteger)
        self.add_to_system = write(
            sa.update(systems)
            .where(systems.c.id == sa.bindparam("the_system"))
            .values(
                {
                    **{
                        systems.c[name]: systems.c[name] + sa.bindparam(f"add_{name}", type_=sa.BigInteger)
                        for name in COUNTER_NAMES
                    },
                    systems.c.next_event_id: systems.c.next_event_id + sa.bindparam("events", type_=sa.BigInteger),
                    systems.c.peak_held_bytes: sa.case(
                        (systems.c.peak_held_bytes < peak, peak), else_=systems.c.peak_held_bytes
                    ),
                    systems.c.update_time_ns: sa.bindparam("now_ns", type_=sa.BigInteger),
                }
            )
        )
        self.note_time = write(
            sa.update(schema.about).values(commit_time_ns=sa.bindparam("now_ns", type_=sa.BigInteger))
        )
        self.remove_module = write(
            sa.delete(modules).where(
                modules.c.system == sa.bindparam("the_system"), modules.c.name == sa.bindparam("the_name")
            )
        )
        self.put_module = write(_upsert(insert(modules)))
        uses = schema.module_uses
        self.remove_uses = write(
            sa.delete(uses).where(uses.c.system == sa.bindparam("the_system"), uses.c.name == sa.bindparam("the_name"))
        )
        self.put_uses = write(sa.insert(uses))
        self.put_held = write(_upsert(insert(schema.held_memory)))
        self.put_claim = write(_upsert(insert(schema.claims)))
        new = insert(schema.requesters)
        self.add_requester = write(
            new.on_conflict_do_update(
                index_elements=[column.name for column in schema.requesters.primary_key],
                set_={
                    name: schema.requesters.c[name] + new.excluded[name]
                    for name in ("calls", "failures", "wasted_bytes")
                },
            )
        )
        new = insert(instances)
        moves = new.excluded.first_segment > instances.c.first_segment
        first_segment = sa.case((moves, new.excluded.first_segment), else_=instances.c.first_segment)
        self.put_instance = write(_upsert(new, first_segment=first_segment))
        self.put_segment = write(sa.insert(schema.event_segments))
        new = insert(failed)
        self.add_failed = write(
            new.on_conflict_do_update(
                index_elements=[column.name for column in failed.primary_key],
                set_={
                    name: failed.c[name] + new.excluded[name]
                    for name in ("becoming_count", "load_count", "wasted_bytes")
                },
            )
        )


def _upsert(new: Any, **instead: Any) -> Any:
    """Return a statement that inserts a row, as ``new`` does, or overwrites that with its key.

    Columns that ``instead`` names are overwritten by what it says.
    """
    keys = [column.name for column in new.table.primary_key]
    values = {column.name: new.excluded[column.name] for column in new.table.columns if column.name not in keys}
    return new.on_conflict_do_update(index_elements=keys, set_=values | instead)
