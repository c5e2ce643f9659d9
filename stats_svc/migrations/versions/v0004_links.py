"""Links between modules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from stats_svc.migrations.columns import key, system

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Give modules their formation, and make the table of who uses whom."""
    op.add_column("modules", sa.Column("formation", sa.LargeBinary))
    op.create_table("module_uses", system(), key("used"), key("name"))
