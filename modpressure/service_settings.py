"""What both services can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from modpressure.limits import Limits
from modpressure.loopback import is_local
from modpressure.setting_types import Bytes, File, LogFormat, LogLevel, MessageBytes, Seconds, SomeNumber, SomeSeconds
from modpressure.settings_sources import BadSetting, Settings, variable
from modpressure.units import parse_bytes


class ServiceSettings(Settings):
    """What both services can be told."""

    grace_seconds: Seconds = Field(
        default=10, description="How long a stopping service lets calls in flight end before it cuts them off; seconds."
    )
    insecure: bool = Field(
        default=False,
        description="Listen beyond the loopback without TLS, where whoever is on the way can read and change what is"
        " sent; else that is refused.",
    )
    tls_cert: File = Field(
        default=None,
        description="Serve with TLS, and show the certificate in this PEM file; it may be replaced at any time.",
        json_schema_extra={"default_text": "no TLS"},
    )
    tls_key: File = Field(
        default=None,
        description="PEM file of the certificate's private key.",
        json_schema_extra={"default_text": "none"},
    )
    tls_client_ca: File = Field(
        default=None,
        description="Let in only clients with a certificate that was signed by one in this PEM file (mutual TLS).",
        json_schema_extra={"default_text": "any client"},
    )
    tokens: File = Field(
        default=None,
        description="TOML file of the tokens that are let in, see modpressure token; it may be changed at any time.",
        json_schema_extra={"default_text": "anybody is let in"},
    )
    message_limit: MessageBytes = Field(
        "16MiB",
        description="Longest message, in either direction: bytes, 16MiB, 1G; 16KiB at least. A request that would take"
        " more than four times that in memory, because it has many small parts, is answered RESOURCE_EXHAUSTED.",
    )
    metadata_limit: Bytes = Field("16KiB", description="Most metadata (headers) of one RPC: bytes, 16KiB.")
    connection_limit: SomeNumber = Field(
        4096,
        description="Connections at once, as far as open files allow (ulimit -n); further ones are closed at once.",
    )
    host_connection_limit: SomeNumber = Field(
        2048,
        description="Connections at once from one IP address; further ones are closed within some seconds, the newest"
        " first. Raise it where a proxy stands before the service.",
    )
    stream_limit: SomeNumber = Field(
        1024, description="RPCs at once on one connection; the client's gRPC has further ones wait."
    )
    rpc_limit: SomeNumber = Field(
        4096,
        description="RPCs at once in all. Each client may have as many as are left free then, alone half of them; more"
        " is answered RESOURCE_EXHAUSTED with RetryInfo. A client is a token, or without tokens an IP address.",
    )
    rate_limit: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        5000,
        description="RPCs that a client may begin a second, as many at once after a rest; more is answered"
        " RESOURCE_EXHAUSTED with RetryInfo. Messages of streams count, too, and are read later instead; 0: no limit.",
    )
    request_seconds: SomeSeconds = Field(
        30,
        description="How long the request of an RPC, of a stream its first message, may take to arrive once the RPC has"
        " begun; seconds.",
    )
    handshake_seconds: SomeSeconds = Field(
        20, description="How long a new connection may take until it speaks TLS, where that is on, and HTTP/2; seconds."
    )
    idle_seconds: SomeSeconds = Field(
        600, description="How long a connection may be without an RPC before it is closed; seconds."
    )
    age_seconds: SomeSeconds = Field(
        3600,
        description="How old a connection may become before it is told to take no new RPCs; clients open another one by"
        " themselves; seconds.",
    )
    age_grace_seconds: SomeSeconds = Field(
        24 * 3600, description="How long the RPCs on such a connection may still take before they are cut off; seconds."
    )
    ping_seconds: SomeSeconds = Field(
        10,
        description="Least time between two keepalive pings of a client; one that keeps pinging more often is cut off"
        " (too_many_pings); seconds.",
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

    @property
    def limits(self) -> Limits:
        """What a server grants its clients."""
        return Limits(
            message_bytes=parse_bytes(self.message_limit),
            metadata_bytes=parse_bytes(self.metadata_limit),
            connections=self.connection_limit,
            host_connections=self.host_connection_limit,
            streams=self.stream_limit,
            rpcs=self.rpc_limit,
            rate=self.rate_limit,
            request_seconds=self.request_seconds,
            handshake_seconds=self.handshake_seconds,
            idle_seconds=self.idle_seconds,
            age_seconds=self.age_seconds,
            age_grace_seconds=self.age_grace_seconds,
            ping_seconds=self.ping_seconds,
        )

    def check(self) -> None:
        """Refuse to be open to other machines where nobody has said so. BadSetting."""
        # Each service has it with a default of its own.
        listen: str = self.listen  # type: ignore[attr-defined]
        if self.tls_cert is None and not self.insecure and not is_local(listen):
            raise BadSetting(
                f"{listen!r} can be reached from other machines: set tls_cert and tls_key"
                f" ({variable(type(self), 'tls_cert')}, {variable(type(self), 'tls_key')}), or give --insecure to do"
                " without TLS",
                field="listen",
            )
