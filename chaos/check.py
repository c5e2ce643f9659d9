"""Holding what a stats_svc has counted against what clients were answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from chaos.diary import Diary, StormEntry
from modpressure.v1 import call_pb2
from modpressure.v1.stats_service_pb2 import FailedModule, LoadedModule, Stats, System
from tests.recount import named, recount

UNEXPECTED: Final = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS", "INVALID_ARGUMENT", "NOT_FOUND"})
"""Names of statuses that no fault accounts for."""


@dataclass(frozen=True)
class Finding:
    """Something that does not hold."""

    kind: Literal["lost", "doubled", "wrong"]
    """Lost: answered and not counted. Doubled: counted more than once. Wrong: counters and events do not agree."""

    sentence: str


@dataclass(frozen=True)
class Books:
    """What a stats_svc says of one system, at one moment."""

    events: Sequence[call_pb2.Event]
    stats: Stats
    failed: Sequence[FailedModule]
    modules: Sequence[LoadedModule]
    system: System


def findings(diary: Diary, books: Books) -> list[Finding]:
    """Compare; an empty list is what there should be."""
    return [
        *_answers(diary, books.events),
        *_storms(diary.storms, books.events),
        *_repeats(books.events),
        *_history(books),
        *_counters(books),
        *_memory(books),
    ]


def _answers(diary: Diary, events: Sequence[call_pb2.Event]) -> Iterator[Finding]:
    """Find what clients were told that is no event, or another one."""
    by_key = {(e.call.instance_id, e.call.call_id): e.call for e in events if e.HasField("call")}
    unloads = {(e.unload.instance_id, e.unload.call_id): e.unload for e in events if e.HasField("unload")}
    for attempt in diary.attempts():
        if attempt.status in UNEXPECTED:
            yield Finding("wrong", f"a client was told {attempt}")
    for entry in diary.entries:
        if entry.other_answer is not None and entry.other_answer != entry.answer:
            yield Finding("wrong", f"asked again, {_said(entry.answer)} became {_said(entry.other_answer)}")
        for call in entry.calls:
            counted = by_key.get((call.instance_id, call.call_id))
            if counted is None:
                yield Finding("lost", f"no event tells of the call that was answered: {_said(call)}")
            elif counted != call:
                yield Finding("wrong", f"the answer was {_said(call)}, and the event is {_said(counted)}")
        if (unload := entry.unload) is not None:
            found = unloads.get((unload.instance_id, unload.call_id))
            if found is None:
                yield Finding("lost", f"no event tells of the unload that was answered: {_said(unload)}")
            elif (found.module, found.event_id) != (unload.module, unload.event_id):
                yield Finding("wrong", f"the answer was {_said(unload)}, and the event is {_said(found)}")


def _storms(storms: Iterable[StormEntry], events: Sequence[call_pb2.Event]) -> Iterator[Finding]:
    """Find storms whose workers left other events than their summaries count."""
    for entry in storms:
        summary = entry.summary
        if summary is None:
            continue
        calls = Counter((e.call.outcome, e.call.errno) for e in events if e.call.worker in entry.workers)
        told = Counter({(o.outcome, o.errno): o.count for o in summary.outcomes})
        unloads = sum(e.HasField("unload") and e.unload.worker in entry.workers for e in events)
        if told - calls or summary.unloads > unloads:
            yield Finding("lost", f"events have {calls} and {unloads} unloads of the storm that ended {_said(summary)}")
        # A worker that could not go on may not have learnt how its last call ended, nor the unload that follows one.
        elif max((calls - told).total(), unloads - summary.unloads) > summary.errors:
            yield Finding(
                "doubled", f"events have {calls} and {unloads} unloads of the storm that ended {_said(summary)}"
            )


def _repeats(events: Sequence[call_pb2.Event]) -> Iterator[Finding]:
    """Find calls and requests that are there twice, and places in the log that are empty."""
    seen: Counter[tuple[object, ...]] = Counter()
    for number, event in enumerate(events, 1):
        if event.event_id != number:
            yield Finding("wrong", f"event {number} has the id {event.event_id}")
            break
    for event in events:
        what = event.call if event.HasField("call") else event.unload
        seen["call", what.instance_id, what.call_id] += 1
        # One that was abandoned may be carried out by the next loader that is asked.
        if what.request_id and not (event.HasField("call") and event.call.outcome == call_pb2.OUTCOME_ABANDONED):
            seen["request", what.request_id, what.module] += 1
    for key, count in seen.items():
        if count > 1:
            yield Finding("doubled", f"{count} events tell of the {' '.join(map(str, key))}")


def _history(books: Books) -> Iterator[Finding]:
    """Find what became live twice, or was unloaded twice; what is left must be the modules list."""
    live: set[str] = set()
    for event in books.events:
        if event.HasField("unload"):
            if event.unload.module not in live:
                yield Finding("doubled", f"unloaded though it was not live: {_said(event)}")
            live.discard(event.unload.module)
        elif event.call.outcome == call_pb2.OUTCOME_LIVE:
            if event.call.module in live:
                yield Finding("doubled", f"live once more: {_said(event)}")
            live.add(event.call.module)
    listed = {m.module for m in books.modules if m.state == LoadedModule.STATE_LIVE}
    if listed != live:
        yield Finding("wrong", f"the modules list has {sorted(listed)} live, the events {sorted(live)}")
    if books.stats.live_modules != len(live):
        yield Finding("wrong", f"{books.stats.live_modules} live modules are counted, the events leave {len(live)}")


def _counters(books: Books) -> Iterator[Finding]:
    """Find counters that are not what the events add up to."""
    failed: Counter[str] = Counter()
    calls: Counter[int] = Counter()
    for event in books.events:
        call = event.call
        if event.HasField("call") and call.outcome != call_pb2.OUTCOME_ABANDONED:
            calls[call.origin] += 1
            if call.duplicate and call.outcome in (call_pb2.OUTCOME_BECOMING, call_pb2.OUTCOME_LOAD):
                failed[call.module] += 1
    stats = books.stats
    told_values = named(stats)
    for name, value in named(recount(books.events)).items():
        if told_values[name] != value:
            yield Finding("wrong", f"{name} is {told_values[name]}, the events make {value}")
    if stats.events != len(books.events):
        yield Finding("wrong", f"{stats.events} events are counted, there are {len(books.events)}")
    told = Counter({origin.origin: origin.calls for origin in stats.origins})
    if told != calls:
        yield Finding("wrong", f"the calls of each origin are {told}, the events make {calls}")
    counted = Counter({module.module: module.count for module in books.failed})
    if counted != failed:
        yield Finding("wrong", f"duplicates are counted as {counted}, the events make {failed}")


def _memory(books: Books) -> Iterator[Finding]:
    """Find memory of a system with limits that is taken for nothing: at rest only live modules have some."""
    if books.system.HasField("taken"):
        taken_bytes = books.system.taken.memory_bytes
        core_bytes = sum(module.core_bytes for module in books.modules)
        if taken_bytes != core_bytes:
            yield Finding("wrong", f"{taken_bytes} bytes of memory are taken, live modules have {core_bytes}")


def _said(message: object) -> str:
    return "{" + " ".join(str(message).split()) + "}"
