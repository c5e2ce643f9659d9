"""What waits to be sent to a loader: in order, and in messages that it takes."""

from __future__ import annotations

from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.session import MAX_MESSAGE_BYTES, Instance, Session


def answers(first: int, count: int, *, value_bytes: int = 0, applied_sequence: int) -> pb.ResultBatch:
    results = [pb.OperationResult(call_id=first + n, value="x" * value_bytes) for n in range(count)]
    return pb.ResultBatch(applied_sequence=applied_sequence, results=results)


async def read_all(session: Session) -> list[pb.ResultBatch]:
    session.finish()
    messages = []
    while (message := await session.next_results()) is not None:
        messages.append(message)
    return messages


def call_ids(messages: list[pb.ResultBatch]) -> list[int]:
    return [result.call_id for message in messages for result in message.results]


async def test_answers_that_are_not_read_gather_in_messages_of_bounded_length() -> None:
    session = Session(Instance("i", "l"), strict=True)
    for number in range(50):
        session.deliver(answers(10 * number, 10, value_bytes=10_000, applied_sequence=number + 1))
    messages = await read_all(session)
    assert call_ids(messages) == list(range(500))
    assert all(message.ByteSize() <= MAX_MESSAGE_BYTES for message in messages)
    assert 5 <= len(messages) <= 10
    assert messages[-1].applied_sequence == 50


async def test_one_group_with_too_much_for_a_message_says_last_that_it_is_applied() -> None:
    session = Session(Instance("i", "l"), strict=True)
    session.deliver(answers(0, 3, applied_sequence=1))
    long = answers(3, 500, value_bytes=10_000, applied_sequence=2)
    long.released_call_ids.append(7)
    session.deliver(long)
    session.deliver(answers(503, 2, applied_sequence=3))
    messages = await read_all(session)
    assert call_ids(messages) == list(range(505))
    assert all(message.ByteSize() <= MAX_MESSAGE_BYTES for message in messages)
    # A loader that has heard that a batch is applied has heard all that its answers say.
    applied = [message.applied_sequence for message in messages]
    heard = [call_ids(messages[: n + 1])[-1] for n in range(len(messages))]
    assert all(last >= {1: 2, 2: 502, 3: 504}[sequence] for sequence, last in zip(applied, heard, strict=True))
    released = [message for message in messages if message.released_call_ids]
    # And what is released was answered by then.
    assert [(message.applied_sequence, call_ids([message])[-1]) for message in released] == [(2, 502)]
    assert applied == sorted(applied)


async def test_an_answer_that_is_too_long_by_itself_is_a_message_of_its_own() -> None:
    session = Session(Instance("i", "l"), strict=True)
    session.deliver(answers(1, 2, value_bytes=2 * MAX_MESSAGE_BYTES, applied_sequence=1))
    messages = await read_all(session)
    assert [len(message.results) for message in messages if message.results] == [1, 1]
    assert (messages[0].applied_sequence, messages[-1].applied_sequence) == (0, 1)
