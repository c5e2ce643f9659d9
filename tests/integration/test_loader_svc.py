"""One loader and one stats_svc, both real processes, driven over gRPC."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import lzma
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import zstandard
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loader_svc.catalogue import catalogue_tree
from loader_svc.trees import open_tree
from modpressure.kernel.counters import Counters
from modpressure.tls import open_channel
from modpressure.tokens import Role, entry, new_token
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1 import ledger_service_pb2 as ledger
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from tests.recount import named, recount
from tests.services import Hand, Launch, Process

SERVICE = "modpressure.v1.LoaderService"
PAGE_BYTES = 4096


class Machine:
    """A client of one loader and its stats_svc, in one system."""

    def __init__(self, loader: Process, stats: Process, system: str, token: str = "") -> None:
        self.process = loader
        self.system = system
        self._channels = [
            open_channel(loader.address, None, token=token),
            grpc.aio.insecure_channel(stats.address),
        ]
        self.loader = LoaderServiceStub(self._channels[0])
        self.stats = StatsServiceStub(self._channels[1])
        self._health = health_pb2_grpc.HealthStub(self._channels[0])

    async def load(self, module: str, *, timeout: float = 60, **fields: object) -> call_pb2.Call:
        request = pb.LoadModuleRequest(**{"module": module, "system": self.system, **fields})
        response = await self.loader.LoadModule(request, timeout=timeout, wait_for_ready=True)
        return response.call

    async def unload(self, module: str) -> call_pb2.Unload:
        response = await self.loader.UnloadModule(pb.UnloadModuleRequest(system=self.system, module=module), timeout=60)
        return response.unload

    async def counters(self) -> stats_service_pb2.Stats:
        return (await self.stats.GetStats(stats_service_pb2.GetStatsRequest(system=self.system))).stats

    async def events(self) -> list[stats_service_pb2.ListEventsResponse]:
        request = stats_service_pb2.ListEventsRequest(system=self.system, page_size=10_000)
        return list((await self.stats.ListEvents(request)).events)

    async def serving(self) -> bool:
        answer = await self._health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def someone_waits(self) -> bool:
        return (await self.counters()).waiting_calls > 0

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@pytest.fixture(scope="session")
def plain_tree() -> Path:
    return catalogue_tree("plain")


StartMachine = Callable[..., Awaitable[Machine]]


@pytest.fixture
async def start(launch: Launch, stats: Process, system: str) -> AsyncIterator[StartMachine]:
    """Start a loader of this test's own with options, and wait until it serves."""
    machines: list[Machine] = []

    async def start_machine(*options: str, token: str = "") -> Machine:
        loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address, *options)
        machine = Machine(loader, stats, system, token)
        machines.append(machine)
        await until(machine.serving)
        return machine

    yield start_machine
    for machine in machines:
        await machine.close()


@pytest.fixture
async def machine(loader: Process, stats: Process, system: str) -> AsyncIterator[Machine]:
    """The loader that all tests share, in this test's system, which is taken down at the end."""
    machine = Machine(loader, stats, system)
    await until(machine.serving)
    # Reading counters of a system wants it to be there.
    await machine.stats.CreateSystem(stats_service_pb2.CreateSystemRequest(system=stats_service_pb2.System(id=system)))
    yield machine
    await machine.stats.DeleteSystem(stats_service_pb2.DeleteSystemRequest(system=system))
    await machine.close()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    """Wait for something that another process does; fail if it does not."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def counted(calls: list[call_pb2.Call]) -> Counters:
    """Return what follows from calls' own results."""
    return recount(call_pb2.Event(call=call) for call in calls)


def assert_same(stats: stats_service_pb2.Stats, counters: Counters) -> None:
    """Fail unless all counters of the service are these."""
    assert named(stats) == named(counters)


