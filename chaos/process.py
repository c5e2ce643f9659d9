"""A program under a supervisor: whenever it ends it is started again, as by systemd or an orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

KEPT_LINES: Final = 400
"""Lines of its log that are kept as evidence."""

RESTART_SECONDS: Final = 0.1
"""Pause before it is started again, where nothing else was asked for."""

START_SECONDS: Final = 120.0
_MAX_LINE_BYTES: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1


def _set_apart() -> None:
    """Die with the parent, but not by the terminal: Ctrl-C is for the one who counts, not for those counted on."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """Return a process and all below it, as far as they can be seen."""
    found = [pid]
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _descendants(int(child))
    return found


class Supervised:
    """A program that runs until it is closed, whatever happens to it.

    It is serving once ``address_in`` finds an address in a line that it writes to its standard error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        address_in: Callable[[str], str],
        on_address: Callable[[str], None] = lambda address: None,
        after_end: Callable[[int], None] = lambda pid: None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """``options`` go to subprocess; ``after_end`` is called with the id of each process that has ended."""
        self.name = name
        self.address = ""
        self.serving = asyncio.Event()
        self.starts = 0
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.tracebacks: list[str] = []
        """What it wrote that holds a traceback."""

        self._command = command
        self._environment = environment
        self._address_in = address_in
        self.on_address = on_address
        self._after_end = after_end
        self._options = options or {}
        self._process: asyncio.subprocess.Process | None = None
        self._pause_seconds = RESTART_SECONDS
        self._is_closing = False
        self._frozen: list[int] = []
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process that runs at the moment."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start it, and return once it serves. RuntimeError if it does not."""
        self._keeper = asyncio.create_task(self._keep())
        await self.wait_serving()

    async def wait_serving(self) -> None:
        """Return once it serves. RuntimeError if it does not."""
        try:
            await asyncio.wait_for(self.serving.wait(), START_SECONDS)
        except TimeoutError:
            raise RuntimeError(f"{self.name} does not come up:\n{''.join([*self.lines][-20:])}") from None

    def kill(self, down_seconds: float = RESTART_SECONDS) -> None:
        """End it as kill -9 does; it is started again after ``down_seconds``."""
        self._pause_seconds = down_seconds
        self.serving.clear()
        self._signal(signal.SIGKILL)

    def kill_child(self, dice: Random) -> None:
        """End one of its children, whichever, as kill -9 does."""
        children = _descendants(self._process.pid)[1:] if self._process else []
        if children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(children), signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it and its children, as SIGSTOP does."""
        self._frozen = self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        frozen, self._frozen = self._frozen, []
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def terminate(self) -> None:
        """End it gracefully; it is started again."""
        self.serving.clear()
        self._signal(signal.SIGTERM, children=False)

    async def close(self) -> None:
        """End it for good."""
        if self._keeper is None:
            return
        self._is_closing = True
        self._signal(signal.SIGKILL)
        await self._keeper

    async def _keep(self) -> None:
        while not self._is_closing:
            self.starts += 1
            self.lines.append(f"--- start {self.starts} of {self.name}\n")
            process = self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=dict(self._environment),
                limit=_MAX_LINE_BYTES,
                preexec_fn=_set_apart,
                **self._options,
            )
            await self._read(process)
            await process.wait()
            self._process = None
            self._frozen.clear()
            self.serving.clear()
            self._after_end(process.pid)
            self.lines.append(f"--- {self.name} ended with {process.returncode}\n")
            if self._is_closing:
                return
            pause_seconds, self._pause_seconds = self._pause_seconds, RESTART_SECONDS
            await asyncio.sleep(pause_seconds)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode(errors="replace")
            self.lines.append(line)
            if "Traceback" in line:
                self.tracebacks.append(line)
            if not self.serving.is_set() and (address := self._address_in(line)):
                self.address = address
                self.on_address(address)
                self.serving.set()

    def _signal(self, number: signal.Signals, *, children: bool = True) -> list[int]:
        if self._process is None:
            return []
        pids = _descendants(self._process.pid) if children else [self._process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids


def logged_address(line: str) -> str:
    """Return the address that a service says it serves, empty where the line says none."""
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        return str(json.loads(line).get("address", ""))
    return ""
