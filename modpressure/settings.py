"""What can be set: each setting's name, default, unit and meaning, in one place.

A setting is a flag, an environment variable and a key of a TOML file alike; the flag wins over the variable, the
variable over the file, the file over the default. Setting ``memory_limit`` of section ``loader`` is

    --memory-limit 2G                     flag
    MODPRESSURE_LOADER_MEMORY_LIMIT=2G    variable: MODPRESSURE, section, key
    [loader]                              file
    memory_limit = "2G"

The file is ``--config FILE``, else ``MODPRESSURE_CONFIG``, else ``modpressure.toml`` in the current directory, else
``modpressure.toml`` in the user's configuration directory (``~/.config/modpressure/``); the first that there is.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from modpressure.memory import usable_memory_bytes
from modpressure.settings_sources import BadSetting, Settings, load_settings, parse_settings
from modpressure.units import parse_bytes

__all__ = [
    "BadSetting",
    "ClientSettings",
    "LoaderSettings",
    "ServiceSettings",
    "Settings",
    "StatsSettings",
    "load_settings",
    "parse_settings",
]

_SYSTEM_ID = re.compile(r"[a-z][a-z0-9-]{0,62}", re.ASCII)
_MAX_NAME_BYTES = 128


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
    if not address.startswith(("unix:", "unix-abstract:")):
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


def _system_id(value: str) -> str:
    if not _SYSTEM_ID.fullmatch(value):
        raise ValueError(f"{value!r} is no system id: 1 to 63 of a-z, 0-9 and '-', beginning with a letter")
    return value


def _short(value: str) -> str:
    if len(value.encode()) > _MAX_NAME_BYTES:
        raise ValueError(f"it is longer than {_MAX_NAME_BYTES} bytes")
    return value


def _some_bytes(value: str) -> str:
    if parse_bytes(value) == 0:
        raise ValueError("it must be more than 0")
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
TargetAddress = Annotated[str, AfterValidator(_target_address)]
Addresses = Annotated[list[str], NoDecode, BeforeValidator(_comma_separated), AfterValidator(_target_addresses)]
Texts = Annotated[list[str], NoDecode, BeforeValidator(_comma_separated)]
Bytes = Annotated[str, BeforeValidator(_text), AfterValidator(_some_bytes)]
BytesOrShare = Annotated[str, BeforeValidator(_text), AfterValidator(_some_bytes_or_share)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SomeSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
KmodVersion = Annotated[Literal[30, 34], BeforeValidator(_number)]


def _default_database() -> str:
    return str(platformdirs.user_state_path("modpressure") / "modpressure.sqlite3")


def _default_cache_dir() -> Path:
    return platformdirs.user_cache_path("modpressure")


class ServiceSettings(Settings):
    """What both services can be told."""

    grace_seconds: Seconds = Field(
        default=10, description="How long a stopping service lets calls in flight end before it cuts them off; seconds."
    )
    reflection: bool = Field(default=True, description="Serve gRPC reflection, so that grpcurl needs no .proto files.")
    log_level: LogLevel = Field(
        default="info", description="The least level that is logged: debug, info, warning or error."
    )
    log_format: LogFormat = Field(
        default="auto",
        description="How lines are logged: console for people, json for machines; auto: console on a terminal, else"
        " json.",
    )


class StatsSettings(ServiceSettings):
    """What stats_svc can be told."""

    model_config = SettingsConfigDict(env_prefix="MODPRESSURE_STATS_")
    section: ClassVar[str] = "stats"
    program: ClassVar[str] = "stats_svc: the modules list, counters and reports of the simulated machines."

    listen: ListenAddress = Field(
        default="127.0.0.1:50050", description="Address to serve gRPC on, HOST:PORT; port 0 takes a free one."
    )
    database: str = Field(
        default_factory=_default_database,
        min_length=1,
        description="Where counts are kept: path of an SQLite file, or an SQLAlchemy URL such as"
        " postgresql+psycopg://user@host/name.",
        json_schema_extra={"default_text": "modpressure.sqlite3 in the user's state directory"},
    )
    lease_seconds: SomeSeconds = Field(
        default=10, description="How long a loader that went silent keeps the names that its calls reserved; seconds."
    )


class LoaderSettings(ServiceSettings):
    """What loader_svc can be told."""

    model_config = SettingsConfigDict(env_prefix="MODPRESSURE_LOADER_")
    section: ClassVar[str] = "loader"
    program: ClassVar[str] = "loader_svc: some CPUs of a simulated machine, which load modules."

    listen: ListenAddress = Field(
        default="127.0.0.1:50051", description="Address to serve gRPC on, HOST:PORT; port 0 takes a free one."
    )
    stats: TargetAddress = Field(
        default="127.0.0.1:50050", description="Address of stats_svc, HOST:PORT or dns:///HOST:PORT."
    )
    name: Annotated[str, AfterValidator(_short)] = Field(
        default="",
        description="Name of this loader in events and summaries, at most 128 bytes.",
        json_schema_extra={"default_text": "HOSTNAME:PORT"},
    )
    tree: str = Field(
        default="catalogue",
        min_length=1,
        description="Modules to load: a directory such as /lib/modules/RELEASE, or the bundled catalogue with its files"
        " plain, .xz or .zst: catalogue, catalogue-xz, catalogue-zst.",
    )
    modprobe_dirs: Texts = Field(
        default=[],
        description="Directories of modprobe.d files (blacklists, aliases, softdeps) to follow, comma separated.",
        json_schema_extra={"default_text": "none"},
    )
    identity: str = Field(
        default="any",
        min_length=1,
        description="Kernel to load into: any, which takes every well-formed module, another built-in one (modpressure"
        " identity show lists them), or a file that modpressure identity from wrote.",
    )
    cache_dir: Path = Field(
        default_factory=_default_cache_dir,
        description="Directory for tree indexes and the files built from the catalogue.",
        json_schema_extra={"default_text": "modpressure in the user's cache directory"},
    )
    memory_limit: BytesOrShare = Field(
        default="50%",
        description="Most real memory for the files, images and layouts of modules at once: bytes, 2G, 512MiB, or a"
        " share of what this process may use, control groups included. A call beyond it waits or is refused, as it"
        " asked.",
    )
    image_limit: Bytes = Field("256MiB", description="Largest image that a file may decompress to: bytes, 256MiB, 1G.")
    kmod: KmodVersion = Field(
        default=34,
        description="The libkmod whose way of handing compressed files to the kernel is followed: 30 decompresses by"
        " itself, 34 lets the kernel.",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=4, description="Threads that read, decompress and copy files, 1 to 1024."
    )

    @property
    def memory_limit_bytes(self) -> int:
        """The memory limit in bytes; a share is taken of what this process may use."""
        return max(1, parse_bytes(self.memory_limit, whole_bytes=usable_memory_bytes()))

    @property
    def image_limit_bytes(self) -> int:
        """The largest decompressed image, in bytes."""
        return parse_bytes(self.image_limit)

    def name_at(self, address: str) -> str:
        """Return the loader's name, which by default follows from the ``address`` that it is bound to."""
        if self.name:
            return self.name
        port = address.rpartition(":")[2]
        # Without a TCP port the process id tells loaders of one host apart.
        return f"{socket.gethostname()}:{port if port.isdecimal() else os.getpid()}"[:_MAX_NAME_BYTES]


class ClientSettings(Settings):
    """What the command ``modpressure`` can be told about the services that it talks to."""

    model_config = SettingsConfigDict(env_prefix="MODPRESSURE_CLIENT_")
    section: ClassVar[str] = "client"
    program: ClassVar[str] = "modpressure: the command line."

    loaders: Addresses = Field(
        default=["127.0.0.1:50051"],
        description="Addresses of loaders, comma separated: HOST:PORT, or dns:///HOST:PORT for all that a name stands"
        " for.",
        json_schema_extra={"default_text": "127.0.0.1:50051"},
    )
    stats: TargetAddress = Field(
        default="127.0.0.1:50050", description="Address of stats_svc, HOST:PORT or dns:///HOST:PORT."
    )
    timeout_seconds: SomeSeconds = Field(
        default=60, description="How long one request may take; storms and streams may take longer; seconds."
    )
    system: Annotated[str, AfterValidator(_system_id)] = Field(
        default="default", description="The simulated machine that commands are about."
    )
