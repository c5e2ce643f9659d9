"""The virtual driver: its calls a second against a plain SimPy model of the same calls, and what a boot takes.

The calls are those of a boot: each of 4,096 CPUs asks for the same chain of modules, in the same order, under ``v6.4``.
Both are timed by the CPU time of this process, so that other programs disturb them less.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Final, TypeVar

from bench.simpy_model import SimpyMachine
from bench.table import Row
from loader_svc.boot import BootResult, BootSpec, simulate_boot
from loader_svc.boot.machine_file import machine_of
from loader_svc.catalogue import catalogue_tree
from loader_svc.plan import Plans
from loader_svc.steps import CallSpec
from loader_svc.trees import open_tree
from loader_svc.virtual.conservation import imbalances
from loader_svc.virtual.costs import default_costs
from loader_svc.virtual.files import Loadable
from loader_svc.virtual.machine import IMAGE_LIMIT_BYTES, VirtualCall, VirtualFile, VirtualMachine
from loader_svc.virtual.process import Body, Process
from modpressure.kernel.counters import Counters
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_4

CHAIN: Final = (
    *("cryptd", "crypto_simd", "aesni_intel", "sha512_generic", "sha512_ssse3", "ghash_clmulni_intel"),
    *("crct10dif_pclmul", "crc32c_intel", "irqbypass", "kvm", "kvm_intel"),
)
"""What a CPU of an Intel machine asks for."""

CPUS: Final = 4096
ROUNDS: Final = 3
SPREAD_NS: Final = 20_000_000
"""Within what time the workers begin."""


class Chain:
    """The files of the chain, and what each comes to."""

    def __init__(self) -> None:
        tree = open_tree(catalogue_tree())
        self.plans = Plans(IMAGE_LIMIT_BYTES)
        self.files = [VirtualFile(tree.module(name).path, partial(tree.open_file, name)) for name in CHAIN]
        self.specs = [CallSpec(file.path, file.path, V6_4, Syscall.FINIT_MODULE) for file in self.files]
        costs = default_costs()
        pairs = zip(self.files, self.specs, strict=True)
        self.loadables = [Loadable(file, self.plans, spec, costs, CPUS) for file, spec in pairs]

    def virtual(self, seed: int) -> Counters:
        """Carry all calls out on the virtual driver."""
        machine = VirtualMachine(plans=self.plans, cpus=CPUS, costs=default_costs(), seed=seed)
        for begin_ns in self._begins(seed):
            Process(machine, self._worker(), begin_ns)
        machine.run()
        assert imbalances(machine) == []
        return machine.counters

    def simpy(self, seed: int) -> Counters:
        """Carry all calls out on the SimPy model."""
        return SimpyMachine(default_costs(), CPUS, seed).run(self.loadables, iter(self._begins(seed)))

    def _worker(self) -> Body:
        for spec, file in zip(self.specs, self.files, strict=True):
            yield VirtualCall(spec, file)

    @staticmethod
    def _begins(seed: int) -> list[int]:
        dice = Random(seed)
        return [int(dice.random() * SPREAD_NS) for _ in range(CPUS)]


Result = TypeVar("Result")


def _seconds(run: Callable[[], Result]) -> tuple[float, Result]:
    gc.collect()
    begun = time.process_time()
    result = run()
    return time.process_time() - begun, result


def _calls() -> Row:
    chain = Chain()
    ratios: list[float] = []
    rates: list[tuple[float, float]] = []
    for seed in range(ROUNDS + 1):
        seconds, counters = _seconds(partial(chain.virtual, seed))
        peer_seconds, peer = _seconds(partial(chain.simpy, seed))
        calls = CPUS * len(CHAIN)
        assert (counters.calls, counters.modcount) == (peer.calls, peer.modcount) == (calls, len(CHAIN))
        if seed:  # the first round warms up
            ratios.append(peer_seconds / seconds)
            rates.append((calls / seconds, calls / peer_seconds))
    rate, peer_rate = sorted(rates)[len(rates) // 2]
    return Row(
        "virtual finit_module calls",
        ratios,
        5,
        "at least",
        f"a plain SimPy model, {peer_rate:.0f}/s",
        f"{rate:.0f} calls a second on {CPUS} CPUs",
    )


def boot(cpus: int, seed: int = 1) -> BootResult:
    """Boot the bundled NVMe guest with another number of CPUs."""
    machine = replace(machine_of("nvme-255"), cpus=cpus)
    return simulate_boot(BootSpec(machine, policy=V6_4), seed)


def _boots() -> list[Row]:
    boot(64)  # opens the tree and plans its modules
    rows = []
    medians: dict[int, float] = {}
    for cpus, bound_seconds in ((255, 0.5), (4096, 15.0)):
        timed = [_seconds(partial(boot, cpus, seed)) for seed in range(ROUNDS)]
        taken = sorted(seconds for seconds, _ in timed)
        medians[cpus] = taken[len(taken) // 2]
        rows.append(
            Row(
                f"a boot of {cpus:,} CPUs",
                [seconds / bound_seconds for seconds in taken],
                1,
                "at most",
                f"{bound_seconds:g} s of CPU time",
                f"{medians[cpus]:.2f} s, {timed[0][1].counters.calls} calls",
            )
        )
    rows.append(
        Row(
            "CPU time per CPU of a boot, 4,096 CPUs",
            [medians[4096] / 4096 / (medians[255] / 255)],
            1.25,
            "at most",
            "the same for 255 CPUs",
        )
    )
    code = (
        "import resource; from bench.bench_virtual import boot; boot(4096);"
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    # A process of its own: this one has had other things in its memory.
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    resident_mib = int(shown) / 1024
    rows.append(
        Row(
            "memory of a boot of 4,096 CPUs",
            [resident_mib / 1024],
            1,
            "at most",
            "1 GiB",
            f"{resident_mib:.0f} MiB resident at most",
        )
    )
    return rows


def run() -> list[Row]:
    """Return the rows of this benchmark."""
    return [_calls(), *_boots()]
