"""A system of finite memory on real loaders: they fail together, and as the virtual driver does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest

from loader_svc.boot import TreeSource
from loader_svc.boot.files import BootFile, opened
from loader_svc.catalogue import catalogue_tree
from loader_svc.plan import Plan, Plans
from loader_svc.steps import CallSpec
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES, VirtualCall, VirtualMachine
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES
from modpressure.kernel.outcome import MODULE_INIT_COMPRESSED_FILE, Outcome, Syscall
from modpressure.kernel.policy import V6_4
from modpressure.kernel.system_memory import Amounts
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Hand, Launch, Process

PROCEED = ledger.OperationResult.VERDICT_PROCEED
REPLICAS = 8
MIB = 1 << 20
MODULES = ("libcrc32c", "xfs", "ext4", "kvm", "drm", "minix", "scsi_mod", "usbcore", "libata", "snd", "kvm_amd")


class Replicas:
    """Loaders of one stats_svc, and a client of them all in one system of finite memory."""

    def __init__(self, stats: Process, loaders: list[Process], system: str) -> None:
        self.system = system
        self.loaders = loaders
        self.stats_address = stats.address
        self._channels = [grpc.aio.insecure_channel(process.address) for process in (stats, *loaders)]
        self.stats = StatsServiceStub(self._channels[0])
        self.stubs = [LoaderServiceStub(channel) for channel in self._channels[1:]]

    async def create(self, limits: Amounts) -> None:
        amounts = stats_service_pb2.MemoryAmounts(**limits._asdict())
        system = stats_service_pb2.System(id=self.system, limits=amounts)
        await self.stats.CreateSystem(stats_service_pb2.CreateSystemRequest(system=system), wait_for_ready=True)

    async def load(self, replica: int, module: str, **fields: object) -> call_pb2.Call:
        request = pb.LoadModuleRequest(system=self.system, module=module, **fields)
        return (await self.stubs[replica].LoadModule(request, timeout=120, wait_for_ready=True)).call

    async def unload(self, replica: int, module: str) -> str:
        request = pb.UnloadModuleRequest(system=self.system, module=module)
        return (await self.stubs[replica].UnloadModule(request, timeout=60)).unload.errno

    async def counters(self) -> dict[str, int]:
        request = stats_service_pb2.GetStatsRequest(system=self.system)
        answer = (await self.stats.GetStats(request)).stats
        return {name: getattr(answer, name) for name in KERNEL_COUNTER_NAMES}

    async def memory(self) -> tuple[Amounts, Amounts]:
        """Return what is taken, and the most that was."""
        request = stats_service_pb2.GetSystemRequest(system=self.system)
        system = (await self.stats.GetSystem(request)).system
        return tuple(  # type: ignore[return-value]
            Amounts(*(getattr(amounts, name) for name in Amounts._fields))
            for amounts in (system.taken, system.peak_taken)
        )

    async def until_taken(self, taken: Amounts) -> None:
        async with asyncio.timeout(60):
            while (await self.memory())[0] != taken:
                await asyncio.sleep(0.02)

    async def live_modules(self) -> set[str]:
        request = stats_service_pb2.ListLoadedModulesRequest(system=self.system)
        return {module.module for module in (await self.stats.ListLoadedModules(request)).modules}

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


Start = Callable[..., Replicas]


@pytest.fixture
async def start(launch: Launch, tmp_path: Path, system: str) -> AsyncIterator[Start]:
    """Start a stats_svc with short leases, and some loaders."""
    started: list[Replicas] = []

    def start_them(count: int, *options: str) -> Replicas:
        database = str(tmp_path / "stats.sqlite3")
        stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", database, "--lease-seconds", "1")
        loaders = [
            launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *options) for _ in range(count)
        ]
        started.append(Replicas(stats, loaders, system))
        return started[-1]

    yield start_them
    for replicas in started:
        await replicas.close()


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans(IMAGE_LIMIT_BYTES)


def path_of(tree: Path, module: str) -> Path:
    return next(path for path in tree.rglob("*.ko*") if path.name.partition(".")[0].replace("-", "_") == module)


def plan_of(plans: Plans, tree: Path, module: str) -> Plan:
    path = path_of(tree, module)
    with path.open("rb") as file:
        return plans.of(file.fileno(), str(path), None, by_kernel=True, flags=0)


def core(plan: Plan) -> Amounts:
    """What a live module holds."""
    assert plan.layout is not None
    sizes = [size for size in plan.layout.rounded[:4] if size]
    return Amounts(sum(sizes), 0, sum(sizes) + 4096 * len(sizes))


def sequence() -> Iterator[tuple[str, str]]:
    """Yield what is done: loads until there is no room, and unloads that make some."""
    for module in MODULES:
        yield "load", module
    for module in ("xfs", "kvm"):
        yield "unload", module
    for module in reversed(MODULES):
        yield "load", module


LIMITS = [
    Amounts(memory_bytes=7 * MIB),
    Amounts(vmalloc_bytes=2 * MIB),
    Amounts(module_area_bytes=7 * MIB),
    Amounts(memory_bytes=8 * MIB, vmalloc_bytes=5 * MIB, module_area_bytes=6 * MIB),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kmod"), [("plain", "34"), ("zst", "34"), ("zst", "30")])
async def test_the_same_calls_fail_alike_on_eight_replicas_and_in_virtual_time(
    start: Start, form: str, kmod: str
) -> None:
    tree = catalogue_tree(form)  # type: ignore[arg-type]
    replicas = start(REPLICAS, "--tree", str(tree), "--kmod", kmod)
    modules = opened(TreeSource(tree))
    by_kernel = form != "plain" and kmod == "34"
    syscall = Syscall.FINIT_MODULE if by_kernel or form == "plain" else Syscall.INIT_MODULE
    failed: Counter[str] = Counter()
    for number, limits in enumerate(LIMITS):
        replicas.system = f"limits-{number}"
        await replicas.create(limits)
        machine = VirtualMachine(limits=limits)
        assert machine.memory is not None
        for step, (action, module) in enumerate(sequence()):
            replica = step % REPLICAS
            if action == "unload":
                assert await replicas.unload(replica, module) == machine.remove(module)
                continue
            call = await replicas.load(replica, module)
            file = BootFile(modules, module, None, 1.0, None)
            flags = MODULE_INIT_COMPRESSED_FILE if by_kernel else 0
            spec = CallSpec(module, file.path, V6_4, syscall, flags)
            ending = machine.call(VirtualCall(spec, file))
            assert (Outcome(call.outcome), call.errno, call.check, call.value) == (
                ending.outcome,
                ending.errno,
                ending.check,
                ending.value,
            ), (limits, module)
            failed[f"{ending.outcome.word} {ending.check}"] += bool(ending.errno)
        expected = {name: getattr(machine.counters, name) for name in KERNEL_COUNTER_NAMES}
        assert await replicas.counters() == expected
        assert await replicas.memory() == (machine.memory.taken, machine.memory.peak)
    first = "decompress" if by_kernel else "kread"
    wanted = {f"{stage} memory: pages" for stage in (first, "becoming")}
    wanted |= {f"{first} memory: vmalloc area", "becoming memory: module area"}
    assert wanted <= failed.keys(), failed


@pytest.mark.slow
async def test_replicas_of_a_system_of_64_mib_fail_together(start: Start, plans: Plans) -> None:
    tree = catalogue_tree("plain")
    plan = plan_of(plans, tree, "xfs")
    replicas = start(REPLICAS, "--tree", str(tree))
    await replicas.create(Amounts(memory_bytes=64 * MIB))
    # Somebody else's file fills the machine but for a page less than this one's.
    file_bytes = -(-plan.version.size_bytes // 4096) * 4096
    hand = Hand(replicas.stats_address, "hand", replicas.system)
    await hand.open()
    filling = ledger.AllocateMemory(part=ledger.MEMORY_PART_FILE, sizes=[64 * MIB - file_bytes + 4096])
    assert (await hand.ask(ledger.Operation(call_id=2, allocate_memory=filling))).verdict == PROCEED
    calls = await asyncio.gather(*(replicas.load(replica, "xfs") for replica in range(REPLICAS)))
    assert {(call.outcome, call.errno, call.check) for call in calls} == {
        (call_pb2.OUTCOME_KREAD, "ENOMEM", "memory: pages")
    }
    assert {call.value for call in calls} == {f"{file_bytes} bytes asked, {file_bytes - 4096} left"}
    counters = await replicas.counters()
    assert (counters["failed_kreads"], counters["invalid_kread_bytes"]) == (REPLICAS, 0)
    # With that gone there is room for as many as fit, whatever their order.
    hog = call_pb2.Call(
        module="hog", outcome=call_pb2.OUTCOME_KREAD, errno="EIO", syscall=call_pb2.SYSCALL_FINIT_MODULE
    )
    ended = ledger.Operation(call_id=2, finish_call=ledger.FinishCall(call=hog))
    assert (await hand.ask(ended)).verdict == PROCEED
    at_once = min(REPLICAS, 64 * MIB // (file_bytes + plan.layout_bytes))
    calls = await asyncio.gather(*(replicas.load(replica, "xfs") for replica in range(at_once)))
    assert sorted(call.errno for call in calls) == ["", *["EEXIST"] * (at_once - 1)]
    taken, peak = await replicas.memory()
    assert taken == core(plan)
    assert peak.memory_bytes <= 64 * MIB
    assert await replicas.unload(3, "xfs") == ""
    assert (await replicas.memory())[0] == Amounts()
    await hand.close()


@pytest.mark.slow
async def test_a_loader_that_is_killed_gives_back_what_its_calls_held(start: Start, plans: Plans) -> None:
    tree = catalogue_tree("plain")
    replicas = start(2, "--tree", str(tree))
    await replicas.create(Amounts(memory_bytes=64 * MIB))
    assert not (await replicas.load(0, "minix")).errno
    minix = core(plan_of(plans, tree, "minix"))
    hand = Hand(replicas.stats_address, "hand", replicas.system)
    await hand.open()
    await hand.reserve(2, "xfs")
    # It waits for the name with its copy of the file in its hands.
    waiting = asyncio.create_task(replicas.load(0, "xfs"))
    file_bytes = -(-plan_of(plans, tree, "xfs").version.size_bytes // 4096) * 4096
    await replicas.until_taken(minix.plus(Amounts(file_bytes, file_bytes + 4096, 0)))
    replicas.loaders[0].kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await waiting
    await replicas.until_taken(minix)
    assert await replicas.live_modules() == {"minix", "xfs"}
    await hand.give_up(2, "xfs")
    assert await replicas.unload(1, "minix") == ""
    assert (await replicas.memory())[0] == Amounts()
    await hand.close()


@pytest.mark.slow
async def test_after_a_storm_only_live_modules_hold_memory(start: Start, plans: Plans) -> None:
    tree = catalogue_tree("plain")
    replicas = start(2, "--tree", str(tree))
    limits = Amounts(memory_bytes=6 * MIB, module_area_bytes=4 * MIB)
    await replicas.create(limits)

    async def storm(replica: int, **fields: object) -> pb.StormSummary:
        request = pb.RunStormRequest(storm=pb.Storm(system=replicas.system, **fields))
        responses = [response async for response in replicas.stubs[replica].RunStorm(iter([request]))]
        assert responses[-1].HasField("summary"), responses[-1]
        return responses[-1].summary

    once = {"modules": ["libcrc32c", "xfs"], "workers": 30, "mode": pb.Storm.MODE_ONCE, "separate_copies": True}
    summaries = await asyncio.gather(*(storm(replica, **once) for replica in range(2)))
    outcomes: Counter[str] = Counter()
    for summary in summaries:
        assert not summary.errors, summary.first_error
        for outcome in summary.outcomes:
            outcomes[outcome.errno] += outcome.count
    assert outcomes["ENOMEM"], outcomes
    assert set(outcomes) <= {"", "EEXIST", "EBUSY", "ENOMEM"}
    expected = Amounts()
    for module in await replicas.live_modules():
        expected = expected.plus(core(plan_of(plans, tree, module)))
    taken, peak = await replicas.memory()
    assert taken == expected
    for most, limit in zip(peak, limits, strict=True):
        assert not limit or most <= limit