async def failure(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """Return the status of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


# --- one load ---


async def test_an_answered_load_is_counted_with_the_sizes_it_was_answered_with(machine: Machine) -> None:
    request = pb.LoadModuleRequest(system=machine.system, module="xfs", with_dependencies=True)
    response = await machine.loader.LoadModule(request)
    calls = [*response.dependency_calls, response.call]
    assert response.call.module == "xfs"
    assert {call.outcome for call in calls} == {call_pb2.OUTCOME_LIVE}
    assert len(calls) > 1, "xfs depends on others"
    assert_same(await machine.counters(), counted(calls))
    assert [event.call.call_id for event in await machine.events()] == [call.call_id for call in calls]


async def test_the_held_memory_is_that_of_the_live_modules_and_none_after_the_unload(machine: Machine) -> None:
    call = await machine.load("minix")
    layout = (await machine.loader.GetModule(pb.GetModuleRequest(module="minix"))).module.layout
    assert call.mod_bytes == layout.total_bytes
    assert call.text_bytes == layout.text_bytes + layout.init_text_bytes
    file_bytes = -(-call.file_bytes // PAGE_BYTES) * PAGE_BYTES
    assert call.peak_held_bytes == file_bytes + layout.total_bytes
    core_bytes = layout.text_bytes + layout.data_bytes + layout.rodata_bytes + layout.ro_after_init_bytes
    again = await machine.load("minix")
    assert again.errno == "EEXIST"
    assert again.held_bytes == core_bytes
    await machine.unload("minix")
    # Its buffers are freed before it is described, its own layout is not.
    assert (await machine.load("minix")).held_bytes == call.mod_bytes


async def test_a_dependency_that_is_live_costs_no_call(machine: Machine) -> None:
    await machine.loader.LoadModule(
        pb.LoadModuleRequest(system=machine.system, module="libcrc32c", with_dependencies=True)
    )
    before = (await machine.counters()).calls
    response = await machine.loader.LoadModule(
        pb.LoadModuleRequest(system=machine.system, module="libcrc32c", with_dependencies=True)
    )
    assert not response.HasField("call")
    assert (await machine.counters()).calls == before


@pytest.mark.parametrize(
    ("policy", "outcome", "times"),
    [
        (call_pb2.POLICY_V6_3, call_pb2.OUTCOME_LOAD, 2),
        (call_pb2.POLICY_V6_4, call_pb2.OUTCOME_BECOMING, 1),
        (call_pb2.POLICY_V6_5, call_pb2.OUTCOME_BECOMING, 1),
    ],
)
async def test_a_duplicate_is_found_where_its_policy_looks(
    machine: Machine, policy: int, outcome: int, times: int
) -> None:
    first = await machine.load("minix", policy=policy)
    second = await machine.load("minix", policy=policy)
    assert (first.outcome, second.outcome, second.errno) == (call_pb2.OUTCOME_LIVE, outcome, "EEXIST")
    counters = await machine.counters()
    assert counters.virtual_mem_wasted_bytes == times * second.image_bytes
    failed = await machine.stats.ListFailedModules(stats_service_pb2.ListFailedModulesRequest(system=machine.system))
    assert [(module.module, module.count) for module in failed.modules] == [("minix", 1)]


@pytest.mark.parametrize("policy", [call_pb2.POLICY_V6_3, call_pb2.POLICY_V6_4, call_pb2.POLICY_V6_5])
async def test_many_loads_at_once_make_one_live_module_and_the_rest_is_told_and_counted(
    machine: Machine, policy: int
) -> None:
    calls = await asyncio.gather(*(machine.load("xfs", policy=policy) for _ in range(24)))
    outcomes = Counter(call.outcome for call in calls)
    assert outcomes[call_pb2.OUTCOME_LIVE] == 1
    if policy == call_pb2.POLICY_V6_3:
        assert set(outcomes) == {call_pb2.OUTCOME_LIVE, call_pb2.OUTCOME_LOAD}
    elif policy == call_pb2.POLICY_V6_4:
        assert set(outcomes) <= {call_pb2.OUTCOME_LIVE, call_pb2.OUTCOME_LOAD, call_pb2.OUTCOME_BECOMING}
    else:
        assert set(outcomes) <= {call_pb2.OUTCOME_LIVE, call_pb2.OUTCOME_SHARED, call_pb2.OUTCOME_BECOMING}
        assert outcomes[call_pb2.OUTCOME_SHARED], "calls in flight share"
    assert_same(await machine.counters(), counted(calls))


async def test_separate_copies_share_nothing(machine: Machine) -> None:
    calls = await asyncio.gather(
        *(machine.load("xfs", policy=call_pb2.POLICY_V6_5, copy=number) for number in range(1, 9))
    )
    assert Counter(call.errno for call in calls) == {"": 1, "EEXIST": 7}
    assert_same(await machine.counters(), counted(calls))


# --- compressed files ---


@pytest.mark.parametrize("variant", ["xz", "zst"])
async def test_a_compressed_file_is_decompressed_by_the_kernel_or_by_the_caller(
    start: StartMachine, variant: str
) -> None:
    machine = await start("--tree", f"catalogue-{variant}")
    by_kernel = await machine.load("minix")
    await machine.unload("minix")
    by_caller = await machine.load("minix", kmod=pb.KMOD_30)
    assert (by_kernel.syscall, by_kernel.flags) == (call_pb2.SYSCALL_FINIT_MODULE, 4)
    assert (by_caller.syscall, by_caller.flags) == (call_pb2.SYSCALL_INIT_MODULE, 0)
    assert by_kernel.compressed_bytes == by_kernel.file_bytes < by_kernel.image_bytes
    assert by_caller.compressed_bytes == 0
    assert by_kernel.mod_bytes == by_caller.mod_bytes
    duplicates = [await machine.load("minix"), await machine.load("minix", kmod=pb.KMOD_30)]
    stats = await machine.counters()
    image_bytes = by_kernel.image_bytes
    assert [call.errno for call in duplicates] == ["EEXIST", "EEXIST"]
    assert stats.invalid_becoming_bytes == 2 * image_bytes + by_kernel.file_bytes


# --- files that are none ---


@pytest.fixture
def bad_tree(tmp_path: Path, plain_tree: Path) -> Path:
    """A directory of files of which only one is a module."""
    root = tmp_path / "tree"
    root.mkdir()
    tree = open_tree(plain_tree)
    fd = tree.open_file("minix")
    with os.fdopen(fd, "rb") as file:
        good = file.read()
    (root / "good.ko").write_bytes(good)
    (root / "empty.ko").write_bytes(b"")
    (root / "half.ko").write_bytes(good[: len(good) // 2])
    (root / "text.ko").write_bytes(b"not a module\n" * 100)
    (root / "cut.ko.gz").write_bytes(gzip.compress(good)[:1000])
    (root / "cut.ko.xz").write_bytes(lzma.compress(good, check=lzma.CHECK_CRC32)[:-1])
    bomb = zstandard.ZstdCompressor().compressobj()
    with (root / "bomb.ko.zst").open("wb") as file:
        for _ in range(1024):
            file.write(bomb.compress(bytes(1 << 20)))
        file.write(bomb.flush())
    (root / "directory.ko").mkdir()
    os.mkfifo(root / "fifo.ko")
    secret = tmp_path / "secret.ko"
    secret.write_bytes(good)
    (root / "link.ko").symlink_to(secret)
    return root


async def test_what_is_no_module_fails_as_the_kernel_says_and_moves_its_counters(
    start: StartMachine, bad_tree: Path
) -> None:
    machine = await start("--tree", str(bad_tree))
    empty = await machine.load("empty")
    half = await machine.load("half")
    text = await machine.load("text")
    cut = await machine.load("cut")
    kinds = [(call.outcome, call.errno) for call in (empty, half, text, cut)]
    assert kinds == [
        (call_pb2.OUTCOME_KREAD, "EINVAL"),
        (call_pb2.OUTCOME_BECOMING, "ENOEXEC"),
        (call_pb2.OUTCOME_BECOMING, "ENOEXEC"),
        (call_pb2.OUTCOME_DECOMPRESS, "EINVAL"),
    ]
    assert text.check == "elf: magic"
    assert text.value
    assert_same(await machine.counters(), counted([empty, half, text, cut]))
    assert (await machine.load("good")).outcome == call_pb2.OUTCOME_LIVE
    [loaded] = (
        await machine.stats.ListLoadedModules(stats_service_pb2.ListLoadedModulesRequest(system=machine.system))
    ).modules

    async def holds_the_live_module_alone() -> bool:
        return (await machine.counters()).held_bytes == loaded.core_bytes

    await until(holds_the_live_module_alone)


async def test_requests_that_make_no_sense_name_the_value_and_count_nothing(
    start: StartMachine, bad_tree: Path
) -> None:
    machine = await start("--tree", str(bad_tree))
    cases = [
        (machine.load("no_such"), grpc.StatusCode.NOT_FOUND, "no_such"),
        (machine.load("../secret"), grpc.StatusCode.INVALID_ARGUMENT, "../secret"),
        (machine.load("a/b"), grpc.StatusCode.INVALID_ARGUMENT, "a/b"),
        (machine.load(""), grpc.StatusCode.INVALID_ARGUMENT, "''"),
        (machine.load("directory"), grpc.StatusCode.NOT_FOUND, "directory"),
        (machine.load("fifo"), grpc.StatusCode.NOT_FOUND, "fifo"),
        (machine.load("link"), grpc.StatusCode.PERMISSION_DENIED, "link.ko"),
        (machine.load("bomb"), grpc.StatusCode.RESOURCE_EXHAUSTED, "bomb.ko.zst"),
        (machine.load("good", flags=8), grpc.StatusCode.INVALID_ARGUMENT, "8"),
        (machine.load("good", policy=77), grpc.StatusCode.INVALID_ARGUMENT, "77"),
        (machine.load("good", kmod=5), grpc.StatusCode.INVALID_ARGUMENT, "5"),
        (machine.load("good", copy=-1), grpc.StatusCode.INVALID_ARGUMENT, "-1"),
        (machine.load("good", system="No System"), grpc.StatusCode.INVALID_ARGUMENT, "No System"),
        (machine.load("good", worker="w" * 200), grpc.StatusCode.INVALID_ARGUMENT, "worker"),
    ]
    for request, code, value in cases:
        got, sentence = await failure(request)
        assert got is code, sentence
        assert value in sentence
    stats = await machine.counters()
    assert (stats.calls, stats.events, stats.held_bytes) == (0, 0, 0)


async def test_the_kernel_of_the_catalogue_wants_what_a_module_depends_on(start: StartMachine) -> None:
    machine = await start("--identity", "catalogue")
    call = await machine.load("xfs")
    assert (call.outcome, call.errno) == (call_pb2.OUTCOME_LOAD, "ENOENT")
    assert call.check.startswith("symbols")
    assert (await machine.load("xfs", with_dependencies=True)).outcome == call_pb2.OUTCOME_LIVE


def test_an_interrupted_start_ends_without_a_word(tmp_path: Path, plain_tree: Path) -> None:
    # Somebody builds the catalogue already, so that the start takes as long as the test needs.
    root = tmp_path / "catalogue" / plain_tree.parents[2].name
    root.parent.mkdir()
    lock_path = root.with_name(f".{root.name}.lock")
    arguments = ("--listen", "127.0.0.1:0", "--cache-dir", str(tmp_path))
    with lock_path.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        popen = subprocess.Popen([sys.executable, "-m", "loader_svc", *arguments], stderr=subprocess.PIPE, text=True)
        # A reader of /proc/locks sees who waits for what is locked.
        while not re.search(rf"-> FLOCK .* {popen.pid} ", Path("/proc/locks").read_text()):
            assert popen.poll() is None
        popen.send_signal(signal.SIGINT)
        root.mkdir()
    _, said = popen.communicate(timeout=60)
    assert (popen.returncode, said) == (130, "")


# --- memory ---


@pytest.fixture
def big_tree(tmp_path: Path, plain_tree: Path) -> Path:
    """One module of 64 MiB: a real one, made longer."""
    root = tmp_path / "big"
    root.mkdir()
    with os.fdopen(open_tree(plain_tree).open_file("minix"), "rb") as file:
        (root / "minix.ko").write_bytes(file.read())
    os.truncate(root / "minix.ko", 64 << 20)
    return root


async def test_the_resident_set_shows_the_file_while_the_call_waits_and_not_after(
    start: StartMachine, big_tree: Path, hand: Hand
) -> None:
    machine = await start("--tree", str(big_tree))
    await machine.load("minix")  # so that whatever is learned of the file is known
    await machine.unload("minix")
    assert (await hand.reserve(2, "minix")).verdict == ledger.OperationResult.VERDICT_PROCEED
    idle_bytes = machine.process.resident_bytes()
    waiting = asyncio.ensure_future(machine.load("minix", policy=call_pb2.POLICY_V6_3))

    await until(machine.someone_waits)
    assert machine.process.resident_bytes() - idle_bytes > 60 << 20
    await hand.give_up(2, "minix")
    call = await waiting
    assert (call.outcome, call.errno) == (call_pb2.OUTCOME_LOAD, "EBUSY")
    assert call.peak_held_bytes == (64 << 20) + call.mod_bytes
    assert machine.process.resident_bytes() - idle_bytes < 8 << 20


async def test_beyond_the_memory_limit_a_call_waits_its_turn_or_is_refused_as_it_asked(
    start: StartMachine, big_tree: Path, hand: Hand
) -> None:
    machine = await start("--tree", str(big_tree), "--memory-limit", "100MiB")
    await hand.reserve(2, "minix")
    first = asyncio.ensure_future(machine.load("minix", policy=call_pb2.POLICY_V6_3))
    await until(machine.someone_waits)
    code, sentence = await failure(machine.load("minix", refuse_when_full=True))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "minix.ko" in sentence
    second = asyncio.ensure_future(machine.load("minix", policy=call_pb2.POLICY_V6_3))
    await hand.give_up(2, "minix")
    assert (await first).errno == "EBUSY"
    assert (await second).outcome == call_pb2.OUTCOME_LIVE


async def test_a_client_whose_call_waits_for_memory_keeps_no_other_client_waiting(
    start: StartMachine, stats: Process, big_tree: Path, plain_tree: Path, hand: Hand, tmp_path: Path
) -> None:
    with os.fdopen(open_tree(plain_tree).open_file("crc16"), "rb") as file:
        (big_tree / "crc16.ko").write_bytes(file.read())
    greedy, modest = new_token(), new_token()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        entry(greedy, "greedy", [Role.LOAD, Role.READ], ["*"]) + entry(modest, "modest", [Role.LOAD, Role.READ], ["*"])
    )
    options = ("--tree", str(big_tree), "--memory-limit", "100MiB", "--tokens", str(tokens))
    machine = await start(*options, token=greedy)
    other = Machine(machine.process, stats, machine.system, modest)
    await hand.reserve(2, "minix")
    first = asyncio.ensure_future(machine.load("minix", policy=call_pb2.POLICY_V6_3))
    await until(machine.someone_waits)
    # It has no room, and goes on waiting when its client has gone.
    again = {"request_id": "again", "policy": call_pb2.POLICY_V6_3}
    code, _ = await failure(machine.load("minix", timeout=0.5, **again))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED

    assert (await other.load("crc16", timeout=15)).outcome == call_pb2.OUTCOME_LIVE
    assert (await other.loader.GetModule(pb.GetModuleRequest(module="crc16"), timeout=15)).module.name == "crc16"
    await hand.give_up(2, "minix")
    assert (await first).errno == "EBUSY"
    assert (await machine.load("minix", **again)).outcome == call_pb2.OUTCOME_LIVE
    await other.close()


async def test_what_can_never_fit_is_refused_with_both_numbers(start: StartMachine, big_tree: Path) -> None:
    machine = await start("--tree", str(big_tree), "--memory-limit", "10MiB")
    code, sentence = await failure(machine.load("minix"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(10 << 20) in sentence


async def test_describing_a_module_waits_for_memory_as_a_call_does(
    start: StartMachine, big_tree: Path, hand: Hand
) -> None:
    machine = await start("--tree", str(big_tree), "--memory-limit", "100MiB")
    await hand.reserve(2, "minix")
    load = asyncio.ensure_future(machine.load("minix", policy=call_pb2.POLICY_V6_3))
    await until(machine.someone_waits)
    request = pb.GetModuleRequest(module="minix")
    code, _ = await failure(machine.loader.GetModule(request, timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    describing = asyncio.ensure_future(machine.loader.GetModule(request, timeout=60))
    await hand.give_up(2, "minix")
    await load
    assert (await describing).module.image_bytes == 64 << 20


# --- waits, and who goes away ---


async def test_a_client_that_gives_up_sends_its_call_a_signal(machine: Machine, hand: Hand) -> None:
    await hand.reserve(2, "minix")
    request = pb.LoadModuleRequest(system=machine.system, module="minix")
    code, _ = await failure(machine.loader.LoadModule(request, timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED

    async def ended() -> bool:
        return (await machine.counters()).calls == 1

    await until(ended)
    [event] = await machine.events()
    assert (event.call.outcome, event.call.errno, event.call.duplicate) == (
        call_pb2.OUTCOME_BECOMING,
        "EINTR",
        False,
    )
    await hand.give_up(2, "minix")
    failed = await machine.stats.ListFailedModules(stats_service_pb2.ListFailedModulesRequest(system=machine.system))
    assert not failed.modules


async def test_an_unload_through_another_loader_frees_the_memory_of_the_first(start: StartMachine) -> None:
    first, second = await start(), await start()
    await first.load("minix")
    assert (await first.counters()).held_bytes > 0
    assert (await second.unload("minix")).errno == ""
    # Its memory is gone by the time it next says what it holds.
    call = await first.load("minix")
    assert call.outcome == call_pb2.OUTCOME_LIVE
    assert call.held_bytes == call.mod_bytes


async def test_unloading_what_is_not_loaded_is_a_result(machine: Machine) -> None:
    unload = await machine.unload("minix")
    assert unload.errno == "ENOENT"
    assert (await machine.counters()).unloads == 0


async def test_without_stats_svc_a_loader_is_not_serving_and_says_who_is_missing(launch: Launch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", address)
        machine = Machine(loader, loader, "default")
        assert not await machine.serving()
        code, sentence = await failure(machine.load("minix"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert address in sentence
        await machine.close()


async def test_calls_in_flight_survive_a_stats_svc_that_is_killed_and_are_counted_once(
    launch: Launch, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("stats_svc", "--listen", f"127.0.0.1:{port}", "--database", str(tmp_path / "killed.sqlite3"))
    stats = launch(*arguments)
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    machine = Machine(loader, stats, "default")
    await until(machine.serving)
    answered: list[call_pb2.Call] = []

    async def load_when_there(number: int) -> call_pb2.Call:
        while True:
            try:
                return await machine.load("minix", worker=str(number))
            except grpc.aio.AioRpcError as error:
                # Refused before it was begun: stats_svc takes longer to start than a new request waits.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    async def keep_loading(number: int) -> None:
        for _ in range(30):
            call = await load_when_there(number)
            answered.append(call)

    work = [asyncio.ensure_future(keep_loading(number)) for number in range(8)]
    for _ in range(3):
        floor = len(answered) + 20

        async def went_on(floor: int = floor) -> bool:
            return len(answered) >= floor

        await until(went_on)
        stats.kill()
        stats = launch(*arguments)
    await asyncio.gather(*work)
    assert len(answered) == 240
    assert_same(await machine.counters(), counted(answered))
    logged = [event.call.call_id for event in await machine.events()]
    assert sorted(logged) == sorted(call.call_id for call in answered)
    await machine.close()


@pytest.fixture
def start_stats(launch: Launch, tmp_path: Path) -> Callable[[str], Process]:
    """Start a stats_svc over some file; all are reached at the same address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(database: str) -> Process:
        return launch("stats_svc", "--listen", f"127.0.0.1:{port}", "--database", str(tmp_path / database))

    return start


async def load_when_back(machine: Machine, module: str) -> call_pb2.Call:
    """Load a module as soon as stats_svc is back."""
    calls: list[call_pb2.Call] = []

    async def loads() -> bool:
        try:
            calls.append(await machine.load(module))
        except grpc.aio.AioRpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION), error
        return bool(calls)

    await until(loads)
    return calls[0]


