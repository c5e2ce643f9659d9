"""What events alone add up to, to hold counters against."""

from __future__ import annotations

from collections.abc import Iterable

from modpressure.kernel.counters import COUNTER_NAMES, Counters
from modpressure.v1 import call_pb2
from modpressure.v1.stats_service_pb2 import Stats


def recount(events: Iterable[call_pb2.Event]) -> Counters:
    """Return the counters of a system that had these events and no others."""
    counters = Counters()
    for event in events:
        call = event.call
        if event.HasField("unload"):
            counters.unloads += 1
        elif call.outcome == call_pb2.OUTCOME_ABANDONED:
            counters.abandoned_calls += 1
        else:
            counters.add_call(
                call.outcome,
                syscall=call.syscall,
                duplicate=call.duplicate,
                image_bytes=call.image_bytes,
                compressed_bytes=call.compressed_bytes,
                mod_bytes=call.mod_bytes,
                text_bytes=call.text_bytes,
            )
    return counters


def named(counters: Counters | Stats) -> dict[str, int]:
    """Return the value of each counter, whichever of the two says it."""
    return {name: getattr(counters, name) for name in COUNTER_NAMES}
