"""Bearer tokens: who may do what, in which systems, until when.

A token is 256 random bits. The file of a service holds its SHA-256 alone, so that who reads the file can't use it; a
slow hash would add nothing to that many bits. The file is TOML, one table a token:

    [[token]]
    name = "ci"
    sha256 = "…"                        # of the token
    roles = ["load", "read"]            # load, read, admin; admin may do all
    systems = ["ci-*", "default"]       # shell patterns of system ids; ["*"] for all
    expires = 2030-01-31T00:00:00Z      # may be left out: never
"""

from __future__ import annotations

import fnmatch
import hashlib
import secrets
import threading
import time
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import structlog

from modpressure.errors import BadRequest, Forbidden, ModpressureError, Unauthenticated, shown

_log = structlog.get_logger(__name__)

ALL: Final = "*"
"""The pattern of all systems."""

_KEYS: Final = ("name", "sha256", "roles", "systems", "expires")


class BadTokenFile(ModpressureError):
    """A file that holds no tokens; the sentence names the file and what is wrong."""


class Role(StrEnum):
    """What a token is for."""

    LOAD = "load"
    """Load and unload modules, run storms; what a loader needs at stats_svc."""

    READ = "read"
    """Read reports, counters, events, modules."""

    ADMIN = "admin"
    """Create, reset and delete systems, and everything else."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows."""

    name: str
    roles: frozenset[Role]
    systems: tuple[str, ...]
    expires: datetime | None = None

    def check_time(self, now_seconds: float) -> None:
        """Return if it is still good at ``now_seconds`` since the epoch. Unauthenticated if not."""
        if self.expires is not None and now_seconds >= self.expires.timestamp():
            raise Unauthenticated(f"token {self.name!r} expired at {self.expires.isoformat(timespec='seconds')}")

    def check_role(self, role: Role) -> None:
        """Return if it has a role. Forbidden if not."""
        if role not in self.roles and Role.ADMIN not in self.roles:
            has = " and ".join(sorted(self.roles))
            raise Forbidden(f"token {self.name!r} may not {role}: it is for {has}")

    def check_systems(self, systems: Iterable[str]) -> None:
        """Return if it is good for all of these systems. Forbidden names one that it is not good for."""
        for system in systems:
            if not is_for(self.systems, system):
                raise Forbidden(f"token {self.name!r} is not for system {shown(system)}", field="system")

    @property
    def is_for_all_systems(self) -> bool:
        """Whether it is good for every system."""
        return ALL in self.systems


def is_for(patterns: Iterable[str], system: str) -> bool:
    """Return whether a system is one of those that patterns name."""
    return any(fnmatch.fnmatchcase(system, pattern) for pattern in patterns)


def covers(patterns: Collection[str], others: Iterable[str]) -> bool:
    """Return whether patterns are sure to name all systems that others do."""
    return ALL in patterns or set(others) <= set(patterns)


def digest(token: str) -> str:
    """Return what a file holds of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def digest_of(authorization: str) -> str:
    """Return the digest of the token in the value of an ``authorization`` header. Unauthenticated if it has none."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("a token is needed: metadata 'authorization: Bearer TOKEN'")
    return digest(token.strip())


def new_token() -> str:
    """Return a new token: 256 random bits as 43 letters, digits, ``-`` and ``_``."""
    return secrets.token_urlsafe(32)


def entry(token: str, name: str, roles: Iterable[Role], systems: Iterable[str], expires: datetime | None = None) -> str:
    """Return what to append to a file for a token to be known. BadRequest for a name or pattern that can't be."""
    for text in (name, *systems):
        if not text or not text.isprintable() or '"' in text or "\\" in text or len(text) > 128:
            raise BadRequest(f"{text!r} is no name or pattern: 1 to 128 printable characters without quotes")
    lists = {"roles": [str(role) for role in roles], "systems": list(systems)}
    lines = [f'name = "{name}"', f'sha256 = "{digest(token)}"']
    for key, items in lists.items():
        quoted = ", ".join(f'"{item}"' for item in items)
        lines.append(f"{key} = [{quoted}]")
    if expires is not None:
        lines.append(f"expires = {expires.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}")
    return "\n".join(["[[token]]", *lines]) + "\n"


def read_tokens(path: Path) -> dict[str, Grant]:
    """Return the grants of a file by the digest of their token. BadTokenFile if it is away or makes no sense."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTokenFile(f"{path} can't be read: {(error.strerror or str(error)).lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadTokenFile(f"{path} is no TOML: {error}") from error
    if unknown := sorted(content.keys() - {"token"}):
        raise BadTokenFile(f"{path}: there is no {unknown[0]!r} in a file of tokens")
    tables = content.get("token", [])
    if not isinstance(tables, list):
        raise BadTokenFile(f"{path}: tokens are tables, [[token]]")
    grants: dict[str, Grant] = {}
    for number, table in enumerate(tables, 1):
        try:
            hashed, grant = _grant(table)
        except ValueError as error:
            raise BadTokenFile(f"{path}: token {number}: {error}") from error
        if hashed in grants:
            raise BadTokenFile(f"{path}: token {number}: {grants[hashed].name!r} has the same sha256")
        grants[hashed] = grant
    return grants


def _grant(table: Any) -> tuple[str, Grant]:
    if not isinstance(table, dict):
        raise ValueError("it is no table, [[token]]")
    for key in table:
        if key not in _KEYS:
            raise ValueError(f"there is no key {key!r}")
    name, hashed, expires = table.get("name"), table.get("sha256"), table.get("expires")
    if not isinstance(name, str) or not name:
        raise ValueError("it has no name")
    if not isinstance(hashed, str) or len(hashed) != 64 or not set(hashed) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 of {name!r} is not 64 lower-case hexadecimal digits")
    roles, systems = (_texts(table, key) for key in ("roles", "systems"))
    for role in roles:
        if role not in set(Role):
            raise ValueError(f"{role!r} is no role; there are {', '.join(Role)}")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise ValueError(f"expires of {name!r} is no date and time with a zone, such as 2030-01-31T00:00:00Z")
    return hashed, Grant(name, frozenset(map(Role, roles)), tuple(systems), expires)


def _texts(table: dict[str, Any], key: str) -> list[str]:
    texts = table.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} is not a list of texts")
    return texts


class TokenFile:
    """The tokens of a service, as its file has them now. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Read the file. BadTokenFile if it makes no sense; later, what makes none leaves what was."""
        self._path = path
        self._lock = threading.Lock()
        self._grants = read_tokens(path)
        self._stamp = self._stamp_now()

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _follow(self) -> None:
        stamp = self._stamp_now()
        if stamp is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._grants = read_tokens(self._path)
        except BadTokenFile as error:
            _log.warning("kept the old tokens", reason=error.sentence)
        else:
            _log.info("took new tokens", path=str(self._path), tokens=len(self._grants))

    def grant(self, authorization: str) -> Grant:
        """Return what the value of an ``authorization`` header allows. Unauthenticated if it is none that is known."""
        return self.grant_of(digest_of(authorization))

    def grant_of(self, hashed: str) -> Grant:
        """Return what the token of a digest allows now. Unauthenticated if there is none, or it has expired."""
        with self._lock:
            self._follow()
            grant = self._grants.get(hashed)
        if grant is None:
            raise Unauthenticated("the token is not known here")
        grant.check_time(time.time())
        return grant
