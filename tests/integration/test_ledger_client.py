"""The loader's side of its stream, held against a stats_svc that answers what and when the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from loader_svc.ledger_client import LedgerClient
from loader_svc.memory import Meter
from modpressure.errors import Forbidden, NotNow, OverLimit, Unavailable
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server

LEASE_SECONDS = 0.2
PROCEED, INVALID = pb.OperationResult.VERDICT_PROCEED, pb.OperationResult.VERDICT_INVALID
Verdict = pb.OperationResult.Verdict.ValueType


class Stream:
    """One stream of a loader, from the side of stats_svc."""

    def __init__(self, requests: AsyncIterator[pb.ConnectRequest], context: Any) -> None:
        self._requests = requests
        self._context = context
        self.ended = asyncio.Event()
        self.status = (grpc.StatusCode.OK, "")

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """End the stream with an error."""
        self.status = (code, details)
        self.ended.set()

    async def hello(self) -> pb.Hello:
        request = await anext(self._requests)
        assert request.HasField("hello")
        return request.hello

    async def welcome(self, applied_sequence: int, message_limit_bytes: int = 0) -> None:
        welcome = pb.Welcome(
            applied_sequence=applied_sequence, lease_seconds=LEASE_SECONDS, message_limit_bytes=message_limit_bytes
        )
        await self._context.write(pb.ConnectResponse(welcome=welcome))

    async def message(self) -> pb.OperationBatch | None:
        """Return the next batch, None for a heartbeat."""
        request = await anext(self._requests)
        return request.batch if request.HasField("batch") else None

    async def batch(self) -> pb.OperationBatch:
        """Return the next batch that asks anything."""
        while True:
            message = await self.message()
            if message is not None and message.operations:
                return message

    async def answer(self, applied_sequence: int, *call_ids: int, verdict: Verdict = PROCEED) -> None:
        results = [pb.OperationResult(call_id=n, verdict=verdict) for n in call_ids]
        await self.results(pb.ResultBatch(applied_sequence=applied_sequence, results=results))

    async def results(self, results: pb.ResultBatch) -> None:
        await self._context.write(pb.ConnectResponse(results=results))


class StatsSvc(LedgerServiceServicer):
    """Hands out the streams that loaders open."""

    def __init__(self) -> None:
        self._streams: asyncio.Queue[Stream] = asyncio.Queue()

    async def Connect(self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any) -> None:  # type: ignore[override]
        stream = Stream(request_iterator, context)
        await self._streams.put(stream)
        await stream.ended.wait()
        code, details = stream.status
        if code is not grpc.StatusCode.OK:
            await context.abort(code, details)

    async def stream(self) -> Stream:
        return await self._streams.get()

    async def welcomed(self) -> Stream:
        """Return the next stream, whose hello was answered by somebody who knows of no batch."""
        stream = await self.stream()
        await stream.hello()
        await stream.welcome(0)
        return stream


@pytest.fixture
async def stats() -> AsyncIterator[tuple[StatsSvc, LedgerClient]]:
    """A stand-in for stats_svc, and a loader's client of it."""
    server, servicer = grpc.aio.server(), StatsSvc()
    add_LedgerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = LedgerClient(
        f"127.0.0.1:{port}",
        instance_id="one",
        meter=Meter(),
        on_released=lambda call_id: None,
        on_connected=lambda connected: None,
        new_instance_id=lambda: "two",
    )
    running = asyncio.create_task(client.run())
    yield servicer, client
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await server.stop(0)


def enter(call_id: int) -> pb.Operation:
    return pb.Operation(call_id=call_id, system="default", enter_gate=pb.EnterGate(inode=f"inode {call_id}"))


def remove(call_id: int) -> pb.Operation:
    return pb.Operation(call_id=call_id, system="default", remove_module=pb.RemoveModule())


