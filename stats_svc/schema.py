"""The tables, the same on SQLite and PostgreSQL.

Every number is a BIGINT: counters are exact to 63 bits, and times are nanoseconds since 1970 UTC.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from modpressure.kernel.counters import COUNTER_NAMES

SCHEMA_VERSION: Final = 9
"""Version of these tables; ``migrations`` has the way to it from each earlier one."""

metadata = sa.MetaData()

# Sorted by bytes on both: PostgreSQL's own order follows a language, and pages by id would not.
_Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _number(name: str, default: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=default)


def _system() -> sa.Column[str]:
    """Return the column of the system that a row is of, by its key."""
    return sa.Column("system", _Text, sa.ForeignKey("systems.id"), primary_key=True)


about = sa.Table(
    "modpressure",
    metadata,
    sa.Column("schema_version", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("opened_time_ns"),
    _number("epoch", default="0"),
    _number("commits", default="0"),
    sa.Column("leader", _Text, nullable=False, server_default=""),
    sa.Column("leader_address", _Text, nullable=False, server_default=""),
    _number("commit_time_ns", default="0"),
)
"""One row: that this database is ours, its version, when a writer last took it over, and which of several that is.

``epoch`` counts the writers, ``commits`` what the present one has committed; ``leader`` is a name that it gave itself,
and ``leader_address`` where others reach it. ``commit_time_ns`` is the time of the last commit, by the clock of whoever
made it; since version 9.
"""

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
    *(_number(name) for name in COUNTER_NAMES if name != "abandoned_calls"),
    _number("abandoned_calls", default="0"),
    sa.Column("name", _Text, nullable=False, server_default=""),
)
"""The systems and their counters. ``abandoned_calls`` since version 6.

``name`` is the id that users know, since version 7; it is empty for what nobody sees: a system that is being imported,
or was reset, replaced or deleted and is on its way out. ``id`` is what rows of other tables say. So all that a system
has comes into sight and goes out of it at once, however much that is.
"""

sa.Index(
    "systems_by_name",
    systems.c.name,
    unique=True,
    sqlite_where=systems.c.name != "",
    postgresql_where=systems.c.name != "",
)


seen_keys: Final = sa.select(systems.c.id).where(systems.c.name != "")
"""The keys of the systems that users see. What many systems have is asked for by such a query: a list of their keys
would be a parameter each, of which PostgreSQL takes 65,535 and SQLite some thousands."""


def key_alone(key: str) -> sa.Select[tuple[str]]:
    """Return a query as ``seen_keys`` of one key, whether users see that system or not."""
    return sa.select(systems.c.id).where(systems.c.id == key)


def key_of(name: str) -> sa.ScalarSelect[str]:
    """Return what finds the key of the system that users call so; nothing equals it if there is none."""
    return sa.select(systems.c.id).where(systems.c.name == name).scalar_subquery()


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
    sa.Column("formation", sa.LargeBinary),
)
"""The modules lists. Names that are only reserved are here too, so that a restart gives no name away twice."""

module_uses = sa.Table(
    "module_uses",
    metadata,
    _system(),
    sa.Column("used", _Text, primary_key=True),
    sa.Column("name", _Text, primary_key=True),
)
"""Which module uses which: as their formations say it, to be asked from the other side."""

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

memory_limits = sa.Table(
    "memory_limits",
    metadata,
    _system(),
    _number("memory_bytes"),
    _number("vmalloc_bytes"),
    _number("module_area_bytes"),
    _number("peak_memory_bytes"),
    _number("peak_vmalloc_bytes"),
    _number("peak_module_area_bytes"),
)
"""Systems whose memory is finite: what they have (0: no limit), and the most that was taken. Since version 2."""

held_memory = sa.Table(
    "held_memory",
    metadata,
    _system(),
    sa.Column("instance_id", _Text, primary_key=True),
    sa.Column("call_id", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("file_bytes"),
    _number("image_bytes"),
    _number("core_bytes"),
    _number("core_areas"),
    _number("init_bytes"),
    _number("init_areas"),
)
"""What calls in flight, and the modules that ended calls left live, hold of such systems. Since version 2."""

requesters = sa.Table(
    "requesters",
    metadata,
    _system(),
    sa.Column("origin", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("requester", _Text, primary_key=True),
    _number("calls"),
    _number("failures"),
    _number("wasted_bytes"),
)
"""What the calls of each requester that a system tells apart came to. Since version 3."""

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("instance_id", _Text, primary_key=True),
    sa.Column("loader", _Text, nullable=False),
    _number("applied_sequence"),
    _number("first_segment"),
    _number("last_seen_ns"),
    _number("fence", default="0"),
)
"""Loader processes: how far their batches have been applied, and the first segment with what they may ask again.

That is a number and no time: clocks step back. ``fence`` says why nothing more is accepted of one; since version 6.
"""

claims = sa.Table(
    "claims",
    metadata,
    _system(),
    sa.Column("request_id", _Text, primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("instance_id", _Text, nullable=False),
    _number("call_id"),
    _number("settled"),
    sa.Column("record", sa.LargeBinary, nullable=False),
    _number("update_time_ns"),
    sa.Index("claims_by_time", "update_time_ns"),
)
"""Clients' requests that are carried out once, by the client's id: who does so now, if anybody, and what was done.

Since version 6.
"""

clock_gaps = sa.Table(
    "clock_gaps",
    metadata,
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    _number("begin_ns"),
    _number("end_ns"),
    _number("is_sure"),
)
"""Times of the wall clock that did not pass, or may not have: it was put forward, or nobody looked. Since version 8."""
