"""Statements of a commit, made text once.

What SQLAlchemy does with a statement and its parameters at each execution takes longer than what SQLite does for the
few rows of a commit. So it is only asked for the text, and the values go to the driver as they are: numbers, texts and
bytes, which both drivers take. A file can't be lost as a connection can, so there SQLAlchemy is passed by altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.engine import Connection, Dialect


class Write:
    """A statement that is executed for each of some rows."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        """Compile a statement all of whose values are parameters."""
        compiled = statement.compile(dialect=dialect)
        assert not any(value is not None for value in compiled.params.values()), "a value of its own would be lost"
        self._text = str(compiled)
        self._places = compiled.positiontup
        """SQLite's names of the values, in their order; None for PostgreSQL, which takes them by name."""

    def execute(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
        """Execute it for each of some rows, of which there is at least one; return how many it changed.

        What is wrong is raised by SQLAlchemy or by sqlite3.
        """
        if self._places is None:
            return connection.exec_driver_sql(self._text, rows).rowcount
        places = self._places
        cursor = connection.connection.cursor()
        cursor.executemany(self._text, [[row[name] for name in places] for row in rows])
        return cursor.rowcount
