"""How soon another stats_svc over the same PostgreSQL database answers when the one that leads is killed.

The peer is a limit: 5 s from the kill to the first committed answer of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time

import sqlalchemy as sa

from bench.bench_recovery import first_answer, listed
from bench.services import Service, service
from bench.table import Row
from modpressure import aio
from tests import postgres

TAKEOVER_SECONDS = 5.0
ROUNDS = 5


def _leader(url: str) -> str:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return str(connection.execute(sa.text("SELECT leader_address FROM modpressure")).scalar_one())


async def _takeover(stack: contextlib.ExitStack, url: str) -> Row:
    def start() -> Service:
        return stack.enter_context(
            service("stats_svc", "--listen", "127.0.0.1:0", "--database", url, "--log-format", "json")
        )

    both = [start(), start()]
    seconds: list[float] = []
    for number in range(ROUNDS):
        address = _leader(url)
        [leader] = [each for each in both if each.address == address]
        [other] = [each for each in both if each is not leader]
        await first_answer(leader.address, f"before-{number}")
        begun = time.perf_counter()
        os.kill(leader.pid, signal.SIGKILL)
        while True:
            try:
                await first_answer(other.address, f"after-{number}-{time.perf_counter()}")
                break
            except (SystemExit, Exception):
                # It stands by still.
                await asyncio.sleep(0.02)
        seconds.append(time.perf_counter() - begun)
        both = [other, start()]
    return Row(
        "the stats_svc that leads killed, the other leads",
        [each / TAKEOVER_SECONDS for each in seconds],
        1.0,
        "at most",
        f"{TAKEOVER_SECONDS:g} s",
        f"{listed(seconds)} to the first committed answer",
    )


def run() -> list[Row]:
    """Measure; nothing where there is no PostgreSQL."""
    if postgres.programs() is None:
        print("no PostgreSQL is installed here: replicas are not measured", file=sys.stderr)
        return []
    with postgres.running_server() as server, postgres.new_database(server.url) as url, contextlib.ExitStack() as stack:
        return [aio.run(_takeover(stack, url))]
