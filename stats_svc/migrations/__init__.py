"""How the tables of each released version become those of the next, by alembic's operations.

A version of the tables is a number, held by the database itself (``modpressure.schema_version``); ``versions`` has one
script for each, whose revision is that number in four digits. A new database is made by all of them in turn, so there
is one way to a version. A script says what it makes in words of its own: ``schema`` moves on, a script never does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def upgrade(connection: Connection, version: int, target: int | None = None) -> None:
    """Bring the tables from ``version``, 0 for none at all, to ``target`` or the newest, within the transaction.

    Whoever calls sees to it that nobody else does so at the same time.
    """
    # Hundreds of milliseconds that a start without anything to do need not wait for.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    with Operations.context(MigrationContext.configure(connection)):
        for number, script in enumerate(_scripts(), 1):
            if version < number <= (target or number):
                script.upgrade()
                connection.execute(sa.text("UPDATE modpressure SET schema_version = :number"), {"number": number})


def newest() -> int:
    """Return the newest version that there is a script for."""
    return len(_scripts())


@cache
def _scripts() -> list[Any]:
    """Return the scripts of all versions, from the first on, in one line: alembic refuses forks and gaps."""
    from alembic.script import ScriptDirectory

    directory = ScriptDirectory(str(Path(__file__).parent))
    return [revision.module for revision in directory.walk_revisions()][::-1]
