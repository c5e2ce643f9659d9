"""The kernel's requests for modules, through real loaders."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import open_tree
from modpressure.client import Client
from modpressure.kernel.autoload import MAX_CONCURRENT
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1.stats_service_pb2 import Stats
from tests.services import Hand, Launch, Process

NAMES = ("minix", "crc32c_generic", "libcrc32c", "xfs", "loop", "pcspkr", "nbd")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules that depend on one another."""
    root, source = tmp_path_factory.mktemp("tree"), open_tree(catalogue_tree("plain"))
    for name in set(source.names()).intersection(NAMES):
        shutil.copy(source.root / source.module(name).path, root)
    return root


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    (tmp_path / "modprobe.d").mkdir()
    (tmp_path / "modprobe.d" / "a.conf").write_text(
        "alias by-alias loop\nblacklist loop\nalias two pcspkr\nalias two minix\ninstall nbd /bin/false\n"
        "alias nowhere no_such_module\n"
    )
    return tmp_path / "modprobe.d"


class Kernel:
    """A client of a loader, in one system."""

    def __init__(self, client: Client, system: str) -> None:
        self.client = client
        self.system = system

    async def ask(self, name: str, **fields: str) -> tuple[int, list[tuple[str, str]]]:
        response = await self.client.request_module(name, system=self.system, **fields)
        return response.return_value, [(call.module, call.errno) for call in response.calls]


async def until(client: Client, system: str, condition: Callable[[Stats], bool]) -> None:
    """Wait for something that the counters show; fail if it does not come."""
    async with asyncio.timeout(60):
        while not condition(await client.stats(system)):
            await asyncio.sleep(0.02)


async def started(launch: Launch, stats: Process, tree: Path, *options: str) -> str:
    return launch(
        "loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, "--tree", str(tree), *options
    ).address  # fmt: skip


async def test_modprobe_does_what_modprobe_does(
    launch: Launch, stats: Process, tree: Path, configuration: Path, system: str
) -> None:
    address = await started(launch, stats, tree, "--modprobe-dirs", str(configuration))
    async with Client([address], stats.address) as client:
        kernel = Kernel(client, system)
        # Dependencies first; then everything is live, and not even a call is made.
        value, calls = await kernel.ask("xfs", requester="mount", worker="task")
        assert value == 0
        assert [name for name, _ in calls][-2:] == ["libcrc32c", "xfs"]
        assert await kernel.ask("xfs") == (0, [])
        # A blacklist keeps an alias from leading to a module, but not the module from being asked for.
        assert await kernel.ask("by-alias") == (0, [])
        assert await kernel.ask("loop") == (0, [("loop", "")])
        # All that an alias stands for is loaded.
        assert await kernel.ask("two") == (0, [("pcspkr", ""), ("minix", "")])
        # Nothing goes by that name; the alias leads to nothing; a command is never run.
        assert await kernel.ask("net-pf-99") == (256, [])
        assert await kernel.ask("nowhere") == (256, [])
        assert await kernel.ask("nbd") == (0, [])
        assert (await client.request_module("x" * 56, system=system)).errno == "ENAMETOOLONG"

        calls_of = [event.call async for event in client.events(system)]
        assert {call.origin for call in calls_of} == {call_pb2.ORIGIN_AUTOLOAD}
        assert {(call.requester, call.worker) for call in calls_of if call.module == "xfs"} == {("mount", "task")}
        [origin] = (await client.stats(system)).origins
        assert (origin.origin, origin.calls, origin.failures) == (call_pb2.ORIGIN_AUTOLOAD, len(calls_of), 0)


async def test_a_module_that_fails_is_modprobes_failure_and_gives_the_place_back(
    launch: Launch, stats: Process, tree: Path, tmp_path: Path, system: str
) -> None:
    root = tmp_path / "bad"
    shutil.copytree(tree, root)
    image = bytearray((root / "minix.ko").read_bytes())
    image[18] ^= 0xFF  # e_machine
    (root / "minix.ko").write_bytes(image)
    address = await started(launch, stats, root)
    async with Client([address], stats.address) as client:
        kernel = Kernel(client, system)
        for _ in range(MAX_CONCURRENT + 1):
            assert await kernel.ask("minix") == (256, [("minix", "ENOEXEC")])
        (root / "minix.ko").unlink()
        counters = await client.stats(system)
        assert (counters.module_requests, counters.failed_becoming) == (0, MAX_CONCURRENT + 1)


async def test_the_fifty_first_waits_for_a_place(
    launch: Launch, stats: Process, tree: Path, hand: Hand, system: str
) -> None:
    address = await started(launch, stats, tree)
    for call_id in range(10, 10 + MAX_CONCURRENT):
        asked = ledger.RequestModule(name="other")
        await hand.ask(ledger.Operation(call_id=call_id, request_module=asked))
    async with Client([address], stats.address) as client:
        waiting = asyncio.ensure_future(client.request_module("minix", system=system))
        await until(client, system, lambda counters: counters.waiting_requests == 1)
        await hand.ask(ledger.Operation(call_id=10, finish_request=ledger.FinishRequest()))
        response = await waiting
        assert (response.return_value, len(response.calls)) == (0, 1)
        assert response.wait_ns > 0
        assert (await client.stats(system)).module_requests == MAX_CONCURRENT - 1


async def test_equal_requests_share_one_modprobe_where_the_kernel_merges_them(
    launch: Launch, stats: Process, tree: Path, hand: Hand, tmp_path: Path, system: str
) -> None:
    identity = tmp_path / "merging.toml"
    identity.write_text("[config]\nMODULE_DEBUG_AUTOLOAD_DUPS = true\n")
    address = await started(launch, stats, tree, "--identity", str(identity))
    # Somebody loads it already, so that the one that runs modprobe waits for as long as this test needs.
    await hand.reserve(2, "minix")
    async with Client([address], stats.address) as client:
        requests = [asyncio.ensure_future(client.request_module("minix", system=system)) for _ in range(10)]
        await until(client, system, lambda counters: (counters.waiting_requests, counters.waiting_calls) == (9, 1))
        await hand.give_up(2, "minix")
        responses = [await request for request in requests]
    assert sorted(response.merged for response in responses) == [False] + [True] * 9
    assert [response.return_value for response in responses] == [256] * 10
    assert sum(len(response.calls) for response in responses) == 1


async def test_a_client_that_goes_away_does_not_end_its_request(
    launch: Launch, stats: Process, tree: Path, hand: Hand, system: str
) -> None:
    address = await started(launch, stats, tree)
    await hand.reserve(2, "minix")
    async with Client([address], stats.address) as client:
        request = asyncio.ensure_future(client.request_module("minix", system=system))
        await until(client, system, lambda counters: counters.waiting_calls == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await hand.give_up(2, "minix")
        await until(client, system, lambda counters: counters.module_requests == 0)
        [call] = [event.call async for event in client.events(system) if event.call.origin == 2]
        # It was told what the kernel tells a duplicate whose module failed, not EINTR.
        assert (call.module, call.errno) == ("minix", "EBUSY")
