"""``python -m fuzz [NAME...]``: fuzz the targets named, or all; exit 1 if any of them does what it must not.

FUZZ_MESSAGES is how many messages each target reads, FUZZ_SEED what chance begins with. What was found names the
session that found it; ``echo NAME | python -m fuzz.worker 1 SEED SESSION`` runs that one again.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections import deque
from typing import IO, Final

from fuzz import files
from fuzz.tally import Tally
from fuzz.targets import targets

DEFAULT_MESSAGES: Final = 10_000
_MOST_LOG_LINES: Final = 40


async def _work(names: deque[str], messages: int, seed: int, tallies: list[Tally]) -> None:
    """Have a process fuzz one name after another, and a new one go on where it dies, until there are none."""
    while names:
        with tempfile.TemporaryFile("w+") as log:
            worker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fuzz.worker", str(messages), str(seed)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=1 << 24,
            )
            assert worker.stdin is not None
            assert worker.stdout is not None
            answered = True
            while names and answered:
                name = names.popleft()
                worker.stdin.write(f"{name}\n".encode())
                await worker.stdin.drain()
                line = await worker.stdout.readline()
                answered = bool(line)
                tally = Tally.from_json(json.loads(line)) if line else Tally(name, crashes=1)
                if answered:
                    _show_log(log, tally)
                tallies.append(tally)
                print(f"{tally.name:44} {'bad' if tally.bad else 'ok'}", file=sys.stderr, flush=True)
            worker.stdin.close()
            status = await worker.wait()
            if not answered:
                tallies[-1].found(f"the process ended with {status}")
                _show_log(log, tallies[-1])


def _show_log(log: IO[str], tally: Tally) -> None:
    """Show what the services and the watch have logged meanwhile, if the target was bad."""
    log.seek(0)
    lines = log.readlines()
    log.seek(0)
    log.truncate()
    if tally.bad:
        tally.findings += [line.rstrip()[:2000] for line in lines[-_MOST_LOG_LINES:]]


async def run(names: list[str], messages: int, seed: int) -> list[Tally]:
    """Fuzz targets by name, as many at once as there are processors."""
    waiting, tallies = deque(names), list[Tally]()
    await asyncio.gather(*(_work(waiting, messages, seed, tallies) for _ in range(os.cpu_count() or 1)))
    return tallies


def main() -> None:
    """Fuzz, and print what came of it."""
    known = [*(target.name for target in targets()), files.NAME]
    names = sys.argv[1:] or known
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"there is no target {', '.join(unknown)}; there are {', '.join(known)}")
    messages = int(os.environ.get("FUZZ_MESSAGES", DEFAULT_MESSAGES))
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}: {messages} messages to each of {len(names)} targets", flush=True)
    tallies = sorted(asyncio.run(run(names, messages, seed)), key=lambda tally: names.index(tally.name))
    for tally in tallies:
        for finding in tally.findings:
            print(f"{tally.name}: {finding}")
    for tally in tallies:
        statuses = ", ".join(f"{status} {count}" for status, count in tally.statuses.most_common())
        print(f"{tally.name:44} {tally.messages:8} messages, {tally.parsed:8} parsed: {statuses}")
    total, parsed = (sum(getattr(tally, what) for tally in tallies) for what in ("messages", "parsed"))
    print(f"messages {total}, of which {parsed} were parsed; seed {seed}")
    for what in ("crashes", "hangs", "internal", "wrong"):
        print(f"{what} {sum(getattr(tally, what) for tally in tallies)}")
    if any(tally.bad for tally in tallies):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
