"""What messages take in memory, as told from their bytes: for what is legal, what is not, and what is no message."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from fuzz.messages import Dice, Maker
from fuzz.wire import damaged, varint
from loader_svc.outbox import MAX_BATCH_BYTES
from modpressure.limits import DEFAULT_LIMITS
from modpressure.parsed_size import NotWire, shape_of
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as ledger_pb
from modpressure.v1 import loader_service_pb2 as loader_pb
from modpressure.v1 import stats_service_pb2 as stats_pb
from stats_svc.ledger_servicer import MAX_BATCH_OPERATIONS
from stats_svc.names import MAX_CALLS_IN_FLIGHT, MAX_LIVE_CALLS

SEED = 1
MOST = DEFAULT_LIMITS.parsed_bytes
REQUESTS: list[Any] = [
    method.input_type
    for file in (ledger_pb, loader_pb, stats_pb)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


def part(number: int, content: bytes = b"") -> bytes:
    """Return a field with a content on the wire."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def batch(operation: bytes) -> bytes:
    return part(2, part(2, operation))


N = 50_000
MANY: dict[str, tuple[Any, bytes]] = {
    "operations": (ledger_pb.ConnectRequest, part(2, part(2) * N)),
    "operations that record": (ledger_pb.ConnectRequest, part(2, part(2, part(9, part(1))) * N)),
    "calls": (ledger_pb.ConnectRequest, batch(part(9, part(1, part(28)) * N))),
    "another kind each time": (ledger_pb.ConnectRequest, batch((part(3) + part(6, part(1))) * N)),
    "symbols": (ledger_pb.ConnectRequest, batch(part(5, part(2) * N))),
    "arrays of one number": (ledger_pb.ConnectRequest, part(2, part(2, part(12, part(2, b"\1"))) * N)),
    "packed numbers": (ledger_pb.ConnectRequest, part(1, part(4, b"\1" * 8 * N))),
    "numbers": (ledger_pb.ConnectRequest, part(1, b"\x20\1" * 8 * N)),
    "requests": (loader_pb.LoadModulesRequest, part(1, part(2)) * N),
}

PARSE = """
import json, sys
from tests.unit.test_parsed_size import MANY
kept, taken = [], {}
for name, (kind, message) in MANY.items():
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
    before = resident()
    kept.append(kind.FromString(message))
    taken[name] = resident() - before
print(json.dumps(taken))
"""


def test_a_message_takes_no_more_than_is_told() -> None:
    """In a process that does nothing else."""
    parsed = subprocess.run([sys.executable, "-c", PARSE], capture_output=True, text=True, check=True)
    for name, taken_bytes in json.loads(parsed.stdout).items():
        kind, message = MANY[name]
        told_bytes = shape_of(kind.DESCRIPTOR).parsed_bytes(message, 1 << 40)
        assert taken_bytes <= told_bytes, name


def full_call() -> call_pb2.Call:
    texts = {field.name: "x" * 20 for field in call_pb2.Call.DESCRIPTOR.fields if field.type == field.TYPE_STRING}
    return call_pb2.Call(start_time=Timestamp(seconds=1 << 30, nanos=1), duration_ns=1 << 40, **texts)


def longest_hello() -> ledger_pb.Hello:
    calls = [ledger_pb.CallInFlight(system="default", call_id=1 << 30, inode="tree:minix.ko:0", module="minix")]
    return ledger_pb.Hello(calls=calls * MAX_CALLS_IN_FLIGHT, live_call_ids=[1 << 30] * MAX_LIVE_CALLS)


def most_calls() -> ledger_pb.OperationBatch:
    finish = ledger_pb.FinishCall(call=full_call(), core_bytes=1, reserved=True, formed=True, claim=1, part="x")
    operation = ledger_pb.Operation(call_id=1 << 30, system="default", finish_call=finish)
    return ledger_pb.OperationBatch(operations=[operation] * MAX_BATCH_OPERATIONS)


