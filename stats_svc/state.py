"""The kernel that all loaders share, in memory: every system, every loader process, and what each operation does.

Nothing is answered here: answers go into the group, which is answered when it is committed. What a group changes is
seen by the operations after it at once; if its commit fails, all of this is thrown away and loaded again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from modpressure.errors import BadRequest, ModpressureError, NotFound, NotNow, OverLimit, shown
from modpressure.kernel.modules_list import PROCEED, Answer, State, Verdict
from modpressure.operations import STEPS
from modpressure.tokens import covers
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.claims import Claim
from stats_svc.group import Group
from stats_svc.limited_memory import allocation_from_proto
from stats_svc.names import (
    MAX_CALLS_IN_FLIGHT,
    MAX_RECORD_BYTES,
    MAX_RESULT_BYTES,
    check_claim,
    check_inode,
    check_module_name,
    check_symbols,
    is_module_name,
    module_of_inode,
)
from stats_svc.rows import ClaimKey, ClaimRow, Snapshot
from stats_svc.session import MAX_INTERRUPTED, Caller, Fence, Instance, Session
from stats_svc.system import System, Woken
from stats_svc.systems import DEFAULT_POLICY, Systems


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """What is left of a batch that was applied before."""

    events: Mapping[int, int]
    """Those of its calls that have ended, and the event that each left."""

    is_last: bool
    """Whether none was applied after it. What earlier ones have left may be kept no longer: they were answered."""


_VERDICTS: Final = {
    Verdict.PROCEED: pb.OperationResult.VERDICT_PROCEED,
    Verdict.DUPLICATE: pb.OperationResult.VERDICT_DUPLICATE,
    Verdict.SHARED: pb.OperationResult.VERDICT_SHARED,
    Verdict.INTERRUPTED: pb.OperationResult.VERDICT_INTERRUPTED,
    Verdict.FAILED: pb.OperationResult.VERDICT_FAILED,
}
_INTERRUPTED: Final = Answer(Verdict.INTERRUPTED, "EINTR", waited=True)
_PROCEED_AFTER_WAIT: Final = Answer(Verdict.PROCEED, waited=True)
_SHARED: Final = Answer(Verdict.SHARED, waited=True)

_TOO_MUCH: Final = "more was asked for at once than is told at once"

_ENDS: Final = frozenset({"finish_call", "remove_module", "record_calls"})
"""Operations that are not applied twice; all others can be asked again."""

_WAITING: Final = frozenset({"enter_gate", "check_name", "reserve_name", "await_init", "claim_request"})
"""Operations that may have to wait for another call."""

_REQUEST_ENDS: Final = frozenset({"settle_claim", "finish_request"})
"""Those after which a request is in flight no more, a client's or the kernel's."""

_NAMING: Final = frozenset({"enter_gate", "check_name", "reserve_name", "form_module"})
"""Those that name the call's module."""

MAX_TOLD_BYTES: Final = 32 << 20
"""Records and symbols that a stream is told by one commit, about; loaders ask for a tenth of it at most. Who asks for
more at once is to ask again."""


class LostClaim(NotNow):
    """The claim that a call is part of is not held any more."""


