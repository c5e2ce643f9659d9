"""Processes on simulated CPUs: each a generator of what it does next."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from loader_svc.virtual.machine import VirtualCall, VirtualMachine

Body = Generator[int | VirtualCall | None, Any, None]
"""Yields what keeps its CPU busy, in ns; a call that it makes, and is sent the ending; or None to sleep until woken."""


class Process:
    """A process: on a CPU, waiting in a call, or asleep; ``go_on`` is its task on the machine's CPUs."""

    __slots__ = ("_advance", "_body", "_call", "_is_asleep", "_machine", "_send", "_task")

    def __init__(self, machine: VirtualMachine, body: Body, delay_ns: int = 0) -> None:
        """Begin at once, in its turn, or after a delay."""
        self._machine = machine
        self._advance = machine.advance
        self._body = body
        self._send = body.send
        self._call: VirtualCall | None = None
        self._is_asleep = False
        self._task = self.go_on
        machine.cpus.enter(self._task, delay_ns)

    def wake(self, delay_ns: int = 0) -> None:
        """Let it go on if it sleeps."""
        if self._is_asleep:
            self._is_asleep = False
            self._machine.cpus.enter(self._task, delay_ns)

    def go_on(self) -> int | None:
        """Go on: return the ns that its CPU is busy, None when it leaves the CPU."""
        call = self._call
        send, advance = self._send, self._advance
        what: Any = None
        if call is not None:
            what = call.ending
            if what is None:
                spent_ns = advance(call)
                what = call.ending
                # A call that has ended may have something left to spend.
                if what is None or spent_ns:
                    return spent_ns
            self._call = None
        while True:
            try:
                what = send(what)
            except StopIteration:
                return None
            if what is None:
                self._is_asleep = True
                return None
            if what.__class__ is not int:
                call = what
                self._machine.start(call, self._task)
                spent_ns = advance(call)
                what = call.ending
                if what is None or spent_ns:
                    self._call = call
                    return spent_ns
            elif what:
                return what
            else:
                what = None