async def test_nothing_new_is_sent_before_the_ends_that_are_asked_again_are_answered(
    stats: tuple[StatsSvc, LedgerClient],
) -> None:
    """Else what they are recognised by need not be kept, and they would be done twice after the next break."""
    servicer, client = stats
    first = await servicer.stream()
    assert (await first.hello()).instance_id == "one"
    await first.welcome(0)
    removing = asyncio.create_task(client.ask(remove(1)))
    assert (await first.batch()).sequence == 1
    # Applied, but the answer is lost.
    first.ended.set()
    second = await servicer.stream()
    await second.hello()
    await second.welcome(1)
    again = await second.batch()
    assert (again.sequence, [operation.call_id for operation in again.operations]) == (1, [1])
    reading = asyncio.create_task(
        client.ask(pb.Operation(call_id=2, system="default", read_initstate=pb.ReadInitstate(module="xfs")))
    )
    for _ in range(3):
        assert await second.message() is None
    await second.answer(1, 1)
    assert (await removing).call_id == 1
    new = await second.batch()
    assert (new.sequence, [operation.call_id for operation in new.operations]) == (2, [2])
    assert (again.answered_sequence, new.answered_sequence) == (0, 1)
    await second.answer(2, 2)
    assert (await reading).call_id == 2


async def test_the_hello_says_which_calls_are_in_flight_and_in_which_batch_one_has_asked_to_end(
    stats: tuple[StatsSvc, LedgerClient],
) -> None:
    servicer, client = stats
    first = await servicer.stream()
    await first.hello()
    await first.welcome(0)
    for call_id in (1, 2):
        entering = asyncio.create_task(client.ask(enter(call_id)))
        assert (await first.batch()).sequence == call_id
        await first.answer(call_id, call_id)
        await entering
    # What makes no sense to stats_svc would make none in a hello.
    refused = asyncio.create_task(client.ask(enter(3)))
    await first.answer((await first.batch()).sequence, 3, verdict=INVALID)
    with pytest.raises(NotNow):
        await refused
    reserve = pb.ReserveName(module="xfs")
    asked = [
        asyncio.create_task(client.ask(pb.Operation(call_id=1, system="default", finish_call=pb.FinishCall()))),
        asyncio.create_task(client.ask(pb.Operation(call_id=2, system="default", reserve_name=reserve))),
    ]
    ending = await first.batch()
    first.ended.set()
    second = await servicer.stream()
    assert list((await second.hello()).calls) == [
        pb.CallInFlight(system="default", call_id=1, inode="inode 1", finish_sequence=ending.sequence),
        pb.CallInFlight(system="default", call_id=2, inode="inode 2"),
    ]
    await second.welcome(ending.sequence)
    answered: set[int] = set()
    while answered != {1, 2}:
        again = await second.batch()
        call_ids = [operation.call_id for operation in again.operations]
        await second.answer(again.sequence, *call_ids)
        answered.update(call_ids)
    await asyncio.gather(*asked)
    third = asyncio.create_task(client.ask(enter(4)))
    await second.batch()
    second.ended.set()
    # Once it was told so the first one is over; of the third nobody has heard.
    last = await servicer.stream()
    assert list((await last.hello()).calls) == [
        pb.CallInFlight(system="default", call_id=2, inode="inode 2", module="xfs")
    ]
    third.cancel()


async def test_what_only_waits_for_others_holds_up_nothing_when_it_is_asked_again(
    stats: tuple[StatsSvc, LedgerClient],
) -> None:
    servicer, client = stats
    first = await servicer.stream()
    await first.hello()
    await first.welcome(0)
    check = pb.Operation(call_id=1, system="default", check_name=pb.CheckName(module="xfs"))
    checking = asyncio.create_task(client.ask(check))
    assert (await first.batch()).sequence == 1
    first.ended.set()
    second = await servicer.stream()
    await second.hello()
    await second.welcome(1)
    assert (await second.batch()).sequence == 1
    removing = asyncio.create_task(client.ask(remove(2)))
    assert (await second.batch()).sequence == 2
    await second.answer(2, 1, 2)
    await asyncio.gather(checking, removing)


