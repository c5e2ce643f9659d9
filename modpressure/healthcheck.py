"""Ask a service whether it is well: ``python -m modpressure.healthcheck ADDRESS``, for container health checks.

Prints SERVING and exits 0 if the service says that it can do its work; else prints one sentence on standard error and
exits 1; 2 for bad usage. Every probe is a process, so little is imported, and grpc's asyncio is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modpressure.errors import ModpressureError


def probe(
    address: str, service: str = "", timeout_seconds: float = 3.0, credentials: grpc.ChannelCredentials | None = None
) -> str:
    """Return the health of ``service`` at ``address`` by name, such as SERVING; an empty ``service`` means all of them.

    Any target that grpc takes, such as ``host:port`` or ``unix:/path``; not encrypted without ``credentials``.
    ``grpc.RpcError`` if there is no answer within ``timeout_seconds``.
    """
    with grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_seconds).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError(text)
    return seconds


def _credentials(options: argparse.Namespace) -> grpc.ChannelCredentials | None:
    from modpressure.tls import client_tls

    tls = client_tls(options.ca, options.cert, options.key)
    return tls.read() if tls else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m modpressure.healthcheck",
        description="Ask a service whether it is well: exit code 0 if it says SERVING, else 1.",
    )
    parser.add_argument("address", help="address of the service, HOST:PORT")
    parser.add_argument("--service", default="", help="full name of one gRPC service (default: all of the server)")
    parser.add_argument("--timeout", type=_seconds, default=3.0, metavar="SECONDS", help="longest wait (default: 3)")
    for name, what in (
        ("--ca", "talk TLS; who must have signed the service's certificate (PEM file)"),
        ("--cert", "certificate to show (PEM file)"),
        ("--key", "its private key (PEM file)"),
    ):
        parser.add_argument(name, type=Path, metavar="FILE", help=what)
    options = parser.parse_args(arguments)
    try:
        credentials = _credentials(options) if options.ca or options.cert or options.key else None
    except ModpressureError as error:
        sys.stderr.write(f"{error.sentence}\n")
        return 2
    try:
        status = probe(options.address, options.service, options.timeout, credentials)
    except grpc.RpcError as error:
        status = f"{error.code().name}, {error.details()}"
    if status == "SERVING":
        sys.stdout.write(f"{status}\n")
        return 0
    sys.stderr.write(f"{options.address}{f' {options.service}' if options.service else ''} is not well: {status}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
