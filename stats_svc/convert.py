"""Between rows and messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Final

from modpressure.errors import BadRequest
from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.modules_list import State
from modpressure.kernel.report import ReportFormat
from modpressure.kernel.requesters import Origin, Requester, Tally
from modpressure.kernel.system_memory import Amounts
from modpressure.v1 import call_pb2, stats_service_pb2
from stats_svc.rows import ModuleRow, SystemRow
from stats_svc.systems import DEFAULT_POLICY


def stats_to_proto(
    row: SystemRow,
    requesters: Mapping[Requester, Tally],
    *,
    held_bytes: int,
    peak_held_bytes: int,
    loaders: int,
    waiting_calls: int,
    module_requests: tuple[int, int],
) -> stats_service_pb2.Stats:
    """Return the counters of a system, with what the connected loaders hold.

    ``module_requests`` are the kernel's own in flight, and those of them that wait.
    """
    stats = stats_service_pb2.Stats(
        system=row.id,
        virtual_mem_wasted_bytes=row.counters.virtual_mem_wasted_bytes,
        events=row.next_event_id - 1,
        live_modules=row.live_modules,
        held_bytes=held_bytes,
        peak_held_bytes=max(row.peak_held_bytes, peak_held_bytes),
        loaders=loaders,
        waiting_calls=waiting_calls,
        module_requests=module_requests[0],
        waiting_requests=module_requests[1],
    )
    for name in COUNTER_NAMES:
        setattr(stats, name, getattr(row.counters, name))
    if row.update_time_ns:
        stats.update_time.FromNanoseconds(row.update_time_ns)
    stats.origins.extend(_origins_to_proto(requesters))
    return stats


def _origins_to_proto(requesters: Mapping[Requester, Tally]) -> Iterator[stats_service_pb2.OriginStats]:
    """Yield what each origin's calls came to, and its requesters' calls: the most wasteful first."""

    def rank(item: tuple[Requester, Tally]) -> tuple[int, int, str]:
        return -item[1].wasted_bytes, -item[1].calls, item[0].label

    for origin in Origin:
        own = sorted(((who, tally) for who, tally in requesters.items() if who.origin == origin), key=rank)
        if not own:
            continue
        whole = Tally()
        for _, tally in own:
            whole.add(tally)
        yield stats_service_pb2.OriginStats(
            origin=call_pb2.Origin.ValueType(origin),
            **asdict(whole),
            requesters=[stats_service_pb2.RequesterStats(requester=who.label, **asdict(tally)) for who, tally in own],
        )


def counters_from_proto(stats: stats_service_pb2.Stats) -> Counters:
    """Return the counters that ``stats`` carries."""
    return Counters(**{name: getattr(stats, name) for name in COUNTER_NAMES})


NOTHING_TAKEN: Final = (Amounts(), Amounts())


def system_to_proto(row: SystemRow, taken: tuple[Amounts, Amounts] | None) -> stats_service_pb2.System:
    """Return a system, with what is ``taken`` of its memory now and at most, if that is finite; None if unknown."""
    system = stats_service_pb2.System(id=row.id, policy=call_pb2.Policy.ValueType(row.policy))
    system.create_time.FromNanoseconds(row.create_time_ns)
    if row.reset_time_ns:
        system.reset_time.FromNanoseconds(row.reset_time_ns)
    if row.limits is not None:
        now, peak = taken or (None, row.peak_taken)
        for message, amounts in ((system.limits, row.limits), (system.taken, now), (system.peak_taken, peak)):
            if amounts is not None:
                message.CopyFrom(stats_service_pb2.MemoryAmounts(**amounts._asdict()))
    return system


def limits_from_proto(system: stats_service_pb2.System) -> Amounts | None:
    """Return the limits that a new system gets, None for none. BadRequest if one is no number of bytes."""
    limits = Amounts(*(getattr(system.limits, name) for name in Amounts._fields))
    for name, value in limits._asdict().items():
        if value < 0:
            raise BadRequest(f"{name} {value} is negative", field=f"system.limits.{name}")
    return limits if any(limits) else None


def failed_module_to_proto(failed: FailedModule) -> stats_service_pb2.FailedModule:
    """Return a name that was a duplicate."""
    return stats_service_pb2.FailedModule(
        module=failed.module,
        count=failed.count,
        becoming_count=failed.becoming_count,
        load_count=failed.load_count,
        reason=failed.reason,
        wasted_bytes=failed.wasted_bytes,
    )


def loaded_module_to_proto(row: ModuleRow, users: list[str]) -> stats_service_pb2.LoadedModule:
    """Return an entry of the modules list, which ``users`` use."""
    return stats_service_pb2.LoadedModule(
        module=row.name,
        state=stats_service_pb2.LoadedModule.State.ValueType(row.state),
        core_bytes=row.core_bytes,
        loader=row.loader,
        # Whoever loads it holds it until its init function has returned (module_unload_init, kernel/module/main.c).
        references=len(users) + (row.state == State.COMING),
        used_by=users,
    )


def policy_from_proto(number: int) -> int:
    """Return the policy that a new system gets. BadRequest if there is none of that number."""
    if number not in call_pb2.Policy.values():
        raise BadRequest(f"there is no policy number {number}", field="system.policy")
    return number or DEFAULT_POLICY


def report_format_from_proto(number: int) -> ReportFormat:
    """Return the format of a report. BadRequest if there is none of that number."""
    if number == stats_service_pb2.REPORT_FORMAT_UNSPECIFIED:
        return ReportFormat.RFC
    try:
        return ReportFormat(number)
    except ValueError:
        raise BadRequest(f"there is no report format number {number}", field="format") from None


def outcomes_from_proto(numbers: list[int]) -> frozenset[int]:
    """Return the outcomes that are asked for. BadRequest names one that there is not."""
    for number in numbers:
        if number == call_pb2.OUTCOME_UNSPECIFIED or number not in call_pb2.Outcome.values():
            raise BadRequest(f"there is no outcome number {number}", field="outcomes")
    return frozenset(numbers)
