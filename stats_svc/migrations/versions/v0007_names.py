"""Systems under names that can be taken from one and given to another: what has none is seen by nobody."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from stats_svc.migrations.columns import text

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Name each system after its key, as it was called so far."""
    op.add_column("systems", text("name", ""))
    op.execute("UPDATE systems SET name = id")
    named = sa.text("name != ''")
    op.create_index("systems_by_name", "systems", ["name"], unique=True, sqlite_where=named, postgresql_where=named)
