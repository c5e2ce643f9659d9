"""An open database, SQLite or PostgreSQL.

One process writes to a database: the ledger keeps the modules lists in memory. Who writes to an SQLite file holds its
lock, and others don't start; of several over PostgreSQL one leads, and the others stand by.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from stats_svc import migrations, schema
from stats_svc.file_lock import FileLock, IsLockedError
from stats_svc.leadership import DEFAULT_LEAD_SECONDS, Leadership
from stats_svc.location import Location
from stats_svc.rows import StoreError

BUSY_TIMEOUT_SECONDS: Final = 5
"""How long SQLite waits for somebody else's lock, such as a backup's."""

EXPORTS: Final = 2
"""Systems that are exported at once. Each holds a connection for as long as its client reads."""

READERS: Final = 5 + EXPORTS
"""Connections for reading."""

_MIGRATION_LOCK: Final = 0x6D6F646D
"""Key of the lock on PostgreSQL of whoever changes the tables; an arbitrary number."""

JOURNAL_BYTES: Final = 64 << 20
"""Size that SQLite's write-ahead log is cut back to."""

FREE_SHARE: Final = 4
"""An SQLite file is shrunk while more than one page of so many is free: what comes soon needs the room again."""

STEP_PAGES: Final = 256
"""Pages by which it is shrunk in one transaction, which others wait for; some milliseconds."""

STATEMENT_TIMEOUT_SECONDS: Final = 30
"""How long PostgreSQL may take for one statement, be it that it answers meanwhile or that nobody listens any more."""

_PATIENCE: Final = {"keepalives_idle": 2, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 5000}
"""How soon a PostgreSQL server that is gone without a word is noticed (libpq's parameters; seconds, milliseconds)."""

SILENCE_SECONDS: Final = 5.0
"""How long a PostgreSQL server that is there may say nothing to who waits for it, before it counts as away.

As long as one that is gone may (``_PATIENCE``), or an SQLite file be locked. A leader asks each second, so its health
says so after six. No more is lost by the wait than must be, as from ``lead_seconds`` (3) on a leader answers nothing
that the database has not confirmed; a shorter one would take a machine that is merely busy, whose commits and
checkpoints may take some seconds, for one that hangs.
"""

RETRY_SECONDS: Final = 3.0
"""How long a transaction is tried again that PostgreSQL undid, or lost a connection over."""

_FIRST_PAUSE_SECONDS: Final = 0.02
_MAX_PAUSE_SECONDS: Final = 0.25

_WORTH_A_RETRY: Final = frozenset({"40001", "40P01", "25P03", "57P01", "57P02", "57P03"})
"""PostgreSQL's codes of a transaction that was undone for others' sake, and of a connection that the server ended."""


