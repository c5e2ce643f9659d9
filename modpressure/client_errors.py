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

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    Overloaded,
    Unauthenticated,
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
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverLimit,
    grpc.StatusCode.FAILED_PRECONDITION: NotNow,
    grpc.StatusCode.ABORTED: NotNow,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}

_BY_NUMBER: Final = {code.value[0]: error for code, error in _CLASSES.items()}

REFUSED: Final = ("connection refused", "no such file or directory")
"""Reasons for which nobody listens at an address, of the network and of a socket of this machine."""

_HANDSHAKE: Final = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not believed",
    "Hostname Verification Check failed": "its certificate is for another name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it closed the connection, as one does that wants TLS or another certificate",
}
"""What becomes of a handshake, by words in gRPC's reason."""

_TRAILING_OK: Final = re.compile(r": OK$")
_TRAILING_ERRNO: Final = re.compile(r"\s*\([0-9]+\)$")


@contextmanager
def rpc_errors(service: str, address: str, timeout_seconds: float | None = None) -> Iterator[None]:
    """Raise what a gRPC error in the block means; ``service`` and ``address`` say who was asked."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_of(error, service, address, timeout_seconds) from error
    except asyncio.CancelledError as error:
        if not is_cut_off():
            raise
        raise NoAnswer(f"no answer from {service} at {address}: the call was cut off") from error


def is_cut_off() -> bool:
    """Return whether a CancelledError that is being handled is gRPC's alone: nobody has cancelled this task.

    grpc.aio cancels a call whose connection breaks while it tells the server that there is no further request, so that
    whoever reads the answers gets CancelledError (``_consume_request_iterator``, grpc/aio/_call.py, 1.85).
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling()


async def end_requests(call: Any) -> None:
    """Tell the server that a stream has no further request. That the connection is gone shows when answers are read."""
    # As grpc.aio says it here, and in no other place (``send_receive_close``, aio/call.pyx.pxi, 1.85).
    with suppress(grpc.aio.InternalError):
        await call.done_writing()


def error_of(error: Any, service: str, address: str, timeout_seconds: float | None = None) -> ModpressureError:
    """Return what the ``AioRpcError`` means."""
    code, details = error.code(), error.details() or ""
    is_ours, field, retry_seconds = _error_info(error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and is_ours and retry_seconds is not None:
        return Overloaded(details, field=field, retry_seconds=retry_seconds)
    if code in _CLASSES and (is_ours or code is not grpc.StatusCode.UNAVAILABLE):
        return _CLASSES[code](details or f"{service} at {address} answered {code.name}", field=field)
    if code is grpc.StatusCode.UNAVAILABLE:
        return NoAnswer(f"no answer from {service} at {address}: {reason_of(details)}")
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


def _error_info(error: Any) -> tuple[bool, str, float | None]:
    """Return whether one of our services sent the status itself, which field it blames, and when to try again."""
    is_ours, field, retry_seconds = False, "", None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details contradict the status: then they are not ours
        return is_ours, field, retry_seconds
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            is_ours, field = True, info.metadata.get("field", "")
        elif detail.Unpack(retry):
            retry_seconds = retry.retry_delay.ToMilliseconds() / 1000
    return is_ours, field, retry_seconds


def reason_of(details: str) -> str:
    """Return why there is no connection, from the details of UNAVAILABLE.

    The last link of gRPC's chain of reasons, such as "connection refused", and what it means.
    """
    chain = _TRAILING_OK.sub("", _TRAILING_ERRNO.sub("", _one_line(details)))
    last = chain.rpartition(": ")[2].rstrip(".")
    reason = last[:1].lower() + last[1:] if last else "it is not reachable"
    if "last error: " not in chain:
        # A connection that was there is lost.
        return reason
    meaning = next((meaning for words, meaning in _HANDSHAKE.items() if words in chain), "")
    return f"{meaning} ({reason})" if meaning else reason


def _one_line(text: str) -> str:
    return " ".join(text.split())