async def test_another_database_is_a_new_beginning(launch: Launch, start_stats: Callable[[str], Process]) -> None:
    stats = start_stats("first.sqlite3")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    machine = Machine(loader, stats, "default")
    await until(machine.serving)
    before = await machine.load("minix")
    assert before.held_bytes > 0
    stats.kill()
    start_stats("second.sqlite3")

    call = await load_when_back(machine, "romfs")
    # What was live in the other database is live in none, and its memory is free.
    assert call.outcome == call_pb2.OUTCOME_LIVE
    assert call.held_bytes == call.mod_bytes
    assert call.instance_id != before.instance_id
    assert (await machine.counters()).modcount == 1
    await machine.close()


async def test_another_database_is_a_new_beginning_also_for_a_loader_that_has_caused_no_event(
    launch: Launch, start_stats: Callable[[str], Process]
) -> None:
    stats = start_stats("first.sqlite3")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    machine = Machine(loader, stats, "default")
    await until(machine.serving)
    for _ in range(3):
        assert (await machine.unload("minix")).errno == "ENOENT"
    stats.kill()
    start_stats("second.sqlite3")
    assert (await load_when_back(machine, "romfs")).outcome == call_pb2.OUTCOME_LIVE
    assert (await machine.counters()).modcount == 1
    await machine.close()


