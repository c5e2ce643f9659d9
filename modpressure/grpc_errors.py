"""Turn what went wrong into a gRPC status.

The status codes follow AIP-193; the details are those of google.rpc (``BadRequest``, ``ErrorInfo``, ``RetryInfo``).
"""

from __future__ import annotations

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
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    OverLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotNow: grpc.StatusCode.FAILED_PRECONDITION,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}

_log = structlog.get_logger(__name__)


def status_code_of(error: BaseException) -> Any:
    """Return the ``grpc.StatusCode`` that ``error`` gets on the wire; INTERNAL for what nobody foresaw."""
    for kind in type(error).__mro__:
        code = _CODES.get(kind)
        if code is not None:
            return code
    return grpc.StatusCode.INTERNAL


def status_of(error: BaseException) -> status_pb2.Status:
    """Return the whole ``google.rpc.Status`` of ``error``: code, sentence, details.

    Only a ``ModpressureError`` that has a code of its own speaks on the wire; of anything else nothing is told.
    """
    code = status_code_of(error)
    if code is grpc.StatusCode.INTERNAL or not isinstance(error, ModpressureError):
        return status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=INTERNAL_SENTENCE)
    info = error_details_pb2.ErrorInfo(reason=code.name, domain=ERROR_DOMAIN)
    if error.field:
        info.metadata["field"] = error.field
    details: list[Message] = [info]
    if isinstance(error, BadRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.sentence)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Unavailable):
        delay = duration_pb2.Duration(seconds=RETRY_DELAY_SECONDS)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=error.sentence)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort_with(context: Any, rpc_name: str, error: Exception) -> NoReturn:
    """End the RPC of ``context`` with the status of ``error``; its traceback, if any matters, goes to the log alone."""
    status = status_of(error)
    if status.code == grpc.StatusCode.INTERNAL.value[0]:
        _log.error("rpc failed", rpc=rpc_name, exc_info=error)
    else:
        _log.debug("rpc refused", rpc=rpc_name, code=status_code_of(error).name, sentence=status.message)
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status returned") from error


class translate_errors:  # noqa: N801, RUF100 (used like a function)
    """Answer with the right status whatever is raised in the ``async with`` block of a unary or a streaming RPC.

    ``context`` is the RPC's servicer context, ``rpc_name`` what the log calls it, such as ``Stats.GetReport``. Passes
    through: cancellation, and an abort that the block made itself. A class of two slots rather than
    ``asynccontextmanager``, whose generator would cost more than the rest of a small RPC's Python.
    """

    __slots__ = ("_context", "_rpc_name")

    def __init__(self, context: Any, rpc_name: str) -> None:
        self._context = context
        self._rpc_name = rpc_name

    async def __aenter__(self) -> None:
        """Nothing to prepare."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the RPC if ``error`` is one to translate."""
        if error is None or not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        await abort_with(self._context, self._rpc_name, error)
