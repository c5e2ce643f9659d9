"""Whose turn it is."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from loader_svc.outbox import ENVELOPE_BYTES, MAX_BATCH_OPERATIONS, Outbox
from modpressure.fair import FLOW, FairQueue, FairThreads, Flow
from modpressure.limits import PARSED_FACTOR
from modpressure.parsed_size import shape_of
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb

FLOWS = st.builds(Flow, st.sampled_from(["a", "b", "c"]), st.integers(0, 3))


def test_clients_take_turns_and_so_do_their_streams() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.put(f"a1-{number}", Flow("a", 1))
    queue.put("a2-0", Flow("a", 2))
    queue.put("b0-0", Flow("b"))
    queue.put("b0-1", Flow("b"))
    assert [queue.pop() for _ in range(len(queue))] == ["a1-0", "b0-0", "a2-0", "b0-1", "a1-1", "a1-2", "a1-3"]
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.one_of(FLOWS, st.none()), max_size=200))
def test_nobody_waits_for_more_than_one_of_each_other_client(asked: list[Flow | None]) -> None:
    queue: FairQueue[tuple[Flow, int]] = FairQueue()
    held: dict[Flow, list[int]] = {}
    served_since: Counter[tuple[str, str]] = Counter()
    for number, flow in enumerate(asked):
        if flow is not None:
            queue.put((flow, number), flow)
            held.setdefault(flow, []).append(number)
        elif len(queue):
            got, item = queue.pop()
            # In order within a flow.
            assert held[got].pop(0) == item
            waiting = {flow.client for flow, items in held.items() if items} - {got.client}
            for client in waiting:
                served_since[client, got.client] += 1
                assert served_since[client, got.client] <= 2, "it was passed over twice by the same client"
            for key in [key for key in served_since if key[0] == got.client or key[0] not in waiting]:
                del served_since[key]
        assert len(queue) == sum(map(len, held.values()))


def test_a_batch_has_some_of_everybody() -> None:
    outbox = Outbox()
    for call_id in range(5 * MAX_BATCH_OPERATIONS):
        outbox.put(pb.Operation(call_id=call_id), Flow("many", 1))
    outbox.put(pb.Operation(call_id=1_000_000), Flow("one"))
    batch = outbox.take()
    assert len(batch) == MAX_BATCH_OPERATIONS
    assert [operation.call_id for operation in batch[:3]] == [0, 1_000_000, 1]


def test_a_batch_is_no_longer_than_may_be_said_at_once() -> None:
    outbox = Outbox()
    for call_id in range(10):
        outbox.put(pb.Operation(call_id=call_id, check_name=pb.CheckName(module="x" * 100)), Flow("a"))
    outbox.put(pb.Operation(call_id=10, check_name=pb.CheckName(module="x" * 1000)), Flow("a"))
    lengths = []
    while outbox:
        lengths.append(len(outbox.take(6500)))
    assert lengths == [4, 4, 2, 1]


@pytest.mark.parametrize(
    "operation",
    [
        pb.Operation(call_id=1, open_system=pb.OpenSystem()),
        pb.Operation(call_id=1, reserve_name=pb.ReserveName(module="x", symbols=[f"{n:x}" for n in range(500)])),
        pb.Operation(
            call_id=1,
            form_module=pb.FormModule(
                module="x", formation=pb.Formation(exports=b"x", uses=[pb.Use(module="y", position=1)] * 50)
            ),
        ),
        pb.Operation(
            call_id=1, finish_call=pb.FinishCall(call=call_pb2.Call(worker="w", start_time=Timestamp(nanos=1)))
        ),
        pb.Operation(call_id=1, record_calls=pb.RecordCalls(calls=[call_pb2.Call(start_time=Timestamp(nanos=1))])),
    ],
    ids=lambda operation: operation.WhichOneof("kind"),
)
def test_a_batch_is_no_more_than_stats_svc_will_parse(operation: pb.Operation) -> None:
    limit_bytes = 64 * 1024
    outbox = Outbox()
    for _ in range(MAX_BATCH_OPERATIONS):
        outbox.put(operation, Flow("a"))
    shape = shape_of(pb.ConnectRequest.DESCRIPTOR)
    while outbox:
        batch = pb.OperationBatch(sequence=1 << 60, operations=outbox.take(limit_bytes - ENVELOPE_BYTES))
        message = pb.ConnectRequest(batch=batch).SerializeToString()
        assert len(message) <= limit_bytes
        assert shape.parsed_bytes(message, 1 << 30) <= PARSED_FACTOR * limit_bytes


def test_a_signal_stays_behind_the_operation_that_it_ends() -> None:
    outbox = Outbox()
    flow = Flow("a", 3)
    outbox.put(pb.Operation(call_id=7, check_name=pb.CheckName(module="x")), flow)
    outbox.put(pb.Operation(call_id=8, check_name=pb.CheckName(module="y")), Flow("b"))
    outbox.put(pb.Operation(call_id=7, interrupt=pb.Interrupt()), flow)
    kinds = [operation.WhichOneof("kind") for operation in outbox.take() if operation.call_id == 7]
    assert kinds == ["check_name", "interrupt"]


async def test_work_of_one_client_does_not_wait_for_all_of_anothers() -> None:
    threads = FairThreads(1, "test")
    begin = threading.Event()
    order: list[str] = []

    async def ask(client: str, times: int) -> list[asyncio.Task[None]]:
        FLOW.set(Flow(client))
        return [asyncio.ensure_future(threads.run(lambda: order.append(client))) for _ in range(times)]

    first = asyncio.ensure_future(threads.run(begin.wait))
    many = await asyncio.create_task(ask("many", 100))
    few = await asyncio.create_task(ask("few", 2))
    # All of them have run up to where they wait.
    await asyncio.sleep(0)
    begin.set()
    await asyncio.gather(first, *many, *few)
    assert order[:4] == ["many", "few", "many", "few"]
    assert order.count("many") == 100
    threads.shutdown()


async def test_who_no_longer_waits_has_nothing_run_and_errors_come_back() -> None:
    threads = FairThreads(1, "test")
    begin = threading.Event()
    ran: list[int] = []
    first = asyncio.ensure_future(threads.run(begin.wait))
    gone = asyncio.ensure_future(threads.run(lambda: ran.append(1)))
    failing = asyncio.ensure_future(threads.run(lambda: ran.index(5), small=True))
    await asyncio.sleep(0)
    gone.cancel()
    begin.set()
    await first
    with pytest.raises(ValueError, match="5 is not in list"):
        await failing
    assert ran == []
    with pytest.raises(asyncio.CancelledError):
        await gone
    threads.shutdown()


async def test_small_pieces_go_together() -> None:
    threads = FairThreads(2, "test")
    names: list[str] = []
    pieces = [threads.run(lambda: names.append(threading.current_thread().name), small=True) for _ in range(200)]
    await asyncio.gather(*pieces)
    assert len(names) == 200
    assert len(set(names)) == 1
    threads.shutdown()


@given(st.lists(FLOWS, max_size=MAX_BATCH_OPERATIONS))
def test_what_fits_into_a_batch_leaves_at_once_and_in_order_within_a_flow(flows: list[Flow]) -> None:
    outbox = Outbox()
    for call_id, flow in enumerate(flows):
        outbox.put(pb.Operation(call_id=call_id), flow)
    taken = [operation.call_id for operation in outbox.take()]
    assert sorted(taken) == list(range(len(flows)))
    for flow in set(flows):
        assert [n for n in taken if flows[n] == flow] == [n for n, other in enumerate(flows) if other == flow]
    assert not outbox and outbox.take() == []
