"""Modules that use one another: the same sequence on the virtual driver, on one loader, on eight replicas of one.

With dependencies, init functions that fail, unloads of what is used, by force and not; and stats_svc is killed in the
middle of it.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from pathlib import Path

import grpc
import pytest

from loader_svc.catalogue import catalogue_identity, catalogue_tree
from loader_svc.init_results import InitResults
from loader_svc.steps import CallSpec
from loader_svc.trees import ModuleTree, open_tree
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import V6_4
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1 import stats_service_pb2
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch, Process

INIT = """module,condition,duration_ms,result
xfs,always,3,-ENODEV
crc16,always,quantiles 0 1 2,0
jbd2,while mbcache is live,0,-EBUSY
"""
STEPS = (
    ("load", "ext4"),
    ("load", "crc16"),
    ("load", "jbd2"),
    ("load", "mbcache"),
    ("load", "jbd2"),
    ("load", "ext4"),
    ("unload", "jbd2"),
    ("unload --force", "mbcache"),
    ("restart", ""),
    ("load", "jbd2"),
    ("unload", "crc16"),
    ("load", "xfs"),
    ("load", "libcrc32c"),
    ("load", "xfs"),
    ("unload", "xfs"),
    ("unload", "libcrc32c"),
    ("restart", ""),
    ("unload", "ext4"),
    ("unload", "jbd2"),
    ("load", "jbd2"),
    ("load", "ext4"),
    ("unload --force", "mbcache"),
    ("load", "ext4"),
    ("load", "jbd2"),
    ("load", "mbcache"),
    ("load", "ext4"),
    ("restart", ""),
    ("unload", "crc16"),
)
"""What is done, in turn. ext4 needs jbd2, mbcache and crc16; jbd2 does not initialise while mbcache is live."""

Users = list[tuple[str, int, tuple[str, ...]]]
Result = tuple[list[tuple[str, ...]], dict[str, int], Users]


@pytest.fixture(scope="module")
def root() -> Path:
    return catalogue_tree("plain")


@pytest.fixture
def init(tmp_path: Path) -> Path:
    path = tmp_path / "init.csv"
    path.write_text(INIT)
    return path


def on_the_virtual_driver(tree: ModuleTree) -> Result:
    machine = VirtualMachine(catalogue_identity(), init_results=InitResults.parse(INIT))
    results: list[tuple[str, ...]] = []
    for action, name in STEPS:
        if action == "load":
            spec = CallSpec(name, name, V6_4, Syscall.FINIT_MODULE)
            ending = machine.call(VirtualCall(spec, VirtualFile(name, partial(tree.open_file, name))))
            results.append((name, ending.outcome.word, ending.errno, ending.check, ending.value))
        elif action != "restart":
            results.append((name, machine.remove(name, forced=action.endswith("force"))))
    counters = {counter: getattr(machine.counters, counter) for counter in KERNEL_COUNTER_NAMES}
    users = [
        (entry.name, len(machine.links.users(entry.name)), machine.links.users(entry.name)) for entry in machine.modules
    ]
    return results, counters, users


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Live:
    """A stats_svc that can be killed, and its loaders."""

    def __init__(self, launch: Launch, database: str) -> None:
        self._launch = launch
        self._arguments = ("stats_svc", "--listen", f"127.0.0.1:{free_port()}", "--database", database)
        self.stats: Process = launch(*self._arguments)

    async def restart(self) -> None:
        self.stats.kill()
        self.stats = self._launch(*self._arguments)

    async def run(self, loaders: list[str]) -> Result:
        """Take the steps in turn, each on the next of the loaders."""
        channels = [grpc.aio.insecure_channel(address) for address in (self.stats.address, *loaders)]
        stubs = [LoaderServiceStub(channel) for channel in channels[1:]]
        results: list[tuple[str, ...]] = []
        try:
            for number, (action, name) in enumerate(STEPS):
                if action == "restart":
                    await self.restart()
                else:
                    results.append(await step(stubs[number % len(stubs)], action, name))
            stub = StatsServiceStub(channels[0])
            request = stats_service_pb2.GetStatsRequest()
            stats = (await stub.GetStats(request, wait_for_ready=True)).stats
            listed = (await stub.ListLoadedModules(stats_service_pb2.ListLoadedModulesRequest())).modules
            counters = {counter: getattr(stats, counter) for counter in KERNEL_COUNTER_NAMES}
            return results, counters, [(one.module, one.references, tuple(one.used_by)) for one in listed]
        finally:
            for channel in channels:
                await channel.close()


async def step(stub: LoaderServiceStub, action: str, name: str) -> tuple[str, ...]:
    while True:
        try:
            if action == "load":
                call = (await stub.LoadModule(pb.LoadModuleRequest(module=name), timeout=60, wait_for_ready=True)).call
                return name, Outcome(call.outcome).word, call.errno, call.check, call.value
            request = pb.UnloadModuleRequest(module=name, forced=action.endswith("force"))
            return name, (await stub.UnloadModule(request, timeout=60, wait_for_ready=True)).unload.errno
        except grpc.aio.AioRpcError as error:
            # Refused before it was begun, while stats_svc starts again.
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "database"), [(1, "postgresql"), (8, "sqlite")])
async def test_the_same_sequence_gives_the_same_results_counters_and_users(
    request: pytest.FixtureRequest,
    launch: Launch,
    root: Path,
    init: Path,
    tmp_path: Path,
    replicas: int,
    database: str,
) -> None:
    expected = on_the_virtual_driver(open_tree(root))
    results, _, users = expected
    assert {result[-1] for result in results if len(result) == 2} == {"", "EWOULDBLOCK", "ENOENT"}
    assert {result[1] for result in results if len(result) > 2} == {"live", "load", "becoming", "init"}
    assert ("mbcache", 1, ("ext4",)) in users
    on_postgresql = database == "postgresql"
    location = request.getfixturevalue("postgres_database") if on_postgresql else str(tmp_path / "stats.sqlite3")
    live = Live(launch, location)
    identity = root.parents[2] / "identity.toml"
    options = ("--stats", live.stats.address, "--identity", str(identity), "--init", str(init))
    loaders = [launch("loader_svc", "--listen", "127.0.0.1:0", *options).address for _ in range(replicas)]
    assert await live.run(loaders) == expected
