"""``modpressure backup``: a copy of the database, while it is in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from modpressure.cli.output import print_json, say
from modpressure.cli.session import Session, command
from modpressure.errors import AlreadyExists, BadRequest, ModpressureError, NotFound
from modpressure.settings import StatsSettings, load_settings
from modpressure.units import format_bytes


class BackupFailed(ModpressureError):
    """The copy could not be made; what there was of it is gone."""


@command()
async def backup(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to.")],
    database: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The SQLite file.", show_default="the setting database of stats_svc"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy the SQLite file of a stats_svc, which may go on counting meanwhile.

    The copy is as the database is at one point in time, packed, and checked. To go back to it, stop stats_svc and put
    it in the place of the database, whose -wal and -shm files go.

    Examples:
      modpressure backup /backups/modpressure-$(date +%F).sqlite3
    """
    from stats_svc.location import Location
    from stats_svc.rows import StoreError

    try:
        location = Location(database or load_settings(StatsSettings, {}, session.config).database)
    except StoreError as error:
        raise BadRequest(error.sentence) from error
    if not location.is_sqlite:
        raise BadRequest("a database on a server is copied by the server's own tools: pg_dump --format=custom")
    source = Path(location.name)
    if not source.is_file():
        raise NotFound(f"there is no file {str(source)!r}")
    if file.exists() and not force:
        raise AlreadyExists(f"there is a file {str(file)!r} already; --force overwrites it")
    await asyncio.to_thread(copy_database, source, file)
    size_bytes = file.stat().st_size
    if session.json:
        print_json({"database": str(source), "file": str(file), "size_bytes": size_bytes})
    else:
        say(f"copied {source} to {file}, {format_bytes(size_bytes)}")


def copy_database(source: Path, file: Path) -> None:
    """Copy an SQLite database that others may be using; ``file`` appears when it is whole. BackupFailed if it can't be.

    VACUUM INTO reads in one transaction, which keeps no writer waiting in WAL mode (sqlite.org/lang_vacuum.html); a
    copy page by page would begin again with each commit of another process.
    """
    part = file.with_name(f"{file.name}.part")
    with _failures(source), contextlib.suppress(FileNotFoundError):
        part.unlink()
    try:
        with (
            _failures(source),
            contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)) as database,
        ):
            database.execute("VACUUM INTO ?", (str(part),))
        with _failures(part), contextlib.closing(sqlite3.connect(part)) as copy:
            (found,) = copy.execute("PRAGMA integrity_check").fetchone()
            if found != "ok":
                raise BackupFailed(f"the copy of {source} is damaged: {found}")
            copy.execute("SELECT schema_version FROM modpressure")
        with _failures(part), part.open("rb") as written:
            os.fsync(written.fileno())
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise BackupFailed(f"{path} can't be copied: {error}") from error
    except OSError as error:
        raise BackupFailed(f"{path} can't be copied: {(error.strerror or str(error)).lower()}") from error
