"""Kinds of columns that all versions have in common."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa

TEXT: Final = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Sorted by bytes on both: PostgreSQL's own order follows a language, and pages by id would not."""


def number(name: str, default: str | None = None) -> sa.Column[Any]:
    """Return a column of numbers to 63 bits; ``default`` is what rows that are there get."""
    return sa.Column(name, sa.BigInteger, nullable=False, server_default=default)


def text(name: str, default: str | None = None) -> sa.Column[Any]:
    """Return a column of texts; ``default`` is what rows that are there get, as SQL."""
    return sa.Column(name, TEXT, nullable=False, server_default=default)


def key(name: str) -> sa.Column[Any]:
    """Return a column of texts that is part of the key."""
    return sa.Column(name, TEXT, primary_key=True)


def number_key(name: str) -> sa.Column[Any]:
    """Return a column of numbers that is part of the key."""
    return sa.Column(name, sa.BigInteger, primary_key=True, autoincrement=False)


def system() -> sa.Column[Any]:
    """Return the column of the system that a row is of, part of the key."""
    return sa.Column("system", TEXT, sa.ForeignKey("systems.id"), primary_key=True)