async def test_after_an_older_copy_of_the_database_a_loader_has_what_is_live_in_that(
    launch: Launch, start_stats: Callable[[str], Process], tmp_path: Path
) -> None:
    stats = start_stats("first.sqlite3")
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    machine = Machine(loader, stats, "default")
    await until(machine.serving)
    await machine.load("minix")
    assert stats.stop() == 0
    shutil.copy(tmp_path / "first.sqlite3", tmp_path / "copy.sqlite3")
    stats = start_stats("first.sqlite3")
    before = await load_when_back(machine, "romfs")
    stats.kill()
    start_stats("copy.sqlite3")
    call = await load_when_back(machine, "romfs")
    assert call.outcome == call_pb2.OUTCOME_LIVE
    assert call.held_bytes == before.held_bytes
    assert (await machine.counters()).modcount == 2
    await machine.close()


# --- many ---


async def test_a_stream_answers_each_request_by_its_tag_and_goes_on_after_an_error(machine: Machine) -> None:
    async def requests() -> AsyncIterator[pb.LoadModulesRequest]:
        loads = [
            pb.ModuleRequest(tag=n, load=pb.LoadModuleRequest(system=machine.system, module=name))
            for n, name in enumerate(names)
        ]
        yield pb.LoadModulesRequest(requests=loads)
        yield pb.LoadModulesRequest(requests=[pb.ModuleRequest(tag=99)])

    names = ["minix", "no_such", "libcrc32c"]
    answers = {}
    async for response in machine.loader.LoadModules(requests()):
        answers.update({answer.tag: answer for answer in response.responses})
    assert sorted(answers) == [0, 1, 2, 99]
    assert answers[0].load.call.outcome == answers[2].load.call.outcome == call_pb2.OUTCOME_LIVE
    assert answers[1].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert "no_such" in answers[1].error.message
    assert answers[99].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def storm(machine: Machine, **fields: object) -> pb.StormSummary:
    """Run a storm and return its summary."""
    request = pb.RunStormRequest(storm=pb.Storm(system=machine.system, **fields))
    responses = [response async for response in machine.loader.RunStorm(iter([request]))]
    assert responses[0].HasField("ready")
    assert responses[-1].HasField("summary")
    return responses[-1].summary


