"""Turn a gRPC status back into what went wrong.

The reverse of what a service does with its errors: a status that one of our services sent becomes the same class of
``modpressure.errors``, with the same sentence and field. What gRPC itself says (nobody there, no answer in time) gets a
sentence that names the service and its address.

    ModpressureError
    ├── ... those of modpressure.errors
    ├── Unavailable
    │   ├── NoAnswer        nothing answers at the address
    │   └── TimedOut        no answer in time; what was asked may still happen
    └── ServerFailed        the service failed in a way that nobody foresaw, or speaks another protocol
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from modpressure.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    ModpressureError,
    NotFound,
    NotNow,
    OverLimit,
    Unavailable,
)


class NoAnswer(Unavailable):
    """Nothing answers at the address."""


class TimedOut(Unavailable):
    """No answer came in time; what was asked for may still happen."""


class ServerFailed(ModpressureError):
    """The service failed in a way that nobody foresaw."""


_CLASSES: Final[dict[Any, type[ModpressureError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.OUT_OF_RANGE: BadRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverLimit,
    grpc.StatusCode.FAILED_PRECONDITION: NotNow,
    grpc.StatusCode.ABORTED: NotNow,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}

_BY_NUMBER: Final = {code.value[0]: error for code, error in _CLASSES.items()}

_TRAILING_ERRNO: Final = re.compile(r"\s*\([0-9]+\)$")


@contextmanager
def rpc_errors(service: str, address: str, timeout_seconds: float | None = None) -> Iterator[None]:
    """Raise what a gRPC error in the block means; ``service`` and ``address`` say who was asked."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error, service, address, timeout_seconds) from error


def error_of(error: Any, service: str, address: str, timeout_seconds: float | None = None) -> ModpressureError:
    """Return what the ``AioRpcError`` means."""
    code, details = error.code(), error.details() or ""
    is_ours, field = _error_info(error)
    if code in _CLASSES and (is_ours or code is not grpc.StatusCode.UNAVAILABLE):
        return _CLASSES[code](details or f"{service} at {address} answered {code.name}", field=field)
    if code is grpc.StatusCode.UNAVAILABLE:
        return NoAnswer(f"no answer from {service} at {address}: {_reason(details)}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        within = f" within {timeout_seconds:g} s" if timeout_seconds else " in time"
        return TimedOut(f"{service} at {address} did not answer{within}")
    if code is grpc.StatusCode.CANCELLED:
        return Unavailable(f"{service} at {address} ended the call")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerFailed(f"what answers at {address} is not {service}: {_one_line(details) or 'unimplemented'}")
    return ServerFailed(f"{service} at {address} failed: {_one_line(details) or code.name}")


def error_of_code(number: int, sentence: str) -> ModpressureError:
    """Return the error of a google.rpc code that came inside of a message, such as in ``RequestError``."""
    return _BY_NUMBER.get(number, ServerFailed)(sentence)


def _error_info(error: Any) -> tuple[bool, str]:
    """Return whether one of our services sent the status itself, and which field it blames."""
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details contradict the status: then they are not ours
        return False, ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return True, info.metadata.get("field", "")
    return False, ""


def _reason(details: str) -> str:
    """Return the last link of gRPC's chain of reasons, such as "connection refused"."""
    last = _TRAILING_ERRNO.sub("", _one_line(details)).rpartition(": ")[2]
    return last[:1].lower() + last[1:] if last else "it is not reachable"


def _one_line(text: str) -> str:
    return " ".join(text.split())
