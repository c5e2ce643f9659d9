"""Systems whose memory is finite, and what is held of it."""

from __future__ import annotations

from alembic import op

from stats_svc.migrations.columns import key, number, number_key, system

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make two tables."""
    op.create_table(
        "memory_limits",
        system(),
        number("memory_bytes"),
        number("vmalloc_bytes"),
        number("module_area_bytes"),
        number("peak_memory_bytes"),
        number("peak_vmalloc_bytes"),
        number("peak_module_area_bytes"),
    )
    op.create_table(
        "held_memory",
        system(),
        key("instance_id"),
        number_key("call_id"),
        number("file_bytes"),
        number("image_bytes"),
        number("core_bytes"),
        number("core_areas"),
        number("init_bytes"),
        number("init_areas"),
    )
