"""What a tree holds: its module files, and the texts that depmod and the kernel's build leave beside them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loader_svc.trees.confine import open_inside, target_inside
from loader_svc.trees.errors import OutsideTree, TreeNotFound, TreeTooBig, UnreadableModule
from loader_svc.trees.names import SUFFIXES, compression

TEXTS = (
    "modules.dep",
    "modules.alias",
    "modules.symbols",
    "modules.softdep",
    "modules.builtin",
    "modules.builtin.modinfo",
    "modules.order",
)
"""The files that say what modules there are and how they hang together (depmod(8), modules.dep(5))."""

MAX_TEXT_BYTES = 128 << 20
"""Longest of these texts that is read; Debian's longest has 1.3 MiB."""

MAX_ENTRIES = 400_000
"""Most files and directories below a root; Debian's whole tree has 5,000. It is for who names the wrong directory."""

_SKIPPED_DIRECTORIES = ("build", "source")  # links to the kernel's source, which depmod leaves out too


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """One regular module file: where, how long (bytes), last changed (ns since the epoch), and whether by a link."""

    path: str
    size_bytes: int
    mtime_ns: int
    is_link: bool


@dataclass(slots=True)
class Scan:
    """Everything that decides what the index of a tree says. Paths are relative to the root."""

    root: Path
    files: dict[str, ModuleFile] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    """Links with a module's name that lead out of the tree."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Contents of those of ``TEXTS`` that there are."""

    def identity(self) -> str:
        """Fingerprint of the module files' paths and lengths: equal wherever the same tree is mounted."""
        digest = hashlib.sha256(b"modpressure tree\n")
        for path in sorted(self.files):
            digest.update(f"{path}\0{self.files[path].size_bytes}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Fingerprint of all that the index is made of: it differs when a module file or a text was changed."""
        digest = hashlib.sha256(b"modpressure tree index\n")
        for path in sorted(self.files):
            file = self.files[path]
            line = f"{path}\0{file.size_bytes}\0{file.mtime_ns}\0{file.is_link}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        for path in sorted(self.outside):
            digest.update(f"{path}\0outside\n".encode("utf-8", "surrogateescape"))
        for name, text in sorted(self.texts.items()):
            digest.update(f"{name}\0{len(text)}\n".encode())
            digest.update(text)
        return digest.hexdigest()


def scan_tree(root: Path) -> Scan:
    """Look through the directory ``root``; nothing but the texts is read.

    Raises TreeNotFound if it is no directory that can be listed, TreeTooBig if there is far more in it than in a tree
    of modules. Directories within that can't be listed are passed over, as are files that are not regular. Linked
    directories are not entered: inside the tree they hold nothing new, outside nothing that belongs to it.
    """
    scan = Scan(root)
    real_root = os.path.realpath(root)
    for path, entry in _entries(root):
        if compression(entry.name) is None:
            continue
        is_link = entry.is_symlink()
        if is_link and target_inside(real_root, os.path.join(real_root, path)) is None:
            scan.outside.append(path)
            continue
        try:
            found = entry.stat()
        except OSError:  # a link to nothing, or the file is gone by now
            continue
        if stat.S_ISREG(found.st_mode):
            scan.files[path] = ModuleFile(path, found.st_size, found.st_mtime_ns, is_link)
    for name in TEXTS:
        text = _read_text(root, name)
        if text is not None:
            scan.texts[name] = text
    return scan


def _entries(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is not a directory below ``root``, with its path relative to it."""
    count = 0
    todo = [""]
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(os.path.join(root, directory)) as entries:
                listed = list(entries)
        except OSError as error:
            if directory:
                continue
            raise TreeNotFound(f"{str(root)!r} is not a directory that can be listed: {error.strerror}") from None
        count += len(listed)
        if count > MAX_ENTRIES:
            raise TreeTooBig(f"{str(root)!r} holds more than {MAX_ENTRIES} files: it is no tree of modules")
        for entry in listed:
            path = f"{directory}/{entry.name}" if directory else entry.name
            if not entry.is_dir(follow_symlinks=False):
                yield path, entry
            elif entry.name not in _SKIPPED_DIRECTORIES:
                todo.append(path)


def _read_text(root: Path, name: str) -> bytes | None:
    """Contents of a text of the tree; None if there is none that can be read without leaving the tree."""
    try:
        fd = open_inside(root, name)
    except (OutsideTree, UnreadableModule):
        return None
    with open(fd, "rb") as file:
        text = file.read(MAX_TEXT_BYTES + 1)
    if len(text) > MAX_TEXT_BYTES:
        raise TreeTooBig(f"{name} in {str(root)!r} is longer than {MAX_TEXT_BYTES} bytes")
    return text


def looks_like_tree(root: Path) -> bool:
    """Whether ``root`` itself is a tree: it has a text of one, a directory ``kernel``, or a module file."""
    try:
        with os.scandir(root) as entries:
            return any(
                entry.name in TEXTS or entry.name == "kernel" or entry.name.endswith(tuple(SUFFIXES))
                for entry in entries
            )
    except OSError:
        return False
