"""What ``modpressure doctor`` says of what is to be the database."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from modpressure.cli.doctor_machine import _database_file, _database_server
from stats_svc.schema import SCHEMA_VERSION
from stats_svc.store import SqlStore


def test_a_database_of_ours_is_well_whether_it_is_in_use_or_not(tmp_path: Path) -> None:
    path = tmp_path / "stats.sqlite3"
    assert _database_file(path).ok
    assert os.listdir(tmp_path) == []
    store = SqlStore(str(path))
    store.load()
    assert _database_file(path).ok
    store.close()
    before = sorted(os.listdir(tmp_path))
    assert _database_file(path).ok
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("kind", ["text", "other", "newer"])
def test_a_file_over_which_stats_svc_would_not_start_is_a_problem(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "stats.sqlite3"
    sentence = "holds something else"
    if kind == "text":
        path.write_text("milk, bread" * 100)
    elif kind == "other":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE recipes (name TEXT)")
    else:
        SqlStore(str(path)).close()
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE modpressure SET schema_version = 999")
        sentence = f"has version 999 of the tables, this program knows up to {SCHEMA_VERSION}"
    found = _database_file(path)
    assert not found.ok and sentence in found.text and found.remedy


def test_a_server_with_a_database_of_a_later_version_is_a_problem(postgres_database: str) -> None:
    assert _database_server(postgres_database).ok
    store = SqlStore(postgres_database)
    store.load()
    assert _database_server(postgres_database).ok
    with store._database.writer.begin() as connection:
        connection.execute(sa.text("UPDATE modpressure SET schema_version = 999"))
    store.close()
    found = _database_server(postgres_database)
    assert not found.ok and "has version 999 of the tables" in found.text and found.remedy
