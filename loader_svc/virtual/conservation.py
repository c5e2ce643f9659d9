"""What must hold of a simulated machine on which nothing is left to do, whatever was done on it."""

from __future__ import annotations

from loader_svc.virtual.machine import VirtualMachine
from modpressure.kernel.modules_list import State


def imbalances(machine: VirtualMachine) -> list[str]:
    """Return what does not add up, a sentence each; none if all is well. For after ``run``, in tests and sweeps."""
    counters, modules = machine.counters, list(machine.modules)
    found: list[str] = []

    def expect(what: str, value: int, expected: int) -> None:
        if value != expected:
            found.append(f"{what}: {value}, must be {expected}")

    expect("calls that have not ended", machine.calls_in_flight, 0)
    expect("calls that wait", machine.waiting, 0)
    expect("CPUs with a task", machine.cpus.busy, 0)
    expect("tasks that wait for a CPU", machine.cpus.queued, 0)
    expect("bytes of copies", machine.areas.copy_bytes, 0)
    expect("bytes held", machine.areas.held_bytes, sum(entry.core_bytes for entry in modules))
    expect("names that are not of live modules", sum(entry.state is not State.LIVE for entry in modules), 0)
    expect("modules linked but not in the list", len(set(machine.links) - {entry.name for entry in modules}), 0)
    failed = machine.failed_modules
    expect("late duplicates by name", sum(each.load_count for each in failed) > counters.failed_load_modules, 0)
    expect("early duplicates by name", sum(each.becoming_count for each in failed) > counters.failed_becoming, 0)
    expect("duplicates by name", sum(each.count for each in failed), counters.duplicates)
    outcomes = (
        *(counters.modcount, counters.failed_kreads, counters.failed_decompress, counters.failed_becoming),
        *(counters.failed_load_modules, counters.failed_inits, counters.shared_calls, counters.refused_calls),
    )
    expect("calls by outcome", sum(outcomes), counters.calls)
    for count, size_bytes, what in (
        (counters.failed_kreads, counters.invalid_kread_bytes, "kread"),
        (counters.failed_decompress, counters.invalid_decompress_bytes, "decompress"),
        (counters.failed_becoming, counters.invalid_becoming_bytes, "becoming"),
        (counters.failed_load_modules, counters.invalid_mod_bytes, "load"),
    ):
        expect(f"wasted bytes on {what} without a failure", 0 if count else size_bytes, 0)
    return found
