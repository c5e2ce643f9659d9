"""``python -m fuzz [NAME...]``: fuzz the targets named, or all; exit 1 if any of them does what it must not.

FUZZ_MESSAGES is how many messages each target reads, FUZZ_SEED what chance begins with. What was found names the
session that found it; ``echo NAME | python -m fuzz.worker 1 SEED SESSION`` runs that one again. An interrupted run
(SIGINT, SIGTERM) tells what it has so far.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import deque
from typing import IO, Final

from fuzz import files
from fuzz.tally import Tally
from fuzz.targets import targets

DEFAULT_MESSAGES: Final = 10_000
INTERRUPTED: Final = 130
"""The exit status of a run that was interrupted and had found nothing."""

_MOST_LOG_LINES: Final = 40


class Run:
    """Targets on their way through as many processes as there are processors."""

    def __init__(self, names: list[str], messages: int, seed: int) -> None:
        """Of the targets named, each is to read so many messages."""
        self._waiting = deque(names)
        self._messages = messages
        self._seed = seed
        self._busy: set[asyncio.subprocess.Process] = set()
        self.tallies: list[Tally] = []
        self.is_stopped = False

    async def finish(self) -> None:
        """Fuzz all, or what could be until it was stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        print(f"seed {self._seed}: {self._messages} messages to each of {len(self._waiting)} targets", flush=True)
        await asyncio.gather(*(self._work() for _ in range(os.cpu_count() or 1)))

    def _stop(self) -> None:
        """Have each process tell what it has, and begin nothing new."""
        print("interrupted: what was sent so far is looked at", file=sys.stderr, flush=True)
        self.is_stopped = True
        self._waiting.clear()
        for worker in self._busy:
            assert worker.stdin is not None
            worker.stdin.write(b"\n")

    async def _work(self) -> None:
        """Have a process fuzz one name after another, and a new one go on where it dies, until there are none."""
        while self._waiting:
            with tempfile.TemporaryFile("w+") as log:
                worker = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "fuzz.worker", str(self._messages), str(self._seed)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    limit=1 << 24,
                    # What Ctrl-C sends goes to all that are in the terminal's group; they are told in another way.
                    process_group=0,
                )
                assert worker.stdin is not None
                assert worker.stdout is not None
                answered = True
                while self._waiting and answered:
                    name, begun = self._waiting.popleft(), time.monotonic()
                    print(f"{name:44} begun", file=sys.stderr, flush=True)
                    worker.stdin.write(f"{name}\n".encode())
                    await worker.stdin.drain()
                    line = await self._answer(worker, worker.stdout)
                    answered = bool(line)
                    tally = Tally.from_json(json.loads(line)) if line else Tally(name, crashes=1)
                    if answered:
                        _show_log(log, tally)
                    self.tallies.append(tally)
                    took = f"{tally.messages} messages, {time.monotonic() - begun:.0f} s"
                    print(f"{tally.name:44} {'bad' if tally.bad else 'ok'}, {took}", file=sys.stderr, flush=True)
                worker.stdin.close()
                status = await worker.wait()
                if not answered:
                    self.tallies[-1].found(f"the process ended with {status}")
                    _show_log(log, self.tallies[-1])

    async def _answer(self, worker: asyncio.subprocess.Process, answers: asyncio.StreamReader) -> bytes:
        """Return the line that a process answers with; nothing if it dies."""
        self._busy.add(worker)
        try:
            return await answers.readline()
        finally:
            self._busy.discard(worker)


def _show_log(log: IO[str], tally: Tally) -> None:
    """Show what the services and the watch have logged meanwhile, if the target was bad."""
    log.seek(0)
    lines = log.readlines()
    log.seek(0)
    log.truncate()
    if tally.bad:
        tally.findings += [line.rstrip()[:2000] for line in lines[-_MOST_LOG_LINES:]]


def main() -> None:
    """Fuzz, and print what came of it."""
    known = [files.NAME, *(target.name for target in targets())]
    names = sys.argv[1:] or known
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"there is no target {', '.join(unknown)}; there are {', '.join(known)}")
    messages = int(os.environ.get("FUZZ_MESSAGES", DEFAULT_MESSAGES))
    seed = int(os.environ.get("FUZZ_SEED", time.time_ns() % 1_000_000))
    run = Run(names, messages, seed)
    asyncio.run(run.finish())
    tallies = sorted(run.tallies, key=lambda tally: names.index(tally.name))
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
    if run.is_stopped:
        print(f"interrupted: {len(names) - len(tallies)} targets of {len(names)} were not begun")
    if any(tally.bad for tally in tallies):
        raise SystemExit(1)
    if run.is_stopped:
        raise SystemExit(INTERRUPTED)


if __name__ == "__main__":
    main()
