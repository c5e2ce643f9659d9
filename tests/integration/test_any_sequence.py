"""Whatever is done to real loaders: events add up to the counters, and nothing stays held, waiting or reserved."""

from __future__ import annotations

import asyncio
import itertools
import lzma
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from loader_svc.catalogue import catalogue_tree
from modpressure.kernel.counters import KERNEL_COUNTER_NAMES
from modpressure.v1 import call_pb2
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1 import stats_service_pb2 as stats_pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.services import Launch

LOADERS = 3
EXAMPLES = 12
GOOD = ("crc16", "mbcache", "jbd2", "ext4", "minix")
"""ext4 needs the three before it, crc16 most of all: others wait while it comes."""

NAMES = (*GOOD, "junk", "torn", "packed")
INIT = """module,condition,duration_ms,result
crc16,always,30,-EIO in 20%
jbd2,always,quantiles 0 5 40,-ENODEV in 20%
minix,always,quantiles 1 20 60,-EIO in 40%
"""
POLICIES = (call_pb2.POLICY_V6_3, call_pb2.POLICY_V6_4, call_pb2.POLICY_V6_5)
PATIENCE_SECONDS = 60


class Action(NamedTuple):
    """Something done through one of the loaders."""

    kind: str
    module: str
    loader: int
    copy: int
    patience_ms: int | None
    """When the client gives up, which is a signal to the call."""
    is_alone: bool
    """Whether all that was begun before has ended by then."""


