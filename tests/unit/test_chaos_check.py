"""What ``chaos`` calls lost, doubled and wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chaos.check import Books, findings
from chaos.diary import Diary, Entry, StormEntry
from modpressure.v1 import call_pb2
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.stats_service_pb2 import FailedModule, LoadedModule, MemoryAmounts, OriginStats, Stats, System


def a_call(call_id: int, outcome: call_pb2.Outcome.ValueType, errno: str = "", worker: str = "") -> call_pb2.Call:
    return call_pb2.Call(
        event_id=call_id,
        instance_id="loader",
        call_id=call_id,
        module="crc16",
        outcome=outcome,
        errno=errno,
        duplicate=errno == "EEXIST",
        request_id=f"request-{call_id}",
        worker=worker,
        image_bytes=100,
        mod_bytes=4096,
        text_bytes=2048,
        origin=call_pb2.ORIGIN_USERSPACE,
    )


LIVE = a_call(1, call_pb2.OUTCOME_LIVE)
DUPLICATE = a_call(2, call_pb2.OUTCOME_BECOMING, "EEXIST", "worker-100")
UNLOAD = call_pb2.Unload(event_id=3, instance_id="loader", call_id=3, module="crc16", worker="worker-100")


def diary() -> Diary:
    """One load, one unload and one storm that were answered, and a load that was not."""
    return Diary(
        [
            Entry(pb.LoadModuleRequest(), answer=pb.LoadModuleResponse(call=LIVE)),
            Entry(pb.UnloadModuleRequest(), answer=pb.UnloadModuleResponse(unload=UNLOAD)),
            Entry(pb.LoadModuleRequest()),
        ],
        [
            StormEntry(
                pb.Storm(workers=1, first_worker=100),
                summary=pb.StormSummary(
                    unloads=1,
                    outcomes=[pb.OutcomeCount(outcome=call_pb2.OUTCOME_BECOMING, errno="EEXIST", count=1)],
                ),
            )
        ],
    )


def books() -> Books:
    """What goes with it."""
    return Books(
        events=[
            call_pb2.Event(event_id=1, call=LIVE),
            call_pb2.Event(event_id=2, call=DUPLICATE),
            call_pb2.Event(event_id=3, unload=UNLOAD),
        ],
        stats=Stats(
            modcount=1,
            total_mod_size=4096,
            total_text_size=2048,
            failed_becoming=1,
            invalid_becoming_bytes=100,
            calls=2,
            duplicates=1,
            unloads=1,
            events=3,
            origins=[OriginStats(origin=call_pb2.ORIGIN_USERSPACE, calls=2)],
        ),
        failed=[FailedModule(module="crc16", count=1)],
        modules=[],
        system=System(id="default"),
    )


def test_what_agrees_is_left_alone() -> None:
    assert findings(diary(), books()) == []


def lose_the_load(books: Books) -> None:
    del books.events[0]  # type: ignore[attr-defined]


def lose_the_unload(books: Books) -> None:
    del books.events[2]  # type: ignore[attr-defined]


def lose_the_storms_call(books: Books) -> None:
    del books.events[1]  # type: ignore[attr-defined]


def count_a_call_twice(books: Books) -> None:
    books.events.append(call_pb2.Event(event_id=4, call=DUPLICATE))  # type: ignore[attr-defined]


def count_calls_after_the_end(books: Books) -> None:
    for event_id in (4, 5):
        late = call_pb2.Call()
        late.CopyFrom(DUPLICATE)
        late.call_id, late.request_id = event_id, ""
        books.events.append(call_pb2.Event(event_id=event_id, call=late))  # type: ignore[attr-defined]


def test_a_worker_that_could_not_go_on_may_have_made_one_call_that_its_storm_does_not_know() -> None:
    written, changed = diary(), books()
    summary = written.storms[0].summary
    assert summary is not None
    count_calls_after_the_end(changed)
    for errors, is_told in ((0, True), (1, True), (2, False)):
        summary.errors, summary.stopped = errors, True
        doubled = [finding for finding in findings(written, changed) if finding.kind == "doubled"]
        assert bool(doubled) is is_told


def test_the_unload_after_the_call_that_its_storm_does_not_know_is_not_known_either() -> None:
    written, changed = diary(), books()
    summary = written.storms[0].summary
    assert summary is not None
    summary.errors, summary.stopped = 2, True
    count_calls_after_the_end(changed)
    for event_id, is_told in ((6, False), (7, False), (8, True)):
        unload = call_pb2.Unload(call_id=event_id, module="xfs", worker=DUPLICATE.worker)
        changed.events.append(call_pb2.Event(event_id=event_id, unload=unload))  # type: ignore[attr-defined]
        assert any("of the storm that ended" in finding.sentence for finding in findings(written, changed)) is is_told


def count_a_request_twice(books: Books) -> None:
    again = call_pb2.Call()
    again.CopyFrom(DUPLICATE)
    again.call_id, again.worker = 9, ""
    books.events.append(call_pb2.Event(event_id=4, call=again))  # type: ignore[attr-defined]


def unload_twice(books: Books) -> None:
    again = call_pb2.Unload(event_id=4, instance_id="loader", call_id=9, module="crc16")
    books.events.append(call_pb2.Event(event_id=4, unload=again))  # type: ignore[attr-defined]


def change_the_event(books: Books) -> None:
    books.events[0].call.mod_bytes = 8192


def miscount(books: Books) -> None:
    books.stats.modcount = 2


def miscount_an_origin(books: Books) -> None:
    books.stats.origins[0].calls = 3


def miscount_a_failed_module(books: Books) -> None:
    books.failed[0].count = 2


def leave_it_listed(books: Books) -> None:
    books.modules.append(LoadedModule(module="crc16", state=LoadedModule.STATE_LIVE))  # type: ignore[attr-defined]


def leave_memory_taken(books: Books) -> None:
    books.system.taken.CopyFrom(MemoryAmounts(memory_bytes=4096))


def test_a_second_answer_that_differs_is_found() -> None:
    written = diary()
    written.entries[0].other_answer = pb.LoadModuleResponse(call=LIVE)
    written.entries[1].other_answer = pb.UnloadModuleResponse(unload=UNLOAD)
    assert findings(written, books()) == []
    written.entries[0].other_answer = pb.LoadModuleResponse(call=DUPLICATE)
    [finding] = findings(written, books())
    assert (finding.kind, finding.sentence.startswith("asked again")) == ("wrong", True)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lose_the_load, "lost"),
        (lose_the_unload, "lost"),
        (lose_the_storms_call, "lost"),
        (count_a_call_twice, "doubled"),
        (count_a_request_twice, "doubled"),
        (unload_twice, "doubled"),
        (change_the_event, "wrong"),
        (miscount, "wrong"),
        (miscount_an_origin, "wrong"),
        (miscount_a_failed_module, "wrong"),
        (leave_it_listed, "wrong"),
        (leave_memory_taken, "wrong"),
    ],
)
def test_what_does_not_agree_is_found(change: Callable[[Books], None], kind: str) -> None:
    changed = books()
    change(changed)
    assert kind in {finding.kind for finding in findings(diary(), changed)}
