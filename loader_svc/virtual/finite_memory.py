"""The finite memory of a virtual machine: every step of every call against its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loader_svc.allocation import allocation_of, failure_of_shortage
from loader_svc.steps import Failure, Finish, Free, Inspect, Step
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.system_memory import Amounts, Part, Shortage, SystemMemory

if TYPE_CHECKING:
    from loader_svc.virtual.call import VirtualCall

_OUTCOMES: Final = {Part.FILE: Outcome.KREAD, Part.IMAGE: Outcome.DECOMPRESS, Part.LAYOUT: Outcome.BECOMING}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An allocation that found no room: at which stage of whose call, and why."""

    outcome: Outcome
    module: str
    shortage: Shortage


class FiniteMemory(SystemMemory["VirtualCall"]):
    """What calls and modules take of a machine that has limits."""

    def __init__(self, limits: Amounts) -> None:
        """0 is no limit."""
        super().__init__(limits)
        self.first_refusal: Refusal | None = None
        self.refusals = 0

    def before(self, call: VirtualCall, step: Step) -> Failure | None:
        """Allocate or free what a step does; return why it fails, if there is no room."""
        match step:
            case Inspect():
                self.settle(call)
            case Free(what):
                self.give(call, what)
            case Finish(ending) if ending.outcome is Outcome.LIVE:
                self.live(call)
            case Finish():
                self.give(call, "all")
            case _:
                return self._allocate(call, step)
        return None

    def _allocate(self, call: VirtualCall, step: Step) -> Failure | None:
        allocation = allocation_of(step, call.spec, call.plan)
        shortage = None if allocation is None else self.take(call, allocation)
        if allocation is None or shortage is None:
            return None
        self.refusals += 1
        if self.first_refusal is None:
            self.first_refusal = Refusal(_OUTCOMES[allocation.part], call.spec.module, shortage)
        return failure_of_shortage(shortage)
