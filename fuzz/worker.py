"""A process that fuzzes one target after another: names come in, a line each, tallies go out as JSON.

``python -m fuzz.worker MESSAGES SEED``; with a third argument, the number of a session, only that one is run. An empty
line has it send no more, and tell what it has so far. So does the end of what comes in: whoever asked may have been
killed, and it would go on for hours, with its database in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

from fuzz import files, system_files
from fuzz.calls import Way
from fuzz.invariants import broken
from fuzz.messages import MODULES, SYSTEMS, Dice
from fuzz.pulse import Pulse
from fuzz.services import ways
from fuzz.sessions import History, Session
from fuzz.tally import Tally
from fuzz.targets import Target, Where, targets
from modpressure import aio, log
from modpressure.v1 import loader_service_pb2 as pb
from modpressure.v1.loader_service_pb2_grpc import LoaderServiceStub

SESSIONS_AT_ONCE: Final = 24
_IMPORT: Final = "StatsService/ImportSystem"
_FEW_AT_ONCE: Final = {"StatsService/ExportSystem": 1, _IMPORT: 1}
"""Of what the service does for few at once, and refuses to all others. One that is left takes a moment to end, so the
place beside the one that is in progress is not always free."""

OVER_GRPC: Final = 128
"""Every so manieth session goes over gRPC, the others begin where that hands an RPC on."""

_MESSAGES_PER_USE: Final = 1000
"""Messages between two plain uses of the services."""

_IMPORTS_PER_USE: Final = 60
"""Likewise, where they are systems that come in: what was taken is soon replaced."""

_FIRST_USES: Final = 5

_SHM: Final = "/dev/shm"
_SHM_BYTES: Final = 1 << 30


async def fuzz(
    target: Target, messages: int, seed: int, only: int | None = None, stopped: Callable[[], bool] = lambda: False
) -> Tally:
    """Send ``messages`` in sessions of their own seeds; then look whether the services are as they must be.

    Of all sessions only the one numbered ``only``, if there is one; no further ones once it is ``stopped``.
    """
    tally = Tally(target.name)
    numbers = itertools.count() if only is None else iter([only])
    history, pulse, user = History(target), Pulse(), Dice(seed)
    due = 0

    async def use(to: dict[Where, Way]) -> None:
        try:
            with pulse.limited():
                await _use(LoaderServiceStub(to["loader"].channel), user, tally)
                for sentence in await system_files.use(to, user) if history.exported else ():
                    tally.wrong += 1
                    tally.found(sentence)
        except TimeoutError:
            tally.hangs += 1
            tally.found("a plain load or unload does not end")

    async def sessions(to: dict[Where, Way]) -> None:
        nonlocal due
        for number in numbers:
            if only is None and (tally.messages >= messages or stopped()):
                return
            dice = Dice(f"{seed} {target.name} {number}")
            over_grpc = number % OVER_GRPC == 0
            session = Session(target, to[target.where], dice, tally, history, pulse, over_grpc)
            await session.run()
            for finding in session.findings:
                tally.found(f"{finding}, session {number}")
            if tally.messages >= due:
                due += _IMPORTS_PER_USE if history.exported else _MESSAGES_PER_USE
                await use(to)
            # All of what it would have sent may have been sent before.
            await asyncio.sleep(0)

    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_in_memory()) as directory:
        async with ways(Path(directory)) as to:
            with pulse.watched():
                for _ in range(_FIRST_USES):
                    await use(to)
                if target.name == _IMPORT:
                    history.exported = await system_files.exported(to)
                # What is there by now stays: to look through it again and again would take a third of the time.
                gc.freeze()
                async with asyncio.TaskGroup() as group:
                    for _ in range(_FEW_AT_ONCE.get(target.name, SESSIONS_AT_ONCE) if only is None else 1):
                        group.create_task(sessions(to))
                try:
                    sentences = await broken(to)
                except grpc.aio.AioRpcError as error:
                    sentences = [f"the services do not answer any more: {error.code().name}: {error.details()}"]
                tally.wrong += len(sentences)
                for sentence in sentences:
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
    """Load and unload a module, so that there are systems, events and duplicates to ask for."""
    system, module = dice.choice(SYSTEMS), dice.choice(MODULES[:5])
    try:
        for _ in range(dice.choice((1, 2))):
            await loader.LoadModule(pb.LoadModuleRequest(system=system, module=module))
        if dice.random() < 0.8:
            await loader.UnloadModule(pb.UnloadModuleRequest(system=system, module=module))
    except grpc.aio.AioRpcError as error:
        # The system may not be there, or have been deleted meanwhile.
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION and error.code() is not grpc.StatusCode.NOT_FOUND:
            tally.wrong += 1
            tally.found(f"a plain load or unload ended with {error.code().name}: {error.details()}")


def _read(names: queue.SimpleQueue[str], stop: threading.Event) -> None:
    """Hand on the names that come in, and an empty one at the end; note that no more is to be sent, as then."""
    for line in sys.stdin:
        if name := line.strip():
            names.put(name)
        else:
            stop.set()
    stop.set()
    names.put("")


def main() -> None:
    """Do what comes in, until nothing does."""
    messages, seed = int(sys.argv[1]), int(sys.argv[2])
    only = int(sys.argv[3]) if len(sys.argv) > 3 else None
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_read, args=(names, stop), daemon=True).start()
    log.configure("error", "json")
    gc.set_threshold(20_000, 20, 20)
    known = {target.name: target for target in targets()}
    while name := names.get():
        if name == files.NAME:
            tally = files.fuzz(messages, seed, stop.is_set)
        else:
            tally = aio.run(fuzz(known[name], messages, seed, only, stop.is_set))
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(tally.to_json()), flush=True)


if __name__ == "__main__":
    main()
