"""Claims on clients' request ids: each request is carried out once, whichever loaders it is sent to.

Who claims an id first carries the request out; each call that ends for it is added to the claim's record by the very
transaction that counts the call. Later claims wait, and are given the record when the claim is settled. Where a claim's
loader is gone the first who waits, or the next to come, goes on with what the record holds: those calls are counted.

Claims that are held are in memory. What nobody holds is looked up in the store before a claim is applied, from another
thread; so that nothing is overlooked that ends meanwhile, a row stays here while it is looked up or not yet committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from modpressure.errors import NotNow
from modpressure.kernel.modules_list import PROCEED, Answer, Verdict
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.group import Group
from stats_svc.rows import ClaimRow
from stats_svc.session import Caller


@dataclass(slots=True, eq=False)
class Claim:
    """A client's request that is being carried out."""

    request_id: str
    digest: bytes
    owner: Caller
    record: pb.ClaimRecord
    waiters: dict[Caller, None] = field(default_factory=dict)


class Claims:
    """The claims of one system."""

    def __init__(self, system: str) -> None:
        self._system = system
        self._held: dict[str, Claim] = {}
        self._by_owner: dict[Caller, Claim] = {}
        self._waits: dict[Caller, Claim] = {}
        self._recent: dict[str, ClaimRow] = {}
        """Claims that nobody holds any more, while they are kept."""

        self._kept: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """How many requests are being carried out."""
        return len(self._held)

    def restore(self, row: ClaimRow) -> None:
        """Put a claim back that was held when it was stored."""
        record = pb.ClaimRecord.FromString(row.record)
        self._hold(Claim(row.request_id, row.digest, (row.instance_id, row.call_id), record))

    def _hold(self, claim: Claim) -> None:
        self._held[claim.request_id] = self._by_owner[claim.owner] = claim

    def of(self, owner: Caller) -> Claim | None:
        """Return the claim that a call holds."""
        return self._by_owner.get(owner)

    def owned_by(self, instance_id: str) -> list[Claim]:
        """Return the claims that the calls of a loader process hold."""
        return [claim for owner, claim in self._by_owner.items() if owner[0] == instance_id]

    # --- what is looked up ---

    def keep(self, request_ids: Iterable[str]) -> None:
        """Keep what becomes of some ids in memory, until they are let go of as often."""
        self._kept.update(request_ids)

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Forget what is in the store and looked up by nobody."""
        for request_id in request_ids:
            self._kept[request_id] -= 1
            if not self._kept[request_id]:
                del self._kept[request_id]
                self._recent.pop(request_id, None)

    # --- a claim's life ---

    def claim(
        self, group: Group, request_id: str, digest: bytes, caller: Caller, stored: ClaimRow | None
    ) -> tuple[Answer | None, pb.ClaimRecord]:
        """Claim an id for a call; ``stored`` is what the store had of it. None: the answer comes later.

        Asking again with the same caller gives the same answer. NotNow if the id was used for another request.
        """
        held = self._held.get(request_id)
        row = self._recent.get(request_id, stored) if held is None else None
        known = held or row
        if known is not None and known.digest != digest:
            raise NotNow(
                f"request_id {request_id!r} was used for another request; it stands for that one for a day",
                field="request_id",
            )
        if held is not None:
            if held.owner == caller:
                return PROCEED, held.record
            if self._waits.get(caller, held) is not held:
                # A call waits for one thing at a time; one that asks for another has given the first up.
                self.interrupt(caller)
            held.waiters[caller] = None
            self._waits[caller] = held
            return None, held.record
        record = pb.ClaimRecord() if row is None else pb.ClaimRecord.FromString(row.record)
        if row is not None and row.settled:
            return Answer(Verdict.SHARED), record
        claim = Claim(request_id, digest, caller, record)
        self._hold(claim)
        self._note(group, claim)
        return PROCEED, record

    def add(self, group: Group, claim: Claim, part: pb.ClaimPart) -> None:
        """Add a call that has ended to a claim's record."""
        claim.record.parts.append(part)
        self._note(group, claim)

    def settle(self, group: Group, claim: Claim, result: bytes = b"") -> list[Caller]:
        """End a claim; return who waited for its record."""
        claim.record.result = result
        self._drop(group, claim, settled=True)
        for waiter in claim.waiters:
            del self._waits[waiter]
        return list(claim.waiters)

    def give_up(self, group: Group, claim: Claim) -> Caller | None:
        """Take a claim from its holder; return who holds it now, the first who waited, if anybody did."""
        if not claim.waiters:
            self._drop(group, claim, settled=False)
            return None
        del self._by_owner[claim.owner]
        claim.owner = heir = next(iter(claim.waiters))
        del claim.waiters[heir], self._waits[heir]
        self._hold(claim)
        self._note(group, claim)
        return heir

    def interrupt(self, caller: Caller) -> bool:
        """End the wait of a call; return whether it waited."""
        claim = self._waits.pop(caller, None)
        if claim is None:
            return False
        del claim.waiters[caller]
        return True

    def _drop(self, group: Group, claim: Claim, *, settled: bool) -> None:
        del self._held[claim.request_id], self._by_owner[claim.owner]
        claim.owner = ("", 0)
        self._recent[claim.request_id] = self._note(group, claim, settled=settled)
        # Until the store has it.
        self.keep([claim.request_id])
        group.unheld.append((self, claim.request_id))

    def _note(self, group: Group, claim: Claim, *, settled: bool = False) -> ClaimRow:
        instance_id, call_id = claim.owner
        record = claim.record.SerializeToString()
        row = ClaimRow(self._system, claim.request_id, claim.digest, instance_id, call_id, settled, record)
        # Someone may hold it again before it is forgotten.
        self._recent.pop(claim.request_id, None)
        group.delta(self._system).claims[claim.request_id] = row
        return row