async def test_what_an_answer_leads_to_leaves_with_what_has_gathered(stats: tuple[StatsSvc, LedgerClient]) -> None:
    """One caller who is a step behind must not cost a batch of his own, and a commit, at each step of the others."""
    servicer, client = stats
    stream = await servicer.welcomed()

    async def remove_twice() -> None:
        await client.ask(remove(1))
        await client.ask(remove(3))

    first = asyncio.create_task(remove_twice())
    assert [operation.call_id for operation in (await stream.batch()).operations] == [1]
    behind = asyncio.create_task(client.ask(remove(2)))
    for _ in range(3):
        await asyncio.sleep(0)  # it is asked, and waits for the batch before to be answered
    await stream.answer(1, 1)
    assert sorted(operation.call_id for operation in (await stream.batch()).operations) == [2, 3]
    await stream.answer(2, 2, 3)
    await asyncio.gather(first, behind)


async def test_what_is_too_long_to_be_said_is_refused_to_who_asks_it(stats: tuple[StatsSvc, LedgerClient]) -> None:
    servicer, client = stats
    stream = await servicer.stream()
    await stream.hello()
    await stream.welcome(0, message_limit_bytes=1000)
    await client.wait_connected()
    finding = pb.Operation(call_id=1, system="default", find_symbols=pb.FindSymbols(symbols=["x" * 1000]))
    with pytest.raises(OverLimit, match=r"10\d\d bytes, is too long for the message_limit of stats_svc at"):
        await client.ask(finding)
    entering = asyncio.create_task(client.ask(enter(2)))
    assert [operation.call_id for operation in (await stream.batch()).operations] == [2]
    await stream.answer(1, 2)
    await entering


async def test_what_the_loaders_token_is_not_for_forbidden(stats: tuple[StatsSvc, LedgerClient]) -> None:
    servicer, client = stats
    stream = await servicer.welcomed()
    entering = asyncio.create_task(client.ask(enter(1)))
    await stream.batch()
    result = pb.OperationResult(call_id=1, verdict=INVALID, forbidden=True, message="not this one")
    await stream.results(pb.ResultBatch(applied_sequence=1, results=[result]))
    with pytest.raises(Forbidden, match="not this one"):
        await entering


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED])
@pytest.mark.parametrize("is_welcomed", [False, True])
async def test_what_is_refused_for_what_it_says_is_not_said_again(
    stats: tuple[StatsSvc, LedgerClient], code: grpc.StatusCode, is_welcomed: bool
) -> None:
    """Else the loader would say it for ever, and nobody's calls would go on."""
    servicer, client = stats
    stream = await servicer.welcomed()
    entering = asyncio.create_task(client.ask(enter(client.new_call_id())))
    await stream.batch()
    await stream.answer(1, 1)
    await entering
    checking = asyncio.create_task(
        client.ask(pb.Operation(call_id=1, system="default", check_name=pb.CheckName(module="xfs")))
    )
    await stream.batch()
    if not is_welcomed:
        stream.ended.set()
        stream = await servicer.stream()
        assert [call.call_id for call in (await stream.hello()).calls] == [1]
    stream.end(code, "no")
    with pytest.raises(Unavailable, match="the call is lost, and not counted: no"):
        await checking
    again = await servicer.stream()
    hello = await again.hello()
    assert (hello.instance_id, list(hello.calls), list(hello.former_instance_ids)) == ("two", [], ["one"])
    await again.welcome(0)
    second = client.new_call_id()
    entering = asyncio.create_task(client.ask(enter(second)))
    batch = await again.batch()
    assert (batch.sequence, [operation.call_id for operation in batch.operations]) == (1, [second])
    await again.answer(1, second)
    await entering


async def test_who_is_not_let_in_keeps_what_is_in_flight(stats: tuple[StatsSvc, LedgerClient]) -> None:
    servicer, client = stats
    stream = await servicer.welcomed()
    entering = asyncio.create_task(client.ask(enter(1)))
    await stream.batch()
    stream.end(grpc.StatusCode.PERMISSION_DENIED, "not this token")
    again = await servicer.stream()
    assert (await again.hello()).instance_id == "one"
    await again.welcome(0)
    assert (await again.batch()).sequence == 1
    await again.answer(1, 1)
    await entering
