"""Files that are small and claim to be large: a real loader refuses them and takes no memory for them."""

from __future__ import annotations

import gzip
import lzma
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import zstandard

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import open_tree
from modpressure.settings import LoaderSettings
from modpressure.v1 import call_pb2
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from tests.services import Launch, Process

LIMIT_BYTES = 32 << 20
BOMB_BYTES = 128 << 20
ALLOC, NOBITS = 2, 8
SECTION = struct.Struct("<IIQQQQIIQQ")
SIZE_FIELD = 5


def good_module(cache: Path) -> bytes:
    with os.fdopen(open_tree(catalogue_tree("plain", cache)).open_file("minix"), "rb") as file:
        return file.read()


def with_section(image: bytes, change: Callable[[list[int]], None]) -> bytes:
    """Return an ELF image of which the last allocated section's header is another one."""
    offset, count = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<H", image, 60)[0]
    changed = bytearray(image)
    for number in reversed(range(count)):
        place = offset + number * SECTION.size
        fields = list(SECTION.unpack_from(image, place))
        if fields[2] & ALLOC:
            change(fields)
            SECTION.pack_into(changed, place, *fields)
            return bytes(changed)
    raise AssertionError("no section is allocated")


def without_bits(size_bytes: int) -> Callable[[list[int]], None]:
    def change(fields: list[int]) -> None:
        fields[1], fields[SIZE_FIELD] = NOBITS, size_bytes

    return change


def compressed(kind: str) -> Iterator[bytes]:
    """Yield a file that unpacks to ``BOMB_BYTES`` of zeros."""
    zeros = bytes(1 << 20)
    packer: Any = {
        "gz": lambda: gzip.zlib.compressobj(9, wbits=31),  # type: ignore[attr-defined]
        "xz": lambda: lzma.LZMACompressor(check=lzma.CHECK_CRC32, preset=0),
        "zst": lambda: zstandard.ZstdCompressor(write_content_size=False).compressobj(),
    }[kind]()
    for _ in range(BOMB_BYTES // len(zeros)):
        yield packer.compress(zeros)
    yield packer.flush()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of them, and one module that is as it should be."""
    root = tmp_path_factory.mktemp("bombs")
    image = good_module(LoaderSettings().cache_dir)
    (root / "good.ko").write_bytes(image)
    (root / "bss.ko").write_bytes(with_section(image, without_bits(64 << 20)))
    (root / "vast.ko").write_bytes(with_section(image, without_bits(3 << 30)))
    many = bytearray(image)
    struct.pack_into("<H", many, 60, 0xFFFF)
    (root / "sections.ko").write_bytes(many)
    for kind in ("gz", "xz", "zst"):
        with (root / f"packed_{kind}.ko.{kind}").open("wb") as file:
            file.writelines(compressed(kind))
        # Its header says nothing, or something else: what counts is what comes out.
        assert (root / f"packed_{kind}.ko.{kind}").stat().st_size < 1 << 20
    return root


def peak_bytes(process: Process) -> int:
    """Return the largest resident set that a process has had."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


async def test_bombs_are_refused_and_take_no_memory(launch: Launch, bombs: Path, stats: Process, system: str) -> None:
    loader = launch(
        *("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, "--tree", str(bombs)),
        *("--image-limit", str(LIMIT_BYTES), "--cache-dir", str(bombs.parent / "index")),
    )
    async with grpc.aio.insecure_channel(loader.address) as channel:
        stub: Any = LoaderServiceStub(channel)

        async def load(module: str, kmod: int) -> Any:
            return (await stub.LoadModule(pb.LoadModuleRequest(system=system, module=module, kmod=kmod))).call

        before = peak_bytes(loader)
        for module in ("bss", "packed_gz", "packed_xz", "packed_zst"):
            for kmod in (pb.KMOD_30, pb.KMOD_34):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await load(module, kmod)
                assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, module
                assert f"{module}.ko" in (raised.value.details() or "")
                assert str(LIMIT_BYTES) in (raised.value.details() or "")
        # The kernel refuses these by itself, before anything is laid out.
        for module, errno in (("vast", "ENOMEM"), ("sections", "ENOEXEC")):
            call = await load(module, pb.KMOD_34)
            assert (call.outcome, call.errno, call.mod_bytes) == (call_pb2.OUTCOME_BECOMING, errno, 0)
        # An image of the limit, its packed file, and some room: not what the files claim.
        assert peak_bytes(loader) - before < 2 * LIMIT_BYTES
        assert (await load("good", pb.KMOD_34)).outcome == call_pb2.OUTCOME_LIVE
