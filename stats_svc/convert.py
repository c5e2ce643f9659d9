"""Between rows and messages."""

from __future__ import annotations

from modpressure.errors import BadRequest
from modpressure.kernel.counters import COUNTER_NAMES, Counters, FailedModule
from modpressure.kernel.report import ReportFormat
from modpressure.v1 import call_pb2, stats_service_pb2
from stats_svc.rows import ModuleRow, SystemRow
from stats_svc.state import DEFAULT_POLICY


def stats_to_proto(
    row: SystemRow, *, held_bytes: int, peak_held_bytes: int, loaders: int, waiting_calls: int
) -> stats_service_pb2.Stats:
    """Return the counters of a system, with what the connected loaders hold."""
    stats = stats_service_pb2.Stats(
        system=row.id,
        virtual_mem_wasted_bytes=row.counters.virtual_mem_wasted_bytes,
        events=row.next_event_id - 1,
        live_modules=row.live_modules,
        held_bytes=held_bytes,
        peak_held_bytes=max(row.peak_held_bytes, peak_held_bytes),
        loaders=loaders,
        waiting_calls=waiting_calls,
    )
    for name in COUNTER_NAMES:
        setattr(stats, name, getattr(row.counters, name))
    if row.update_time_ns:
        stats.update_time.FromNanoseconds(row.update_time_ns)
    return stats


def counters_from_proto(stats: stats_service_pb2.Stats) -> Counters:
    """Return the counters that ``stats`` carries."""
    return Counters(**{name: getattr(stats, name) for name in COUNTER_NAMES})


def system_to_proto(row: SystemRow) -> stats_service_pb2.System:
    """Return a system."""
    system = stats_service_pb2.System(id=row.id, policy=call_pb2.Policy.ValueType(row.policy))
    system.create_time.FromNanoseconds(row.create_time_ns)
    if row.reset_time_ns:
        system.reset_time.FromNanoseconds(row.reset_time_ns)
    return system


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


def loaded_module_to_proto(row: ModuleRow) -> stats_service_pb2.LoadedModule:
    """Return an entry of the modules list."""
    return stats_service_pb2.LoadedModule(
        module=row.name,
        state=stats_service_pb2.LoadedModule.State.ValueType(row.state),
        core_bytes=row.core_bytes,
        loader=row.loader,
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
