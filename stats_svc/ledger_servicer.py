"""LedgerService: the streams of the loaders, handed to the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from modpressure.access import patterns
from modpressure.errors import BadRequest, OverLimit
from modpressure.grpc_errors import translate_errors
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceServicer
from stats_svc.ledger import Ledger
from stats_svc.session import Session

MAX_BATCH_OPERATIONS: Final = 10_000
"""Operations of one batch, with the calls and modules that they record; ours send a tenth of it. While one is
applied all other streams wait."""

HEARTBEATS_PER_LEASE: Final = 4


class LedgerServicer(LedgerServiceServicer):
    """Serves ``modpressure.v1.LedgerService``."""

    def __init__(self, ledger: Ledger, *, message_limit_bytes: int = 0) -> None:
        """Serve a ledger. Loaders are told the longest message that the server takes; 0 says nothing."""
        self._ledger = ledger
        self._message_limit_bytes = message_limit_bytes

    async def Connect(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> None:
        """Connect a loader, until either side ends the stream."""
        async with translate_errors(context, "Ledger.Connect"):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("kind") != "hello":
                raise BadRequest("the first message of a stream must be a hello", field="hello")
            session, welcome = await self._ledger.connect(first.hello, patterns())
            welcome.message_limit_bytes = self._message_limit_bytes
            graceful = False
            try:
                await context.write(pb.ConnectResponse(welcome=welcome))
                listening = asyncio.create_task(self._listen(request_iterator, session))
                telling = asyncio.create_task(_tell(session, context))
                beating = asyncio.create_task(_beat(session, welcome.lease_seconds))
                try:
                    await asyncio.wait({listening, telling}, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    listening.cancel()
                    telling.cancel()
                    beating.cancel()
                    ends = await asyncio.gather(listening, telling, return_exceptions=True)
                for error in ends:
                    if isinstance(error, Exception):
                        raise error
                graceful = True
            finally:
                self._ledger.disconnect(session, graceful=graceful)

    async def _listen(self, request_iterator: AsyncIterator[pb.ConnectRequest], session: Session) -> None:
        async for request in request_iterator:
            self._ledger.hear(session)
            self._ledger.allow(session, patterns())
            kind = request.WhichOneof("kind")
            if kind == "batch":
                _check(request.batch)
                await self._ledger.submit(session, request.batch)
            elif kind != "heartbeat":
                raise BadRequest("after the hello a stream has batches and heartbeats only", field="batch")
        # A loader that was killed looks the same up to here; but to that one the last message can't be written.
        await self._ledger.finish(session)


def _check(batch: pb.OperationBatch) -> None:
    """Return if a loader asks for no more than it may. OverLimit ends its stream."""
    asked = len(batch.operations)
    for operation in batch.operations:
        if operation.HasField("record_calls"):
            asked += len(operation.record_calls.calls)
        elif operation.HasField("record_modules"):
            asked += len(operation.record_modules.modules)
    if asked > MAX_BATCH_OPERATIONS:
        raise OverLimit(
            f"{asked} operations in a batch, with what they record, are more than {MAX_BATCH_OPERATIONS}",
            field="operations",
        )


async def _tell(session: Session, context: Any) -> None:
    while (results := await session.next_results()) is not None:
        await context.write(pb.ConnectResponse(results=results))


async def _beat(session: Session, lease_seconds: float) -> None:
    """Have the loader hear that this process runs, whatever else it has to wait for."""
    while lease_seconds > 0:
        await asyncio.sleep(lease_seconds / HEARTBEATS_PER_LEASE)
        session.deliver(pb.ResultBatch())
