"""Child processes that live no longer than this one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modpressure.errors import ModpressureError

_MAX_LINE_BYTES: Final = 1 << 20

STOP_SECONDS: Final = 15.0
"""How long a child may take to stop where nothing else is said."""


class ChildDied(ModpressureError):
    """A child ended by itself."""


@dataclass(slots=True, eq=False)
class Child:
    """A service that runs as a child process; it logs in JSON, its lines are told to ``on_line``."""

    name: str
    process: Process
    on_line: Callable[[Child, str], None]
    address: asyncio.Future[str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Where it listens, once it has said so."""

    last_line: str = ""

    async def follow(self) -> int:
        """Read what it prints until it ends; return its exit code, negative for a signal."""
        assert self.process.stdout is not None
        while True:
            try:
                raw = await self.process.stdout.readline()
            except ValueError:  # a line beyond all measure: what fits is lost, the rest follows
                continue
            if not raw:
                break
            line = raw.decode(errors="replace").rstrip()
            if line:
                self._heed(line)
                self.on_line(self, line)
        return await self.process.wait()

    def _heed(self, line: str) -> None:
        event = parse_line(line)
        self.last_line = str(event.get("event", line)) if event else line
        if event.get("address") and "listening" in self.last_line and not self.address.done():
            self.address.set_result(str(event["address"]))


def parse_line(line: str) -> dict[str, Any]:
    """Return a line of a structured log, {} for any other."""
    if line.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            event = json.loads(line)
            return event if isinstance(event, dict) else {}
    return {}


class Children:
    """Child processes that are started one by one and stopped all together."""

    def __init__(self, on_line: Callable[[Child, str], None], *, stop_seconds: float = STOP_SECONDS) -> None:
        """``on_line`` is told every line of every child; each has ``stop_seconds`` to end when it is asked to."""
        self._on_line = on_line
        self._stop_seconds = stop_seconds
        self._children: dict[Child, asyncio.Task[int]] = {}
        self._hurry = asyncio.Event()
        self._stopping = False
        self.died: asyncio.Future[ChildDied] = asyncio.get_running_loop().create_future()
        """The first child that ended by itself."""

    async def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start ``python -m`` with ``arguments``.

        In a session of its own, so that Ctrl-C reaches this process alone, which then stops the others in order.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # -P: whatever the current directory has of the same name is not ours.
            *("-P", "-m", "modpressure.cli.child", str(os.getpid())),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,
        )
        child = Child(name, process, self._on_line)
        task = self._children[child] = asyncio.create_task(child.follow())
        task.add_done_callback(lambda task: self._on_end(child, task))
        return child

    def _on_end(self, child: Child, task: asyncio.Task[int]) -> None:
        if not (task.cancelled() or self._stopping or self.died.done()):
            words = f"; its last words: {child.last_line}" if child.last_line else ""
            self.died.set_result(ChildDied(f"{child.name} ended with {exit_text(task.result())}{words}"))

    def hurry(self) -> None:
        """Do not wait for children that are being stopped."""
        self._hurry.set()

    async def stop(self) -> None:
        """Stop all, the first one last, since the others need it to end well; kill what takes too long."""
        self._stopping = True
        children = list(self._children)
        for group in (children[1:], children[:1]):
            for child in group:
                _signal(child, signal.SIGTERM)
            await self._ended(group)
            for child in group:
                _signal(child, signal.SIGKILL)
            if group:
                await asyncio.wait([self._children[child] for child in group])

    async def _ended(self, group: Sequence[Child]) -> None:
        hurry = asyncio.create_task(self._hurry.wait())
        ended = asyncio.gather(*(self._children[child] for child in group))
        waiting: set[asyncio.Future[Any]] = {hurry, ended}
        try:
            await asyncio.wait(waiting, timeout=self._stop_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()


def _signal(child: Child, number: signal.Signals) -> None:
    if child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def exit_text(code: int) -> str:
    """Return how a process ended: "exit code 1", "signal SIGKILL"."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
