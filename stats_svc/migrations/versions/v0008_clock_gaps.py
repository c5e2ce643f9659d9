"""What is known of a clock that was put forward, so that nothing is older after a restart."""

from __future__ import annotations

from alembic import op

from stats_svc.migrations.columns import number, number_key

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Make the table of the gaps in the wall clock's time."""
    op.create_table("clock_gaps", number_key("position"), number("begin_ns"), number("end_ns"), number("is_sure"))
