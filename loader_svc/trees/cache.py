"""Keep the index of a tree for the next time, under the fingerprint of what the tree holds.

A file is a line that says what it is, for which fingerprint and with which checksum, then JSON. Nothing in it is
trusted: what is damaged, of another format or of another tree counts as absent, and is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import platformdirs
import structlog

from loader_svc.trees.index import TreeIndex, is_index

FORMAT = 1
"""To be raised whenever the index of the same tree comes out otherwise than before."""

MAX_FILES = 16
"""How many indexes are kept; a whole Debian kernel's takes 3 MiB."""

MAX_FILE_BYTES = 256 << 20
"""Longest file that is read."""

_log = structlog.get_logger(__name__)


class IndexCache:
    """A directory of indexes. It need not exist or be writable: then nothing is kept."""

    def __init__(self, directory: Path | None = None) -> None:
        """``directory`` defaults to the user's cache directory."""
        base = platformdirs.user_cache_path("modpressure") if directory is None else directory
        self._directory = base / "trees"

    def load(self, fingerprint: str) -> TreeIndex | None:
        """Return the index kept under ``fingerprint``; None if there is none that is whole."""
        path = self._path(fingerprint)
        try:
            with path.open("rb") as file:
                header, _, body = file.read(MAX_FILE_BYTES).partition(b"\n")
            if header != _header(fingerprint, body):
                return None
            fields = json.loads(body)
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or not is_index(fields):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used go first
        return TreeIndex(**fields)

    def store(self, fingerprint: str, index: TreeIndex) -> None:
        """Keep ``index`` under ``fingerprint``: whole or not at all, and no matter how many do so at once."""
        body = json.dumps({name: getattr(index, name) for name in TreeIndex.__slots__}).encode()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self._directory)
            try:
                with open(fd, "wb") as file:
                    file.write(_header(fingerprint, body) + b"\n" + body)
                os.replace(name, self._path(fingerprint))
            except OSError:
                os.unlink(name)
                raise
            self._prune()
        except OSError as error:
            _log.debug("index of the module tree not kept", directory=str(self._directory), reason=str(error))

    def _path(self, fingerprint: str) -> Path:
        return self._directory / f"{fingerprint}.index"

    def _prune(self) -> None:
        kept = sorted(self._directory.glob("*.index"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in kept[MAX_FILES:]:
            path.unlink(missing_ok=True)


def _header(fingerprint: str, body: bytes) -> bytes:
    return f"modpressure module tree index {FORMAT} {fingerprint} {hashlib.sha256(body).hexdigest()}".encode()
