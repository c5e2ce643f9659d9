"""Open a file of a tree without ever leaving the tree.

Every component is opened relative to the directory before it and without following links; links are read and followed
here, so that nothing swapped in meanwhile can lead outside. This is the meaning of openat2(2)'s RESOLVE_BENEATH, except
that an absolute link is followed too if it names a place in the tree; it needs no particular kernel.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from pathlib import Path

from loader_svc.trees.errors import OutsideTree, TreeNotFound, UnreadableModule

MAX_LINKS = 40
"""How many links one path may go through (MAXSYMLINKS of path_resolution(7))."""

MAX_KEPT_DIRECTORIES = 64
"""How many directories an opener keeps open; what lies in others takes the long way each time."""

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


class Opener:
    """Opens files below one root as ``open_inside`` does, quickly where it has been in their directory before.

    Directories reached without any link are kept open, as many as ``MAX_KEPT_DIRECTORIES``. Whatever is swapped in on
    the path to them afterwards is not looked at: a kept directory is the one that was there. From any thread.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: dict[str, int] = {}
        self._keeping = threading.Lock()
        weakref.finalize(self, _close_all, self._kept)

    def open(self, path: str) -> int:
        """Open the regular file ``path``, relative to the root; return its descriptor. Raises as ``open_inside``."""
        directory, _, name = path.rpartition("/")
        kept = self._kept.get(directory)
        if kept is not None:
            try:
                if stat.S_ISREG(os.stat(name, dir_fd=kept, follow_symlinks=False).st_mode):
                    return _open_regular(name, kept, path)
            except (OSError, UnreadableModule):
                pass  # Whatever has become of it, the long way finds out and says.
        fd = open_inside(self._root, path)
        if kept is None and len(self._kept) < MAX_KEPT_DIRECTORIES:
            try:
                self._keep(directory)
            except OSError:
                pass  # No descriptor is left to keep one open; the file is, and that was asked for.
            except BaseException:
                os.close(fd)
                raise
        return fd

    def _keep(self, directory: str) -> None:
        with self._keeping:
            if directory in self._kept or ".." in directory.split("/"):
                return
            fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for part in filter(None, directory.split("/")):
                    fd, parent = os.open(part, _DIRECTORY, dir_fd=fd), fd
                    os.close(parent)
            except OSError:
                os.close(fd)  # A link is on the way, or it has gone: not to be kept.
            else:
                self._kept[directory] = fd


def _close_all(kept: dict[str, int]) -> None:
    for fd in kept.values():
        os.close(fd)


def _open_regular(name: str, directory_fd: int, path: str) -> int:
    """Open ``name`` in a directory; UnreadableModule, which names ``path``, if it is no regular file by now."""
    fd = os.open(name, _FILE, dir_fd=directory_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UnreadableModule(path, "it is not a regular file")
    return fd


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
                # It may be swapped for something else after it was looked at.
                return _open_regular(part, self._fds[-1], self._path)
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
