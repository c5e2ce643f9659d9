"""What the calls of a run came to, beside what the kernel itself counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from loader_svc.boot.spec import BootResult, Shortfall
from loader_svc.virtual.call import Record, VirtualCall
from loader_svc.virtual.counted import CountedOrder
from loader_svc.virtual.machine import VirtualMachine
from modpressure.kernel.modules_list import State
from modpressure.kernel.outcome import Outcome, Syscall

_SHORTAGE: Final = "memory: "
"""What the checks of calls begin with that memory did not suffice for."""


class Tally:
    """The calls of one machine, as they end."""

    def __init__(self, kernel: VirtualMachine, record: Record | None) -> None:
        """``record`` is told the calls in the order in which they count."""
        self._kernel = kernel
        self._order = CountedOrder(record, kernel.counts.calls) if record else None
        self._syscalls = Counter[Syscall]()
        self._gate_joins = 0
        self._duplicates_waited = 0
        self._loaded: list[str] = []
        self._init_failures = Counter[str]()
        self._shortages: list[Shortfall] = []
        self._short: dict[str, None] = {}
        self._skipped_ns = 0

    def add(self, call: VirtualCall) -> None:
        """Count a call that has ended."""
        ending = call.ending
        assert ending is not None
        self._syscalls[call.spec.syscall] += 1
        outcome = ending.outcome
        if outcome is Outcome.LIVE:
            self._loaded.append(ending.module)
        elif outcome is Outcome.SHARED:
            self._gate_joins += 1
        elif outcome is Outcome.INIT:
            self._init_failures[ending.module] += 1
        elif ending.duplicate and call.waited:
            self._duplicates_waited += 1
        elif ending.check.startswith(_SHORTAGE):
            area = ending.check.removeprefix(_SHORTAGE)
            # Before its image could be read it has no name but its file's.
            self._shortages.append(Shortfall(call.spec.module, call.ended_ns - self._skipped_ns, area))
        if self._order is not None:
            self._order.add(call.number, call)

    def skip(self, idle_ns: int) -> None:
        """Leave so many ns in which nothing happened out of the times of what comes."""
        self._skipped_ns += idle_ns

    def miss(self, modules: Iterable[str]) -> None:
        """Note modules that found no room, or that are not tried as what they need found none."""
        self._short.update((module, None) for module in modules)

    def result(
        self, *, duration_ns: int, workers: int, events: int, autoloads: int = 0, autoloads_failed: int = 0
    ) -> BootResult:
        """Return what all of them came to."""
        kernel = self._kernel
        if self._order is not None:
            self._order.finish()
        return BootResult(
            counters=kernel.counters,
            failed_modules=tuple(kernel.failed_modules),
            duration_ns=duration_ns,
            workers=workers,
            loaded=tuple(self._loaded),
            peak_copy_bytes=kernel.areas.peak_copy_bytes,
            peak_held_bytes=kernel.areas.peak_bytes,
            finit_calls=self._syscalls[Syscall.FINIT_MODULE],
            init_calls=self._syscalls[Syscall.INIT_MODULE],
            gate_joins=self._gate_joins,
            init_failures=dict(self._init_failures),
            duplicates_waited=self._duplicates_waited,
            autoloads=autoloads,
            autoloads_failed=autoloads_failed,
            shortages=len(self._shortages),
            first_shortage=self._shortages[0] if self._shortages else None,
            lost=tuple(name for name in self._short if not is_live(kernel, name)),
            events=events,
        )


def is_live(kernel: VirtualMachine, module: str) -> bool:
    """Whether /sys/module/NAME/initstate says ``live``."""
    found = kernel.modules.get(module)
    return found is not None and found.state is State.LIVE
