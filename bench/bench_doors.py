"""Calls a second with everything on that keeps strangers out and bounds what is kept, against the same without.

Two pairs of services, measured in turn: one that asks for tokens, limits rates, ends leases, keeps so many events; and
one that lets everybody in, has no such limit, no leases, and keeps everything. TLS is on in neither.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from bench.bench_loads import CALLS, Metadata, calls_a_second, loads_and_unloads, small_modules, streamed
from bench.services import Service, service
from bench.table import Row
from modpressure import aio
from modpressure.tokens import Role, entry, new_token
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

ROUNDS = 5
_RATE = "1000000"
"""Calls a second that a client may make: what is asked each time, and never refused."""

_LONG = "86400"
"""Seconds of a lease that ends for nobody."""


@contextlib.contextmanager
def _pair(directory: Path, stats_arguments: list[str], loader_arguments: list[str]) -> Iterator[Service]:
    """Start a stats_svc and a loader that counts on it; give the loader."""
    directory.mkdir()
    where = ("--listen", "127.0.0.1:0", "--log-format", "json")
    with (
        service("stats_svc", *where, "--database", str(directory / "bench.sqlite3"), *stats_arguments) as stats,
        service("loader_svc", *where, "--stats", stats.address, *loader_arguments) as loader,
    ):
        yield loader


@contextlib.contextmanager
def _guarded(directory: Path) -> Iterator[tuple[Service, str]]:
    """Start services that ask for tokens; give the loader and a client's token."""
    tokens, own = directory / "tokens.toml", directory / "loader.token"
    client = new_token()
    own.write_text(new_token())
    tokens.write_text(
        "\n".join(
            entry(token, name, [Role.LOAD, Role.READ], ["*"])
            for token, name in ((own.read_text(), "loader"), (client, "client"))
        )
    )
    both = ["--tokens", str(tokens), "--rate-limit", _RATE]
    with _pair(
        directory / "guarded",
        [*both, "--keep-events", "10000", "--keep-days", "1"],
        [*both, "--stats-token-file", str(own)],
    ) as loader:
        yield loader, client


async def measure() -> list[Row]:
    """Measure both in turn, and return the rows."""
    single: list[tuple[float, float]] = []
    stream: list[tuple[float, float]] = []
    off = ["--rate-limit", "0"]
    with (
        tempfile.TemporaryDirectory(prefix="modpressure-bench-") as name,
        _pair(Path(name) / "open", [*off, "--lease-seconds", _LONG, "--keep-events", "0"], off) as unguarded,
        _guarded(Path(name)) as (guarded, token),
    ):
        async with (
            grpc.aio.insecure_channel(unguarded.address) as to_unguarded,
            grpc.aio.insecure_channel(guarded.address) as to_guarded,
        ):
            without, behind = LoaderServiceStub(to_unguarded), LoaderServiceStub(to_guarded)
            modules = await small_modules(without)
            roads: list[tuple[Any, Metadata]] = [
                (without, ()),
                (behind, (("authorization", f"Bearer {token}"),)),
            ]
            for number in range(-1, ROUNDS):
                rates = []
                for stub, metadata in roads:
                    one = await calls_a_second(loads_and_unloads(stub, modules, metadata), CALLS)
                    many = await streamed(stub, modules, CALLS, metadata)
                    rates.append((one, many))
                # Whichever went first goes last.
                roads.reverse()
                if number % 2 == 0:
                    rates.reverse()
                if number >= 0:  # the first round warms up
                    (one_without, many_without), (one_behind, many_behind) = rates
                    single.append((one_behind, one_without))
                    stream.append((many_behind, many_without))
    return [_row("single calls behind tokens, limits, leases", single), _row("the same through the stream", stream)]


def _row(name: str, rates: list[tuple[float, float]]) -> Row:
    behind, without = (statistics.median(column) for column in zip(*rates, strict=True))
    ratios = [one / other for one, other in rates]
    return Row(name, ratios, 0.9, "at least", f"the same without, {without:.0f}/s", f"{behind:.0f} calls a second")


def run() -> list[Row]:
    """Return the rows of this benchmark."""
    return aio.run(measure())
