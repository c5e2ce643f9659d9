"""When the last commit was, by which whoever starts judges what its clock says."""

from __future__ import annotations

from alembic import op

from stats_svc.migrations.columns import number

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Note the newest time that this database's own clocks told: that of a system may be from a file."""
    op.add_column("modpressure", number("commit_time_ns", "0"))
    op.execute("UPDATE modpressure SET commit_time_ns = (SELECT COALESCE(MAX(last_seen_ns), 0) FROM instances)")