@pytest.mark.parametrize("policy", [call_pb2.POLICY_V6_3, call_pb2.POLICY_V6_4, call_pb2.POLICY_V6_5])
async def test_a_storm_that_repeats_does_its_operations_and_what_it_counts_is_what_is_counted(
    machine: Machine, policy: int
) -> None:
    summary = await storm(machine, modules=["minix", "libcrc32c"], workers=10, operations=3, policy=policy)
    assert summary.operations == 10 * 3 * 2
    assert summary.errors == 0
    assert sum(outcome.count for outcome in summary.outcomes) == summary.calls
    counters = await machine.counters()
    assert counters.calls == summary.calls
    assert counters.duplicates == summary.duplicates
    assert counters.virtual_mem_wasted_bytes == summary.wasted_bytes
    assert counters.unloads == summary.unloads
    assert counters.live_modules == 0
    assert counters.modcount == counters.unloads


async def test_a_storm_that_loads_once_leaves_one_live_module_each(machine: Machine) -> None:
    summary = await storm(
        machine, modules=["xfs"], workers=20, mode=pb.Storm.MODE_ONCE, with_dependencies=True, separate_copies=True
    )
    assert summary.calls == 20
    assert summary.duplicates == 19
    assert summary.unloads == 0
    loaded = await machine.stats.ListLoadedModules(stats_service_pb2.ListLoadedModulesRequest(system=machine.system))
    assert "xfs" in {module.module for module in loaded.modules}


