"""Where a database is: reading what a setting says of that, and looking there without making or changing anything."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, make_url

from stats_svc import schema
from stats_svc.rows import StoreError

CONNECT_TIMEOUT_SECONDS: Final = 5
"""How long a PostgreSQL server may take to answer."""

_SHOWN_PARAMETERS: Final = frozenset({"host", "hostaddr", "port", "dbname", "user", "service", "sslmode"})
"""Parameters of a URL that say which database it is, and can be shown (libpq's names)."""

_PARAMETERS: Final = re.compile(r"\?(?=\w+=)")


class LaterVersion(StoreError):
    """The tables were made by a later version of this program."""


class Location:
    """A place of a database, SQLite or PostgreSQL; whether there is one yet is another matter."""

    def __init__(self, location: str) -> None:
        """Read a path of an SQLite file, or an SQLAlchemy URL. StoreError if it is neither."""
        self.url = _url_of(location)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.name = self.url.database or "" if self.is_sqlite else _without_secrets(self.url)
        """What sentences call it: of SQLite the path without symbolic links, of others the URL without passwords."""

    def check(self) -> None:
        """Return if stats_svc could use what is there, or nothing is there yet; it is only read.

        StoreError if it is not ours, not a database, or not reached, LaterVersion if it is of a later version.
        """
        engine = self.engine()
        if self.is_sqlite:
            if not os.path.exists(self.name):
                return
            engine = sa.create_engine("sqlite://", creator=self._read_sqlite)
        with self.errors():
            try:
                with engine.connect() as connection:
                    self.version(connection)
            finally:
                engine.dispose()

    def _read_sqlite(self) -> sqlite3.Connection:
        # A file that nobody uses has no log, and is read without one being made (sqlite.org/uri.html).
        how = "mode=ro" if os.path.exists(f"{self.name}-wal") else "immutable=1"
        return sqlite3.connect(f"{Path(self.name).as_uri()}?{how}", CONNECT_TIMEOUT_SECONDS, uri=True)

    def engine(self, **arguments: Any) -> sa.Engine:
        """Make an engine with SQLAlchemy's ``arguments``.

        StoreError if the package for it is missing, or the URL's parameters make no sense.
        """
        connect_args = arguments.pop("connect_args", {})
        if not self.is_sqlite:
            connect_args = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, **connect_args}
        try:
            engine = sa.create_engine(self.url, connect_args=connect_args, **arguments)
            # They are looked at with the first connection, whose errors are the driver's.
            engine.dialect.create_connect_args(self.url)
        except (ValueError, sa.exc.ArgumentError) as error:
            raise StoreError(f"{self.name}: {_first_line(error)}") from None
        except ModuleNotFoundError as error:
            raise StoreError(f"PostgreSQL needs the package {error.name}; install modpressure[postgres]") from None
        return engine

    def version(self, connection: Connection) -> int | None:
        """Return the version of the tables, None if there are none; StoreError as in ``check``."""
        tables = set(sa.inspect(connection).get_table_names())
        if schema.about.name not in tables:
            # A database on a server may well hold other people's tables; a file that does is not ours.
            foreign = tables if self.is_sqlite else tables & schema.metadata.tables.keys()
            if foreign:
                raise StoreError(f"{self.name} holds tables of something else, such as {sorted(foreign)[0]!r}")
            return None
        version = connection.execute(sa.select(schema.about.c.schema_version)).scalar_one()
        check_version(self.name, version)
        return int(version)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the database or the file system raises into StoreError, one sentence that names the database."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise StoreError(f"{self.name}: {self._reason(error.orig)}") from error
        except sqlite3.Error as error:
            # Of what goes past SQLAlchemy.
            raise StoreError(f"{self.name}: {self._reason(error)}") from error
        except sa.exc.SQLAlchemyError as error:
            raise StoreError(f"{self.name}: {_first_line(error)}") from error
        except OSError as error:
            raise StoreError(f"{self.name}: {(error.strerror or str(error)).lower()}") from error

    def _reason(self, error: BaseException | None) -> str:
        """Return why, in SQLite's or PostgreSQL's words, as the end of a sentence."""
        if not isinstance(error, sqlite3.Error):
            return _first_line(error)
        # "file is not a database", "attempt to write a readonly database", "database or disk is full", ...; but of a
        # directory "unable to open database file".
        return "is a directory" if os.path.isdir(self.name) else str(error)


def check_version(database: str, version: int) -> None:
    """Return if a database's tables are not of a later version than this program's; LaterVersion if they are."""
    if version > schema.SCHEMA_VERSION:
        raise LaterVersion(
            f"{database} has version {version} of the tables; this program knows versions up to {schema.SCHEMA_VERSION}"
        )


def _url_of(location: str) -> URL:
    if "://" not in location:
        return URL.create("sqlite", database=os.path.realpath(location))
    _check_password(location)
    try:
        url = make_url(location)
        if url.drivername in ("postgresql", "postgres"):
            # Without a driver SQLAlchemy would take psycopg2.
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect()
    except (sa.exc.ArgumentError, ValueError):
        shown, port = _without_password(location)
        if port and not port.isdecimal():
            raise StoreError(f"{shown}: {port!r} is no port") from None
        # What follows may hold a password, and can't be told apart from it.
        scheme = location.partition("://")[0]
        raise StoreError(f"'{scheme}://...' is neither a path nor the URL of a database") from None
    if url.drivername not in ("sqlite", "sqlite+pysqlite") and url.get_backend_name() != "postgresql":
        raise StoreError(f"{url.drivername} is not supported; give the path of an SQLite file or a postgresql:// URL")
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise StoreError(f"{location!r} names no file; counts that are not in a file can't be kept")
        url = url.set(database=os.path.realpath(url.database))
    return url


def _check_password(location: str) -> None:
    """Return if no part of a URL's password is taken for its host, which drivers name. StoreError if one may be."""
    if not location.startswith("sqlite") and _without_parameters(location).count("@") > 1:
        raise StoreError(f"{_without_password(location)[0]}: a '@' in a name or password is written %40, a '/' %2F")


def _without_password(location: str) -> tuple[str, str]:
    """Return a URL without what may be its password, nor any parameters; and its port, if it can be told from that.

    All from the first ':' to the last '@' may be the password.
    """
    scheme, _, rest = _without_parameters(location).partition("://")
    user, at, place = rest.rpartition("@")
    hidden = f"{user.partition(':')[0]}:***@" if ":" in user else user + at
    host = place.partition("/")[0].rpartition("]")[2]
    return f"{scheme}://{hidden}{place}", host.partition(":")[2] if at else ""


def _without_parameters(location: str) -> str:
    # A '?' in a password is followed by no name of a parameter, or by an '@'.
    user, at, place = location.partition("@")
    return user + at + _PARAMETERS.split(place)[0]


def _without_secrets(url: URL) -> str:
    # Passwords and keys may be among libpq's parameters, too (password, sslpassword, oauth_client_secret and others).
    secrets = [name for name in url.query if name not in _SHOWN_PARAMETERS]
    return url.difference_update_query(secrets).render_as_string(hide_password=True)


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
