"""Handlers of RPC methods, as grpc has them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

import grpc

from modpressure.errors import ModpressureError

REFUSAL: Final[ContextVar[ModpressureError | None]] = ContextVar("refusal", default=None)
"""In the task of an RPC: why it is refused, where that is known when it begins. Who reads its request looks here first,
since a request may be long."""


def rebuilt(handler: Any, behavior: Any, request_deserializer: Callable[[bytes], Any] | None = None) -> Any:
    """Return a handler of the same kind with another behaviour, and another deserializer if one is given."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behavior, request_deserializer or handler.request_deserializer, handler.response_serializer)