ACTIONS = st.lists(
    st.builds(
        Action,
        st.sampled_from(["load", "load", "load", "load", "unload", "unload by force"]),
        st.sampled_from(NAMES),
        st.integers(0, LOADERS - 1),
        st.integers(0, 2),
        st.none() | st.integers(1, 50),
        st.sampled_from([False, False, False, True]),
    ),
    min_size=12,
    max_size=40,
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules that need one another, and files that are none; one in three is packed."""
    root, catalogue = tmp_path_factory.mktemp("tree"), catalogue_tree("plain")
    for name in GOOD:
        shutil.copy(next(catalogue.rglob(f"{name}.ko")), root)
    image = (root / "minix.ko").read_bytes()
    (root / "junk.ko").write_bytes(random.Random(1).randbytes(5000))
    (root / "torn.ko.xz").write_bytes(lzma.compress(image, check=lzma.CHECK_CRC32)[:-100])
    (root / "packed.ko.xz").write_bytes(lzma.compress(image[:-1], check=lzma.CHECK_CRC32))
    return root


@pytest.fixture(params=["sqlite", "postgresql"])
def machine(request: pytest.FixtureRequest, launch: Launch, tree: Path, tmp_path: Path) -> list[str]:
    """Addresses of a stats_svc and of loaders with init functions that take time and fail."""
    database = str(tmp_path / "stats.sqlite3")
    if request.param == "postgresql":
        database = request.getfixturevalue("postgres_database")
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", database)
    (tmp_path / "init.csv").write_text(INIT)
    identity = str(catalogue_tree("plain").parents[2] / "identity.toml")
    options = ("--stats", stats.address, "--tree", str(tree), "--identity", identity, "--kmod", "34")
    options += ("--init", str(tmp_path / "init.csv"), "--cache-dir", str(tmp_path))
    return [
        stats.address,
        *(launch("loader_svc", "--listen", "127.0.0.1:0", *options).address for _ in range(LOADERS)),
    ]


class Sequence:
    """Actions on a system of their own, and what must hold once nothing is left to do."""

    def __init__(self, stats: StatsServiceStub, loaders: list[LoaderServiceStub], system: str) -> None:
        self._stats = stats
        self._loaders = loaders
        self._system = system

    async def create(self, policy: call_pb2.Policy.ValueType) -> None:
        # Limits that nothing reaches: so stats_svc keeps an account of what every call holds.
        amounts = stats_pb.MemoryAmounts(memory_bytes=1 << 40, vmalloc_bytes=1 << 40, module_area_bytes=1 << 40)
        system = stats_pb.System(id=self._system, policy=policy, limits=amounts)
        await self._stats.CreateSystem(stats_pb.CreateSystemRequest(system=system), wait_for_ready=True)

    async def run(self, actions: list[Action]) -> None:
        """Do all of it."""
        begun: list[asyncio.Task[None]] = []
        for action in actions:
            if action.is_alone:
                await asyncio.gather(*begun)
            begun.append(asyncio.create_task(self._do(action)))
        await asyncio.gather(*begun)

    async def _do(self, action: Action) -> None:
        timeout = PATIENCE_SECONDS if action.patience_ms is None else action.patience_ms / 1000
        stub = self._loaders[action.loader]
        try:
            if action.kind == "load":
                load = pb.LoadModuleRequest(system=self._system, module=action.module, copy=action.copy)
                await stub.LoadModule(load, timeout=timeout)
            else:
                await self._unload(action.module, stub, timeout, forced=action.kind != "unload")
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
            assert action.patience_ms is not None, error

    async def _unload(self, module: str, stub: LoaderServiceStub, timeout: float, *, forced: bool) -> str:
        request = pb.UnloadModuleRequest(system=self._system, module=module, forced=forced)
        return (await stub.UnloadModule(request, timeout=timeout)).unload.errno

    async def listed(self) -> list[stats_pb.LoadedModule]:
        request = stats_pb.ListLoadedModulesRequest(system=self._system)
        return list((await self._stats.ListLoadedModules(request)).modules)

    async def unload_all(self) -> None:
        for module in itertools.cycle(await self.listed()):
            await self._unload(module.module, self._loaders[0], PATIENCE_SECONDS, forced=False)
            if not await self.listed():
                return

    async def calls(self) -> list[call_pb2.Call]:
        page = await self._stats.ListEvents(stats_pb.ListEventsRequest(system=self._system, page_size=10_000))
        return [event.call for event in page.events if event.HasField("call")]

    async def amiss(self, *, is_empty: bool) -> list[str]:
        """Say what does not hold now; what clients gave up may go on for a while."""
        stats = (await self._stats.GetStats(stats_pb.GetStatsRequest(system=self._system))).stats
        system = (await self._stats.GetSystem(stats_pb.GetSystemRequest(system=self._system))).system
        listed = await self.listed()
        calls = await self.calls()
        core_bytes = sum(module.core_bytes for module in listed)
        pairs = [(name, getattr(stats, name), value) for name, value in sums(calls).items()]
        parts = [stats.invalid_kread_bytes, stats.invalid_decompress_bytes]
        parts += [stats.invalid_becoming_bytes, stats.invalid_mod_bytes]
        pairs += [
            ("wasted bytes", stats.virtual_mem_wasted_bytes, sum(parts)),
            ("calls", stats.calls, len(calls)),
            ("waiting calls", stats.waiting_calls, 0),
            ("names that are not of live modules", sum(m.state != m.STATE_LIVE for m in listed), 0),
            ("live modules", stats.live_modules, len(listed)),
            ("live modules by events", stats.modcount - stats.unloads, len(listed)),
            ("bytes taken", system.taken.memory_bytes, core_bytes),
            ("bytes held", stats.held_bytes, core_bytes),
            ("vmalloc taken", system.taken.vmalloc_bytes, 0),
        ]
        if is_empty:
            pairs += [("modules", len(listed), 0), ("module area taken", system.taken.module_area_bytes, 0)]
        return [f"{what}: {value}, must be {wanted}" for what, value, wanted in pairs if value != wanted]

    async def until_all_is_well(self, *, is_empty: bool = False) -> None:
        amiss: list[str] = []
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while amiss := await self.amiss(is_empty=is_empty):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(amiss) from None


def sums(calls: list[call_pb2.Call]) -> dict[str, int]:
    """Return what the kernel's counters are after these calls, by its rules."""
    total: Counter[str] = Counter(dict.fromkeys(KERNEL_COUNTER_NAMES, 0))
    for call in calls:
        packed_and_image = call.compressed_bytes + call.image_bytes
        if call.outcome == call_pb2.OUTCOME_LIVE:
            total.update(modcount=1, total_mod_size=call.mod_bytes, total_text_size=call.text_bytes)
        elif call.outcome == call_pb2.OUTCOME_KREAD:
            total.update(failed_kreads=1)
        elif call.outcome == call_pb2.OUTCOME_DECOMPRESS:
            total.update(failed_decompress=1, invalid_decompress_bytes=call.compressed_bytes)
        elif call.outcome == call_pb2.OUTCOME_BECOMING:
            total.update(failed_becoming=1, invalid_becoming_bytes=packed_and_image)
        elif call.outcome == call_pb2.OUTCOME_LOAD:
            total.update(failed_load_modules=1, invalid_mod_bytes=packed_and_image + call.image_bytes)
    return dict(total)


NUMBERS = itertools.count(1)


async def check(addresses: list[str], policy: call_pb2.Policy.ValueType, actions: list[Action]) -> list[call_pb2.Call]:
    """Do it, wait until all is as it must be, unload everything, and wait again; return the calls that were made."""
    channels = [grpc.aio.insecure_channel(address) for address in addresses]
    try:
        stubs = [LoaderServiceStub(channel) for channel in channels[1:]]
        sequence = Sequence(StatsServiceStub(channels[0]), stubs, f"sequence-{next(NUMBERS)}")
        await sequence.create(policy)
        await sequence.run(actions)
        await sequence.until_all_is_well()
        await sequence.unload_all()
        await sequence.until_all_is_well(is_empty=True)
        return await sequence.calls()
    finally:
        for channel in channels:
            await channel.close()


@pytest.mark.slow
def test_after_any_sequence_the_events_add_up_and_nothing_is_left(machine: list[str]) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],  # timing is real: a smaller example need not fail the same way
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(policy=st.sampled_from(POLICIES), actions=ACTIONS)
    def any_sequence(policy: call_pb2.Policy.ValueType, actions: list[Action]) -> None:
        for call in asyncio.run(check(machine, policy, actions)):
            seen[call_pb2.Outcome.Name(call.outcome)] += 1
            seen["waited"] += call.wait_ns > 0
            seen[call.errno] += 1

    any_sequence()
    assert seen.keys() >= {f"OUTCOME_{stage}" for stage in ("LIVE", "DECOMPRESS", "BECOMING", "LOAD", "INIT")}, seen
    assert seen["waited"], seen
