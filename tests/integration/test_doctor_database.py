"""What ``modpressure doctor`` says of what is to be the database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from modpressure.cli.doctor_machine import Finding, _database
from modpressure.cli.session import Session
from modpressure.settings import ClientSettings
from stats_svc.schema import SCHEMA_VERSION
from stats_svc.store import SqlStore

Look = Callable[[str], Finding]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Return what is found where the setting names a place."""

    def found(location: str) -> Finding:
        monkeypatch.setenv("MODPRESSURE_STATS_DATABASE", location)
        return _database(Session(ClientSettings(), False, None))

    return found


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "sqlite+pysqlite:///{}?timeout=3"])
def test_a_database_of_ours_is_well_whether_it_is_in_use_or_not(tmp_path: Path, look: Look, form: str) -> None:
    location = form.format(tmp_path / "stats 1.sqlite3")
    assert look(location).ok
    assert os.listdir(tmp_path) == []
    store = SqlStore(location)
    store.load()
    assert look(location).ok
    store.close()
    before = sorted(os.listdir(tmp_path))
    assert look(location).ok
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("kind", "sentence", "remedy"),
    [
        ("text", "file is not a database", "name another file"),
        ("other", "holds tables of something else, such as 'recipes'", "name another file"),
        (
            "newer",
            f"has version 999 of the tables; this program knows versions up to {SCHEMA_VERSION}",
            "install the newer modpressure",
        ),
    ],
)
def test_a_file_over_which_stats_svc_would_not_start_is_a_problem(
    tmp_path: Path, look: Look, kind: str, sentence: str, remedy: str
) -> None:
    path = tmp_path / "stats.sqlite3"
    if kind == "text":
        path.write_text("milk, bread" * 100)
    elif kind == "other":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")
    else:
        SqlStore(str(path)).close()
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE modpressure SET schema_version = 999")
    found = look(str(path))
    assert not found.ok
    assert str(path) in found.text and sentence in found.text
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("postgresql://me:secret@/x?port=five&password=secret", "//me:***@/x?port=five: Received non-integer port"),
        ("postgresql://me@/x?port=five&oauth_client_secret=secret", "//me@/x?port=five: Received non-integer port"),
        ("sqlite:////nosuch/x?timeout=soon", "/nosuch/x: could not convert string to float"),
        ("sqlite+aiosqlite:////nosuch/x", "sqlite+aiosqlite is not supported"),
        ("postgresql://me:secret@host:port/x", "postgresql://me:***@host:port/x: 'port' is no port"),
        ("postgresql://me:secret/x", "'postgresql://...' is neither a path nor the URL of a database"),
        ("postgresql://me:no@secret/secret@127.0.0.1:1/x", "//me:***@127.0.0.1:1/x: a '@' in a name or password is"),
        ("postgresql://me:no@secret?secret@host/x", "//me:***@host/x: a '@'"),
        ("postgresql://me:no?secret=no@secret@host/x", "//me:***@host/x: a '@'"),
        ("postgresql://me@corp:secret@[::1]:1/x?password=secret", "//me@corp:***@[::1]:1/x: a '@'"),
        ("mysql://me:secret@host/x", "not supported"),
        ("sqlite://", "names no file"),
    ],
)
def test_a_setting_that_stats_svc_makes_no_sense_of_is_a_problem(look: Look, location: str, sentence: str) -> None:
    found = look(location)
    assert not found.ok and sentence in found.text and found.remedy
    assert "secret" not in found.text


def test_a_server_with_a_database_of_a_later_version_is_a_problem(postgres_database: str, look: Look) -> None:
    assert look(postgres_database).ok
    store = SqlStore(postgres_database)
    store.load()
    assert look(postgres_database).ok
    with store._database.writer.begin() as connection:
        connection.execute(sa.text("UPDATE modpressure SET schema_version = 999"))
    store.close()
    found = look(postgres_database)
    assert not found.ok and "has version 999 of the tables" in found.text
    assert "install the newer modpressure" in found.remedy
