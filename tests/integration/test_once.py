"""Once, and only once, from end to end: real loaders and a real stats_svc that are killed, stopped, and asked again."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from modpressure.client import Client
from modpressure.errors import NotNow, Unavailable
from modpressure.v1 import call_pb2, stats_service_pb2
from modpressure.v1.loader_service_pb2 import (
    LoadModuleRequest,
    ModuleRequest,
    RequestModuleRequest,
    UnloadModuleRequest,
)
from tests.services import Launch, Process

ABANDONED = call_pb2.OUTCOME_ABANDONED
COMING = stats_service_pb2.LoadedModule.STATE_COMING
LEASE_SECONDS = 3.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.02)


class Machine:
    """Loaders of one stats_svc, each on an address that stays its own through restarts."""

    def __init__(self, launch: Launch, directory: Path) -> None:
        self._launch = launch
        self._directory = directory
        self._addresses: dict[str, str] = {}
        self.processes: dict[str, Process] = {}
        # The init function of minix never ends where it is slow.
        self.slow = directory / "slow.csv"
        self.slow.write_text("module,condition,duration_ms,result\nminix,always,600000,0\n")

    def stats(self, lease_seconds: float = LEASE_SECONDS) -> None:
        database = str(self._directory / "stats.sqlite3")
        self._start("stats_svc", "stats", "--database", database, "--lease-seconds", str(lease_seconds))

    def loader(self, name: str, *options: str) -> None:
        stats = self.processes["stats"].address
        self._start("loader_svc", name, "--stats", stats, "--name", name, *options)

    def _start(self, program: str, name: str, *options: str) -> None:
        address = self._addresses.get(name, "")
        if not address:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = self._addresses[name] = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes[name] = self._launch(program, "--listen", address, *options)

    def kill(self, name: str) -> None:
        self.processes[name].kill()

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].popen.send_signal(number)

    def client(self, *loaders: str) -> Client:
        """Return a client of some loaders, of all if none is named."""
        addresses = [self._addresses[name] for name in loaders or self._addresses if name != "stats"]
        return Client(addresses, self._addresses["stats"], timeout_seconds=60)

    def exits(self, name: str) -> int:
        """Return how a process ends that ends by itself."""
        return self.processes[name].popen.wait(30)


@pytest.fixture
async def machine(launch: Launch, tmp_path: Path) -> AsyncIterator[Machine]:
    yield Machine(launch, tmp_path)


async def calls(client: Client) -> list[tuple[str, str, int]]:
    """Return module, loader and outcome of all calls that have an event."""
    return [(e.call.module, e.call.loader, e.call.outcome) async for e in client.events() if e.HasField("call")]


async def coming(client: Client) -> None:
    """Return when a call is in its init function."""

    async def is_there() -> bool:
        return any([module.state == COMING async for module in client.loaded_modules()])

    await until(is_there)


async def test_one_request_id_is_one_result_on_any_loader_and_through_restarts(machine: Machine) -> None:
    machine.stats()
    machine.loader("a")
    machine.loader("b")
    async with machine.client("a") as a, machine.client("b") as b:
        loaded = await a.load("xfs", request_id="load")
        removed = await b.unload("xfs", request_id="unload")
        refused = await b.unload("xfs", request_id="unload again")
        asked = await a.request_module("fs-xfs", request_id="mount")
        assert loaded.call.outcome == call_pb2.OUTCOME_LIVE
        assert [call.module for call in loaded.dependency_calls][-1] == "libcrc32c"
        assert (removed.unload.errno, refused.unload.errno, asked.return_value) == ("", "ENOENT", 0)
        assert [call.module for call in asked.calls] == ["xfs"]
        before = await a.stats()

        async def are_the_same() -> None:
            for client in (a, b):
                assert await client.load("xfs", request_id="load") == loaded
                again = await client.unload("xfs", request_id="unload")
                assert again == removed and again.unload.event_id and again.unload.duration_ns
                assert await client.unload("xfs", request_id="unload again") == refused
                assert await client.request_module("fs-xfs", request_id="mount") == asked
                requests = [
                    ModuleRequest(
                        tag=1, load=LoadModuleRequest(module="xfs", with_dependencies=True, request_id="load")
                    ),
                    ModuleRequest(tag=2, unload=UnloadModuleRequest(module="xfs", request_id="unload")),
                    ModuleRequest(tag=3, unload=UnloadModuleRequest(module="minix", request_id="unload")),
                ]
                answers = {answer.tag: answer async for answer in client.load_many([requests])}
                assert answers[1].load == loaded
                assert answers[2].unload.unload.event_id == removed.unload.event_id
                assert "request_id 'unload' was used for another request" in answers[3].error.message
                with pytest.raises(NotNow, match="request_id 'load' was used for another request"):
                    await client.load("xfs", request_id="load", worker="somebody else")
            after = await a.stats()
            assert (after.calls, after.unloads, after.events) == (before.calls, before.unloads, before.events)

        await are_the_same()
        for name in ("stats", "a", "b"):
            machine.kill(name)
        machine.stats()
        machine.loader("a")
        machine.loader("b")
        await are_the_same()
        # Another system has ids of its own.
        assert (await a.load("xfs", request_id="load", system="other")).call.system == "other"


async def test_a_request_that_the_kernel_has_no_call_for_has_one_result_too(machine: Machine, tmp_path: Path) -> None:
    identity = tmp_path / "no-unload.toml"
    identity.write_text('base = "any"\nname = "no-unload"\n[config]\nMODULE_UNLOAD = false\n')
    machine.stats()
    machine.loader("a", "--identity", str(identity))
    async with machine.client("a") as client:
        first = await client.unload("xfs", request_id="unload")
        assert first.unload.errno == "ENOSYS"
        assert await client.unload("xfs", request_id="unload") == first


async def test_a_retry_waits_for_the_first_and_goes_on_after_a_loader_that_was_killed(machine: Machine) -> None:
    machine.stats()
    machine.loader("a", "--init", str(machine.slow))
    machine.loader("b")
    async with machine.client("a") as a, machine.client("b") as b:
        first = asyncio.ensure_future(a.load("minix", request_id="once"))
        await coming(b)
        retries = [asyncio.ensure_future(b.load("minix", request_id="once")) for _ in range(3)]
        other = asyncio.ensure_future(b.load("minix"))

        async def waits() -> bool:
            return (await b.stats()).waiting_calls == 1

        await until(waits)
        machine.kill("a")
        results = await asyncio.gather(*retries)
        assert results[0].call.outcome == call_pb2.OUTCOME_LIVE
        assert results[0].call.loader == "b"
        assert all(result == results[0] for result in results)
        # Who waited for the name is told what the kernel tells when a load fails.
        assert (await other).call.errno == "EBUSY"
        first.cancel()
        logged = await calls(b)
        assert ("minix", "a", ABANDONED) in logged
        stats = await b.stats()
        assert (stats.calls, stats.modcount, stats.abandoned_calls) == (2, 1, 1)


async def test_a_loader_that_wakes_after_its_lease_has_lost_its_calls_and_goes_on(machine: Machine) -> None:
    machine.stats()
    machine.loader("a", "--init", str(machine.slow))
    machine.loader("b")
    async with machine.client("a") as a, machine.client("b") as b:
        kept = (await a.load("loop")).call
        first = asyncio.ensure_future(a.load("minix"))
        await coming(b)
        machine.signal("a", signal.SIGSTOP)
        # Its stream stands all the while: only its silence tells.
        assert (await b.load("minix")).call.errno == "EBUSY"
        assert (await b.load("minix")).call.outcome == call_pb2.OUTCOME_LIVE
        machine.signal("a", signal.SIGCONT)
        with pytest.raises(Unavailable, match="the call is lost, and not counted: the lease of process"):
            await first
        # It goes on as a new instance, and what it had left live is still in its memory.
        async with asyncio.timeout(60):
            while True:
                try:
                    after = (await a.load("pcspkr")).call
                    break
                except Unavailable:
                    await asyncio.sleep(0.1)
        assert after.instance_id != kept.instance_id
        assert after.mod_bytes < after.held_bytes <= kept.mod_bytes + after.mod_bytes
        await b.unload("loop")

        async def is_free() -> bool:
            return (await a.load("pcspkr")).call.held_bytes <= after.mod_bytes

        await until(is_free)
        stats = await b.stats()
        assert stats.abandoned_calls == 1
        assert [call for call in await calls(b) if call[2] == ABANDONED] == [("minix", "a", ABANDONED)]


async def test_a_stats_svc_that_stood_still_takes_no_lease(machine: Machine) -> None:
    machine.stats(lease_seconds=1.0)
    quick = machine.slow.with_name("quick.csv")
    quick.write_text("module,condition,duration_ms,result\nminix,always,5000,0\n")
    machine.loader("a", "--init", str(quick))
    async with machine.client() as a:
        first = asyncio.ensure_future(a.load("minix"))
        await coming(a)
        machine.signal("stats", signal.SIGSTOP)
        # Longer than the lease.
        await asyncio.sleep(2.5)
        machine.signal("stats", signal.SIGCONT)
        assert (await first).call.outcome == call_pb2.OUTCOME_LIVE
        assert (await a.stats()).abandoned_calls == 0


async def test_the_newest_process_of_a_name_replaces_the_others(machine: Machine, launch: Launch) -> None:
    machine.stats(lease_seconds=600)
    machine.loader("a", "--init", str(machine.slow))
    async with machine.client("a") as a:
        first = asyncio.ensure_future(a.load("minix", loader=machine.processes["a"].address))
        await coming(a)
        old = machine.processes["a"]
        old.status = 1
        new = launch(
            "loader_svc", "--listen", "127.0.0.1:0", "--stats", machine.processes["stats"].address, "--name", "a"
        )
        with pytest.raises(Unavailable):
            await first
        assert await asyncio.to_thread(old.popen.wait, 30) == 1
        assert "another loader process named 'a' has taken the place of process" in "".join(old.lines)
        # The name is free at once, without waiting for the lease.
        assert (await a.load("minix", loader=new.address)).call.outcome == call_pb2.OUTCOME_LIVE
        assert (await a.stats()).abandoned_calls == 1


@pytest.mark.parametrize("hurried", [False, True])
async def test_a_stopping_loader_tells_its_clients_and_gives_all_up(machine: Machine, hurried: bool) -> None:
    machine.stats(lease_seconds=600)
    machine.loader("a", "--init", str(machine.slow), "--grace-seconds", "600" if hurried else "2")
    machine.loader("b")
    async with machine.client("a") as a, machine.client("b") as b:
        first = asyncio.ensure_future(a.load("minix"))
        await coming(b)
        machine.signal("a", signal.SIGTERM)
        if hurried:

            async def is_stopping() -> bool:
                return any('"stopping"' in line for line in machine.processes["a"].lines)

            await until(is_stopping)
            machine.signal("a", signal.SIGTERM)
        with pytest.raises(Unavailable, match=None if hurried else "loader 'a' is stopping"):
            await first
        assert await asyncio.to_thread(machine.exits, "a") == 0
        # Nobody has to wait for a lease.
        assert (await b.load("minix")).call.outcome == call_pb2.OUTCOME_LIVE
        assert (await b.stats()).abandoned_calls == 1


async def test_a_loader_stops_in_time_though_stats_svc_is_gone(machine: Machine) -> None:
    machine.stats()
    machine.loader("a", "--init", str(machine.slow), "--grace-seconds", "1")
    async with machine.client("a") as a:
        stub = a.loader_stub(machine.processes["a"].address)
        loads = [LoadModuleRequest(module="minix", request_id=request_id) for request_id in ("first", "second", "")]
        calls: list[Any] = [stub.LoadModule(load) for load in loads]
        calls.append(stub.RequestModule(RequestModuleRequest(name="minix", request_id="third")))
        calls.append(stub.RequestModule(RequestModuleRequest(name="minix")))
        await coming(a)

        async def all_wait() -> bool:
            stats = await a.stats()
            return (stats.waiting_calls, stats.module_requests) == (4, 2)

        await until(all_wait)
        machine.kill("stats")
        machine.signal("a", signal.SIGTERM)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(machine.exits, "a") == 0


async def test_a_client_asks_again_while_all_is_away(machine: Machine) -> None:
    machine.stats()
    machine.loader("a")
    async with machine.client() as client:
        first = await client.load("loop", request_id="first")
        machine.kill("stats")
        machine.kill("a")
        again = asyncio.ensure_future(client.load("loop", request_id="first"))
        later = asyncio.ensure_future(client.load("pcspkr", request_id="second"))
        with pytest.raises(Unavailable):
            await client.load("minix")
        machine.stats()
        machine.loader("a")
        assert await again == first
        calls = 1 + len(first.dependency_calls) + 1 + len((await later).dependency_calls)
        assert (await client.stats()).calls == calls
