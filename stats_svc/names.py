"""What may be called what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from modpressure.errors import BadRequest, shown
from modpressure.kernel.autoload import MAX_NAME_BYTES
from modpressure.v1 import call_pb2
from modpressure.v1 import ledger_service_pb2 as pb

MAX_INSTANCE_ID_BYTES: Final = 64
MAX_LOADER_BYTES: Final = 128
MAX_FORMER_INSTANCES: Final = 1000

MAX_CALLS_IN_FLIGHT: Final = 100_000
"""Calls of one loader that are on their way, more than it can have workers and RPCs."""

MAX_LIVE_CALLS: Final = 1_000_000
"""Calls of one loader whose modules are live: a hundred systems with all modules of a kernel."""

MAX_REQUEST_ID_BYTES: Final = 128
MAX_DIGEST_BYTES: Final = 64

MAX_CALL_BYTES: Final = 16 << 10
"""Longest call or unload, as a loader tells of it: its path and the value that offended have 4 KiB each at most, all
else some hundred bytes."""

MAX_EVENT_BYTES: Final = MAX_CALL_BYTES + 1024
"""Longest event: with what stats_svc fills in."""

MAX_ERRNO_BYTES: Final = 32
"""Longer than the name of any errno. All who wait for a call's result are told its errno."""

MAX_RECORD_BYTES: Final = 1 << 20
"""Longest record of the calls that were made for a request, which is told in one answer."""

MAX_RESULT_BYTES: Final = 64 * 1024
"""Longest result that a claim is settled with."""

MAX_TOLD_RECORD_BYTES: Final = MAX_RECORD_BYTES + 2 * MAX_RESULT_BYTES
"""Longest record with its result, and with what stats_svc fills in of each call."""

MAX_SYMBOLS: Final = 20_000
"""Symbols that a call asks for at once; the most that a module of a Debian kernel imports is some thousands."""

MAX_MODULE_NAME_BYTES: Final = 64
"""Longer than any that the kernel takes: 56 bytes with its NUL (include/linux/module.h, ``MODULE_NAME_LEN``)."""

MAX_INODE_BYTES: Final = 4096 + 256
"""Longest key of a gate: a path (include/uapi/linux/limits.h, ``PATH_MAX``), and whose tree and which copy it is."""

_SYSTEM_ID: Final = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)


def check_system_id(value: str) -> str:
    """Return ``value`` if it can be the id of a system. BadRequest if not."""
    if not _SYSTEM_ID.fullmatch(value):
        raise BadRequest(
            f"{shown(value)} is no system id: 1 to 63 of a-z, 0-9 and '-', beginning with a letter", field="system"
        )
    return value


def is_module_name(value: str) -> bool:
    """Whether a module can be called so."""
    return len(value) <= MAX_MODULE_NAME_BYTES and _PRINTABLE.fullmatch(value) is not None


def check_module_name(value: str) -> str:
    """Return ``value`` if it can be the name of a module: printable ASCII without spaces. BadRequest if not."""
    if not is_module_name(value):
        raise BadRequest(f"{shown(value)} is no name of a module", field="module")
    return value


def check_inode(value: str) -> str:
    """Return ``value`` if it can be the key of a gate. BadRequest if not."""
    if len(value.encode()) > MAX_INODE_BYTES:
        raise BadRequest(f"{shown(value)} is longer than {MAX_INODE_BYTES} bytes", field="inode")
    return value


def module_of_inode(inode: str) -> str:
    """Return the module whose file has a key ``TREE:PATH:COPY``; empty if that names none."""
    path = inode.partition(":")[2].rpartition(":")[0]
    name = path.rpartition("/")[2].partition(".")[0].replace("-", "_")
    return name if is_module_name(name) else ""


def check_ended(ended: call_pb2.Call | call_pb2.Unload) -> None:
    """Return if a call is no longer than an event may be. BadRequest if it is."""
    size_bytes = ended.ByteSize()
    if size_bytes > MAX_CALL_BYTES:
        raise BadRequest(f"a call of {size_bytes} bytes is longer than {MAX_CALL_BYTES}", field="call")
    if len(ended.errno) > MAX_ERRNO_BYTES:
        raise BadRequest(f"{shown(ended.errno)} is no name of an errno", field="errno")


def check_symbols(values: Sequence[str]) -> None:
    """Return if so many symbols may be asked for at once. BadRequest if not: the answer would be too long."""
    if len(values) > MAX_SYMBOLS:
        raise BadRequest(f"{len(values)} symbols are more than {MAX_SYMBOLS}", field="symbols")


def check_hello(hello: pb.Hello) -> None:
    """Return if a loader may present itself so. BadRequest if not."""
    if len(hello.former_instance_ids) > MAX_FORMER_INSTANCES:
        raise BadRequest(
            f"{len(hello.former_instance_ids)} former instances are more than {MAX_FORMER_INSTANCES}",
            field="former_instance_ids",
        )
    in_flight = len(hello.calls) + len(hello.requests)
    if in_flight > MAX_CALLS_IN_FLIGHT:
        raise BadRequest(f"{in_flight} calls in flight are more than {MAX_CALLS_IN_FLIGHT}", field="calls")
    if len(hello.live_call_ids) > MAX_LIVE_CALLS:
        raise BadRequest(
            f"{len(hello.live_call_ids)} live modules are more than {MAX_LIVE_CALLS}", field="live_call_ids"
        )
    _check_instance_id(hello.instance_id, "instance_id")
    for former in hello.former_instance_ids:
        _check_instance_id(former, "former_instance_ids")
    if len(hello.loader.encode()) > MAX_LOADER_BYTES or not hello.loader.isprintable():
        raise BadRequest(
            f"{shown(hello.loader)} is no name of a loader: at most {MAX_LOADER_BYTES} bytes, printable", field="loader"
        )
    for call in hello.calls:
        check_system_id(call.system)
        check_inode(call.inode)
        if call.module:
            check_module_name(call.module)
    for held in hello.requests:
        check_system_id(held.system)
        name = held.request.name
        if len(name.encode()) > MAX_NAME_BYTES:
            raise BadRequest(f"{shown(name)} is longer than {MAX_NAME_BYTES} bytes", field="name")


def _check_instance_id(value: str, field: str) -> None:
    if len(value) > MAX_INSTANCE_ID_BYTES or not _PRINTABLE.fullmatch(value):
        raise BadRequest(
            f"{shown(value)} is no instance id: 1 to {MAX_INSTANCE_ID_BYTES} printable ASCII characters", field=field
        )


def is_request_id(value: str) -> bool:
    """Whether a client may name a request so. PostgreSQL stores no NUL, and an exported file nothing unprintable."""
    return value.isprintable() and 0 < len(value.encode()) <= MAX_REQUEST_ID_BYTES


def check_claim(request_id: str, digest: bytes) -> None:
    """Return if a client's request may be claimed so. BadRequest if not."""
    if not is_request_id(request_id):
        raise BadRequest(
            f"{shown(request_id)} is no request id: 1 to {MAX_REQUEST_ID_BYTES} bytes, printable", field="request_id"
        )
    if len(digest) > MAX_DIGEST_BYTES:
        raise BadRequest(f"a digest of {len(digest)} bytes is longer than {MAX_DIGEST_BYTES}", field="digest")
