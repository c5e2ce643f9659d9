"""Files of a tree, opened where descriptors are short, and where links are swapped in."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from loader_svc.trees.confine import Opener, open_inside
from loader_svc.trees.errors import OutsideTree, UnreadableModule

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_directory_that_cannot_be_kept_costs_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.ko").write_bytes(b"x")
    opener = Opener(tmp_path)

    def no_room(self: Opener, directory: str) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Opener, "_keep", no_room)
    before = open_descriptors()
    os.close(opener.open("x.ko"))
    assert open_descriptors() == before

    def unforeseen(self: Opener, directory: str) -> None:
        raise MemoryError

    monkeypatch.setattr(Opener, "_keep", unforeseen)
    with pytest.raises(MemoryError):
        opener.open("x.ko")
    assert open_descriptors() == before


def exchange(one: Path, other: Path) -> None:
    """Let two names change places at once, as renameat2(2) does with RENAME_EXCHANGE."""
    code = _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))


@pytest.mark.parametrize("what", ["the file", "its directory", "a directory above"])
@pytest.mark.parametrize("keeps", [True, False], ids=["an opener", "a single open"])
def test_a_link_that_is_swapped_in_while_files_are_read_leads_nowhere(tmp_path: Path, what: str, keeps: bool) -> None:
    root, outside = tmp_path / "tree", tmp_path / "outside"
    for directory, text in ((root / "a" / "b", b"mine"), (outside / "b", b"secret")):
        directory.mkdir(parents=True)
        (directory / "x.ko").write_bytes(text)
    swapped, target = {
        "the file": (root / "a" / "b" / "x.ko", outside / "b" / "x.ko"),
        "its directory": (root / "a" / "b", outside / "b"),
        "a directory above": (root / "a", outside),
    }[what]
    link = root / "link"
    link.symlink_to(target)
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            exchange(swapped, link)
            swaps += 1

    swapper = threading.Thread(target=swap)
    swapper.start()
    opened = refused = 0
    try:
        # Both happen many times: with neither this would prove nothing.
        while opened < 200 or refused < 200 or swaps < 200:
            opener = Opener(root)
            for _ in range(5 if keeps else 1):
                try:
                    descriptor = opener.open("a/b/x.ko") if keeps else open_inside(root, "a/b/x.ko")
                except (OutsideTree, UnreadableModule):
                    refused += 1
                    continue
                with os.fdopen(descriptor, "rb") as file:
                    assert file.read() == b"mine"
                opened += 1
    finally:
        stop.set()
        swapper.join()
