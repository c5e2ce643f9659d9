"""The kernel that all loaders share, in memory: every system, every loader process, and what each operation does.

Nothing is answered here: answers go into the group, which is answered when it is committed. What a group changes is
seen by the operations after it at once; if its commit fails, all of this is thrown away and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from modpressure.errors import AlreadyExists, BadRequest, ModpressureError, NotFound, NotNow
from modpressure.kernel.modules_list import PROCEED, Answer, State, Verdict
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.group import Group
from stats_svc.names import check_module_name, check_system_id, shown
from stats_svc.rows import Snapshot, SystemRow
from stats_svc.session import Instance, Session
from stats_svc.system import System, Woken

LeftBehind: TypeAlias = Mapping[int, int]
"""For a batch that was applied before: those of its calls that have ended, and the event that each left."""

_VERDICTS: Final = {
    Verdict.PROCEED: pb.OperationResult.VERDICT_PROCEED,
    Verdict.DUPLICATE: pb.OperationResult.VERDICT_DUPLICATE,
    Verdict.SHARED: pb.OperationResult.VERDICT_SHARED,
    Verdict.INTERRUPTED: pb.OperationResult.VERDICT_INTERRUPTED,
    Verdict.FAILED: pb.OperationResult.VERDICT_FAILED,
}
_INTERRUPTED: Final = Answer(Verdict.INTERRUPTED, "EINTR", waited=True)

_ENDS: Final = frozenset({"finish_call", "remove_module", "record_calls"})
"""Operations that are not applied twice; all others can be asked again."""

DEFAULT_POLICY: Final = call_pb2.POLICY_V6_4
"""Number of ``modpressure.kernel.policy.DEFAULT_POLICY``."""


class LedgerState:
    """All systems and all loader processes."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.systems = {row.id: System(row) for row in snapshot.systems}
        self.instances = {
            row.instance_id: Instance(
                row.instance_id,
                row.loader,
                applied_sequence=row.applied_sequence,
                last_seen_ns=row.last_seen_ns,
                restored=True,
            )
            for row in snapshot.instances
        }
        for row in snapshot.modules:
            self.systems[row.system].restore(row)
        self._operations: dict[str, Callable[[Group, Session, System, pb.Operation], None]] = {
            "enter_gate": self._enter_gate,
            "check_name": self._check_name,
            "reserve_name": self._reserve_name,
            "finish_call": self._finish_call,
            "remove_module": self._remove_module,
            "interrupt": self._interrupt,
            "record_calls": self._record_calls,
            "read_initstate": self._read_initstate,
        }

    # --- operations ---

    def apply(
        self,
        group: Group,
        session: Session,
        operations: Iterable[pb.Operation],
        *,
        now_ns: int,
        peak_held_bytes: int,
        left_behind: LeftBehind | None = None,
    ) -> None:
        """Apply operations in their order. ``left_behind`` is given for a batch that was applied before."""
        for operation in operations:
            kind = operation.WhichOneof("kind")
            system = self.systems.get(operation.system)
            try:
                if kind == "open_system":
                    self._open_system(group, session, system, operation, now_ns)
                    continue
                if system is None:
                    raise NotFound(f"there is no system {shown(operation.system)}")
                if peak_held_bytes > system.peak_held_bytes:
                    system.peak_held_bytes = peak_held_bytes
                if left_behind is not None and self._apply_again(group, session, system, operation, left_behind):
                    continue
                if kind is None:
                    raise BadRequest(f"the operation of call {operation.call_id} asks nothing that is known here")
                self._operations[kind](group, session, system, operation)
            except ModpressureError as error:
                group.results_of(session).results.add(
                    call_id=operation.call_id, verdict=pb.OperationResult.VERDICT_INVALID, message=error.sentence
                )

    def _apply_again(
        self, group: Group, session: Session, system: System, operation: pb.Operation, left_behind: LeftBehind
    ) -> bool:
        """Answer an operation of a batch that was applied before; return False if it is to be evaluated once more."""
        call_id = operation.call_id
        kind = operation.WhichOneof("kind")
        event_id = left_behind.get(call_id)
        if kind == "record_calls":
            system.check_record(operation.record_calls)
            self._answer(group, session, call_id, PROCEED)
            return True
        if event_id is not None:
            # The call has ended. What it asked before that was answered, and must not take hold of anything again.
            if kind in _ENDS:
                self._answer(group, session, call_id, PROCEED, event_id)
                # The hello may have taken its gate once more, by a loader that did not know.
                errno = operation.finish_call.call.errno
                self._wake(group, system.leave((session.instance.id, call_id), errno))
            return True
        if kind in ("enter_gate", "check_name", "reserve_name") and call_id in session.instance.interrupted:
            self._answer(group, session, call_id, _INTERRUPTED)
            return True
        # An end that left nothing was refused, and changed nothing.
        return False

    def _answer(self, group: Group, session: Session, call_id: int, answer: Answer, event_id: int = 0) -> None:
        group.results_of(session).results.add(
            call_id=call_id,
            verdict=_VERDICTS[answer.verdict],
            errno=answer.errno,
            waited=answer.waited,
            event_id=event_id,
        )

    def _answer_or_wait(
        self, group: Group, session: Session, system: System, call_id: int, answer: Answer | None
    ) -> None:
        session.instance.interrupted.discard(call_id)
        if answer is None:
            session.waiting.add(call_id)
            session.instance.waits[call_id] = system
        else:
            self._answer(group, session, call_id, answer)

    def _wake(self, group: Group, woken: Woken) -> None:
        """Answer those who waited, each on the stream on which it last asked; who is away will ask again."""
        for (instance_id, call_id), answer in woken:
            instance = self.instances[instance_id]
            instance.waits.pop(call_id, None)
            session = instance.session
            if session is not None and call_id in session.waiting:
                session.waiting.discard(call_id)
                self._answer(group, session, call_id, answer)

    def _open_system(
        self, group: Group, session: Session, system: System | None, operation: pb.Operation, now_ns: int
    ) -> None:
        if system is None:
            system = self.create_system(group, operation.system, DEFAULT_POLICY, now_ns)
        group.results_of(session).results.add(
            call_id=operation.call_id,
            verdict=pb.OperationResult.VERDICT_PROCEED,
            policy=call_pb2.Policy.ValueType(system.policy),
        )

    def _enter_gate(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller = (session.instance.id, operation.call_id)
        answer = system.enter(operation.enter_gate.inode, caller)
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _check_name(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller = (session.instance.id, operation.call_id)
        answer = system.modules.check(check_module_name(operation.check_name.module), caller)
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _reserve_name(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        instance = session.instance
        name = check_module_name(operation.reserve_name.module)
        answer = system.reserve(group, name, (instance.id, operation.call_id), instance.loader)
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _finish_call(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        call_id = operation.call_id
        event_id, woken = system.finish(group, session.instance, call_id, operation.finish_call)
        session.instance.interrupted.discard(call_id)
        self._answer(group, session, call_id, PROCEED, event_id)
        self._wake(group, woken)

    def _remove_module(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        event_id, answer = system.unload(group, session.instance, operation.call_id, operation.remove_module.unload)
        self._answer(group, session, operation.call_id, answer, event_id)

    def _interrupt(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        instance, call_id = session.instance, operation.call_id
        caller = (instance.id, call_id)
        if system.modules.interrupt(caller) or system.gate.interrupt(caller):
            instance.interrupted.add(call_id)
            self._wake(group, [(caller, _INTERRUPTED)])

    def _record_calls(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        system.record(group, session.instance, operation.record_calls)
        self._answer(group, session, operation.call_id, PROCEED)

    def _read_initstate(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        entry = system.modules.get(operation.read_initstate.module)
        group.results_of(session).results.add(
            call_id=operation.call_id,
            verdict=pb.OperationResult.VERDICT_PROCEED,
            live=entry is not None and entry.state is State.LIVE,
        )

    # --- loader processes ---

    def take_gates(self, instance: Instance, gates: Iterable[pb.HeldGate]) -> None:
        """Give a loader the gates back that its calls hold: this process may have been started since."""
        for gate in gates:
            system = self.systems.get(gate.system)
            caller = (instance.id, gate.call_id)
            if system is not None and gate.call_id not in instance.waits and system.enter(gate.inode, caller) is None:
                # Somebody else was given it meanwhile. The call goes on; there is no result of it to share.
                system.gate.interrupt(caller)

    def expire(self, group: Group, instance: Instance) -> bool:
        """Take from a loader that is gone what its calls held or waited for; return whether there was anything.

        Its live modules stay: it is one machine, of which some CPUs are gone.
        """
        found = False
        for call_id, system in instance.waits.items():
            caller = (instance.id, call_id)
            found |= system.modules.interrupt(caller) or system.gate.interrupt(caller)
        instance.waits.clear()
        instance.interrupted.clear()
        for system in self.systems.values():
            names = [e.name for e in system.modules if e.owner[0] == instance.id and e.state is not State.LIVE]
            for name in names:
                self._wake(group, system.remove(group, name))
            callers = [caller for caller in system.gates_held if caller[0] == instance.id]
            for caller in callers:
                self._wake(group, system.give_gate_up(caller))
            found = found or bool(names or callers)
        return found

    # --- systems ---

    def create_system(self, group: Group, system_id: str, policy: int, now_ns: int) -> System:
        """Create a system. BadRequest if that can't be an id, AlreadyExists if there is one of that id."""
        check_system_id(system_id)
        if system_id in self.systems:
            raise AlreadyExists(f"there is a system {system_id!r} already")
        row = SystemRow(system_id, policy, create_time_ns=now_ns)
        group.create(row)
        system = self.systems[system_id] = System(row)
        return system

    def reset_system(self, group: Group, system_id: str, now_ns: int) -> System:
        """Reset a system as a reboot would. NotFound if there is none, NotNow while calls are in flight."""
        system = self._idle(system_id, "reset")
        group.released += [entry.owner for entry in system.modules]
        group.reset(system_id, now_ns)
        system.clear()
        system.reset_time_ns = now_ns
        return system

    def delete_system(self, group: Group, system_id: str) -> None:
        """Delete a system. NotFound if there is none, NotNow while calls are in flight."""
        system = self._idle(system_id, "deleted")
        group.released += [entry.owner for entry in system.modules]
        group.delete(system_id)
        del self.systems[system_id]

    def _idle(self, system_id: str, what: str) -> System:
        system = self.systems.get(check_system_id(system_id))
        if system is None:
            raise NotFound(f"there is no system {system_id!r}")
        if system.has_calls_in_flight:
            raise NotNow(f"system {system_id!r} can't be {what} while calls are in flight")
        return system
