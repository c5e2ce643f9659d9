"""What becomes of a call, in the words of the kernel's counters."""

from __future__ import annotations

from enum import IntEnum


class Outcome(IntEnum):
    """What became of a call. The numbers are those of ``modpressure.v1.Outcome``."""

    LIVE = 1
    """The module is live."""

    KREAD = 2
    """Failed while the file was read."""

    DECOMPRESS = 3
    """Failed while the kernel decompressed the image."""

    BECOMING = 4
    """Failed before the final layout was allocated."""

    LOAD = 5
    """Failed after the final layout was allocated."""

    INIT = 6
    """The init function failed; the kernel counts nothing."""

    SHARED = 7
    """Took the result of a call in flight; allocated and counted nothing."""

    REFUSED = 8
    """Refused before the read, or interrupted in the gate; counted nothing."""

    ABANDONED = 9
    """Never ended, as far as anybody was told: its loader is gone. No call ends so, and none is counted so."""

    @property
    def word(self) -> str:
        """The name as people read and write it, such as ``becoming``."""
        return self.name.lower()


class Syscall(IntEnum):
    """The system call that carried the module in. The numbers are those of ``modpressure.v1.Syscall``."""

    FINIT_MODULE = 1
    INIT_MODULE = 2


MODULE_INIT_IGNORE_MODVERSIONS = 1
MODULE_INIT_IGNORE_VERMAGIC = 2
MODULE_INIT_COMPRESSED_FILE = 4
"""finit_module's flags, include/uapi/linux/module.h."""
