"""How much of a server its clients may have."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

OWN_FILES: Final = 128
"""Open files that a service needs beside its connections: the database, module files, libraries."""


PENDING_FOR_EACH: Final = 4
"""RPCs that may wait to be looked at, for each one that may be carried out at once; they take some 10 KiB each."""


PARSED_FACTOR: Final = 4
"""What a message may take in memory once it is parsed, in lengths of the longest. What our own programs send takes at
most three quarters of that: batches of a loader's calls with thousands of imported symbols each, and the hello of one
that has as many calls and live modules as it may."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server grants; the settings of a service have the same names and defaults."""

    message_bytes: int = 16 << 20
    """Longest message, in either direction."""

    metadata_bytes: int = 16 << 10
    """Most metadata (headers) of an RPC."""

    connections: int = 4096
    """Connections at once."""

    host_connections: int = 2048
    """Connections at once from one IP address."""

    streams: int = 1024
    """RPCs at once on one connection; the client's gRPC has further ones wait."""

    rpcs: int = 4096
    """RPCs at once, of which a client may have as many as it leaves free."""

    rate: float = 5000
    """RPCs and messages of streams that a client may send a second; 0 is no limit."""

    request_seconds: float = 30
    """How long the request of an RPC, of a stream its first message, may take to arrive."""

    handshake_seconds: float = 20
    """How long a new connection may take until it speaks TLS, where that is on, and HTTP/2."""

    idle_seconds: float = 600
    """How long a connection may be without an RPC."""

    age_seconds: float = 3600
    """How old a connection may become before it takes no new RPCs."""

    age_grace_seconds: float = 24 * 3600
    """How long the RPCs of such a connection may still take."""

    ping_seconds: float = 10
    """Least time between two pings of a client; who goes on pinging more often is cut off (too_many_pings)."""

    @property
    def parsed_bytes(self) -> int:
        """The most that a message may take in memory once it is parsed."""
        return PARSED_FACTOR * self.message_bytes

    def channel_arguments(self) -> Sequence[tuple[str, int]]:
        """Return them as gRPC's core takes them (grpc/impl/channel_arg_names.h), as far as it knows them."""
        return (
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_send_message_length", self.message_bytes),
            # Between the two a request would be refused by chance.
            ("grpc.max_metadata_size", self.metadata_bytes),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes),
            ("grpc.max_allowed_incoming_connections", min(self.connections, _connections_with_files())),
            ("grpc.max_concurrent_streams", self.streams),
            # Beyond its own 1000 that wait for Python, gRPC cancels RPCs by chance, and their clients learn no reason.
            ("grpc.server.max_pending_requests", PENDING_FOR_EACH * self.rpcs),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_FOR_EACH * self.rpcs),
            ("grpc.server_handshake_timeout_ms", _milliseconds(self.handshake_seconds)),
            ("grpc.max_connection_idle_ms", _milliseconds(self.idle_seconds)),
            ("grpc.max_connection_age_ms", _milliseconds(self.age_seconds)),
            ("grpc.max_connection_age_grace_ms", _milliseconds(self.age_grace_seconds)),
            ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(self.ping_seconds)),
        )


DEFAULT_LIMITS: Final = Limits()


def _milliseconds(seconds: float) -> int:
    # gRPC takes the greatest for no limit.
    return min(max(1, round(seconds * 1000)), 2**31 - 1)


def _connections_with_files() -> int:
    """Return for how many connections this process has open files left, its own not counted."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 - 1 if soft == resource.RLIM_INFINITY else max(16, soft - OWN_FILES)


def raise_open_files() -> None:
    """Let this process have as many open files as it may: the common limit of 1024 is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