async def test_a_storm_on_modules_that_use_one_another_ends(machine: Machine) -> None:
    for module in ("libcrc32c", "xfs"):
        await machine.load(module)
    code, sentence = await failure(storm(machine, modules=["libcrc32c"], workers=1, operations=1))
    assert (code, "'libcrc32c'" in sentence) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    # Before its start both are unloaded, whichever is named first.
    summary = await storm(machine, modules=["libcrc32c", "xfs"], workers=4, operations=3)
    assert (summary.operations, summary.unloads, summary.errors) == (24, 24, 0)
    assert (await machine.counters()).live_modules == 0


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"workers": 0}, "0"),
        ({"workers": 10**9}, "1000000000"),
        ({"workers": 1, "modules": []}, "module"),
        ({"workers": 1, "modules": ["no_such"]}, "no_such"),
        ({"workers": 1, "operations": 0}, "operations"),
        ({"workers": 1, "operations": -5}, "-5"),
    ],
)
async def test_a_storm_that_makes_no_sense_is_refused(machine: Machine, fields: dict[str, object], value: str) -> None:
    request = pb.RunStormRequest(
        storm=pb.Storm(**{"system": machine.system, "modules": ["minix"], "operations": 1, **fields})
    )

    async def run() -> None:
        async for _ in machine.loader.RunStorm(iter([request])):
            pass

    code, sentence = await failure(run())
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    assert value in sentence
    assert (await machine.counters()).calls == 0


