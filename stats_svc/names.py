"""What may be called what, and how a value is shown in a sentence."""

from __future__ import annotations

import re
from typing import Final

from modpressure.errors import BadRequest

MAX_INSTANCE_ID_BYTES: Final = 64
MAX_LOADER_BYTES: Final = 128

MAX_MODULE_NAME_BYTES: Final = 64
"""Longer than any that the kernel takes: 56 bytes with its NUL (include/linux/module.h, ``MODULE_NAME_LEN``)."""

_SYSTEM_ID: Final = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_MAX_SHOWN: Final = 80


def shown(value: str) -> str:
    """Return ``value`` quoted, on one line, and not too long to be read."""
    return repr(value) if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]!r}... ({len(value)} characters)"


def check_system_id(value: str) -> str:
    """Return ``value`` if it can be the id of a system. BadRequest if not."""
    if not _SYSTEM_ID.fullmatch(value):
        raise BadRequest(
            f"{shown(value)} is no system id: 1 to 63 of a-z, 0-9 and '-', beginning with a letter", field="system"
        )
    return value


def check_module_name(value: str) -> str:
    """Return ``value`` if it can be the name of a module: printable ASCII without spaces. BadRequest if not."""
    if len(value) > MAX_MODULE_NAME_BYTES or not _PRINTABLE.fullmatch(value):
        raise BadRequest(f"{shown(value)} is no name of a module", field="module")
    return value


def check_hello(instance_id: str, loader: str) -> None:
    """Return if a loader may present itself so. BadRequest if not."""
    if len(instance_id) > MAX_INSTANCE_ID_BYTES or not _PRINTABLE.fullmatch(instance_id):
        raise BadRequest(
            f"{shown(instance_id)} is no instance id: 1 to {MAX_INSTANCE_ID_BYTES} printable ASCII characters",
            field="instance_id",
        )
    if len(loader.encode()) > MAX_LOADER_BYTES or not loader.isprintable():
        raise BadRequest(
            f"{shown(loader)} is no name of a loader: at most {MAX_LOADER_BYTES} bytes, printable", field="loader"
        )
