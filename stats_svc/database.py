"""Opening a database, SQLite or PostgreSQL, and saying in one sentence why it can't be opened.

One process writes to a database: the ledger keeps the modules lists in memory. So the writer holds a lock: on a file
beside an SQLite file; on PostgreSQL an advisory lock of the very connection that it writes through, so that whoever
has lost the one has lost the other.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url

from stats_svc import schema
from stats_svc.rows import StoreError

BUSY_TIMEOUT_SECONDS: Final = 5
"""How long SQLite waits for somebody else's lock, such as a backup's."""

CONNECT_TIMEOUT_SECONDS: Final = 5
"""How long a PostgreSQL server may take to answer."""

READERS: Final = 5
"""Connections for reading."""

_ADVISORY_LOCK: Final = 0x6D6F6470
"""Key of the writer's lock on PostgreSQL; an arbitrary number."""


class Database:
    """A database, its two engines, and the lock of its one writer.

    ``writer`` has one connection; ``reader`` has several, each of whose transactions sees one state of things.
    """

    def __init__(self, location: str) -> None:
        """Note where it is: a path of an SQLite file, or an SQLAlchemy URL. StoreError if it is neither."""
        self._url = _url_of(location)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self.name = self._url.database or "" if self.is_sqlite else self._url.render_as_string(hide_password=True)
        """What sentences call it; without its password."""

        self._lock_file: int | None = None
        self._identity: tuple[int, int] | None = None
        with self.errors():
            if self.is_sqlite:
                Path(self.name).parent.mkdir(parents=True, exist_ok=True)
            self.writer = self._engine(writer=True)
            self.reader = self._engine(writer=False)

    def open(self) -> None:
        """Take the writer's lock, and create the tables if there are none.

        StoreError if somebody else is the writer, or the database is of a later version, not ours, not a database, or
        read-only.
        """
        with self.errors():
            if self.is_sqlite:
                self._lock_sqlite()
            # Look before writing: what is not ours must not be touched, not even by the journal mode.
            with self.reader.connect() as connection:
                version = self._version(connection)
            if self.is_sqlite:
                with self.writer.connect() as connection:
                    connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
            if version is None:
                with self.writer.begin() as connection:
                    schema.metadata.create_all(connection)
                    row = {"schema_version": schema.SCHEMA_VERSION, "opened_time_ns": time.time_ns()}
                    connection.execute(sa.insert(schema.about), row)
            if self.is_sqlite:
                stat = os.stat(self.name)
                self._identity = (stat.st_dev, stat.st_ino)

    def _version(self, connection: Connection) -> int | None:
        """Return the version of the tables, None if there are none."""
        tables = set(sa.inspect(connection).get_table_names())
        if schema.about.name not in tables:
            # A database on a server may well hold other people's tables; a file that does is not ours.
            foreign = tables if self.is_sqlite else tables & schema.metadata.tables.keys()
            if foreign:
                raise StoreError(f"{self.name} holds tables of something else, such as {sorted(foreign)[0]!r}")
            return None
        version = connection.execute(sa.select(schema.about.c.schema_version)).scalar_one()
        if version > schema.SCHEMA_VERSION:
            raise StoreError(
                f"{self.name} has version {version} of the tables; this program knows versions up to"
                f" {schema.SCHEMA_VERSION}"
            )
        return int(version)

    def _lock_sqlite(self) -> None:
        # Not on the file itself: to close another descriptor of that would let go of SQLite's own locks.
        lock_file = os.open(f"{self.name}.lock", os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_file)
            raise self._in_use() from None
        self._lock_file = lock_file

    def _in_use(self) -> StoreError:
        return StoreError(f"{self.name} is in use by another stats_svc")

    def _engine(self, *, writer: bool) -> Engine:
        return self._sqlite_engine(writer=writer) if self.is_sqlite else self._postgresql_engine(writer=writer)

    def _sqlite_engine(self, *, writer: bool) -> Engine:
        arguments = {"timeout": BUSY_TIMEOUT_SECONDS, "check_same_thread": False}
        engine = sa.create_engine(
            self._url,
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
            cursor.close()

        # A writer's lock is taken at the start: one that is raised on the way fails at once if another is quicker.
        begin = "BEGIN IMMEDIATE" if writer else "BEGIN"

        @event.listens_for(engine, "begin")
        def on_begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _postgresql_engine(self, *, writer: bool) -> Engine:
        try:
            engine = sa.create_engine(
                self._url,
                pool_size=1 if writer else READERS,
                max_overflow=0,
                # A dead connection of a reader is replaced; one of the writer took the lock with it.
                pool_pre_ping=not writer,
                isolation_level="READ COMMITTED" if writer else "REPEATABLE READ",
                connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS},
            )
        except ModuleNotFoundError as error:
            raise StoreError(f"PostgreSQL needs the package {error.name}; install modpressure[postgres]") from None
        if writer:

            @event.listens_for(engine, "connect")
            def on_connect(connection: Any, _: Any) -> None:
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_try_advisory_lock(%s)", (_ADVISORY_LOCK,))
                    (locked,) = cursor.fetchone()
                connection.commit()
                if not locked:
                    connection.close()
                    raise self._in_use()

        return engine

    def check_writer(self) -> None:
        """Raise StoreError if writes would go to an SQLite file that nobody can see any more: they would succeed."""
        if self.is_sqlite:
            with self.errors():
                stat = os.stat(self.name)
            if (stat.st_dev, stat.st_ino) != self._identity:
                raise StoreError(f"{self.name} has been replaced by another file")

    def ping(self) -> None:
        """Return if the database answers its writer. StoreError if not."""
        self.check_writer()
        with self.errors(), self.writer.connect() as connection:
            connection.execute(sa.select(schema.about.c.schema_version))

    def close(self) -> None:
        """Let go of everything."""
        self.writer.dispose()
        self.reader.dispose()
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the database or the file system raises into StoreError, one sentence that names the database."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise StoreError(f"{self.name}: {_reason(error.orig)}") from error
        except sa.exc.SQLAlchemyError as error:
            raise StoreError(f"{self.name}: {_first_line(error)}") from error
        except OSError as error:
            raise StoreError(f"{self.name}: {(error.strerror or str(error)).lower()}") from error


def _url_of(location: str) -> URL:
    if "://" not in location:
        return URL.create("sqlite", database=os.path.abspath(location))
    try:
        url = make_url(location)
        if url.drivername in ("postgresql", "postgres"):
            # Without a driver SQLAlchemy would take psycopg2.
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()
    except (sa.exc.ArgumentError, ValueError):
        raise StoreError(f"{location!r} is neither a path nor the URL of a database") from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"{url.drivername} is not supported; give the path of an SQLite file or a postgresql:// URL")
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise StoreError(f"{location!r} names no file; counts that are not in a file can't be kept")
        url = url.set(database=os.path.abspath(url.database))
    return url


def _reason(error: BaseException | None) -> str:
    """Return why, in SQLite's or PostgreSQL's words, as the end of a sentence."""
    if isinstance(error, sqlite3.Error):
        # "file is not a database", "attempt to write a readonly database", "database or disk is full", ...
        return str(error)
    return _first_line(error)


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