class LedgerState:
    """All systems and all loader processes."""

    def __init__(
        self, snapshot: Snapshot, clock_ns: Callable[[], int] = time.monotonic_ns, *, system_limit: int = 0
    ) -> None:
        """Take over what is stored; ``clock_ns`` is what requests of the kernel are timed by.

        Systems are created up to ``system_limit``; 0 is no limit.
        """
        self._clock_ns = clock_ns
        self.systems = Systems(snapshot, system_limit)
        self.instances = {
            row.instance_id: Instance(
                row.instance_id,
                row.loader,
                applied_sequence=row.applied_sequence,
                last_seen_ns=row.last_seen_ns,
                has_news=False,
                nothing_before=False,
                restored=True,
                fence=Fence(row.fence),
            )
            for row in snapshot.instances
        }
        for row in snapshot.claims:
            if (holder := self.instances.get(row.instance_id)) is not None:
                holder.requests[row.call_id] = row.system
        self._stored_claims: Mapping[ClaimKey, ClaimRow] | None = None
        """What the store has of the claims of the batch that is being applied, if that was looked up."""

        self._heirs: dict[str, Instance] = {}
        """By the former ids of loader processes that are connected, what they are now."""

        self._operations: dict[str, Callable[[Group, Session, System, pb.Operation], None]] = {
            "enter_gate": self._enter_gate,
            "check_name": self._check_name,
            "reserve_name": self._reserve_name,
            "finish_call": self._finish_call,
            "remove_module": self._remove_module,
            "interrupt": self._interrupt,
            "record_calls": self._record_calls,
            "record_modules": self._record_modules,
            "read_initstate": self._read_initstate,
            "find_symbols": self._find_symbols,
            "form_module": self._form_module,
            "await_init": self._await_init,
            "allocate_memory": self._allocate_memory,
            "free_memory": self._free_memory,
            "request_module": self._request_module,
            "finish_request": self._finish_request,
            "claim_request": self._claim_request,
            "settle_claim": self._settle_claim,
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
        stored_claims: Mapping[ClaimKey, ClaimRow] | None = None,
    ) -> None:
        """Apply operations of a batch in their order.

        ``left_behind`` is given for a batch that was applied before, ``stored_claims`` for one that has claims.
        """
        self._stored_claims = stored_claims
        calls = session.instance.calls
        for operation in operations:
            kind = operation.WhichOneof("kind")
            system = self.systems.get(operation.system)
            try:
                if kind == "open_system":
                    self._open_system(group, session, system, operation, now_ns)
                    continue
                if kind == "finish_call" or kind in _REQUEST_ENDS:
                    _end(session.instance, operation)
                if system is None:
                    raise NotFound(f"there is no system {shown(operation.system)}")
                if peak_held_bytes > system.peak_held_bytes:
                    system.peak_held_bytes = peak_held_bytes
                if left_behind is not None and self._apply_again(group, session, system, operation, left_behind):
                    continue
                if kind is None:
                    raise BadRequest(f"the operation of call {operation.call_id} asks nothing that is known here")
                if kind in STEPS:
                    _check_in_flight(session.instance, system, operation.call_id)
                    if kind in _NAMING or operation.call_id not in calls:
                        calls[operation.call_id] = (system.id, _module_of(kind, operation))
                self._operations[kind](group, session, system, operation)
            except LostClaim as error:
                group.results_of(session).results.add(
                    call_id=operation.call_id, verdict=pb.OperationResult.VERDICT_LOST, message=error.sentence
                )
            except ModpressureError as error:
                if kind == "finish_call" and system is not None:
                    # It is over, whatever it should have been: it must not keep who waits for it.
                    self._wake(group, system.give_gate_up((session.instance.id, operation.call_id)))
                group.results_of(session).results.add(
                    call_id=operation.call_id,
                    verdict=pb.OperationResult.VERDICT_INVALID,
                    message=error.sentence,
                    over_limit=isinstance(error, OverLimit),
                )

    def _apply_again(
        self,
        group: Group,
        session: Session,
        system: System,
        operation: pb.Operation,
        left_behind: LeftBehind,
    ) -> bool:
        """Answer an operation of a batch that was applied before; return False if it is to be evaluated once more."""
        call_id = operation.call_id
        kind = operation.WhichOneof("kind")
        event_id = left_behind.events.get(call_id)
        if kind == "record_calls":
            system.check_record(operation.record_calls)
            self._answer(group, session, call_id, PROCEED)
            return True
        if event_id is not None:
            # The call has ended. What it asked before that was answered, and must not take hold of anything again.
            if kind in _ENDS:
                self._answer(group, session, call_id, PROCEED, event_id)
                caller, ended = (session.instance.id, call_id), operation.finish_call.call
                if ended.outcome == call_pb2.OUTCOME_LIVE and not system.holds(ended.module, caller):
                    # Unloaded again since, when its loader could not be told.
                    group.released.append(caller)
            return True
        if kind == "finish_call":
            # Counted once, whatever has been forgotten since.
            raise NotNow(
                f"call {call_id} left nothing: it was refused, or system {system.id!r} was reset since it ended"
            )
        if kind in _WAITING and call_id in session.instance.interrupted:
            self._answer(group, session, call_id, _INTERRUPTED)
            return True
        if kind == "remove_module" and not left_behind.is_last:
            raise NotNow(f"what became of the removal by call {call_id} is not known any more: more was done since")
        # A removal that left nothing failed, and changed nothing.
        return False

    def _answer(self, group: Group, session: Session, call_id: int, answer: Answer, event_id: int = 0) -> None:
        if answer.verdict is not Verdict.PROCEED:
            session.instance.requests.pop(call_id, None)
        group.results_of(session).results.add(
            call_id=call_id,
            verdict=_VERDICTS[answer.verdict],
            errno=answer.errno,
            waited=answer.waited,
            event_id=event_id,
            exit_status=answer.exit_status,
        )

    def _answer_or_wait(
        self, group: Group, session: Session, system: System, call_id: int, answer: Answer | None
    ) -> None:
        session.instance.interrupted.pop(call_id, None)
        if answer is None:
            session.waiting.add(call_id)
            session.instance.waits[call_id] = system
        else:
            self._answer(group, session, call_id, answer)

    def _wake(self, group: Group, woken: Woken, record: pb.ClaimRecord | None = None) -> None:
        """Answer those who waited, each on the stream on which it last asked; who is away will ask again.

        ``record`` is that of the claim that they waited for, if they did.
        """
        for (instance_id, call_id), answer in woken:
            instance = self.instances.get(instance_id)
            if instance is None:
                continue
            instance.waits.pop(call_id, None)
            session = instance.session
            if session is not None and call_id in session.waiting:
                session.waiting.discard(call_id)
                if record is None:
                    self._answer(group, session, call_id, answer)
                elif answer is not _SHARED or _may_tell(group, session):
                    self._answer(group, session, call_id, answer)
                    self._tell_record(group, session, record)
                else:
                    instance.requests.pop(call_id, None)
                    group.results_of(session).results.add(
                        call_id=call_id, verdict=pb.OperationResult.VERDICT_LOST, message=_TOO_MUCH
                    )

    @staticmethod
    def _tell_record(group: Group, session: Session, record: pb.ClaimRecord) -> None:
        """Add a record to the last answer."""
        group.results_of(session).results[-1].record.CopyFrom(record)
        group.told_bytes[session] += record.ByteSize()

    @staticmethod
    def _check_told(group: Group, session: Session) -> None:
        """Return if a stream may be told more symbols. OverLimit if not."""
        if not _may_tell(group, session):
            raise OverLimit(_TOO_MUCH)

    def _open_system(
        self, group: Group, session: Session, system: System | None, operation: pb.Operation, now_ns: int
    ) -> None:
        if system is None:
            system = self.systems.create(group, operation.system, DEFAULT_POLICY, now_ns)
        group.results_of(session).results.add(
            call_id=operation.call_id,
            verdict=pb.OperationResult.VERDICT_PROCEED,
            policy=call_pb2.Policy.ValueType(system.policy),
            has_limits=system.limits is not None,
        )

    def _enter_gate(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller = (session.instance.id, operation.call_id)
        answer = system.enter(check_inode(operation.enter_gate.inode), caller)
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _check_name(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller = (session.instance.id, operation.call_id)
        if system.memory is not None:
            system.memory.settle(group, caller)
        answer = system.modules.check(check_module_name(operation.check_name.module), caller)
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _reserve_name(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        instance = session.instance
        name = check_module_name(operation.reserve_name.module)
        caller, asked = (instance.id, operation.call_id), operation.reserve_name
        check_symbols(asked.symbols)
        self._check_told(group, session)
        answer = system.reserve(group, name, caller, instance.loader)
        if answer is None or answer.verdict is not Verdict.PROCEED:
            self._answer_or_wait(group, session, system, operation.call_id, answer)
            return
        value = ""
        if asked.HasField("formation"):
            errno = "ENOMEM"
            if system.links.has_room(name, asked):
                formed, value = system.form(group, name, caller, asked.formation)
                errno = formed.errno
            if errno:
                answer = answer._replace(errno=errno)
        self._answer_or_wait(group, session, system, operation.call_id, answer)
        result = group.results_of(session).results[-1]
        result.value = value
        group.told_bytes[session] += system.links.tell(asked.symbols, result)

    def _find_symbols(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        symbols = operation.find_symbols.symbols
        check_symbols(symbols)
        self._check_told(group, session)
        self._answer(group, session, operation.call_id, PROCEED)
        group.told_bytes[session] += system.links.tell(symbols, group.results_of(session).results[-1])

    def _form_module(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        asked, caller = operation.form_module, (session.instance.id, operation.call_id)
        answer, value = system.form(group, check_module_name(asked.module), caller, asked.formation)
        self._answer(group, session, operation.call_id, answer)
        group.results_of(session).results[-1].value = value

    def _await_init(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        name = check_module_name(operation.await_init.module)
        answer = system.links.wait(name, (session.instance.id, operation.call_id))
        self._answer_or_wait(group, session, system, operation.call_id, answer)

    def _finish_call(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        call_id, instance, finish = operation.call_id, session.instance, operation.finish_call
        claim = self._claim_of(system, (instance.id, finish.claim)) if finish.claim else None
        if claim is not None:
            _check_room(claim, finish.call.ByteSize() + len(finish.part.encode()))
        event_id, woken = system.finish(group, instance, call_id, finish)
        instance.interrupted.pop(call_id, None)
        self._answer(group, session, call_id, PROCEED, event_id)
        self._wake(group, woken)
        if claim is not None:
            part = pb.ClaimPart(name=finish.part, call=finish.call)
            _place(part.call, system, instance, call_id, event_id)
            system.claims.add(group, claim, part)
            if finish.settles:
                instance.requests.pop(finish.claim, None)
                self._tell_result(group, claim, system.claims.settle(group, claim))

    def _remove_module(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        call_id, instance, asked = operation.call_id, session.instance, operation.remove_module
        claim = self._claim_of(system, (instance.id, asked.claim)) if asked.claim else None
        if claim is not None:
            _check_room(claim, asked.unload.ByteSize())
        event_id, answer = system.unload(group, instance, call_id, asked.unload)
        self._answer(group, session, call_id, answer, event_id)
        if claim is not None:
            part = pb.ClaimPart(unload=asked.unload)
            part.unload.errno = answer.errno
            _place(part.unload, system, instance, call_id, event_id)
            system.claims.add(group, claim, part)
            instance.requests.pop(asked.claim, None)
            self._tell_result(group, claim, system.claims.settle(group, claim))

    # --- requests of clients ---

    @staticmethod
    def _claim_of(system: System, owner: Caller) -> Claim:
        claim = system.claims.of(owner)
        if claim is None:
            raise LostClaim(f"call {owner[1]} does not hold its claim on a client's request any more")
        return claim

    def _claim_request(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        call_id, asked = operation.call_id, operation.claim_request
        check_claim(asked.request_id, asked.digest)
        _check_in_flight(session.instance, system, call_id)
        if not _may_tell(group, session):
            raise LostClaim(_TOO_MUCH)
        if self._stored_claims is None:
            raise BadRequest(f"the batch of call {call_id} does not say that it has claims", field="has_claims")
        stored = self._stored_claims.get((system.id, asked.request_id))
        caller = (session.instance.id, call_id)
        held = system.claims.of(caller)
        if held is not None and held.request_id != asked.request_id:
            raise BadRequest(f"call {call_id} holds a claim on another request id: {shown(held.request_id)}")
        answer, record = system.claims.claim(group, asked.request_id, asked.digest, caller, stored)
        if answer is None or answer is PROCEED:
            session.instance.requests[call_id] = system.id
        self._answer_or_wait(group, session, system, call_id, answer)
        if answer is not None:
            self._tell_record(group, session, record)

    def _settle_claim(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        settle = operation.settle_claim
        if len(settle.result) > MAX_RESULT_BYTES:
            raise BadRequest(
                f"a result of {len(settle.result)} bytes is longer than {MAX_RESULT_BYTES}", field="result"
            )
        claim = system.claims.of((session.instance.id, operation.call_id))
        # One that is not held has been settled: this is asked again.
        if claim is not None:
            if settle.gives_up:
                self._give_up(group, system, claim)
            else:
                self._tell_result(group, claim, system.claims.settle(group, claim, settle.result))
        self._answer(group, session, operation.call_id, PROCEED)

    def _tell_result(self, group: Group, claim: Claim, waiters: Iterable[Caller]) -> None:
        self._wake(group, [(waiter, _SHARED) for waiter in waiters], claim.record)

    def _give_up(self, group: Group, system: System, claim: Claim) -> None:
        heir = system.claims.give_up(group, claim)
        if heir is not None:
            self._wake(group, [(heir, _PROCEED_AFTER_WAIT)], claim.record)

    def _interrupt(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        instance, call_id = session.instance, operation.call_id
        caller = (instance.id, call_id)
        if system.interrupt(caller):
            instance.interrupted[call_id] = None
            if len(instance.interrupted) > MAX_INTERRUPTED:
                del instance.interrupted[next(iter(instance.interrupted))]
            self._wake(group, [(caller, _INTERRUPTED)])

    def _record_calls(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        system.record(group, session.instance, operation.record_calls)
        self._answer(group, session, operation.call_id, PROCEED)

    def _record_modules(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        system.record_modules(group, session.instance, operation.call_id, operation.record_modules)
        self._answer(group, session, operation.call_id, PROCEED)

    def _read_initstate(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        entry = system.modules.get(operation.read_initstate.module)
        group.results_of(session).results.add(
            call_id=operation.call_id,
            verdict=pb.OperationResult.VERDICT_PROCEED,
            live=entry is not None and entry.state is State.LIVE,
        )

    def _allocate_memory(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        call_id = operation.call_id
        if system.memory is None:
            raise BadRequest(f"system {system.id!r} has no limits of memory", field="system")
        caller = (session.instance.id, call_id)
        shortage = system.memory.allocate(group, caller, allocation_from_proto(operation.allocate_memory))
        if shortage is None:
            self._answer(group, session, call_id, PROCEED)
            return
        group.results_of(session).results.add(
            call_id=call_id,
            verdict=pb.OperationResult.VERDICT_FAILED,
            errno="ENOMEM",
            shortage=pb.Shortage(
                area=shortage.area.value, asked_bytes=shortage.asked_bytes, left_bytes=shortage.left_bytes
            ),
        )

    def _free_memory(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        if system.memory is not None:
            system.memory.free(group, (session.instance.id, operation.call_id), "image")
        self._answer(group, session, operation.call_id, PROCEED)

    # --- requests of the kernel ---

    def _request_module(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller, asked = (session.instance.id, operation.call_id), operation.request_module
        _check_in_flight(session.instance, system, operation.call_id)
        answer = system.autoload.request(asked.name, caller, self._clock_ns(), merge=asked.merge)
        if answer is None or answer.verdict is Verdict.PROCEED:
            session.instance.requests[operation.call_id] = system.id
        self._answer_or_wait(group, session, system, operation.call_id, answer)
        if system.autoload.next_expiry_ns is not None:
            self.systems.queued[system.id] = system

    def _finish_request(self, group: Group, session: Session, system: System, operation: pb.Operation) -> None:
        caller, status = (session.instance.id, operation.call_id), operation.finish_request.exit_status
        told = system.autoload.finish(caller, "", status, self._clock_ns())
        self._answer(group, session, operation.call_id, PROCEED)
        self._wake(group, told)

    def expire_requests(self, group: Group) -> None:
        """Answer the requests that have waited for a place for too long."""
        now_ns = self._clock_ns()
        for system in list(self.systems.queued.values()):
            self._wake(group, system.autoload.expire(now_ns))
            if system.autoload.next_expiry_ns is None:
                del self.systems.queued[system.id]

    def take_requests(self, instance: Instance, requests: Iterable[pb.HeldRequest]) -> None:
        """Give a loader the places back that its requests have: this process may have been started since."""
        for held in requests:
            system = self.systems.get(held.system)
            if system is not None:
                instance.requests[held.call_id] = system.id
                request = held.request
                system.autoload.restore(request.name, (instance.id, held.call_id), merge=request.merge)

    # --- loader processes ---

    @staticmethod
    def check_hello(instance: Instance, hello: pb.Hello) -> None:
        """Return if a loader has no more in flight with what it says than it may. OverLimit if it has."""
        calls = instance.calls.keys() | {call.call_id for call in hello.calls}
        requests = instance.requests.keys() | {held.call_id for held in hello.requests}
        if len(calls) + len(requests) > MAX_CALLS_IN_FLIGHT:
            raise _too_many(instance)

    def take_calls(self, instance: Instance, calls: Iterable[pb.CallInFlight]) -> None:
        """Learn which calls of a loader are in flight, and give the gates back that they hold.

        This process may have been started since, and a call that holds nothing is stored nowhere.
        """
        for call in calls:
            system = self.systems.get(call.system)
            if system is None or 0 < call.finish_sequence <= instance.applied_sequence:
                # The call has ended, and its loader was not told. That may die before it asks again: a call that is in
                # flight would be taken for one that was never answered.
                continue
            caller = (instance.id, call.call_id)
            instance.calls.setdefault(call.call_id, (system.id, call.module or module_of_inode(call.inode)))
            is_idle = caller not in system.gate.held and call.call_id not in instance.waits
            if call.inode and is_idle and system.enter(call.inode, caller) is None:
                # Somebody else was given it meanwhile. The call goes on; there is no result of it to share.
                system.gate.interrupt(caller)

    def inherit(self, instance: Instance, former: Iterable[str]) -> None:
        """Note which ids the process of an instance had before, while it is connected."""
        instance.former = tuple(former)
        for former_id in instance.former:
            heir = self._heirs.get(former_id)
            if heir is None or covers(instance.patterns or (), heir.patterns or ()):
                self._heirs[former_id] = instance

    def disinherit(self, instance: Instance) -> None:
        """Forget them; when it comes back it says so again."""
        for former in instance.former:
            if self._heirs.get(former) is instance:
                del self._heirs[former]

    def heir_of(self, instance_id: str) -> Instance | None:
        """Return the loader process that had an id last; None if it is over or away."""
        itself = self.instances.get(instance_id)
        return self._heirs.get(instance_id) if itself is None or itself.fence else itself

    def released_of(self, instance: Instance, live_call_ids: Iterable[int]) -> list[int]:
        """Return which of a loader's calls own no live module any more, wherever it was unloaded meanwhile."""
        ids = {instance.id, *instance.former}
        live = {
            entry.owner[1]
            for system in self.systems.values()
            for entry in system.modules
            if entry.owner[0] in ids and entry.state is State.LIVE
        }
        return [call_id for call_id in live_call_ids if call_id not in live]

    def systems_held_by(self, instance: Instance) -> set[str]:
        """Return the systems in which the calls of a loader hold anything, or have asked something."""
        held = {system for system, _ in instance.calls.values()} | {system.id for system in instance.waits.values()}
        for name, system in self.systems.items():
            owners = [entry.owner for entry in system.modules if entry.state is not State.LIVE]
            owners += [*system.gate.held, *system.autoload.callers()]
            if system.memory is not None:
                owners += system.memory.account.callers()
            if any(owner[0] == instance.id for owner in owners) or system.claims.owned_by(instance.id):
                held.add(name)
        return held

    def expire(self, group: Group, instance: Instance) -> int:
        """Take from a loader that is gone what its calls held or waited for, and log them; return how many there were.

        Its live modules stay: it is one machine, of which some CPUs are gone.
        """
        abandoned = {(system, call_id): module for call_id, (system, module) in instance.calls.items()}
        for call_id, system in instance.waits.items():
            system.interrupt((instance.id, call_id))
        instance.calls.clear()
        instance.requests.clear()
        instance.waits.clear()
        instance.interrupted.clear()
        for system in self.systems.values():
            for entry in [e for e in system.modules if e.owner[0] == instance.id and e.state is not State.LIVE]:
                abandoned[system.id, entry.owner[1]] = entry.name
                self._wake(group, system.remove(group, entry.name))
            for caller in [caller for caller in system.gate.held if caller[0] == instance.id]:
                abandoned.setdefault((system.id, caller[1]), "")
                self._wake(group, system.give_gate_up(caller))
            if system.memory is not None:
                for caller in system.memory.expire(group, instance.id):
                    abandoned.setdefault((system.id, caller[1]), "")
            for caller in [caller for caller in system.autoload.callers() if caller[0] == instance.id]:
                self._wake(group, system.autoload.drop(caller, self._clock_ns()))
            for claim in system.claims.owned_by(instance.id):
                self._give_up(group, system, claim)
        for (system_id, call_id), module in abandoned.items():
            if system_id in self.systems:
                self.systems[system_id].abandon(group, instance, call_id, module)
        return len(abandoned)


def _check_in_flight(instance: Instance, system: System, call_id: int) -> None:
    """Return if a call or request of a loader process is in flight already, or may be.

    OverLimit if there are too many, BadRequest if it was begun in another system.
    """
    begun = _begun_in(instance, call_id)
    if begun and begun != system.id:
        raise _elsewhere(call_id, begun, system.id)
    if not begun and len(instance.calls) + len(instance.requests) >= MAX_CALLS_IN_FLIGHT:
        raise _too_many(instance)


def _end(instance: Instance, operation: pb.Operation) -> None:
    """Note that a call or request is in flight no more. BadRequest if it was begun in another system."""
    call_id = operation.call_id
    begun = _begun_in(instance, call_id)
    if begun and begun != operation.system:
        raise _elsewhere(call_id, begun, operation.system)
    (instance.calls if operation.HasField("finish_call") else instance.requests).pop(call_id, None)


def _begun_in(instance: Instance, call_id: int) -> str:
    return instance.calls.get(call_id, (instance.requests.get(call_id, ""), ""))[0]


def _elsewhere(call_id: int, begun: str, system: str) -> BadRequest:
    return BadRequest(f"call {call_id} was begun in system {begun!r}, not in {shown(system)}", field="system")


def _too_many(instance: Instance) -> OverLimit:
    return OverLimit(f"loader {instance.loader!r} can't have more than {MAX_CALLS_IN_FLIGHT} calls in flight")


def _may_tell(group: Group, session: Session) -> bool:
    """Return whether a stream may be told more by this commit."""
    return group.told_bytes[session] < MAX_TOLD_BYTES


def _check_room(claim: Claim, part_bytes: int) -> None:
    """Return if a part may be added to a claim's record. BadRequest if that would be too long to be told."""
    if claim.record.ByteSize() + part_bytes > MAX_RECORD_BYTES:
        raise BadRequest(
            f"the record of request {claim.request_id!r} can't be longer than {MAX_RECORD_BYTES} bytes", field="claim"
        )


def _place(
    ended: call_pb2.Call | call_pb2.Unload, system: System, instance: Instance, call_id: int, event_id: int
) -> None:
    """Fill in of a call what its event has."""
    ended.system = system.id
    ended.instance_id = instance.id
    ended.loader = instance.loader
    ended.call_id = call_id
    ended.event_id = event_id


def _module_of(kind: str, operation: pb.Operation) -> str:
    """Return the module of a call that asks something, as far as that says it; empty if it does not, or is refused."""
    if kind == "enter_gate":
        return module_of_inode(operation.enter_gate.inode)
    name = getattr(getattr(operation, kind), "module", "") if kind in _NAMING else ""
    return name if is_module_name(name) else ""
