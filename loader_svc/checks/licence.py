"""Which licences may use symbols that are for GPL code only (include/linux/license.h, kernel/module/main.c)."""

from __future__ import annotations

from typing import Final

from loader_svc.image import ElfImage

GPL_COMPATIBLE: Final = frozenset(
    {"GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"}
)

PRETENDERS: Final = frozenset({"driverloader", "lve"})
"""Modules that the kernel does not believe (``module_augment_kernel_taints``)."""


def is_proprietary(elf: ElfImage) -> bool:
    """Whether a module counts as proprietary: by its first licence, or because it has none."""
    return elf.license not in GPL_COMPATIBLE or elf.this_module_name in PRETENDERS
