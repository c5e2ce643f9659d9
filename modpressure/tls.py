"""TLS from files, on both sides of a connection.

Certificates and keys are PEM files, which can be replaced while they are in use: a server looks at them at each
handshake, a client at each call. Without files nothing is encrypted.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import grpc
import structlog

from modpressure.errors import ModpressureError
from modpressure.loopback import is_loopback, is_socket

_log = structlog.get_logger(__name__)

_Stamp: TypeAlias = tuple[tuple[int, int, int], ...]
T_co = TypeVar("T_co", covariant=True)


class BadCredentials(ModpressureError):
    """Files that make no TLS credentials; the sentence names the file."""


class Files(Protocol[T_co]):
    """Files that credentials are made of."""

    def files(self) -> list[Path]:
        """Return which they are."""

    def read(self) -> T_co:
        """Return what they hold, as gRPC takes it. BadCredentials if one is away or makes no sense."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server shows, and whom it lets in."""

    cert: Path
    """Its certificate, and those that lead to the authority."""

    key: Path
    client_ca: Path | None = None
    """Who must have signed a client's certificate (mutual TLS); None lets in clients without one."""

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files. BadCredentials if they make none now.

        Files that make none later, as when only one of two has been replaced yet, leave what was.
        """
        follower: Any = Follower(self)
        return grpc.dynamic_ssl_server_credentials(follower.current, follower.changed, self.client_ca is not None)

    def files(self) -> list[Path]:
        """Return its files."""
        return [self.cert, self.key, *([self.client_ca] if self.client_ca else [])]

    def read(self) -> Any:
        """Return the files' content as grpc takes it. BadCredentials if a file is away or makes no sense."""
        _check_pair(self.cert, self.key)
        chain = [(_read(self.key), _read(self.cert))]
        return grpc.ssl_server_certificate_configuration(chain, _read_ca(self.client_ca) if self.client_ca else None)


class Follower(Generic[T_co]):
    """The newest of some files' credentials that were in order. Safe to use from several threads."""

    def __init__(self, tls: Files[T_co], *, is_logged: bool = True) -> None:
        """Read the files. BadCredentials if they make none; later, what makes none leaves what was."""
        self._tls = tls
        self._is_logged = is_logged
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self.current = tls.read()

    def _stamp_now(self) -> _Stamp | None:
        """Return what changes whenever one of the files does, None if one is away."""
        try:
            return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in (path.stat() for path in self._tls.files()))
        except OSError:
            return None

    def changed(self) -> T_co | None:
        """Return new credentials, None while they are what they were. gRPC asks from threads of its own."""
        with self._lock:
            stamp = self._stamp_now()
            if stamp is None or stamp == self._stamp:
                return None
            try:
                self.current = self._tls.read()
            except BadCredentials as error:
                if self._is_logged:
                    _log.warning("kept the old certificate", reason=error.sentence)
                return None
            self._stamp = stamp
            if self._is_logged:
                _log.info("took a new certificate", files=[str(path) for path in self._tls.files()])
            return self.current


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whom a client trusts, and what it shows."""

    ca: Path
    """Who must have signed the server's certificate, which must be for the name that is asked for."""

    cert: Path | None = None
    key: Path | None = None

    def files(self) -> list[Path]:
        """Return its files."""
        return [self.ca, *(path for path in (self.cert, self.key) if path)]

    def read(self) -> grpc.ChannelCredentials:
        """Return credentials from the files as they are now. BadCredentials if they make none."""
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(_read_ca(self.ca))
        _check_pair(self.cert, self.key)
        return grpc.ssl_channel_credentials(_read_ca(self.ca), _read(self.key), _read(self.cert))


def server_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """Return a server's TLS from its settings, None if they ask for none. BadCredentials if they are half of one."""
    if cert is None and key is None:
        if client_ca is not None:
            raise BadCredentials(f"tls_client_ca {client_ca} asks for TLS, which needs tls_cert and tls_key")
        return None
    if cert is None or key is None:
        there, missing = ("tls_key", "tls_cert") if cert is None else ("tls_cert", "tls_key")
        raise BadCredentials(f"{there} {cert or key} needs {missing} beside it")
    return ServerTls(cert, key, client_ca)


def client_tls(ca: Path | None, cert: Path | None, key: Path | None) -> ClientTls | None:
    """Return a client's TLS from its settings, None if they ask for none. BadCredentials if they are half of one."""
    if (cert is None) != (key is None):
        there, missing = ("key", "cert") if cert is None else ("cert", "key")
        raise BadCredentials(f"{there} {cert or key} needs {missing} beside it")
    if ca is None:
        if cert is not None:
            raise BadCredentials(f"cert {cert} is for TLS, which needs ca: who signed the server's certificate")
        return None
    return ClientTls(ca, cert, key)


def open_channel(
    address: str, tls: ClientTls | grpc.ChannelCredentials | None, options: Any = None, token: str = ""
) -> Any:
    """Return an asynchronous channel to ``address``, encrypted if ``tls`` is given, whose calls carry a token if any.

    BadCredentials if files make none, or if others could read the token on its way: only the loopback needs no TLS.
    """
    if tls is None and not token:
        return grpc.aio.insecure_channel(address, options=options)
    if tls is not None:
        credentials = tls.read() if isinstance(tls, ClientTls) else tls
    else:
        check_readable_by_none(address)
        kind = grpc.LocalConnectionType.UDS if is_socket(address) else grpc.LocalConnectionType.LOCAL_TCP
        credentials = grpc.local_channel_credentials(kind)
    if token:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return grpc.aio.secure_channel(address, credentials, options=options)


def check_readable_by_none(address: str) -> None:
    """Return if what is sent to ``address`` without TLS stays on this machine. BadCredentials if not."""
    host = address.removeprefix("dns:").rpartition("/")[2].rpartition(":")[0].strip("[]")
    if not is_socket(address) and not is_loopback(host):
        raise BadCredentials(f"the token could be read on its way to {address}: it is sent over TLS, which ca asks for")


def read_token(path: Path | None) -> str:
    """Return the token in a client's file, without the white space around it; empty if no file is given.

    BadCredentials if it can't be read, or holds something else than one token.
    """
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise BadCredentials(f"{path} can't be read: {(reason or str(error)).lower()}") from error
    if not token or not token.isprintable() or " " in token:
        raise BadCredentials(f"{path} holds no token: one word is wanted")
    return token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCredentials(f"{path} can't be read: {(error.strerror or str(error)).lower()}") from error


def _read_ca(path: Path) -> bytes:
    content = _read(path)
    try:
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise BadCredentials(f"{path} holds no certificate") from error
    return content


def _check_pair(cert: Path, key: Path) -> None:
    """Return if a certificate and a key belong together; grpc would say no more than that it is unhappy."""
    for path in (cert, key):
        _read(path)

    def no_password() -> str:
        raise BadCredentials(f"{key} is encrypted; a service has nobody to ask for its password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = (getattr(error, "reason", None) or "no PEM").lower().replace("_", " ")
        raise BadCredentials(f"{cert} and {key} make no certificate and key: {reason}") from error
    except OSError as error:
        # Just being replaced.
        raise BadCredentials(f"{cert} or {key} can't be read: {(error.strerror or str(error)).lower()}") from error
