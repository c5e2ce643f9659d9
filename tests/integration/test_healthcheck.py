"""The probe of container health checks, as a process, against real servers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2_grpc

from modpressure.grpc_server import GrpcServer


@pytest_asyncio.fixture
async def server() -> AsyncIterator[tuple[GrpcServer, str]]:
    """A server whose only service of its own is called example.Service."""
    server = GrpcServer("127.0.0.1:0", grace_seconds=0)
    server.add(health_pb2_grpc.HealthServicer(), lambda servicer, server: None, "example.Service")
    address = await server.start()
    yield server, address
    await server.stop(0)


async def probe(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "modpressure.healthcheck", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_a_serving_service_is_well(server: tuple[GrpcServer, str]) -> None:
    _, address = server

    assert await probe(address) == (0, "SERVING\n", "")
    assert await probe(address, "--service", "example.Service") == (0, "SERVING\n", "")


async def test_a_service_that_cannot_work_is_named_and_fails(server: tuple[GrpcServer, str]) -> None:
    running, address = server
    await running.set_serving("example.Service", False)

    assert await probe(address) == (1, "", f"{address} is not well: NOT_SERVING\n")
    code, _, err = await probe(address, "--service", "example.Service")
    assert (code, err) == (1, f"{address} example.Service is not well: NOT_SERVING\n")
    code, _, err = await probe(address, "--service", "example.Other")
    assert code == 1
    assert err.startswith(f"{address} example.Other is not well: NOT_FOUND")


async def test_an_address_without_a_server_fails_with_one_sentence(server: tuple[GrpcServer, str]) -> None:
    running, address = server
    await running.stop(0)

    code, out, err = await probe(address)

    assert (code, out) == (1, "")
    assert err.startswith(f"{address} is not well: UNAVAILABLE")
    assert err.count("\n") == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
async def test_a_timeout_that_is_none_is_bad_usage(seconds: str) -> None:
    code, _, err = await probe("127.0.0.1:1", f"--timeout={seconds}")

    assert code == 2
    assert seconds in err
