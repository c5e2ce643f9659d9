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
import socket
from pathlib import Path
from typing import Annotated, ClassVar

import platformdirs
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from modpressure.memory import usable_memory_bytes
from modpressure.service_settings import ServiceSettings
from modpressure.setting_types import (
    MAX_NAME_BYTES,
    Addresses,
    AdvertisedAddress,
    Bytes,
    BytesOrShare,
    File,
    KmodVersion,
    ListenAddress,
    Name,
    Seconds,
    SomeNumber,
    SomeSeconds,
    StatsAddress,
    SystemId,
    Texts,
)
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


def _default_database() -> str:
    return str(platformdirs.user_state_path("modpressure") / "modpressure.sqlite3")


def _default_cache_dir() -> Path:
    return platformdirs.user_cache_path("modpressure")


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
        default=10, description="How long a loader may be silent before what its calls hold is given back; seconds."
    )
    keep_events: Annotated[int, Field(ge=0)] = Field(
        default=10_000_000,
        description="How many events of each system are kept, the newest; 0 keeps all. Counters are kept for ever.",
    )
    keep_days: Seconds = Field(
        default=0, description="For how many days events are kept; 0 is no limit. Counters are kept for ever."
    )
    import_limit: Bytes = Field(
        "8GiB", description="Longest file that is imported as a system, packed and unpacked: bytes, 512MiB, 8G."
    )
    system_limit: Annotated[int, Field(ge=0)] = Field(
        default=4096,
        description="How many systems there may be; whoever would create one more is answered RESOURCE_EXHAUSTED, and"
        " those that there are go on; 0: no limit.",
    )
    lead_seconds: SomeSeconds = Field(
        default=3,
        description="With several stats_svc over one PostgreSQL database: how long the one that leads may be silent"
        " before another takes over, the same for all; seconds.",
    )
    advertise: AdvertisedAddress = Field(
        default="",
        description="Where the other stats_svc on the same database reach this one, HOST:PORT.",
        json_schema_extra={"default_text": "the address it listens on; its host's name where that is all addresses"},
    )
    peer_ca: File = Field(
        default=None,
        description="Talk TLS to the other stats_svc on the same database, whose certificates must be signed by one in"
        " this PEM file; tls_cert is shown to them.",
        json_schema_extra={"default_text": "no TLS"},
    )

    @property
    def import_limit_bytes(self) -> int:
        """The longest file that is imported, in bytes."""
        return parse_bytes(self.import_limit)


class LoaderSettings(ServiceSettings):
    """What loader_svc can be told."""

    model_config = SettingsConfigDict(env_prefix="MODPRESSURE_LOADER_")
    section: ClassVar[str] = "loader"
    program: ClassVar[str] = "loader_svc: some CPUs of a simulated machine, which load modules."

    listen: ListenAddress = Field(
        default="127.0.0.1:50051", description="Address to serve gRPC on, HOST:PORT; port 0 takes a free one."
    )
    stats: StatsAddress = Field(
        default="127.0.0.1:50050",
        description="Address of stats_svc, HOST:PORT or dns:///HOST:PORT; of several over one database, with commas.",
    )
    stats_ca: File = Field(
        default=None,
        description="Talk TLS to stats_svc, whose certificate must be signed by one in this PEM file.",
        json_schema_extra={"default_text": "no TLS"},
    )
    stats_cert: File = Field(
        default=None,
        description="PEM file of the certificate that is shown to stats_svc.",
        json_schema_extra={"default_text": "none"},
    )
    stats_token_file: File = Field(
        default=None,
        description="File that holds the token to show to stats_svc, one of role load.",
        json_schema_extra={"default_text": "none"},
    )
    stats_key: File = Field(
        default=None,
        description="PEM file of that certificate's private key.",
        json_schema_extra={"default_text": "none"},
    )
    name: Name = Field(
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
        " identity show lists them), catalogue, the kernel of the catalogue's modules, or a file that modpressure"
        " identity from wrote.",
    )
    init: File = Field(
        default=None,
        description="CSV file of how long the init functions of modules take and what they return, as modpressure"
        " verify --init takes it (docs/init.md).",
        json_schema_extra={"default_text": "each returns 0 at once"},
    )
    init_seed: int = Field(default=0, description="Seed of what that file leaves to chance.")
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
    request_limit: SomeNumber = Field(
        16384,
        description="Requests in progress at once of all LoadModules streams, at most 1024 of one. Each client may have"
        " as many as are left free then, alone half of them; its streams are read later then, and a client that has"
        " none and finds no place is answered RESOURCE_EXHAUSTED with RetryInfo.",
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
        return f"{socket.gethostname()}:{port if port.isdecimal() else os.getpid()}"[:MAX_NAME_BYTES]


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
    stats: StatsAddress = Field(
        default="127.0.0.1:50050",
        description="Address of stats_svc, HOST:PORT or dns:///HOST:PORT; of several over one database, with commas.",
    )
    ca: File = Field(
        default=None,
        description="Talk TLS to the services, whose certificates must be signed by one in this PEM file.",
        json_schema_extra={"default_text": "no TLS"},
    )
    cert: File = Field(
        default=None,
        description="PEM file of the certificate that is shown to the services.",
        json_schema_extra={"default_text": "none"},
    )
    token_file: File = Field(
        default=None,
        description="File that holds the token to show to the services.",
        json_schema_extra={"default_text": "none"},
    )
    key: File = Field(
        default=None,
        description="PEM file of that certificate's private key.",
        json_schema_extra={"default_text": "none"},
    )
    timeout_seconds: SomeSeconds = Field(
        default=60, description="How long one request may take; storms and streams may take longer; seconds."
    )
    system: SystemId = Field(default="default", description="The simulated machine that commands are about.")