async def test_a_storm_whose_start_can_never_come_ends_without_a_call(machine: Machine) -> None:
    summary = await storm(machine, modules=["minix"], workers=4, operations=1, await_start=True)
    assert summary.stopped
    assert (summary.calls, summary.errors) == (0, 0)
    assert (await machine.counters()).calls == 0


async def test_a_storm_waits_for_the_start_and_ends_when_told(machine: Machine) -> None:
    commands: asyncio.Queue[pb.RunStormRequest | None] = asyncio.Queue()

    async def outgoing() -> AsyncIterator[pb.RunStormRequest]:
        while (command := await commands.get()) is not None:
            yield command

    plan = pb.Storm(system=machine.system, modules=["minix"], workers=4, await_start=True)
    plan.duration.FromSeconds(600)
    await commands.put(pb.RunStormRequest(storm=plan))
    responses = machine.loader.RunStorm(outgoing())
    assert (await responses.read()).HasField("ready")
    assert (await machine.counters()).calls == 0
    await commands.put(pb.RunStormRequest(start=pb.StartStorm()))
    while not (response := await responses.read()).progress.operations:
        pass
    await commands.put(pb.RunStormRequest(stop=pb.StopStorm()))
    await commands.put(None)
    while not response.HasField("summary"):
        response = await responses.read()
    assert response.summary.stopped
    assert response.summary.calls == (await machine.counters()).calls > 0


