"""The files that a script names, wherever they are by now."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from loader_svc.image import ImageProblem, user_decompress
from loader_svc.image.compression import SUFFIXES
from modpressure.errors import BadRequest, NotFound

_COPY: Final = re.compile(r"\.c\d+$")
"""What the copies of a file end with: the same content in another inode."""

_LARGEST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class ScriptFile:
    """A file as a script means it."""

    path: Path
    inode: str
    """What tells it from other files, and copies of it."""

    def open(self) -> int:
        """Return a new descriptor."""
        return os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return self.path.stat().st_size


class Files:
    """Finds files by name in directories: straight in them first, then below them.

    A file that is there only packed is unpacked into a temporary directory, which goes with ``close``.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """NotFound names the first directory that is none."""
        for directory in directories:
            if not directory.is_dir():
                raise NotFound(f"there is no directory {str(directory)!r}", field="files")
        if not directories:
            raise BadRequest("there is no directory to look for files in", field="files")
        self._directories = tuple(directories)
        self._found: dict[str, ScriptFile | None] = {}
        self._below: dict[str, Path] | None = None
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was unpacked."""
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    @property
    def directory(self) -> Path:
        """Any directory."""
        return self._directories[0]

    def find(self, name: str) -> ScriptFile | None:
        """Return the file that a script calls ``name``, a path of the machine it ran on; None if there is none."""
        name = PurePosixPath(name).name
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> ScriptFile | None:
        path = self._path(name)
        if path is not None:
            status = path.stat()
            return ScriptFile(path, f"{status.st_dev}:{status.st_ino}")
        if _COPY.search(name):
            original = self.find(_COPY.sub("", name))
            return original and ScriptFile(original.path, f"{original.inode}:{name}")
        for suffix in SUFFIXES:
            packed = self._path(name + suffix)
            if packed is not None:
                return self._unpack(packed, name)
        return None

    def _path(self, name: str) -> Path | None:
        for directory in self._directories:
            if (directory / name).is_file():
                return directory / name
        if self._below is None:
            self._below = {}
            for directory in self._directories:
                for path in sorted(directory.rglob("*")):
                    self._below.setdefault(path.name, path)
        found = self._below.get(name)
        return found if found is not None and found.is_file() else None

    def _unpack(self, packed: Path, name: str) -> ScriptFile:
        if self._unpacked is None:
            self._unpacked = tempfile.TemporaryDirectory(prefix="modpressure-")
        path = Path(self._unpacked.name) / name
        try:
            chunks = user_decompress(packed.read_bytes(), SUFFIXES[packed.suffix], limit_bytes=_LARGEST_BYTES)
            path.write_bytes(b"".join(chunks))
        except ImageProblem as problem:
            raise BadRequest(f"{packed}: {problem}") from None
        return ScriptFile(path, str(path))


def open_pipe() -> int:
    """Return the reading end of a pipe."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.close(writing)
    return reading


open_directory = partial(os.open, flags=os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
