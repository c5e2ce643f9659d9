"""A client's request that is carried out once, by the client's id of it.

The id is claimed at stats_svc before anything is done, and settled with what came of it: a request that is sent again,
to whatever loader, is given that. Each call that ends is recorded with the claim by the transaction that counts it; so
where this loader goes away in between, the next one goes on with the calls that are left.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from loader_svc.ledger_client import LedgerClient
from modpressure.errors import ModpressureError, Unavailable
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb

T = TypeVar("T")

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Part:
    """What a call is of a claimed request."""

    claim: int
    """The call id that holds the claim."""

    name: str
    settles: bool


def digest_of(request: Message) -> bytes:
    """Return what tells a request from all others of its system, its ``request_id`` apart.

    Each system has its own ids, and takes them along when it is imported under another name.
    """
    copy = type(request)()
    copy.CopyFrom(request)
    for name in ("request_id", "system"):
        copy.ClearField(name)
    digest = hashlib.blake2b(type(request).__name__.encode(), digest_size=DIGEST_BYTES)
    digest.update(copy.SerializeToString(deterministic=True))
    return digest.digest()


class Claim:
    """A claim on a client's request id, held while the request is carried out."""

    def __init__(self, ledger: LedgerClient, system: str, request_id: str, digest: bytes) -> None:
        self._ledger = ledger
        self._system = system
        self._request_id = request_id
        self._digest = digest
        self._call_id = 0
        self._settled = False
        self._recorded: defaultdict[str, deque[call_pb2.Call]] = defaultdict(deque)
        self.record = pb.ClaimRecord()
        """What was done for the request before; with ``is_complete`` all of it."""

        self.is_complete = False

    async def once(self, work: Callable[[], Awaitable[T]], result_of: Callable[[T], bytes] = lambda _: b"") -> T:
        """Claim the id, do ``work``, which makes only calls that are not recorded, and settle the claim.

        NotNow if the id was used for another request. Where the work can't be done, nobody holds the claim after it.
        """
        self._call_id = self._ledger.new_call_id()
        asked = pb.ClaimRequest(request_id=self._request_id, digest=self._digest)
        result = await self._ask(pb.Operation(claim_request=asked))
        if result.verdict == pb.OperationResult.VERDICT_INTERRUPTED:
            raise Unavailable(f"request {self._request_id!r} is being carried out; nobody waits for it here any more")
        self.is_complete = result.verdict == pb.OperationResult.VERDICT_SHARED
        self.record = result.record
        for part in self.record.parts:
            # It may have been called otherwise, and imported since.
            (part.call if part.HasField("call") else part.unload).system = self._system
            if part.HasField("call"):
                self._recorded[part.name].append(part.call)
        try:
            done = await work()
            if not self.is_complete and not self._settled:
                await self._settle(pb.SettleClaim(result=result_of(done)))
        except BaseException:
            if not self.is_complete and not self._settled:
                with contextlib.suppress(ModpressureError):
                    await self._settle(pb.SettleClaim(gives_up=True))
            raise
        return done

    def recorded(self, name: str) -> call_pb2.Call | None:
        """Return the next call that is recorded of a part, None if there is none."""
        calls = self._recorded[name]
        return calls.popleft() if calls else None

    def part(self, name: str, *, settles: bool) -> Part:
        """Return what a call is of the request."""
        return Part(self._call_id, name, settles)

    def is_settled_by(self, part: Part) -> None:
        """Note that a call that is part of the request is counted."""
        self._settled = self._settled or part.settles

    def interrupt(self) -> None:
        """Wait no longer for whoever carries the request out now; what is done here goes on."""
        self._ledger.interrupt(self._system, self._call_id)

    async def _settle(self, settle: pb.SettleClaim) -> None:
        await self._ask(pb.Operation(settle_claim=settle))
        self._settled = True

    async def _ask(self, operation: pb.Operation) -> pb.OperationResult:
        operation.call_id = self._call_id
        operation.system = self._system
        return await self._ledger.ask(operation)
