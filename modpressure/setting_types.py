"""Kinds of values that settings have, each with what makes no sense of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from modpressure.loopback import is_socket
from modpressure.units import parse_bytes

_SYSTEM_ID = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
MAX_NAME_BYTES = 128

MIN_MESSAGE_BYTES: Final = 16 * 1024
"""Room for what ends a call, which names a path (include/uapi/linux/limits.h, ``PATH_MAX``): a call of which stats_svc
can't be told that it has ended keeps its name."""


def _comma_separated(value: Any) -> Any:
    """Take a list as a file gives it, or as one text with commas; a flag given twice gives several such texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _port(text: str, address: str) -> None:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise ValueError(f"{address!r} is not HOST:PORT with a port of 0 to 65535")


def _listen_address(address: str) -> str:
    if not is_socket(address):
        host, _, port = address.rpartition(":")
        if not host or (":" in host and not host.startswith("[")):
            raise ValueError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
        _port(port, address)
    return address


def _target_address(address: str) -> str:
    if not address.startswith("dns:"):
        return _listen_address(address)
    # dns:[//authority/]host:port, https://github.com/grpc/grpc/blob/master/doc/naming.md
    host, _, port = address.removeprefix("dns:").rpartition("/")[2].rpartition(":")
    if not host:
        raise ValueError(f"{address!r} is not dns:///HOST:PORT")
    _port(port, address)
    return address


def _target_addresses(addresses: list[str]) -> list[str]:
    if not addresses:
        raise ValueError("no address is given")
    return [_target_address(address) for address in addresses]


def _stats_address(addresses: str) -> str:
    return ",".join(_target_addresses([address.strip() for address in addresses.split(",")]))


def _system_id(value: str) -> str:
    if not _SYSTEM_ID.fullmatch(value):
        raise ValueError(f"{value!r} is no system id: 1 to 63 of a-z, 0-9 and '-', beginning with a letter")
    return value


def _name(value: str) -> str:
    # As stats_svc takes it of a loader.
    if not value.isprintable():
        raise ValueError(f"{value!r} has characters that can't be printed")
    if len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"it is longer than {MAX_NAME_BYTES} bytes")
    return value


def _some_bytes(value: str) -> str:
    if parse_bytes(value) == 0:
        raise ValueError("it must be more than 0")
    return value


def _message_bytes(value: str) -> str:
    if parse_bytes(value) < MIN_MESSAGE_BYTES:
        raise ValueError(f"it must be at least {MIN_MESSAGE_BYTES} bytes")
    return value


def _some_bytes_or_share(value: str) -> str:
    if parse_bytes(value, whole_bytes=1 << 40) == 0:
        raise ValueError("it must be more than 0")
    return value


def _text(value: Any) -> Any:
    """Take a bare number in a file as its text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _number(value: Any) -> Any:
    """Take a decimal text as its number, which Literal alone does not."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value


ListenAddress = Annotated[str, AfterValidator(_listen_address)]
AdvertisedAddress = Annotated[str, AfterValidator(lambda address: _listen_address(address) if address else "")]
StatsAddress = Annotated[str, AfterValidator(_stats_address)]
"""Address of stats_svc, or of several over one database, with commas."""

Addresses = Annotated[list[str], NoDecode, BeforeValidator(_comma_separated), AfterValidator(_target_addresses)]
Texts = Annotated[list[str], NoDecode, BeforeValidator(_comma_separated)]
Bytes = Annotated[str, BeforeValidator(_text), AfterValidator(_some_bytes)]
MessageBytes = Annotated[str, BeforeValidator(_text), AfterValidator(_message_bytes)]
BytesOrShare = Annotated[str, BeforeValidator(_text), AfterValidator(_some_bytes_or_share)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SomeNumber = Annotated[int, Field(ge=1, le=2**31 - 1)]
SomeSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
KmodVersion = Annotated[Literal[30, 34], BeforeValidator(_number)]
Name = Annotated[str, AfterValidator(_name)]
SystemId = Annotated[str, AfterValidator(_system_id)]
File = Annotated[Path | None, Field()]
"""A file that may be left out."""
