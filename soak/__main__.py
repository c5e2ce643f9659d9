"""``python -m soak``: storms by twelve clients while their loaders are replaced one after another; exit 1 if it shows.

SOAK_SECONDS is how long (3600), SOAK_SEED what chance begins with.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Final

import grpc

from modpressure import aio
from modpressure.v1 import stats_service_pb2 as pb
from modpressure.v1.stats_service_pb2_grpc import StatsServiceStub
from soak.fleet import Fleet, running_fleet
from soak.samples import Life, Sample, Trend, trend
from soak.storms import SYSTEM, Score, Stormer

SAMPLE_SECONDS: Final = 0.5
LIFE_SECONDS: Final = 240.0
"""How long a loader lives in a long run; in a short one each is replaced once."""

MEMORY_SHARE: Final = 0.1
"""What may look like growth of memory: arenas of the allocator, pages of SQLite's cache. In an hour of some hundred
calls a second a leak of 20 bytes a call is more."""

LEAST_BYTES: Final = 8 << 20
LEAST_FILES: Final = 3
DATABASE_SHARE: Final = 0.25


class Soak:
    """One run."""

    def __init__(self, fleet: Fleet, seconds: float, seed: int) -> None:
        self._fleet = fleet
        self._seconds = seconds
        self.score = Score()
        self._stormers = [Stormer(loader, number, seed, self.score) for number, loader in enumerate(fleet.loaders)]
        self._stop = asyncio.Event()
        self._lives: dict[str, list[Life]] = {"stats_svc": [], "loader": []}
        self._database: list[Sample] = []
        self.replaced = 0

    async def run(self) -> None:
        """Storm, replace and look, until the time is over; then let all storms end, and count."""
        async with grpc.aio.insecure_channel(self._fleet.stats.address) as channel:
            stats = StatsServiceStub(channel)
            background = [asyncio.ensure_future(work) for work in (self._look(), self._replace())]
            storms = [asyncio.ensure_future(stormer.run(self._stop)) for stormer in self._stormers]
            try:
                done, _ = await asyncio.wait(
                    {*background, *storms}, timeout=self._seconds, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                self._stop.set()
                await asyncio.gather(*storms)
            finally:
                for task in (*background, *storms):
                    task.cancel()
                await asyncio.gather(*background, *storms, return_exceptions=True)
            await self._check(stats)

    async def _check(self, stats: StatsServiceStub) -> None:
        """Hold the calls that stats_svc has counted against those that storms were told of."""
        try:
            counted = (await stats.GetStats(pb.GetStatsRequest(system=SYSTEM), timeout=60)).stats.calls
        except grpc.aio.AioRpcError as error:
            self.score.errors.append(f"stats_svc, asked what it has counted: {error.code().name}: {error.details()}")
            return
        told = self.score.calls
        # Where a storm was cut off, nobody was told of its calls.
        if counted < told or (counted != told and not self.score.cut):
            self.score.errors.append(f"stats_svc has counted {counted} calls, the storms were told of {told}")

    # --- processes ---

    async def _replace(self) -> None:
        """Stop one loader after another gracefully; its supervisor starts a new one in its place."""
        loaders = self._fleet.loaders
        pause_seconds = min(LIFE_SECONDS, self._seconds * 0.9) / len(loaders)
        while True:
            for loader in loaders:
                begun = time.monotonic()
                loader.terminate()
                await loader.wait_serving()
                self.replaced += 1
                await asyncio.sleep(max(0.0, begun + pause_seconds - time.monotonic()))

    async def _look(self) -> None:
        """Sample the processes and the database."""
        begun = time.monotonic()
        living: dict[int, Life] = {}
        while True:
            now = time.monotonic() - begun
            for kind, process in (("stats_svc", self._fleet.stats), *(("loader", one) for one in self._fleet.loaders)):
                pid = process.pid
                if pid is None or not process.serving.is_set():
                    continue
                if pid not in living:
                    living[pid] = Life(pid)
                    self._lives[kind].append(living[pid])
                living[pid].look(now)
            self._database.append(Sample(now, self._fleet.database_bytes()))
            await asyncio.sleep(SAMPLE_SECONDS)

    def trends(self) -> list[Trend]:
        """Return what must be flat."""
        found = [
            trend(
                f"{kind}, {what}",
                [getattr(life, of) for life in lives],
                share=share,
                least=least,
            )
            for kind, lives in self._lives.items()
            for what, of, share, least in (
                ("resident bytes", "resident_bytes", MEMORY_SHARE, LEAST_BYTES),
                ("open files", "open_files", 0.0, LEAST_FILES),
            )
        ]
        found.append(trend("database, bytes", [self._database], share=DATABASE_SHARE, least=LEAST_BYTES))
        return found


def _number(value: float) -> str:
    return f"{value / 2**20:.1f} MiB" if abs(value) >= 1 << 17 else f"{value:.0f}"


def _report(soak: Soak, seconds: float, fleet: Fleet) -> bool:
    """Print what came of it; return whether all is well."""
    score, trends = soak.score, soak.trends()
    tracebacks = [line for process in (fleet.stats, *fleet.loaders) for line in process.tracebacks]
    for text in [*score.errors, *tracebacks][:20]:
        print(text)
    for found in trends:
        grown = "too short to tell" if found.grown is None else f"grew by {_number(found.grown)}"
        print(
            f"{found.name:28} median {_number(found.median):>10}  most {_number(found.greatest):>10}  {grown}"
            f" (at most {_number(found.bound)})  {'flat' if found.flat else 'GROWS'}"
        )
    calls = score.calls
    print(
        f"{score.storms} storms, {calls} calls, {calls / seconds:.0f} a second; {soak.replaced} loaders replaced;"
        f" {score.retried} storms retried as UNAVAILABLE, {score.cut} cut off"
    )
    print(f"errors {len(score.errors)}")
    print(f"tracebacks {len(tracebacks)}")
    print(f"growing {sum(not found.flat for found in trends)}")
    return not (score.errors or tracebacks) and score.storms > 0 and all(found.flat for found in trends)


async def _soak(seconds: float, seed: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="modpressure-soak-") as directory:
        async with running_fleet(Path(directory)) as fleet:
            print(f"{len(fleet.loaders)} loaders serve; {seconds:g} s begin", flush=True)
            soak = Soak(fleet, seconds, seed)
            await soak.run()
            return _report(soak, seconds, fleet)


def main() -> None:
    """Run, print what came of it, and exit."""
    seconds = float(os.environ.get("SOAK_SECONDS", "3600"))
    seed = int(os.environ.get("SOAK_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if aio.run(_soak(seconds, seed)):
            return
    raise SystemExit(1)


if __name__ == "__main__":
    main()
