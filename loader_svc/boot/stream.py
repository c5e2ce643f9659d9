"""Sending the calls of a boot to stats_svc as it goes on, where they count as those of a system like any other."""

from __future__ import annotations

from typing import Final

from loader_svc.boot.simulate import MODPROBE, Boot
from loader_svc.boot.spec import BootResult, BootSpec
from loader_svc.virtual.call import VirtualCall
from loader_svc.virtual.machine import VirtualMachine
from loader_svc.virtual.stream import Messages, Send, StatsTarget, streamed
from modpressure.v1 import call_pb2

__all__ = ["StatsTarget", "stream_boot"]

LOADER: Final = "boot"
"""What the simulation calls itself, as loaders have names."""


async def stream_boot(spec: BootSpec, seed: int, target: StatsTarget) -> BootResult:
    """Boot, and have stats_svc count each call; return when all are committed.

    The clock of the boot begins now. Unavailable if stats_svc does not answer, NotNow if it makes no sense of a call;
    what was committed until then stays. Else as ``simulate_boot``.
    """
    messages = Messages(spec.policy)

    def message_of(call: VirtualCall) -> call_pb2.Call:
        if call.worker == MODPROBE:
            return messages.of(call, "modprobe", call_pb2.ORIGIN_AUTOLOAD)
        return messages.of(call, "udev")

    def simulate(send: Send) -> tuple[BootResult, VirtualMachine]:
        boot = Boot(spec, seed, lambda call: send(message_of(call)))
        return boot.run(), boot.kernel

    return await streamed(target, LOADER, simulate)
