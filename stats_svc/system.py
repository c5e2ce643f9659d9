"""One simulated machine: its modules list, its gate, and what is noted when they change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from modpressure.errors import BadRequest, NotNow, OverLimit
from modpressure.kernel.counters import SIZE_BITS, Counters, FailedModule
from modpressure.kernel.gate import Gate
from modpressure.kernel.modules_list import PROCEED, Answer, ModulesList, State, Verdict
from modpressure.kernel.outcome import Outcome
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.group import Group
from stats_svc.names import check_module_name, shown
from stats_svc.rows import ModuleRow, SegmentKind, SystemDelta, SystemRow
from stats_svc.session import Instance

Caller: TypeAlias = tuple[str, int]
"""A call: instance id and call id."""

Woken: TypeAlias = list[tuple[Caller, Answer]]

_LIVE: Final[int] = Outcome.LIVE

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
        self.clear()
        self._next_event_id = row.next_event_id
        self._counted_bytes = _bytes_of(row.counters)
        self.peak_held_bytes = row.peak_held_bytes

    def clear(self) -> None:
        """Make it as it was when it was new."""
        self.modules: ModulesList[Caller] = ModulesList()
        self.gate: Gate[Caller] = Gate()
        self.gates_held: dict[Caller, str] = {}
        """Calls that hold a gate, and its inode."""

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

    @property
    def has_calls_in_flight(self) -> bool:
        """True if a call holds a name that is not live or a gate, or waits for one."""
        return bool(
            self.gates_held
            or self.modules.waiting
            or self.gate.waiting
            or any(entry.state is not State.LIVE for entry in self.modules)
        )

    def row(self) -> SystemRow:
        """Return what is kept of it as the administrator sees it: without counters."""
        return SystemRow(self.id, self.policy, self.create_time_ns, self.reset_time_ns)

    # --- waiting and inserting ---

    def enter(self, inode: str, caller: Caller) -> Answer | None:
        """Enter the gate of an inode."""
        answer = self.gate.enter(inode, caller)
        if answer is not None:
            self.gates_held[caller] = inode
        return answer

    def leave(self, caller: Caller, errno: str) -> Woken:
        """Leave the gate, if the caller holds one, with its result."""
        self.gates_held.pop(caller, None)
        return self.gate.leave(caller, errno)

    def give_gate_up(self, caller: Caller) -> Woken:
        """Take the gate from a caller that never ended: the first who waits for its result works instead.

        No result could be right for all: there is none. So they are as if the holder had never come.
        """
        inode = self.gates_held.get(caller, "")
        entered: Woken = []
        for waiter, _ in self.leave(caller, ""):
            if self.enter(inode, waiter) is not None:
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
            self.id, name, int(entry.state), instance_id, call_id, loader, entry.core_bytes, position
        )

    def remove(self, group: Group, name: str) -> Woken:
        """Take an entry out of the list; those who wait for it are told EBUSY."""
        del self._places[name]
        self._delta(group).modules[name] = None
        return self.modules.remove(name)

    # --- ends of calls ---

    def finish(self, group: Group, instance: Instance, call_id: int, finish: pb.FinishCall) -> tuple[int, Woken]:
        """Count and log a call that has ended, and let go of what it held; return its event and who is woken.

        BadRequest if the call makes no sense, NotNow if it is live but its name is another call's by now: its loader
        was away for longer than its lease. Then nothing has changed.
        """
        call = finish.call
        name = call.module
        caller = (instance.id, call_id)
        counters, failed = self._count((call,))
        is_live = call.outcome == _LIVE
        entry = self.modules.get(name) if finish.reserved else None
        if is_live:
            check_module_name(name)
            if not finish.reserved:
                raise BadRequest(f"call {call_id} can't be live: it has not inserted {shown(name)}", field="reserved")
            if finish.core_bytes < 0 or finish.core_bytes >> SIZE_BITS:
                raise BadRequest(f"core_bytes {finish.core_bytes} is no size", field="core_bytes")
            if entry is None:
                # Its lease ended, but nobody has asked for the name since.
                self.reserve(group, name, caller, instance.loader)
            elif entry.owner != caller or entry.state is State.LIVE:
                raise NotNow(f"call {call_id} lost the name {shown(name)} when its loader was away for too long")

        delta = self._delta(group)
        self._add(delta, counters, failed)
        event_id = self._log_call(group, delta, instance, call_id, call)
        woken: Woken = []
        if is_live:
            woken = self.modules.live(name, finish.core_bytes)
            self._put(group, name)
        elif entry is not None and entry.owner == caller and entry.state is not State.LIVE:
            woken = self.remove(group, name)
        return event_id, woken + self.leave(caller, call.errno)

    def unload(self, group: Group, instance: Instance, call_id: int, unload: call_pb2.Unload) -> tuple[int, Answer]:
        """Remove a live module; return the event that is left, 0 if it can't be removed, and the answer."""
        name = unload.module
        answer = self.modules.unload(name)
        entry = self.modules.get(name)
        if answer is not PROCEED or entry is None:
            return 0, answer
        group.released.append(entry.owner)
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

    def record(self, group: Group, instance: Instance, record: pb.RecordCalls) -> None:
        """Count and log calls that ended elsewhere. BadRequest if one makes no sense; then nothing has changed."""
        calls = record.calls
        if not calls:
            return
        counters, failed = self._count(calls)
        delta = self._delta(group)
        self._add(delta, counters, failed)
        segment = group.segment(
            delta,
            SegmentKind.CALLS,
            self._take_event_ids(delta, len(calls)),
            instance_id=instance.id,
            loader=instance.loader,
        )
        segment.count += len(calls)
        segment.records.append(record)
        group.weight += len(calls)

    def check_record(self, record: pb.RecordCalls) -> None:
        """Return if ``record`` would do. BadRequest if not."""
        self._count(record.calls)

    def _count(self, calls: Iterable[call_pb2.Call]) -> tuple[Counters, dict[str, FailedModule]]:
        """Return what some calls add to the counters and to the failed modules.

        BadRequest if one makes no sense, OverLimit if a counter would not hold it.
        """
        counters = Counters()
        failed: dict[str, FailedModule] = {}
        try:
            counters.add_calls(calls, failed)
        except ValueError as error:
            raise BadRequest(str(error), field="call") from None
        for name in failed:
            check_module_name(name)
        if self._counted_bytes + _bytes_of(counters) >= MAX_COUNTED_BYTES:
            raise OverLimit(f"the counters of system {self.id!r} can't hold any more; reset it")
        return counters, failed

    def _add(self, delta: SystemDelta, counters: Counters, failed: dict[str, FailedModule]) -> None:
        self._counted_bytes += _bytes_of(counters)
        delta.add(counters, failed)

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


def _bytes_of(counters: Counters) -> int:
    """Return a number that no counter of bytes exceeds."""
    return counters.total_mod_size + counters.virtual_mem_wasted_bytes
