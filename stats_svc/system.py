"""One simulated machine: its modules list, its gate, and what is noted when they change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from modpressure.errors import BadRequest, NotNow, OverLimit, shown
from modpressure.kernel.autoload import Autoload
from modpressure.kernel.counters import SIZE_BITS, Counters, FailedModule
from modpressure.kernel.gate import Gate
from modpressure.kernel.modules_list import PROCEED, Answer, ModulesList, State, Verdict
from modpressure.kernel.outcome import Outcome
from modpressure.kernel.requesters import Requester, Requesters, Tally
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.claims import Claims
from stats_svc.group import Group
from stats_svc.limited_memory import LimitedMemory
from stats_svc.links import SystemLinks
from stats_svc.names import check_ended, check_module_name
from stats_svc.rows import HeldRow, ModuleRow, SegmentKind, SystemDelta, SystemRow
from stats_svc.session import Caller, Instance

Woken: TypeAlias = list[tuple[Caller, Answer]]

_LIVE: Final[int] = Outcome.LIVE


@dataclass(slots=True)
class _Counted:
    """What some calls add."""

    counters: Counters = field(default_factory=Counters)
    failed: dict[str, FailedModule] = field(default_factory=dict)
    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)


MAX_COUNTED_BYTES: Final = 1 << 62
"""What counters of bytes may come to: half of what a BIGINT holds, so that no commit can fail by it."""


class System:
    """A simulated machine, as the operations of all groups so far have left it.

    Each change is also noted in the group that makes it. A method that may have to wait returns None for "later".
    """

    def __init__(self, row: SystemRow) -> None:
        self.id = row.id
        self.policy = row.policy
        self.create_time_ns = row.create_time_ns
        self.reset_time_ns = row.reset_time_ns
        self.limits = row.limits
        self.clear()
        if self.memory is not None:
            self.memory.account.peak = row.peak_taken
        self._next_event_id = row.next_event_id
        self._counted_bytes = _bytes_of(row.counters)
        self.peak_held_bytes = row.peak_held_bytes

    def clear(self) -> None:
        """Make it as it was when it was new."""
        self.modules: ModulesList[Caller] = ModulesList()
        self.links = SystemLinks(self.modules)
        self.gate: Gate[Caller] = Gate()
        self.memory: LimitedMemory | None = None if self.limits is None else LimitedMemory(self.id, self.limits)
        """What is taken of its memory; None if that is not finite."""

        self._requesters = Requesters()
        self.autoload: Autoload[Caller] = Autoload()
        self.claims = Claims(self.id)
        self.peak_held_bytes = 0
        self._places: dict[str, tuple[int, str]] = {}
        """Of each entry of the list: the position at which it was inserted, and its loader's name."""

        self._next_position = 1
        self._next_event_id = 1
        self._counted_bytes = 0
        """No counter of bytes is higher than this."""

    def restore(self, row: ModuleRow) -> None:
        """Put an entry back as it was stored, as the newest."""
        self.modules.restore(row.name, State(row.state), (row.instance_id, row.call_id), row.core_bytes)
        self._places[row.name] = (row.position, row.loader)
        self._next_position = row.position + 1
        if row.formation:
            self.links.restore(row.name, row.position, row.formation)

    def restore_held(self, row: HeldRow) -> None:
        """Put back what a call or its module held, after the modules list."""
        assert self.memory is not None
        caller = (row.instance_id, row.call_id)
        is_live = any(entry.owner == caller and entry.state is State.LIVE for entry in self.modules)
        self.memory.account.restore(caller, row.holding, is_live=is_live)

    @property
    def waiting(self) -> int:
        """How many calls wait for another one."""
        return self.modules.waiting + self.gate.waiting + self.links.waiting

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of a call, if it has one, whatever for; return whether it had."""
        return (
            self.modules.interrupt(caller)
            or self.gate.interrupt(caller)
            or self.links.interrupt(caller)
            or self.claims.interrupt(caller)
        )

    def restore_requesters(self, known: Iterable[Requester]) -> None:
        """Go on telling those apart that were told apart."""
        self._requesters = Requesters(known)

    @property
    def has_calls_in_flight(self) -> bool:
        """True if a call holds a name that is not live, a gate or memory, or waits for another call.

        So it is while the kernel waits for a module that it has asked for.
        """
        return bool(
            self.gate.held
            or self.autoload.in_flight
            or self.claims.held
            or (self.memory is not None and self.memory.account.in_flight)
            or self.waiting
            or any(entry.state is not State.LIVE for entry in self.modules)
        )

    def row(self) -> SystemRow:
        """Return what is kept of it as the administrator sees it: without counters."""
        return SystemRow(self.id, self.policy, self.create_time_ns, self.reset_time_ns, limits=self.limits)

    def holds(self, name: str, caller: Caller) -> bool:
        """Whether a call's module is in the list."""
        entry = self.modules.get(name)
        return entry is not None and entry.owner == caller

    # --- waiting and inserting ---

    def enter(self, inode: str, caller: Caller) -> Answer | None:
        """Enter the gate of an inode. BadRequest if the caller holds that of another one: a call has one file."""
        key = _gate_of(inode)
        if self.gate.held.get(caller, key) != key:
            raise BadRequest(f"the call holds the gate of another file, and can't enter that of {shown(inode)}")
        return self.gate.enter(key, caller)

    def leave(self, caller: Caller, errno: str) -> Woken:
        """Leave the gate, if the caller holds one, with its result."""
        return self.gate.leave(caller, errno)

    def give_gate_up(self, caller: Caller) -> Woken:
        """Take the gate from a caller that never ended: the first who waits for its result works instead.

        No result could be right for all: there is none. So they are as if the holder had never come.
        """
        key = self.gate.held.get(caller, "")
        entered: Woken = []
        for waiter, _ in self.leave(caller, ""):
            if self.gate.enter(key, waiter) is not None:
                entered.append((waiter, Answer(Verdict.PROCEED, waited=True)))
        return entered

    def reserve(self, group: Group, name: str, caller: Caller, loader: str) -> Answer | None:
        """Insert a name as unformed."""
        is_new = self.modules.get(name) is None
        answer = self.modules.reserve(name, caller)
        if is_new:
            self._insert(group, name, loader)
        return answer

    def _insert(self, group: Group, name: str, loader: str) -> None:
        self._places[name] = (self._next_position, loader)
        self._next_position += 1
        self._put(group, name)

    def _put(self, group: Group, name: str) -> None:
        """Note the entry of ``name`` as it is now."""
        entry = self.modules.get(name)
        assert entry is not None
        position, loader = self._places[name]
        instance_id, call_id = entry.owner
        self._delta(group).modules[name] = ModuleRow(
            self.id,
            name,
            int(entry.state),
            instance_id,
            call_id,
            loader,
            entry.core_bytes,
            position,
            self.links.stored(name),
        )

    def form(self, group: Group, name: str, caller: Caller, formation: pb.Formation) -> tuple[Answer, str]:
        """Form a module whose name a call has inserted; return the answer and what offended.

        BadRequest if that makes no sense, NotNow if the name is not the call's.
        """
        entry = self.modules.get(name)
        if entry is None or entry.owner != caller or entry.state not in (State.UNFORMED, State.COMING):
            raise NotNow(f"call {caller[1]} can't form {shown(name)}: the name is not its own")
        if entry.state is State.COMING:
            # Asked again.
            return PROCEED, ""
        answer, value = self.links.form(name, self._places[name][0], formation)
        if answer is PROCEED:
            uses = self.links.of(name).uses
            if uses:
                self._delta(group).uses[name] = uses
            self._put(group, name)
        return answer, value

    def remove(self, group: Group, name: str) -> Woken:
        """Take an entry out of the list; those who wait for it are told EBUSY."""
        del self._places[name]
        delta = self._delta(group)
        delta.modules[name] = None
        if self.links.of(name).uses:
            delta.uses.pop(name, None)
            delta.unused.add(name)
        self.links.drop(name)
        return self.modules.remove(name) + self.links.wake(name)

    # --- ends of calls ---

    def finish(self, group: Group, instance: Instance, call_id: int, finish: pb.FinishCall) -> tuple[int, Woken]:
        """Count and log a call that has ended, and let go of what it held; return its event and who is woken.

        BadRequest if the call makes no sense, NotNow if it is live but has not got the name. Then nothing has changed.
        """
        call = finish.call
        name = call.module
        caller = (instance.id, call_id)
        counted = self._count((call,))
        is_live = call.outcome == _LIVE
        entry = self.modules.get(name) if finish.reserved else None
        if is_live:
            check_module_name(name)
            if not finish.reserved:
                raise BadRequest(f"call {call_id} can't be live: it has not inserted {shown(name)}", field="reserved")
            if finish.core_bytes < 0 or finish.core_bytes >> SIZE_BITS:
                raise BadRequest(f"core_bytes {finish.core_bytes} is no size", field="core_bytes")
            if self.memory is not None:
                self.memory.check_live(caller)
            if entry is None or entry.owner != caller or entry.state is State.LIVE:
                raise NotNow(f"call {call_id} can't be live: the name {shown(name)} is not its own")

        delta = self._delta(group)
        self._add(delta, counted)
        event_id = self._log_call(group, delta, instance, call_id, call)
        woken: Woken = []
        if self.memory is not None:
            self.memory.end(group, caller, is_live=is_live)
        if is_live:
            woken = self.modules.live(name, finish.core_bytes) + self.links.wake(name)
            self._put(group, name)
        elif entry is not None and entry.owner == caller and entry.state is not State.LIVE:
            woken = self.remove(group, name)
        return event_id, woken + self.leave(caller, call.errno)

    def unload(self, group: Group, instance: Instance, call_id: int, unload: call_pb2.Unload) -> tuple[int, Answer]:
        """Remove a live module; return the event that is left, 0 if it can't be removed, and the answer.

        BadRequest if what is told of the call is too long.
        """
        check_ended(unload)
        name = unload.module
        answer = self.links.unloading(name, forced=unload.forced)
        entry = self.modules.get(name)
        if answer is not PROCEED or entry is None:
            return 0, answer
        group.released.append(entry.owner)
        if self.memory is not None:
            self.memory.unload(group, entry.owner)
        # Nobody waits for a module that is live.
        self.remove(group, name)
        delta = self._delta(group)
        delta.counters.unloads += 1
        event_id = self._take_event_ids(delta, 1)
        segment = group.segment(delta, SegmentKind.EVENTS, event_id)
        segment.count += 1
        event = segment.events.events.add().unload
        event.CopyFrom(unload)
        event.instance_id = instance.id
        event.call_id = call_id
        event.loader = instance.loader
        event.errno = ""
        return event_id, answer

    def abandon(self, group: Group, instance: Instance, call_id: int, module: str) -> None:
        """Log a call of a loader that is gone; the kernel's counters know nothing of it."""
        delta = self._delta(group)
        delta.counters.abandoned_calls += 1
        call = call_pb2.Call(module=module, outcome=call_pb2.OUTCOME_ABANDONED, check="its loader is gone")
        self._log_call(group, delta, instance, call_id, call)

    def record(self, group: Group, instance: Instance, record: pb.RecordCalls) -> None:
        """Count and log calls that ended elsewhere. BadRequest if one makes no sense; then nothing has changed."""
        calls = record.calls
        if not calls:
            return
        counted = self._count(calls)
        delta = self._delta(group)
        self._add(delta, counted)
        segment = group.segment(
            delta,
            SegmentKind.CALLS,
            self._take_event_ids(delta, len(calls)),
            instance_id=instance.id,
            loader=instance.loader,
        )
        segment.count += len(calls)
        segment.records.append(record)
        group.weigh(len(calls))

    def check_record(self, record: pb.RecordCalls) -> None:
        """Return if ``record`` would do. BadRequest if not."""
        self._count(record.calls)

    def record_modules(self, group: Group, instance: Instance, call_id: int, record: pb.RecordModules) -> None:
        """Put modules into the list that went live elsewhere; a name that is there stays as it is.

        Links that contradict what is there are left out: who uses a module that this list has not, or exports what
        another one does. BadRequest if one makes no sense; then nothing has changed.
        """
        for each in record.modules:
            check_module_name(each.module)
            self.links.check(each.module, each.formation)
            if each.core_bytes < 0 or each.core_bytes >> SIZE_BITS:
                raise BadRequest(f"core_bytes {each.core_bytes} is no size", field="core_bytes")
        if record.peak_held_bytes < 0 or record.peak_held_bytes >> SIZE_BITS:
            raise BadRequest(f"peak_held_bytes {record.peak_held_bytes} is no size", field="peak_held_bytes")
        self.peak_held_bytes = max(self.peak_held_bytes, record.peak_held_bytes)
        self._delta(group)
        group.weigh(len(record.modules))
        caller = (instance.id, call_id)
        for each in record.modules:
            name = each.module
            if self.modules.get(name) is not None:
                continue
            self.reserve(group, name, caller, instance.loader)
            if each.HasField("formation"):
                for use in each.formation.uses:
                    use.position = self._places.get(use.module, (0, ""))[0]
                self.form(group, name, caller, each.formation)
            self.modules.live(name, each.core_bytes)
            self._put(group, name)

    def _count(self, calls: Sequence[call_pb2.Call]) -> _Counted:
        """Return what some calls add to the counters, to the failed modules and to what requesters came to.

        BadRequest if one makes no sense, OverLimit if a counter would not hold it.
        """
        for call in calls:
            check_ended(call)
        counted = _Counted()
        counters, failed = counted.counters, counted.failed
        try:
            counters.add_calls(calls, failed, counted.tallies)
        except ValueError as error:
            raise BadRequest(str(error), field="call") from None
        for name in failed:
            check_module_name(name)
        if self._counted_bytes + _bytes_of(counters) >= MAX_COUNTED_BYTES:
            raise OverLimit(f"the counters of system {self.id!r} can't hold any more; reset it")
        return counted

    def _add(self, delta: SystemDelta, counted: _Counted) -> None:
        self._counted_bytes += _bytes_of(counted.counters)
        delta.add(counted.counters, counted.failed)
        for requester, tally in self._requesters.fold(counted.tallies).items():
            delta.requesters[requester].add(tally)

    def _log_call(self, group: Group, delta: SystemDelta, instance: Instance, call_id: int, call: call_pb2.Call) -> int:
        event_id = self._take_event_ids(delta, 1)
        segment = group.segment(delta, SegmentKind.EVENTS, event_id)
        segment.count += 1
        event = segment.events.events.add().call
        event.CopyFrom(call)
        event.instance_id = instance.id
        event.call_id = call_id
        event.loader = instance.loader
        return event_id

    def _take_event_ids(self, delta: SystemDelta, count: int) -> int:
        """Return the first of some ids that follow one another."""
        event_id = self._next_event_id
        if not delta.events:
            delta.first_event_id = event_id
        self._next_event_id += count
        delta.events += count
        return event_id

    def _delta(self, group: Group) -> SystemDelta:
        delta = group.delta(self.id)
        delta.peak_held_bytes = self.peak_held_bytes
        return delta


def _gate_of(inode: str) -> str:
    """Return what a gate is known by: an inode with a long path would be kept for each call that waits there."""
    return hashlib.blake2b(inode.encode(), digest_size=16).hexdigest()


def _bytes_of(counters: Counters) -> int:
    """Return a number that no counter of bytes exceeds."""
    return counters.total_mod_size + counters.virtual_mem_wasted_bytes