class Database:
    """A database, its two engines, and the lock of its one writer.

    ``writer`` has one connection; ``reader`` has several, each of whose transactions sees one state of things.
    """

    def __init__(self, location: str, lead_seconds: float = DEFAULT_LEAD_SECONDS) -> None:
        """Note where it is: a path of an SQLite file, or an SQLAlchemy URL. StoreError if it is neither.

        ``lead_seconds`` is how long a leader over PostgreSQL may be silent.
        """
        self._location = Location(location)
        self.is_sqlite = self._location.is_sqlite
        self.name = self._location.name
        self.errors = self._location.errors
        self.leadership = None if self.is_sqlite else Leadership(self.name, lead_seconds)
        """Which of several writes to it; None where there can't be several."""

        self._lock: FileLock | None = None
        self._is_silent = False
        """Whether the writer's last transaction ended because no server answered."""

        with self.errors():
            if self.is_sqlite:
                Path(self.name).parent.mkdir(parents=True, exist_ok=True)
            self.writer = self._engine(writer=True)
            self.reader = self._engine(writer=False)

    def open(self) -> None:
        """Take the lock of a file's writer, and bring the tables to this program's version.

        StoreError if somebody else writes to the file, or the database is of a later version, not ours, not a database,
        or read-only.
        """
        with self.errors():
            if self.is_sqlite:
                self._lock = self._lock_sqlite()
            # Look before writing: what is not ours must not be touched, not even by the journal mode.
            with self.reader.connect() as connection:
                version = self._location.version(connection)
            if self.is_sqlite:
                with self.writer.connect() as connection:
                    cursor = connection.connection.cursor()
                    if version is None:
                        # Before there is anything in the file, or it means nothing (sqlite.org/pragma.html).
                        cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")
                    cursor.execute("PRAGMA journal_mode = WAL")
                    cursor.close()
            if version != schema.SCHEMA_VERSION:
                self._migrate()

    def _migrate(self) -> None:
        """Bring the tables to this program's version, all of them or none."""
        with self.writer.begin() as connection:
            if not self.is_sqlite:
                self._take_time(connection)
                # Others may be starting, too: the second finds that all is done.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            migrations.upgrade(connection, self._location.version(connection) or 0)
        if not self.is_sqlite:
            # The next connection has its limits again.
            self.writer.dispose()

    def _take_time(self, connection: Connection) -> None:
        """Lift the limits of time of PostgreSQL, for the rest of a transaction, and of a connection."""
        for limit in ("idle_in_transaction_session_timeout", "statement_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
        connected: Any = connection.connection.dbapi_connection
        connected.silence_seconds = math.inf

    def _lock_sqlite(self) -> FileLock:
        try:
            lock = FileLock(self.name)
        except IsLockedError:
            raise StoreError(f"{self.name} is in use by another stats_svc") from None
        if lock.names > 1:
            lock.close()
            # SQLite's log goes by the name: what is committed under one is not seen under another (howtocorrupt.html).
            raise StoreError(f"{self.name} has other names, too (hard links): all but one have to go")
        return lock

    def _engine(self, *, writer: bool) -> Engine:
        return self._sqlite_engine(writer=writer) if self.is_sqlite else self._postgresql_engine(writer=writer)

    def _sqlite_engine(self, *, writer: bool) -> Engine:
        arguments = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
        engine = self._location.engine(
            pool_size=1 if writer else READERS,
            max_overflow=0,
            poolclass=sa.pool.QueuePool,
            connect_args=arguments,
        )

        @event.listens_for(engine, "connect")
        def on_connect(connection: sqlite3.Connection, _: Any) -> None:
            # SQLAlchemy begins transactions itself, below; sqlite3 would begin them late, and not before a SELECT.
            connection.isolation_level = None
            cursor = connection.cursor()
            # With WAL, FULL is what makes a commit survive a power cut (sqlite.org/pragma.html#pragma_synchronous).
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
            # What a long read had it grow to is given back at the next checkpoint.
            cursor.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
            cursor.close()

        # A writer's lock is taken at the start: one that is raised on the way fails at once if another is quicker.
        begin = "BEGIN IMMEDIATE" if writer else "BEGIN"

        @event.listens_for(engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.connection.cursor().execute(begin)

        return engine

    def _postgresql_engine(self, *, writer: bool) -> Engine:
        limits = {"statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS}s"}
        if writer and self.leadership is not None:
            # Of a leader that is paused within a transaction: its lock on the row would keep others from taking over.
            limits["idle_in_transaction_session_timeout"] = f"{round(self.leadership.lead_seconds * 1000)}ms"
        # The user's own come last, and win.
        options = [
            *(f"-c {name}={value}" for name, value in limits.items()),
            str(self._location.url.query.get("options", "")),
        ]
        engine = self._location.engine(
            pool_size=1 if writer else READERS,
            max_overflow=0,
            # The writer finds out by itself whether its connection is dead, and what became of its commit.
            pool_pre_ping=not writer,
            isolation_level="READ COMMITTED" if writer else "REPEATABLE READ",
            connect_args={"application_name": "stats_svc", "options": " ".join(options), **_PATIENCE},
        )

        # Not before the engine, which says what is missing if it is.
        from stats_svc.postgresql import HeardConnection

        @event.listens_for(engine, "do_connect")
        def on_connect(_: Any, __: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> HeardConnection:
            if not writer:
                self._check_heard()
            connection = HeardConnection.connect(*arguments, **named)
            connection.silence_seconds = SILENCE_SECONDS
            return connection

        @event.listens_for(engine, "handle_error")
        def on_error(context: sa.engine.ExceptionContext) -> None:
            # psycopg may say of a lost connection that it is open, in the middle of a statement. SQLAlchemy would try
            # to roll back, and log the traceback of what comes of that.
            if isinstance(context.sqlalchemy_exception, sa.exc.DBAPIError) and _is_lost(context.sqlalchemy_exception):
                context.is_disconnect = True

        return engine

    def check_writer(self) -> None:
        """Raise StoreError if writes would go to an SQLite file that nobody can see any more: they would succeed."""
        if self.is_sqlite:
            with self.errors():
                stat = os.stat(self.name)
            if self._lock is None or (stat.st_dev, stat.st_ino) != self._lock.identity:
                raise StoreError(f"{self.name} has been replaced by another file")

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees one state of things. StoreError; at once while the server is silent."""
        self._check_heard()
        with self.errors(), self.reader.connect() as connection:
            yield connection

    def _check_heard(self) -> None:
        # The ledger goes on asking by the writer. A reader that waited as well would keep others waiting behind it.
        if self._is_silent:
            raise StoreError(f"{self.name}: the server does not answer")

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give a transaction of the writer, of which nobody has to be told who leads. StoreError."""
        with self.errors(), self._transaction() as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.writer.begin() as connection:
                yield connection
        except BaseException as error:
            self._is_silent = isinstance(error, sa.exc.DBAPIError) and _is_unanswered(error)
            raise
        self._is_silent = False

    def write(self, work: Callable[[Connection], None]) -> None:
        """Do ``work`` in a transaction of the writer, durably or not at all.

        What PostgreSQL undid, or lost a connection over, is done again for a while, unless the database says that it
        was done; ``work`` must bear that. StandingBy if another process has taken over.
        """
        self.check_writer()
        with self.errors():
            if self.leadership is None:
                with self._transaction() as connection:
                    work(connection)
            else:
                self._write_as_leader(self.leadership, work)

    def _write_as_leader(self, leadership: Leadership, work: Callable[[Connection], None]) -> None:
        give_up_at = time.monotonic() + RETRY_SECONDS
        pause_seconds = _FIRST_PAUSE_SECONDS
        is_again = False
        while True:
            begun = time.monotonic()
            try:
                with self._transaction() as connection:
                    if not (is_again and leadership.was_made(connection)):
                        begun = leadership.move_on(connection)
                        work(connection)
                break
            except sa.exc.DBAPIError as error:
                if not _is_worth_a_retry(error) or time.monotonic() + pause_seconds > give_up_at:
                    raise
            is_again = True
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)
        leadership.moved_on(begun)

    def shrink(self) -> bool:
        """Make an SQLite file somewhat smaller if much of it is free; return whether there may be more to do.

        PostgreSQL's autovacuum does what is to be done there.
        """
        if not self.is_sqlite:
            return False
        self.check_writer()
        with self.errors(), self.writer.connect() as connection:
            cursor = connection.connection.cursor()

            def pages(which: str) -> int:
                return int(cursor.execute(f"PRAGMA {which}_count").fetchone()[0])

            free = pages("freelist")
            if free - pages("page") // FREE_SHARE < STEP_PAGES:
                return False
            # A transaction of its own. ``execute`` would take its first step alone, which frees one page.
            cursor.executescript(f"PRAGMA incremental_vacuum({STEP_PAGES})")
            return pages("freelist") < free

    def ping(self) -> None:
        """Return if the database answers its writer, which is heard by those who stand by. StoreError if not."""
        self.write(lambda connection: None if self.leadership else _look(connection))

    def close(self) -> None:
        """Let go of everything, the lead included."""
        if self.leadership is not None:
            with contextlib.suppress(StoreError), self.writing() as connection:
                self.leadership.give_up(connection)
        self.writer.dispose()
        self.reader.dispose()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _look(connection: Connection) -> None:
    connection.execute(sa.select(schema.about.c.schema_version))


def _is_lost(error: sa.exc.DBAPIError) -> bool:
    """Return whether there is no connection to PostgreSQL, or none any more, as the client's library says."""
    is_of_connections = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)
    return is_of_connections and getattr(error.orig, "sqlstate", None) is None


def _is_unanswered(error: sa.exc.DBAPIError) -> bool:
    """Return whether PostgreSQL was waited for as long as may be, by name as its package may be missing."""
    return type(error.orig).__name__ == "ConnectionTimeout"


def _is_worth_a_retry(error: sa.exc.DBAPIError) -> bool:
    """Return whether a transaction may come to a better end when it is tried again."""
    code = getattr(error.orig, "sqlstate", None) or ""
    return _is_lost(error) or code in _WORTH_A_RETRY or code.startswith("08")
