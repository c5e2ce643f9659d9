"""Who makes the storms: a client for each loader, one storm after another, whatever process is there at the moment."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from chaos.process import Supervised
from modpressure.client_errors import is_cut_off
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

SYSTEM: Final = "soak"
MODULES: Final = ("minix", "bfs", "crc_itu_t")
WORKERS: Final = 2
STORM_SECONDS: Final = (0.5, 2.0)
STORM_TIMEOUT_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 0.1


@dataclass
class Score:
    """What came of all storms."""

    storms: int = 0
    calls: int = 0
    """As the storms' summaries say."""

    operations: int = 0
    retried: int = 0
    """Storms that were answered UNAVAILABLE, and asked for again."""

    cut: int = 0
    """Storms among them that had begun: nobody was told what they came to."""

    errors: list[str] = field(default_factory=list)
    """All else that went wrong."""


class Stormer:
    """The client of one loader."""

    def __init__(self, loader: Supervised, number: int, seed: int, score: Score) -> None:
        self._loader = loader
        self._first_worker = number * WORKERS
        self._dice = random.Random(f"{seed} {number}")
        self._score = score

    async def run(self, stop: asyncio.Event) -> None:
        """Make one storm after another until told to stop."""
        while not stop.is_set():
            # Where it was last told to be: that nobody is there at the moment shows when it is asked.
            address = self._loader.address
            async with grpc.aio.insecure_channel(address) as channel:
                while not stop.is_set() and self._loader.address == address:
                    if not await self._storm(LoaderServiceStub(channel)):
                        await asyncio.sleep(RETRY_SECONDS)

    async def _storm(self, stub: Any) -> bool:
        """Make a storm; return False if the loader is not there for it."""
        score = self._score
        storm = pb.Storm(
            system=SYSTEM,
            modules=MODULES,
            workers=WORKERS,
            mode=pb.Storm.MODE_REPEAT,
            first_worker=self._first_worker,
        )
        storm.duration.FromMilliseconds(round(1000 * self._dice.uniform(*STORM_SECONDS)))
        has_begun = False
        try:
            call = stub.RunStorm(iter([pb.RunStormRequest(storm=storm)]), timeout=STORM_TIMEOUT_SECONDS)
            async for response in call:
                has_begun = True
                if response.HasField("summary"):
                    self._sum_up(response.summary)
                    return True
            score.errors.append(f"a storm on {self._loader.name} ended without a summary")
        except grpc.aio.AioRpcError as error:
            if has_begun:
                score.cut += 1
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                score.errors.append(f"a storm on {self._loader.name}: {error.code().name}: {error.details()}")
                return False
            score.retried += 1
        except asyncio.CancelledError:
            if not is_cut_off():
                raise
            score.cut += has_begun
            score.retried += 1
        return False

    def _sum_up(self, summary: pb.StormSummary) -> None:
        score = self._score
        score.storms += 1
        score.calls += summary.calls
        score.operations += summary.operations
        if summary.errors:
            score.errors.append(f"a worker on {self._loader.name}: {summary.first_error}")
