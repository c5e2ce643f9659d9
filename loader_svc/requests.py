"""What a request must look like: each check names the field and the value."""

from __future__ import annotations

import re
from typing import Final

from modpressure.errors import BadRequest, shown
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_MODVERSIONS, MODULE_INIT_IGNORE_VERMAGIC
from modpressure.kernel.policy import V6_3, V6_4, V6_5, Policy
from modpressure.v1 import call_pb2, loader_service_pb2

DEFAULT_SYSTEM: Final = "default"
MAX_LABEL_BYTES: Final = 128
MAX_PARAMETERS_BYTES: Final = 4096

POLICIES: Final[dict[int, Policy]] = {
    call_pb2.POLICY_V6_3: V6_3,
    call_pb2.POLICY_V6_4: V6_4,
    call_pb2.POLICY_V6_5: V6_5,
}
KMODS: Final[dict[int, int]] = {loader_service_pb2.KMOD_30: 30, loader_service_pb2.KMOD_34: 34}

_SYSTEM_ID = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
_USER_FLAGS: Final = MODULE_INIT_IGNORE_MODVERSIONS | MODULE_INIT_IGNORE_VERMAGIC


def system_id(value: str) -> str:
    """Return a system's id, "default" for none given."""
    if not value:
        return DEFAULT_SYSTEM
    if not _SYSTEM_ID.fullmatch(value):
        raise BadRequest(
            f"system {shown(value)} is no id: 1 to 63 of a-z, 0-9 and '-', beginning with a letter", field="system"
        )
    return value


def label(field: str, value: str) -> str:
    """Return a free label that is not too long."""
    if len(value) * 4 > MAX_LABEL_BYTES and len(value.encode()) > MAX_LABEL_BYTES:
        raise BadRequest(f"{field} {value[:20]!r}… is longer than {MAX_LABEL_BYTES} bytes", field=field)
    return value


def request_id(value: str) -> str:
    """Return a client's id of its request, which may be none: a label that is printable, as a database keeps it."""
    if not label("request_id", value).isprintable():
        raise BadRequest(
            f"{shown(value)} is no request id: at most {MAX_LABEL_BYTES} bytes, printable", field="request_id"
        )
    return value


def policy_number(value: int) -> int:
    """Return a policy's number, 0 for none given."""
    if value and value not in POLICIES:
        raise BadRequest(f"there is no policy number {value}", field="policy")
    return value


def kmod_version(value: int, default: int) -> int:
    """Return a libkmod version, ``default`` for none given."""
    if not value:
        return default
    if value not in KMODS:
        raise BadRequest(f"there is no kmod number {value}", field="kmod")
    return KMODS[value]


def user_flags(value: int) -> int:
    """Return finit_module flags that a caller may choose."""
    if value & ~_USER_FLAGS:
        raise BadRequest(f"flags {value} has bits other than 1 and 2; flag 4 follows from the file", field="flags")
    return value


def origin(value: int) -> call_pb2.Origin.ValueType:
    """Return an origin, userspace for none given."""
    if value == call_pb2.ORIGIN_UNSPECIFIED:
        return call_pb2.ORIGIN_USERSPACE
    if value not in (call_pb2.ORIGIN_USERSPACE, call_pb2.ORIGIN_AUTOLOAD):
        raise BadRequest(f"there is no origin number {value}", field="origin")
    return value  # type: ignore[return-value]


def in_range(field: str, value: int, least: int, most: int) -> int:
    """Return a number that lies between two others."""
    if not least <= value <= most:
        raise BadRequest(f"{field} {value} is not between {least} and {most}", field=field)
    return value


def parameters(value: str) -> str:
    """Return module parameters that are not too long."""
    if len(value.encode()) > MAX_PARAMETERS_BYTES:
        raise BadRequest(f"parameters are longer than {MAX_PARAMETERS_BYTES} bytes", field="parameters")
    return value
