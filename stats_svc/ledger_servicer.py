"""LedgerService: the streams of the loaders, handed to the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from modpressure.errors import BadRequest
from modpressure.grpc_errors import translate_errors
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceServicer
from stats_svc.ledger import Ledger
from stats_svc.session import Session


class LedgerServicer(LedgerServiceServicer):
    """Serves ``modpressure.v1.LedgerService``."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def Connect(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> None:
        """Connect a loader, until either side ends the stream."""
        async with translate_errors(context, "Ledger.Connect"):
            first = await anext(request_iterator, None)
            if first is None or first.WhichOneof("kind") != "hello":
                raise BadRequest("the first message of a stream must be a hello", field="hello")
            session, welcome = await self._ledger.connect(first.hello)
            graceful = False
            try:
                await context.write(pb.ConnectResponse(welcome=welcome))
                listening = asyncio.create_task(self._listen(request_iterator, session))
                telling = asyncio.create_task(_tell(session, context))
                try:
                    await asyncio.wait({listening, telling}, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    listening.cancel()
                    telling.cancel()
                    ends = await asyncio.gather(listening, telling, return_exceptions=True)
                for error in ends:
                    if isinstance(error, Exception):
                        raise error
                graceful = True
            finally:
                self._ledger.disconnect(session, graceful=graceful)

    async def _listen(self, request_iterator: AsyncIterator[pb.ConnectRequest], session: Session) -> None:
        async for request in request_iterator:
            if request.WhichOneof("kind") != "batch":
                raise BadRequest("after the hello a stream has batches only", field="batch")
            await self._ledger.submit(session, request.batch)
        # A loader that was killed looks the same up to here; but to that one the last message can't be written.
        await self._ledger.finish(session)


async def _tell(session: Session, context: Any) -> None:
    while (results := await session.next_results()) is not None:
        await context.write(pb.ConnectResponse(results=results))
