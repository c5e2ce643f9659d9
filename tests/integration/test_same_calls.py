"""The same calls come to the same counters: on the virtual driver, on one loader, on eight replicas of one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from os import O_RDONLY
from os import open as os_open
from pathlib import Path

import grpc
import pytest

from loader_svc.image import Algorithm
from loader_svc.steps import CallSpec
from loader_svc.virtual.machine import VirtualCall, VirtualFile, VirtualMachine
from modpressure.identity_files import load_identity
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES
from modpressure.kernel.outcome import Outcome, Syscall
from modpressure.kernel.policy import POLICIES
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch

IDENTITY = "measured-6.12"
LOADED_TWICE = ("minix", "unknown_symbol", "wrong_machine")
NUMBERS = {"v6.3": call_pb2.POLICY_V6_3, "v6.4": call_pb2.POLICY_V6_4, "v6.5": call_pb2.POLICY_V6_5}

PACKINGS: dict[str, Algorithm] = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}

Result = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def tree(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the measured failures, each under a name of its own: plain, packed, and what is no module at all."""
    root = tmp_path_factory.mktemp("tree")
    files = list((shared_dir / "data" / "golden" / "bad-inputs").iterdir())
    for path in files:
        suffix = path.suffix if path.suffix in PACKINGS else ""
        name = path.name.removesuffix(".ko") if not suffix else path.name.replace(".", "_")
        shutil.copy(path, root / f"{name.partition('.')[0]}.ko{suffix}")
    assert len(list(root.iterdir())) == len(files)
    return root


def calls(tree: Path) -> Iterator[tuple[str, int, str]]:
    """Yield file's name, flags and parameters of each call to be made."""
    for name in sorted(path.name.partition(".")[0] for path in tree.iterdir()):
        for _ in range(1 + (name in LOADED_TWICE)):
            yield name, 0, ""
    yield "wrong_vermagic", 2, ""
    yield "bad_sym_crc", 1, ""
    yield "orc_slow", 0, "ms=abc"
    yield "orc_slow", 0, "nosuch=1 ms=0"


def local(tree: Path, policy: str) -> tuple[list[Result], dict[str, int]]:
    machine = VirtualMachine(load_identity(IDENTITY))
    results = []
    for name, flags, parameters in calls(tree):
        [path] = tree.glob(f"{name}.ko*")
        packing = PACKINGS.get(path.suffix)
        # libkmod 34: the kernel unpacks what it can, all else is unpacked before init_module.
        by_kernel = packing in machine.identity.decompressors
        syscall = Syscall.FINIT_MODULE if by_kernel or packing is None else Syscall.INIT_MODULE
        spec = CallSpec(name, str(path), POLICIES[policy], syscall, flags | 4 * by_kernel, parameters)
        file = VirtualFile(str(path), partial(os_open, path, O_RDONLY), packing)
        ending = machine.call(VirtualCall(spec, file))
        results.append((ending.outcome.word, ending.errno, ending.check, ending.module))
        if ending.outcome is Outcome.LIVE and name not in LOADED_TWICE:
            assert not machine.remove(ending.module)
    return results, {counter: getattr(machine.counters, counter) for counter in KERNEL_COUNTER_NAMES}


async def served(
    tree: Path, policy: str, stats: str, loaders: list[str], system: str
) -> tuple[list[Result], dict[str, int]]:
    """Make the calls in turn, each on the next of the loaders."""
    channels = [grpc.aio.insecure_channel(address) for address in (stats, *loaders)]
    stubs = [LoaderServiceStub(channel) for channel in channels[1:]]
    results = []
    try:
        for number, (name, flags, parameters) in enumerate(calls(tree)):
            request = pb.LoadModuleRequest(
                system=system, module=name, policy=NUMBERS[policy], flags=flags, parameters=parameters
            )
            stub = stubs[number % len(stubs)]
            call = (await stub.LoadModule(request, timeout=60, wait_for_ready=True)).call
            results.append((Outcome(call.outcome).word, call.errno, call.check, call.module))
            if call.outcome == call_pb2.OUTCOME_LIVE and name not in LOADED_TWICE:
                unload = await stub.UnloadModule(pb.UnloadModuleRequest(system=system, module=call.module), timeout=60)
                assert not unload.unload.errno
        request = stats_service_pb2.GetStatsRequest(system=system)
        answer = (await StatsServiceStub(channels[0]).GetStats(request)).stats
        return results, {counter: getattr(answer, counter) for counter in KERNEL_COUNTER_NAMES}
    finally:
        for channel in channels:
            await channel.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("replicas", "database"), [(1, "sqlite"), (8, "sqlite"), (8, "postgresql")])
async def test_the_same_calls_give_the_same_results_and_counters(
    request: pytest.FixtureRequest, launch: Launch, tree: Path, tmp_path: Path, replicas: int, database: str
) -> None:
    on_postgresql = database == "postgresql"
    location = request.getfixturevalue("postgres_database") if on_postgresql else str(tmp_path / "stats.sqlite3")
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", location)
    options = ("--stats", stats.address, "--tree", str(tree), "--identity", IDENTITY, "--cache-dir", str(tmp_path))
    options += ("--kmod", "34")
    loaders = [launch("loader_svc", "--listen", "127.0.0.1:0", *options).address for _ in range(replicas)]
    for policy in NUMBERS:
        expected = local(tree, policy)
        assert len({result[2] for result in expected[0]}) > 15, "calls that fail in many ways"
        assert await served(tree, policy, stats.address, loaders, f"same-{policy.replace('.', '-')}") == expected
