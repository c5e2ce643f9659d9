"""The tables, the same on SQLite and PostgreSQL.

Every number is a BIGINT: counters are exact to 63 bits, and times are nanoseconds since 1970 UTC.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from modpressure.kernel.counters import COUNTER_NAMES

SCHEMA_VERSION: Final = 1
"""Version of these tables; a migration to each later one starts from the number that the database holds."""

metadata = sa.MetaData()

# Sorted by bytes on both: PostgreSQL's own order follows a language, and pages by id would not.
_Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False)


def _system() -> sa.Column[str]:
    return sa.Column("system", _Text, sa.ForeignKey("systems.id"), primary_key=True)


about = sa.Table(
    "modpressure",
    metadata,
    sa.Column("schema_version", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("opened_time_ns"),
)
"""One row: that this database is ours, its version, and when a writer last took it over."""

systems = sa.Table(
    "systems",
    metadata,
    sa.Column("id", _Text, primary_key=True),
    _number("policy"),
    _number("create_time_ns"),
    _number("reset_time_ns"),
    _number("update_time_ns"),
    _number("next_event_id"),
    _number("peak_held_bytes"),
    *(_number(name) for name in COUNTER_NAMES),
)

modules = sa.Table(
    "modules",
    metadata,
    _system(),
    sa.Column("name", _Text, primary_key=True),
    _number("state"),
    sa.Column("instance_id", _Text, nullable=False),
    _number("call_id"),
    sa.Column("loader", _Text, nullable=False),
    _number("core_bytes"),
    _number("position"),
)
"""The modules lists. Names that are only reserved are here too, so that a restart gives no name away twice."""

failed_modules = sa.Table(
    "failed_modules",
    metadata,
    _system(),
    sa.Column("module", _Text, primary_key=True),
    _number("position"),
    _number("becoming_count"),
    _number("load_count"),
    _number("wasted_bytes"),
)

event_segments = sa.Table(
    "event_segments",
    metadata,
    _system(),
    sa.Column("last_event_id", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("first_event_id"),
    _number("number"),
    _number("commit_time_ns"),
    _number("kind"),
    sa.Column("instance_id", _Text, nullable=False),
    sa.Column("loader", _Text, nullable=False),
    sa.Column("events", sa.LargeBinary, nullable=False),
)
"""Events, up to some thousands a row; ``events`` is compressed with zstd. ``number`` grows over all systems."""

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("instance_id", _Text, primary_key=True),
    sa.Column("loader", _Text, nullable=False),
    _number("applied_sequence"),
    _number("first_segment"),
    _number("last_seen_ns"),
)
"""Loader processes: how far their batches have been applied, and the first segment that may hold an event of theirs.

That is a number and no time: clocks step back.
"""
