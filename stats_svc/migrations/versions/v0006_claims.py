"""Requests of clients that are carried out once, loader processes that are over, and calls that they abandoned."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from stats_svc.migrations.columns import key, number, system, text

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table of claims, and note of instances why nothing more is accepted of them."""
    op.create_table(
        "claims",
        system(),
        key("request_id"),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        text("instance_id"),
        number("call_id"),
        number("settled"),
        sa.Column("record", sa.LargeBinary, nullable=False),
        number("update_time_ns"),
    )
    op.create_index("claims_by_time", "claims", ["update_time_ns"])
    op.add_column("instances", number("fence", "0"))
    op.add_column("systems", number("abandoned_calls", "0"))
