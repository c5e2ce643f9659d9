"""What the calls of each requester came to."""

from __future__ import annotations

from alembic import op

from stats_svc.migrations.columns import key, number, number_key, system

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make a table."""
    op.create_table(
        "requesters",
        system(),
        number_key("origin"),
        key("requester"),
        number("calls"),
        number("failures"),
        number("wasted_bytes"),
    )