def most_symbols() -> ledger_pb.OperationBatch:
    """One operation more than fits, as the outbox sends them, with symbols that are rather short."""
    reserve = ledger_pb.ReserveName(module="x", symbols=["x" * 14] * (MAX_BATCH_BYTES // 8 // 16))
    return ledger_pb.OperationBatch(operations=[ledger_pb.Operation(call_id=1, reserve_name=reserve)] * 9)


@pytest.mark.parametrize(
    "said",
    [
        lambda: ledger_pb.ConnectRequest(hello=longest_hello()),
        lambda: ledger_pb.ConnectRequest(batch=most_calls()),
        lambda: ledger_pb.ConnectRequest(batch=most_symbols()),
    ],
    ids=["hello", "calls", "symbols"],
)
def test_what_is_legal_takes_at_most_three_quarters_of_what_it_may(said: Any) -> None:
    message = said()
    encoded = message.SerializeToString()
    assert len(encoded) < DEFAULT_LIMITS.message_bytes
    assert shape_of(message.DESCRIPTOR).parsed_bytes(encoded, MOST) <= MOST * 3 // 4


def empties(descriptor: Any) -> bytes:
    """Return a message with one empty element of what may be repeated in it; empty if nothing may."""
    for field in descriptor.fields:
        if field.is_repeated:
            return part(field.number)
        if field.message_type is not None and (inner := empties(field.message_type)):
            return part(field.number, inner)
    return b""


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda descriptor: descriptor.name)
def test_a_message_that_is_shorter_than_is_looked_at_never_takes_too_much(request_type: Any) -> None:
    shape, most_bytes = shape_of(request_type), 100_000
    shortest = shape.shortest_with(most_bytes)
    repeated = empties(request_type)
    if repeated:
        count = shortest // len(repeated)
        assert shape.parsed_bytes(repeated * count, 1 << 40) <= most_bytes + shape.message_bytes
        with_many = repeated * (most_bytes // 16)
        assert shape.parsed_bytes(with_many, most_bytes) > most_bytes
    for name, (kind, message) in MANY.items():
        if kind.DESCRIPTOR is request_type:
            assert shape.parsed_bytes(message, MOST // 32) > MOST // 32, name


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda descriptor: descriptor.name)
def test_whatever_can_be_parsed_can_be_walked(request_type: Any) -> None:
    kind: Any = next(
        getattr(file, request_type.name)
        for file in (ledger_pb, loader_pb, stats_pb)
        if request_type.name in file.DESCRIPTOR.message_types_by_name
    )
    shape, parsed = shape_of(request_type), 0
    for number in range(400):
        dice = Dice(f"{SEED} {request_type.name} {number}")
        one, other = (Maker(dice).message(request_type, 0.1) for _ in range(2))
        for message in (one, damaged(one, other, dice), dice.randbytes(dice.below(20))):
            try:
                kind.FromString(message)
            except DecodeError:
                continue
            parsed += 1
            try:
                told_bytes = shape.parsed_bytes(message, 1 << 40)
            except NotWire:
                raise AssertionError(f"seed {SEED}, message {number}: {message[:200].hex()} can be parsed") from None
            assert told_bytes >= shape.message_bytes
    assert parsed > 400


@pytest.mark.parametrize(
    "message",
    [
        b"\x12\x05abc",
        b"\x12",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x08",
        b"\x0f",
        b"\x0c",
        b"\x0b",
        b"\x0b" * 200 + b"\x0c" * 200,
        b"\x12\x02\x12\x05abcde",
        b"\x09abc",
    ],
    ids=lambda message: message[:12].hex(),
)
def test_what_can_not_be_walked_can_not_be_parsed(message: bytes) -> None:
    with pytest.raises(NotWire):
        shape_of(ledger_pb.ConnectRequest.DESCRIPTOR).parsed_bytes(message, 1 << 40)
    with pytest.raises(DecodeError):
        ledger_pb.ConnectRequest.FromString(message)