@pytest.mark.parametrize("waiting", [False, True])
async def test_a_storm_that_its_loaders_stop_breaks_off_counts_its_last_calls(
    start: StartMachine, hand: Hand, waiting: bool
) -> None:
    machine = await start()
    workers = 4
    if waiting:
        await hand.reserve(2, "minix")
    plan = pb.Storm(system=machine.system, modules=["minix"], workers=workers)
    plan.duration.FromSeconds(600)
    responses = machine.loader.RunStorm(iter([pb.RunStormRequest(storm=plan)]))

    async def all_wait() -> bool:
        return (await machine.counters()).waiting_calls == workers

    if waiting:
        await until(all_wait)
    else:
        while not (response := await responses.read()).progress.operations:
            pass
    machine.process.popen.terminate()
    while not (response := await responses.read()).HasField("summary"):
        pass
    summary = response.summary
    assert await asyncio.to_thread(machine.process.popen.wait, 30) == 0

    events = await machine.events()
    ended = Counter((event.call.outcome, event.call.errno) for event in events if event.HasField("call"))
    assert {(outcome.outcome, outcome.errno): outcome.count for outcome in summary.outcomes} == ended
    assert summary.unloads == sum(event.HasField("unload") for event in events)
    if waiting:
        # A call that waits ends as by a signal; none is left to be abandoned.
        assert ended == {(call_pb2.OUTCOME_BECOMING, "EINTR"): workers}
    assert summary.stopped
    # Each worker was to go on.
    assert (summary.errors, "is stopping" in summary.first_error) == (workers, True)


async def test_a_storm_whose_last_calls_do_not_end_is_summed_up_before_its_loader_is_gone(
    launch: Launch, tmp_path: Path
) -> None:
    stats = launch("stats_svc", "--listen", "127.0.0.1:0", "--database", str(tmp_path / "s.sqlite3"))
    loader = launch("loader_svc", "--listen", "127.0.0.1:0", "--stats", stats.address)
    machine = Machine(loader, stats, "default")
    await until(machine.serving)
    workers = 4
    plan = pb.Storm(system=machine.system, modules=["minix"], workers=workers)
    plan.duration.FromSeconds(600)
    responses = machine.loader.RunStorm(iter([pb.RunStormRequest(storm=plan)]))
    while not (await responses.read()).progress.operations:
        pass
    stats.popen.kill()
    loader.popen.terminate()
    while not (response := await responses.read()).HasField("summary"):
        pass
    assert response.summary.operations
    assert (response.summary.errors, response.summary.stopped) == (workers, True)
    assert "is stopping" in response.summary.first_error
    assert await asyncio.to_thread(loader.popen.wait, 30) == 0
    await machine.close()


# --- the tree ---


async def test_modules_are_listed_page_by_page_and_described(machine: Machine, plain_tree: Path) -> None:
    names: list[str] = []
    token = ""
    while True:
        page = await machine.loader.ListModules(pb.ListModulesRequest(page_size=7, page_token=token))
        names += [module.name for module in page.modules if not module.builtin]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(open_tree(plain_tree).names())
    described = (await machine.loader.GetModule(pb.GetModuleRequest(module="xfs"))).module
    assert described.depends
    assert described.layout.total_bytes % PAGE_BYTES == 0
    assert described.load_order[-1].startswith("insmod ")
    filtered = await machine.loader.ListModules(pb.ListModulesRequest(filter="virtio-p*"))
    assert {module.name[:8] for module in filtered.modules} == {"virtio_p"}


async def test_a_long_pattern_is_refused_at_once(machine: Machine) -> None:
    """Half a megabyte of pattern once held everything up for longer than a client waits."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await machine.loader.ListModules(pb.ListModulesRequest(filter="a*" * 250_000))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == "filter 'a*a*a*a*a*a*a*a*a*a*'… is longer than 128 bytes"
