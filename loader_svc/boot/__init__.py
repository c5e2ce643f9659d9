"""A whole boot in virtual time: what udev and libkmod ask of the kernel when a machine's devices are triggered.

``simulate_boot`` is where to begin: a ``BootSpec`` and a seed in, a ``BootResult`` out, without any server.
"""

from __future__ import annotations

from loader_svc.boot.device import Device
from loader_svc.boot.machine import Machine, MachineError, ModuleInit
from loader_svc.boot.replay import replay_trace
from loader_svc.boot.simulate import simulate_boot
from loader_svc.boot.spec import BootCall, BootResult, BootSpec, ModuleConfig, TreeSource
from loader_svc.boot.userland import Userland

__all__ = [
    "BootCall",
    "BootResult",
    "BootSpec",
    "Device",
    "Machine",
    "MachineError",
    "ModuleConfig",
    "ModuleInit",
    "TreeSource",
    "Userland",
    "replay_trace",
    "simulate_boot",
]
