"""Sending the calls of a boot to stats_svc as it goes on, where they count as those of a system like any other."""

from __future__ import annotations

import time
from typing import Final

from loader_svc.boot.simulate import Boot
from loader_svc.boot.spec import BootCall, BootResult, BootSpec
from loader_svc.requests import POLICIES
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.stream import Send, StatsTarget, streamed
from modpressure.v1 import call_pb2

__all__ = ["StatsTarget", "stream_boot"]

LOADER: Final = "boot"
"""What the simulation calls itself, as loaders have names."""


async def stream_boot(spec: BootSpec, seed: int, target: StatsTarget) -> BootResult:
    """Boot, and have stats_svc count each call; return when all are committed.

    The clock of the boot begins now. Unavailable if stats_svc does not answer, NotNow if it makes no sense of a call;
    what was committed until then stays. Else as ``simulate_boot``.
    """
    messages = _Messages(spec, time.time_ns())

    def simulate(send: Send) -> tuple[BootResult, VirtualMachine]:
        boot = Boot(spec, seed, lambda call: send(messages.of(call)))
        return boot.run(), boot.kernel

    return await streamed(target, LOADER, simulate)


class _Messages:
    """Makes messages of calls."""

    def __init__(self, spec: BootSpec, began_ns: int) -> None:
        self._began_ns = began_ns
        self._policy = next(number for number, policy in POLICIES.items() if policy == spec.policy)

    def of(self, call: BootCall) -> call_pb2.Call:
        """Return the message of one call."""
        made = call_pb2.Call(
            worker=f"udev-{call.worker}" if call.worker else "modprobe",
            origin=call_pb2.ORIGIN_USERSPACE if call.worker else call_pb2.ORIGIN_AUTOLOAD,
            requester="udev" if call.worker else "modprobe",
            module=call.module,
            file=call.file,
            policy=self._policy,  # type: ignore[arg-type]
            syscall=int(call.syscall),  # type: ignore[arg-type]
            flags=call.flags,
            outcome=int(call.outcome),  # type: ignore[arg-type]
            errno=call.errno,
            check=call.check,
            duplicate=call.is_duplicate,
            file_bytes=call.compressed_bytes or call.image_bytes,
            compressed_bytes=call.compressed_bytes,
            image_bytes=call.image_bytes,
            mod_bytes=call.mod_bytes,
            text_bytes=call.text_bytes,
            peak_held_bytes=call.peak_held_bytes,
            duration_ns=call.ended_ns - call.begun_ns,
            wait_ns=call.wait_ns,
        )
        made.start_time.FromNanoseconds(self._began_ns + call.begun_ns)
        return made
