"""The peers that benchmarks compare with: ``python -m bench.peers empty|sink``.

``empty`` answers an empty unary call. ``sink`` takes the stream that stats_svc takes, and only parses and adds up in
memory: nothing is checked, stored or told apart by system.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf import empty_pb2

from modpressure import aio
from modpressure.v1 import ledger_service_pb2 as pb
from modpressure.v1.ledger_service_pb2_grpc import LedgerServiceServicer, add_LedgerServiceServicer_to_server

EMPTY_METHOD = "/bench.Peer/Empty"


async def _empty(request: empty_pb2.Empty, context: Any) -> empty_pb2.Empty:
    return request


class Sink(LedgerServiceServicer):
    """Adds up what it is told, in memory."""

    def __init__(self) -> None:
        self.sums: dict[int, list[int]] = {}

    async def Connect(
        self, requests: AsyncIterator[pb.ConnectRequest], context: Any
    ) -> AsyncIterator[pb.ConnectResponse]:
        """Add up each batch and answer it."""
        async for request in requests:
            if request.HasField("hello"):
                yield pb.ConnectResponse(welcome=pb.Welcome())
                continue
            batch = request.batch
            results = pb.ResultBatch(applied_sequence=batch.sequence)
            for operation in batch.operations:
                for call in operation.record_calls.calls:
                    sums = self.sums.setdefault(call.outcome, [0, 0, 0, 0])
                    sums[0] += 1
                    sums[1] += call.image_bytes
                    sums[2] += call.compressed_bytes
                    sums[3] += call.mod_bytes
                results.results.add(call_id=operation.call_id, verdict=pb.OperationResult.VERDICT_PROCEED)
            yield pb.ConnectResponse(results=results)


async def _serve(kind: str) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 16 * 1024 * 1024)])
    if kind == "empty":
        handler = grpc.unary_unary_rpc_method_handler(
            _empty, empty_pb2.Empty.FromString, empty_pb2.Empty.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Peer", {"Empty": handler}),))
    else:
        add_LedgerServiceServicer_to_server(Sink(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stderr.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stderr.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    aio.run(_serve(sys.argv[1]))
