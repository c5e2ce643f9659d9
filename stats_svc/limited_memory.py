"""The finite memory of a system: an account whose every change is noted in the group that makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from modpressure.errors import BadRequest, NotNow
from modpressure.kernel.counters import SIZE_BITS
from modpressure.kernel.system_memory import Allocation, Amounts, Freed, Part, Shortage, SystemMemory
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.group import Group
from stats_svc.session import Caller

MAX_TYPES: Final = 7
"""Types of a layout (enum mod_mem_type, include/linux/module.h)."""


class LimitedMemory:
    """What calls and live modules take of a system that has limits, as the operations of all groups have left it."""

    def __init__(self, system: str, limits: Amounts) -> None:
        """Begin with nothing taken."""
        self._system = system
        self.account: SystemMemory[Caller] = SystemMemory(limits)

    @property
    def amounts(self) -> tuple[Amounts, Amounts]:
        """What is taken now, and the most that was."""
        return self.account.taken, self.account.peak

    def allocate(self, group: Group, caller: Caller, allocation: Allocation) -> Shortage | None:
        """Allocate a part for a call; return what it found full.

        NotNow if the call holds no file.
        """
        self.settle(group, caller)
        if allocation.part is not Part.FILE and self.account.holding(caller) is None:
            raise _lost(caller)
        shortage = self.account.take(caller, allocation)
        self._note(group, caller)
        return shortage

    def settle(self, group: Group, caller: Caller) -> None:
        """Free the packed file of a call that asks the next thing after decompression."""
        if self.account.settle(caller):
            self._note(group, caller)

    def free(self, group: Group, caller: Caller, freed: Freed) -> None:
        """Free what a call holds, in part or all of it."""
        if self.account.give(caller, freed):
            self._note(group, caller)

    def check_live(self, caller: Caller) -> None:
        """Return if a call has a layout that can go live. NotNow if it holds none."""
        holding = self.account.holding(caller)
        if holding is None or not holding.has(Part.LAYOUT):
            raise _lost(caller)

    def end(self, group: Group, caller: Caller, *, is_live: bool) -> None:
        """Free what a call holds that has ended, but for the core of what it has left live."""
        if self.account.holding(caller) is None:
            return
        if is_live:
            self.account.live(caller)
        else:
            self.account.give(caller, "all")
        self._note(group, caller)

    def unload(self, group: Group, owner: Caller) -> None:
        """Free the core of the module that a call has loaded."""
        if self.account.unload(owner):
            self._note(group, owner)

    def expire(self, group: Group, instance_id: str) -> list[Caller]:
        """Free all that the calls in flight of a loader process hold; return those that held something."""
        callers = [caller for caller in self.account.callers() if caller[0] == instance_id]
        for caller in callers:
            self.free(group, caller, "all")
        return callers

    def _note(self, group: Group, caller: Caller) -> None:
        delta = group.delta(self._system)
        holding = self.account.holding(caller)
        # What is committed is this moment's, whatever the operations after it do while that goes on.
        delta.held[caller] = None if holding is None else replace(holding)
        delta.peak_taken = self.account.peak


def _lost(caller: Caller) -> NotNow:
    return NotNow(f"call {caller[1]} holds no memory to go on with")


def allocation_from_proto(asked: pb.AllocateMemory) -> Allocation:
    """Return what a call asks for. BadRequest if that makes no sense."""
    if asked.part not in tuple(map(int, Part)):
        raise BadRequest(f"there is no part of memory number {asked.part}", field="part")
    most = MAX_TYPES if asked.part == pb.MEMORY_PART_LAYOUT else 1
    if not 1 <= len(asked.sizes) <= most:
        raise BadRequest(f"{len(asked.sizes)} sizes are not between 1 and {most}", field="sizes")
    for size_bytes in asked.sizes:
        if size_bytes < 0 or size_bytes >> SIZE_BITS:
            raise BadRequest(f"{size_bytes} is no size", field="sizes")
    return Allocation(Part(asked.part), tuple(asked.sizes))
