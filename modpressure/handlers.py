"""Handlers of RPC methods, as grpc has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc


def rebuilt(handler: Any, behavior: Any, request_deserializer: Callable[[bytes], Any] | None = None) -> Any:
    """Return a handler of the same kind with another behaviour, and another deserializer if one is given."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(behavior, request_deserializer or handler.request_deserializer, handler.response_serializer)
