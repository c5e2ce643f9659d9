"""Which of several stats_svc leads."""

from __future__ import annotations

from alembic import op

from stats_svc.migrations.columns import number, text

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Say in the one row of ``modpressure`` who leads."""
    op.add_column("modpressure", number("epoch", "0"))
    op.add_column("modpressure", number("commits", "0"))
    op.add_column("modpressure", text("leader", ""))
    op.add_column("modpressure", text("leader_address", ""))
