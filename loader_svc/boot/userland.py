"""What runs above the kernel: udev with its workers, libkmod, and switches for what they might do instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from modpressure.errors import BadRequest

KMODS: Final = (30, 34)
"""The versions of libkmod that are known: Debian 12's and Debian 13's."""

Trigger = Literal["initramfs", "root"]

MAX_WORKERS: Final = 2048
WORKERS_PER_CPU: Final = 2
WORKERS_ANYWAY: Final = 16
WORKER_BYTES: Final = 128 << 20
LEAST_BY_MEMORY: Final = 10


def children_max(cpus: int, memory_bytes: int) -> int:
    """Return how many workers udevd has at most, unless told.

    min(2 * CPUs + 16, RAM / 128 MiB but at least 10, 2048): src/udev/udevd.c, ``manager_adjust_config``, systemd 252.
    """
    return min(WORKERS_PER_CPU * cpus + WORKERS_ANYWAY, max(memory_bytes // WORKER_BYTES, LEAST_BY_MEMORY), MAX_WORKERS)


@dataclass(frozen=True, slots=True)
class Userland:
    """Which userland boots, and how it is set."""

    kmod: int = 30
    """Version of libkmod: 30 decompresses by itself and calls init_module; 34 hands a file over to a kernel that can
    decompress it (libkmod/libkmod-module.c of both)."""

    udev_workers: int | None = None
    """``udev.children_max=`` on the kernel's command line; None for udev's own rule."""

    reads_decompression: bool | None = None
    """Whether compressed files are handed to the kernel if it can: None as the version of libkmod has it."""

    trigger: Trigger = "initramfs"
    """What is triggered: ``initramfs`` subsystems, then devices, as an initramfs does; ``root`` both at once, some
    subsystems first, as systemd-udev-trigger.service does on a root file system."""

    one_request_per_modalias: bool = False
    """What if udev asked libkmod once for each distinct MODALIAS, and had later events with it wait for that."""

    locks_modules: bool = False
    """What if libkmod held a lock while it loads a module, and looked at its state once more behind it."""

    def __post_init__(self) -> None:
        """BadRequest for a libkmod that there is not, or a number of workers that makes no sense."""
        if self.kmod not in KMODS:
            raise BadRequest(f"kmod {self.kmod!r} is not 30 or 34", field="kmod")
        if self.trigger not in get_args(Trigger):
            raise BadRequest(f"trigger {self.trigger!r} is not initramfs or root", field="trigger")
        if self.udev_workers is not None and not 1 <= self.udev_workers <= MAX_WORKERS:
            raise BadRequest(
                f"udev_workers {self.udev_workers} is not between 1 and {MAX_WORKERS}", field="udev_workers"
            )

    def workers(self, cpus: int, memory_bytes: int) -> int:
        """Return how many workers udevd may have on a machine."""
        return self.udev_workers if self.udev_workers is not None else children_max(cpus, memory_bytes)

    @property
    def hands_over(self) -> bool:
        """Whether libkmod gives a compressed file to a kernel that can decompress it."""
        return self.kmod >= 34 if self.reads_decompression is None else self.reads_decompression


STANDARD: Final = Userland()
"""Debian 12's."""
