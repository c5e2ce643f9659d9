"""What the kernel refuses before it has an image: the caller's rights, flags, descriptor, and the read.

Sources: finit_module(2), init_module(2), ``may_init_module``, ``copy_module_from_user`` in kernel/module/main.c,
``kernel_read_file`` in fs/kernel_read_file.c; Linux 6.12.
"""

from __future__ import annotations

from typing import Final

from loader_svc.steps import CallSpec, Failure
from modpressure.kernel.outcome import (
    MODULE_INIT_COMPRESSED_FILE,
    MODULE_INIT_IGNORE_MODVERSIONS,
    MODULE_INIT_IGNORE_VERMAGIC,
    Syscall,
)

KNOWN_FLAGS: Final = MODULE_INIT_IGNORE_MODVERSIONS | MODULE_INIT_IGNORE_VERMAGIC | MODULE_INIT_COMPRESSED_FILE

MIN_IMAGE_BYTES: Final = 64
"""Shortest image that init_module copies, an ELF header."""

MAX_FILE_BYTES: Final = 2**31 - 1
"""Longest file that is read, INT_MAX."""

NOT_REGULAR: Final = "kread: regular file"


def refusal(spec: CallSpec) -> Failure | None:
    """Return why a call is refused before anything is read; None if it is not. No counter moves."""
    caller = spec.caller
    if not caller.is_permitted:
        return Failure("EPERM", "permission")
    if spec.syscall is Syscall.INIT_MODULE:
        return None
    if spec.flags & ~KNOWN_FLAGS:
        return Failure("EINVAL", "flags", str(spec.flags))
    if caller.descriptor != "readable":
        return Failure("EBADF", "descriptor", caller.descriptor)
    return None


def file_failure(*, is_regular: bool, size_bytes: int, path: str) -> Failure | None:
    """Return why a file can't be read by the kernel, whoever asks; None if it can."""
    if not is_regular:
        return Failure("EINVAL", NOT_REGULAR, path)
    if size_bytes <= 0:
        return Failure("EINVAL", "kread: size", str(size_bytes))
    if size_bytes > MAX_FILE_BYTES:
        return Failure("EFBIG", "kread: size", str(size_bytes))
    return None


def read_failure(spec: CallSpec, failure: Failure | None) -> Failure | None:
    """Return why the read of a call fails, given what is wrong with the file itself, if anything."""
    if spec.caller.is_written and (failure is None or failure.check != NOT_REGULAR):
        return Failure("ETXTBSY", "kread: open for writing")
    return failure


def copy_failure(spec: CallSpec, length_bytes: int, memory_bytes: int) -> Failure | None:
    """Return why init_module can't copy an image of ``length_bytes``, on a machine with ``memory_bytes``."""
    if length_bytes < MIN_IMAGE_BYTES:
        return Failure("ENOEXEC", "kread: len", str(length_bytes))
    if length_bytes > memory_bytes:
        return Failure("ENOMEM", "kread: len", str(length_bytes))
    if spec.caller.is_image_unmapped:
        return Failure("EFAULT", "kread: address")
    return None
