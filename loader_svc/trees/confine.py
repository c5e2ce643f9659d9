"""Open a file of a tree without ever leaving the tree.

Every component is opened relative to the directory before it and without following links; links are read and followed
here, so that nothing swapped in meanwhile can lead outside. This is the meaning of openat2(2)'s RESOLVE_BENEATH, except
that an absolute link is followed too if it names a place in the tree; it needs no particular kernel.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from loader_svc.trees.errors import OutsideTree, TreeNotFound, UnreadableModule

MAX_LINKS = 40
"""How many links one path may go through (MAXSYMLINKS of path_resolution(7))."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_inside(root: Path, path: str) -> int:
    """Open the regular file ``path``, relative to ``root``, to be read; return its descriptor, for the caller to close.

    Raises OutsideTree if the path or a link on it leads out of ``root``, UnreadableModule if there is no regular file
    that can be read, TreeNotFound if ``root`` is no directory. Pipes, sockets and devices are refused before they are
    opened, so the call can't hang and has no effect on them.
    """
    try:
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TreeNotFound(f"{str(root)!r} is not a directory that can be read: {error.strerror}") from None
    walk = _Walk(root, root_fd, path)
    try:
        return walk.open()
    except OSError as error:
        raise UnreadableModule(path, (error.strerror or str(error)).lower()) from None
    finally:
        walk.close()


def target_inside(root: str, path: str) -> str | None:
    """Where the link ``path`` leads in the end, relative to ``root`` (both absolute, ``root`` resolved); None: outside.

    For deciding what to list. What was true here need not be true later: ``open_inside`` checks again.
    """
    target = os.path.realpath(path)
    if target == root:
        return "."
    return target[len(root) + 1 :] if target.startswith(root.rstrip("/") + "/") else None


class _Walk:
    """One walk from the root to a file: the directories gone through, and the components still to go."""

    def __init__(self, root: Path, root_fd: int, path: str) -> None:
        self._root = root
        self._path = path
        self._fds = [root_fd]
        self._todo: list[str] = []
        self._links = 0

    def open(self) -> int:
        """Go the whole way; OSError for what the system says, OutsideTree where it would leave the root."""
        if self._path.startswith("/") or "\0" in self._path:
            raise OutsideTree(self._path)
        self._push(self._path)
        while self._todo:
            part = self._todo.pop()
            if part == "..":
                self._up()
                continue
            mode = os.stat(part, dir_fd=self._fds[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                self._follow(os.readlink(part, dir_fd=self._fds[-1]))
            elif self._todo:
                self._fds.append(os.open(part, _DIRECTORY, dir_fd=self._fds[-1]))
            elif stat.S_ISREG(mode):
                return self._open_file(part)
            else:
                break
        raise UnreadableModule(self._path, "it is not a regular file")

    def close(self) -> None:
        """Close the directories."""
        for fd in self._fds:
            os.close(fd)

    def _push(self, path: str) -> None:
        self._todo += [part for part in reversed(path.split("/")) if part not in ("", ".")]

    def _up(self) -> None:
        if len(self._fds) == 1:
            raise OutsideTree(self._path)
        os.close(self._fds.pop())

    def _follow(self, target: str) -> None:
        self._links += 1
        if self._links > MAX_LINKS:
            raise UnreadableModule(self._path, "too many links lead to each other")
        if target.startswith("/"):
            roots = {os.path.realpath(self._root).rstrip("/"), os.path.abspath(self._root).rstrip("/")}
            root = next((root for root in roots if f"{target}/".startswith(f"{root}/")), None)
            if root is None:
                raise OutsideTree(self._path)
            target = target[len(root) :]
            while len(self._fds) > 1:
                self._up()
        self._push(target)

    def _open_file(self, name: str) -> int:
        fd = os.open(name, _FILE, dir_fd=self._fds[-1])
        # It may have been swapped for something else since it was looked at.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise UnreadableModule(self._path, "it is not a regular file")
        return fd
