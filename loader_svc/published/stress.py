"""The stress test that the patch series was tried with, simulated, and the boots that hold as much memory."""

from __future__ import annotations

from typing import Any

from loader_svc.boot import BootSpec
from loader_svc.boot.files import files_of
from loader_svc.boot.machine_file import machine_of
from loader_svc.published.figures import Stress
from loader_svc.virtual.storm import VirtualStorm, simulate_storm
from modpressure.kernel.policy import POLICIES


def peak_bytes(stress: Stress, policy: str, seed: int, costs: Any = None) -> int:
    """Return the most memory that the test's calls hold at one time: one operation of each worker, on the test's guest.

    The files are the guest's, so with debugging information if its description says so, as in its boots. ``costs`` are
    the guest's if None.
    """
    machine = machine_of(stress.machine)
    files = files_of(BootSpec(machine))
    storm = VirtualStorm(
        (stress.module,),
        workers=stress.workers,
        cpus=machine.cpus,
        policy=POLICIES[policy],
        costs=costs or machine.own_costs(),
    )
    return simulate_storm(storm, files.tree, seed, files=files.file).peak_held_bytes
