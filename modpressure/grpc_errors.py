"""Turn what went wrong into a gRPC status.

The status codes follow AIP-193; the details are those of google.rpc (``BadRequest``, ``ErrorInfo``, ``RetryInfo``).
"""

from __future__ import annotations

import asyncio
import math
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, NoReturn

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
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
    Replaced,
    Unauthenticated,
    Unavailable,
)

ERROR_DOMAIN: Final = "modpressure"
"""``ErrorInfo.domain`` of every error of this package."""

RETRY_DELAY_SECONDS: Final = 1
"""What ``RetryInfo`` advises where trying again may help."""

INTERNAL_SENTENCE: Final = "something went wrong inside of the server; its log says what"

_CODES: Final[dict[type[ModpressureError], Any]] = {
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    OverLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotNow: grpc.StatusCode.FAILED_PRECONDITION,
    Replaced: grpc.StatusCode.ABORTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

MAX_SENTENCE_BYTES: Final = 1000
"""Longest sentence on the wire. It goes there up to three times, as metadata, of which a client takes some 8 KiB."""

_log = structlog.get_logger(__name__)


def status_code_of(error: BaseException) -> Any:
    """Return the ``grpc.StatusCode`` that ``error`` gets on the wire; INTERNAL for what nobody foresaw."""
    for kind in type(error).__mro__:
        code = _CODES.get(kind)
        if code is not None:
            return code
    return grpc.StatusCode.INTERNAL


def status_of(error: BaseException, rpc_name: str) -> status_pb2.Status:
    """Return the whole ``google.rpc.Status`` of ``error``: code, sentence, details.

    Only a ``ModpressureError`` that has a code of its own speaks on the wire; of anything else nothing is told, and its
    traceback is logged with ``rpc_name``: the sentence that the client gets instead says so.
    """
    code = status_code_of(error)
    if code is grpc.StatusCode.INTERNAL or not isinstance(error, ModpressureError):
        _log.error("rpc failed", rpc=rpc_name, code=grpc.StatusCode.INTERNAL.name, exc_info=error)
        return status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=INTERNAL_SENTENCE)
    sentence = _short(error.sentence)
    info = error_details_pb2.ErrorInfo(reason=code.name, domain=ERROR_DOMAIN)
    if error.field:
        info.metadata["field"] = error.field
    details: list[Message] = [info]
    if isinstance(error, BadRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=sentence)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Unavailable | Overloaded):
        delay = duration_pb2.Duration()
        # A client that comes too early is refused again: rounded up.
        seconds = error.retry_seconds if isinstance(error, Overloaded) else RETRY_DELAY_SECONDS
        delay.FromMilliseconds(math.ceil(seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=sentence)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _short(sentence: str) -> str:
    """Return a sentence that is not longer than fits, and says so if it was."""
    content = sentence.encode(errors="replace")
    if len(content) <= MAX_SENTENCE_BYTES:
        return sentence
    return f"{content[: MAX_SENTENCE_BYTES // 2].decode(errors='ignore')}... ({len(content)} bytes)"


async def abort_with(context: Any, rpc_name: str, error: Exception, *, logged: bool = False) -> NoReturn:
    """End the RPC of ``context`` with the status of ``error``, and log it in one line unless it is ``logged`` already.

    CancelledError if its client has left meanwhile.
    """
    status = status_of(error, rpc_name)
    if not logged and status.code != grpc.StatusCode.INTERNAL.value[0]:
        _log.info("rpc failed", rpc=rpc_name, code=status_code_of(error).name, sentence=status.message)
    try:
        await context.abort_with_status(rpc_status.to_status(status))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as gone:
        # The client has left, so there is nobody to tell: what grpc.aio does with an RPC that was cancelled is right.
        raise asyncio.CancelledError from gone
    raise AssertionError("abort_with_status returned") from error


class InFlight:
    """The RPCs of one server that are being answered, to be cut off when it stops."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self.is_cut_off = False

    def cut_off(self) -> None:
        """Have each answered UNAVAILABLE now.

        What gRPC does by itself at the end of a server's grace reaches some clients as CANCELLED, as if they had wanted
        it: that the stream is reset may come before that the connection is closed.
        """
        self.is_cut_off = True
        for task in list(self.tasks):
            task.cancel()


IN_FLIGHT: Final[ContextVar[InFlight | None]] = ContextVar("in_flight", default=None)
"""In the tasks of a server's RPCs, that of the server."""


class translate_errors:  # noqa: N801, RUF100 (used like a function)
    """Answer with the right status whatever is raised in the ``async with`` block of a unary or a streaming RPC.

    ``context`` is the RPC's servicer context, ``rpc_name`` what the log calls it, such as ``Stats.GetReport``. Passes
    through: cancellation by the client, and an abort that the block made itself. A class of a few slots rather than
    ``asynccontextmanager``, whose generator would cost more than the rest of a small RPC's Python.
    """

    __slots__ = ("_context", "_in_flight", "_rpc_name", "_task")

    def __init__(self, context: Any, rpc_name: str) -> None:
        self._context = context
        self._rpc_name = rpc_name
        self._in_flight = IN_FLIGHT.get()
        self._task = asyncio.current_task()

    async def __aenter__(self) -> None:
        """Let the server cut the RPC off."""
        if self._in_flight is not None and self._task is not None:
            self._in_flight.tasks.add(self._task)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the RPC if ``error`` is one to translate."""
        if self._in_flight is not None and self._task is not None:
            self._in_flight.tasks.discard(self._task)
        if isinstance(error, asyncio.CancelledError):
            if self._in_flight is not None and self._in_flight.is_cut_off:
                await abort_with(self._context, self._rpc_name, Unavailable("the server is stopping"))
            if self._task is not None and not self._task.cancelling():
                # Nobody wants this RPC cancelled, but what it waited for was. gRPC would let its client wait for ever.
                await abort_with(self._context, self._rpc_name, Unavailable("what the request waited for was cut off"))
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        await abort_with(self._context, self._rpc_name, error)
