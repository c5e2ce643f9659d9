"""Systems, modules lists, counters, events, and what recognises a batch."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

from stats_svc.migrations.columns import key, number, number_key, system, text

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables."""
    about = op.create_table("modpressure", number_key("schema_version"), number("opened_time_ns"))
    op.bulk_insert(about, [{"schema_version": 1, "opened_time_ns": time.time_ns()}])
    op.create_table(
        "systems",
        key("id"),
        number("policy"),
        number("create_time_ns"),
        number("reset_time_ns"),
        number("update_time_ns"),
        number("next_event_id"),
        number("peak_held_bytes"),
        number("modcount"),
        number("failed_kreads"),
        number("failed_decompress"),
        number("failed_becoming"),
        number("failed_load_modules"),
        number("total_mod_size"),
        number("total_text_size"),
        number("invalid_kread_bytes"),
        number("invalid_decompress_bytes"),
        number("invalid_becoming_bytes"),
        number("invalid_mod_bytes"),
        number("invalid_mod_image_bytes"),
        number("calls"),
        number("shared_calls"),
        number("refused_calls"),
        number("failed_inits"),
        number("duplicates"),
        number("unloads"),
    )
    op.create_table(
        "modules",
        system(),
        key("name"),
        number("state"),
        text("instance_id"),
        number("call_id"),
        text("loader"),
        number("core_bytes"),
        number("position"),
    )
    op.create_table(
        "failed_modules",
        system(),
        key("module"),
        number("position"),
        number("becoming_count"),
        number("load_count"),
        number("wasted_bytes"),
    )
    op.create_table(
        "event_segments",
        system(),
        number_key("last_event_id"),
        number("first_event_id"),
        number("number"),
        number("commit_time_ns"),
        number("kind"),
        text("instance_id"),
        text("loader"),
        sa.Column("events", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "instances",
        key("instance_id"),
        text("loader"),
        number("applied_sequence"),
        number("first_segment"),
        number("last_seen_ns"),
    )
