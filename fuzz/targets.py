"""What is fuzzed: every RPC that the two services serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.descriptor import Descriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from modpressure.v1 import ledger_service_pb2, loader_service_pb2, stats_service_pb2

Where = Literal["stats", "loader"]


@dataclass(frozen=True, slots=True)
class Target:
    """One RPC, and the service at which it is called."""

    where: Where
    path: str
    request: Descriptor
    response: Descriptor
    client_streaming: bool
    server_streaming: bool

    @property
    def name(self) -> str:
        """What it is called in the table: ``StatsService/GetReport``."""
        return self.path.rpartition(".")[2]


def _of(module: Any, where: Where) -> Iterator[Target]:
    for service in module.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            yield Target(
                where, path, method.input_type, method.output_type, method.client_streaming, method.server_streaming
            )


def targets() -> list[Target]:
    """Return every RPC of both services; health and reflection, which are the same in both, once."""
    return [
        *_of(stats_service_pb2, "stats"),
        *_of(ledger_service_pb2, "stats"),
        *_of(loader_service_pb2, "loader"),
        *_of(health_pb2, "stats"),
        *_of(reflection_pb2, "stats"),
    ]
