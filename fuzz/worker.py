"""A process that fuzzes one target after another: names come in, a line each, tallies go out as JSON.

``python -m fuzz.worker MESSAGES SEED``; with a third argument, the number of a session, only that one is run.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import shutil
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Final

import grpc

from fuzz import files
from fuzz.calls import Way
from fuzz.invariants import broken
from fuzz.messages import MODULES, SYSTEMS, Dice
from fuzz.pulse import Pulse
from fuzz.services import ways
from fuzz.sessions import Session
from fuzz.tally import Tally
from fuzz.targets import Target, targets
from modpressure import aio, log
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

SESSIONS_AT_ONCE: Final = 24
_FEW_AT_ONCE: Final = {"StatsService/ExportSystem": 2}
"""Of what the service does for few at once, and refuses to all others."""

OVER_GRPC: Final = 16
"""Every so manieth session goes over gRPC, the others begin where that hands an RPC on."""

_SHM: Final = "/dev/shm"
_SHM_BYTES: Final = 1 << 30
_PAUSE_SECONDS: Final = 0.2
_KEPT_PAGE_TOKENS: Final = 20
_SHOWN_BYTES: Final = 300


async def fuzz(target: Target, messages: int, seed: int, only: int | None = None) -> Tally:
    """Send ``messages`` in sessions of their own seeds; then look whether the services are as they must be."""
    tally = Tally(target.name)
    numbers = itertools.count() if only is None else iter([only])
    page_tokens: deque[str] = deque(maxlen=_KEPT_PAGE_TOKENS)
    pulse = Pulse()

    async def sessions(way: Way) -> None:
        for number in numbers:
            if tally.messages >= messages:
                return
            dice = Dice(f"{seed} {target.name} {number}")
            session = Session(target, way, dice, tally, page_tokens, over_grpc=number % OVER_GRPC == 0)
            await session.run()
            for finding in session.findings:
                sent = ", ".join(message[:_SHOWN_BYTES].hex() or "-" for message in session.sent[-2:])
                tally.found(f"{finding} (session {number}, of {len(session.sent)} messages the last: {sent})")

    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_in_memory()) as directory:
        async with ways(Path(directory)) as to:
            # What is there by now stays: to look through it again and again would take a third of the time.
            gc.freeze()
            with pulse.watched():
                user = asyncio.ensure_future(_use(LoaderServiceStub(to["loader"].channel), Dice(seed), tally))
                async with asyncio.TaskGroup() as group:
                    for _ in range(_FEW_AT_ONCE.get(target.name, SESSIONS_AT_ONCE) if only is None else 1):
                        group.create_task(sessions(to[target.where]))
                user.cancel()
                await asyncio.gather(user, return_exceptions=True)
                for sentence in await broken(to):
                    tally.wrong += 1
                    tally.found(sentence)
    tally.hangs += pulse.stuck
    return tally


def _in_memory() -> str | None:
    """Return a directory that is on no disk, for which each commit would wait; None if there is none with room."""
    try:
        return _SHM if shutil.disk_usage(_SHM).free >= _SHM_BYTES else None
    except OSError:
        return None


async def _use(loader: LoaderServiceStub, dice: Dice, tally: Tally) -> None:
    """Load and unload modules meanwhile, so that there are systems, events and duplicates to ask for."""
    while True:
        system, module = dice.choice(SYSTEMS), dice.choice(MODULES[:5])
        try:
            for _ in range(dice.choice((1, 2))):
                await loader.LoadModule(pb.LoadModuleRequest(system=system, module=module), timeout=60)
            if dice.random() < 0.8:
                await loader.UnloadModule(pb.UnloadModuleRequest(system=system, module=module), timeout=60)
        except grpc.aio.AioRpcError as error:
            # The system may have been deleted meanwhile.
            if (
                error.code() is not grpc.StatusCode.FAILED_PRECONDITION
                and error.code() is not grpc.StatusCode.NOT_FOUND
            ):
                tally.wrong += 1
                tally.found(f"a plain load or unload ended with {error.code().name}: {error.details()}")
        await asyncio.sleep(_PAUSE_SECONDS)


def main() -> None:
    """Do what comes in, until nothing does."""
    messages, seed = int(sys.argv[1]), int(sys.argv[2])
    only = int(sys.argv[3]) if len(sys.argv) > 3 else None
    log.configure("error", "json")
    gc.set_threshold(20_000, 20, 20)
    known = {target.name: target for target in targets()}
    for line in sys.stdin:
        name = line.strip()
        tally = files.fuzz(messages, seed) if name == files.NAME else aio.run(fuzz(known[name], messages, seed, only))
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(tally.to_json()), flush=True)


if __name__ == "__main__":
    main()
