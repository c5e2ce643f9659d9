"""A call's file and memory: what becomes of a file that is another when it is read than when it was planned."""

from __future__ import annotations

import lzma
import os
from functools import partial
from pathlib import Path

import pytest

from loader_svc.call_memory import CallMemory, File
from loader_svc.memory import MemoryBudget, Meter
from loader_svc.plan import FileVersion, Plans
from loader_svc.steps import CallSpec, Failure
from modpressure.errors import NotNow
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Syscall
from modpressure.kernel.policy import V6_4

LIMIT_BYTES = 1 << 20
HUGE = lzma.compress(bytes(LIMIT_BYTES + 1), check=lzma.CHECK_CRC32)
"""Its index at the end says how long its image is."""


def packed(image: bytes) -> bytes:
    """Return an xz file as long as that one."""
    return lzma.compress(image, check=lzma.CHECK_CRC32).ljust(len(HUGE), b"\0")


SHORT, LONG = packed(bytes(5_000)), packed(bytes(9_000))
DAMAGED = bytearray(LONG)
DAMAGED[40] ^= 0xFF


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose times do not tell that it is written to, as within a tick of the kernel's clock."""
    path = tmp_path / "m.ko.xz"
    path.write_bytes(HUGE)
    status = path.stat()
    version = FileVersion(status.st_dev, status.st_ino, len(HUGE), status.st_mtime_ns, status.st_ctime_ns)
    monkeypatch.setattr(FileVersion, "of", lambda fd: version)
    return path


def unpack(path: Path, syscall: Syscall, plans: Plans, between: bytes | None = None) -> Failure | None:
    """Go as far as the image is unpacked, the file written anew ``between`` plan and read. Nothing may be left."""
    flags = MODULE_INIT_COMPRESSED_FILE if syscall is Syscall.FINIT_MODULE else 0
    spec = CallSpec("m", "m", V6_4, syscall, flags)
    budget, meter = MemoryBudget(1 << 30), Meter()
    memory = CallMemory(File("m.ko.xz", "xz", partial(os.open, path, os.O_RDONLY)), spec, plans, budget, meter)
    try:
        assert memory.try_admit()
        if between is not None:
            path.write_bytes(between)
        if syscall is Syscall.INIT_MODULE:
            return memory.unpack()
        return memory.read() or memory.decompress()
    finally:
        memory.free_all()
        memory.close()
        assert budget.taken_bytes == meter.held_bytes == 0


@pytest.mark.parametrize("syscall", [Syscall.FINIT_MODULE, Syscall.INIT_MODULE])
@pytest.mark.parametrize(
    ("planned", "found"),
    [(SHORT, LONG), (LONG, SHORT), (LONG, DAMAGED), (LONG, HUGE)],
    ids=["longer", "shorter", "damaged", "too long"],
)
def test_a_file_that_unpacks_to_another_length_than_planned_is_to_be_tried_again(
    path: Path, syscall: Syscall, planned: bytes, found: bytes
) -> None:
    path.write_bytes(planned)
    plans = Plans(LIMIT_BYTES)
    with pytest.raises(NotNow, match=r"m\.ko\.xz changed while it was being read"):
        unpack(path, syscall, plans, found)
    path.write_bytes(LONG)
    # What was found out about the other content is not held against this one.
    assert unpack(path, syscall, plans) is None


def test_a_file_that_is_damaged_as_planned_fails_and_one_that_is_not_any_more_is_to_be_tried_again(path: Path) -> None:
    path.write_bytes(DAMAGED)
    plans = Plans(LIMIT_BYTES)
    failure = unpack(path, Syscall.FINIT_MODULE, plans)
    assert failure is not None
    assert failure.errno == "EINVAL"
    with pytest.raises(NotNow):
        unpack(path, Syscall.FINIT_MODULE, plans, LONG)
    assert unpack(path, Syscall.FINIT_MODULE, plans) is None
